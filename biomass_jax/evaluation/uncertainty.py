"""Are standard deviations and intervals right about labels? Coverage, sharpness and order, over all and by group.

The sd is taken for that of a Gaussian where a measure needs a whole distribution (CRPS, reliability); intervals count
as they are. Pixels weigh alike, as in the other tables.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.intervals import mean_intervals
from biomass_jax.evaluation.tables import Blocks, Row, Scored, blocks_of, counted, groups, prediction_bins
from biomass_jax.prediction.layers import Layers
from biomass_jax.tasks.scores import RegressionSums
from biomass_jax.uncertainty.calibration import LEVEL

MEANS = ("coverage", "width", "interval_score", "crps")  # of values that each pixel has; these get intervals
COLUMNS = (
    "table",
    "group",
    "n",
    "chips",
    "tiles",
    "blocks",
    *(f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")),
    "z_mean",
    "z_variance",
    "ence",
    "no_interval",
)
SD_BINS = 10  # of ENCE
NOMINAL = tuple(round(0.05 * step, 2) for step in range(1, 20))
REMOVED = tuple(round(0.05 * step, 2) for step in range(20))


def how_sure(
    scored: Scored, channels: Sequence[str], layers: Layers, blocks: Blocks | None = None
) -> dict[str, Any] | None:
    """What `metrics.json` holds of a model's uncertainty; None of one that tells of none.

    Intervals are those of the bundle's calibration. Without one they are a Gaussian's of the raw sd, for `LEVEL`.

    Args:
        scored: labelled pixels and what the model gave there.
        channels: names of what it gave.
        layers: of the bundle.
        blocks: as for `uncertainty_tables`.
    """
    given = np.column_stack([scored.prediction, scored.more])
    label = scored.label.astype(np.float64)
    found: dict[str, Any] = {}
    if layers.calibration is not None:
        sd, low, high = layers.finish(given, tuple(channels), scored.pixel_biomes())[:, 1:4].T.astype(np.float64)
        level, found["is"] = layers.calibration.level, "calibrated"
    elif "sd" in channels:
        level, sd = LEVEL, np.maximum(given[:, 1].astype(np.float64), np.finfo(np.float32).tiny)
        half = float(ndtri((1 + level) / 2)) * sd
        low, high = np.maximum(given[:, 0] - half, 0), given[:, 0] + half
        found["is"] = "not calibrated: intervals of a Gaussian of what the model says"
    else:
        return None
    rows = uncertainty_tables(scored, sd, low, high, level=level, blocks=blocks)
    error = label - scored.prediction
    found |= {"level": level, **{name: rows[0][name] for name in COLUMNS[2:]}}
    found |= {"reliability": reliability(error, sd), "sparsification": sparsification(error, sd), "tables": rows}
    if "di" in channels and layers.threshold is not None:
        di, inside = given[:, channels.index("di")], (low <= label) & (label <= high)
        found["applicability"] = {"threshold": layers.threshold}
        for name, chosen in (("inside", di <= layers.threshold), ("outside", di > layers.threshold)):
            scores = RegressionSums().add(scored.prediction[chosen], scored.label[chosen]).results()
            held = float(inside[chosen].mean()) if chosen.any() else None
            found["applicability"][name] = {**scores, "coverage": held}
    return found


def sure_lines(found: dict[str, Any], unit: str) -> list[str]:
    """What the console shows of `how_sure`, of labels in that unit."""
    ends = (
        f" ({found['coverage_low']:.1%} to {found['coverage_high']:.1%})" if found["coverage_low"] is not None else ""
    )
    made = [
        f"uncertainty ({found['is']}): {found['level']:.0%} intervals hold {found['coverage']:.1%} of labels{ends}, "
        f"{found['width']:.1f} {unit} wide; variance of z {found['z_variance']:.2f}, CRPS {found['crps']:.2f}, "
        f"ENCE {found['ence']:.2f}"
    ]
    for name in ("inside", "outside"):
        part = found.get("applicability", {}).get(name)
        if part and part["n"]:
            made.append(
                f"{name} the area of applicability: {part['n']:,} labels, RMSE {part['rmse']:.2f}, "
                f"{part['coverage']:.1%} in their intervals"
            )
    return made


def uncertainty_tables(
    scored: Scored, sd: np.ndarray, low: np.ndarray, high: np.ndarray, *, level: float, blocks: Blocks | None = None
) -> list[Row]:
    """One row a group, as `tables.tables` has them, with `COLUMNS` as keys and None where there is nothing to say.

    Args:
        scored: labelled pixels and their predictions.
        sd: (n,) of these predictions, above 0.
        low: (n,) lower ends of their intervals.
        high: (n,) upper ends.
        level: share of labels that the intervals are to hold.
        blocks: see `blocks_of`; those of the default size where none are given.

    Raises:
        EvaluationError: an sd or an end can't be one; it names the chip.
    """
    sd, low, high = (np.asarray(values, np.float64) for values in (sd, low, high))
    _check(scored, sd, low, high)
    blocks = blocks or blocks_of(scored)
    label, mean = scored.label.astype(np.float64), scored.prediction.astype(np.float64)
    inside = (low <= label) & (label <= high)
    score, crps = interval_score(label, low, high, level), gaussian_crps(label, mean, sd)
    values = np.stack([inside, high - low, score, crps], axis=1)
    rows = []
    for table, group, chosen in groups(scored, prediction_bins(scored)):
        made = counted(COLUMNS, table, group, chosen, blocks, scored)
        index = np.unique(blocks.of_chip[scored.chip[chosen]].astype(str), return_inverse=True)[1]
        sums = np.stack([np.bincount(index, column) for column in (np.ones(made["n"]), *values[chosen].T)], axis=1)
        ends, why = mean_intervals(sums, [name == "coverage" for name in MEANS])
        made["no_interval"] = why or None
        for name, pair in zip(MEANS, ends, strict=True):
            made |= dict(zip((f"{name}_low", f"{name}_high"), pair or (None, None), strict=True))
        if made["n"]:
            z = (label - mean)[chosen] / sd[chosen]
            made |= dict(zip(MEANS, values[chosen].mean(0).tolist(), strict=True))
            made |= {"z_mean": float(z.mean()), "z_variance": float(z.var())}
            made["ence"] = ence((label - mean)[chosen], sd[chosen])
        rows.append(made)
    return rows


def gaussian_crps(label: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of Gaussians, in the label's unit; the absolute error where sd goes to 0.

    The closed form of Gneiting et al., Calibrated probabilistic forecasting using ensemble model output statistics and
    minimum CRPS estimation (2005), equation 5.

    Args:
        label: (n,).
        mean: (n,).
        sd: (n,) above 0.
    """
    z = (label - mean) / sd
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return sd * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))


