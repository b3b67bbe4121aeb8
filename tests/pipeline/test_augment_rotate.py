"""Rotation against plain loops over pixels, and what scattered labels keep."""

import math
from functools import partial

import jax
import numpy as np
import pytest

from biomass_jax.pipeline import augment as transforms
from biomass_jax.pipeline.augment import rotate

DEGREES = [0.0, 17.0, -29.5, 133.0]
rotated = jax.jit(rotate, static_argnames=("label_mode", "label_fill"))


def origin(row, col, height, width, degrees):
    """Where a pixel came from, by cv2.getRotationMatrix2D's matrix inverted: counter-clockwise, row 0 on top."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = row - (height - 1) / 2, col - (width - 1) / 2
    return (height - 1) / 2 + cos * y + sin * x, (width - 1) / 2 - sin * y + cos * x


def warp_by_hand(image, label, degrees, fill):
    height, width = label.shape
    out, moved = np.zeros(image.shape), np.full(label.shape, fill)
    for row in range(height):
        for col in range(width):
            y, x = origin(row, col, height, width, degrees)
            top, left = math.floor(y), math.floor(x)
            for r in (top, top + 1):
                for c in (left, left + 1):
                    if 0 <= r < height and 0 <= c < width:
                        out[row, col] += (1 - abs(y - r)) * (1 - abs(x - c)) * image[r, c]
            r, c = math.floor(y + 0.5), math.floor(x + 0.5)
            if 0 <= r < height and 0 <= c < width:
                moved[row, col] = label[r, c]
    return out, moved


@pytest.mark.parametrize("fill", [0.0, -1.0])
def test_image_and_nearest_label_as_a_loop_over_pixels_has_them(fill):
    rng = np.random.default_rng(1)
    image = rng.integers(1, 9000, (4, 12, 9, 6)).astype(np.float32)
    label = rng.integers(0, 500, (4, 12, 9)).astype(np.float32)
    out, moved = rotated(image, label, np.array(DEGREES, np.float32), label_mode="nearest", label_fill=fill)
    for one, degrees in enumerate(DEGREES):
        expected = warp_by_hand(image[one], label[one], degrees, fill)
        np.testing.assert_allclose(out[one], expected[0], atol=0.02)  # of 9000: 2e-6
        np.testing.assert_array_equal(moved[one], expected[1])
    assert (np.asarray(moved[3]) == fill).any()


def test_the_turn_is_counter_clockwise():
    label = np.arange(25, dtype=np.float32).reshape(1, 5, 5)
    image = np.stack([label] * 6, -1)
    out, moved = rotated(image, label, np.array([90], np.float32), label_mode="scatter")
    np.testing.assert_array_equal(moved[0], np.rot90(label[0]))
    np.testing.assert_allclose(out[0, ..., 2], np.rot90(label[0]), atol=1e-4)


def moved_labels(label, degrees):
    image = np.zeros((*label.shape, 1), np.float32)
    return np.asarray(rotated(image, label, np.asarray(degrees, np.float32), label_mode="scatter")[1])


def exact_place(row, col, size, degrees):
    return origin(row, col, size, size, -degrees)  # the other way round is the opposite turn


SIZE = 41
ANGLES = np.random.default_rng(2).uniform(-180, 180, 24)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_no_label_is_lost_or_copied_or_moved_away(share):
    rng = np.random.default_rng(3)
    rows, cols = np.mgrid[:SIZE, :SIZE]
    circle = (rows - SIZE // 2) ** 2 + (cols - SIZE // 2) ** 2 <= (SIZE / 2 - 0.5) ** 2
    number = np.arange(SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    chosen = circle & (rng.random((24, SIZE, SIZE)) <= share)
    label = np.where(chosen, number, -1)
    moved = moved_labels(label, ANGLES)
    for before, after, degrees in zip(label, moved, ANGLES, strict=True):
        assert sorted(after[after >= 0]) == sorted(before[before >= 0])  # hence count and sum
        for row, col in np.argwhere(after >= 0):
            y, x = exact_place(*divmod(int(after[row, col]), SIZE), SIZE, degrees)
            assert max(abs(y - row), abs(x - col)) < 1.4


def test_labels_that_stand_alone_go_where_their_centre_falls():
    label = np.full((24, SIZE, SIZE), -1, np.float32)
    number = np.arange(SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    label[:, 1::4, 2::4] = number[1::4, 2::4]  # corners among them, some of which leave
    moved = moved_labels(label, ANGLES)
    left = 0
    for before, after, degrees in zip(label, moved, ANGLES, strict=True):
        expected = np.full((SIZE, SIZE), -1.0)
        for row, col in np.argwhere(before >= 0):
            y, x = exact_place(row, col, SIZE, degrees)
            r, c = math.floor(y + 0.5), math.floor(x + 0.5)
            if 0 <= r < SIZE and 0 <= c < SIZE:
                expected[r, c] = before[row, col]
            else:
                left += 1
        np.testing.assert_array_equal(after, expected)
    assert left > 20


def test_scattered_labels_with_a_filled_border():
    label = np.full((24, SIZE, SIZE), -1, np.float32)
    label[:, 3::4, 1::4] = 7
    image = np.zeros((24, SIZE, SIZE, 1), np.float32)
    filled = rotated(image, label, ANGLES.astype(np.float32), label_mode="scatter", label_fill=0.0)[1]
    plain = moved_labels(label, ANGLES)
    everywhere = rotated(image, np.ones_like(label), ANGLES.astype(np.float32), label_mode="nearest", label_fill=0.0)[1]
    assert (np.asarray(everywhere) == 0).sum() > 1000
    np.testing.assert_array_equal(filled, np.where((plain < 0) & (np.asarray(everywhere) == 0), 0, plain))


def test_a_label_of_zero_is_a_label():
    label = np.full((24, SIZE, SIZE), -1, np.float32)
    label[:, 20, 12:16] = 0
    assert ((moved_labels(label, ANGLES) == 0).sum((1, 2)) == 4).all()


def test_angles_and_their_share():
    label = np.full((400, SIZE, SIZE), -1, np.float32)
    label[:, SIZE // 2, SIZE - 1] = 7  # at the eastern end: its row tells the angle
    image = np.zeros((400, SIZE, SIZE, 1), np.float32)
    settings = {"flip": False, "turn": False, "rotate_degrees": 30.0, "rotate_probability": 0.4}
    moved = np.asarray(jax.jit(partial(transforms.augment, **settings))(jax.random.PRNGKey(0), image, label)[1])
    where = np.argwhere(moved == 7)
    assert len(where) == 400
    degrees = np.degrees(np.arctan2(SIZE // 2 - where[:, 1], where[:, 2] - SIZE // 2))
    turned = (moved != label).any((1, 2))
    assert abs(turned.mean() - 0.4) < 0.12  # small angles leave the label in its pixel
    assert -31.5 < degrees.min() < -25 and 25 < degrees.max() < 31.5
    assert abs(degrees[turned].mean()) < 5
