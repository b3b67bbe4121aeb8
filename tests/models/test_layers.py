"""Shared layers against closed forms and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.models.layers import BatchNorm, LayerNorm, adaptive_avg_pool, bilinear_matrix, gelu, resize_bilinear
from biomass_jax.models.pixel_shuffle import pixel_shuffle


def test_resize_with_aligned_corners_reproduces_a_plane():
    # With aligned corners, the corners stay and a linear ramp stays linear.
    rows, cols = np.mgrid[0:5, 0:7].astype(np.float32)
    plane = 2 * rows - 3 * cols + 1
    out = resize_bilinear(plane[None, :, :, None], (13, 9), align_corners=True)[0, :, :, 0]
    fine_rows, fine_cols = np.meshgrid(np.linspace(0, 4, 13), np.linspace(0, 6, 9), indexing="ij")
    np.testing.assert_allclose(out, 2 * fine_rows - 3 * fine_cols + 1, atol=1e-5)


def test_resize_with_half_pixel_centres_by_hand():
    # 2 -> 4: sources -0.25 (clamped to 0), 0.25, 0.75, 1.25 (its upper tap clamped to the last pixel).
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(bilinear_matrix(2, 4, False), expected)
    # 4 -> 3: scale 4/3, sources 1/6, 3/2, 17/6.
    expected = [[5 / 6, 1 / 6, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1 / 6, 5 / 6]]
    np.testing.assert_allclose(bilinear_matrix(4, 3, False), expected, atol=1e-6)


def test_resize_from_one_pixel_repeats_it():
    x = jnp.full((1, 1, 1, 3), 7.0)
    assert (resize_bilinear(x, (4, 5), align_corners=True) == 7).all()
    assert bilinear_matrix(3, 1, True).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("height", "width", "size"), [(7, 9, 3), (7, 5, 6), (2, 3, 6), (8, 4, 2), (5, 6, 1)])
def test_adaptive_pooling_against_a_loop(height, width, size):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    out = np.asarray(adaptive_avg_pool(x, size))
    for i in range(size):
        for j in range(size):
            top, bottom = int(np.floor(i * height / size)), int(np.ceil((i + 1) * height / size))
            left, right = int(np.floor(j * width / size)), int(np.ceil((j + 1) * width / size))
            np.testing.assert_allclose(out[:, i, j], x[:, top:bottom, left:right].mean((1, 2)), atol=1e-6)


def test_batch_norm_normalises_by_the_biased_and_keeps_the_unbiased_variance():
    x = np.random.default_rng(1).normal(3, 2, (2, 3, 5, 4)).astype(np.float32)
    variables = {
        "params": {"scale": np.arange(1.0, 5, dtype=np.float32), "bias": np.full(4, 0.5, np.float32)},
        "batch_stats": {"mean": np.full(4, 10, np.float32), "var": np.full(4, 7, np.float32)},
    }
    out, state = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * variables["params"]["scale"] + 0.5
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.9 * 10 + 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(state["batch_stats"]["var"], 0.9 * 7 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    frozen = BatchNorm().apply(variables, x, train=False)
    expected = (x - 10) / np.sqrt(7 + 1e-5) * variables["params"]["scale"] + 0.5
    np.testing.assert_allclose(frozen, expected, atol=1e-5)


def test_layer_norm_far_from_zero():
    # A one-pass variance (mean of squares minus square of the mean) loses all digits here.
    x = (1e4 + np.random.default_rng(2).standard_normal((3, 64))).astype(np.float32)
    out = LayerNorm().apply({"params": {"scale": np.ones(64), "bias": np.zeros(64)}}, x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=2e-3)


def test_gelu_is_the_erf_form():
    # Values of x * Phi(x) from the normal distribution function.
    x = jnp.asarray([-3.0, -1.0, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(gelu(x), [-0.00404951, -0.15865525, 0.0, 0.34573123, 1.95449974], atol=1e-6)
    assert gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_pixel_shuffle_against_a_loop():
    x = np.arange(2 * 3 * 4 * 5 * 9, dtype=np.float32).reshape(2, 3, 4, 45)
    out = np.asarray(pixel_shuffle(jnp.asarray(x), 3))
    assert out.shape == (2, 9, 12, 5)
    for h, w, c, i, j in np.ndindex(3, 4, 5, 3, 3):
        np.testing.assert_array_equal(out[:, 3 * h + i, 3 * w + j, c], x[:, h, w, 9 * c + 3 * i + j])
    with pytest.raises(ValueError, match="multiple of 4 channels, found 6"):
        pixel_shuffle(jnp.zeros((1, 1, 1, 6)), 2)


def test_resizing_stays_float32_in_a_bfloat16_model():
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 2)).astype(jnp.bfloat16)
    out = resize_bilinear(x, (8, 11), align_corners=True)
    wide = resize_bilinear(x.astype(jnp.float32), (8, 11), align_corners=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
