"""The biomass model: Swin encoder, UPerNet decoder, PixelShuffle head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models.layers import resize_bilinear
from biomass_jax.models.pixel_shuffle import RegressionHead
from biomass_jax.models.swin import SwinTransformer
from biomass_jax.models.upernet import UPerNet


class BiomassModel(nn.Module):
    """Above-ground biomass density from six z-scored HLS bands; the defaults are granite's Swin-B.

    Fields are `SwinTransformer`'s, then the decoder's and the head's. `final_relu` false leaves negative values in.
    """

    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float = 4.0
    patch_size: int = 4
    in_channels: int = 6
    drop_path_rate: float = 0.3
    shift_single_window: bool = True
    decoder_channels: int = 32
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    upscale_layers: int = 2
    head_dropout: float = 0.16194593880230534
    final_relu: bool = True
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Build the three parts."""
        self.encoder = SwinTransformer(
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            mlp_ratio=self.mlp_ratio,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            drop_path_rate=self.drop_path_rate,
            shift_single_window=self.shift_single_window,
            dtype=self.dtype,
        )
        self.decoder = UPerNet(self.decoder_channels, self.pool_scales, self.dtype)
        self.head = RegressionHead(self.upscale_layers, self.head_dropout, self.final_relu, self.dtype)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Predict biomass.

        Args:
            x: [B, H, W, bands], z-scored bands in the bundle's order; any H and W.
            train: batch statistics, drop path (stream `drop_path`) and dropout (stream `dropout`) on.

        Returns:
            float32 [B, H, W], Mg/ha.
        """
        y = self.decoder(self.encoder(x, train=train), train=train)
        y = self.head(y, train=train)
        # Differs from the image only where H or W is no multiple of 4 (after the ReLU, corners not aligned, as there).
        return resize_bilinear(y, x.shape[1:3], align_corners=False)[..., 0]
