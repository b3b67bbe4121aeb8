"""Spreads of a model become standard deviations and intervals that are right about labels of ground it has not seen.

**Standard deviation.** A model that gives a spread `sd` gets the variance

    a + b * sd^2 + c * max(mean, 0)^2        a > 0, b, c >= 0

by Gaussian likelihood, in which each block of ground weighs the same; then one factor makes the mean squared z of the
blocks 1. A model that gives quantiles gets sd = factor * (hi - lo) with that factor.

**Interval.** Split conformal prediction. The score of a labelled pixel is |label - mean| / sd (normalised residuals;
Lei et al., Distribution-free predictive inference for regression, 2018), or max(lo - label, label - hi) (conformalised
quantile regression; Romano, Patterson and Candes, 2019). With Q the quantile of the scores the interval is
mean -+ Q * sd, or [lo - Q, hi + Q]; labels are never below 0, and neither is the interval. The variance behind a
block's scores is fitted without that block, lest it flatter them: two halves of the blocks are each scored by the
other's.

**Blocks.** Pixels of one block err together, so only blocks can be taken for exchangeable. One score a block is drawn,
and Q is the ceil((K + 1) * level)-th smallest of the K drawn (Dunn, Wasserman and Ramdas, Distribution-free prediction
sets for two-layer hierarchical models, 2022, who call it subsampling). With a single draw, the interval holds the label
at a random pixel of a new block with a probability of at least `level`, whatever the errors' distribution. Q here is
the median over `DRAWS` draws, so that the draw's chance doesn't decide. What is then guaranteed is 1 - 2 * (1 - level):
a score above the median is above at least half of the draws' quantiles, which by Markov's inequality happens at most
twice as often as being above one of them. In simulation it is the level, see tests/uncertainty. The variance comes from
calibration blocks too, if from the other half, and that, too, only simulation vouches for. Nothing is promised of a
single block, nor of ground unlike that of the calibration blocks.

**Groups.** Q is that of the finest group with enough blocks (Mondrian): biome and bin of the prediction, else biome,
else bin, else all. A group's promise is of its pixels together.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize

from biomass_jax.errors import BundleError, DataError

LEVEL = 0.9
LEAST_BLOCKS = 20  # of a group with a quantile of its own
# Mg/ha, between bins of the prediction where the label is biomass; the first and the last have no end.
EDGES = (50.0, 100.0, 200.0, 300.0)
DRAWS = 1001
FLOOR = 0.01  # of the root mean square of all errors: no sd of a fit starts below, where mean and spread are 0
NO_BIOME = ("", "unknown")
KINDS = {"sd": ("mean", "sd"), "quantiles": ("mean", "lo", "hi")}  # what a model gives, and its raw outputs


@dataclass(frozen=True)
class CalibrationGroup:
    """Pixels with a quantile of their own.

    Attributes:
        biome: "" for any.
        low: least prediction, None for no end.
        high: the prediction from which on it isn't this bin, None for no end.
        quantile: Q, see the module; in sds, or in the label's unit for quantiles.
        blocks: of ground with labels in the group.
        pixels: labelled ones in the group.
    """

    biome: str
    low: float | None
    high: float | None
    quantile: float
    blocks: int
    pixels: int


@dataclass(frozen=True)
class Calibration:
    """What `fit` has found.

    Attributes:
        kind: of `KINDS`.
        level: share of labels that the intervals are to hold.
        seed: of halves and draws.
        variance: a, b, c; the spread is sd, or hi - lo of quantiles.
        least_sd: in the label's unit, no sd is below.
        groups: that of all pixels first.
    """

    kind: str
    level: float
    seed: int
    variance: tuple[float, float, float]
    least_sd: float
    groups: tuple[CalibrationGroup, ...]

    def apply(
        self, raw: Mapping[str, np.ndarray], biome: str | np.ndarray = ""
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard deviations and intervals of predictions.

        Args:
            raw: `mean` and `sd`, or `mean`, `lo` and `hi`, as the kind has it, all of one shape; others are left alone.
            biome: of all pixels, or an array of the mean's shape; one that calibration hasn't seen takes the quantile
                of its bin, or of all.

        Returns:
            sd > 0, lo >= 0 and hi >= lo, float32 of the mean's shape; NaN where any of `raw` is.

        Raises:
            DataError: an output is missing or has another shape.
        """
        given = _outputs(raw, self.kind)
        mean = given["mean"]
        sd = np.sqrt(_variance(self.variance, self.least_sd, _spread(given), mean))
        quantile = self._quantiles(mean, biome)
        if self.kind == "sd":
            low, high = mean - quantile * sd, mean + quantile * sd
        else:
            low, high = given["lo"] - quantile, given["hi"] + quantile
        low = np.maximum(low, 0)
        found = np.stack([sd, low, np.maximum(high, low)]).astype(np.float32)
        found[:, np.isnan(sum(given.values()))] = np.nan
        return found[0], found[1], found[2]

    def _quantiles(self, mean: np.ndarray, biome: str | np.ndarray) -> np.ndarray:
        """The quantile of each pixel's group."""
        edges = self._edges()
        bins = np.searchsorted(edges, mean, side="right")
        names = sorted({group.biome for group in self.groups} - {""})
        table = np.full((len(names) + 1, len(edges) + 1), np.nan)  # the last row is for any other biome
        for group in sorted(self.groups, key=lambda group: (group.biome != "", group.low != group.high)):
            # From the coarsest to the finest, each over what is there: all, bins, biomes, bins of biomes.
            rows = slice(None) if not group.biome else names.index(group.biome)
            number = 0 if group.low is None else edges.index(group.low) + 1
            table[rows, slice(None) if group.low == group.high else number] = group.quantile  # both None: any bin
        if isinstance(biome, str):
            return table[names.index(biome) if biome in names else -1][bins]
        if np.shape(biome) != mean.shape:
            raise DataError(f"biomes have the shape {np.shape(biome)}, predictions {mean.shape}; expected the same")
        found, index = np.unique(np.asarray(biome).astype(str), return_inverse=True)
        places = np.array([names.index(name) if name in names else len(names) for name in found.tolist()], int)
        return table[places[index.reshape(mean.shape)], bins]

    def _edges(self) -> list[float]:
        return sorted({group.low for group in self.groups if group.low is not None})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, from which `from_json` makes an equal object."""
        return dataclasses.asdict(self) | {
            "variance": list(self.variance),
            "groups": [dataclasses.asdict(group) for group in self.groups],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave.

        Raises:
            BundleError: a field is missing, unknown or of another kind; the message names it.
        """
        fields = _checked(values, "uncertainty", cls)
        groups, variance = fields["groups"], fields["variance"]
        if fields["kind"] not in KINDS:
            raise BundleError(f"uncertainty.kind: found {fields['kind']!r}, expected one of {', '.join(KINDS)}")
        if len(variance) != 3 or not all(isinstance(factor, float) and 0 <= factor < math.inf for factor in variance):
            raise BundleError(f"uncertainty.variance: found {variance}, expected three numbers from 0 on")
        read = [
            CalibrationGroup(**_checked(group, f"uncertainty.groups[{number}]", CalibrationGroup))
            for number, group in enumerate(groups)
        ]
        if not read or (read[0].biome, read[0].low, read[0].high) != ("", None, None):
            raise BundleError(f"uncertainty.groups: found {groups[:1]} at first, expected the group of all pixels")
        return cls(**fields | {"variance": tuple(variance), "groups": tuple(read)})


