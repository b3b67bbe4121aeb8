"""Totals over zones and their standard errors as numbers: correlated map errors, samples of tracks, hybrid inference.

docs/regional.md has the formulas in words, what each takes for granted and where it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import fft, optimize, special
from scipy.spatial import cKDTree

from biomass_jax.data.raster.grid import ECCENTRICITY2, EQUATOR_RADIUS
from biomass_jax.errors import RegionalError

MODELS = ("exponential", "spherical")
FEWEST_TRACKS = 5  # that give an interval
MOST_CELLS = 2**20  # of a zone's lattice; more pixels than that are put together
_NEAR = 6  # cells of a lattice within which the correlation between two of them is a mean over their pixels
_ANCHORS, _PARTNERS = 1000, 150  # shots whose pairs make a bin of the variogram, and partners of each, about
_SHOTS_OF_A_MEAN = 1500  # whose pairs tell how sure the mean of residuals is


@dataclass(frozen=True)
class Correlation:
    """How errors, each divided by its standard deviation, vary together: covariance over distance.

    Attributes:
        range_m: metres, at which a spherical share has ended, and of an exponential one 5 % are left.
        nugget: variance of what no two pixels share.
        sill: variance of what near pixels share.
        common: variance of what all pixels share, however far apart.
        model: one of MODELS.
    """

    range_m: float
    nugget: float
    sill: float
    common: float = 0.0
    model: str = "exponential"

    def decaying(self, distance: np.ndarray) -> np.ndarray:
        """The covariance that near pixels share, at distances in metres; `sill` at 0."""
        return self.sill * _shape(self.model, np.asarray(distance, float) / self.range_m)


def about(correlation: Correlation) -> str:
    """How errors go together, in a line."""
    return (
        f"errors go together up to {correlation.range_m / 1000:.3g} km ({correlation.model}); of the variance that "
        f"maps state, {correlation.nugget:.0%} is each pixel's own, {correlation.sill:.0%} near pixels share, "
        f"{correlation.common:.1%} all pixels share"
    )


def _shape(model: str, h: np.ndarray) -> np.ndarray:
    """Correlation over distance / range: 1 at 0."""
    if model == "exponential":
        return np.exp(-3 * h)
    return np.where(h < 1, 1 - 1.5 * h + 0.5 * h**3, 0.0)


class Shared(NamedTuple):
    """What sums over a raster of change need besides its pixels.

    Attributes:
        correlation: of differences' errors divided by their sd; None where too few pixels tell it.
        offset_se: standard error of the offset, Mg/ha, an error that all pixels share; 0 where nothing is taken off.
        threshold: least |z| that is significant, infinite where nothing is.
    """

    correlation: Correlation | None = None
    offset_se: float = 0.0
    threshold: float = np.inf

    @property
    def chance(self) -> float:
        """Share of the ground that would be called a loss by chance, and as much a gain, if nothing had changed."""
        return float(special.ndtr(-self.threshold))


@dataclass
class Lattice:
    """Sums of pixels' weights on a lattice of square or oblong cells, a whole number of pixels wide and high.

    Attributes:
        spacing: metres between pixels, down and across.
        shape: pixels, down and across, that the lattice has to hold.
        factor: pixels along a cell's side.
        weights: (rows, columns) of the cells: sums of area times standard deviation, ha Mg/ha.
        squares: sum of the pixels' squared weights.
    """

    spacing: tuple[float, float]
    shape: tuple[int, int]
    factor: int = field(init=False)
    weights: np.ndarray = field(init=False)
    squares: float = 0.0

    def __post_init__(self) -> None:
        self.factor = max(1, int(np.ceil(np.sqrt(self.shape[0] * self.shape[1] / MOST_CELLS))))
        self.weights = np.zeros(tuple(-(-size // self.factor) for size in self.shape))

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Put pixels in.

        Args:
            rows: (n,) whole numbers within `shape`, of pixels.
            columns: (n,) likewise.
            weights: (n,) area times standard deviation.
        """
        cells = np.ravel_multi_index((rows // self.factor, columns // self.factor), self.weights.shape)
        self.weights += np.bincount(cells, weights, self.weights.size).reshape(self.weights.shape)
        self.squares += float((weights**2).sum())

    def variance(self, correlation: Correlation) -> float:
        """The variance of the sum of errors: the double sum over all pairs of pixels, (Mg)^2."""
        decaying = double_sum(self.weights, self.spacing, correlation, self.factor)
        common = correlation.common * float(self.weights.sum()) ** 2
        return correlation.nugget * self.squares + decaying + common


class Sums(NamedTuple):
    """Of pixels in a zone, of one kind or several.

    Attributes:
        area: ha.
        total: Mg.
        pixels: how many.
        lattice: of their errors; None where these aren't asked for.
        shift: Mg that all together are off by for one standard deviation of an error that they all share.
        chance: ha that would be called a loss by chance, and as many a gain, if nothing had changed.
    """

    area: float = 0.0
    total: float = 0.0
    pixels: int = 0
    lattice: Lattice | None = None
    shift: float = 0.0
    chance: float = 0.0


def together(parts: Sequence[Sums]) -> Sums:
    """Sums of pixels of several kinds as one, their lattices too, so that errors of different kinds go together."""
    area, total, pixels, lattices, shift, chance = zip(*parts, strict=True) if parts else [()] * 6
    found = [lattice for lattice in lattices if lattice is not None]
    whole = found[0] if found else None
    if len(found) > 1:
        whole = Lattice(found[0].spacing, found[0].shape)
        for lattice in found:
            whole.weights += lattice.weights
            whole.squares += lattice.squares
    return Sums(sum(area), sum(total), sum(pixels), whole, sum(shift), sum(chance))


def double_sum(weights: np.ndarray, spacing: tuple[float, float], correlation: Correlation, factor: int = 1) -> float:
    """Sum over all pairs i, j of w_i w_j C(d_ij), C the decaying covariance, exactly, by Fourier transforms.

    The weights' autocorrelation, padded so that nothing wraps around, times C at each lag. Where a cell holds several
    pixels, C between near cells is its mean over their pixels, exact where the weight is even within each.

    Args:
        weights: (H, W) of the cells.
        spacing: metres between pixels, down and across.
        correlation: gives C.
        factor: pixels along a cell's side.
    """
    shape = tuple(fft.next_fast_len(2 * size - 1, real=True) for size in weights.shape)
    power = np.abs(fft.rfft2(weights, shape)) ** 2
    together = fft.irfft2(power, shape)  # at lag (k, l): sum of w at p times w at p + (k, l)
    down, across = (np.fft.fftfreq(size, 1 / size) for size in shape)
    steps = [lag * factor * step for lag, step in zip((down, across), spacing, strict=True)]
    covariance = correlation.decaying(np.hypot(steps[0][:, None], steps[1]))
    if factor > 1:
        offsets = np.arange(1 - factor, factor)
        share = (
            factor - np.abs(offsets)
        ) / factor**2  # of pairs of pixels that lie so many further apart than the cells
        weight = share[:, None] * share
        near = [np.flatnonzero(np.abs(lag) <= _NEAR) for lag in (down, across)]
        for row in near[0]:
            for column in near[1]:
                apart = np.hypot(
                    (down[row] * factor + offsets)[:, None] * spacing[0],
                    (across[column] * factor + offsets) * spacing[1],
                )
                covariance[row, column] = (weight * correlation.decaying(apart)).sum()
    return float((together * covariance).sum())


class ClusterMean(NamedTuple):
    """A mean over clusters of unequal size.

    Attributes:
        mean: of all elements.
        variance: of the mean; NaN with a single cluster.
        clusters: how many there are.
        elements: how many there are in all.
    """

    mean: float
    variance: float
    clusters: int
    elements: int


def cluster_mean(values: np.ndarray, clusters: np.ndarray) -> ClusterMean:
    """The mean as a ratio of sums to sizes of clusters, with its linearised variance.

    With S_g the sum and n_g the size of each of G clusters, n = sum n_g and m = sum S_g / n:
    variance = G / (G - 1) * sum (S_g - m n_g)^2 / n^2 (Saerndal, Swensson & Wretman 1992; Stahl et al. 2016).

    Args:
        values: (n,), at least one.
        clusters: (n,) what tells the clusters apart.
    """
    names, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    count, mean = len(names), float(np.mean(values))
    sums = np.bincount(index.reshape(-1), values, count)
    if count == 1:
        return ClusterMean(mean, np.nan, 1, len(values))
    variance = count / (count - 1) * float(((sums - mean * sizes) ** 2).sum()) / len(values) ** 2
    return ClusterMean(mean, variance, count, len(values))


def parameter_variance(gradients: np.ndarray, strata: np.ndarray, covariances: Mapping[str, np.ndarray]) -> float:
    """The variance of a mean of predictions that comes from the models' parameters (Patterson et al. 2019, Stahl 2016).

    The sum over strata, whose models were fitted apart, of g' V g: V the covariance of a model's parameters, g the sum
    over its shots of the prediction's derivative by them, divided by the number of all shots.

    Args:
        gradients: (n, p) derivatives of each shot's biomass, Mg/ha a unit of the parameter.
        strata: (n,) whose model a shot's biomass is from.
        covariances: (p, p) by stratum.

    Raises:
        RegionalError: a stratum without a covariance.
    """
    found = 0.0
    for name in np.unique(strata).tolist():
        if name not in covariances:
            raise RegionalError(
                f"stratum {name!r}: no covariance of its model's parameters; found those of {', '.join(covariances)}"
            )
        slope = gradients[strata == name].sum(0) / len(gradients)
        found += float(slope @ covariances[name] @ slope)
    return found


def satterthwaite(sampling: float, clusters: int, model: float) -> float:
    """Degrees of freedom of a variance of which only the part `sampling` was estimated, from so many clusters."""
    return (clusters - 1) * ((sampling + model) / sampling) ** 2 if sampling > 0 else np.inf


def quantile(level: float, freedom: float = np.inf) -> float:
    """How many standard errors an interval reaches to each side: Student's t, normal for infinite freedom."""
    p = 0.5 + level / 2
    return float(special.ndtri(p) if np.isinf(freedom) else special.stdtrit(freedom, p))


class Variogram(NamedTuple):
    """Half the mean squared difference of pairs: mean distance of each bin in metres, the value, how many pairs."""

    distance: np.ndarray
    value: np.ndarray
    pairs: np.ndarray


def variogram(
    places: np.ndarray, values: np.ndarray, reach: float, bins: int = 16, seed: int = 0, nearest: float | None = None
) -> Variogram:
    """The empirical variogram (Matheron), of some pairs where there are very many.

    Args:
        places: (n, d) metres.
        values: (n,).
        reach: metres, of the largest bin.
        bins: how many, each wider than the one before it.
        seed: of the draw of pairs.
        nearest: metres, at which the first bin ends; 1 / 64 of the reach unless given.

    Returns:
        The bins that have pairs.
    """
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[0.0], np.geomspace(nearest or reach / 64, reach, bins)])
    order = rng.permutation(len(places))
    anchors, found, whole = order[:_ANCHORS], [], cKDTree(places[order])
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        some, tree = order, whole
        while True:  # fewer shots where they are so many that an anchor has more partners than are needed
            counts = tree.query_ball_point(places[anchors[:100]], high, return_length=True)
            if counts.mean() <= 2 * _PARTNERS or len(some) <= _PARTNERS:
                break
            some = some[: max(int(len(some) * _PARTNERS / counts.mean()), _PARTNERS)]
            tree = cKDTree(places[some])
        lists = tree.query_ball_point(places[anchors], high)
        first = np.repeat(anchors, [len(one) for one in lists])
        second = some[np.concatenate([np.asarray(one, int) for one in lists])] if len(first) else first
        distance = np.linalg.norm(places[first] - places[second], axis=1)
        inside = (distance > low) & (distance <= high) & (first != second)
        if inside.any():
            half = 0.5 * np.mean((values[first[inside]] - values[second[inside]]) ** 2)
            found.append((distance[inside].mean(), half, inside.sum()))
    return (
        Variogram(*(np.array(column, float) for column in zip(*found, strict=True)))
        if found
        else Variogram(*np.empty((3, 0)))
    )


