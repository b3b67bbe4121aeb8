"""Means and standard deviations of the bands over the training split: the same bits for any order and any workers.

Each chip gives exact sums, which are added as Python numbers of any size; nothing is rounded before the last division.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands
from biomass_jax.errors import PrepError
from data_prep.commands import command

SPLIT = "train"  # statistics that saw the other splits would carry them into training
_BANDS = len(bands.BAND_NAMES)
_CHIPS_A_TASK = 64


@dataclass(frozen=True)
class Sums:
    """Sums over pixels of one or more chips, six of each; the sums of no chip by default.

    Attributes:
        counts: pixels counted in each band.
        totals: sums of digital numbers, int (Fraction where chips hold fractions).
        squares: sums of their squares, likewise.
    """

    counts: tuple[int, ...] = (0,) * _BANDS
    totals: tuple[int | Fraction, ...] = (0,) * _BANDS
    squares: tuple[int | Fraction, ...] = (0,) * _BANDS


def chip_sums(image: np.ndarray, missing: np.ndarray | None = None, *, reference: bool = False) -> Sums:
    """Sums of one chip.

    Args:
        image: (H, W, 6) int16 or float32 digital numbers.
        missing: (H, W) bool, pixels to leave out; `bands.no_data` of the image where None.
        reference: count as granite-geospatial-biomass did: every value but -9999 (and NaN), band by band, so that
            pixels that are 0 in all bands count.

    Returns:
        Sums; exact for int16, and for float32 that holds integers. Other float32 sums are rounded once a chip and
        band, to float64, wherever the chip is read.

    Raises:
        PrepError: another dtype or number of bands.
    """
    if image.dtype not in (np.int16, np.float32) or image.ndim != 3 or image.shape[2] != _BANDS:
        raise PrepError(f"image: found {image.dtype} {image.shape}, expected int16 or float32 (H, W, {_BANDS})")
    if missing is None and not reference:
        missing = bands.no_data(image)
    columns = []
    for band in np.moveaxis(image, 2, 0):
        values = band[~missing] if missing is not None else band.ravel()
        if reference:
            values = values[(values != bands.FILL) & ~np.isnan(values)]
        columns.append((values.size, *_total_and_squares(values)))
    counts, totals, squares = zip(*columns, strict=True)
    return Sums(counts, totals, squares)


def _total_and_squares(values: np.ndarray) -> tuple[int | Fraction, int | Fraction]:
    if values.dtype == np.int16:  # squares are below 2^30: int64 holds the sum of 2^33 pixels
        wide = values.astype(np.int64)
        return int(wide.sum()), int(np.dot(wide, wide))
    exact = values.astype(np.float64)  # the square of a float32 is exact in float64
    return Fraction(math.fsum(exact)), Fraction(math.fsum(exact * exact))


def combine(parts: Iterable[Sums]) -> Sums:
    """Sums of several chips together; their order does not matter."""
    counts, totals, squares = [0] * _BANDS, [Fraction(0)] * _BANDS, [Fraction(0)] * _BANDS
    for part in parts:
        for band in range(_BANDS):
            counts[band] += part.counts[band]
            totals[band] += part.totals[band]
            squares[band] += part.squares[band]
    return Sums(tuple(counts), tuple(totals), tuple(squares))


def means_stds(sums: Sums) -> tuple[list[float], list[float]]:
    """Means and population standard deviations (divided by the count, not by one less), six of each.

    Raises:
        PrepError: a band without a pixel.
    """
    means, stds = [], []
    for name, count, total, squares in zip(bands.BAND_NAMES, sums.counts, sums.totals, sums.squares, strict=True):
        if count == 0:
            raise PrepError(
                f"statistics: band {name} has no pixel with data in the {SPLIT} split; expected at least one"
            )
        means.append(float(Fraction(total) / count))
        variance = (count * Fraction(squares) - Fraction(total) ** 2) / count**2
        stds.append(math.sqrt(max(variance, Fraction(0))))  # rounded sums of fractions may fall below 0
    return means, stds


def describe(sums: Sums, *, reference: bool) -> dict[str, Any]:
    """Statistics as they are written: {means, stds, stat_pixels, stat_settings}.

    `stat_pixels` is one count, or a list of six where bands differ (which `reference` allows).
    """
    means, stds = means_stds(sums)
    counts: int | list[int] = sums.counts[0] if len(set(sums.counts)) == 1 else list(sums.counts)
    settings = {"split": SPLIT, "reference": reference, "std": "population"}
    return {"means": means, "stds": stds, "stat_pixels": counts, "stat_settings": settings}


def sum_items(items: Sequence[Callable[[], Any]], reference: bool = False) -> Sums:
    """Sums of chips, given as calls that read a record each."""
    return combine(chip_sums(item()["image"], reference=reference) for item in items)


def split_statistics(items: Sequence[Callable[[], Any]], *, reference: bool = False, workers: int = 1) -> Sums:
    """Sums over all chips of a split, read by `workers` processes."""
    from data_prep.parallel import run_all

    tasks = [(items[i : i + _CHIPS_A_TASK], reference) for i in range(0, len(items), _CHIPS_A_TASK)]
    return combine(run_all(sum_items, tasks, workers=workers))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    from data_prep.shards.items import items_of

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
        partial = args.json.with_name(f".{args.json.name}.partial")
        args.json.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n")
        partial.replace(args.json)
    print(text)
    return 0
