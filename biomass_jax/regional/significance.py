"""Which differences are no chance, as numbers: their spread, the least that is significant, patches."""

import math

import numpy as np
from scipy import ndimage
from scipy.optimize import minimize
from scipy.special import ndtr

STEP = 1e-3  # of histograms of z or |z|
_WINDOWS = 3  # in which the middle of the differences is looked for


def variance(sd_1: np.ndarray, sd_2: np.ndarray, r: float) -> np.ndarray:
    """Of the difference of two estimates whose errors have the correlation r."""
    return sd_1**2 + sd_2**2 - 2 * r * sd_1 * sd_2


def counted(values: np.ndarray, bins: int) -> np.ndarray:
    """How many of the values lie in each step from 0 on; the last bin takes all beyond, the first all below."""
    return np.bincount(np.clip(values / STEP, 0, bins - 1).astype(np.int64), minlength=bins)


def central_variance(histogram: np.ndarray) -> float:
    """Variance of the normal distribution that the middle of what was counted is a part of.

    The middle is the narrowest half first, then 1.5 standard deviations around the mean of what that half tells. What
    lies outside, such as changes, bears on it only by moving the middle.
    """
    total = np.concatenate([[0], np.cumsum(histogram)])
    starts = np.flatnonzero(total <= total[-1] / 2)
    stops = np.searchsorted(total, total[starts] + total[-1] / 2)
    narrowest = np.argmin(stops - starts)
    mean, sd = _normal_of(histogram, int(starts[narrowest]), int(stops[narrowest]))
    for _ in range(_WINDOWS):
        low, high = np.clip((mean + np.array([-1.5, 1.5]) * sd) / STEP, 0, len(histogram)).astype(int)
        mean, sd = _normal_of(histogram, int(low), int(high))
    return sd**2


def _normal_of(histogram: np.ndarray, first: int, last: int) -> tuple[float, float]:
    """Mean and standard deviation of a normal distribution by its part in some bins (maximum likelihood)."""
    counts, middles = histogram[first:last], STEP * (np.arange(first, last) + 0.5)
    low, high = STEP * first, STEP * last
    mean = float(np.average(middles, weights=counts))
    square = float(np.average((middles - mean) ** 2, weights=counts))

    def loss(at: np.ndarray) -> float:
        shift, sd = at[0], math.exp(at[1])
        inside = ndtr((high - mean - shift) / sd) - ndtr((low - mean - shift) / sd)
        return float((square + shift**2) / (2 * sd**2) + math.log(sd) + math.log(max(inside, 1e-300)))

    start = [0.0, math.log((high - low) / 2)]
    shift, log_sd = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x
    return mean + float(shift), math.exp(float(log_sd))


def least_significant(histogram: np.ndarray, fdr: float) -> float:
    """The least |z| that Benjamini and Hochberg's step-up procedure calls significant; infinite where none is.

    Args:
        histogram: how many |z| lie in each step of 0.001 from 0 on.
        fdr: share of the significant that may be so by chance.
    """
    beyond = np.cumsum(histogram[::-1])[::-1]  # how many are at least as large as a bin's lower end
    lower = STEP * np.arange(len(histogram))
    passes = (2 * ndtr(-lower) <= fdr * beyond / max(int(beyond[0]), 1)) & (beyond > 0)
    return float(lower[np.argmax(passes)]) if passes.any() else math.inf


def without_small_patches(classes: np.ndarray, least: int) -> np.ndarray:
    """Classes -1, 0, 1 (H, W), with 0 for patches of one sign of fewer than `least` pixels, by sides and corners."""
    kept = classes.copy()
    for sign in (-1, 1):
        patches, count = ndimage.label(classes == sign, structure=np.ones((3, 3)))
        small = np.bincount(patches.ravel(), minlength=count + 1) < least
        small[0] = False
        kept[small[patches]] = 0
    return kept
