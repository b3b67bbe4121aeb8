"""Totals' errors against plain loops, closed forms and numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from biomass_jax.errors import RegionalError
from biomass_jax.regional import estimators
from biomass_jax.regional.estimators import Correlation, Lattice, Sums, together
from tests.regional import populations


def loop(weights, rows, columns, spacing, correlation, model):
    """All pairs, one by one."""
    total = 0.0
    for w, r, c in zip(weights, rows, columns, strict=True):
        for v, s, d in zip(weights, rows, columns, strict=True):
            h = np.hypot((r - s) * spacing[0], (c - d) * spacing[1]) / correlation.range_m
            shape = np.exp(-3 * h) if model == "exponential" else max(1 - 1.5 * h + 0.5 * h**3, 0) * (h < 1)
            own = correlation.nugget if (r, c) == (s, d) else 0.0
            total += w * v * (own + correlation.sill * shape + correlation.common)
    return total


@pytest.mark.parametrize("model", estimators.MODELS)
def test_the_double_sum_is_that_of_a_plain_loop(model):
    rng = np.random.default_rng(0)
    inside = rng.random((11, 17)) < 0.7  # a shape with holes
    inside[6:, :5] = False
    rows, columns = np.nonzero(inside)
    weights = rng.uniform(0.1, 5, rows.size)
    correlation = Correlation(210.0, 0.3, 0.5, 0.02, model)
    lattice = Lattice((30.0, 25.0), (11, 17))
    for part in np.array_split(rng.permutation(rows.size), 3):
        lattice.add(rows[part], columns[part], weights[part])
    expected = loop(weights, rows, columns, (30.0, 25.0), correlation, model)
    assert lattice.variance(correlation) == pytest.approx(expected, rel=1e-12)


def test_sums_of_parts_keep_what_their_errors_share():
    lattices = [Lattice((30.0, 30.0), (4, 5)) for _ in range(3)]
    lattices[0].add(np.array([0, 1]), np.array([0, 3]), np.array([2.0, 1.0]))
    lattices[1].add(np.array([3]), np.array([4]), np.array([5.0]))
    lattices[2].add(np.array([0, 1, 3]), np.array([0, 3, 4]), np.array([2.0, 1.0, 5.0]))
    one, other = (Sums(2.0, -30.0, 2, lattices[0], 1.0, 0.1), Sums(1.0, 4.0, 1, lattices[1], 0.5, 0.2))
    whole = together([one, Sums(), other])
    assert whole[:3] + whole[4:] == pytest.approx((3.0, -26.0, 3, 1.5, 0.3))
    correlation = Correlation(90.0, 0.2, 0.7, 0.1)
    assert whole.lattice.variance(correlation) == pytest.approx(lattices[2].variance(correlation))
    assert lattices[0].squares == 5.0  # parts stay as they are
    found = estimators.by_map(whole, correlation)
    assert found.se == pytest.approx(np.sqrt(lattices[2].variance(correlation) + 1.5**2) / 3)
    assert together([]) == Sums() and np.isnan(estimators.by_map(Sums(), correlation).mean)


def test_shares_of_a_known_variance():
    """What a threshold cuts off lowers the variogram, not the variance that is told."""
    rng = np.random.default_rng(3)
    truth = Correlation(600.0, 0.35, 0.65)
    at = 30.0 * np.indices((200, 200)).reshape(2, -1).T
    z = populations.field(rng, 1, truth, 200, 30.0)[0].ravel()
    kept = np.abs(z) < 2.5
    found = estimators.shares_of(at[kept], z[kept], 1.1, nearest=45.0, reach=3000.0)
    assert found.nugget + found.sill == pytest.approx(1.1)
    assert (found.range_m, found.nugget) == pytest.approx((600, 0.385), rel=0.25)
    assert estimators.shares_of(at[:0], z[:0], 1.0, nearest=45.0, reach=3000.0) is None
    assert estimators.shares_of(at, np.zeros(len(at)), 1.0, nearest=45.0, reach=3000.0) is None


@pytest.mark.slow
def test_intervals_of_net_change_and_of_large_losses_hold():
    """But not as if pixels were independent, and not of losses that only the largest errors make significant."""
    held = populations.selected_draws(40)
    assert all(0.93 <= share <= 0.97 for share in held.values()), held
    independent = populations.selected_draws(4, Correlation(1.0, 1.0, 0.0))
    assert independent["net"] < 0.2 and independent["loss"] < 0.3
    small = populations.selected_draws(4, loss=-50.0)
    assert small["net"] > 0.9 and small["loss"] < 0.5


def test_independent_errors_add_up_as_squares_and_shared_ones_as_they_are():
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.5, 2, (9, 14))
    lattice = Lattice((30.0, 30.0), weights.shape)
    rows, columns = np.indices(weights.shape).reshape(2, -1)
    lattice.add(rows, columns, weights.ravel())
    independent = Correlation(100.0, 1.0, 0.0)
    assert lattice.variance(independent) == pytest.approx((weights**2).sum())
    for shared in (Correlation(100.0, 0.0, 0.0, 1.0), Correlation(1e12, 0.0, 1.0)):
        assert lattice.variance(shared) == pytest.approx(weights.sum() ** 2, rel=1e-6)


def test_cells_of_several_pixels_give_the_variance_of_their_pixels(monkeypatch):
    rng = np.random.default_rng(2)
    rows, columns = np.indices((90, 120)).reshape(2, -1)
    weights = np.full(rows.size, 0.09)
    correlation = Correlation(300.0, 0.4, 0.6)
    fine, coarse = Lattice((30.0, 30.0), (90, 120)), None
    fine.add(rows, columns, weights)
    monkeypatch.setattr(estimators, "MOST_CELLS", 90 * 120 // 36)
    coarse = Lattice((30.0, 30.0), (90, 120))
    coarse.add(rows, columns, weights)
    assert (fine.factor, coarse.factor) == (1, 6)
    assert coarse.variance(correlation) == pytest.approx(fine.variance(correlation), rel=1e-3)
    # weights that vary from pixel to pixel
    weights = rng.uniform(0.03, 0.15, rows.size)
    sums = []
    for most in (2**20, 90 * 120 // 36):
        monkeypatch.setattr(estimators, "MOST_CELLS", most)
        lattice = Lattice((30.0, 30.0), (90, 120))
        lattice.add(rows, columns, weights)
        sums.append(lattice.variance(correlation))
    assert sums[1] == pytest.approx(sums[0], rel=5e-3)


def test_a_correlation_reaches_as_far_as_it_says():
    distance = np.array([0.0, 500.0, 1000.0])
    assert Correlation(1000, 0.2, 0.8).decaying(distance) == pytest.approx(0.8 * np.exp([0, -1.5, -3]))
    assert Correlation(1000, 0.2, 0.8, model="spherical").decaying(distance) == pytest.approx([0.8, 0.25, 0])


def test_the_difference_estimator_by_hand():
    # Three tracks with 2, 1 and 3 shots: residuals sum to 6, -2 and 6; mean 10 / 6.
    residuals, tracks = np.array([1.0, 5, -2, 0, 2, 4]), np.array([7, 7, 9, 3, 3, 3])
    found = estimators.cluster_mean(residuals, tracks)
    mean = 10 / 6
    squares = (6 - 2 * mean) ** 2 + (-2 - mean) ** 2 + (6 - 3 * mean) ** 2
    assert found.mean == pytest.approx(mean) and (found.clusters, found.elements) == (3, 6)
    assert found.variance == pytest.approx(3 / 2 * squares / 36)
    told = estimators.model_assisted(100.0, residuals, tracks)
    assert told.mean == pytest.approx(100 + mean) and np.isnan(told.se)
    assert told.note == "no interval: 3 tracks, at least 5 are needed"
    more = np.concatenate([residuals, [3.0, 0.0]]), np.concatenate([tracks, [11, 12]])
    told = estimators.model_assisted(100.0, *more)
    mean = 13 / 8
    squares = (6 - 2 * mean) ** 2 + (-2 - mean) ** 2 + (6 - 3 * mean) ** 2 + (3 - mean) ** 2 + mean**2
    assert (told.mean, told.se) == (pytest.approx(101.625), pytest.approx(np.sqrt(5 / 4 * squares / 64)))
    assert told.freedom == 4 and told.note == ""
    assert np.isnan(estimators.model_assisted(100.0, residuals[:0], tracks[:0]).mean)


def test_tracks_of_one_shot_are_a_random_sample():
    values = np.random.default_rng(3).gamma(2, 40, 60)
    assert estimators.cluster_mean(values, np.arange(60)).variance == pytest.approx(values.var(ddof=1) / 60)


def test_intervals_reach_as_far_as_students_t():
    assert estimators.quantile(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert estimators.quantile(0.9, 4) == pytest.approx(stats.t.ppf(0.95, 4))


def test_parameters_errors_by_hand_and_by_drawing_parameters():
    rng = np.random.default_rng(4)
    gradients = np.column_stack([np.ones(40), rng.uniform(5, 15, 40)])
    strata = np.array(["a"] * 25 + ["b"] * 15)
    covariances = {"a": np.array([[4.0, -0.3], [-0.3, 0.05]]), "b": np.diag([1.0, 0.02])}
    found = estimators.parameter_variance(gradients, strata, covariances)
    draws = sum(
        rng.multivariate_normal([0, 0], covariances[name], 200_000) @ gradients[strata == name].sum(0) / 40
        for name in ("a", "b")
    )
    assert found == pytest.approx(draws.var(), rel=0.02)
    one = estimators.parameter_variance(np.array([[1.0, 2.0]]), np.array(["a"]), covariances)
    assert one == pytest.approx(4 - 4 * 0.3 + 4 * 0.05)
    with pytest.raises(RegionalError, match="stratum 'b': no covariance"):
        estimators.parameter_variance(gradients, strata, {"a": covariances["a"]})


def test_hybrid_adds_the_models_variance():
    values, tracks = np.array([10.0, 20, 30, 40, 50, 60]), np.array([1, 1, 2, 3, 4, 5])
    sampling = estimators.cluster_mean(values, tracks)
    found = estimators.hybrid(values, tracks, 7.0)
    assert found.mean == 35 and found.se == pytest.approx(np.sqrt(sampling.variance + 7))
    assert found.freedom == pytest.approx((sampling.variance + 7) ** 2 / (sampling.variance**2 / 4))
    assert estimators.hybrid(values, tracks, 0.0).freedom == pytest.approx(4)
    assert "4 tracks" in estimators.hybrid(values[:5], tracks[:5], 7.0).note


def test_footprints_own_errors_shared_or_not():
    sigma = np.array([10.0, 20, 30])
    assert estimators.sigma_variance(sigma, 1.0) == pytest.approx(400)
    assert estimators.sigma_variance(sigma, 0.0) == pytest.approx(1400 / 9)
    assert estimators.sigma_variance(sigma, 0.5) == pytest.approx(200 + 700 / 9)


def correlated(rng, shape, spacing, range_m, sill):
    """A Gaussian field with the exponential covariance, by Fourier transforms on a torus twice as large."""
    size = [2 * n for n in shape]
    lags = [np.minimum(np.arange(n), n - np.arange(n)) * spacing for n in size]
    spectrum = np.fft.fft2(sill * np.exp(-3 * np.hypot(lags[0][:, None], lags[1]) / range_m)).real
    noise = rng.normal(size=size) + 1j * rng.normal(size=size)
    return np.fft.fft2(np.sqrt(np.maximum(spectrum, 0) / np.prod(size)) * noise).real[: shape[0], : shape[1]]


@pytest.mark.slow
def test_a_fit_finds_what_residuals_were_drawn_with():
    rng = np.random.default_rng(5)
    shape, spacing, found = (400, 400), 60.0, []
    for _ in range(4):
        field = correlated(rng, shape, spacing, 1500.0, 0.6) + rng.normal(0, np.sqrt(0.4), shape)
        some = rng.permutation(field.size)[:8000]
        places = spacing * np.column_stack(np.unravel_index(some, shape))
        fit = estimators.fit_correlation(places, field.ravel()[some], reach=6000.0)
        found.append((fit.range_m, fit.nugget, fit.sill, fit.common))
    assert np.mean(found, axis=0) == pytest.approx([1500, 0.4, 0.6, 0.0], rel=0.12, abs=0.01)
    biased = estimators.fit_correlation(places, field.ravel()[some] + 0.5, reach=6000.0)
    assert biased.common == pytest.approx((field.ravel()[some].mean() + 0.5) ** 2, rel=0.1)
    assert biased.range_m == pytest.approx(fit.range_m, rel=1e-6)


def test_the_variogram_is_that_of_all_pairs():
    rng = np.random.default_rng(6)
    places, values = rng.uniform(0, 1000, (120, 2)), rng.normal(size=120)
    found = estimators.variogram(places, values, 800.0, bins=4)
    edges = np.concatenate([[0], 800 * np.geomspace(1 / 64, 1, 4)])
    first, second = np.triu_indices(120, 1)
    apart = np.linalg.norm(places[first] - places[second], axis=1)
    half = 0.5 * (values[first] - values[second]) ** 2
    bins = np.digitize(apart, edges, right=True)
    expected = [half[bins == place].mean() for place in range(1, 5) if (bins == place).any()]
    assert found.value == pytest.approx(expected)
    assert found.pairs / 2 == pytest.approx([(bins == place).sum() for place in range(1, 5) if (bins == place).any()])


def test_few_residuals_are_refused():
    places = np.random.default_rng(7).uniform(0, 1000, (20, 2))
    with pytest.raises(RegionalError, match="20 footprints on the maps"):
        estimators.fit_correlation(places, np.ones(20), reach=1000.0)
    with pytest.raises(RegionalError, match="0 footprints on the maps"):
        estimators.fit_correlation(places[:0], np.ones(0), reach=1000.0)


def test_places_in_space_are_as_far_apart_as_on_the_ground():
    pyproj = pytest.importorskip("pyproj")
    lon, lat = np.array([179.99, -179.99]), np.array([60.0, 60.01])
    here, there = estimators.on_sphere(lon, lat)
    metres = pyproj.Geod(ellps="WGS84").inv(lon[0], lat[0], lon[1], lat[1])[2]
    assert np.linalg.norm(here - there) == pytest.approx(metres, rel=1e-6)
