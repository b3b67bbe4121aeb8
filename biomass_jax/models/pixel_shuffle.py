"""Learned upscaling by PixelShuffle, and the regression head made of it.

Shi et al., arXiv 1609.05158, in torch's channel order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models import initialisation
from biomass_jax.models.layers import BatchNorm
from biomass_jax.runtime import cpu


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Move channels to space: x [B, H, W, C * r * r] -> [B, H * r, W * r, C].

    out[b, h r + i, w r + j, c] = x[b, h, w, c r r + i r + j], torch's `PixelShuffle`.
    """
    b, h, w, channels = x.shape
    if channels % factor**2:
        raise ValueError(f"pixel_shuffle by {factor} takes a multiple of {factor**2} channels, found {channels}")
    c = channels // factor**2
    x = x.reshape(b, h, w, c, factor, factor).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * factor, w * factor, c)


class Upscale(nn.Module):
    """Double a map: 3 x 3 convolution to four times the channels, PixelShuffle(2), batch normalisation, ReLU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> [B, 2H, 2W, features]."""
        draws = initialisation.conv(x.shape[-1] * 9)
        convolution = nn.Conv(
            self.features * 4, (3, 3), dtype=self.dtype, conv_general_dilated=cpu.convolution, name="conv", **draws
        )
        x = convolution(x)
        return nn.relu(BatchNorm(self.dtype, name="norm")(pixel_shuffle(x, 2), train=train))


class RegressionHead(nn.Module):
    """Upscaling steps, channel dropout and a 1 x 1 convolution to one value a pixel.

    The value is `output_scale` times the convolution's plus `output_offset`; granite has 1 and 0. With a scale like the
    labels' spread and an offset like their mean, a model that starts from random weights need not first learn those.
    """

    upscale_layers: int = 2
    dropout: float = 0.0
    final_relu: bool = True
    output_scale: float = 1.0
    output_offset: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> float32 [B, H * 2**n, W * 2**n, 1]; dropout draws from the `dropout` stream."""
        for i in range(self.upscale_layers):
            x = Upscale(x.shape[-1], self.dtype, name=f"upscale_{i}")(x, train=train)
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(x, deterministic=not train)
        # The last product is float32: a bfloat16 output would round 300 Mg/ha to steps of 2.
        x = nn.Conv(1, (1, 1), dtype=jnp.float32, name="final", **initialisation.conv(x.shape[-1]))(x)
        if (self.output_scale, self.output_offset) != (1.0, 0.0):
            x = x * self.output_scale + self.output_offset
        return nn.relu(x) if self.final_relu else x
