"""Measures of sds and intervals against numeric integration, plain loops and the other tables."""

import dataclasses
import math
import re

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from biomass_jax.data.sources import Place
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation import tables as binwise
from biomass_jax.evaluation.tables import Blocks, Scored
from biomass_jax.evaluation.uncertainty import (
    COLUMNS,
    ence,
    gaussian_crps,
    interval_score,
    reliability,
    sparsification,
    uncertainty_tables,
)

LEVEL = 0.9


def spreads(seed=0, n=3000, chips=14):
    """(scored, sd, low, high): seven blocks with labels; one chip has none."""
    rng = np.random.default_rng(seed)
    label = rng.gamma(1.5, 90, n).astype(np.float32)
    sd = (5 + 0.2 * label * np.exp(rng.normal(0, 0.3, n))).astype(np.float32)
    prediction = (label + sd * rng.normal(size=n)).astype(np.float32)
    low, high = np.maximum(prediction - 1.5 * sd, 0), np.maximum(prediction + 1.6 * sd, 0)
    chip = rng.integers(0, chips - 1, n).astype(np.int32)
    tiles = tuple(("10SFF", "10SGF", "36NXF")[i % 3] for i in range(chips))
    biomes = tuple("desert" if i == chips - 1 else ("taiga", "savanna")[i % 2] for i in range(chips))
    ids = tuple(f"chip_{i}" for i in range(chips))
    return Scored(prediction, label, chip, ids, tiles, biomes, (Place(),) * chips), sd, low, high


BLOCKS = Blocks(np.array([f"block_{i % 7}" for i in range(14)], dtype=object), "blocks")


def test_crps_is_the_integral_over_the_squared_distance_of_distributions():
    for label, mean, sd in ((3.0, 1.0, 2.0), (120.0, 150.0, 12.0), (0.0, 0.5, 0.1), (80.0, 80.0, 30.0), (10, 60, 9)):

        def below(x, mean=mean, sd=sd):
            return norm.cdf(x, mean, sd) ** 2

        def above(x, mean=mean, sd=sd):
            return norm.sf(x, mean, sd) ** 2

        edges = (min(label, mean) - 40 * sd, label, max(label, mean) + 40 * sd)
        options = {"epsabs": 1e-12, "epsrel": 1e-12, "limit": 400}
        expected = quad(below, edges[0], label, points=[min(mean, label)], **options)[0]
        expected += quad(above, label, edges[2], points=[max(mean, label)], **options)[0]
        found = gaussian_crps(np.array([label]), np.array([mean]), np.array([sd]))
        np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_allclose(gaussian_crps(np.array([7.0]), np.array([4.0]), np.array([1e-9])), 3, rtol=1e-8)


def test_interval_score_by_hand_and_by_pinball_losses():
    found = interval_score(np.array([5.0, 12.0, 1.0]), np.full(3, 2.0), np.full(3, 10.0), 0.9)
    np.testing.assert_allclose(found, [8, 8 + 20 * 2, 8 + 20 * 1])
    rng = np.random.default_rng(0)
    label, (low, high) = rng.gamma(2, 50, 200), np.sort(rng.gamma(2, 50, (2, 200)), axis=0)
    for level in (0.5, 0.9):
        loss = 0
        for q, end in (((1 - level) / 2, low), ((1 + level) / 2, high)):
            loss = loss + np.maximum(q * (label - end), (q - 1) * (label - end))
        np.testing.assert_allclose(interval_score(label, low, high, level), loss * 2 / (1 - level), rtol=1e-12)


