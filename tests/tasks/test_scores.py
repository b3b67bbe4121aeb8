"""Sums of errors against exact arithmetic, in any order of merging."""

import math
from fractions import Fraction

import numpy as np
import pytest

from biomass_jax.tasks.scores import RegressionSums, batch_weighted_rmse


def exact(prediction, label):
    """The scores by fractions, which round nothing before the end."""
    pairs = [
        (Fraction(float(p)), Fraction(float(y))) for p, y in zip(prediction.flat, label.flat, strict=True) if y >= 0
    ]
    n = len(pairs)
    mean = sum(y for _, y in pairs) / n
    squared = sum((p - y) ** 2 for p, y in pairs)
    spread = sum((y - mean) ** 2 for _, y in pairs)
    return {
        "rmse": math.sqrt(squared / n),
        "mae": float(sum(abs(p - y) for p, y in pairs) / n),
        "bias": float(sum(p - y for p, y in pairs) / n),
        "r2": float(1 - squared / spread),
        "n": n,
    }, (float(mean), math.sqrt(spread / n))


def sparse(seed, shape=(5, 12, 9), offset=0.0):
    rng = np.random.default_rng(seed)
    label = np.where(rng.random(shape) < 0.4, rng.gamma(2, 60, shape) + offset, -1).astype(np.float32)
    prediction = (np.maximum(label, 0) * 0.8 + rng.normal(0, 20, shape) + 0.2 * offset).astype(np.float32)
    return prediction, label


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("offset", [0.0, 3e5])
def test_scores_equal_exact_arithmetic(offset):
    prediction, label = sparse(1, offset=offset)
    sums = RegressionSums().add(prediction, label)
    expected, (mean, spread) = exact(prediction, label)
    close(sums.results(), expected)
    close(sums.best_constant(), {"value": mean, "rmse": spread})


def test_labels_that_are_large_and_nearly_equal_keep_their_r2():
    rng = np.random.default_rng(2)
    label = 1e9 + rng.normal(0, 1, 3000)  # squares of 1e18: the textbook formula has no digit left
    prediction = label + rng.normal(0, 0.5, 3000)
    sums = RegressionSums()
    for part in range(0, 3000, 170):
        sums.add(prediction[part : part + 170], label[part : part + 170])
    assert sums.results()["r2"] == pytest.approx(exact(prediction, label)[0]["r2"], rel=1e-9)  # of 1e9 itself


@pytest.mark.parametrize("seed", range(5))
def test_parts_merge_in_any_order_and_grouping(seed):
    prediction, label = sparse(seed, (40, 7, 8), offset=1000.0)
    whole = exact(prediction, label)[0]
    rng = np.random.default_rng(seed)
    parts = []
    for rows in np.array_split(rng.permutation(40), 9):
        parts.append(RegressionSums().add(prediction[rows], label[rows]))
    parts += [RegressionSums(), RegressionSums()]
    rng.shuffle(parts)
    while len(parts) > 1:
        other = parts.pop(int(rng.integers(len(parts))))
        parts[int(rng.integers(len(parts)))].merge(RegressionSums.from_array(other.to_array()))
    close(parts[0].results(), whole)


def test_no_label_gives_none():
    prediction, label = sparse(3)
    nothing = RegressionSums().add(prediction, np.full_like(label, -1))
    assert nothing.results() == {"rmse": None, "mae": None, "bias": None, "r2": None, "n": 0}
    assert nothing.best_constant() == {"value": None, "rmse": None}
    assert RegressionSums().merge(nothing).n == 0


def test_a_label_of_zero_counts_and_one_value_has_no_r2():
    sums = RegressionSums().add(np.array([3.0, -1.0, 9.0]), np.array([0.0, 0.0, -1.0]))
    assert sums.results() == {"rmse": math.sqrt(5), "mae": 2.0, "bias": 1.0, "r2": None, "n": 2}


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match=r"\(2, 3\), labels \(3,\)"):
        RegressionSums().add(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"float32 \(6,\), expected float64 \(6,\)"):
        RegressionSums.from_array(np.zeros(6, np.float32))


def test_the_references_validation_loss_weighs_batches_by_their_chips():
    prediction, label = sparse(4, (10, 6, 6))
    batches, expected = [], 0.0
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        has = label[rows] >= 0
        squared = float((np.square(prediction[rows].astype(float) - label[rows])[has]).sum())
        chips = len(label[rows])
        batches.append((squared, float(has.sum()), chips))
        expected += chips * math.sqrt(squared / (has.sum() + 1.19e-7)) / 10
    assert batch_weighted_rmse(batches) == pytest.approx(expected, rel=1e-12)
    assert batch_weighted_rmse([*batches, (0.0, 0.0, 5)]) == pytest.approx(expected * 10 / 15, rel=1e-12)
    assert batch_weighted_rmse([]) is None
    assert batch_weighted_rmse(batches) != pytest.approx(exact(prediction, label)[0]["rmse"], rel=1e-4)