def fit_variogram(seen: Variogram, model: str, reach: float) -> Correlation:
    """Nugget, sill and range by least squares, a bin weighing by its pairs over its squared value (Cressie 1985).

    Args:
        seen: of some bins, whose values aren't all 0.
        model: one of MODELS.
        reach: metres, of the largest bin; the range is at most twice that.
    """
    top = float(seen.value.max())
    weight = np.sqrt(seen.pairs / seen.pairs.sum())

    def off(p: np.ndarray) -> np.ndarray:
        fitted = p[0] + p[1] * (1 - _shape(model, seen.distance / (p[2] * reach)))
        return weight * (seen.value - fitted) / np.maximum(fitted, 1e-3 * top)

    ends = ([0.0, 0.0, float(seen.distance[0] / reach)], [2 * top, 2 * top, 2.0])
    starts = [(0.5 * top, 0.5 * top, start) for start in (0.1, 0.3, 0.9)]
    # By SciPy: scikit-gstat, which has this fit too, asks for a SciPy older than those that are tested here.
    fits = [optimize.least_squares(off, np.clip(start, *ends), bounds=ends) for start in starts]
    nugget, sill, share = min(fits, key=lambda fit: fit.cost).x
    return Correlation(float(share * reach), float(nugget), float(sill), 0.0, model)


