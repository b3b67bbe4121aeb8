"""Self-supervised pretraining (SimMIM) as a task of the loop; labels are ignored."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax import figures
from biomass_jax.data import bands
from biomass_jax.pipeline import augment as transforms
from biomass_jax.pipeline import masking
from biomass_jax.tasks.base import Arrays, InputStatistics, first_chips, model_keys

# The original adds it to the number of masked pixels, lest none be masked.
_EPSILON = 1e-5
# MAE's and Swin's, added to a patch's variance.
_VARIANCE_EPSILON = 1e-6


def simmim_loss_sums(
    image_zscored: jax.Array,
    reconstruction: jax.Array,
    mask_patch_grid: jax.Array,
    *,
    patch_size: int,
    nodata: jax.Array | None = None,
    normalize_patch: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of |target - reconstruction| over masked pixels and bands, and how many values those are.

    Args:
        image_zscored: [B, H, W, bands].
        reconstruction: [B, H, W, bands], of the targets: z-scores, or normalised ones with `normalize_patch`.
        mask_patch_grid: [B, H/p, W/p], 1 where a token is masked; cells of any size are spelt out in tokens.
        patch_size: side of a token in pixels, p.
        nodata: bool [B, H, W], pixels to leave out, whose values (NaN, too) then have no influence on the sum and its
            gradient; None counts every masked pixel, as the original does.
        normalize_patch: side in pixels of the patches whose own statistics normalise the targets, see
            `patch_statistics`; None for z-scored targets.

    Returns:
        (total, count), float32 scalars. count = masked pixels x bands.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    total, count = simmim_chip_sums(
        image_zscored,
        reconstruction,
        mask_patch_grid,
        patch_size=patch_size,
        nodata=nodata,
        normalize_patch=normalize_patch,
    )
    return total.sum(), count.sum()


def simmim_chip_sums(
    image_zscored: jax.Array,
    reconstruction: jax.Array,
    mask_patch_grid: jax.Array,
    *,
    patch_size: int,
    nodata: jax.Array | None = None,
    normalize_patch: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sums of `simmim_loss_sums` for each chip and band: (total, count), float32 [B, bands] each."""
    _check_shapes(image_zscored, reconstruction, mask_patch_grid, patch_size, nodata)
    counted = mask_patch_grid.repeat(patch_size, axis=1).repeat(patch_size, axis=2) > 0
    target = image_zscored.astype(jnp.float32)
    if nodata is not None:
        counted &= ~nodata
    if normalize_patch is not None:
        mean, std = patch_statistics(target, normalize_patch, nodata)
        target = (target - mean) / std
    counted = counted[..., None]
    # Replaced inside: 0 times the gradient of a NaN would be NaN.
    error = jnp.abs(jnp.where(counted, target - reconstruction.astype(jnp.float32), 0))
    count = counted.sum((1, 2), dtype=jnp.float32)
    return error.sum((1, 2)), jnp.broadcast_to(count, (target.shape[0], target.shape[-1]))


def simmim_finish(total: jax.Array, count: jax.Array, *, bands: int) -> jax.Array:
    """The loss of added-up sums: total / (count + 1e-5 bands), 0 with zero gradients where nothing was masked.

    `bands` is how many of them are in the sums; 1 gives each band's masked L1 of that band's sums.
    """
    return total / (count + _EPSILON * bands)


