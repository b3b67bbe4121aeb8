"""How far scores would move on other ground: a delete-one-block jackknife with Student's t.

Pixels of one piece of ground share weather, land and season, so they are no independent draws, and an interval from
pixels would be far too narrow. Whole blocks are left out instead, one after another (Tukey, Bias and confidence in not
quite large samples, 1958; blocks for dependent data: Künsch, The jackknife and the bootstrap for general stationary
observations, 1989). With s the score of all G blocks and s_g that without block g, on the scale below:

    v = (G - 1) / G * sum over g of (s_g - mean of s_g)^2        interval: s -+ t(0.975, f) * sqrt(v)

Scale: RMSE and MAE are jackknifed as logarithms, as Miller does variances (Jackknifing variances, 1968): squares are
skew, and an interval as long above as below misses more often above. Bias, R2 and differences are taken as they are.
Means of other values that pixels have (`mean_intervals`) are jackknifed as logarithms too, shares as logits.

Degrees of freedom: blocks hold unequally many labels, and a few large ones carry the score. f = 1 / sum of w_g^2 - 1,
with w_g the share of the labels in block g, is the number of blocks that count (Kish, Survey sampling, 1965), less one;
with equal blocks it is G - 1. R2 takes G - 1: its v errs upward by itself, as a jackknife's does (Efron and Stein, The
jackknife estimate of variance, 1981), since leaving a block out changes the labels' spread too.

How often such intervals hold the truth is simulated in tests/evaluation/test_intervals_coverage.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import expit, logit, stdtrit

from biomass_jax.tasks.scores import SCORES, RegressionSums

LEVEL = 0.95
LEAST_BLOCKS = 5  # fewer tell next to nothing of how blocks differ
LEAST_THAT_COUNT = 2.0  # blocks by Kish; below, one block is the score, and Student's t has no use
_LOGARITHMS = ("rmse", "mae")
_ROUNDING = 1e-12  # of a sum of squares: less is left where there is nothing but rounding

Interval = tuple[float, float]


def block_intervals(
    parts: Sequence[RegressionSums], against: Sequence[RegressionSums] | None = None
) -> tuple[dict[str, Interval], str]:
    """95 % intervals of the scores, or of the differences of two models' scores.

    Args:
        parts: sums of each block of ground; those without a label are left out.
        against: another model's, of the same pixels block by block; the interval is of `parts` less these.

    Returns:
        {rmse, mae, bias, r2}: (low, high), without those that are not defined when some block is left out; and why
        there is none at all, "" where there are some.
    """
    used = [number for number, part in enumerate(parts) if part.n]
    if why := _too_few(np.array([[parts[number].n] for number in used], float)):
        return {}, why
    sums = block_sums([parts[number] for number in used])
    other = None if against is None else block_sums([against[number] for number in used])
    ends = jackknife(sums, other)
    found = {name: (float(low), float(high)) for name, (low, high) in ends.items()}
    return {name: pair for name, pair in found.items() if np.isfinite(pair).all()}, ""


def mean_intervals(sums: np.ndarray, shares: Sequence[bool]) -> tuple[list[Interval | None], str]:
    """95 % intervals of means over pixels, such as of an interval's width or of being inside it.

    Args:
        sums: (G, 1 + k): labelled pixels of each block, and sums of k values of theirs; none without a label.
        shares: of each value, whether it is 0 or 1 at every pixel; the others are from 0 on and skew.

    Returns:
        Each value's (low, high), None where it isn't defined when some block is left out: a mean of 0, or a share of 1;
        and why there is none at all, "" where there are some.
    """
    if why := _too_few(sums):
        return [None] * len(shares), why
    total = sums.sum(0)
    n, values = total[0] - sums[:, 0], total[1:] - sums[:, 1:]
    found: list[Interval | None] = []
    for whole, without, share in zip(total[1:] / total[0], (values / n[:, None]).T, shares, strict=True):
        defined = (without > _ROUNDING * whole) & (without < 1 - _ROUNDING if share else True)
        if not defined.all():
            found.append(None)
            continue
        scale, back = (logit, expit) if share else (np.log, np.exp)
        half = _half(scale(without), blocks_that_count(sums) - 1)
        found.append((float(back(scale(whole) - half)), float(back(scale(whole) + half))))
    return found, ""


def interval_of(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, positive: bool = False
) -> tuple[float | None, Interval | None, str]:
    """The 95 % interval of any statistic of sums.

    Args:
        sums: (G, k): how many values each block has, above 0, and other sums over them.
        statistic: of sums (..., k) -> (...), NaN where it isn't defined.
        positive: whether it is above 0 and skew, so that its logarithm is jackknifed.

    Returns:
        Its value, None where it isn't defined; (low, high), None where there is none; and why, "" where nothing but the
        statistic itself says so.
    """
    total = sums.sum(0)
    whole = float(statistic(total))
    value = whole if np.isfinite(whole) else None
    if why := _too_few(sums):
        return value, None, why
    without = statistic(total - sums)
    if value is None or not np.isfinite(without).all() or (positive and min(value, without.min()) <= 0):
        return value, None, ""
    freedom = blocks_that_count(sums) - 1
    if positive:
        half = _half(np.log(without), freedom)
        return value, (float(np.exp(np.log(value) - half)), float(np.exp(np.log(value) + half))), ""
    half = _half(without, freedom)
    return value, (float(value - half), float(value + half)), ""


def _too_few(sums: np.ndarray) -> str:
    """Why blocks (G, 1 or more), their labels first, give no interval; "" where they do."""
    blocks = len(sums)
    if blocks < LEAST_BLOCKS:
        return f"{blocks} {'block' if blocks == 1 else 'blocks'} with labels; it takes {LEAST_BLOCKS}"
    if blocks_that_count(sums) < LEAST_THAT_COUNT:
        return f"one of {blocks} blocks has {100 * sums[:, 0].max() / sums[:, 0].sum():.0f} % of the labels"
    return ""


def block_sums(parts: Sequence[RegressionSums]) -> np.ndarray:
    """Sums that add up over blocks, (G, 6): labels, their errors, absolute and squared ones, labels and their squares.

    The last two are about the mean of all labels, so that R2 keeps its digits.
    """
    n, error, absolute, squared, mean, spread = np.stack([part.to_array() for part in parts], axis=1)
    shift = mean - np.average(mean, weights=n)
    return np.stack([n, error, absolute, squared, n * shift, spread + n * shift**2], axis=1)


def blocks_that_count(sums: np.ndarray) -> np.ndarray:
    """Kish's effective number of blocks: (..., G, 1 or more), their labels first -> (...)."""
    n = sums[..., 0]
    return n.sum(-1) ** 2 / (n**2).sum(-1)