def shares_of(
    places: np.ndarray, values: np.ndarray, variance: float, *, nearest: float, reach: float
) -> Correlation | None:
    """How values of a known variance share it over distance: an exponential variogram, of which the shape alone counts.

    Args:
        places: (n, 2) metres.
        values: (n,) of errors divided by their standard deviation, some large ones cut off perhaps.
        variance: of all of them; nugget and sill add up to it.
        nearest: metres, of the first bin of pairs.
        reach: metres, of the last one.

    Returns:
        None where too few pairs tell it.
    """
    seen = variogram(places, values, reach, nearest=nearest) if len(places) else Variogram(*np.empty((3, 0)))
    if len(seen.value) < 5 or not seen.value.any():
        return None
    found = fit_variogram(seen, MODELS[0], reach)
    scale = variance / (found.nugget + found.sill)
    return Correlation(found.range_m, scale * found.nugget, scale * found.sill, 0.0, found.model)


def fit_correlation(
    places: np.ndarray, residuals: np.ndarray, *, model: str = "exponential", reach: float, seed: int = 0
) -> Correlation:
    """What residuals tell of how errors go together.

    By `fit_variogram`. What all share is the squared mean of the residuals, less the variance that this mean has by
    the rest of the fit alone; not below 0.

    Args:
        places: (n, d) metres.
        residuals: (n,) (map - footprint) / standard deviation of the map's pixel.
        model: one of MODELS.
        reach: metres: pairs further apart aren't looked at.
        seed: of the draw of pairs.

    Raises:
        RegionalError: too few residuals, or no two near each other.
    """
    seen = variogram(places, residuals, reach, seed=seed) if len(residuals) else Variogram(*np.empty((3, 0)))
    if len(residuals) < 50 or len(seen.value) < 5:
        raise RegionalError(
            f"{len(residuals)} footprints on the maps, with pairs in {len(seen.value)} classes of distance up to "
            f"{reach / 1000:g} km: expected 50 or more, with pairs in 5 or more, to fit how errors go together; give "
            "more footprints (--footprints), another reach (--max-lag-km), or --range-km and --nugget by hand"
        )
    found = fit_variogram(seen, model, reach)
    common = float(residuals.mean()) ** 2 - _variance_of_mean(places, found, len(residuals), seed)
    return Correlation(found.range_m, found.nugget, found.sill, max(common, 0.0), model)


