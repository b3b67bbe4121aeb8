"""What every test shares: golden files, real samples, one compilation cache, fake devices only where asked for."""

import gc
import locale
import os
import shutil
import subprocess
import time
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


# In the form that needs no database of time zones. Of an afternoon in UTC the one makes another day where times become
# local, the other where they are read as local.
ZONES = {"Kathmandu": "<+0545>-5:45", "Marquesas": "<-0930>9:30"}


@pytest.fixture(scope="session")
def comma_locales(tmp_path_factory) -> Path:
    """Folder for LOCPATH of `comma.UTF-8`, in which 1.5 is written 1,5; empty where none can be made."""
    folder = tmp_path_factory.mktemp("locales")
    (folder / "source").write_text('LC_NUMERIC\ndecimal_point ","\nthousands_sep "."\ngrouping 3;3\nEND LC_NUMERIC\n')
    if shutil.which("localedef"):
        command = ["localedef", "-c", "-i", folder / "source", "-f", "UTF-8", folder / "comma.UTF-8"]
        subprocess.run(command, capture_output=True, check=False)  # it warns of all that isn't defined
    return folder


@pytest.fixture
def elsewhere(monkeypatch, comma_locales):
    """A function that goes to one of `ZONES`, where decimals have commas, until the test ends."""

    def go(zone: str) -> None:
        for name, value in (("TZ", ZONES[zone]), ("LANG", "de_DE.UTF-8"), ("LOCPATH", str(comma_locales))):
            monkeypatch.setenv(name, value)
        for name in ("LC_ALL", "LC_NUMERIC"):
            monkeypatch.setenv(name, "comma.UTF-8")
        time.tzset()
        assert time.strftime("%z") == ZONES[zone][1:6]
        if (comma_locales / "comma.UTF-8").exists():
            locale.setlocale(locale.LC_NUMERIC, "")  # as a program with windows does, for C libraries
            assert locale.str(1.5) == "1,5"

    yield go
    locale.setlocale(locale.LC_NUMERIC, "C")
    monkeypatch.undo()
    time.tzset()