def test_ence_against_a_loop_over_equally_full_bins():
    rng = np.random.default_rng(1)
    sd, error = rng.gamma(2, 10, 230), rng.normal(0, 20, 230)
    order = sorted(range(230), key=lambda i: sd[i])
    total = 0.0
    for number in range(10):
        mine = order[23 * number : 23 * number + 23]
        expected = math.sqrt(sum(sd[i] ** 2 for i in mine) / 23)
        total += abs(expected - math.sqrt(sum(error[i] ** 2 for i in mine) / 23)) / expected / 10
    assert ence(error, sd) == pytest.approx(total, rel=1e-12)
    assert ence(np.repeat([3.0, -4.0], 50), np.repeat([3.0, 4.0], 50)) == pytest.approx(0, abs=1e-15)
    assert ence(np.array([2.0, 8.0]), np.array([4.0, 16.0])) == pytest.approx(0.5)  # fewer pixels than bins


def test_reliability_against_counting():
    rng = np.random.default_rng(2)
    sd, error = rng.gamma(2, 10, 400), rng.normal(0, 25, 400)
    found = reliability(error, sd)
    assert found["nominal"] == [round(k / 20, 2) for k in range(1, 20)]
    for nominal, observed in zip(found["nominal"], found["observed"], strict=True):
        low, high = norm.interval(nominal, 0, sd)
        assert observed == np.mean((low <= error) & (error <= high))


def test_sds_that_are_right_are_reliable_and_those_of_half_the_size_are_not():
    rng = np.random.default_rng(3)
    sd = rng.gamma(2, 10, 200_000)
    error = sd * rng.normal(size=len(sd))
    right, narrow = reliability(error, sd), reliability(error, sd / 2)
    np.testing.assert_allclose(right["observed"], right["nominal"], atol=0.005)
    assert narrow["observed"][17] == pytest.approx(2 * norm.cdf(norm.ppf(0.95) / 2) - 1, abs=0.005)
    assert ence(error, sd) < 0.01 < 0.9 < ence(error, sd / 2) < 1.1  # errors are twice what is said


def test_sparsification_against_a_loop_that_removes_pixels():
    rng = np.random.default_rng(4)
    sd, error = rng.permutation(200) + 1.0, rng.normal(0, 1, 200) * 20
    found = sparsification(error, sd)
    for share, rmse, oracle in zip(found["removed"], found["rmse"], found["oracle"], strict=True):
        gone = round(share * 200)
        by_sd = [error[i] for i in np.argsort(-sd)][gone:]
        by_error = sorted(abs(error), reverse=True)[gone:]
        assert rmse == pytest.approx(math.sqrt(sum(e**2 for e in by_sd) / len(by_sd)), rel=1e-12)
        assert oracle == pytest.approx(math.sqrt(sum(e**2 for e in by_error) / len(by_error)), rel=1e-12)
    steps = range(len(found["removed"]) - 1)
    gap = [a - b for a, b in zip(found["rmse"], found["oracle"], strict=True)]
    area = sum(0.05 * (gap[i] + gap[i + 1]) / 2 for i in steps)
    assert found["ause"] == pytest.approx(area / math.sqrt(np.mean(error**2)), rel=1e-9)


def test_sparsification_of_a_perfect_order_is_the_oracle_and_equal_sds_tell_nothing():
    error = np.random.default_rng(5).normal(0, 20, 300)
    perfect = sparsification(error, np.abs(error))
    assert perfect["rmse"] == pytest.approx(perfect["oracle"], rel=1e-12)
    assert perfect["ause"] == pytest.approx(0, abs=1e-12)
    equal = sparsification(error, np.full(300, 5.0))
    assert equal["rmse"] == pytest.approx([math.sqrt(np.mean(error**2))] * 20, rel=1e-12)
    assert sparsification(np.zeros(30), np.ones(30))["ause"] is None


