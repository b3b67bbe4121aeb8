"""The biomass model: Swin encoder, UPerNet decoder, PixelShuffle head."""

import itertools

import jax
import jax.numpy as jnp

from biomass_jax.models.layers import resize_bilinear
from biomass_jax.models.pixel_shuffle import RegressionHead
from biomass_jax.models.swin import SwinFields
from biomass_jax.models.upernet import UPerNet

SPREADS = ("none", "gaussian", "laplace", "quantiles")


class BiomassModel(SwinFields):
    """Above-ground biomass density from six z-scored HLS bands; the defaults are granite's Swin-B.

    Fields are the encoder's, then the decoder's and the head's (see `RegressionHead`). `final_relu` false leaves
    negative values in. `spread` says what else a pixel is given beside its mean (see `outputs`), from a convolution of
    its own on the same features, so that the mean is that of the same weights without a spread: `gaussian` ln sigma
    and `laplace` ln b of a distribution around the mean, `quantiles` those of `quantile_levels`. `spread_scale`, in the
    label's unit, is about where a fresh spread starts.
    """

    drop_path_rate: float = 0.3
    decoder_channels: int = 32
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    upscale_layers: int = 2
    head_dropout: float = 0.16194593880230534
    final_relu: bool = True
    output_scale: float = 1.0
    output_offset: float = 0.0
    spread: str = "none"
    spread_scale: float = 30.0
    quantile_levels: tuple[float, ...] = (0.05, 0.95)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a pixel is given, the order of the last axis.

        `mean` alone, with `log_scale` (ln of sigma or b), or with `q0.05`, `q0.95` and the like (none below the one
        before); all in the label's unit.
        """
        if self.spread == "none":
            return ("mean",)
        if self.spread == "quantiles":
            return ("mean", *(f"q{level:g}" for level in self.quantile_levels))
        return ("mean", "log_scale")

    def setup(self) -> None:
        """Check the spread's fields and build the three parts."""
        self._check_spread()
        self.encoder = self.make_encoder()
        self.decoder = UPerNet(self.decoder_channels, self.pool_scales, self.dtype)
        self.head = RegressionHead(
            channels=self.decoder_channels,
            upscale_layers=self.upscale_layers,
            dropout=self.head_dropout,
            final_relu=self.final_relu,
            output_scale=self.output_scale,
            output_offset=self.output_offset,
            dtype=self.dtype,
            spread_channels=len(self.outputs) - 1,
            log_spread=self.spread != "quantiles",
            spread_scale=self.spread_scale,
        )

    def _check_spread(self) -> None:
        if self.spread not in SPREADS:
            raise ValueError(f"spread is {self.spread!r}; expected one of {', '.join(SPREADS)}")
        if not 0 < self.spread_scale < float("inf"):
            raise ValueError(f"spread_scale is {self.spread_scale}; expected a number above 0")
        bounds = (0.0, *self.quantile_levels, 1.0)
        if len(bounds) < 4 or any(not low < high for low, high in itertools.pairwise(bounds)):
            raise ValueError(
                f"quantile_levels are {self.quantile_levels}; expected two or more that increase between 0 and 1"
            )

    def encode(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """The encoder's maps: x [B, H, W, bands], z-scored -> [[B, H/4, W/4, E], [B, H/8, W/8, 2E], ...]."""
        return self.encoder(x, train=train)

    def decode(self, maps: list[jax.Array], *, train: bool = False) -> jax.Array:
        """The head's features, before its dropout: maps of `encode` -> [B, h, w, decoder_channels].

        h and w are those of the finest map, doubled by each upscaling step: H and W where 4 divides them.
        """
        return self.head.features(self.decoder(maps, train=train), train=train)

    def estimate(self, features: jax.Array, size: tuple[int, ...], *, train: bool = False) -> jax.Array:
        """What `__call__` gives, from features.

        Args:
            features: [B, h, w, decoder_channels], of `decode`.
            size: (H, W) of the image.
            train: dropout (stream `dropout`) on, which is how its samples are drawn.

        Returns:
            see `__call__`.
        """
        return self._of_pixels(*self.head.estimate(features, train=train), size)

    def _of_pixels(self, value: jax.Array, spread: jax.Array | None, size: tuple[int, ...]) -> jax.Array:
        # Differs from the image only where H or W is no multiple of 4 (after the ReLU, corners not aligned, as there).
        # Each by itself: a product over more channels could round the mean otherwise.
        mean = resize_bilinear(value, size, align_corners=False)[..., 0]
        if spread is None:
            return mean
        spread = resize_bilinear(spread, size, align_corners=False)
        if self.spread == "quantiles":
            # Added up after resizing, whose weights are never negative: rounding can't make them cross.
            parts = [spread[..., i] for i in range(spread.shape[-1])]
            spread = jnp.stack(list(itertools.accumulate(parts)), axis=-1)
        return jnp.concatenate([mean[..., None], spread], axis=-1)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Predict biomass.

        Args:
            x: [B, H, W, bands], z-scored bands in the bundle's order; any H and W.
            train: batch statistics, drop path (stream `drop_path`) and dropout (stream `dropout`) on.

        Returns:
            float32 [B, H, W], in the label's unit; with a spread [B, H, W, C], whose last axis `outputs` names.
        """
        found = self.head(self.decoder(self.encode(x, train=train), train=train), train=train)
        value, spread = found if isinstance(found, tuple) else (found, None)
        return self._of_pixels(value, spread, x.shape[1:3])