def interval_score(label: np.ndarray, low: np.ndarray, high: np.ndarray, level: float) -> np.ndarray:
    """Width, and 2 / (1 - level) times how far the label lies outside (Gneiting and Raftery 2007, equation 43).

    Args:
        label: (n,).
        low: (n,).
        high: (n,).
        level: share of labels that the intervals are to hold.
    """
    outside = np.maximum(low - label, 0) + np.maximum(label - high, 0)
    return high - low + 2 / (1 - level) * outside


def ence(error: np.ndarray, sd: np.ndarray, bins: int = SD_BINS) -> float:
    """Expected normalised calibration error: how far sds are from the errors of pixels with such an sd, as a share.

    The mean over bins of sd that hold equally many pixels of |root mean variance - RMSE| / root mean variance (Levi et
    al., Evaluating and calibrating uncertainty prediction in regression tasks, 2022). 0 is perfect.

    Args:
        error: (n,) of one pixel or more.
        sd: (n,) above 0.
        bins: at most so many.
    """
    order = np.argsort(sd, kind="stable")
    found = []
    for mine in np.array_split(order, min(bins, len(order))):
        expected, met = (np.sqrt(np.mean(values[mine] ** 2)) for values in (sd, error))
        found.append(abs(expected - met) / expected)
    return float(np.mean(found))


def reliability(error: np.ndarray, sd: np.ndarray, nominal: Sequence[float] = NOMINAL) -> dict[str, list[float]]:
    """Shares of labels that central intervals of the sd's Gaussian hold, by their nominal level.

    Args:
        error: (n,) of one pixel or more.
        sd: (n,) above 0.
        nominal: levels.

    Returns:
        `nominal` and `observed`.
    """
    sizes = np.sort(np.abs(error) / sd)
    held = np.searchsorted(sizes, ndtri((1 + np.asarray(nominal)) / 2), side="right")
    return {"nominal": list(nominal), "observed": (held / len(sizes)).tolist()}


def sparsification(error: np.ndarray, sd: np.ndarray, removed: Sequence[float] = REMOVED) -> dict[str, Any]:
    """RMSE of what is left when the most uncertain pixels are taken out, and when those of the largest errors are.

    Pixels of equal sd go in no order: each counts with their mean squared error.

    Args:
        error: (n,) of one pixel or more.
        sd: (n,).
        removed: rising shares from 0 on, below 1.

    Returns:
        `removed`, `rmse`, `oracle` (by the errors themselves), and `ause`, the area between the two curves over the
        share removed, divided by the RMSE of all (Ilg et al., Uncertainty estimates and multi-hypotheses networks for
        optical flow, 2018): 0 where sds put pixels in the order of their errors; None where there is no error at all.
    """
    square = np.asarray(error, np.float64) ** 2
    index, counts = np.unique(sd, return_inverse=True, return_counts=True)[1:]
    tied = np.repeat(np.bincount(index, square) / counts, counts)
    kept = np.maximum(len(square) - np.floor(np.asarray(removed) * len(square) + 1e-9).astype(int), 1)
    rmse, oracle = (np.sqrt(np.cumsum(values)[kept - 1] / kept) for values in (tied, np.sort(square)))
    area = float(np.trapezoid(rmse - oracle, removed))
    whole = float(np.sqrt(square.mean()))
    return {
        "removed": list(removed),
        "rmse": rmse.tolist(),
        "oracle": oracle.tolist(),
        "ause": area / whole if whole else None,
    }


def _check(scored: Scored, sd: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    for name, values in (("sd", sd), ("low", low), ("high", high)):
        if values.shape != scored.label.shape:
            raise EvaluationError(
                f"{name} has the shape {values.shape}, labels {scored.label.shape}; expected the same"
            )
    fine = np.isfinite(sd) & (sd > 0) & np.isfinite(low) & np.isfinite(high) & (low <= high)
    if not fine.all():
        bad = int(np.argmin(fine))
        raise EvaluationError(
            f"chip {scored.chip_ids[scored.chip[bad]]}: found sd {sd[bad]:g} and the interval {low[bad]:g} to "
            f"{high[bad]:g} at a labelled pixel; expected an sd above 0 and ends in order"
        )
