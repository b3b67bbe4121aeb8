"""Calibrated intervals and sds against plain loops, `crepes`, closed forms; what is refused; what is kept."""

import json
import math
import re

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from biomass_jax.errors import BundleError, DataError
from biomass_jax.uncertainty import calibration
from biomass_jax.uncertainty.calibration import Calibration, CalibrationGroup, conformal_quantile, fit, rank


def ground(sizes, seed=0, share=0.3):
    """(raw with a wrong sd, label, block): errors grow with the mean, and a share of their variance is the block's."""
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(len(sizes)), sizes)
    n = len(block)
    mean = rng.gamma(2, 60, n)
    true = 5 + 0.2 * mean
    noise = np.sqrt(share) * rng.normal(size=len(sizes))[block] + np.sqrt(1 - share) * rng.normal(size=n)
    sd = 0.5 * true * np.exp(rng.normal(0, 0.2, n))
    return {"mean": mean, "sd": sd}, np.maximum(mean + true * noise, 0), block


def as_quantiles(raw):
    return {"mean": raw["mean"], "lo": raw["mean"] - raw["sd"], "hi": raw["mean"] + 1.2 * raw["sd"]}


SIZES = np.random.default_rng(5).integers(3, 60, 45)


def calibrated(raw, label, block, **settings):
    biomes = settings.pop("biomes", np.full(len(block), "taiga"))
    return fit(raw, label, blocks=block, biomes=biomes, **settings)


def by_loop(scores, level):
    """The conformal quantile as a textbook has it: the smallest score that enough of them don't exceed."""
    need = (len(scores) + 1) * level - 1e-9
    return min(q for q in scores if sum(s <= q for s in scores) >= need)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("blocks", [19, 20, 27, 29, 40, 99])
def test_the_quantile_of_one_score_a_block_against_a_loop(level, blocks):
    scores = np.random.default_rng(blocks).gamma(2, 1, blocks)
    assert conformal_quantile(scores, np.arange(blocks), level, 0) == by_loop(scores, level)


def test_the_quantile_is_the_median_over_draws_of_one_pixel_a_block():
    """Against all draws of three small blocks and ten single pixels, each as probable as the other."""
    rng = np.random.default_rng(1)
    block = np.array([0, 0, 1, 1, 1, 2, 2, *range(3, 13)])
    scores = rng.permutation(rng.gamma(2, 1, len(block)))
    every = [
        by_loop([scores[i], scores[j], scores[k], *scores[7:]], 0.9) for i in (0, 1) for j in (2, 3, 4) for k in (5, 6)
    ]
    assert conformal_quantile(scores, block, 0.9, 0) in (np.sort(every)[5], np.sort(every)[6])
    shuffled = rng.permutation(len(block))  # blocks need not lie together
    assert conformal_quantile(scores[shuffled], block[shuffled], 0.9, 0) in every


def test_many_pixels_of_one_block_count_as_one():
    """The block with 1,000 large scores is one of 20: the 19th smallest of 20 isn't its."""
    scores = np.concatenate([np.arange(19.0), np.full(1000, 100.0)])
    assert conformal_quantile(scores, np.minimum(np.arange(1019), 19), 0.9, 0) == 18.0


