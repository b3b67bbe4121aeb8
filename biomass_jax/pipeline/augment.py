"""Chips on the device, inside the jitted step: no-data, z-scores, flips and turns, rotation, crops.

Every function takes a whole (global) batch. What is random about a chip depends on the key and the chip's row in the
global batch alone, never on how the batch is split over devices.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from biomass_jax.data import bands, records
from biomass_jax.pipeline.crop import random_resized_crop
from biomass_jax.pipeline.rotate import rotate

__all__ = ["augment", "clean", "normalize", "random_resized_crop", "rotate"]


def clean(
    image: jax.Array, label: jax.Array, *, fill: float | None, keep_labels: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Set pixels without data to 0, their labels to -1.

    Args:
        image: [B, H, W, bands] int16 or float32, digital numbers as stored.
        label: [B, H, W] float32, -1 for none.
        fill: the data set's fill value besides -9999, or None.
        keep_labels: leave labels of such pixels as they are, as granite-geospatial-biomass does.

    Returns:
        image [B, H, W, bands] float32, label [B, H, W] float32, and the pixels without data, [B, H, W] bool: those of
        `bands.no_data`.
    """
    missing = jnp.all(image == 0, axis=-1)
    fills = {float(bands.FILL)} if fill is None or np.isnan(fill) else {float(bands.FILL), float(fill)}
    if jnp.issubdtype(image.dtype, jnp.floating):
        missing |= jnp.any(jnp.isnan(image), axis=-1)
    else:  # no integer pixel can hold the others, and JAX would wrap them round
        limits = jnp.iinfo(image.dtype)
        fills = {value for value in fills if value.is_integer() and limits.min <= value <= limits.max}
    for value in sorted(fills):
        missing |= jnp.any(image == jnp.asarray(value, image.dtype), axis=-1)
    cleaned = jnp.where(missing[..., None], 0.0, image.astype(jnp.float32))
    label = label.astype(jnp.float32)
    return cleaned, label if keep_labels else jnp.where(missing, records.NO_LABEL, label), missing


def normalize(image: jax.Array, means: ArrayLike, stds: ArrayLike) -> jax.Array:
    """z-scores: (image - means) / stds, [..., bands] float32, with (bands,) statistics in digital numbers."""
    return (image - jnp.asarray(means, jnp.float32)) / jnp.asarray(stds, jnp.float32)


def augment(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    *,
    flip: bool = True,
    turn: bool = True,
    rotate_degrees: float = 0.0,
    rotate_probability: float = 0.5,
    rotate_label: Literal["scatter", "nearest"] = "scatter",
    rotate_label_fill: float = records.NO_LABEL,
    horizontal_only: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Random flips, quarter turns and rotations of cleaned chips, before z-scoring.

    `flip` and `turn` together draw one of the 8 symmetries of the square, each as likely as another; `flip` alone
    draws a left-right and an up-down flip, `turn` alone a number of quarter turns. Chips that are not square keep
    their shape: quarter turns are left out. The reference's augmentation is `horizontal_only=True`,
    `rotate_degrees=30`, `rotate_label="nearest"`, `rotate_label_fill=0`.

    Args:
        key: of the step.
        image: [B, H, W, bands] float32 digital numbers, 0 where there is no data.
        label: [B, H, W] float32, -1 for none.
        flip: whether chips are mirrored.
        turn: whether chips are turned by multiples of 90 degrees.
        rotate_degrees: each chip is rotated by an angle drawn from plus or minus this; see `rotate`.
        rotate_probability: share of chips that are rotated.
        rotate_label: see `rotate`.
        rotate_label_fill: see `rotate`.
        horizontal_only: mirror left-right with probability 0.5, and neither up-down nor turned.

    Returns:
        image and label of the same shapes.

    Raises:
        ValueError: `rotate_probability` is not within 0 to 1, or `rotate_label` is not known.
    """
    if not 0 <= rotate_probability <= 1:
        raise ValueError(f"rotate_probability: found {rotate_probability}, expected 0 to 1")
    chances = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (5,)))(jnp.arange(image.shape[0]))
    square = image.shape[1] == image.shape[2]
    transpose, down, across = _symmetry(chances[:, :3] < 0.5, flip, turn, square, horizontal_only)
    image = _apply(image, transpose if square else None, down, across)
    label = _apply(label, transpose if square else None, down, across)
    if rotate_degrees == 0 or rotate_probability == 0:
        return image, label
    degrees = jnp.where(chances[:, 3] < rotate_probability, (2 * chances[:, 4] - 1) * rotate_degrees, 0.0)
    return rotate(image, label, degrees, label_mode=rotate_label, label_fill=rotate_label_fill)


def _symmetry(
    heads: jax.Array, flip: bool, turn: bool, square: bool, horizontal_only: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From three fair coins [B, 3]: whether to transpose, flip up-down, flip left-right, [B] each.

    Applied in this order they make all 8 symmetries of the square.
    """
    transpose, down, across = heads.T
    no = jnp.zeros_like(across)
    if horizontal_only:
        return no, no, across
    if not turn:
        return no, down if flip else no, across if flip else no
    transpose = transpose if square else no
    # Each of the three mirrors the chip, so an even number of them is a turn.
    return transpose, down, across if flip else transpose ^ down


def _apply(values: jax.Array, transpose: jax.Array | None, down: jax.Array, across: jax.Array) -> jax.Array:
    """Symmetries of [B, H, W, ...]; selections rather than gathers, which the compiler fuses."""

    def chosen(flag: jax.Array, changed: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.where(flag.reshape(-1, *(1,) * (values.ndim - 1)), changed, values)

    if transpose is not None:
        values = chosen(transpose, jnp.swapaxes(values, 1, 2), values)
    values = chosen(down, jnp.flip(values, 1), values)
    return chosen(across, jnp.flip(values, 2), values)
