"""The demo and sweeps; in a checkout they are the modules of the folder `launch` beside the package."""

from pathlib import Path

# Of an installed package this folder holds the modules themselves, and `launch/__init__.py` in place of this one.
__path__ = [str(Path(__file__).resolve().parents[2] / "launch")]
