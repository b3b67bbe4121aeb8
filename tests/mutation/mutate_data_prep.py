"""Faults that data preparation must not have, put into a copy of the tree: a named test has to fail for each.

    python -m tests.mutation.mutate_data_prep [NAME ...]

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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("biomass_jax", "configs", "data_prep", "tests", "pyproject.toml")
RULER = "tests/end_to_end/test_ruler_world.py::"
COMPOSITES = RULER + "test_composites_hold_every_pixel_and_count_scenes_as_planned[small]"
PIXELS = RULER + "test_every_pixel_tells_its_own_row_and_column[small]"
SCENES = RULER + "test_scenes_used_and_pixels_counted_are_as_planned[small]"
LABELS = RULER + "test_label_rasters_hold_what_was_planned_and_no_poison[small]"
PLACE = RULER + "test_transform_gives_longitude_and_latitude_to_a_millimetre[small]"
FILTERS = RULER + "test_filters_drop_what_was_planned[small]"
SHOTS = RULER + "test_shot_numbers_of_chips_are_exact_and_disjoint_between_splits[small]"
GROUND = RULER + "test_ground_of_splits_is_disjoint[small]"
STATISTICS = RULER + "test_statistics_are_of_train_alone[small]"
SENTINEL = RULER + "test_other_sensor_by_its_own_band_numbers[small-10SFF]"

_CLEAR_BITS = "keep &= fmask & (_MASKED | (WATER if drop_water else 0)) == 0"
_CLEAR_BANDS = "keep &= image[..., index] != bands.FILL"
_READ_WINDOW = "image, label = pair.read_image(window), pair.read_label(window)"


@dataclass(frozen=True)
class Mutation:
    """One fault: `changes` are (file, text that is there once, text in its place); `test` has to notice it."""

    name: str
    test: str
    changes: tuple[tuple[str, str, str], ...]


def _in(path: str, *changes: tuple[str, str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((path, old, new) for old, new in changes)


MUTATIONS = (
    Mutation(
        "round_for_floor",
        LABELS,
        _in("data_prep/gedi/labels.py", ("col = np.floor(", "col = np.rint("), ("row = np.floor(", "row = np.rint(")),
    ),
    Mutation(
        "rows_reversed",
        PIXELS,
        _in(
            "data_prep/chips/windows.py",
            (_READ_WINDOW, "image, label = pair.read_image(window)[::-1], pair.read_label(window)[::-1]"),
        ),
    ),
    Mutation(
        "lon_lat_swapped", LABELS, _in("data_prep/gedi/labels.py", (".transform(lon, lat)", ".transform(lat, lon)"))
    ),
    Mutation(
        "south_without_1e7",
        COMPOSITES,
        _in("biomass_jax/data/raster/grid.py", ('SOUTHERN_NORTHING if fields.get("south") else 0.0', "0.0")),
    ),
    Mutation(
        "x_plus_15_m", LABELS, _in("data_prep/gedi/labels.py", ("np.asarray(x) - t.c", "np.asarray(x) + 15 - t.c"))
    ),
    Mutation("s30_b05_for_nir", SENTINEL, _in("biomass_jax/data/bands.py", ('"B05", "B8A"', '"B05", "B05"'))),
    Mutation("fmask_equals_0", COMPOSITES, _in("data_prep/hls/granules.py", (_CLEAR_BITS, "keep &= fmask == 0"))),
    Mutation(  # the bits of 255 mask it too; what was observed is counted by it alone
        "fill_255_not_tested",
        SCENES,
        _in("data_prep/hls/granules.py", ("return fmask != FMASK_FILL", "return np.ones(fmask.shape, bool)")),
    ),
    Mutation(  # as a reader does that puts 0 where a file has no data: poison under 255 has to show
        "fill_255_taken_for_clear",
        COMPOSITES,
        _in(
            "data_prep/hls/granules.py",
            ("return fmask != FMASK_FILL", "return np.ones(fmask.shape, bool)"),
            (_CLEAR_BITS, _CLEAR_BITS.replace("fmask &", "np.where(fmask == FMASK_FILL, 0, fmask) &")),
        ),
    ),
    Mutation(
        "bit_2_ignored", COMPOSITES, _in("data_prep/hls/granules.py", ("CLOUD | ADJACENT | SHADOW", "CLOUD | SHADOW"))
    ),
    Mutation(
        "mask_per_band",
        COMPOSITES,
        _in("data_prep/hls/granules.py", (_CLEAR_BANDS, "keep &= True"))
        + _in(
            "data_prep/hls/composite_sums.py",
            (
                "keep = clear(image, fmask, *mask)\n",
                "keep = clear(image, fmask, *mask) & (np.moveaxis(image, -1, 0) != FILL)\n",
            ),
            (
                "np.zeros((_BANDS, *shape), np.int32), np.zeros(shape, np.int16)",
                "np.zeros((_BANDS, *shape), np.int32), np.zeros((_BANDS, *shape), np.int16)",
            ),
            ("sums[:, rows], number[rows])", "sums[:, rows], number[:, rows])"),
            ("range(0, number.shape[0], _PIECE)", "range(0, number.shape[1], _PIECE)"),
            ("number[rows] += keep[rows]", "number[:, rows] += keep[:, rows]"),
            ("np.maximum(number[rows], 1))", "np.maximum(number[:, rows], 1))"),
            ("out=means), number[rows], ", "out=means), number[:, rows].max(axis=0), "),
        ),
    ),
    Mutation(
        "scale_applied",
        COMPOSITES,
        _in(
            "data_prep/hls/granules.py",
            (
                "dataset.read(1, window=window, out=out)",
                "out[...] = np.rint(dataset.read(1, window=window) * dataset.scales[0])",
            ),
        ),
    ),
    Mutation("fill_averaged", COMPOSITES, _in("data_prep/hls/granules.py", (_CLEAR_BANDS, "keep &= True"))),
    Mutation(
        "hemisphere_swapped",
        PLACE,
        _in("biomass_jax/data/raster/grid.py", ("(32700 if zone[1] else 32600)", "(32600 if zone[1] else 32700)")),
    ),
    Mutation(
        "chip_offset_by_one",
        PIXELS,
        _in("data_prep/chips/windows.py", ("Window(left, top, size, size)", "Window(left + 1, top, size, size)")),
    ),
    Mutation(
        "leaf_off_equals_0",
        FILTERS,
        _in(
            "data_prep/gedi/filters.py",
            ('_differs("leaf_off_flag", 1)', '_equals("leaf_off_flag", "leaf_off_flag", 0)'),
        ),
    ),
    Mutation(
        "shot_number_through_float64",
        SHOTS,
        _in(
            "data_prep/gedi/labels.py",
            (
                "table[name].astype(kind) for",
                'table[name].astype(np.float64 if name == "shot_number" else kind).astype(kind) for',
            ),
        ),
    ),
    Mutation(
        "split_by_file",
        GROUND,
        _in(
            "data_prep/chips/splits.py",
            ("return ground.block_names(lon, lat, block_km)", 'return _column(chips, "chip_id")'),
            ("split[met] = DROPPED", "pass"),
        ),
    ),
    Mutation(
        "std_of_all_splits",
        STATISTICS,
        _in("data_prep/shards/write.py", ("reference if split == STATISTICS_SPLIT else None", "reference")),
    ),
)


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
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.mutate_data_prep", description=__doc__)
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
    for mutation in chosen:
        began = time.monotonic()
        code, said = tried(mutation, [mutation.test])
        red = code == 1  # other codes: interrupted, wrongly called, no such test
        if not red:
            survivors.append(mutation.name)
        verdict = "red" if red else "GREEN" if code == 0 else f"not run (exit code {code})"
        print(f"{mutation.name}: {verdict}, {time.monotonic() - began:.0f} s: {reason(said)}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} red" + (f"; not: {', '.join(survivors)}" * bool(survivors)))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
