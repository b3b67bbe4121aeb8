"""Window arithmetic against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.models import swin_ops


def test_window_partition_against_a_loop():
    x = np.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    windows = np.asarray(swin_ops.window_partition(jnp.asarray(x), 3))
    assert windows.shape == (12, 9, 2)
    for b, i, j in np.ndindex(2, 2, 3):
        expected = x[b, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].reshape(9, 2)
        np.testing.assert_array_equal(windows[b * 6 + i * 3 + j], expected)
    np.testing.assert_array_equal(swin_ops.window_reverse(jnp.asarray(windows), 3, 6, 9), x)


def test_relative_position_index_against_a_loop():
    index = swin_ops.relative_position_index(3)
    for yi, xi, yj, xj in np.ndindex(3, 3, 3, 3):
        assert index[yi * 3 + xi, yj * 3 + xj] == (yi - yj + 2) * 5 + (xi - xj + 2)


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"), [(6, 9, 3, 1), (14, 7, 7, 3), (7, 7, 7, 3), (8, 12, 4, 2)]
)
def test_shift_mask_lets_only_true_neighbours_attend(height, width, window, shift):
    """Two tokens of a window may attend to each other iff the roll did not bring them across the map's edge."""
    mask = swin_ops.shift_mask(height, width, window, shift)
    rows, cols = np.mgrid[0:height, 0:width]
    rolled_rows, rolled_cols = np.roll(rows, (-shift, -shift), (0, 1)), np.roll(cols, (-shift, -shift), (0, 1))
    wide = width // window
    for w in range(mask.shape[0]):
        top, left = w // wide * window, w % wide * window
        r = rolled_rows[top : top + window, left : left + window].ravel()
        c = rolled_cols[top : top + window, left : left + window].ravel()
        near = (np.abs(r[:, None] - r) < window) & (np.abs(c[:, None] - c) < window)
        if height == window or width == window:
            # A single window holds every token, so wrapped ones are near too: here the seam itself decides.
            seam_r, seam_c = r >= shift, c >= shift
            same = (seam_r[:, None] == seam_r) | (top + window < height)
            near = same & ((seam_c[:, None] == seam_c) | (left + window < width))
        np.testing.assert_array_equal(mask[w] == 0, near)
    assert set(np.unique(mask)) == {-100.0, 0.0}


def test_merge_patches_against_a_loop_with_odd_sides():
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 3)).astype(np.float32)
    out = np.asarray(swin_ops.merge_patches(jnp.asarray(x)))
    assert out.shape == (2, 3, 4, 12)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    for h, w in np.ndindex(3, 4):
        for k, (row, col) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            np.testing.assert_array_equal(out[:, h, w, 3 * k : 3 * k + 3], padded[:, 2 * h + row, 2 * w + col])


def test_drop_path_rates_grow_linearly_over_all_blocks():
    rates = swin_ops.drop_path_rates(0.3, (2, 2, 18, 2))
    assert [len(r) for r in rates] == [2, 2, 18, 2]
    flat = sum(rates, [])
    np.testing.assert_allclose(flat, [0.3 * i / 23 for i in range(24)], atol=1e-12)
    assert [f"{r:.4f}" for r in flat[:3]] == ["0.0000", "0.0130", "0.0261"]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    layer = swin_ops.DropPath(0.25)
    out = np.asarray(layer.apply({}, x, train=True, rngs={"drop_path": jax.random.key(0)}))
    assert (out == out[:, :1, :1]).all() and set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    # 4 standard errors of a Bernoulli mean.
    assert abs((out[:, 0, 0] == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert layer.apply({}, x, train=False) is x
