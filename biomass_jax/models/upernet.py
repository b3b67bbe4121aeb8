"""UPerNet decoder: pyramid pooling on the coarsest map, a feature pyramid over the others, one map at the finest.

Xiao et al., arXiv 1807.10221, as mmsegmentation and terratorch compute it (aligned corners throughout).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models.layers import ConvNormRelu, adaptive_avg_pool, resize_bilinear


class UPerNet(nn.Module):
    """Decoder of `channels` channels over any number of feature maps, finest first."""

    channels: int = 32
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: list[jax.Array], *, train: bool) -> jax.Array:
        """features [[B, H, W, C0], [B, H/2, W/2, C1], ...] -> [B, H, W, channels]."""
        *finer, coarsest = features
        laterals = [
            ConvNormRelu(self.channels, 1, self.dtype, name=f"lateral_convs_{i}")(x, train=train)
            for i, x in enumerate(finer)
        ]
        laterals.append(self._pyramid_pooling(coarsest, train))
        for i in range(len(laterals) - 1, 0, -1):
            coarser = resize_bilinear(laterals[i], laterals[i - 1].shape[1:3], align_corners=True)
            laterals[i - 1] = laterals[i - 1] + coarser
        outputs = [
            ConvNormRelu(self.channels, 3, self.dtype, name=f"fpn_convs_{i}")(x, train=train)
            for i, x in enumerate(laterals[:-1])
        ]
        outputs.append(laterals[-1])
        size = outputs[0].shape[1:3]
        outputs = [resize_bilinear(x, size, align_corners=True) for x in outputs]
        return ConvNormRelu(self.channels, 3, self.dtype, name="fpn_bottleneck")(
            jnp.concatenate(outputs, axis=-1), train=train
        )

    def _pyramid_pooling(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, channels]: the map beside its means over coarser and coarser grids."""
        pooled = [x]
        for k, scale in enumerate(self.pool_scales):
            y = adaptive_avg_pool(x, scale)
            y = ConvNormRelu(self.channels, 1, self.dtype, name=f"psp_modules_{k}")(y, train=train)
            pooled.append(resize_bilinear(y, x.shape[1:3], align_corners=True))
        x = jnp.concatenate(pooled, axis=-1)
        return ConvNormRelu(self.channels, 3, self.dtype, name="bottleneck")(x, train=train)