def patch_statistics(image: jax.Array, patch: int, nodata: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Mean and spread of each patch and band over its pixels with data, spread over the image again.

    Normalised targets follow MAE (He et al., arXiv 2111.06377, `norm_pix_loss` of facebookresearch/mae): fixed patches,
    (x - mean) / sqrt(var + 1e-6) with the unbiased variance. Each band has statistics of its own, as in the
    `norm_targets` of microsoft/Swin-Transformer models/simmim.py: MAE's, joint over bands, would leave infrared the
    bright band of every patch of forest and so be predicted by a constant.

    Args:
        image: [B, H, W, bands].
        patch: side in pixels, which divides H and W; the mask patch is the natural choice.
        nodata: bool [B, H, W], pixels that do not count.

    Returns:
        (mean, std), float32 [B, H, W, bands]; reconstruction * std + mean is in the image's units. std is
        sqrt(var + 1e-6); 0 and 1e-3 in a patch without data.

    Raises:
        ValueError: a side that is no multiple of `patch`.
    """
    b, h, w, bands = image.shape
    if patch < 1 or h % patch or w % patch:
        raise ValueError(f"targets of {h} x {w} px cannot be normalised in patches of {patch} px: no multiples of it")
    blocks = image.astype(jnp.float32).reshape(b, h // patch, patch, w // patch, patch, bands)
    valid = jnp.ones((b, h, w), bool) if nodata is None else ~nodata
    valid = valid.reshape(b, h // patch, patch, w // patch, patch, 1)
    count = valid.sum((2, 4), keepdims=True, dtype=jnp.float32)
    mean = jnp.where(valid, blocks, 0).sum((2, 4), keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.square(jnp.where(valid, blocks - mean, 0)).sum((2, 4), keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(count - 1, 1) + _VARIANCE_EPSILON)
    spread = [jnp.broadcast_to(x, blocks.shape).reshape(image.shape) for x in (mean, std)]
    return spread[0], spread[1]


def _check_shapes(
    image: jax.Array, reconstruction: jax.Array, mask: jax.Array, patch_size: int, nodata: jax.Array | None
) -> None:
    """Broadcasting would make plausible numbers of shapes that do not belong together."""
    if image.ndim != 4 or reconstruction.shape != image.shape:
        raise ValueError(
            f"image {image.shape} and reconstruction {reconstruction.shape}: expected one [B, H, W, bands]"
        )
    b, h, w, _ = image.shape
    if (mask.shape[0], mask.shape[1] * patch_size, mask.shape[2] * patch_size) != (b, h, w):
        raise ValueError(f"mask {mask.shape} of {patch_size} px tokens does not cover images {image.shape}")
    if nodata is not None and nodata.shape != (b, h, w):
        raise ValueError(f"nodata {nodata.shape} does not belong to images {image.shape}: expected {(b, h, w)}")


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Painting masked patches back.

    Attributes:
        module: `SimMIM`.
        statistics: of the inputs.
        size: side of the training images in pixels.
        crop_scale: smallest and largest share of a chip's area that is cropped and resized; None = no cropping.
        crop_ratio: smallest and largest width / height of it.
        mask_patch_size: side of a masked cell in pixels.
        mask_ratio: share of cells that are masked.
        skip_nodata: leave pixels without data out of the loss; the official loss counts all.
        normalize_targets: z-score each mask patch by itself in the loss.
        seed: of the masks of validation, which are the same every time.
    """

    module: Any
    statistics: InputStatistics
    size: int
    crop_scale: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    mask_patch_size: int
    mask_ratio: float
    skip_nodata: bool
    normalize_targets: bool
    seed: int

    def init(self, key: jax.Array) -> Arrays:
        """See `Task`."""
        side = self.module.encoder_stride
        image = jnp.zeros((1, side, side, self.module.in_channels))
        mask = jnp.zeros((1, *(side // self.module.patch_size,) * 2))
        return {"params": self.module.init(key, image, mask)["params"], "batch_stats": {}}

    def inputs(self, batch: Arrays, key: jax.Array) -> Arrays:
        """{"image": z-scored [B, size, size, 6], "nodata": bool [B, size, size], "mask": [B, size / 4, size / 4]}."""
        crop_key, mask_key = jax.random.split(key)
        image, _, nodata = transforms.clean(batch["image"], batch["label"], fill=self.statistics.fill)
        if self.crop_scale is not None:
            image, nodata = transforms.random_resized_crop(
                crop_key, image, scale=self.crop_scale, ratio=self.crop_ratio, size=self.size
            )
        return self._masked(image, nodata, mask_key)

    def loss_sums(self, variables: Arrays, inputs: Arrays, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """See `Task`; sums over masked pixels and bands."""
        painted = self.module.apply(variables, inputs["image"], inputs["mask"], train=True, rngs=model_keys(key))
        total, count = simmim_loss_sums(
            inputs["image"], painted, inputs["mask"], **self._loss_options(inputs["nodata"])
        )
        return total, count, variables["batch_stats"]

    def finish(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """See `Task`."""
        return simmim_finish(total, count, bands=self.module.in_channels)

    def evaluate(self, variables: Arrays, batch: Arrays, number: jax.Array) -> tuple[Arrays, Arrays]:
        """{"total", "count"}: float32 [B, 6], sums over each chip's masked pixels by band."""
        inputs, painted = self.reconstruct(variables, batch, number)
        total, count = simmim_chip_sums(
            inputs["image"], painted, inputs["mask"], **self._loss_options(inputs["nodata"])
        )
        if self.normalize_targets:  # back to z-scores, for the picture
            mean, std = patch_statistics(inputs["image"], self.mask_patch_size, inputs["nodata"])
            painted = painted * std + mean
        return {"total": total, "count": count}, first_chips(inputs | {"painted": painted})

    def figure(self, shown: dict[str, np.ndarray], titles: Sequence[str]) -> Any:
        """Input, masked input and reconstruction of some chips, as RGB and SWIR composites."""
        panels = [
            figures.ReconstructionPanel(
                shown["image"][i], shown["painted"][i], shown["mask"][i], shown["nodata"][i], title
            )
            for i, title in enumerate(titles)
        ]
        return figures.reconstructions(panels, bands=bands.BAND_NAMES, title="Validation chips")

    def reconstruct(self, variables: Arrays, batch: Arrays, number: jax.Array) -> tuple[Arrays, jax.Array]:
        """Whole chips with the masks of validation, and what the model paints: float32 [B, H, W, 6], z-scores."""
        image, _, nodata = transforms.clean(batch["image"], batch["label"], fill=self.statistics.fill)
        inputs = self._masked(image, nodata, jax.random.fold_in(jax.random.key(self.seed), number))
        return inputs, self.module.apply(variables, inputs["image"], inputs["mask"])

    def scorer(self) -> "PretrainingScorer":
        """See `Task`."""
        return PretrainingScorer()

    def _masked(self, image: jax.Array, nodata: jax.Array, key: jax.Array) -> Arrays:
        b, h, w, _ = image.shape
        mask = masking.block_mask(
            key, b, h, w, mask_patch_size=self.mask_patch_size, patch_size=self.module.patch_size, ratio=self.mask_ratio
        )
        image = transforms.normalize(image, self.statistics.means, self.statistics.stds)
        return {"image": image, "nodata": nodata, "mask": mask}

    def _loss_options(self, nodata: jax.Array) -> dict[str, Any]:
        return {
            "patch_size": self.module.patch_size,
            "nodata": nodata if self.skip_nodata else None,
            "normalize_patch": self.mask_patch_size if self.normalize_targets else None,
        }


class PretrainingScorer:
    """Masked L1 in z-scores, over all chips and by band."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, len(bands.BAND_NAMES)))

    def add(self, outputs: dict[str, np.ndarray], valid: np.ndarray) -> None:
        """See `Scorer`."""
        self._sums += [outputs[name][valid].astype(np.float64).sum(axis=0) for name in ("total", "count")]

    def vector(self) -> np.ndarray:
        """See `Scorer`: totals by band, then counts."""
        return self._sums.ravel()

    def results(self, vectors: list[np.ndarray]) -> dict[str, Any]:
        """`val/loss` and `val/l1_BAND` for each band."""
        total, count = np.sum(vectors, axis=0).reshape(2, -1)
        by_band = total / np.maximum(count, 1)
        loss = float(total.sum() / max(count.sum(), 1))
        names = (f"val/l1_{name.lower()}" for name in bands.BAND_NAMES)
        return {"val/loss": loss} | {name: float(value) for name, value in zip(names, by_band, strict=True)}
