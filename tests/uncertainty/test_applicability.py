"""The area of applicability against a loop written from the paper, numbers worked out by hand, and CAST's rules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.errors import DataError
from biomass_jax.uncertainty import applicability
from biomass_jax.uncertainty.applicability import Applicability, CellSample, cell_labels, dissimilarity, fit


def plain_fit(features, labels, blocks):
    """Meyer & Pebesma 2021, sections 2.1 to 2.3, one point and one pair at a time: points, mean distance, threshold."""
    n, channels = features.shape
    columns = []
    for channel in range(channels):
        values = [float(v) for v in features[:, channel]]
        mean = sum(values) / n
        sd = math.sqrt(sum((v - mean) ** 2 for v in values) / n)
        known = [i for i in range(n) if not math.isnan(labels[i])]
        r = np.corrcoef([values[i] for i in known], [labels[i] for i in known])[0, 1] if sd > 0 else 0
        columns.append((mean, sd, abs(r)))
    importance = sum(weight for *_, weight in columns) / channels
    transform = [(mean, weight / importance / sd if sd > 0 else 0.0) for mean, sd, weight in columns]

    def place(row):
        return [(float(value) - mean) * scale for value, (mean, scale) in zip(row, transform, strict=True)]

    points = [place(row) for row in features]
    pairs = [math.dist(points[i], points[j]) for i in range(n) for j in range(i)]
    mean_distance = sum(pairs) / len(pairs)
    di = [
        min(math.dist(points[i], points[j]) for j in range(n) if blocks[j] != blocks[i]) / mean_distance
        for i in range(n)
    ]
    q1, q3 = np.percentile(di, 25), np.percentile(di, 75)
    threshold = max(v for v in di if v <= q3 + 1.5 * (q3 - q1))
    return place, points, mean_distance, threshold


def world(seed=0, n=61, channels=7, blocks=5):
    """Cells with a channel without spread, one of large values, and labels for two thirds of them."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, channels)) * np.arange(1, channels + 1) + 3
    features[:, 2] = 0.1
    features[:, 3] = 1000 + features[:, 3]
    labels = 20 * features[:, 1] + 5 * features[:, 4] + rng.standard_normal(n)
    labels[::3] = np.nan
    return features.astype(np.float32), labels, rng.permutation(np.arange(n) % blocks)


def on_device(area, features):
    return np.asarray(jax.jit(dissimilarity)(jax.tree.map(jnp.asarray, area.arrays()), jnp.asarray(features)))


def test_fit_and_di_against_a_loop():
    features, labels, blocks = world()
    area = fit(features, labels, blocks)
    place, points, mean_distance, threshold = plain_fit(features, labels, blocks)
    assert area.mean_distance == pytest.approx(mean_distance, rel=1e-9)
    assert area.threshold == pytest.approx(threshold, rel=1e-9)
    assert (area.blocks, area.cells, area.centres.shape) == (5, 61, (61, 7))
    np.testing.assert_allclose(area.centres, points, atol=2e-4)  # 1000 in float32
    new = world(seed=1, n=2 * 3 * 4)[0].reshape(2, 3, 4, 7) * np.float32(1.5)
    di = on_device(area, new)
    expected = [min(math.dist(place(cell), point) for point in points) / mean_distance for cell in new.reshape(-1, 7)]
    assert di.shape == (2, 3, 4) and di.dtype == np.float32
    np.testing.assert_allclose(di.ravel(), expected, rtol=1e-5)


def test_numbers_worked_out_by_hand():
    """Four cells on a line, 0, 1, 3 and 8 (mean 3, variance 9.5), in two blocks; nothing is labelled.

    Distances over sd: 1, 3, 8, 2, 7, 5, mean 26/6. To the nearest of the other block: 0 -> 3: 3, 1 -> 3: 2, 3 -> 1: 2,
    8 -> 1: 7. Quartiles of 2, 2, 3, 7 are 2 and 4, so that values up to 7 are no outliers.
    """
    features = np.array([[0, 7], [1, 7], [3, 7], [8, 7]], np.float32)
    area = fit(features, np.full(4, np.nan), np.array(["a", "a", "b", "b"]))
    sd = math.sqrt(9.5)
    # The second channel has no spread and weighs 0, so that a mean weight of 1 gives the first one 2.
    assert area.scale.tolist() == pytest.approx([2 / sd, 0])
    assert area.mean_distance == pytest.approx(2 * 26 / 6 / sd, rel=1e-12)
    assert area.threshold == pytest.approx(7 / (26 / 6), rel=1e-12)
    di = on_device(area, np.array([[[[3, 7], [5, 99], [-2, 7]]]], np.float32))
    np.testing.assert_allclose(di, [[[0, 2 / (26 / 6), 2 / (26 / 6)]]], rtol=1e-6)


