"""What Landsat sees of the context world under a clear sky."""

import numpy as np

from data_prep.synthetic.context.land import BRIGHT, Ground
from data_prep.synthetic.forest.land import Floats
from data_prep.synthetic.forest.view import THIN_CROWNS
from data_prep.synthetic.scene import CANOPY, GREEN, SOIL, WATER

CLOSING = 60.0  # Mg/ha of cover at which the crowns hide 63 % of the ground
TEXTURE = 0.10  # of brightness: standard deviation between pixels of the tallest stands
SHADOW = 0.5  # how much of the southern neighbour's crowns is taken off again: the sun stands in the south
DRY_SOIL = 1.2  # how much brighter the dry biome's soil is


def surface(at: Ground, crowns: Floats, leaves: float) -> Floats:
    """Return (H, W, 6) digital numbers of the land under a clear sky, without noise.

    Args:
        at: (H, W), what is true of the pixels.
        crowns: (H + 1, W), how bright their crowns are by chance, one row more in the south.
        leaves: 0..1, how far the season has unfolded.
    """
    covered = (1 - np.exp(-np.minimum(at.cover, BRIGHT) / CLOSING))[..., None]
    canopy, soil, green, water = (np.array(spectrum, float) for spectrum in (CANOPY, SOIL, GREEN, WATER))
    thin = THIN_CROWNS ** (1 - leaves)
    ground = np.where(at.moist[..., None], soil + (green - soil) * 0.6 * leaves, DRY_SOIL * soil)
    seen = (ground + (canopy * thin - ground) * covered) * lit(at, crowns)[..., None]
    seen = np.where(at.bare[..., None], ground * 1.1, seen)
    return np.where(at.water[..., None], water, seen)


def lit(at: Ground, crowns: Floats) -> Floats:
    """Return (H, W) the light on the crowns, about 1: they differ the more, the taller they stand.

    Args:
        at: (H, W) pixels.
        crowns: (H + 1, W); each row is shaded by the one to its south, where the sun stands.
    """
    roughness = TEXTURE * (0.1 + 0.45 * (1 + at.stature))
    return 1 + roughness * (crowns[:-1] - SHADOW * crowns[1:])
