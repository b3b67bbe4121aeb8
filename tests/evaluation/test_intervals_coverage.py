"""How often intervals hold the truth, in a simulated world whose truth has a closed form."""

import numpy as np
import pytest
from scipy.special import erf, ndtr

from biomass_jax.evaluation.intervals import jackknife, mean_intervals
from biomass_jax.tasks.scores import SCORES

LABEL_SD, ERROR_SD, BIAS = 50.0, 25.0, 4.0  # of pixels within a block, Mg/ha
PIXELS = 25  # of a block, on average
# How far predictions go towards the mean, and how loud their errors are: the two models that are compared.
MODELS = ((0.2, 1.0), (0.3, 0.95))
TRIALS = 5000


class World:
    """Blocks of unequal size, label level, bias and error spread, each by its own draw.

    Args:
        sizes: sd of the logarithm of a block's number of pixels.
        spreads: likewise, of its error spread.
        biases: sd of blocks' biases, Mg/ha.
        levels: sd of blocks' mean labels.
    """

    def __init__(self, *, sizes, spreads, biases, levels):
        self.sizes, self.spreads, self.biases, self.levels = sizes, spreads, biases, levels

    def truth(self):
        """{score: (2,) of the models}; a block's size tells nothing of its errors, so pixels weigh alike."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        label = self.levels**2 + LABEL_SD**2
        found = {score: [] for score in SCORES}
        for shrink, loud in MODELS:
            noise = (loud * ERROR_SD * np.exp(self.spreads * nodes)) ** 2
            sd = np.sqrt(self.biases**2 + shrink**2 * label + noise)  # of errors, by a block's error spread
            folded = sd * np.sqrt(2 / np.pi) * np.exp(-0.5 * (BIAS / sd) ** 2) + BIAS * erf(BIAS / sd / np.sqrt(2))
            mean = weights / weights.sum()
            square = float(mean @ sd**2) + BIAS**2
            for score, value in zip(SCORES, (square**0.5, float(mean @ folded), BIAS, 1 - square / label), strict=True):
                found[score].append(value)
        return {score: np.array(values) for score, values in found.items()}

    def draw(self, rng, trials, blocks):
        """Sums of the two models: (2, trials, blocks, 6), as `block_sums` gives them."""
        shape = (trials, blocks)
        size = np.exp(rng.normal(-(self.sizes**2) / 2, self.sizes, shape))
        n = np.clip(np.round(PIXELS * size), 2, None).astype(int)
        starts = np.concatenate([[0], np.cumsum(n.ravel())[:-1]])
        block = np.repeat(np.arange(n.size), n.ravel())
        add = lambda values: np.add.reduceat(values, starts).reshape(shape)  # noqa: E731
        label = rng.normal(0, self.levels, n.size)[block] + LABEL_SD * rng.standard_normal(len(block))
        bias, spread = BIAS + rng.normal(0, self.biases, n.size), ERROR_SD * np.exp(rng.normal(0, self.spreads, n.size))
        shared = rng.standard_normal(len(block))
        made = []
        for shrink, loud in MODELS:
            noise = np.sqrt(0.5) * (shared + rng.standard_normal(len(block)))
            error = bias[block] - shrink * label + loud * spread[block] * noise
            sums = (error, np.abs(error), error**2, label, label**2)
            made.append(np.stack([n.astype(float), *map(add, sums)], -1))
        return np.stack(made)


WORLDS = {
    "equal": World(sizes=0.0, spreads=0.2, biases=10.0, levels=25.0),
    "unequal": World(sizes=0.5, spreads=0.2, biases=10.0, levels=25.0),
    "very unequal": World(sizes=0.7, spreads=0.2, biases=10.0, levels=40.0),
}


def coverage(world, trials, blocks, seed=0):
    """{score: share of trials whose interval holds the truth}, and likewise of the two models' difference."""
    sums = world.draw(np.random.default_rng([seed, blocks]), trials, blocks)
    truth = world.truth()

    def held(ends, values):
        there = {score: np.isfinite(low) for score, (low, _) in ends}  # not where one block is nearly everything
        assert all(mine.mean() > 0.9 for mine in there.values())
        inside = {score: (low <= values[score]) & (values[score] <= high) for score, (low, high) in ends}
        return {score: float(np.mean(inside[score][there[score]])) for score in there}

    return (
        held(jackknife(sums[0]).items(), {score: value[0] for score, value in truth.items()}),
        held(jackknife(sums[0], sums[1]).items(), {score: value[0] - value[1] for score, value in truth.items()}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("blocks", [5, 7, 10, 20, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(name, blocks):
    scores, differences = coverage(WORLDS[name], TRIALS, blocks)
    print(name, blocks, scores, differences)
    for found in (scores, differences):
        assert set(found) == set(SCORES)
        for score, share in found.items():
            assert 0.93 <= share <= 0.97, (score, share)


def test_the_worlds_truth_is_that_of_many_blocks():
    world = WORLDS["very unequal"]
    total = world.draw(np.random.default_rng(0), 1, 100_000).sum((1, 2))
    n, error, absolute, squared, label, squares = total.T
    truth = world.truth()
    np.testing.assert_allclose(np.sqrt(squared / n), truth["rmse"], rtol=0.01)
    np.testing.assert_allclose(absolute / n, truth["mae"], rtol=0.01)
    np.testing.assert_allclose(error / n, truth["bias"], atol=0.2)
    np.testing.assert_allclose(1 - squared / (squares - label**2 / n), truth["r2"], atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [0.0, 0.7])
@pytest.mark.parametrize("blocks", [5, 10, 20, 40])
def test_intervals_of_a_share_hold_the_truth_about_as_often_as_they_say(sizes, blocks):
    """Of labels, 90 % of which lie inside an interval; a fifth of their errors' variance is a block's."""
    rng, shared, held = np.random.default_rng([int(10 * sizes), blocks]), 0.2, []
    for _ in range(1000):
        n = np.clip(np.round(PIXELS * np.exp(rng.normal(-(sizes**2) / 2, sizes, blocks))), 2, None).astype(int)
        centre = shared**0.5 * rng.normal(size=blocks)
        chance = ndtr((1.6448536 + centre) / (1 - shared) ** 0.5) - ndtr((centre - 1.6448536) / (1 - shared) ** 0.5)
        ((interval,), _) = mean_intervals(np.stack([n, rng.binomial(n, chance)], axis=1).astype(float), [True])
        if interval is not None:
            held.append(interval[0] <= 0.9 <= interval[1])
    print(sizes, blocks, len(held), np.mean(held))
    assert len(held) > 900
    assert 0.92 <= np.mean(held) <= 0.985
