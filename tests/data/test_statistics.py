"""Band statistics against the standard library's exact arithmetic."""

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest

from biomass_jax.data import statistics as stats
from biomass_jax.errors import DataError


def make_images(count=4, size=9, dtype=np.int16, seed=0):
    """Chips over the whole range of int16, with every kind of no-data and legal zeros."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(-32768, 32768, (size, size, 6)).astype(dtype) for _ in range(count)]
    for image in images:
        image[0, :3, 2] = -9999  # one band is enough
        image[1, :4] = 0  # all six
        image[2, :5, 4] = 0  # a zero like others
    return images


def values_of(images, band, keep):
    """A band's values as Python numbers, by plain loops."""
    pixels = [pixel for image in images for row in image for pixel in row]
    return [Fraction(pixel[band].item()) for pixel in pixels if keep(pixel.tolist(), band)]


def has_data(pixel, band):
    return -9999 not in pixel and not all(value == 0 for value in pixel)


def counted_by_reference(pixel, band):
    return pixel[band] != -9999


def assert_exact(sums, images, keep):
    means, stds = stats.means_stds(sums)
    for band in range(6):
        values = values_of(images, band, keep)
        assert sums.counts[band] == len(values)
        assert sums.totals[band] == sum(values)
        assert sums.squares[band] == sum(value * value for value in values)
        assert means[band] == float(statistics.mean(values))
        assert math.isclose(stds[band], float(statistics.pstdev(values)), rel_tol=3e-16)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_sums_are_exact_and_leave_no_data_out(dtype):
    images = make_images(dtype=dtype)
    assert_exact(stats.combine(stats.chip_sums(image) for image in images), images, has_data)


def test_reference_leaves_out_nothing_but_minus_9999():
    images = make_images()
    sums = stats.combine(stats.chip_sums(image, reference=True) for image in images)
    assert_exact(sums, images, counted_by_reference)
    assert sums.counts[2] < sums.counts[0] == 4 * 81


def test_population_not_sample():
    image = np.full((1, 2, 6), 7, np.int16)
    image[0, 1] = 3
    assert stats.means_stds(stats.chip_sums(image)) == ([5.0] * 6, [2.0] * 6)


@pytest.mark.parametrize("fractions", [False, True])
def test_every_order_and_grouping_gives_the_same_bits(fractions):
    images = make_images(5, dtype=np.float32 if fractions else np.int16)
    if fractions:
        images = [image * np.float32(1 / 3) for image in images]
    parts = [stats.chip_sums(image) for image in images]
    expected = stats.means_stds(stats.combine(parts))
    for order in itertools.permutations(parts):
        assert stats.means_stds(stats.combine(order)) == expected
        grouped = stats.combine([stats.combine(order[:2]), stats.combine(order[2:])])
        assert stats.means_stds(grouped) == expected


def test_fractions_are_right_to_the_last_bits():
    images = [image * np.float32(1 / 3) for image in make_images(dtype=np.float32)]
    means, stds = stats.means_stds(stats.combine(stats.chip_sums(image) for image in images))
    for band in range(6):
        # a third of -9999 is data
        values = values_of(images, band, lambda pixel, _: any(pixel))
        assert math.isclose(means[band], float(statistics.mean(values)), rel_tol=1e-15)
        assert math.isclose(stds[band], float(statistics.pstdev(values)), rel_tol=1e-15)


def test_nan_is_no_data():
    image = np.ones((2, 2, 6), np.float32)
    image[0, 0, 3] = np.nan
    assert stats.chip_sums(image).counts == (3,) * 6
    assert stats.chip_sums(image, reference=True).counts == (4, 4, 4, 3, 4, 4)


def test_a_constant_band_has_no_spread():
    image = np.full((5, 5, 6), np.float32(0.1))
    assert stats.means_stds(stats.combine([stats.chip_sums(image)] * 3)) == ([float(np.float32(0.1))] * 6, [0.0] * 6)


def test_errors():
    with pytest.raises(DataError, match="band BLUE has no pixel with data in the train split"):
        stats.means_stds(stats.chip_sums(np.zeros((4, 4, 6), np.int16)))
    with pytest.raises(DataError, match=r"found int32 \(4, 4, 6\), expected int16 or float32"):
        stats.chip_sums(np.zeros((4, 4, 6), np.int32))
    with pytest.raises(DataError, match=r"found int16 \(4, 4, 5\)"):
        stats.chip_sums(np.zeros((4, 4, 5), np.int16))
