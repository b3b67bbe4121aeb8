"""Self-supervised pretraining (SimMIM) as a task of the loop: masks, losses, scores; labels are ignored."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax import figures
from biomass_jax.data import bands
from biomass_jax.models.initialisation import draw_variables
from biomass_jax.pipeline import augment as transforms
from biomass_jax.tasks.base import Arrays, InputStatistics, first_chips, model_keys
from biomass_jax.tasks.losses import patch_statistics, simmim_chip_sums, simmim_finish


def block_mask(
    key: jax.Array,
    batch: int,
    height: int,
    width: int,
    *,
    mask_patch_size: int = 32,
    patch_size: int = 4,
    ratio: float = 0.6,
) -> jax.Array:
    """Mask ceil(ratio * cells) of each chip's cells, every set of that many equally likely.

    A chip's draw depends on the key and its row in the batch alone: it is the same for any batch size and on any
    number of devices.

    Args:
        key: the step's key.
        batch: number of chips, B.
        height: of the chips in pixels, a multiple of `mask_patch_size`.
        width: likewise.
        mask_patch_size: side of a cell in pixels, a multiple of `patch_size`.
        patch_size: side in pixels of the model's tokens, p.
        ratio: share of the cells to mask, 0..1.

    Returns:
        float32 [B, H/p, W/p], 1 where a token is masked.

    Raises:
        ValueError: sizes that don't divide each other.
    """
    if mask_patch_size < 1 or patch_size < 1 or mask_patch_size % patch_size:
        raise ValueError(f"mask patch {mask_patch_size} px: expected a multiple of the model's patch, {patch_size} px")
    if height < 1 or width < 1 or height % mask_patch_size or width % mask_patch_size:
        raise ValueError(
            f"chips of {height} x {width} px cannot be masked in cells of {mask_patch_size} px: expected both sides to "
            "be multiples of it; choose another mask patch or crop size"
        )
    rows, columns = height // mask_patch_size, width // mask_patch_size
    cells, repeat = rows * columns, mask_patch_size // patch_size
    masked = math.ceil(ratio * cells)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))
    # A cell is masked if its place in a random order of all cells is among the first ones: their number is exact.
    places = jax.vmap(lambda k: jax.random.permutation(k, cells))(keys)
    mask = (places < masked).astype(jnp.float32).reshape(batch, rows, columns)
    return mask.repeat(repeat, axis=1).repeat(repeat, axis=2)


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
        image = jax.ShapeDtypeStruct((1, side, side, self.module.in_channels), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, *(side // self.module.patch_size,) * 2), jnp.float32)
        return {"params": draw_variables(self.module, key, image, mask)["params"], "batch_stats": {}}

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
        total, count = self._chip_sums(inputs, painted)
        return total.sum(), count.sum(), variables["batch_stats"]

    def finish(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """See `Task`."""
        return simmim_finish(total, count, bands=self.module.in_channels)

    def evaluate(self, variables: Arrays, batch: Arrays, number: jax.Array) -> tuple[Arrays, Arrays]:
        """{"total", "count"}: float32 [B, 6], sums over each whole chip's masked pixels by band."""
        image, _, nodata = transforms.clean(batch["image"], batch["label"], fill=self.statistics.fill)
        inputs = self._masked(image, nodata, jax.random.fold_in(jax.random.key(self.seed), number))
        painted = self.module.apply(variables, inputs["image"], inputs["mask"])
        total, count = self._chip_sums(inputs, painted)
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

    def scorer(self) -> "PretrainingScorer":
        """See `Task`."""
        return PretrainingScorer()

    def _masked(self, image: jax.Array, nodata: jax.Array, key: jax.Array) -> Arrays:
        b, h, w, _ = image.shape
        mask = block_mask(
            key, b, h, w, mask_patch_size=self.mask_patch_size, patch_size=self.module.patch_size, ratio=self.mask_ratio
        )
        image = transforms.normalize(image, self.statistics.means, self.statistics.stds)
        return {"image": image, "nodata": nodata, "mask": mask}

    def _chip_sums(self, inputs: Arrays, painted: jax.Array) -> tuple[jax.Array, jax.Array]:
        return simmim_chip_sums(
            inputs["image"],
            painted,
            inputs["mask"],
            patch_size=self.module.patch_size,
            nodata=inputs["nodata"] if self.skip_nodata else None,
            normalize_patch=self.mask_patch_size if self.normalize_targets else None,
        )


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
