"""The biomass model: Swin encoder, UPerNet decoder, PixelShuffle head."""

import jax

from biomass_jax.models.layers import resize_bilinear
from biomass_jax.models.pixel_shuffle import RegressionHead
from biomass_jax.models.swin import SwinFields
from biomass_jax.models.upernet import UPerNet


class BiomassModel(SwinFields):
    """Above-ground biomass density from six z-scored HLS bands; the defaults are granite's Swin-B.

    Fields are the encoder's, then the decoder's and the head's (see `RegressionHead`). `final_relu` false leaves
    negative values in.
    """

    drop_path_rate: float = 0.3
    decoder_channels: int = 32
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    upscale_layers: int = 2
    head_dropout: float = 0.16194593880230534
    final_relu: bool = True
    output_scale: float = 1.0
    output_offset: float = 0.0

    def setup(self) -> None:
        """Build the three parts."""
        self.encoder = self.make_encoder()
        self.decoder = UPerNet(self.decoder_channels, self.pool_scales, self.dtype)
        self.head = RegressionHead(
            self.upscale_layers, self.head_dropout, self.final_relu, self.output_scale, self.output_offset, self.dtype
        )

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
