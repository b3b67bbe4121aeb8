"""Means and standard deviations of the bands: the same bits for any order of chips and any number of workers.

Each chip gives exact sums, which are added as Python numbers of any size; nothing is rounded before the last division.
"""

import math
import operator
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from biomass_jax.data import bands
from biomass_jax.errors import DataError

SPLIT = "train"  # statistics that saw the other splits would carry them into training
_BANDS = len(bands.BAND_NAMES)


class BandSums(NamedTuple):
    """Sums over pixels of one or more chips, six of each; the sums of no chip by default.

    Attributes:
        counts: pixels counted in each band.
        totals: sums of digital numbers, int (Fraction where chips hold fractions).
        squares: sums of their squares, likewise.
    """

    counts: tuple[int, ...] = (0,) * _BANDS
    totals: tuple[int | Fraction, ...] = (0,) * _BANDS
    squares: tuple[int | Fraction, ...] = (0,) * _BANDS


def chip_sums(image: np.ndarray, *, reference: bool = False) -> BandSums:
    """Sums of one chip.

    Args:
        image: (H, W, 6) int16 or float32 digital numbers; pixels that `bands.no_data` names are left out.
        reference: count as granite-geospatial-biomass did: every value but -9999 (and NaN), band by band, so that
            pixels that are 0 in all bands count.

    Returns:
        The sums; exact for int16, and for float32 that holds integers. Other float32 sums are rounded once a chip and
        band, to float64, wherever the chip is read.

    Raises:
        DataError: another dtype or number of bands.
    """
    if image.dtype not in (np.int16, np.float32) or image.ndim != 3 or image.shape[2] != _BANDS:
        raise DataError(f"image: found {image.dtype} {image.shape}, expected int16 or float32 (H, W, {_BANDS})")
    present = None if reference else ~bands.no_data(image)
    columns = []
    for band in np.moveaxis(image, 2, 0):
        values = band[(band != bands.FILL) & ~np.isnan(band)] if present is None else band[present]
        columns.append((values.size, *_total_and_squares(values)))
    counts, totals, squares = zip(*columns, strict=True)
    return BandSums(counts, totals, squares)


def _total_and_squares(values: np.ndarray) -> tuple[int | Fraction, int | Fraction]:
    if values.dtype == np.int16:  # squares are below 2^30: int64 holds the sum of 2^33 pixels
        wide = values.astype(np.int64)
        return int(wide.sum()), int(np.dot(wide, wide))
    exact = values.astype(np.float64)  # the square of a float32 is exact in float64
    return Fraction(math.fsum(exact)), Fraction(math.fsum(exact * exact))


def combine(parts: Iterable[BandSums]) -> BandSums:
    """Sums of several chips together; their order does not matter."""
    total = BandSums()
    for part in parts:
        total = BandSums(*(tuple(map(operator.add, mine, its)) for mine, its in zip(total, part, strict=True)))
    return total


def means_stds(sums: BandSums, where: str = "") -> tuple[list[float], list[float]]:
    """Means and population standard deviations (divided by the count, not by one less), six of each.

    Raises:
        DataError: a band without a pixel; the message begins with `where`.
    """
    means, stds = [], []
    for name, count, total, squares in zip(bands.BAND_NAMES, sums.counts, sums.totals, sums.squares, strict=True):
        if count == 0:
            raise DataError(
                f"{where}statistics: band {name} has no pixel with data in the {SPLIT} split; expected at least one"
            )
        means.append(float(Fraction(total) / count))
        variance = (count * Fraction(squares) - Fraction(total) ** 2) / count**2
        stds.append(math.sqrt(max(variance, Fraction(0))))  # rounded sums of fractions may fall below 0
    return means, stds


def describe(sums: BandSums, *, reference: bool) -> dict[str, Any]:
    """Statistics as they are written: {means, stds, stat_pixels, stat_settings}.

    `stat_pixels` is one count, or a list of six where bands differ (which `reference` allows).
    """
    means, stds = means_stds(sums)
    counts: int | list[int] = sums.counts[0] if len(set(sums.counts)) == 1 else list(sums.counts)
    settings = {"split": SPLIT, "reference": reference, "std": "population"}
    return {"means": means, "stds": stds, "stat_pixels": counts, "stat_settings": settings}
