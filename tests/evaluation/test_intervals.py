"""The jackknife against a plain loop over pixels, and what has no interval."""

import numpy as np
import pytest
from scipy.stats import t as student

from biomass_jax.evaluation.intervals import block_intervals, interval_of, mean_intervals
from biomass_jax.tasks.scores import RegressionSums


def ground(sizes, seed=0, level=120.0):
    """(prediction, another model's, label, block) of pixels; blocks differ in level, bias and loudness."""
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(len(sizes)), sizes)
    label = (level + rng.normal(0, 30, len(sizes)))[block] + rng.normal(0, 20, len(block))
    error = rng.normal(3, 10, len(sizes))[block] + rng.gamma(4, 5, len(sizes))[block] * rng.normal(size=len(block))
    other = label + 0.8 * error + rng.normal(0, 5, len(block))
    return label + error, other, np.abs(label), block


def parts(prediction, label, block):
    return [RegressionSums().add(prediction[block == g], label[block == g]) for g in range(block.max() + 1)]


def scores(prediction, label):
    """As one would write them down."""
    error = prediction - label
    return {
        "rmse": np.sqrt(np.mean(error**2)),
        "mae": np.mean(np.abs(error)),
        "bias": np.mean(error),
        "r2": 1 - np.sum(error**2) / np.sum((label - label.mean()) ** 2),
    }


def by_hand(values_of, block, *, of_one):
    """The module's formulas: `values_of` gives the scores of chosen pixels, `of_one` model or differences."""
    blocks = int(block.max()) + 1
    share = np.bincount(block) / len(block)
    found = {}
    for score, value in values_of(block >= 0).items():
        scale = (np.log, np.exp) if of_one and score in ("rmse", "mae") else (float, float)
        without = np.array([scale[0](values_of(block != g)[score]) for g in range(blocks)])
        error = np.sqrt((blocks - 1) / blocks * np.sum((without - without.mean()) ** 2))
        freedom = blocks - 1 if score == "r2" else 1 / np.sum(share**2) - 1
        half = student.ppf(0.975, freedom) * error
        found[score] = (scale[1](scale[0](value) - half), scale[1](scale[0](value) + half))
    if of_one:  # no R2 is above 1
        found["r2"] = (found["r2"][0], min(found["r2"][1], 1.0))
    return found


@pytest.mark.parametrize("sizes", [(40, 40, 40, 40, 40), (5, 90, 17, 33, 60, 8, 41)])
def test_intervals_equal_a_loop_that_leaves_blocks_out(sizes):
    prediction, other, label, block = ground(sizes)
    one = by_hand(lambda chosen: scores(prediction[chosen], label[chosen]), block, of_one=True)
    found, why = block_intervals(parts(prediction, label, block))
    assert why == ""
    assert set(found) == set(one)
    for score, ends in one.items():
        np.testing.assert_allclose(found[score], ends, rtol=1e-9)

    def less(chosen):
        mine, theirs = scores(prediction[chosen], label[chosen]), scores(other[chosen], label[chosen])
        return {score: mine[score] - theirs[score] for score in mine}

    found, why = block_intervals(parts(prediction, label, block), parts(other, label, block))
    assert why == ""
    for score, ends in by_hand(less, block, of_one=False).items():
        np.testing.assert_allclose(found[score], ends, rtol=1e-7)


def test_large_labels_that_differ_little_keep_their_digits():
    prediction, _, label, block = ground((20, 50, 30, 30, 40, 25), level=1e6)
    one = by_hand(lambda chosen: scores(prediction[chosen], label[chosen]), block, of_one=True)
    np.testing.assert_allclose(block_intervals(parts(prediction, label, block))[0]["r2"], one["r2"], rtol=1e-6)


def test_an_r2_is_at_most_1():
    rng = np.random.default_rng(2)
    block = np.repeat(np.arange(5), 50)
    label = rng.gamma(2, 60, 250)
    loud = np.array([0.01, 30, 1, 1, 1])[block]
    low, high = block_intervals(parts(label + loud * rng.normal(size=250), label, block))[0]["r2"]
    assert low < 1 == high


def test_fewer_than_five_blocks_have_no_interval():
    prediction, _, label, block = ground((30, 30, 30, 30))
    assert block_intervals(parts(prediction, label, block)) == ({}, "4 blocks with labels; it takes 5")
    with_an_empty_one = [*parts(prediction, label, block), RegressionSums()]
    assert block_intervals(with_an_empty_one) == ({}, "4 blocks with labels; it takes 5")
    assert block_intervals(with_an_empty_one[:1]) == ({}, "1 block with labels; it takes 5")
    prediction, _, label, block = ground((30, 30, 30, 30, 30))
    assert set(block_intervals([*parts(prediction, label, block), RegressionSums()])[0]) == {
        "rmse",
        "mae",
        "bias",
        "r2",
    }


def test_one_block_that_is_nearly_everything_has_no_interval():
    prediction, _, label, block = ground((800, 50, 50, 50, 50))
    assert block_intervals(parts(prediction, label, block)) == ({}, "one of 5 blocks has 80 % of the labels")