def fit(
    raw: Mapping[str, np.ndarray],
    label: np.ndarray,
    *,
    blocks: np.ndarray,
    biomes: np.ndarray,
    level: float = LEVEL,
    seed: int = 0,
    edges: Sequence[float] = EDGES,
) -> Calibration:
    """Calibrate on labelled pixels that neither training nor the test has seen.

    Args:
        raw: `mean` and `sd`, or `mean`, `lo` and `hi`, (n,) each, in the label's unit.
        label: (n,), from 0 on.
        blocks: (n,) names or numbers of the pieces of ground.
        biomes: (n,) text; "" or `unknown` where it isn't known.
        level: share of labels that the intervals are to hold.
        seed: of halves and draws.
        edges: between bins of the prediction, in the label's unit.

    Raises:
        DataError: shapes differ, a number can't be one, or there are fewer blocks than the level needs.
    """
    kind = kind_of(raw)
    given = {name: np.asarray(values, np.float64) for name, values in _outputs(raw, kind).items()}
    label = np.asarray(label, np.float64)
    _check(given, label, blocks=blocks, biomes=biomes, level=level)
    names = np.asarray(biomes).astype(str)
    block, counts = np.unique(np.asarray(blocks), return_inverse=True, return_counts=True)[1:]
    _check_blocks(len(counts), level)
    error, spread, mean = label - given["mean"], _spread(given), given["mean"]
    if not error.any():
        raise DataError(
            f"each of {len(label)} labels equals its prediction; expected errors to calibrate on: take labels that the "
            "model has not been given"
        )
    weight = 1 / (len(counts) * counts[block])
    mean_square = float(np.sum(weight * error**2))
    if kind == "sd":
        floor = FLOOR**2 * mean_square
        variance = fit_variance(error, spread, mean, weight, floor)
        least = math.sqrt(variance[0])
        other = _halves(len(counts), seed)[block]
        scores = np.empty_like(error)
        for half in (False, True):
            mine = other == half
            theirs = fit_variance(error[~mine], spread[~mine], mean[~mine], weight[~mine], floor)
            scores[mine] = np.abs(error[mine]) / np.sqrt(_variance(theirs, 0, spread[mine], mean[mine]))
    else:
        floor = FLOOR * math.sqrt(mean_square)  # of the width
        factor = math.sqrt(float(np.sum(weight * (error / np.maximum(spread, floor)) ** 2)))
        variance, least = (0.0, factor**2, 0.0), factor * floor
        scores = np.maximum(given["lo"] - label, label - given["hi"])
    groups = _groups(mean, names, block, scores, level, seed, edges)
    return Calibration(kind, float(level), int(seed), variance, least, groups)