def test_ranks_and_least_blocks_by_whole_numbers():
    for level, share in ((0.5, (1, 2)), (0.8, (4, 5)), (0.9, (9, 10)), (0.95, (19, 20)), (0.99, (99, 100))):
        for blocks in range(1, 1200):
            assert rank(blocks, level) == -(-(blocks + 1) * share[0] // share[1])
        least = calibration.least_blocks(level)
        assert rank(least, level) <= least < rank(least - 1, level) + 1
        assert rank(least - 1, level) > least - 1
    assert [calibration.least_blocks(level) for level in (0.9, 0.95, 0.99)] == [9, 19, 99]


def crepes_intervals(residuals, test, *, level, **sigmas_and_bins):
    crepes = pytest.importorskip("crepes")
    given = {name: pair[0] for name, pair in sigmas_and_bins.items()}
    asked = {name: pair[1] for name, pair in sigmas_and_bins.items()}
    return crepes.ConformalRegressor().fit(residuals, **given).predict_int(test, confidence=level, **asked)


@pytest.mark.parametrize("kind", ["loop", "crepes"])
def test_normalised_intervals_in_groups_are_those_of_crepes(kind):
    """One pixel a block, so that nothing is drawn; the quantiles that `fit` keeps against another's intervals."""
    rng = np.random.default_rng(3)
    n, level = 333, 0.9
    bins = np.repeat([0, 1, 2], [120, 113, 100])
    sd, residual = rng.uniform(5, 40, n), rng.normal(0, 30, n)
    wanted = np.arange(12) % 3
    test, test_sd = rng.uniform(0, 400, 12), rng.uniform(5, 40, 12)
    if kind == "crepes":
        pairs = {"sigmas": (sd, test_sd), "bins": (bins, wanted)}
        ends = crepes_intervals(residual, test, level=level, **pairs)
    else:
        each = [by_loop(np.abs(residual[bins == b]) / sd[bins == b], level) for b in range(3)]
        half = np.array(each)[wanted] * test_sd
        ends = np.stack([test - half, test + half], 1)
    names = np.array(["a", "b", "c"])
    quantiles = [
        conformal_quantile((np.abs(residual) / sd)[bins == b], np.flatnonzero(bins == b), level, 0) for b in range(3)
    ]
    groups = [CalibrationGroup("", None, None, 9.0, n, n)]
    groups += [CalibrationGroup(name, None, None, q, 100, 100) for name, q in zip(names, quantiles, strict=True)]
    ours = Calibration("sd", level, 0, (0.0, 1.0, 0.0), 1e-9, tuple(groups))
    _, low, high = ours.apply({"mean": test, "sd": test_sd}, names[wanted])
    np.testing.assert_allclose(low, np.maximum(ends[:, 0], 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(high, ends[:, 1], rtol=1e-6)


def plain_variance(parameters, sd, mean):
    return parameters[0] + parameters[1] * sd**2 + parameters[2] * np.maximum(mean, 0) ** 2


def test_the_variance_is_that_of_the_greatest_likelihood_by_another_search():
    """Nelder and Mead's search over logarithms, a plain sum over blocks as likelihood, then the factor."""
    raw, label, block = ground(SIZES)

    def loss(logarithms):
        variance = plain_variance(np.exp(logarithms), raw["sd"], raw["mean"])
        each = norm.logpdf(label, raw["mean"], np.sqrt(variance))
        return -np.mean([each[block == g].mean() for g in range(len(SIZES))])

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000, "maxfev": 4000}
    found = np.exp(minimize(loss, np.log([30.0, 1.0, 0.02]), method="Nelder-Mead", options=options).x)
    square = (label - raw["mean"]) ** 2 / plain_variance(found, raw["sd"], raw["mean"])
    factor = np.mean([square[block == g].mean() for g in range(len(SIZES))])
    ours = calibrated(raw, label, block)
    np.testing.assert_allclose(ours.variance, factor * found, rtol=1e-3)
    sd = ours.apply(raw)[0]
    np.testing.assert_allclose(sd, np.sqrt(factor * plain_variance(found, raw["sd"], raw["mean"])), rtol=1e-5)


@pytest.mark.parametrize("outputs", [dict, as_quantiles])
def test_the_mean_squared_z_of_the_blocks_is_1(outputs):
    raw, label, block = ground(SIZES)
    z = (label - raw["mean"]) / calibrated(outputs(raw), label, block).apply(outputs(raw))[0]
    assert np.mean([np.mean(z[block == g] ** 2) for g in range(len(SIZES))]) == pytest.approx(1, abs=1e-5)


def test_a_spread_that_is_right_is_left_nearly_alone():
    rng = np.random.default_rng(8)
    block = np.repeat(np.arange(400), 40)
    mean, sd = rng.uniform(400, 600, len(block)), rng.uniform(5, 60, len(block))
    ours = fit(
        {"mean": mean, "sd": sd},
        mean + sd * rng.normal(size=len(block)),
        blocks=block,
        biomes=np.full(len(block), "unknown"),
    )
    found = ours.apply({"mean": mean, "sd": sd})[0]
    np.testing.assert_allclose(found, sd, rtol=0.06)
    assert ours.groups[0].quantile == pytest.approx(norm.ppf(0.95), abs=0.05)


def test_a_blocks_scores_do_not_come_from_its_own_variance():
    """Two halves of ten blocks: with the variance of all, the largest scores would be smaller."""
    raw, label, block = ground(np.full(10, 30), seed=3, share=0.9)
    ours = calibrated(raw, label, block, seed=1)
    half = np.random.default_rng(1).permutation(10) < 5
    scores = np.empty(len(block))
    for side in (True, False):
        mine = half[block] == side
        theirs = calibration.fit_variance(
            (label - raw["mean"])[~mine],
            raw["sd"][~mine],
            raw["mean"][~mine],
            np.full((~mine).sum(), 1.0),
            1e-4 * np.mean((label - raw["mean"]) ** 2),
        )
        scores[mine] = (np.abs(label - raw["mean"]) / np.sqrt(plain_variance(theirs, raw["sd"], raw["mean"])))[mine]
    assert ours.groups[0].quantile == pytest.approx(conformal_quantile(scores, block, 0.9, 1), rel=1e-6)


@pytest.mark.parametrize("outputs", [dict, as_quantiles])
def test_intervals_by_hand_from_what_was_found(outputs):
    raw, label, block = ground(SIZES)
    given = outputs(raw)
    ours = calibrated(given, label, block, biomes=np.full(len(block), "unknown"))
    sd, low, high = ours.apply(given)
    assert {values.dtype for values in (sd, low, high)} == {np.dtype(np.float32)}
    quantile = {(group.low, group.high): group.quantile for group in ours.groups}
    for i in range(0, len(label), 7):
        (q,) = (
            q
            for (start, end), q in quantile.items()
            if (start, end) != (None, None)
            and (start is None or start <= raw["mean"][i])
            and (end is None or raw["mean"][i] < end)
        )
        ends = (
            (given["lo"][i] - q, given["hi"][i] + q)
            if "lo" in given
            else (raw["mean"][i] - q * sd[i], raw["mean"][i] + q * sd[i])
        )
        assert (low[i], high[i]) == pytest.approx((max(ends[0], 0), ends[1]), rel=1e-5, abs=1e-4)
    if "lo" in given:
        scores = np.maximum(given["lo"] - label, label - given["hi"])
        assert ours.groups[0].quantile == conformal_quantile(scores, block, 0.9, 0)


def test_bins_join_neighbours_until_each_has_enough_blocks():
    mean = np.repeat([10.0, 60.0, 150.0, 250.0, 350.0], [30, 5, 30, 12, 9])
    assert calibration.merged_edges(mean, np.arange(86), 20) == [100, 200]  # 30 + 5 | 30 | 12 + 9
    assert calibration.merged_edges(mean, np.arange(86), 22) == [100]
    assert calibration.merged_edges(mean, np.arange(86), 5) == [50, 100, 200, 300]
    assert calibration.merged_edges(mean, np.arange(86), 50) == []
    again = np.where(mean == 350, np.arange(86) - 12, np.arange(86))  # the last two bins are of the same blocks
    assert calibration.merged_edges(mean, again, 20) == [100]


def test_each_pixel_takes_the_finest_group_that_has_enough_blocks():
    """30 blocks of taiga, 30 of savanna and 5 of desert; few but taiga's have predictions in the upper bin."""
    rng = np.random.default_rng(2)
    block = np.repeat(np.arange(65), 20)
    biomes = np.repeat(["taiga", "savanna", "desert"], [600, 600, 100])
    upper = (biomes == "taiga") | (block >= 55)
    mean = np.where(upper & (np.arange(1300) % 2 == 0), 250.0, 20.0)
    loud = np.where(biomes == "taiga", 1.0, 3.0) * np.where(mean > 100, 4.0, 1.0)
    raw, label = {"mean": mean, "sd": np.ones(1300)}, np.maximum(mean + 3 * loud * rng.normal(size=1300), 0)
    ours = fit(raw, label, blocks=block, biomes=biomes)
    found = {(group.biome, group.low, group.high): group for group in ours.groups}
    assert list(found) == [
        ("", None, None),
        ("", None, 50.0),
        ("", 50.0, None),
        ("savanna", None, None),
        ("savanna", None, 50.0),
        ("taiga", None, None),
        ("taiga", None, 50.0),
        ("taiga", 50.0, None),
    ]
    assert [(group.blocks, group.pixels) for group in ours.groups][:4] == [(65, 1300), (65, 900), (40, 400), (30, 600)]
    asked = {
        ("taiga", 250.0): ("taiga", 50.0, None),
        ("taiga", 20.0): ("taiga", None, 50.0),
        ("savanna", 250.0): ("savanna", None, None),  # no bin of its own: the biome's
        ("savanna", 49.99): ("savanna", None, 50.0),
        ("desert", 20.0): ("", None, 50.0),  # too few blocks: the bin's
        ("unheard-of", 50.0): ("", 50.0, None),
        ("", 250.0): ("", 50.0, None),
    }
    assert len({group.quantile for group in ours.groups}) == len(ours.groups)
    for (biome, value), name in asked.items():
        sd, low, high = ours.apply({"mean": np.full((1, 2), value), "sd": np.ones((1, 2))}, biome)
        np.testing.assert_allclose((high - value) / sd, found[name].quantile, rtol=1e-4)
    names, values = (np.array([list(asked)[i][part] for i in range(7)]) for part in (0, 1))
    together = ours.apply({"mean": values, "sd": np.ones(7)}, names)
    for i, (biome, value) in enumerate(asked):
        alone = ours.apply({"mean": np.array([value]), "sd": np.ones(1)}, biome)
        np.testing.assert_array_equal([one[i] for one in together], [one[0] for one in alone])


def test_a_group_needs_as_many_blocks_as_its_level():
    raw, label, block = ground(np.full(120, 3))
    at = {
        level: calibrated(raw, label, block, level=level, biomes=np.where(block < 50, "taiga", "savanna"))
        for level in (0.9, 0.99)
    }
    assert {group.biome for group in at[0.9].groups} == {"", "taiga", "savanna"}
    assert [(group.biome, group.low) for group in at[0.99].groups if group.biome] == []


def test_a_groups_quantile_does_not_depend_on_the_other_groups():
    raw, label, block = ground(SIZES)
    one = calibrated(as_quantiles(raw), label, block)
    other = calibrated(as_quantiles(raw), label, block, biomes=np.full(len(block), ""))
    assert one.groups[: len(other.groups)] == other.groups
    assert len(one.groups) > len(other.groups)


def test_no_sd_is_0_no_end_is_below_0_and_no_interval_turns_around():
    raw, label, block = ground(SIZES)
    raw["mean"][:40] = raw["sd"][:40] = label[:40] = 0
    for given in (raw, as_quantiles(raw)):
        ours = calibrated(given, label, block)
        bare = {name: np.zeros((2, 3)) for name in given}
        sd, low, high = ours.apply(bare)
        assert (sd > 0).all()
        assert (low == 0).all()
        assert (high >= low).all()
        assert sd.shape == (2, 3)
    below = ours.apply({"mean": np.array([-500.0]), "lo": np.array([-600.0]), "hi": np.array([-400.0])})
    assert [float(values[0]) for values in below[1:]] == [0, 0]
    wide = as_quantiles({"mean": raw["mean"], "sd": raw["sd"] + 1000})  # so wide that Q is below 0
    narrow = {name: np.array([100.0]) for name in wide}
    sd, low, high = calibrated(wide, label, block).apply(narrow)
    assert sd[0] > 0
    assert high[0] == low[0] > 100


@pytest.mark.parametrize("outputs", [dict, as_quantiles])
def test_no_data_stays_no_data_and_changes_nothing_beside_it(outputs):
    raw, label, block = ground(SIZES)
    ours = calibrated(outputs(raw), label, block)
    given = {name: values[:12].astype(np.float32) for name, values in outputs(raw).items()}
    whole = ours.apply(given)
    for place, name in enumerate(given):
        given[name] = given[name].copy()
        given[name][place] = np.nan
    found = ours.apply(given)
    for before, after in zip(whole, found, strict=True):
        assert np.isnan(after[: len(given)]).all()
        np.testing.assert_array_equal(before[len(given) :], after[len(given) :])


@pytest.mark.parametrize("outputs", [dict, as_quantiles])
def test_json_keeps_every_bit(outputs):
    raw, label, block = ground(SIZES)
    ours = calibrated(outputs(raw), label, block, level=0.8, seed=4)
    text = json.dumps(ours.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(text)) == ours
    assert json.loads(text) == ours.to_json()
    assert (ours.level, ours.seed, ours.kind) == (0.8, 4, "quantiles" if outputs is as_quantiles else "sd")
    assert (ours.groups[0].blocks, ours.groups[0].pixels) == (len(SIZES), len(label))
    again = calibrated(outputs(raw), label, block, level=0.8, seed=4)
    assert again == ours
    assert calibrated(outputs(raw), label, block, level=0.8, seed=5) != ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "0.9"}, "uncertainty.level: found '0.9', expected float"),
        ({"level": math.nan}, "uncertainty.level: found nan, expected float"),
        ({"kind": "laplace"}, "uncertainty.kind: found 'laplace', expected one of sd, quantiles"),
        ({"variance": [1.0, 2.0]}, "uncertainty.variance: found [1.0, 2.0], expected three numbers"),
        ({"groups": []}, "uncertainty.groups: found [] at first, expected the group of all pixels"),
        ({"groups": [{"biome": ""}]}, "uncertainty.groups[0]: found biome, expected the fields biome, low, high"),
        ({"more": 1}, "expected the fields kind, level, seed, variance, least_sd, groups; calibrate the bundle again"),
    ],
)
def test_a_bundles_section_that_is_not_whole_is_refused(change, message):
    raw, label, block = ground(SIZES)
    with pytest.raises(BundleError, match=re.escape(message)):
        Calibration.from_json(calibrated(raw, label, block).to_json() | change)
    with pytest.raises(BundleError, match="uncertainty: found None, expected the fields"):
        Calibration.from_json(None)