def test_threshold_is_the_largest_that_is_no_outlier():
    """Pairs of cells over two blocks, 1, 1, 2, 2, 3 and 20 apart and the pairs far from each other."""
    gaps = [1, 1, 2, 2, 3, 20]
    cells = np.array([[1000 * pair**2 + side * gap] for pair, gap in enumerate(gaps) for side in (0, 1)], np.float64)
    area = fit(cells, np.full(12, np.nan), np.arange(12) % 2)
    distances = np.abs(cells - cells.T)
    assert area.threshold == pytest.approx(3 / (distances.sum() / (12 * 11)), rel=1e-9)


def test_a_block_is_no_neighbour_of_itself():
    """Cells alike within their block: near their own, and as far as the blocks are from each other."""
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(4), 10)
    features = np.eye(4)[blocks] * 100 + rng.standard_normal((40, 4))
    area = fit(features, np.full(40, np.nan), blocks)
    assert area.threshold > 0.9
    assert fit(features, np.full(40, np.nan), np.arange(40)).threshold < 0.2


def test_channels_weigh_by_what_they_tell():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((500, 3))
    labels = features[:, 0] + 0.5 * features[:, 1]
    r = np.abs([np.corrcoef(column, labels)[0, 1] for column in features.T])
    area = fit(features, labels, np.arange(500) % 3)
    np.testing.assert_allclose(area.scale * features.std(0), r / r.mean(), rtol=1e-6)
    for unknown in (np.full(500, np.nan), np.full(500, 80.0), np.where(np.arange(500) < 2, labels, np.nan)):
        area = fit(features, unknown, np.arange(500) % 3)
        np.testing.assert_allclose(area.scale * features.std(0), 1, rtol=1e-6)


def test_a_training_cell_has_a_di_of_zero():
    """Also where |a|^2 + |b|^2 - 2ab has no digits left: far out, in channels with means far from 0."""
    features, labels, blocks = world(n=600, channels=13)
    features[:50] *= 300
    area = fit(features, labels, blocks)
    assert on_device(area, features.reshape(4, 25, 6, 13)).max() < 1e-4  # 0 but for rounding
    nudged = features.copy()
    nudged[:, 0] += 0.01  # a hundredth of its standard deviation and less
    moved = on_device(area, nudged[None, None])
    expected = 0.01 * area.scale[0] / area.mean_distance
    np.testing.assert_allclose(moved[moved > 0], expected, rtol=2e-2)


def test_far_cells_lie_outside_and_cells_like_the_training_ground_inside():
    features, labels, blocks = world(n=900, channels=5)
    area = fit(features[:800], labels[:800], blocks[:800])
    assert (on_device(area, features[None, None, 800:]) <= area.threshold).mean() > 0.9
    assert (on_device(area, features[None, None, 800:] + 40 * features.std(0)) > area.threshold).all()


def test_channels_without_spread_count_nothing():
    features, labels, blocks = world()
    area = fit(features, labels, blocks)
    assert area.scale[2] == 0 and np.count_nonzero(area.scale) == 6
    odd = features[None, None] + np.eye(7, dtype=np.float32)[2] * 1e6
    assert on_device(area, odd).max() < 1e-6  # a product that is fused with a sum is rounded once


def test_features_that_are_no_numbers_stay_none():
    area = fit(*world())
    features = np.array(world()[0][None, None, :3])
    features[0, 0, 1, 5] = np.nan
    assert np.isnan(on_device(area, features)).tolist() == [[[False, True, False]]]


def test_centres_come_evenly_from_all_blocks():
    rng = np.random.default_rng(2)
    blocks = np.repeat(["large", "middle", "small"], [3000, 40, 5])
    features = rng.standard_normal((3045, 2))
    features[:, 1] = np.repeat([0, 1, 2], [3000, 40, 5])  # tells the block
    area = fit(features, np.full(3045, np.nan), blocks, centres=80)
    counts = np.unique(area.centres[:, 1], return_counts=True)[1]
    assert sorted(counts) == [5, 37, 38] and (area.blocks, area.cells) == (3, 3045)
    again, other = (fit(features, np.full(3045, np.nan), blocks, centres=80, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.centres, area.centres)
    assert (other.centres != area.centres).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": np.zeros(61)}, r"1 blocks of ground, expected 2 or more"),
        ({"features": np.full((61, 7), 3.0)}, r"all 61 training cells have the same features"),
        ({"features": np.full((61, 7), np.inf)}, r"61 training cells: .*NaN or infinite"),
    ],
)
def test_refusals(change, message):
    given = dict(zip(("features", "labels", "blocks"), world(), strict=True)) | change
    with pytest.raises(DataError, match=message):
        fit(**given)