def kind_of(raw: Mapping[str, Any]) -> str:
    """`sd` or `quantiles`, by the names of a model's raw outputs.

    Raises:
        DataError: they are neither, or both.
    """
    kinds = [kind for kind, names in KINDS.items() if set(names) <= set(raw)]
    if len(kinds) != 1:
        raise DataError(f"outputs {', '.join(raw) or 'none'}: expected mean and sd, or mean, lo and hi, not both")
    return kinds[0]


def fit_variance(
    error: np.ndarray, spread: np.ndarray, mean: np.ndarray, weight: np.ndarray, floor: float
) -> tuple[float, float, float]:
    """a, b, c of the module's variance by Gaussian likelihood, times the factor that makes the mean squared z 1.

    Args:
        error: (n,) label - mean.
        spread: (n,) from 0 on.
        mean: (n,).
        weight: (n,) of each pixel; only their proportions count.
        floor: least a before the factor, above 0.
    """
    weight, square = weight / weight.sum(), error**2
    parts = np.stack([np.ones_like(mean), spread**2, np.maximum(mean, 0) ** 2])
    size = np.einsum("kn,n->k", parts, weight)
    used = size > 0
    # In parts of about the errors' mean square each the search needs no further scaling.
    unit = max(float(np.sum(weight * square)), floor)
    scale = unit / np.where(used, size, 1)
    parts *= scale[:, None]

    # einsum, since BLAS would spread products as thin as these over threads, which costs time and the last bits.
    def loss(factors: np.ndarray) -> tuple[float, np.ndarray]:
        variance = np.einsum("k,kn->n", factors, parts)
        ratio = square / variance
        value = np.sum(weight * (np.log(variance) + ratio)) / 2
        return float(value), np.einsum("kn,n->k", parts, weight * (1 - ratio) / variance) / 2

    least = np.array([floor / unit, 0, 0])
    bounds = [(low, None if there else 0) for low, there in zip(least, used, strict=True)]
    start = np.maximum(used / used.sum(), least)  # an equal share of the mean square each
    found = minimize(loss, start, jac=True, method="SLSQP", bounds=bounds, options={"ftol": 1e-14, "maxiter": 500}).x
    found = np.clip(found, least, None)
    factor = float(np.sum(weight * square / np.einsum("k,kn->n", found, parts)))
    if factor == 0:  # errors of 0 alone: a half whose ground is bare
        factor = 1.0
    a, b, c = (factor * found * scale).tolist()
    return a, b, c


