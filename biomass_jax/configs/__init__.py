"""The configs that come with the package; in a checkout they are the files of the folder `configs` beside it."""

from pathlib import Path

# Of an installed package this folder holds the files themselves, and `configs/__init__.py` in place of this one.
__path__ = [str(Path(__file__).resolve().parents[2] / "configs")]
