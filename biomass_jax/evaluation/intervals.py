"""How far scores would move with other tiles: a block bootstrap.

Pixels of one tile share weather, land and season, so they are no independent draws, and an interval from resampled
pixels would be far too narrow. Whole tiles are drawn with replacement instead (Künsch, The jackknife and the bootstrap
for general stationary observations, 1989), and a score's interval runs between percentiles over the draws.
"""

from collections.abc import Sequence

import numpy as np

from biomass_jax.tasks.scores import SCORES, RegressionSums

LEVEL = 0.95

Interval = tuple[float, float]


def tile_intervals(parts: Sequence[RegressionSums], *, resamples: int, seed: int) -> dict[str, Interval] | None:
    """95 % intervals of the scores.

    Args:
        parts: sums of each tile; those without a label are left out.
        resamples: how many times as many tiles as there are, are drawn.
        seed: the same gives the same interval.

    Returns:
        {rmse, mae, bias, r2}: (low, high), r2 only where it is defined in every draw; None where fewer than two tiles
        have labels, or with no resample.
    """
    used = [part.to_array() for part in parts if part.n]
    if len(used) < 2 or resamples < 1:
        return None
    n, error, absolute, squared, mean, spread = np.stack(used, axis=1)
    centre = float(np.average(mean, weights=n))
    shift = mean - centre
    # Linear in the tiles, so that a draw's sums are the tiles' times how often each was drawn.
    sums = np.stack([n, error, absolute, squared, n * shift, spread + n * shift**2], axis=1)
    rng = np.random.default_rng(seed)
    totals = np.empty((resamples, sums.shape[1]))
    for draw in range(resamples):
        times = np.bincount(rng.integers(len(used), size=len(used)), minlength=len(used))
        totals[draw] = times @ sums
    count = totals[:, 0]
    spreads = totals[:, 5] - totals[:, 4] ** 2 / count
    draws = {"rmse": np.sqrt(totals[:, 3] / count), "mae": totals[:, 2] / count, "bias": totals[:, 1] / count}
    if (spreads > 0).all():
        draws["r2"] = 1 - totals[:, 3] / spreads
    tails = 50 * (1 - LEVEL), 50 * (1 + LEVEL)
    found = {name: np.percentile(draws[name], tails) for name in SCORES if name in draws}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
