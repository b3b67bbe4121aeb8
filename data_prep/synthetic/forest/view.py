"""What Landsat sees of the forest world on one day: six bands and the Fmask, with clouds and their shadows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biomass_jax.data.bands import FILL
from data_prep.hls import granules
from data_prep.synthetic.forest.land import Floats
from data_prep.synthetic.landscape import fractal, share_below
from data_prep.synthetic.scene import CANOPY, FMASK_LOW_AEROSOL, GREEN, SOIL

CLOSING_BIOMASS = 110.0  # Mg/ha at which the crowns cover 63 % of the ground
CROWN_SHADOW = 0.4  # how much of the sunward neighbour's biomass darkens a pixel as its own does
CLOUD = (5200, 5000, 5100, 5600, 4100, 3300)
THIN_CROWNS = np.array([1.25, 1.2, 1.35, 0.8, 1.15, 1.2])  # of bands, without leaves: the ground shines through
STRIPE_PIXELS = 46.0  # from one bright stripe to the next
_COARSE = 4  # clouds are made on a grid this much coarser


@dataclass(frozen=True)
class Day:
    """One day's sky and season."""

    leaves: float  # 0..1: how far the season has unfolded
    clouds: float  # share of the land under clouds
    off_swath: bool = False  # the swath misses the south-eastern corner
    stripes: float = 0.0  # how much the angle of view changes the brightness from stripe to stripe, as a share


def shadowed_biomass(biomass: Floats) -> Floats:
    """Return (H, W) the biomass that a pixel's colour tells: its own and, through crowns' shadows, its neighbour's.

    The shadow falls from the pixel to the south, where the sun is, and darkens all bands as biomass itself does:
    one pixel alone can't tell them apart, its neighbourhood can.

    Args:
        biomass: (H + 1, W) Mg/ha, one row more in the south.
    """
    return (biomass[:-1] + CROWN_SHADOW * biomass[1:]) / (1 + CROWN_SHADOW)


def surface(seen: Floats, greenness: Floats, day: Day) -> Floats:
    """Return (H, W, 6) digital numbers of the land under a clear sky, without noise.

    Args:
        seen: (H, W) biomass as from `shadowed_biomass`; crowns close as it grows, so the signal saturates.
        greenness: (H, W) of the ground between the trees.
        day: for the season.
    """
    canopy, soil, green = (np.array(spectrum, float) for spectrum in (CANOPY, SOIL, GREEN))
    crowns = 1 - np.exp(-seen / CLOSING_BIOMASS)[..., None]
    ground = soil + (green - soil) * (greenness * day.leaves)[..., None]
    leaves = THIN_CROWNS ** (1 - day.leaves)
    return ground + (canopy * leaves * (1.1 - 0.0006 * seen[..., None]) - ground) * crowns


def under_sky(land: Floats, day: Day, rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return (H, W, 6) digital numbers and (H, W) Fmask of one day.

    Args:
        land: (H, W, 6) digital numbers under a clear sky, without noise.
        day: for the clouds, the angle of view and the swath.
        rng: draws the sky and the noise.
    """
    shape = land.shape[:2]
    image = land * (1 + day.stripes * _view_stripes(shape, rng)[..., None]) if day.stripes else land
    haze = fine_field(shape, rng, roughness=2.0, largest=60)
    image = image * (1 + 0.01 * rng.standard_normal(shape) + 0.01 * haze)[..., None]  # light; the air
    image += 12 * rng.standard_normal(image.shape, dtype=np.float32)

    rank = share_below(fine_field(shape, rng, roughness=1.6, largest=40).astype(np.float32))
    cloud = rank < day.clouds
    near = (rank < 1.25 * day.clouds) & ~cloud
    shadow = np.zeros(shape, bool)
    down, left = (max(1, n // 40) for n in shape)
    shadow[:-down, :-left] = cloud[down:, left:]  # the sun stands in the south-east
    thickness = np.clip((day.clouds - rank) / max(day.clouds, 1e-6), 0, 1)[..., None] ** 0.3
    image = np.where(cloud[..., None], image + (np.array(CLOUD) - image) * thickness, image)
    image = np.where((shadow & ~cloud)[..., None], 0.45 * image, image)
    image = np.where(near[..., None], image + 150, image)

    fmask = np.where(haze > 1.5, granules.HIGH_AEROSOL, FMASK_LOW_AEROSOL).astype(np.uint8)
    fmask[cloud] |= granules.CLOUD
    fmask[near] |= granules.ADJACENT
    fmask[shadow & ~cloud] |= granules.SHADOW
    numbers = np.clip(np.rint(image), -2000, 16000).astype(np.int16)
    if day.off_swath:
        y, x = np.ogrid[: shape[0], : shape[1]]
        off = (shape[0] - y) + 2.5 * (shape[1] - x) < 0.6 * shape[0]
        numbers[off], fmask[off] = FILL, granules.FMASK_FILL
    return numbers, fmask


def _view_stripes(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Return (H, W) -1..1 along the satellite's slanting way: its detectors look from neighbouring angles."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.sin(2 * np.pi * ((x + 0.2 * y) / STRIPE_PIXELS + rng.uniform()))


def fine_field(shape: tuple[int, int], rng: np.random.Generator, *, roughness: float, largest: float) -> Floats:
    """Return (H, W) a smooth random field, made on a coarser grid and blended onto the pixels."""
    coarse = fractal((shape[0] // _COARSE + 2, shape[1] // _COARSE + 2), rng, roughness=roughness, largest=largest)
    y, x = (np.arange(n) / _COARSE for n in shape)
    i, j = y.astype(int), x.astype(int)
    u, v = (y - i)[:, None], (x - j)[None, :]
    rows = coarse[i] * (1 - u) + coarse[i + 1] * u
    return rows[:, j] * (1 - v) + rows[:, j + 1] * v