def test_fewer_blocks_than_the_level_needs_are_refused():
    raw, label, block = ground(np.full(9, 20))
    assert calibrated(raw, label, block).groups[0].blocks == 9
    raw, label, block = ground(np.full(8, 20))
    message = (
        "8 blocks of ground have labels to calibrate on; intervals at level 0.9 need 9: take a lower level, more "
        "calibration chips, or smaller blocks"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        calibrated(raw, label, block)
    assert calibrated(raw, label, block, level=0.85).groups[0].blocks == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("label", -1.0), "label: found -1.0 at labelled pixel 5, expected a number from 0 on; leave out pixels"),
        (("label", math.nan), "label: found nan at labelled pixel 5"),
        (("mean", math.inf), "mean: found inf at labelled pixel 5, expected a number"),
        (("sd", -0.5), "sd: found -0.5 at labelled pixel 5, expected a number from 0 on"),
    ],
)
def test_numbers_that_cannot_be_are_refused(change, message):
    raw, label, block = ground(SIZES)
    given = raw | {"label": label}
    given[change[0]][5] = change[1]
    with pytest.raises(DataError, match=re.escape(message)):
        calibrated(raw, label, block)


def test_settings_and_outputs_that_do_not_fit_are_refused():
    raw, label, block = ground(SIZES)
    for level in (0, 1, 90, "0.9"):
        with pytest.raises(DataError, match=f"level: found {level!r}, expected a share between 0 and 1"):
            calibrated(raw, label, block, level=level)
    with pytest.raises(DataError, match=re.escape(f"blocks has the shape ({len(label) - 1},), mean ({len(label)},)")):
        fit(raw, label, blocks=block[1:], biomes=np.full(len(label), ""))
    with pytest.raises(DataError, match=re.escape(f"sd has the shape ({len(label) - 1},), mean ({len(label)},)")):
        calibrated(raw | {"sd": raw["sd"][1:]}, label, block)
    for names in ((), ("mean",), ("mean", "sd", "lo", "hi")):
        with pytest.raises(DataError, match="expected mean and sd, or mean, lo and hi, not both"):
            calibrated(dict.fromkeys(names, raw["mean"]), label, block)
    crossed = as_quantiles(raw)
    crossed["lo"][3] = crossed["hi"][3] + 1
    with pytest.raises(DataError, match="at labelled pixel 3, expected quantiles that don't cross"):
        calibrated(crossed, label, block)
    with pytest.raises(DataError, match="labels equals its prediction; expected errors to calibrate on"):
        calibrated(raw, raw["mean"], block)
    ours = calibrated(raw, label, block)
    with pytest.raises(DataError, match="outputs mean, lo, hi: expected mean, sd, as the calibration's were"):
        ours.apply(as_quantiles(raw))
    with pytest.raises(DataError, match=re.escape(f"biomes have the shape (3,), predictions ({len(label)},)")):
        ours.apply(raw, np.full(3, "taiga"))


def test_a_half_without_errors_is_no_reason_to_fail():
    """Bare ground: half of the blocks, whichever they are, have neither biomass nor errors."""
    raw, label, block = ground(np.full(20, 10))
    for name in raw:
        raw[name] = np.where(block % 2 == 0, 0, raw[name])
    label = np.where(block % 2 == 0, 0, label)
    for seed in range(3):
        ours = calibrated(raw, label, block, seed=seed)
        sd, low, high = ours.apply(raw)
        assert np.isfinite([sd, low, high]).all()
        assert np.mean((low <= label + 1e-3) & (label <= high + 1e-3)) > 0.9
    only_two = np.flatnonzero(np.random.default_rng(0).permutation(20) < 10)[:2]
    label = np.where(np.isin(block, only_two), label + 30, raw["mean"])
    assert math.isfinite(calibrated(raw, label, block).groups[0].quantile)
