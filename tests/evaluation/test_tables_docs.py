"""docs/evaluate.md names every column of the tables."""

from biomass_jax.evaluation import tables as binwise


def test_columns_are_named(root):
    text = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    plain = [name.removesuffix("_low").removesuffix("_high") for name in binwise.COLUMNS[2:]]
    assert all(f"`{name}`" in text for name in plain)
