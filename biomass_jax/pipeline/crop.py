"""Random resized crops for pretraining."""

import jax
import jax.numpy as jnp
import numpy as np

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
