"""The forest world's truth: biomass as a function of place, most of it changing from one 30 m plot to the next."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.synthetic.landscape import PIXEL_M

Floats = NDArray[np.floating]

TYPICAL = 105.0  # Mg/ha, median biomass
SPREAD = 0.55  # standard deviation of log biomass
FINE_SHARE = 0.6  # of the variance of log biomass: differs from plot to plot
WITHIN_PLOT = 0.15  # biomass inside a plot differs by up to this share
_SUB_M = 10.0  # side of the patches inside a plot
_OCTAVES = {270.0: 0.25, 1110.0: 0.35, 4530.0: 0.4}  # metres between knots: share of the smooth variance
_PLOTS, _PATCHES, _GREENNESS = 100, 101, 102  # numbers of independent random fields


def hashed(i: NDArray[np.int64], j: NDArray[np.int64], field: int, seed: int) -> Floats:
    """Return a uniform random number 0..1 for each pair of integers (broadcast), always the same for the same pair."""
    # Multiplications and shifts that spread every bit of the input over the output (the finaliser of splitmix64).
    start = ((seed * 1009 + field) * 0x9E3779B97F4A7C15) % 2**64
    with np.errstate(over="ignore"):
        word = np.asarray(i, np.int64).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        word = word + np.asarray(j, np.int64).astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7) + np.uint64(start)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
        word = word ^ (word >> np.uint64(31))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def smooth(x: Floats, y: Floats, step: float, field: int, seed: int) -> Floats:
    """Return a smooth random field, mean 0 and standard deviation about 1, at places in metres (broadcast).

    Values at the knots of a lattice, blended bilinearly with eased weights.
    """
    i, j = np.floor(x / step), np.floor(y / step)
    u, v = (w * w * (3 - 2 * w) for w in (x / step - i, y / step - j))
    i, j = i.astype(np.int64), j.astype(np.int64)
    total: Floats = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(y)))
    for di, wi in ((0, 1 - u), (1, u)):
        for dj, wj in ((0, 1 - v), (1, v)):
            total += wi * wj * (hashed(i + di, j + dj, field, seed) - 0.5)
    return total / 0.214  # uniform numbers have 0.289; blending leaves 0.743 of it on average


@dataclass(frozen=True)
class Forest:
    """Biomass of a UTM zone; another seed, another forest."""

    seed: int = 0

    def plot_biomass(self, x: Floats, y: Floats) -> Floats:
        """Return biomass in Mg/ha at places in metres (broadcast), without what differs inside a plot of 30 m."""
        gentle = sum(
            np.sqrt(share) * smooth(x, y, step, number, self.seed)
            for number, (step, share) in enumerate(_OCTAVES.items())
        )
        plot = hashed(_cell(x, PIXEL_M), _cell(y, PIXEL_M), _PLOTS, self.seed)
        fine = (plot - 0.5) * np.sqrt(12)
        return TYPICAL * np.exp(SPREAD * (np.sqrt(FINE_SHARE) * fine + np.sqrt(1 - FINE_SHARE) * gentle))

    def biomass(self, x: Floats, y: Floats) -> Floats:
        """Return biomass in Mg/ha at places given by easting and northing in metres (arrays of one shape)."""
        return self.plot_biomass(x, y) * self._patch(_cell(x, _SUB_M), _cell(y, _SUB_M))

    def pixel_biomass(self, left: float, top: float, shape: tuple[int, int]) -> Floats:
        """Return (H, W) mean biomass of pixels, rows north to south; the upper-left corner is in multiples of 30 m."""
        x = left + PIXEL_M * (np.arange(shape[1])[None, :] + 0.5)
        y = top - PIXEL_M * (np.arange(shape[0])[:, None] + 0.5)
        i, j = _cell(x, _SUB_M), _cell(y, _SUB_M)
        patches = [self._patch(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
        return self.plot_biomass(x, y) * np.mean(patches, axis=0)

    def greenness(self, left: float, top: float, shape: tuple[int, int]) -> Floats:
        """Return (H, W) how green the ground between the trees is in full season, 0..1."""
        x = left + PIXEL_M * (np.arange(shape[1])[None, :] + 0.5)
        y = top - PIXEL_M * (np.arange(shape[0])[:, None] + 0.5)
        return np.clip(0.5 + 0.15 * smooth(x, y, 900.0, _GREENNESS, self.seed), 0, 1)

    def _patch(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> Floats:
        return 1 + WITHIN_PLOT * (2 * hashed(i, j, _PATCHES, self.seed) - 1)


def _cell(metres: Floats, side: float) -> NDArray[np.int64]:
    return np.floor(np.asarray(metres) / side).astype(np.int64)
