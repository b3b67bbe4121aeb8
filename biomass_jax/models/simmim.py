"""SimMIM: a Swin encoder that sees masked patches and a one-layer decoder that paints them back.

Xie et al., arXiv 2111.09886; microsoft/SimMIM models/simmim.py.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models import initialisation
from biomass_jax.models.pixel_shuffle import pixel_shuffle
from biomass_jax.models.swin import SwinFields


class SimMIM(SwinFields):
    """Masked image model; fields are the encoder's and the stride of its last map in pixels."""

    shift_single_window: bool = False
    initializer: str = "simmim"
    encoder_stride: int = 32

    def setup(self) -> None:
        """Build the encoder, the mask token and the decoder."""
        self.encoder = self.make_encoder(stage_norms=False, final_norm=True)
        self.mask_token = self.param("mask_token", initialisation.normal, (1, 1, self.embed_dim), jnp.float32)
        draws = initialisation.conv(self.embed_dim * 2 ** (len(self.depths) - 1))
        self.decoder = nn.Conv(self.encoder_stride**2 * self.in_channels, (1, 1), dtype=self.dtype, **draws)

    def encode(self, x: jax.Array, mask: jax.Array, *, train: bool = False) -> jax.Array:
        """Last feature map of a masked image: x [B, H, W, bands], mask [B, H/p, W/p] (1 = masked) -> [B, H', W', C]."""
        tokens = self.encoder.embed(x)
        if mask.shape != tokens.shape[:3]:  # it would broadcast
            raise ValueError(f"mask of shape {mask.shape}; this image has tokens {tokens.shape[:3]}")
        weight = mask[..., None].astype(tokens.dtype)
        tokens = tokens * (1 - weight) + self.mask_token.astype(tokens.dtype) * weight
        return self.encoder.encode(tokens, train=train)[-1]

    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool = False) -> jax.Array:
        """Reconstruct: x [B, H, W, bands], z-scored, mask [B, H/p, W/p] (1 = masked) -> float32 [B, H, W, bands]."""
        if x.shape[1] % self.encoder_stride or x.shape[2] % self.encoder_stride:
            raise ValueError(f"SimMIM takes sides that are multiples of {self.encoder_stride} px, found {x.shape[1:3]}")
        z = self.encode(x, mask, train=train)
        return pixel_shuffle(self.decoder(z), self.encoder_stride).astype(jnp.float32)
