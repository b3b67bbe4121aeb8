"""Layers that several parts share: torch-like norms and GELU, resizing and pooling as matrix products.

Resizing and adaptive pooling are linear and separable, so each is two small matrices, from torch's own index formulas
(aten/src/ATen/native/UpSample.h, AdaptiveAveragePooling.cpp). They are built in NumPy at trace time, or when the
program runs where sizes aren't known before (see shapes.py). The products are float32 whatever the model's dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from biomass_jax.models import initialisation, shapes
from biomass_jax.models.shapes import Size
from biomass_jax.runtime import cpu

# `flax.linen.Dense`, x [..., K] -> [..., features], whose weights' gradients are faster on CPU.
Dense = partial(nn.Dense, dot_general=cpu.dense)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x / 2 (1 + erf(x / sqrt 2)), spelt as torch does.

    `jax.nn.gelu` goes through erfc, which is slower and doubles the error of the gradients.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype)))


def inverse_std(variance: jax.Array, epsilon: float) -> jax.Array:
    """1 / sqrt(variance + epsilon); XLA's `rsqrt` on CPU is a few ulp off, which costs gradients a factor of four."""
    return 1 / jnp.sqrt(variance + epsilon)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """What `LayerNorm` computes, float32: x [..., C], scale and bias [C] -> [..., C]."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * inverse_std(jnp.square(y).mean(-1, keepdims=True), epsilon)
    return y * scale + bias


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis as torch has it: eps 1e-5, two-pass variance, statistics in float32.

    `flax.linen.LayerNorm` computes the same with `rsqrt` (see `inverse_std`).
    """

    dtype: Any = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> same shape in `dtype`."""
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (c,), jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over (B, H, W) with torch's running statistics.

    eps 1e-5; running = 0.9 running + 0.1 batch, where the running variance takes the *unbiased* batch variance and the
    normalisation the biased one (`flax.linen.BatchNorm` keeps the biased one in both). Statistics are float32; with a
    batch that is split over devices they are those of the global batch.
    """

    dtype: Any = jnp.float32
    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> same; updates `batch_stats` when `train`."""
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (c,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)
        y = x.astype(jnp.float32)
        if train:
            mean = y.mean((0, 1, 2))
            var = jnp.square(y - mean).mean((0, 1, 2))
            if not self.is_initializing():
                count = y.size // c
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        y = (y - mean) * (scale * inverse_std(var, self.epsilon)) + bias
        return y.astype(self.dtype)


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch normalisation, ReLU (mmsegmentation's ConvModule)."""

    features: int
    kernel_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, features]."""
        k = self.kernel_size
        draws = initialisation.conv(x.shape[-1] * k * k)
        x = nn.Conv(self.features, (k, k), padding="SAME", use_bias=False, dtype=self.dtype, name="conv", **draws)(x)
        return nn.relu(BatchNorm(self.dtype, name="norm")(x, train=train))


@shapes.kept(64)
def bilinear_matrix(size_in: Size, size_out: Size, align_corners: bool) -> np.ndarray | jax.Array:
    """Weights of torch's 1-D linear interpolation, float32 [size_out, size_in]; each row sums to 1.

    Source coordinates are computed in float32 as torch does: aligned corners, (in - 1) / (out - 1) * i; otherwise,
    max(in / out * (i + 0.5) - 0.5, 0).
    """
    xp = shapes.arrays_of(size_in, size_out)
    index, length = xp.arange(size_out, dtype=np.float32), xp.asarray(size_in, np.float32)
    if align_corners:
        scale = (length - 1) / xp.maximum(xp.asarray(size_out, np.float32) - 1, 1)
        source = scale * index
    else:
        scale = length / xp.asarray(size_out, np.float32)
        source = xp.maximum(scale * (index + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    last = xp.asarray(size_in, np.int32) - 1
    low = xp.minimum(source.astype(np.int32), last)
    high = xp.minimum(low + 1, last)
    fraction = source - low.astype(np.float32)
    column, zero = xp.arange(size_in), np.float32(0)
    below = xp.where(column == low[:, None], np.float32(1) - fraction[:, None], zero)
    return below + xp.where(column == high[:, None], fraction[:, None], zero)


@shapes.kept(64)
def adaptive_pool_matrix(size_in: Size, size_out: int) -> np.ndarray | jax.Array:
    """Weights of torch's 1-D adaptive average pooling, float32 [size_out, size_in].

    Bin i covers [floor(i in / out), ceil((i + 1) in / out)); bins may overlap, and repeat where out > in.
    """
    xp = shapes.arrays_of(size_in)
    index, length = xp.arange(size_out)[:, None], xp.asarray(size_in, np.int32)
    start, stop = index * length // size_out, -(-(index + 1) * length // size_out)
    column = xp.arange(size_in)
    share = np.float32(1) / (stop - start).astype(np.float32)
    return xp.where((column >= start) & (column < stop), share, np.float32(0))


def _apply_separable(x: jax.Array, rows: np.ndarray | jax.Array, cols: np.ndarray | jax.Array) -> jax.Array:
    """x [B, H, W, C], rows [H', H], cols [W', W] -> [B, H', W', C] in x's dtype, computed in float32."""
    y = jnp.einsum("ih,bhwc->biwc", rows, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    y = jnp.einsum("jw,biwc->bijc", cols, y, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def resize_bilinear(x: jax.Array, size: tuple[int, ...], *, align_corners: bool) -> jax.Array:
    """Resize to `size` (H', W') as torch's bilinear `interpolate`: x [B, H, W, C] -> [B, H', W', C]."""
    if x.shape[1:3] == tuple(size):
        return x
    rows = bilinear_matrix(x.shape[1], size[0], align_corners)
    return _apply_separable(x, rows, bilinear_matrix(x.shape[2], size[1], align_corners))


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Pool to a size x size grid as torch's `AdaptiveAvgPool2d`: x [B, H, W, C] -> [B, size, size, C]."""
    return _apply_separable(x, adaptive_pool_matrix(x.shape[1], size), adaptive_pool_matrix(x.shape[2], size))
