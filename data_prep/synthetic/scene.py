"""What a Landsat sensor would see of a `Landscape`: six bands of digital numbers and the quality layer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biomass_jax.data.bands import FILL
from data_prep.hls import granules
from data_prep.synthetic.landscape import PIXEL_M, Cover, FloatGrid, Landscape, fractal

# Digital numbers (reflectance x 10,000) of pure surfaces in BLUE, GREEN, RED, NIR_NARROW, SWIR_1, SWIR_2, rounded from
# what HLS scenes of temperate summers hold.
CANOPY = (190, 390, 240, 2900, 1250, 520)  # closed forest
SOIL = (750, 1050, 1350, 2250, 2950, 2350)  # bare ground, stubble
GREEN = (380, 800, 480, 3900, 1950, 930)  # grass and crops in leaf
BUILT = (1150, 1350, 1500, 2150, 2250, 1950)  # roofs and streets
WATER = (330, 380, 230, 90, 45, 25)

CLOSING_BIOMASS = 70.0  # Mg/ha at which the crowns cover 63 % of the ground
FMASK_LOW_AEROSOL = 0b01 << 6


@dataclass(frozen=True)
class Sun:
    """Direction of the sunlight in degrees; the azimuth counts clockwise from north."""

    zenith: float = 26.0
    azimuth: float = 135.0


SUN = Sun()  # a summer day in California


def canopy_cover(biomass: FloatGrid) -> FloatGrid:
    """Return the share of the ground under crowns, 0..1: it saturates, and so does what a satellite can tell."""
    return (1 - np.exp(-biomass / CLOSING_BIOMASS)).astype(np.float32)


def hillshade(elevation: FloatGrid, sun: Sun) -> FloatGrid:
    """Return the light that falls on each pixel, 1 for flat ground (cosine of the angle to the sun, scaled)."""
    to_north, to_east = -np.gradient(elevation, PIXEL_M, axis=0), np.gradient(elevation, PIXEL_M, axis=1)
    zenith, azimuth = np.radians(sun.zenith), np.radians(sun.azimuth)
    towards_sun = np.sin(azimuth) * to_east + np.cos(azimuth) * to_north
    cosine = (np.cos(zenith) - np.sin(zenith) * towards_sun) / np.sqrt(1 + to_north**2 + to_east**2)
    return np.clip(cosine / np.cos(zenith), 0.25, None).astype(np.float32)


def off_swath(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the corner that the satellite's swath leaves out: the north-western one, cut by a slanting edge."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    return y + 3.5 * x < 0.55 * height


def digital_numbers(land: Landscape, *, seed: int = 0) -> NDArray[np.int16]:
    """Return (H, W, 6) int16 surface reflectance x 10,000; `FILL` in all bands outside the swath.

    Crowns hide the ground as biomass grows, and their own colour darkens slightly with it; slopes are lit by the sun;
    light of neighbouring pixels mixes in, and the sensor adds noise.
    """
    rng = np.random.default_rng([seed, 2])
    canopy, soil, green, built, water = (np.array(s, np.float32) for s in (CANOPY, SOIL, GREEN, BUILT, WATER))
    vigour, crowns = land.vigour[..., None], canopy_cover(land.biomass)[..., None]
    ground = soil + (green - soil) * vigour
    ground = np.where((land.cover == Cover.URBAN)[..., None], built, ground)
    aged = canopy * (1.12 - 0.0008 * land.biomass[..., None])
    surface = ground + (aged - ground) * crowns
    texture = 1 + 0.05 * fractal(land.cover.shape, rng, roughness=0.3, largest=10)
    streets = 1 + 0.22 * fractal(land.cover.shape, rng, roughness=0.1, largest=10)
    lit = hillshade(land.elevation, SUN) * np.where(land.cover == Cover.URBAN, streets, texture)
    image = np.where((land.cover == Cover.WATER)[..., None], water, surface * lit[..., None])
    image = _mix_neighbours(image) + rng.normal(0, 18, image.shape)
    image = np.clip(np.rint(image), -2000, 16000).astype(np.int16)
    image[off_swath(land.cover.shape)] = FILL
    return image


def fmask(land: Landscape) -> NDArray[np.uint8]:
    """Return (H, W) HLS quality bits: a clear sky with low aerosol, the water bit, 255 outside the swath."""
    bits = np.full(land.cover.shape, FMASK_LOW_AEROSOL, np.uint8)
    bits[land.cover == Cover.WATER] |= granules.WATER
    bits[off_swath(land.cover.shape)] = granules.FMASK_FILL
    return bits


def _mix_neighbours(image: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the image blurred by (1, 6, 1) / 8 along rows and columns, as a sensor's point spread does."""
    for axis in (0, 1):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = np.moveaxis(np.pad(image, pad, mode="edge"), axis, 0)
        image = np.moveaxis((padded[:-2] + 6 * padded[1:-1] + padded[2:]) / 8, 0, axis)
    return image