def conformal_quantile(scores: np.ndarray, block: np.ndarray, level: float, seed: int) -> float:
    """Q by one score a block, the median over `DRAWS` draws.

    The quantile is written here rather than taken from `crepes`, whose regressor has neither blocks nor draws: it
    would be fitted a thousand times, and by rounding it loses a rank, and finds 9 scores too few for 90 %. Tests
    compare with it.

    Args:
        scores: (n,).
        block: (n,) numbers of blocks.
        level: share of labels that the interval is to hold.
        seed: of the draws.

    Raises:
        DataError: fewer blocks than the level needs.
    """
    order = np.argsort(block, kind="stable")
    _, starts, counts = np.unique(block[order], return_index=True, return_counts=True)
    _check_blocks(len(counts), level)
    drawn = starts + np.floor(np.random.default_rng(seed).random((DRAWS, len(counts))) * counts).astype(int)
    place = rank(len(counts), level) - 1
    return float(np.median(np.partition(scores[order][drawn], place, axis=1)[:, place]))


def rank(blocks: int, level: float) -> int:
    """Which of so many scores, from 1 at the smallest, is the quantile; more than there are where they are too few."""
    return math.ceil((blocks + 1) * Fraction(str(level)))  # floats would round 27.000000000000004 up


def least_blocks(level: float) -> int:
    """Blocks that a level needs: 9 for 90 %, 19 for 95 %."""
    share = Fraction(str(level))
    return math.ceil(share / (1 - share))


def _halves(blocks: int, seed: int) -> np.ndarray:
    """Bool (blocks,), half of them."""
    return np.random.default_rng(seed).permutation(blocks) < blocks // 2


def _groups(
    mean: np.ndarray,
    biomes: np.ndarray,
    block: np.ndarray,
    scores: np.ndarray,
    level: float,
    seed: int,
    between: Sequence[float],
) -> tuple[CalibrationGroup, ...]:
    """The groups with enough blocks, that of all pixels first."""
    least = max(LEAST_BLOCKS, least_blocks(level))
    edges = merged_edges(mean, block, least, between)
    ends = [None, *edges, None]
    bins = np.searchsorted(edges, mean, side="right")
    names = [name for name in np.unique(biomes).tolist() if name not in NO_BIOME]
    found = []
    for biome in ("", *names):
        of_biome = (biomes == biome) | (biome == "")
        for number in (None, *(range(len(edges) + 1) if edges else ())):
            mine = of_biome if number is None else of_biome & (bins == number)
            count = len(np.unique(block[mine]))
            if count < least and (biome or number is not None):
                continue
            low, high = (None, None) if number is None else ends[number : number + 2]
            quantile = conformal_quantile(scores[mine], block[mine], level, seed)
            found.append(CalibrationGroup(biome, low, high, quantile, count, int(mine.sum())))
    return tuple(found)


