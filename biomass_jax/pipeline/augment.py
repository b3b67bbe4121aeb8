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

_REACH = 3  # pixels around a label's centre in which a free place is looked for
_TRIES = 10  # of a random box, before the largest central one is taken


def no_data(image: jax.Array, fill: ArrayLike) -> jax.Array:
    """`bands.no_data` on the device.

    Args:
        image: [..., bands] digital numbers, integers or floats.
        fill: the fill value besides -9999, NaN for none; may be traced.

    Returns:
        bool [...], True where there is no data.
    """
    values = image.astype(jnp.float32)  # int16 is exact in it
    return jnp.any(_filled(values, fill), axis=-1) | jnp.all(values == 0, axis=-1)


def _filled(values: jax.Array, fill: ArrayLike) -> jax.Array:
    """Which values [..., bands] float32 are none."""
    return (values == fill) | (values == bands.FILL) | ~jnp.isfinite(values)


def without_fill(image: jax.Array, fill: ArrayLike, *, reference: bool = False) -> jax.Array:
    """An image with 0 in all bands of its pixels without data.

    Args:
        image: [..., bands] digital numbers, integers or floats.
        fill: see `no_data`.
        reference: 0 in the bands that are filled alone, the pixel's other bands as they are, as
            granite-geospatial-biomass does: it takes each band's no-data tag by itself.

    Returns:
        [..., bands] float32.
    """
    values = image.astype(jnp.float32)
    missing = _filled(values, fill) if reference else no_data(image, fill)[..., None]
    return jnp.where(missing, 0.0, values)