def _variance_of_mean(places: np.ndarray, correlation: Correlation, count: int, seed: int) -> float:
    """Of residuals' mean, by all pairs of some of them."""
    some = np.random.default_rng(seed).permutation(len(places))[:_SHOTS_OF_A_MEAN]
    total = 0.0
    for part in np.array_split(some, -(-len(some) // 500)):
        apart = np.linalg.norm(places[part][:, None] - places[some], axis=-1)
        total += float(correlation.decaying(apart).sum())
    n = len(some)
    between = (total - n * correlation.sill) / (n * (n - 1)) if n > 1 else 0.0  # mean over pairs of two
    return between + (correlation.nugget + correlation.sill - between) / count


def on_sphere(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Places in space, (n, 3) metres from the middle of WGS 84's ellipsoid; chords stand for distances."""
    lon, lat = np.radians(lon), np.radians(lat)
    radius = EQUATOR_RADIUS / np.sqrt(1 - ECCENTRICITY2 * np.sin(lat) ** 2)
    return np.column_stack(
        [
            radius * np.cos(lat) * np.cos(lon),
            radius * np.cos(lat) * np.sin(lon),
            (1 - ECCENTRICITY2) * radius * np.sin(lat),
        ]
    )


class Estimate(NamedTuple):
    """What is told of a zone; NaN where something can't be told.

    Attributes:
        mean: Mg/ha.
        se: its standard error, Mg/ha.
        freedom: degrees of freedom of that, infinite where it is taken as known.
        note: why something is missing, or what was taken for granted.
    """

    mean: float
    se: float
    freedom: float
    note: str = ""


def by_map(one: Sums, correlation: Correlation | None) -> Estimate:
    """The map's mean over an area; where its errors are known, their double sum and what all pixels are off by."""
    if not one.area:
        return Estimate(np.nan, np.nan, np.nan, "no data of the maps here")
    if correlation is None or one.lattice is None:
        return Estimate(one.total / one.area, np.nan, np.nan)
    return Estimate(one.total / one.area, np.sqrt(one.lattice.variance(correlation) + one.shift**2) / one.area, np.inf)


def model_assisted(mean: float, residuals: np.ndarray, tracks: np.ndarray) -> Estimate:
    """The map's mean plus the mean residual at a sample of tracks: the difference estimator.

    Args:
        mean: of the map over the zone, Mg/ha.
        residuals: (n,) footprint - map, Mg/ha.
        tracks: (n,) the clusters.
    """
    if not len(residuals):
        return Estimate(np.nan, np.nan, np.nan, "no footprint on the map here")
    found = cluster_mean(residuals, tracks)
    return Estimate(mean + found.mean, *_error(found.variance, found.clusters - 1, found.clusters))


def hybrid(biomass: np.ndarray, tracks: np.ndarray, model_variance: float) -> Estimate:
    """The mean of a sample of tracks, whose biomass a model has predicted.

    Args:
        biomass: (n,) Mg/ha.
        tracks: (n,) the clusters.
        model_variance: of the mean, from the model that made them, (Mg/ha)^2.
    """
    if not len(biomass):
        return Estimate(np.nan, np.nan, np.nan, "no footprint here")
    found = cluster_mean(biomass, tracks)
    freedom = satterthwaite(found.variance, found.clusters, model_variance)
    return Estimate(found.mean, *_error(found.variance + model_variance, freedom, found.clusters))


def _error(variance: float, freedom: float, tracks: int) -> tuple[float, float, str]:
    if tracks < FEWEST_TRACKS:
        return np.nan, np.nan, f"no interval: {tracks} track{'s' * (tracks > 1)}, at least {FEWEST_TRACKS} are needed"
    return float(np.sqrt(variance)), freedom, ""


def sigma_variance(sigma: np.ndarray, shared: float) -> float:
    """The variance of a mean of shots by their own errors, a share of whose variance is the same for all of them.

    Args:
        sigma: (n,) Mg/ha.
        shared: 0 where errors are independent of each other, 1 where they are one.
    """
    return shared * float(sigma.mean()) ** 2 + (1 - shared) * float((sigma**2).sum()) / len(sigma) ** 2