def merged_edges(mean: np.ndarray, block: np.ndarray, least: int, between: Sequence[float] = EDGES) -> list[float]:
    """The edges that are left when bins have joined neighbours until each has `least` blocks.

    The bin with the fewest goes first, to the neighbour with fewer.
    """
    edges = list(between)
    while edges:
        bins = np.searchsorted(edges, mean, side="right")
        counts = [len(np.unique(block[bins == number])) for number in range(len(edges) + 1)]
        smallest = counts.index(min(counts))
        if counts[smallest] >= least:
            break
        below, above = ([math.inf, *counts, math.inf][smallest + shift] for shift in (0, 2))
        del edges[smallest - 1 if below <= above else smallest]
    return edges


def _outputs(raw: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
    """What the kind needs of the raw outputs, float64 of one shape."""
    names = KINDS[kind]
    missing = [name for name in names if name not in raw]
    if missing:
        raise DataError(f"outputs {', '.join(raw) or 'none'}: expected {', '.join(names)}, as the calibration's were")
    found = {name: np.asarray(raw[name], np.float64) for name in names}
    for name, values in found.items():
        if values.shape != found["mean"].shape:
            raise DataError(f"{name} has the shape {values.shape}, mean {found['mean'].shape}; expected the same")
    return found


def _spread(given: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the variance grows with: sd, or the raw interval's width."""
    return given["sd"] if "sd" in given else np.maximum(given["hi"] - given["lo"], 0)


def _variance(factors: tuple[float, float, float], least_sd: float, spread: np.ndarray, mean: np.ndarray) -> np.ndarray:
    a, b, c = factors
    return np.maximum(a + b * spread**2 + c * np.maximum(mean, 0) ** 2, least_sd**2)


def _check(
    given: Mapping[str, np.ndarray], label: np.ndarray, *, blocks: np.ndarray, biomes: np.ndarray, level: float
) -> None:
    if not (isinstance(level, int | float) and 0 < level < 1):
        raise DataError(f"level: found {level!r}, expected a share between 0 and 1, such as 0.9")
    shape = given["mean"].shape
    for name, values in (("label", label), ("blocks", blocks), ("biomes", biomes)):
        if np.shape(values) != shape or len(shape) != 1:
            raise DataError(f"{name} has the shape {np.shape(values)}, mean {shape}; expected (n,) of both")
    for name, values in (*given.items(), ("label", label)):
        bad = ~np.isfinite(values) | ((values < 0) & (name in ("sd", "label")))
        if bad.any():
            first = int(np.argmax(bad))
            least = " from 0 on; leave out pixels without a label" if name == "label" else ""
            least = " from 0 on" if name == "sd" else least
            raise DataError(f"{name}: found {values[first]} at labelled pixel {first}, expected a number{least}")
    if "lo" in given and (crossed := given["lo"] > given["hi"]).any():
        first = int(np.argmax(crossed))
        raise DataError(
            f"lo, hi: found {given['lo'][first]} above {given['hi'][first]} at labelled pixel {first}, expected "
            "quantiles that don't cross"
        )


def _check_blocks(blocks: int, level: float) -> None:
    if rank(blocks, level) > blocks:
        raise DataError(
            f"{blocks} blocks of ground have labels to calibrate on; intervals at level {level:g} need "
            f"{least_blocks(level)}: take a lower level, more calibration chips, or smaller blocks"
        )


def _checked(values: object, where: str, kind: type) -> dict[str, Any]:
    """The fields of a dataclass as they come from JSON, where tuples are lists.

    Raises:
        BundleError: see `Calibration.from_json`.
    """
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or set(values) != set(types):
        found = ", ".join(sorted(values)) if isinstance(values, Mapping) else repr(values)
        raise BundleError(f"{where}: found {found}, expected the fields {', '.join(types)}; calibrate the bundle again")
    for name, expected in types.items():
        wanted: Any = list if getattr(expected, "__origin__", None) is tuple else expected
        value = values[name]
        if not isinstance(value, wanted) or (isinstance(value, float) and not math.isfinite(value)):
            text = getattr(wanted, "__name__", str(wanted))
            raise BundleError(f"{where}.{name}: found {value!r}, expected {text}; calibrate the bundle again")
    return dict(values)