def jackknife(sums: np.ndarray, against: np.ndarray | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ends of the intervals; see the module.

    Args:
        sums: (..., G, 6) of each of G blocks, as `block_sums` gives them; none without a label.
        against: likewise, of another model on the same pixels.

    Returns:
        {rmse, mae, bias, r2}: low and high (...), NaN where a score isn't defined when some block is left out, and
        where too few blocks count. R2's high end is at most 1.
    """
    blocks = sums.shape[-2]
    counting = blocks_that_count(sums)
    counting = np.where(counting < LEAST_THAT_COUNT, np.nan, counting - 1)
    found = {}
    for name in SCORES:
        whole, without = _on_scale(name, sums, differs=against is not None)
        if against is not None:
            other, others = _on_scale(name, against, differs=True)
            whole, without = whole - other, without - others
        freedom = np.where(np.isnan(counting), np.nan, blocks - 1) if name == "r2" else counting
        half = _half(without, freedom)
        low, high = whole - half, whole + half
        if against is None and name in _LOGARITHMS:
            low, high = np.exp(low), np.exp(high)
        found[name] = (low, np.minimum(high, 1) if against is None and name == "r2" else high)
    return found


def _half(without: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Half an interval's length (...), of a score without each block (..., G) and its degrees of freedom (...)."""
    blocks = without.shape[-1]
    squares = (without - without.mean(-1, keepdims=True)) ** 2
    return stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt((blocks - 1) / blocks * squares.sum(-1))


def _on_scale(name: str, sums: np.ndarray, *, differs: bool) -> tuple[np.ndarray, np.ndarray]:
    """A score of all blocks (...), and without each of them (..., G), on the scale of its interval."""
    total = sums.sum(-2)
    values = [_score(name, part, total[..., 5]) for part in (total, np.moveaxis(total[..., None, :] - sums, -2, 0))]
    if name in _LOGARITHMS and not differs:
        least = _ROUNDING**0.5 * values[0]
        values = [np.log(value, out=np.full_like(value, np.nan), where=value > least) for value in values]
    return values[0], np.moveaxis(values[1], 0, -1)


def _score(name: str, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """One score of sums (..., 6); R2 is NaN where nothing but rounding is left of the labels' `squares` (...)."""
    n, error, absolute, squared, label, label_squared = np.moveaxis(sums, -1, 0)
    if name == "bias":
        return error / n
    if name == "mae":
        return absolute.clip(0) / n  # a difference of sums may end below 0 by rounding
    if name == "rmse":
        return np.sqrt(squared.clip(0) / n)
    spread = label_squared - label**2 / n
    spread = np.where(spread > _ROUNDING * squares, spread, np.nan)
    return 1 - squared / spread
