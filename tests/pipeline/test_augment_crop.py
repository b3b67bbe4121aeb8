"""Random resized crops against loops over pixels, and the boxes that are drawn."""

import math

import jax
import numpy as np

from biomass_jax.pipeline.augment import _box, random_resized_crop, resized_crop

KEY = jax.random.PRNGKey(0)
cropped = jax.jit(random_resized_crop, static_argnames="size")
resized = jax.jit(resized_crop, static_argnames="size")


def tap(length, size, index):
    """(first, second, weight of the second) of a half-pixel-centred resize, clamped to the box."""
    place = min(max((index + 0.5) * length / size - 0.5, 0), length - 1)
    low = min(math.floor(place), length - 1)
    return low, min(low + 1, length - 1), place - low


def resize_by_hand(image, box, size):
    top, left, height, width = box
    out, missing = np.zeros((size, size, image.shape[-1])), np.zeros((size, size), bool)
    for row in range(size):
        for col in range(size):
            r0, r1, down = tap(height, size, row)
            c0, c1, right = tap(width, size, col)
            total, weight = np.zeros(image.shape[-1]), 0.0
            for r, wr in ((r0, 1 - down), (r1, down)):
                for c, wc in ((c0, 1 - right), (c1, right)):
                    pixel = image[top + r, left + c].astype(float)
                    if (pixel != 0).any():
                        total, weight = total + wr * wc * pixel, weight + wr * wc
            missing[row, col] = weight < 0.5
            out[row, col] = 0 if weight < 0.5 else total / weight
    return out, missing


def chip(height=13, width=11, holes=0.15):
    rng = np.random.default_rng(4)
    image = rng.integers(-200, 9000, (height, width, 6)).astype(np.float32)
    image[rng.random((height, width)) < holes] = 0
    image[0, 0, :5] = 0  # five of six: there is data
    return image


def test_a_box_resized_as_a_loop_over_pixels_has_it():
    for box in ((0, 0, 13, 11), (2, 1, 9, 10), (12, 10, 1, 1), (5, 0, 4, 11)):
        for size in (12, 7):
            out, missing = resized(chip(), tuple(map(np.int32, box)), size=size)
            expected = resize_by_hand(chip(), box, size)
            np.testing.assert_array_equal(missing, expected[1])
            np.testing.assert_allclose(out, expected[0], atol=0.01)  # of 9000: 1e-6


def test_the_whole_chip_at_its_size_comes_back_unchanged():
    square = chip(12, 12)
    out, missing = resized(square, tuple(map(np.int32, (0, 0, 12, 12))), size=12)
    np.testing.assert_array_equal(out, square)
    np.testing.assert_array_equal(missing, (square == 0).all(-1))


def boxes(count, height, width, scale, ratio):
    chances = jax.random.uniform(KEY, (count, 22))
    return np.stack(jax.jit(jax.vmap(lambda row: _box(row, height, width, scale, ratio)))(chances), -1)


def test_boxes_have_the_areas_and_ratios_asked_for():
    scale, ratio = (0.67, 1.0), (3 / 4, 4 / 3)
    top, left, height, width = boxes(2000, 224, 224, scale, ratio).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 224).all() and (left + width <= 224).all()
    area, aspect = height * width / 224**2, width / height
    assert 0.66 < area.min() < 0.68 and 0.95 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.345
    assert abs(np.log(aspect).mean()) < 0.02
    spare = height < 200
    assert abs((top[spare] / (224 - height[spare])).mean() - 0.5) < 0.05  # offsets are uniform
    assert abs(np.corrcoef(top[spare], left[spare])[0, 1]) < 0.3


def test_where_no_box_fits_the_central_one_is_taken():
    assert (boxes(20, 8, 64, (0.67, 1.0), (3 / 4, 4 / 3)) == [0, 26, 8, 11]).all()
    assert (boxes(20, 64, 8, (0.67, 1.0), (3 / 4, 4 / 3)) == [26, 0, 11, 8]).all()


def test_rows_of_a_batch_get_boxes_of_their_own_and_half_are_mirrored():
    ramp = np.broadcast_to(np.arange(1, 17, dtype=np.float32)[None, None, :, None], (64, 16, 16, 6))
    out, missing = cropped(KEY, ramp, size=16)
    rises = np.asarray(out[:, 0, -1, 0] > out[:, 0, 0, 0])
    assert 15 < rises.sum() < 49 and not missing.any()
    assert len(np.unique(np.asarray(out[:, 0, 5, 0]))) > 20
    again, _ = cropped(KEY, ramp[:3], size=16)
    np.testing.assert_array_equal(again, out[:3])
