"""Means and standard deviations of the bands over the training split; see `biomass_jax.data.statistics`."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from biomass_jax.data import bands
from biomass_jax.data.records import Record
from biomass_jax.data.statistics import SPLIT, BandSums, chip_sums, combine, describe
from biomass_jax.runtime.files import write_text
from data_prep.commands import command
from data_prep.parallel import run_all
from data_prep.shards.items import items_of

_CHIPS_A_TASK = 64


def sum_items(items: Sequence[Callable[[], Record]], reference: bool = False) -> BandSums:
    """BandSums of chips, given as calls that read a record each."""
    return combine(chip_sums(item()["image"], reference=reference) for item in items)


def split_statistics(items: Sequence[Callable[[], Record]], *, reference: bool = False, workers: int = 1) -> BandSums:
    """BandSums over all chips of a split, read by `workers` processes."""
    tasks = [(items[i : i + _CHIPS_A_TASK], reference) for i in range(0, len(items), _CHIPS_A_TASK)]
    return combine(run_all(sum_items, tasks, workers=workers))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep stats", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of shards, or chips.parquet with its splits")
    parser.add_argument("--root", type=Path, help="folder that chips.parquet's paths start from (two above it)")
    parser.add_argument("--reference", action="store_true", help="count zeros, as granite-geospatial-biomass did")
    parser.add_argument("--workers", type=int, default=1, help="processes (1); the result is the same for any number")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(argv)
    items = items_of(args.source, root=args.root).get(SPLIT, [])
    sums = split_statistics(items, reference=args.reference, workers=args.workers)
    result = describe(sums, reference=args.reference)
    result = {"bands": list(bands.BAND_NAMES), **result, "chips": len(items)}
    text = json.dumps(result, indent=2)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, text + "\n")
    print(text)
    return 0
