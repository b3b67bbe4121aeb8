"""The context world's truth: biomass as a product of what a pixel's colour tells and of what only its surroundings do.

    biomass = cover * stature * shelter * moisture

`cover` is what the colour shows, up to 150 Mg/ha. `stature` shows in the texture of the crowns and their shadows, a few
pixels around. `shelter` is the wind's: forest east of a cut has been blown down, up to 14 pixels from it, so that the
neighbouring window has to be seen. `moisture` falls with the distance to a river, 500 m and more. Two biomes, told by
the colour of the ground, have other typical biomass and other strengths. Everything is constant in a pixel of 30 m.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.synthetic.forest.land import Floats, hashed, smooth
from data_prep.synthetic.landscape import PIXEL_M

BRIGHT = 150.0  # Mg/ha of `cover` beyond which the colour stays the same
SPREAD = 0.3  # standard deviation of log cover
FINE_SHARE = 0.08  # of its variance: differs from pixel to pixel
TYPICAL = (80.0, 110.0)  # Mg/ha, median cover of the dry biome and the moist one
STATURE = (0.65, 0.55)  # largest share by which stature adds or takes, by biome
SHELTER = (0.5, 0.7)  # share that the wind takes beside a cut
MOISTURE = (0.6, 0.45)  # share added at a river and taken far from it
LEE = 14  # pixels east of a cut that the wind reaches
RIVER_REACH = 18.0  # pixels over which moisture falls by a factor e
_STAND_M, _BIOME_M = 420.0, 5400.0  # between knots of stature and of biomes
_CUTS = 20  # pixels: side of the squares that hold one cut each
_CUT_WIDTH, _CUT_HEIGHT = (2, 3), (8, 15)  # pixels, from and to
_RIVERS = 92  # pixels between rivers, which run from west to east
_OCTAVES = {270.0: 0.5, 1110.0: 0.5}
_FINE, _STATURE, _CROWN, _BIOME, _CUT, _BEND = 200, 201, 202, 203, 210, 220  # numbers of independent random fields

Numbers = NDArray[np.int64]


class Ground(NamedTuple):
    """What is true of pixels; every field is an array of the places' shape."""

    cover: Floats  # Mg/ha
    stature: Floats  # -1..1
    lee: Floats  # 0..1: how near a cut is in the west
    river: Floats  # pixels to the middle of the nearest river
    moist: NDArray[np.bool_]  # the moist biome, else the dry one
    bare: NDArray[np.bool_]  # a cut: no biomass
    water: NDArray[np.bool_]  # a river: no biomass