def chips(number=40):
    rng = np.random.default_rng(3)
    for chip in range(number):
        h, w = 3 + chip % 4, 5
        yield (
            f"10SFF_{chip}",
            rng.standard_normal((h, w, 3)).astype(np.float32),
            rng.random((h, w)),
            f"block {chip * chip % 7}",
            rng.random((h, w)) < 0.8,
        )


def sampled(order, size, seed=0):
    sample, given = CellSample(size, seed), list(chips())
    for index in order:
        chip_id, features, labels, block, valid = given[index]
        sample.add(chip_id, features, labels, block, valid=valid)
        assert sample._held <= 2 * size
    return sample.cells()


@pytest.mark.parametrize("size", [30, 64, 10_000])
def test_the_sample_does_not_depend_on_the_order_of_chips(size):
    forwards, backwards = sampled(range(40), size), sampled(range(39, -1, -1), size)
    mixed = sampled(np.random.default_rng(0).permutation(40), size)
    for a, b, c in zip(forwards, backwards, mixed, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    valid = sum(valid.sum() for *_, valid in chips())
    assert len(forwards[0]) == min(size, valid)
    if size == 64:
        assert set(np.unique(forwards[2], return_counts=True)[1]) <= {15, 16, 17}  # four blocks of seven have chips
        assert (sampled(range(40), size, seed=1)[0] != forwards[0]).any()


def test_cells_of_no_data_have_no_say_and_cells_keep_their_label_and_block():
    cells = {
        tuple(row): (label, block, ok)
        for _, features, labels, block, valid in chips()
        for row, label, ok in zip(features.reshape(-1, 3), labels.ravel(), valid.ravel(), strict=True)
    }
    features, labels, blocks = sampled(range(40), 100)
    for row, label, block in zip(features, labels, blocks, strict=True):
        assert cells[tuple(row)] == (label, block, True)


def test_blocks_may_be_given_cell_by_cell():
    sample = CellSample()
    blocks = np.array([["a", "b", "b"], ["c", "a", "b"]])
    sample.add("chip", np.arange(24.0).reshape(2, 3, 4), np.zeros((2, 3)), blocks)
    features, _, given = sample.cells()
    assert [given[np.flatnonzero(features[:, 0] == 4 * i)[0]] for i in range(6)] == blocks.ravel().tolist()


def test_a_chip_whose_features_are_no_numbers_is_named():
    sample = CellSample()
    features = np.full((2, 2, 3), np.nan)
    sample.add("dark", features, np.zeros((2, 2)), "a", valid=np.zeros((2, 2), bool))
    with pytest.raises(DataError, match="no chip has a cell with data"):
        sample.cells()
    with pytest.raises(DataError, match="chip 10SFF_7: .*NaN or infinite"):
        sample.add("10SFF_7", features, np.zeros((2, 2)), "a")


def test_labels_and_no_data_of_cells():
    label = np.full((5, 7), -1.0)
    label[0, :3] = 10, 20, 60  # the third lies in the second cell
    label[1, 1], label[4, 6], label[2, 2] = np.nan, 7, 5
    no_data = np.zeros((5, 7), bool)
    no_data[2:4, 2:4] = no_data[4, 5] = no_data[0, 1] = True
    labels, valid = cell_labels(label, no_data, 2)
    nan = math.nan
    np.testing.assert_array_equal(labels, [[10, 60, nan, nan], [nan] * 4, [nan, nan, nan, 7]])
    assert valid.tolist() == [[True] * 4, [True, False, True, True], [True] * 4]


def test_each_pixel_has_the_value_of_its_cell():
    di = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    pixels, cells = np.asarray(applicability.to_pixels(di, (11, 13), 4)), np.asarray(di)
    assert pixels.shape == (2, 11, 13)
    for b, y, x in np.ndindex(2, 11, 13):
        assert pixels[b, y, x] == cells[b, y // 4, x // 4]
    with pytest.raises(ValueError, match=r"\(11, 17\) px in cells of 4 px are \(3, 5\) cells, found \(3, 4\)"):
        applicability.to_pixels(di, (11, 17), 4)


@pytest.mark.parametrize(
    ("patch", "stages", "expected"), [(4, 4, (2, 16)), (2, 4, (3, 16)), (4, 2, (1, 8)), (3, 4, (2, 12))]
)
def test_the_map_nearest_to_sixteen_pixels(patch, stages, expected):
    assert applicability.feature_stage(patch, stages) == expected


def test_arrays_and_description_give_it_back():
    area = fit(*world())
    again = Applicability.from_arrays(area.arrays(), area.about() | {"other": 1})
    for name, array in area.arrays().items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(again.arrays()[name], array)
    assert again.about() == area.about() == {"threshold": area.threshold, "blocks": 5, "cells": 61, "centres": 61}
