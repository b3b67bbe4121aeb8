"""A synthetic piece of land on a 30 m grid: terrain, land cover and the biomass that grows on it.

Everything here is a pure function of a shape and a seed. What a satellite would see of it is in `scene.py`.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

PIXEL_M = 30.0

FloatGrid = NDArray[np.float32]


class Cover(IntEnum):
    """Land-cover classes of a `Landscape`."""

    WATER = 0
    FOREST = 1
    GRASS = 2
    CROP = 3
    URBAN = 4


@dataclass(frozen=True)
class Landscape:
    """Truth about a piece of land; every field has shape (H, W), rows north to south."""

    elevation: FloatGrid  # metres
    cover: NDArray[np.uint8]  # `Cover`
    biomass: FloatGrid  # above-ground dry biomass, Mg/ha
    vigour: FloatGrid  # 0..1, how green the ground between the trees is


def fractal(shape: tuple[int, int], rng: np.random.Generator, *, roughness: float, largest: float) -> FloatGrid:
    """Return a smooth random field of mean 0 and standard deviation 1.

    A Gaussian field whose spectral amplitude falls as frequency**-roughness (2 is like terrain, 1 is like texture),
    flat for structures larger than `largest` pixels.
    """
    height, width = shape
    # Made on a torus half as large again, so that opposite edges of the land don't resemble each other.
    rows, cols = (3 * height + 1) // 2, (3 * width + 1) // 2
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(cols)[None, :])
    amplitude = np.maximum(frequency, 1 / largest) ** -roughness
    amplitude[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((rows, cols))) * amplitude, s=(rows, cols))
    field = field[:height, :width]
    return ((field - field.mean()) / field.std()).astype(np.float32)


def share_below(field: FloatGrid) -> FloatGrid:
    """Return for each value the share of values below it, 0..1: a field with a uniform distribution."""
    order = np.empty(field.size, np.float32)
    order[np.argsort(field, axis=None, kind="stable")] = np.arange(field.size, dtype=np.float32)
    return np.reshape(order / np.float32(field.size), field.shape)


def _river(shape: tuple[int, int], rng: np.random.Generator) -> tuple[FloatGrid, FloatGrid]:
    """Return distances in pixels: to a river that meanders from west to east, and to the axis of its valley."""
    height, width = shape
    x = np.arange(width)
    bends = [rng.uniform(-1, 1) * np.sin(2 * np.pi * (x / p + rng.uniform())) for p in (331, 163, 97)]
    axis = height * (rng.uniform(0.45, 0.65) + 0.07 * bends[0])
    course = axis + 0.07 * height * (bends[1] + bends[2])
    y = np.arange(height)[:, None]
    # The distance to the tangent at this column: exact for a straight river, near enough for a bending one.
    to_river = np.abs(y - course) / np.hypot(1, np.gradient(course))
    return to_river.astype(np.float32), np.abs(y - axis).astype(np.float32)


def _parcels(shape: tuple[int, int], rng: np.random.Generator, *, side: float) -> NDArray[np.int64]:
    """Return the number of the parcel that each pixel belongs to: a tilted grid of rectangles of many shapes."""
    height, width = shape
    angle = rng.uniform(0.1, 0.5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    reach = height + width
    along = np.cumsum(rng.uniform(0.5, 1.5, int(4 * reach / side)) * side) - reach
    strip = np.searchsorted(along, x * np.cos(angle) + y * np.sin(angle))
    # Each strip is cut at places of its own.
    cut = (y * np.cos(angle) - x * np.sin(angle) + reach) / (0.6 * side) + rng.uniform(0, 1, len(along) + 1)[strip]
    return strip.astype(np.int64) * 100_003 + cut.astype(np.int64)


def _by_parcel(parcels: NDArray[np.int64], rng: np.random.Generator) -> FloatGrid:
    """Return one uniform random number for each parcel, spread over its pixels."""
    numbers, inverse = np.unique(parcels, return_inverse=True)
    return rng.uniform(size=len(numbers)).astype(np.float32)[inverse].reshape(parcels.shape)


def make_landscape(shape: tuple[int, int], seed: int = 0, *, parcel: float = 16.0) -> Landscape:
    """Return a landscape of wooded hills, a river in its farmed valley, a town, lakes and clearings.

    Args:
        shape: (H, W) in pixels of 30 m.
        seed: another seed, another land.
        parcel: typical side of a field in pixels.
    """
    rng = np.random.default_rng([seed, 1])
    to_river, to_axis = _river(shape, rng)
    valley = np.exp(-((to_axis / 70) ** 2))
    relief = fractal(shape, rng, roughness=2.0, largest=260)
    elevation = 600 + 150 * relief * (1 - 0.75 * valley) - 260 * valley

    wildness = share_below(relief - 1.9 * valley + 0.35 * fractal(shape, rng, roughness=1.0, largest=40))
    parcels = _parcels(shape, rng, side=parcel)
    cover = np.full(shape, Cover.GRASS, np.uint8)
    cover[wildness < 0.38] = Cover.CROP
    cover[wildness > 0.47] = Cover.FOREST
    # Clearings in the forest, in the shape of parcels.
    clearings = (cover == Cover.FOREST) & (_by_parcel(parcels, rng) < 0.06)
    cover[clearings] = Cover.GRASS

    town_y, town_x = shape[0] * rng.uniform(0.3, 0.7), shape[1] * rng.uniform(0.25, 0.75)
    y, x = np.mgrid[: shape[0], : shape[1]]
    town = np.hypot(y - town_y, 0.7 * (x - town_x)) / 34 + 0.3 * fractal(shape, rng, roughness=1.2, largest=30)
    cover[(town < 0.8) & (wildness < 0.8)] = Cover.URBAN
    lakes = share_below(fractal(shape, rng, roughness=2.2, largest=80)) < 0.012
    cover[(to_river < 3.5) | lakes] = Cover.WATER

    biomass = _biomass(cover, clearings, elevation, rng)
    vigour = np.where(cover == Cover.CROP, _by_parcel(parcels, rng), 0.5 + 0.12 * relief)
    return Landscape(elevation.astype(np.float32), cover, biomass, np.clip(vigour, 0, 1).astype(np.float32))


def _biomass(
    cover: NDArray[np.uint8], clearings: NDArray[np.bool_], elevation: FloatGrid, rng: np.random.Generator
) -> FloatGrid:
    """Return Mg/ha: 40 to 380 in forest, thinning out with height; little elsewhere and none on water."""
    stand = 170 + 55 * fractal(cover.shape, rng, roughness=1.3, largest=120)
    stand = stand + 18 * fractal(cover.shape, rng, roughness=0.4, largest=20)
    forest = np.clip(stand - 0.12 * (elevation - 600), 40, 380)
    open_land = {Cover.WATER: 0.0, Cover.GRASS: 7.0, Cover.CROP: 4.0, Cover.URBAN: 9.0}
    biomass = np.select([cover == c for c in open_land], list(open_land.values()), default=forest)
    biomass = np.where(clearings & (cover == Cover.GRASS), 14.0, biomass)
    patchy = 1 + 0.3 * fractal(cover.shape, rng, roughness=0.5, largest=20)
    return np.where(cover == Cover.FOREST, biomass, biomass * np.clip(patchy, 0, None)).astype(np.float32)