@dataclass(frozen=True)
class Context:
    """The truth of a UTM zone; another seed, another one."""

    seed: int = 0

    def place(self, col: Numbers, row: Numbers) -> Ground:
        """Return what is true of pixels of 30 m given by numbers from the zone's origin, east and north (broadcast)."""
        x, y = PIXEL_M * (col + 0.5), PIXEL_M * (row + 0.5)
        gentle = sum(
            np.sqrt(share) * smooth(x, y, step, number, self.seed)
            for number, (step, share) in enumerate(_OCTAVES.items())
        )
        fine = (hashed(col, row, _FINE, self.seed) - 0.5) * np.sqrt(12)
        moist = smooth(x, y, _BIOME_M, _BIOME, self.seed) > 0
        log = SPREAD * (np.sqrt(FINE_SHARE) * fine + np.sqrt(1 - FINE_SHARE) * gentle)
        bare, lee = self._cuts(col, row)
        river = self._to_river(col, row)
        water = river < 1.5
        return Ground(
            cover=_by_biome(TYPICAL, moist) * np.exp(log),
            stature=np.clip(smooth(x, y, _STAND_M, _STATURE, self.seed) / 1.7, -1, 1),
            lee=lee,
            river=river,
            moist=moist,
            bare=bare & ~water,
            water=water,
        )

    def crowns(self, left: float, top: float, shape: tuple[int, int]) -> Floats:
        """Return (H, W) how bright pixels' crowns are by chance, mean 0 and standard deviation 1, all season."""
        return (hashed(*grid(left, top, shape), _CROWN, self.seed) - 0.5) * np.sqrt(12)

    def pixels(self, left: float, top: float, shape: tuple[int, int]) -> Ground:
        """Return what is true of (H, W) pixels, rows north to south; the upper-left corner is in multiples of 30 m."""
        return self.place(*grid(left, top, shape))

    def biomass(self, x: Floats, y: Floats) -> Floats:
        """Return biomass in Mg/ha at places given by easting and northing in metres (arrays of one shape)."""
        return biomass_of(self.place(*(np.floor(metres / PIXEL_M).astype(np.int64) for metres in (x, y))))

    def pixel_biomass(self, left: float, top: float, shape: tuple[int, int]) -> Floats:
        """Return (H, W) biomass of pixels in Mg/ha."""
        return biomass_of(self.pixels(left, top, shape))

    def _cuts(self, col: Numbers, row: Numbers) -> tuple[NDArray[np.bool_], Floats]:
        """Whether a pixel is a cut, and how near a cut is in the west: 1 beside it, 0 from `LEE` pixels on."""
        square_x, square_y = col // _CUTS, row // _CUTS
        bare = np.zeros(np.broadcast_shapes(col.shape, row.shape), bool)
        lee = np.zeros(bare.shape)
        for i in (square_x - 1, square_x):
            for j in (square_y - 1, square_y):
                chance = [self._chance(i, j, _CUT + k) for k in range(4)]
                width, height = (
                    np.floor(low + share * (high - low + 1))
                    for share, (low, high) in zip(chance, (_CUT_WIDTH, _CUT_HEIGHT), strict=False)
                )
                first = i * _CUTS + np.floor(chance[2] * (_CUTS - 2))
                bottom = j * _CUTS + np.floor(chance[3] * _CUTS)
                beside = (row >= bottom) & (row < bottom + height)
                east = col - (first + width) + 1  # 1 is the pixel beside the cut, 0 and less are in it
                bare |= beside & (col >= first) & (east < 1)
                near = np.clip(1 - (east - 1) / LEE, 0, 1)
                lee = np.where(beside & (east >= 1), np.maximum(lee, near), lee)
        return bare, lee

    def _chance(self, i: Numbers, j: Numbers, field: int) -> Floats:
        """`hashed` where few numbers come up again and again."""
        (some_i, of_i), (some_j, of_j) = (np.unique(numbers, return_inverse=True) for numbers in (i, j))
        table = hashed(some_i[:, None], some_j[None, :], field, self.seed)
        return table[of_i.reshape(i.shape), of_j.reshape(j.shape)]

    def _to_river(self, col: Numbers, row: Numbers) -> Floats:
        """Pixels to the middle of the nearest river: to its tangent at this column."""
        nearest = np.full(np.broadcast_shapes(col.shape, row.shape), np.inf)
        for number in (row // _RIVERS - 1, row // _RIVERS, row // _RIVERS + 1):
            course, slope = number * _RIVERS + _RIVERS / 2.0, np.zeros(nearest.shape)
            for k, (period, height) in enumerate(((331.0, 14.0), (127.0, 7.0), (61.0, 3.0))):
                turn = 2 * np.pi * (col / period + hashed(number, np.int64(0) * number, _BEND + k, self.seed))
                course = course + height * np.sin(turn)
                slope = slope + height * 2 * np.pi / period * np.cos(turn)
            nearest = np.minimum(nearest, np.abs(row - course) / np.hypot(1, slope))
        return nearest


def grid(left: float, top: float, shape: tuple[int, int]) -> tuple[Numbers, Numbers]:
    """Return the numbers of pixels, columns (1, W) and rows (H, 1) north to south, for `Context.place`."""
    first, above = round(left / PIXEL_M), round(top / PIXEL_M)
    return first + np.arange(shape[1])[None, :], above - 1 - np.arange(shape[0])[:, None]


def factors(at: Ground) -> tuple[Floats, Floats, Floats]:
    """Return the factors of biomass that stature, shelter and moisture are, in the order of their range."""
    stature = 1 + _by_biome(STATURE, at.moist) * at.stature
    shelter = 1 - _by_biome(SHELTER, at.moist) * at.lee
    moisture = 1 + _by_biome(MOISTURE, at.moist) * (2 * np.exp(-at.river / RIVER_REACH) - 1)
    return stature, shelter, moisture


def biomass_of(at: Ground) -> Floats:
    """Return biomass in Mg/ha."""
    stature, shelter, moisture = factors(at)
    return np.where(at.bare | at.water, 0.0, at.cover * stature * shelter * moisture)


def _by_biome(values: tuple[float, float], moist: NDArray[np.bool_]) -> Floats:
    return np.where(moist, values[1], values[0])
