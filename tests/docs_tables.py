"""The docs' tables of settings, made from their declarations: `python -m tests.docs_tables` writes them anew."""

import importlib
import re
from pathlib import Path

from biomass_jax.evaluation.config import Evaluate
from biomass_jax.prediction.config import Predict
from biomass_jax.runtime.settings import table
from biomass_jax.training.config import Finetune, Pretrain
from data_prep.settings import Prepare

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Page and mark: the declaration, the config whose values are the defaults shown, and what another table shows already.
TABLES: dict[tuple[str, str], tuple[type, str, type | None]] = {
    ("train.md", "finetune"): (Finetune, "finetune_all_biomes", None),
    ("train.md", "pretrain"): (Pretrain, "pretrain_simmim_swin_b_100ep", Finetune),
    ("evaluate.md", "evaluate"): (Evaluate, "evaluate", None),
    ("maps.md", "predict"): (Predict, "predict", None),
    ("data.md", "prepare"): (Prepare, "prepare", None),
}


def expected(key: tuple[str, str]) -> str:
    """The table as it has to be."""
    kind, config, without = TABLES[key]
    return table(kind, importlib.import_module(f"configs.{config}").get_config(), without=without)


def pattern(mark: str) -> re.Pattern[str]:
    """The table between its marks."""
    return re.compile(rf"(<!-- settings: {mark} -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write every table."""
    for page, mark in TABLES:
        path = DOCS / page
        text, count = pattern(mark).subn(
            lambda found, key=(page, mark): found[1] + expected(key) + found[3], path.read_text(encoding="utf-8")
        )
        assert count == 1, f"{page}: expected one table marked {mark}, found {count}"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
