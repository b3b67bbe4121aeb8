"""Window arithmetic of Swin: partitions, relative positions, shift masks, attention, merging, stochastic depth.

Everything that depends on shapes alone is computed once in NumPy at trace time and enters the program as a constant;
what depends on sizes that aren't known then is computed when the program runs (see shapes.py).
Formulas: Liu et al., "Swin Transformer" (arXiv 2103.14030), sections 3.2 and 3.3.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from biomass_jax.models import shapes
from biomass_jax.models.shapes import Size

# Additive penalty between regions that a cyclic shift has brought together, as in the original.
SHIFT_MASK_VALUE = -100.0


def window_partition(x: jax.Array, window_size: int) -> jax.Array:
    """Cut a map into windows: x [B, H, W, C] -> [B * H/w * W/w, w * w, C], row-major over windows and tokens.

    H and W must be multiples of `window_size`.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // window_size, window_size, w // window_size, window_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window_size * window_size, c)


def window_reverse(windows: jax.Array, window_size: int, height: Size, width: Size) -> jax.Array:
    """Undo `window_partition`: windows [B * H/w * W/w, w * w, C] -> [B, H, W, C]."""
    c = windows.shape[-1]
    x = windows.reshape(-1, height // window_size, width // window_size, window_size, window_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, c)


@lru_cache(maxsize=32)
def relative_position_index(window_size: int) -> np.ndarray:
    """Row of the bias table for each pair of tokens in a window, int32 [w * w, w * w].

    Entry (i, j) is (dy + w - 1) * (2w - 1) + dx + w - 1 with (dy, dx) the position of i minus that of j.
    """
    rows, cols = np.divmod(np.arange(window_size * window_size), window_size)
    dy = rows[:, None] - rows[None, :] + window_size - 1
    dx = cols[:, None] - cols[None, :] + window_size - 1
    return (dy * (2 * window_size - 1) + dx).astype(np.int32)


@shapes.kept(64)
def shift_mask(height: Size, width: Size, window_size: int, shift: Size) -> np.ndarray | jax.Array:
    """Additive attention mask of a shifted block, float32 [H/w * W/w, w * w, w * w]: 0 within a region, -100 across.

    `height` and `width` are those of the padded map, in tokens. A `shift` that is computed may be 0, which masks
    nothing of a single window.
    """
    xp = shapes.arrays_of(height, width, shift)

    def region(size: Size) -> np.ndarray | jax.Array:
        index, length = xp.arange(size), xp.asarray(size, np.int32)
        return (index >= length - window_size).astype(np.int32) + (index >= length - shift)

    regions = region(height)[:, None] * 3 + region(width)[None, :]
    windows = regions.reshape(height // window_size, window_size, width // window_size, window_size)
    windows = windows.transpose(0, 2, 1, 3).reshape(-1, window_size * window_size)
    return xp.where(windows[:, :, None] == windows[:, None, :], 0.0, SHIFT_MASK_VALUE).astype(np.float32)


def to_windows(x: jax.Array, window_size: int, shift: Size) -> jax.Array:
    """Windows of a map that is first rolled by `shift` tokens: x [B, H, W, C] -> [B * H/w * W/w, w * w, C]."""
    if not shapes.is_zero(shift):
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
    return window_partition(x, window_size)


def from_windows(windows: jax.Array, window_size: int, shift: Size, height: Size, width: Size) -> jax.Array:
    """Undo `to_windows`: windows [B * H/w * W/w, w * w, C] -> [B, H, W, C]."""
    x = window_reverse(windows, window_size, height, width)
    return x if shapes.is_zero(shift) else jnp.roll(x, (shift, shift), axis=(1, 2))


def attend_windows(qkv: jax.Array, bias: jax.Array, mask: np.ndarray | jax.Array | None) -> jax.Array:
    """Attention by einsums, softmax in float32.

    Args:
        qkv: [B * nW, w * w, 3C]: queries, keys and values, each with its heads side by side.
        bias: float32 [heads, w * w, w * w], added to the scores.
        mask: float32 [nW, w * w, w * w], added too, or None.

    Returns:
        [B * nW, w * w, C].
    """
    n, tokens, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    heads, dim = bias.shape[0], c // bias.shape[0]
    # Batch-heads-tokens-dim: both products then are plain batched matmuls, without a transpose inside. And in three
    # from the start, so that the gradients of q, k and v are put together where they are wanted in one go.
    q, k, v = (part.reshape(n, tokens, heads, dim).transpose(0, 2, 1, 3) for part in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    if mask is None:
        scores = scores + bias
    else:
        windows = mask.shape[0]
        scores = scores.reshape(n // windows, windows, heads, tokens, tokens) + (bias + jnp.asarray(mask)[:, None])
        scores = scores.reshape(n, heads, tokens, tokens)
    weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
    x = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
    return x.transpose(0, 2, 1, 3).reshape(n, tokens, c)


def attend_map(qkv: jax.Array, bias: jax.Array, window_size: int, shift: int) -> jax.Array:
    """`attend_windows` of all windows of a map.

    Args:
        qkv: [B, H, W, 3C], H and W multiples of the window.
        bias: float32 [heads, w * w, w * w].
        window_size: side of a window, tokens.
        shift: by which the map is rolled before it is cut into windows.

    Returns:
        [B, H, W, C].
    """
    height, width = qkv.shape[1:3]
    mask = shift_mask(height, width, window_size, shift) if shift else None
    windows = attend_windows(to_windows(qkv, window_size, shift), bias, mask)
    return from_windows(windows, window_size, shift, height, width)


def merge_patches(x: jax.Array) -> jax.Array:
    """Put each 2 x 2 square of tokens on the channel axis: x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 4C].

    Channels are four blocks of C taken at (row, column) offsets (0,0), (1,0), (0,1), (1,1), the original Swin's order.
    Odd sides are zero-padded at the bottom and right.
    """
    b, h, w, c = x.shape
    if h % 2 or w % 2:
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        h, w = h + h % 2, w + w % 2
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)


def patch_product(x: jax.Array, kernel: jax.Array, strides: object, padding: object, **options: Any) -> jax.Array:
    """A convolution whose stride is its kernel as one matrix product: x [B, H, W, C], kernel [p, p, C, E] -> [..., E].

    Takes `jax.lax.conv_general_dilated`'s arguments for a Flax module, H and W being multiples of p. On CPU it rounds
    a third as much as XLA's convolution, and the LayerNorm behind it magnifies rounding in dark, even patches.
    """
    del strides, padding
    b, h, w, c = x.shape
    p = kernel.shape[0]
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)
    return jnp.dot(x, kernel.reshape(p * p * c, -1), precision=options["precision"])


def drop_path_rates(drop_path_rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Drop probabilities a stage and block: linear from 0 at the first block to `drop_path_rate` at the last."""
    rates = np.linspace(0.0, drop_path_rate, sum(depths))
    return [[float(r) for r in part] for part in np.split(rates, np.cumsum(depths)[:-1])]


class DropPath(nn.Module):
    """Stochastic depth: drops a whole sample's branch with probability `rate`, scales the kept ones by 1 / (1 - rate).

    Huang et al., arXiv 1603.09382. Draws from the `drop_path` stream.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, ...] -> same shape; the identity when `train` is false or the rate is 0."""
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(kept, x / keep, jnp.zeros_like(x))
