"""Rotation of chips by any angle: the image resampled, each label moved.

Geometry as in albumentations.Rotate, which is cv2.warpAffine about ((W - 1) / 2, (H - 1) / 2): written from OpenCV's
documentation (getRotationMatrix2D, warpAffine), in float32 instead of OpenCV's fixed-point coordinates.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax.data import records

_REACH = 3  # pixels around a label's centre in which a free place is looked for


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

    Raises:
        ValueError: another `label_mode`.
    """
    if label_mode not in ("scatter", "nearest"):
        raise ValueError(f"label_mode: found {label_mode!r}, expected 'scatter' or 'nearest'")
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
