"""Sizes that a program learns when it runs give the numbers of sizes that are known when it is traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from biomass_jax.models import shapes
from biomass_jax.models.layers import adaptive_pool_matrix, bilinear_matrix
from biomass_jax.models.swin_ops import shift_mask


@functools.cache
def traced_once(compute):
    """`compute(height, width)` as a program for every height and width that are multiples of 2."""
    image = jax.ShapeDtypeStruct(export.symbolic_shape("2*h, 2*w"), jnp.float32)
    return export.export(jax.jit(lambda image: compute(*image.shape)))(image)


def pooling(height, width):
    return adaptive_pool_matrix(height, 6), adaptive_pool_matrix(width, 3)


def masks(height, width):
    return shift_mask(shapes.rounded_up(height, 4), shapes.rounded_up(width, 4), 4, 2)


def aligned(height, width):
    return bilinear_matrix(height, width, True)


def half_pixels(height, width):
    return bilinear_matrix(height, width, False)


@pytest.mark.parametrize("compute", [aligned, half_pixels, pooling, masks])
@pytest.mark.parametrize(("height", "width"), [(2, 8), (6, 4), (14, 22)])
def test_what_follows_from_unknown_sizes_is_what_follows_from_known_ones(compute, height, width):
    found = traced_once(compute).call(np.zeros((height, width), np.float32))
    for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves(compute(height, width)), strict=True):
        assert isinstance(expected, np.ndarray)
        assert one.dtype == expected.dtype
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_a_single_window_is_told_when_the_program_runs():
    def shift(height, width):
        return shapes.where((shapes.rounded_up(height, 7), shapes.rounded_up(width, 7)), 7, 0, 3)

    for height, width, expected in ((6, 4, 0), (6, 8, 3), (8, 6, 3), (2, 2, 0)):
        assert shift(height, width) == expected
        assert traced_once(shift).call(np.zeros((height, width), np.float32)) == expected


def test_a_shift_of_nothing_masks_nothing_of_a_single_window():
    mask = jax.jit(lambda shift: shift_mask(7, 7, 7, shift))
    assert not np.asarray(mask(0)).any()
    np.testing.assert_array_equal(mask(3), shift_mask(7, 7, 7, 3))


def test_sizes_round_up_to_windows():
    for size in range(1, 30):
        assert shapes.rounded_up(size, 7) == min(n for n in range(0, 36, 7) if n >= size)


def test_what_known_sizes_give_is_kept_and_what_unknown_ones_give_is_not():
    assert bilinear_matrix(5, 9, True) is bilinear_matrix(5, 9, True)
    assert shapes.is_known(3, np.int64(4))
    assert not shapes.is_known(3, export.symbolic_shape("h")[0])
    assert shapes.is_zero(0)
    assert not shapes.is_zero(jnp.int32(0))
