"""What every test shares: golden files, real samples, one compilation cache, fake devices only where asked for."""

import gc
import os
from pathlib import Path

import pytest

from tests.compiling import QUICK

ROOT = Path(__file__).resolve().parent.parent

# One on-disk compilation cache for all runs: a second run of the suite compiles next to nothing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Set XLA_FLAGS, empty too, to compile as users do.
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_finish():
    """What is there before the first test stays to the end: the garbage collector need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the numeric references; its README says how they were made."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of real data files, which are never committed; tests that want them are skipped without it."""
    folder = Path(os.environ.get("BIOMASS_JAX_SAMPLES", ROOT.parent / "shared" / "samples"))
    if not folder.is_dir():
        pytest.skip(f"real sample files are not here ({folder}); set BIOMASS_JAX_SAMPLES to their folder")
    return folder
