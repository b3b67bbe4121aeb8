"""Faults that the two packages must not have, put into a copy of the tree: a named test has to fail for each.

    python -m tests.mutation.mutate [NAME ...]

Without names all are tried, after a run in which nothing is changed and all these tests pass. Exit code 1 where a fault
stays unnoticed, or where a text to be changed is not in the source just once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutation import adapters, attention, biomass_jax, data_prep, heights, portable, regional, uncertainty, work
from tests.mutation.fault import Mutation

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("biomass_jax", "configs", "data_prep", "launch", "tests", "pyproject.toml")
MUTATIONS = (
    *(*adapters.MUTATIONS, *attention.MUTATIONS, *biomass_jax.MUTATIONS, *uncertainty.MUTATIONS, *regional.MUTATIONS),
    *(*data_prep.MUTATIONS, *heights.MUTATIONS, *portable.MUTATIONS, *work.MUTATIONS),
)
AT_ONCE = 2  # each is one test, which waits for one core for most of its time


def apply(mutation: Mutation, root: Path) -> None:
    """Change the files below `root`. ValueError where a text is not there once."""
    for path, old, new in mutation.changes:
        text = (root / path).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{mutation.name}: {path}: found {text.count(old)} times, expected once: {old!r}")
        (root / path).write_text(text.replace(old, new), encoding="utf-8")


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and the last lines of what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"--basetemp={root / 'pytest'}", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    # What a fault doesn't touch was compiled before: programs are kept by what is in them.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax-tests")
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def tried(mutation: Mutation | None, tests: Sequence[str]) -> tuple[int, str]:
    """`run_tests` in a fresh copy of the tree, with a fault or none."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(
                    source, root / part, ignore=shutil.ignore_patterns("__pycache__", "golden", "*.partial")
                )
            else:
                shutil.copy2(source, root / part)
        (root / "tests/golden").symlink_to(ROOT / "tests/golden")  # large, and read only
        if mutation is not None:
            apply(mutation, root)
        return run_tests(root, tests)


def reason(said: str) -> str:
    """What failed, in the words of the chain or of pytest."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    lines = [line[1:].strip() for line in said.splitlines() if line.startswith("E ")]
    return " ".join(" ".join(errors or lines).split())[:160]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.mutate", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(mutation.name for mutation in MUTATIONS))
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - {mutation.name for mutation in MUTATIONS})
    if unknown:
        parser.error(f"no mutation {', '.join(unknown)}")
    chosen = [mutation for mutation in MUTATIONS if not args.names or mutation.name in args.names]
    code, said = tried(None, sorted({mutation.test for mutation in chosen}))
    if code:
        print(said[-3000:])
        print("the tests fail without any change, so they can't tell anything", file=sys.stderr)
        return 1
    survivors = []

    def judged(mutation: Mutation) -> tuple[int, str, float]:
        began = time.monotonic()
        return *tried(mutation, [mutation.test]), time.monotonic() - began

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutation, (code, said, seconds) in zip(chosen, pool.map(judged, chosen), strict=True):
            if code != 1:  # other codes: interrupted, wrongly called, no such test
                survivors.append(mutation.name)
            verdict = "red" if code == 1 else "GREEN" if code == 0 else f"not run (exit code {code})"
            print(f"{mutation.name}: {verdict}, {seconds:.0f} s: {reason(said)}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} red" + (f"; not: {', '.join(survivors)}" * bool(survivors)))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
