"""The linear probe against numpy's least squares and plain loops."""

import numpy as np
import pytest

from benchmarks.pretraining_helps import paired_interval, pool_features, ridge, ridge_probe


def by_least_squares(x, y, alpha):
    """Ridge as ordinary least squares with d more rows, sqrt(alpha) on the diagonal; the intercept has none."""
    n, d = x.shape
    rows = np.zeros((n + d, d + 1))
    rows[:n, :d], rows[:n, d] = x, 1
    rows[n:, :d] = np.sqrt(alpha) * np.eye(d)
    solution = np.linalg.lstsq(rows, np.concatenate([y, np.zeros(d)]), rcond=None)[0]
    return solution[:d], solution[d]


@pytest.fixture
def chips():
    """30 training and 12 validation chips, 7 features of which one is constant, and their biomass."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(42, 7)) * [1, 5, 0.2, 30, 1, 1, 0] + [0, 3, 100, -40, 0, 1, 8]
    y = 90 + x @ [9, 2, 30, 0.5, 0, 0, 0] + rng.normal(scale=20, size=42)
    return x[:30], y[:30], x[30:], y[30:]


@pytest.mark.parametrize("rows", [30, 4])  # more rows than features, and fewer
@pytest.mark.parametrize("alpha", [1e-3, 2.5, 400.0])
def test_ridge_is_least_squares_with_a_penalty(chips, rows, alpha):
    x, y = chips[0][:rows], chips[1][:rows]
    weights, intercept, chosen = ridge(x, y, [alpha])
    expected, offset = by_least_squares(x, y, alpha)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(intercept, offset, rtol=1e-6)
    assert chosen == alpha


def left_out_error(x, y, alpha):
    errors = []
    for i in range(len(y)):
        weights, offset = by_least_squares(np.delete(x, i, 0), np.delete(y, i), alpha)
        errors.append(y[i] - x[i] @ weights - offset)
    return np.mean(np.square(errors))


@pytest.mark.parametrize("seed", range(4))
def test_the_penalty_is_the_one_that_predicts_left_out_chips_best(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, 10))
    y = x @ rng.normal(size=10) + rng.normal(scale=seed, size=20)
    alphas = [0.01, 0.1, 1, 3, 10, 30, 100]
    errors = [left_out_error(x, y, alpha) for alpha in alphas]
    assert ridge(x, y, alphas)[2] == alphas[int(np.argmin(errors))]


def test_the_probe_scores_validation_chips_in_the_units_of_training(chips):
    train, y_train, val, y_val = chips
    mean, std = train.mean(0), np.append(train.std(0)[:6], 1)
    weights, offset = by_least_squares((train - mean) / std, y_train, 3.0)
    expected = np.sqrt(np.mean(((val - mean) / std @ weights + offset - y_val) ** 2))
    np.testing.assert_allclose(ridge_probe(*chips, [3.0]), expected, rtol=1e-9)
    # Neither the scale of a feature nor the validation labels have a say in the fit.
    scaled = ridge_probe(train * 50 + 2, y_train, val * 50 + 2, y_val, [1.0, 3.0])
    np.testing.assert_allclose(scaled, ridge_probe(*chips, [1.0, 3.0]), rtol=1e-9)
    assert ridge_probe(*chips, [1e9]) == pytest.approx(np.sqrt(np.mean((y_train.mean() - y_val) ** 2)), rel=1e-4)


@pytest.mark.parametrize("alphas", [[], [1.0, 0.0], [-1.0]])
def test_penalties_must_be_positive(chips, alphas):
    with pytest.raises(ValueError, match="above 0"):
        ridge_probe(*chips, alphas)


def test_features_are_pooled_over_valid_pixels():
    rng = np.random.default_rng(4)
    maps = [rng.normal(size=(2, 4, 6, 3)).astype(np.float32), rng.normal(size=(2, 2, 3, 5)).astype(np.float32)]
    valid = rng.random((2, 8, 12)) < 0.3
    expected = np.zeros((2, 8))
    for n in range(2):
        pixels = np.argwhere(valid[n])
        for y, x in pixels:
            expected[n] += np.concatenate([maps[0][n, y // 2, x // 2], maps[1][n, y // 4, x // 4]]) / len(pixels)
    np.testing.assert_allclose(pool_features(maps, valid), expected, rtol=1e-6)


def test_what_cannot_be_pooled_is_an_error():
    maps = [np.zeros((2, 4, 4, 3))]
    valid = np.ones((2, 8, 8), bool)
    with pytest.raises(ValueError, match="does not divide"):
        pool_features(maps, valid[:, :6])
    valid[1] = False
    with pytest.raises(ValueError, match=r"chips \[1\] have no valid pixel"):
        pool_features(maps, valid)


def test_the_interval_of_paired_differences_is_student_s():
    low, high = paired_interval([1.0, 2.0, 6.0])
    # mean 3, standard deviation sqrt(7), t of two degrees of freedom 4.3027
    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 == pytest.approx(4.3027 * 7**0.5 / 3**0.5, rel=1e-4)
