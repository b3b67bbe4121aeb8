"""Learned upscaling by PixelShuffle, and the regression head made of it.

Shi et al., arXiv 1609.05158, in torch's channel order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models import initialisation
from biomass_jax.models.layers import BatchNorm
from biomass_jax.runtime import cpu

_LOG_SPREAD_LIMIT = 5.0


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
    """Upscaling steps, then channel dropout and 1 x 1 convolutions: one value a pixel, and its spread where asked for.

    The value is `output_scale` times the convolution's plus `output_offset`; granite has 1 and 0. With a scale like the
    labels' spread and an offset like their mean, a model that starts from random weights need not first learn those.

    The spread is a second convolution's on the same features, float32, which leaves the value as it is: see
    `BiomassModel`. Its logarithm of a scale is ln `spread_scale` + 5 tanh(raw / 5), so that no pixel's scale leaves
    `spread_scale` by more than a factor of e^5 = 148, however wild its features. Its first quantile follows the value's
    convention without the ReLU; the others are above the one before by softplus(raw) `spread_scale`.
    """

    channels: int
    upscale_layers: int = 2
    dropout: float = 0.0
    final_relu: bool = True
    output_scale: float = 1.0
    output_offset: float = 0.0
    dtype: Any = jnp.float32
    spread_channels: int = 0
    log_spread: bool = True
    spread_scale: float = 1.0

    def setup(self) -> None:
        """Build the layers."""
        self.upscale = [Upscale(self.channels, self.dtype) for _ in range(self.upscale_layers)]
        # Its name is part of what it draws from: the same as ever, so that a run draws what it always has.
        self.channel_dropout = nn.Dropout(self.dropout, broadcast_dims=(1, 2), name="Dropout_0")
        # The last products are float32: a bfloat16 output would round 300 Mg/ha to steps of 2.
        self.final = nn.Conv(1, (1, 1), dtype=jnp.float32, **initialisation.conv(self.channels))
        if self.spread_channels:
            draws = initialisation.conv(self.channels)
            self.spread = nn.Conv(self.spread_channels, (1, 1), dtype=jnp.float32, **draws)

    def __call__(self, x: jax.Array, *, train: bool) -> Any:
        """x [B, H, W, channels] -> the value, float32 [B, H * 2**n, W * 2**n, 1]; with a spread both of `estimate`."""
        value, spread = self.estimate(self.features(x, train=train), train=train)
        return value if spread is None else (value, spread)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The upscaling steps: x [B, H, W, channels] -> [B, H * 2**n, W * 2**n, channels]."""
        for layer in self.upscale:
            x = layer(x, train=train)
        return x

    def estimate(self, features: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """Value and spread of `features`; dropout draws from the `dropout` stream.

        Args:
            features: [B, H, W, channels].
            train: dropout on; both see the same channels.

        Returns:
            the value, float32 [B, H, W, 1], and the spread, float32 [B, H, W, spread_channels]: logarithms of a scale,
            or the first quantile and what each further one is above the one before; None where there is no spread.
        """
        x = self.channel_dropout(features, deterministic=not train)
        value = self._scaled(self.final(x))
        value = nn.relu(value) if self.final_relu else value
        if not self.spread_channels:
            return value, None
        raw = self.spread(x)
        if self.log_spread:
            return value, math.log(self.spread_scale) + _LOG_SPREAD_LIMIT * jnp.tanh(raw / _LOG_SPREAD_LIMIT)
        above = self.spread_scale * nn.softplus(raw[..., 1:])
        return value, jnp.concatenate([self._scaled(raw[..., :1]), above], axis=-1)

    def _scaled(self, x: jax.Array) -> jax.Array:
        if (self.output_scale, self.output_offset) == (1.0, 0.0):
            return x
        return x * self.output_scale + self.output_offset
