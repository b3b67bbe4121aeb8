"""What labels' own errors add to a score, against worlds in which they are known."""

import numpy as np
import pytest

from biomass_jax.evaluation.nugget import FEWEST_PAIRS, REACH, error_pairs, no_pairs, nugget
from data_prep.synthetic import world
from data_prep.synthetic.forest.land import Forest


def tracks(rng, size=224):
    """Pixels of a chip that lie along slanting tracks, as shots do."""
    along = np.arange(0, size, 2)
    pixels = {(int(r), int(c + 0.4 * r + rng.uniform(-0.5, 0.5)) % size) for c in range(0, size, 20) for r in along}
    return np.array(sorted(pixels)).T


def smooth(rng, rows, cols, scale=40.0):
    """A field that changes over kilometres, of a standard deviation of about `scale`."""
    waves = rng.normal(0, 0.03, (30, 2))
    phases = rng.uniform(0, 2 * np.pi, 30)
    return scale * np.sqrt(2 / 30) * np.cos(rows[:, None] * waves[:, 0] + cols[:, None] * waves[:, 1] + phases).sum(1)


def test_sums_are_those_of_all_pairs_counted_once():
    rng = np.random.default_rng(0)
    rows, cols = np.divmod(rng.choice(30 * 25, 80, replace=False), 25)
    errors = rng.normal(0, 9, 80)
    counts, sums = error_pairs(rows, cols, errors)
    apart = np.hypot(rows[:, None] - rows, cols[:, None] - cols)
    near = np.triu(apart <= REACH, 1)
    assert counts.sum() == near.sum()
    assert sums.sum() == pytest.approx((((errors[:, None] - errors) ** 2 / 2)[near]).sum())
    np.testing.assert_array_equal(error_pairs(rows[:0], cols[:0], errors[:0]), no_pairs())


def test_errors_that_neighbours_share_are_no_label_errors():
    """A model wrong by a smooth field on labels with known errors: the nugget is these errors' variance alone."""
    rng = np.random.default_rng(1)
    pairs, squares, noise = no_pairs(), [], []
    for _ in range(8):
        rows, cols = tracks(rng)
        label_error = rng.normal(0, 12, len(rows))
        errors = smooth(rng, rows, cols) - label_error
        pairs = pairs + error_pairs(rows, cols, errors)
        squares.append(errors**2)
        noise.append(label_error**2)
    known = np.concatenate(noise).mean()
    assert np.concatenate(squares).mean() > 8 * known
    assert nugget(pairs) == pytest.approx(known, rel=0.1)


def test_it_is_that_of_the_forest_world_where_it_is_known():
    """Shots as the world makes them, GEDI's error and their places in pixels included, under a model of known skill."""
    forest, shape, rng = Forest(3), (448, 448), np.random.default_rng(3)
    truth = forest.pixel_biomass(world.LEFT, world.TOP, shape)
    sums, shots = np.zeros(shape), np.zeros(shape, int)
    for beams in world._tracks(shape, rng):
        for x, y in beams.values():
            made = world._measure(forest.biomass(x, y), rng)
            kept = made["kept"]
            place = (
                np.floor((world.TOP - y) / 30).astype(int)[kept],
                np.floor((x - world.LEFT) / 30).astype(int)[kept],
            )
            np.add.at(sums, place, made["agbd"][kept])
            np.add.at(shots, place, 1)
    rows, cols = np.nonzero(shots)
    label = sums[rows, cols] / shots[rows, cols]
    known = np.mean((truth[rows, cols] - label) ** 2)
    best = truth[rows, cols] - label
    shared = best + smooth(rng, rows, cols, 20)
    assert nugget(error_pairs(rows, cols, best)) == pytest.approx(known, rel=0.15)
    assert nugget(error_pairs(rows, cols, shared)) == pytest.approx(known, rel=0.25)
    # A model that sees nothing: what the forest itself does from pixel to pixel is in it too.
    assert nugget(error_pairs(rows, cols, label.mean() - label)) > 3 * known


def test_too_few_pairs_tell_nothing():
    rng = np.random.default_rng(2)
    assert nugget(no_pairs()) is None
    rows, cols = np.divmod(np.arange(12), 4)
    pairs = error_pairs(rows, cols, rng.normal(size=12))
    assert pairs[0].sum() < FEWEST_PAIRS
    assert nugget(pairs) is None
    line = np.arange(0, 4 * FEWEST_PAIRS, 5)  # two distances, through which any parabola goes
    assert nugget(error_pairs(line, np.zeros_like(line), rng.normal(size=len(line)))) is None
