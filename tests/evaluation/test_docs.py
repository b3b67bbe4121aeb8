"""docs/evaluate.md names every setting with its default, every column and every file."""

import re

from biomass_jax.evaluation import tables as binwise
from configs import evaluate


def flat(config, prefix=""):
    found = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}": value}
    return found


def test_every_setting_is_named_with_its_default(root):
    text = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.split("## Settings")[1].splitlines() if line.startswith("| `")]
    documented = {}
    for first, second in rows:
        names = re.findall(r"`([\w.]+)`", first)
        defaults = second.split(",") if len(names) > 1 else [second]
        documented |= dict(zip(names, (default.strip() for default in defaults), strict=True))
    as_text = {None: "", False: "false", (): "()"}
    expected = {}
    for name, value in flat(evaluate.get_config()).items():
        # 0 == False, so only a bool may be looked up as one
        known = value is None or isinstance(value, bool | tuple)
        expected[name] = as_text[value] if known else str(value)
    assert documented == expected


def test_columns_and_commands_are_named(root):
    text = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    plain = [name.removesuffix("_low").removesuffix("_high") for name in binwise.COLUMNS[2:]]
    assert all(f"`{name}`" in text for name in plain)
    used = set(re.findall(r"--config\.([\w.]+)=", text))
    assert used <= set(flat(evaluate.get_config())) | {"field"}