def test_rows_are_those_of_the_other_tables_and_hold_what_a_loop_finds():
    scored, sd, low, high = spreads()
    rows = uncertainty_tables(scored, sd, low, high, level=LEVEL, blocks=BLOCKS)
    others = binwise.tables(scored, blocks=BLOCKS)
    shared = ("table", "group", "n", "chips", "tiles", "blocks")
    assert [[row[name] for name in shared] for row in rows] == [[row[name] for name in shared] for row in others]
    assert all(tuple(row) == COLUMNS for row in rows)
    label, mean = scored.label.astype(float), scored.prediction.astype(float)
    masks = [mask for _, _, mask in binwise.groups(scored, binwise.prediction_bins(scored))]
    for row, mask in zip(rows, masks, strict=True):
        if not row["n"]:
            assert {row[name] for name in COLUMNS[6:-1]} == {None}
            continue
        z = [(label[i] - mean[i]) / float(sd[i]) for i in np.flatnonzero(mask)]
        held = [low[i] <= scored.label[i] <= high[i] for i in np.flatnonzero(mask)]
        assert row["coverage"] == pytest.approx(sum(held) / len(held), rel=1e-12)
        assert row["width"] == pytest.approx(np.mean((high.astype(float) - low)[mask]), rel=1e-12)
        assert row["z_mean"] == pytest.approx(sum(z) / len(z), rel=1e-9)
        assert row["z_variance"] == pytest.approx(sum(v**2 for v in z) / len(z) - (sum(z) / len(z)) ** 2, rel=1e-9)
        assert row["ence"] == ence((label - mean)[mask], sd[mask].astype(float))
        if row["coverage_low"] is not None:
            assert 0 <= row["coverage_low"] < row["coverage"] < row["coverage_high"] <= 1
            assert row["crps_low"] < row["crps"] < row["crps_high"]
    assert rows[0]["no_interval"] is None
    assert rows[0]["coverage_low"] is not None
    assert next(row for row in rows if row["group"] == "desert")["no_interval"] == "0 blocks with labels; it takes 5"


def test_an_overall_row_by_the_jackknife_of_the_other_scores():
    """Where values are errors, means of values are bias and MAE, which another function jackknifes."""
    scored, sd, low, high = spreads()
    row = uncertainty_tables(scored, sd, low, high, level=LEVEL, blocks=BLOCKS)[0]
    crps = gaussian_crps(scored.label.astype(float), scored.prediction.astype(float), sd.astype(float))
    as_errors = dataclasses.replace(scored, prediction=scored.label + crps)
    other = binwise.tables(as_errors, blocks=BLOCKS)[0]
    assert row["crps"] == pytest.approx(other["mae"], rel=1e-6)
    assert (row["crps_low"], row["crps_high"]) == pytest.approx((other["mae_low"], other["mae_high"]), rel=1e-5)


def test_rows_go_into_a_csv_file(tmp_path):
    scored, sd, low, high = spreads(n=300)
    rows = uncertainty_tables(scored, sd, low, high, level=LEVEL, blocks=BLOCKS)
    text = binwise.write_csv(tmp_path / "uncertainty.csv", COLUMNS, rows).read_text()
    assert text.splitlines()[0].startswith("table,group,n,chips,tiles,blocks,coverage,coverage_low,coverage_high,width")
    assert len(text.splitlines()) == len(rows) + 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sd", 0.0, "chip chip_9: found sd 0 and"),
        ("sd", math.nan, "chip chip_9: found sd nan"),
        ("low", 1e6, "the interval 1e+06 to"),
        ("high", math.inf, "to inf at a labelled pixel; expected an sd above 0 and ends in order"),
    ],
)
def test_what_is_no_sd_or_interval_is_refused(field, value, message):
    scored, sd, low, high = spreads()
    given = {"sd": sd, "low": low, "high": high}
    given[field][np.flatnonzero(scored.chip == 9)[3]] = value
    with pytest.raises(EvaluationError, match=re.escape(message)):
        uncertainty_tables(scored, **given, level=LEVEL, blocks=BLOCKS)


def test_another_number_of_sds_than_of_labels_is_refused():
    scored, sd, low, high = spreads()
    with pytest.raises(EvaluationError, match=re.escape("sd has the shape (2999,), labels (3000,)")):
        uncertainty_tables(scored, sd[1:], low, high, level=LEVEL, blocks=BLOCKS)
