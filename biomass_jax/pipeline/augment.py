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
from biomass_jax.pipeline.rotate import rotate


def no_data(image: jax.Array, fill: ArrayLike) -> jax.Array:
    """`bands.no_data` on the device.

    Args:
        image: [..., bands] digital numbers, integers or floats.
        fill: the fill value besides -9999, NaN for none; may be traced.

    Returns:
        bool [...], True where there is no data.
    """
    values = image.astype(jnp.float32)  # int16 is exact in it
    missing = (values == fill) | (values == bands.FILL) | jnp.isnan(values)
    return jnp.any(missing, axis=-1) | jnp.all(values == 0, axis=-1)


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
    missing = no_data(image, jnp.nan if fill is None else fill)
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


_TRIES = 10


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    *,
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """A random box of each cleaned chip, resized to `size` x `size`, then mirrored left-right with probability 0.5.

    The box is drawn as torchvision.transforms.RandomResizedCrop does: 10 tries of an area and an aspect ratio
    (log-uniform), and where none fits the largest central box of an allowed ratio. See `resized_crop` for the pixels.

    Args:
        key: of the step.
        image: [B, H, W, bands] float32 digital numbers, 0 in all bands where there is no data.
        scale: smallest and largest share of the chip's area.
        ratio: smallest and largest width / height.
        size: of the result.

    Returns:
        image [B, size, size, bands] float32, and its pixels without data [B, size, size] bool.
    """
    height, width = image.shape[1:3]

    def one(row: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        chances = jax.random.uniform(jax.random.fold_in(key, row), (2 * _TRIES + 3,))
        crop, missing = resized_crop(image, _box(chances[:-1], height, width, scale, ratio), size)
        mirrored = chances[-1] < 0.5
        return jnp.where(mirrored, crop[:, ::-1], crop), jnp.where(mirrored, missing[:, ::-1], missing)

    return jax.vmap(one)(jnp.arange(image.shape[0]), image)


def resized_crop(
    image: jax.Array, box: tuple[jax.Array, jax.Array, jax.Array, jax.Array], size: int
) -> tuple[jax.Array, jax.Array]:
    """One box of one chip, resized.

    Bilinear with half-pixel centres, taps clamped to the box (crop, then resize with align_corners=False), and no
    smoothing before a reduction. Pixels without data take no part: the weights of the others are scaled up to 1, and
    where they hold less than half, the result is without data.

    Args:
        image: [H, W, bands] float32, 0 in all bands where there is no data.
        box: top, left, height, width in pixels, integers.
        size: of the result.

    Returns:
        [size, size, bands] float32 and [size, size] bool, True without data (0 in the image).
    """
    top, left, height, width = box
    present = jnp.any(image != 0, axis=-1, keepdims=True).astype(image.dtype)
    rows = _weights(top, height, image.shape[0], size)
    cols = _weights(left, width, image.shape[1], size)
    # Two matrix products instead of a gather; at a lower precision digital numbers would lose their last digits.
    resized = jnp.einsum(
        "yh,hwc,xw->yxc", rows, jnp.concatenate([image, present], -1), cols, precision=jax.lax.Precision.HIGHEST
    )
    weight = resized[..., -1:]
    missing = weight < 0.5
    return jnp.where(missing, 0.0, resized[..., :-1] / jnp.where(missing, 1.0, weight)), missing[..., 0]


def _weights(start: jax.Array, length: jax.Array, count: int, size: int) -> jax.Array:
    """(size, count) bilinear weights of `length` pixels from `start` on; rows add up to 1."""
    place = (jnp.arange(size) + 0.5) * (length.astype(jnp.float32) / size) - 0.5
    place = start + jnp.clip(place, 0, length - 1)
    return jnp.maximum(0.0, 1 - jnp.abs(place[:, None] - jnp.arange(count)))


def _box(
    chances: jax.Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top, left, height and width, int32, of the box that (2 tries + 2,) uniform draws from 0 to 1 mean."""
    area = height * width * (scale[0] + chances[:_TRIES] * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    aspect = jnp.exp(low + chances[_TRIES : 2 * _TRIES] * (high - low))
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = jnp.argmax(fits)
    box_height, box_width = heights[first], widths[first]
    top = jnp.floor(chances[-2] * (height - box_height + 1))
    left = jnp.floor(chances[-1] * (width - box_width + 1))
    # Where no try fits: the whole chip, cut to the nearest allowed ratio about its centre.
    whole_height, whole_width = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    fallback = ((height - whole_height) // 2, (width - whole_width) // 2, whole_height, whole_width)
    drawn = (top, left, box_height, box_width)
    a, b, c, d = (jnp.where(jnp.any(fits), x, y).astype(jnp.int32) for x, y in zip(drawn, fallback, strict=True))
    return a, b, c, d