def clean(
    image: jax.Array, label: jax.Array, *, fill: float | None, reference: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Set pixels without data to 0, their labels to -1.

    Args:
        image: [B, H, W, bands] int16 or float32, digital numbers as stored.
        label: [B, H, W] float32, -1 for none.
        fill: the data set's fill value besides -9999, or None.
        reference: as granite-geospatial-biomass does, leave labels of such pixels as they are, and of a pixel that is
            filled in some bands the others, see `without_fill`.

    Returns:
        image [B, H, W, bands] float32, label [B, H, W] float32, and the pixels without data, [B, H, W] bool: those of
        `bands.no_data`.
    """
    mark = jnp.nan if fill is None else fill
    missing, label = no_data(image, mark), label.astype(jnp.float32)
    cleaned = without_fill(image, mark, reference=reference)
    return cleaned, label if reference else jnp.where(missing, records.NO_LABEL, label), missing


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
        rotate_probability: share of chips that are rotated, 0 to 1.
        rotate_label: see `rotate`.
        rotate_label_fill: see `rotate`.
        horizontal_only: mirror left-right with probability 0.5, and neither up-down nor turned.

    Returns:
        image and label of the same shapes.
    """
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


def rotate(
    image: jax.Array,
    label: jax.Array,
    degrees: jax.Array,
    *,
    label_mode: Literal["scatter", "nearest"] = "scatter",
    label_fill: float = records.NO_LABEL,
) -> tuple[jax.Array, jax.Array]:
    """Rotate each chip about its centre; the size stays, corners leave the frame.

    The image is interpolated bilinearly, pixels outside counting as 0. `nearest` samples the label too: of labels that
    stand alone some are lost and some doubled. `scatter` moves each label to the pixel that its centre falls into.
    Where two would share one, one of them goes to a pixel up to 1.4 pixels from its centre, and so do those that it
    meets there: none is lost but those whose centre leaves the frame, and none is doubled.

    Args:
        image: [B, H, W, bands] float32, no NaN.
        label: [B, H, W] float32, -1 for none.
        degrees: [B], counter-clockwise as seen.
        label_mode: `scatter` or `nearest`.
        label_fill: the label of pixels that come from outside the chip (granite-geospatial-biomass gives them a false
            0), unless a label was moved there.

    Returns:
        image and label of the same shapes.
    """
    move = _scatter if label_mode == "scatter" else _nearest

    def one(image: jax.Array, label: jax.Array, degrees: jax.Array) -> tuple[jax.Array, jax.Array]:
        radians = jnp.deg2rad(degrees.astype(jnp.float32))
        cos, sin = jnp.cos(radians), jnp.sin(radians)
        moved = move(label, cos, sin)
        border = ~_inside(*_rounded(*_turned(label.shape, cos, -sin)), label.shape) & (moved < 0)
        return _bilinear(image, cos, sin), jnp.where(border, label_fill, moved)

    return jax.vmap(one)(image, label, degrees)


def _turned(shape: tuple[int, ...], cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows and columns (H, W) of all pixel centres after a rotation; -sin gives where they came from."""
    height, width = shape[:2]
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2
    return (height - 1) / 2 + cos * y - sin * x, (width - 1) / 2 + sin * y + cos * x


def _inside(row: jax.Array, col: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])


def _rounded(row: jax.Array, col: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.floor(row + 0.5).astype(jnp.int32), jnp.floor(col + 0.5).astype(jnp.int32)


def _bilinear(image: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """[H, W, C] sampled where each pixel came from."""
    row, col = _turned(image.shape, cos, -sin)
    top, left = jnp.floor(row), jnp.floor(col)
    flat = image.reshape(-1, image.shape[-1])
    total = jnp.zeros_like(image)
    for down in (0, 1):
        for right in (0, 1):
            weight = jnp.abs(1 - down - (row - top)) * jnp.abs(1 - right - (col - left))
            r, c = top.astype(jnp.int32) + down, left.astype(jnp.int32) + right
            weight = jnp.where(_inside(r, c, image.shape), weight, 0.0)
            place = jnp.clip(r, 0, image.shape[0] - 1) * image.shape[1] + jnp.clip(c, 0, image.shape[1] - 1)
            total += weight[..., None] * flat[place]
    return total


def _nearest(label: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Labels [H, W] sampled where each pixel came from, -1 outside."""
    row, col = _rounded(*_turned(label.shape, cos, -sin))
    sampled = label[jnp.clip(row, 0, label.shape[0] - 1), jnp.clip(col, 0, label.shape[1] - 1)]
    return jnp.where(_inside(row, col, label.shape), sampled, records.NO_LABEL)


def _scatter(label: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Labels [H, W] moved one by one; see `rotate`."""
    height, width = label.shape
    size = height * width
    numbers = jnp.arange(size).reshape(label.shape)  # of the labels, in reading order
    row, col = _turned(label.shape, cos, sin)
    nearest = _rounded(row, col)
    wanting = (label >= 0) & _inside(*nearest, label.shape)
    first, second = _flat(nearest, wanting), _flat(_sheared(label.shape, cos, sin), wanting)

    def give(way: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Labels that found their place taken change to the second one, from which nobody drives them."""
        changed, _ = way
        owner = _owners(jnp.where(changed, second, first), numbers - size * changed, size)
        more = wanting & ~changed & ~_has(owner, first, numbers)
        return changed | more, jnp.any(more)

    none = jnp.zeros_like(wanting)
    # Each round changes at least one label, so the loop ends; a sparse chip needs one round.
    changed, _ = jax.lax.while_loop(lambda way: way[1], give, (none, jnp.any(wanting)))
    owner = _owners(jnp.where(changed, second, first), numbers, size)
    owner = _place_rest(owner, wanting & changed & (second == size), numbers, row, col, nearest)
    moved = label.ravel().at[owner].get(mode="fill", fill_value=records.NO_LABEL)
    return moved.reshape(label.shape)


def _flat(place: tuple[jax.Array, jax.Array], wanting: jax.Array) -> jax.Array:
    """Places as row * W + column, H * W for none."""
    height, width = wanting.shape
    return jnp.where(wanting & _inside(*place, wanting.shape), place[0] * width + place[1], height * width)


def _owners(target: jax.Array, rank: jax.Array, size: int) -> jax.Array:
    """(size,) for each place the lowest rank that asks for it, `size` where none does."""
    return jnp.full((size,), size).at[target.ravel()].min(rank.ravel(), mode="drop")


def _has(owner: jax.Array, target: jax.Array, numbers: jax.Array) -> jax.Array:
    return owner.at[target].get(mode="fill", fill_value=-1) == numbers


def _sheared(shape: tuple[int, ...], cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows and columns (H, W) after a rotation as quarter turns and three shears, each rounded to whole pixels.

    Shears of rows or columns by whole pixels make no two pixels one (Paeth, "A fast algorithm for general raster
    rotation", 1986), at the cost of up to 1.4 pixels between a pixel and its exact image.
    """
    angle = jnp.arctan2(sin, cos)
    quarters = jnp.round(angle / (np.pi / 2))
    rest = angle - quarters * (np.pi / 2)
    y, x = (jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2 for n in shape)
    y, x = jnp.broadcast_arrays(y[:, None], x[None, :])
    turns = [(y, x), (-x, y), (-y, -x), (x, -y)]
    y, x = (jnp.select([quarters % 4 == k for k in range(4)], [turn[axis] for turn in turns]) for axis in (0, 1))
    x = x + jnp.round(jnp.tan(rest / 2) * y)
    y = y - jnp.round(jnp.sin(rest) * x)
    x = x + jnp.round(jnp.tan(rest / 2) * y)
    return _rounded(y + (shape[0] - 1) / 2, x + (shape[1] - 1) / 2)


def _place_rest(
    owner: jax.Array,
    waiting: jax.Array,
    numbers: jax.Array,
    row: jax.Array,
    col: jax.Array,
    nearest: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Owners (H * W,) after labels whose second place is out of the frame took the nearest free one."""
    size = owner.shape[0]

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        owner, waiting, _ = state
        found = _nearest_free(owner == size, row, col, nearest, waiting)
        owner = owner.at[found.ravel()].min(numbers.ravel(), mode="drop")
        placed = waiting & _has(owner, found, numbers)
        return owner, waiting & ~placed, jnp.any(placed)

    state = (owner, waiting, jnp.ones((), bool))
    return jax.lax.while_loop(lambda state: jnp.any(state[1]) & state[2], again, state)[0]


def _nearest_free(
    free: jax.Array, row: jax.Array, col: jax.Array, nearest: tuple[jax.Array, jax.Array], waiting: jax.Array
) -> jax.Array:
    """For each waiting label [H, W] the free place nearest to its centre, H * W where there is none in reach."""
    height, width = waiting.shape
    steps = jnp.asarray(np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1].reshape(2, -1))

    def nearer(index: int, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        distance, place = best
        r, c = nearest[0] + steps[0, index], nearest[1] + steps[1, index]
        inside = _inside(r, c, (height, width))
        at = jnp.where(inside, r * width + c, 0)
        far = (r - row) ** 2 + (c - col) ** 2
        better = waiting & inside & free[at] & (far < distance)
        return jnp.where(better, far, distance), jnp.where(better, at, place)

    start = (jnp.full(waiting.shape, jnp.inf, row.dtype), jnp.full(waiting.shape, height * width))
    return jax.lax.fori_loop(0, steps.shape[1], nearer, start)[1]


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