def test_scores_that_are_not_defined_without_a_block_have_no_interval():
    label = np.full(50, 100.0)
    label[:10] = np.arange(10)  # without the first block all labels are equal
    prediction, block = label + np.random.default_rng(0).normal(0, 5, 50), np.repeat(np.arange(5), 10)
    assert set(block_intervals(parts(prediction, label, block))[0]) == {"rmse", "mae", "bias"}
    label = np.random.default_rng(1).gamma(2, 50, 50)
    prediction = label + np.where(block == 0, 7.3, 0)  # without it the model is perfect
    assert set(block_intervals(parts(prediction, label, block))[0]) == {"bias", "r2"}


def test_a_model_does_not_differ_from_itself():
    prediction, _, label, block = ground((30, 20, 30, 40, 30))
    one = parts(prediction, label, block)
    assert set(block_intervals(one, one)[0].values()) == {(0.0, 0.0)}


def test_two_models_on_the_same_ground_differ_more_surely_than_their_intervals_say():
    """Both err together, so their difference is known better than either: intervals of each would overlap."""
    prediction, other, label, block = ground((30,) * 12, seed=4)
    mine, theirs = (block_intervals(parts(values, label, block))[0]["rmse"] for values in (prediction, other))
    assert mine[0] < theirs[1]
    low, high = block_intervals(parts(prediction, label, block), parts(other, label, block))[0]["rmse"]
    assert 0 < low < high < mine[1] - mine[0]


def test_means_of_pixels_values_against_a_loop_and_the_scores():
    prediction, _, label, block = ground((5, 90, 17, 33, 60, 8, 41))
    error = prediction - label
    values = np.stack([np.abs(error), (error > 0).astype(float)], axis=1)
    sums = np.array([[sum(block == g), *values[block == g].sum(0)] for g in range(7)])
    (absolute, share), why = mean_intervals(sums, [False, True])
    assert why == ""
    assert absolute == pytest.approx(block_intervals(parts(prediction, label, block))[0]["mae"], rel=1e-9)
    of_share = lambda chosen: {"share": np.mean(error[chosen] > 0)}  # noqa: E731
    assert share == pytest.approx(by_hand_means(of_share, block), rel=1e-9)


def by_hand_means(values_of, block):
    odds = lambda share: np.log(share / (1 - share))  # noqa: E731
    blocks = int(block.max()) + 1
    weights = np.bincount(block) / len(block)
    without = np.array([odds(values_of(block != g)["share"]) for g in range(blocks)])
    error = np.sqrt((blocks - 1) / blocks * np.sum((without - without.mean()) ** 2))
    half, whole = student.ppf(0.975, 1 / np.sum(weights**2) - 1) * error, odds(values_of(block >= 0)["share"])
    return tuple(1 / (1 + np.exp(-end)) for end in (whole - half, whole + half))


def test_shares_end_at_0_and_1_and_say_nothing_where_all_blocks_but_one_are_alike():
    n = np.full(6, 10.0)
    (share,), _ = mean_intervals(np.stack([n, [10, 10, 10, 10, 9, 2]], axis=1), [True])
    assert 0 < share[0] < 51 / 60 < share[1] < 1
    for inside in ([10] * 6, [10, 10, 10, 10, 10, 2], [0] * 6, [5, 0, 0, 0, 0, 0]):
        assert mean_intervals(np.stack([n, inside], axis=1), [True]) == ([None], "")
    assert mean_intervals(np.stack([n, [5, 0, 0, 0, 0, 0]], axis=1), [False]) == ([None], "")
    few = np.stack([n, n / 2], axis=1)[:4]
    assert mean_intervals(few, [True]) == ([None], "4 blocks with labels; it takes 5")


def test_any_statistic_of_sums_against_a_loop_that_leaves_blocks_out():
    prediction, _, label, block = ground((40, 90, 25, 60, 70, 30))
    columns = [np.ones(len(label)), label, prediction, label**2, label * prediction]
    sums = np.stack([np.bincount(block, column) for column in columns], axis=-1)

    def slope(of):
        n, x, y, xx, xy = np.moveaxis(of, -1, 0)
        return (xy / n - x * y / n**2) / (xx / n - (x / n) ** 2)

    def line(mine):
        return np.polyfit(label[mine], prediction[mine], 1)[0]

    def half(values):
        share = np.bincount(block) / len(block)
        return student.ppf(0.975, 1 / (share**2).sum() - 1) * np.sqrt(5 / 6 * ((values - values.mean()) ** 2).sum())

    without = np.array([line(block != g) for g in range(6)])
    value, ends, why = interval_of(sums, slope)
    assert value == pytest.approx(line(block >= 0)) and not why
    assert ends == pytest.approx((value - half(without), value + half(without)))
    factor = np.exp(half(np.log(without)))
    assert interval_of(sums, slope, positive=True)[1] == pytest.approx((value / factor, value * factor))


def test_a_statistic_without_an_interval_says_so():
    sums = np.array([[10.0, 1], [10, 2], [10, 0], [10, 0], [10, 0]])
    assert interval_of(sums[:4], lambda of: of[..., 1] / of[..., 0])[1:] == (None, "4 blocks with labels; it takes 5")
    assert interval_of(sums, lambda of: of[..., 1] * np.nan) == (None, None, "")
    assert interval_of(sums, lambda of: np.minimum(of[..., 1] - 2, 1), positive=True) == (1.0, None, "")
