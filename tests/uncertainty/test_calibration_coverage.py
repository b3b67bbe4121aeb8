"""How often calibrated intervals hold the labels of blocks that calibration has not seen, in a simulated world."""

import numpy as np
import pytest

from biomass_jax.uncertainty.calibration import fit

PIXELS = 40  # of a block, on average
NEW = 200  # blocks that are asked


class World:
    """Errors grow with the prediction, and a share of their variance is common to a block; blocks differ in size.

    Args:
        shared: share of the errors' variance that a block has in common.
        sizes: sd of the logarithm of a block's number of pixels.
    """

    def __init__(self, *, shared, sizes):
        self.shared, self.sizes = shared, sizes

    def draw(self, rng, blocks):
        """(raw of a model that gives sds, label, block); the sds are noisy, and half of what they should be."""
        size = np.maximum(2, np.round(PIXELS * np.exp(rng.normal(0, self.sizes, blocks)))).astype(int)
        block = np.repeat(np.arange(blocks), size)
        mean = rng.gamma(2, 60, len(block))
        true = 5 + 0.2 * mean
        noise = np.sqrt(self.shared) * rng.normal(size=blocks)[block]
        noise = noise + np.sqrt(1 - self.shared) * rng.normal(size=len(block))
        sd = 0.5 * true * np.exp(rng.normal(0, 0.3, len(block)))
        return {"mean": mean, "sd": sd}, np.maximum(mean + true * noise, 0), block


def outputs(raw, kind):
    if kind == "sd":
        return raw
    return {"mean": raw["mean"], "lo": raw["mean"] - 1.2 * raw["sd"], "hi": raw["mean"] + raw["sd"]}


def simulate(world, kind, blocks, trials):
    """Coverage of new blocks' pixels, the same with all pixels taken for exchangeable, and the mean squared z."""
    found = []
    for trial in range(trials):
        rng = np.random.default_rng([blocks, trial])
        raw, label, block = world.draw(rng, blocks)
        new_raw, new_label, _ = world.draw(rng, NEW)
        raw, new_raw = outputs(raw, kind), outputs(new_raw, kind)
        calibrated = fit(raw, label, blocks=block, biomes=np.full(len(block), "unknown"), seed=trial)
        sd, low, high = calibrated.apply(new_raw)
        z = (new_label - new_raw["mean"]) / sd
        size = np.sort(np.abs(label - raw["mean"]) / calibrated.apply(raw)[0])
        naive = size[int(np.ceil((len(size) + 1) * 0.9)) - 1]
        held = (low <= new_label) & (new_label <= high)
        found.append([held.mean(), (np.abs(z) <= naive).mean(), np.mean(z**2)])
    return np.mean(found, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "quantiles"])
@pytest.mark.parametrize("blocks", [12, 20, 40, 100])
def test_intervals_hold_labels_of_new_blocks_as_often_as_they_say(kind, blocks):
    """With 12 blocks the quantile is the largest of 12 scores, which is 12/13 = 92 % and not 90."""
    coverage, naive, z = simulate(World(shared=0.3, sizes=0.5), kind, blocks, max(4000 // blocks, 60))
    print(f"{kind}, {blocks} blocks: coverage {coverage:.3f}, by pixels {naive:.3f}, mean squared z {z:.3f}")
    assert 0.88 <= coverage <= 0.95
    assert 0.9 <= z <= 1.1


@pytest.mark.slow
def test_intervals_by_pixels_are_too_narrow_where_blocks_err_together_and_those_by_blocks_are_not():
    coverage, naive, _ = simulate(World(shared=0.8, sizes=1.0), "sd", 12, 150)
    print(f"12 blocks that err together: coverage {coverage:.3f}, by pixels {naive:.3f}")
    assert naive < 0.88 <= coverage
