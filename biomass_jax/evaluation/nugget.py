"""How much of a squared error geolocation and GEDI itself explain, estimated from errors of neighbouring labels.

Errors (prediction - label) of two pixels close to each other differ by what the model gets wrong at one and not at the
other, and by what is no fault of a model: GEDI's random error and footprints that lie beside their pixel. Half of their
mean squared difference over the distance is a variogram; its value at distance 0, extrapolated, is the nugget
(Matheron, Principles of geostatistics, 1963). What a model misses within 60 m is in it too, and an error that all shots
of a place share isn't, so it is an estimate, rather too high for a poor model, and no bound.
"""

import numpy as np

REACH = 10  # pixels, 300 m, within which a parabola fits a variogram
FEWEST_PAIRS = 500
_STEPS = range(-REACH, REACH + 1)
# Half of all offsets (rows down, columns right), so that a pair counts once.
_OFFSETS = np.array([(y, x) for y in _STEPS for x in _STEPS if (y, x) > (0, 0) and y * y + x * x <= REACH**2])
_DISTANCES = np.hypot(*_OFFSETS.T)  # pixels


def no_pairs() -> np.ndarray:
    """Sums over no pair, (2, offsets) float64: how many pairs, and half of their squared differences."""
    return np.zeros((2, len(_OFFSETS)))


def error_pairs(rows: np.ndarray, cols: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Sums over the pairs of a chip's errors that are at most `REACH` pixels apart.

    Args:
        rows: (n,) of their pixels, which differ.
        cols: (n,) likewise.
        errors: (n,) prediction - label.

    Returns:
        As `no_pairs`; sums of chips add up.
    """
    if not len(rows):
        return no_pairs()
    chip = np.full((rows.max() + 2 * REACH + 1, cols.max() + 2 * REACH + 1), np.nan)
    chip[rows + REACH, cols + REACH] = errors
    differences = chip[rows[:, None] + REACH + _OFFSETS[:, 0], cols[:, None] + REACH + _OFFSETS[:, 1]] - errors[:, None]
    return np.stack([np.isfinite(differences).sum(0), np.nansum(differences**2, 0) / 2])


def nugget(pairs: np.ndarray) -> float | None:
    """The variogram at distance 0, squared; None where fewer than `FEWEST_PAIRS` pairs, or four distances, tell.

    A parabola through the offsets' means, weighted by their pairs, and never below 0.
    """
    counts, sums = pairs
    used = counts > 0
    if counts.sum() < FEWEST_PAIRS or len(np.unique(_DISTANCES[used])) < 4:
        return None
    weights = np.sqrt(counts[used])
    powers, means = np.vander(_DISTANCES[used], 3), sums[used] / counts[used]
    fit = np.linalg.lstsq(powers * weights[:, None], means * weights, rcond=None)[0]
    return max(float(fit[-1]), 0.0)
