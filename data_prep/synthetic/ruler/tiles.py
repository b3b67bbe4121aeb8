"""The six tiles of the ruler world: where they lie, in which form of CRS, and which tile owns a place."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pyproj import Geod, Transformer

from data_prep.season import Season, season_of_year
from data_prep.synthetic.landscape import PIXEL_M

OVERLAP = 328  # pixels that neighbouring tiles share
_GEOD = Geod(ellps="WGS84")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RulerTile:
    """One tile; `left` and `top` are those of its upper-left corner in the CRS `epsg`, metres."""

    name: str
    epsg: int
    left: float
    top: float
    shape: tuple[int, int]
    user_defined: bool = False  # the files name no EPSG code
    group: int = 0  # tiles of one group are seen by the same orbits

    @property
    def zone(self) -> int:
        """UTM zone."""
        return self.epsg % 100

    @cached_property
    def _to_degrees(self) -> Transformer:
        return Transformer.from_crs(self.epsg, 4326, always_xy=True)

    def places(self, rows: Floats, cols: Floats, dx: Floats, dy: Floats) -> tuple[Floats, Floats]:
        """Return longitude and latitude of places given as an offset in metres from the centre of a pixel."""
        x, y = self.left + PIXEL_M * (cols + 0.5) + dx, self.top - PIXEL_M * (rows + 0.5) + dy
        return self._to_degrees.transform(x, y)

    def inside(self, lon: Floats, lat: Floats) -> NDArray[np.bool_]:
        """Return whether places lie in the tile."""
        x, y = self._to_degrees.transform(lon, lat, direction="INVERSE")
        cols, rows = (x - self.left) / PIXEL_M, (self.top - y) / PIXEL_M
        return (rows >= 0) & (rows < self.shape[0]) & (cols >= 0) & (cols < self.shape[1])

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Longitude and latitude of the centre."""
        x, y = self.left + PIXEL_M * self.shape[1] / 2, self.top - PIXEL_M * self.shape[0] / 2
        return self._to_degrees.transform(x, y)

    def distance(self, lon: Floats, lat: Floats) -> Floats:
        """Return the distance of places to the tile's centre in metres."""
        ones = np.ones(np.shape(lon))
        return np.asarray(_GEOD.inv(lon, lat, ones * self.centre[0], ones * self.centre[1])[2])

    def season(self, year: int) -> Season:
        """Return the season of a year, by the centre's latitude."""
        return season_of_year(year, self.centre[1])


def ruler_tiles(shape: tuple[int, int]) -> list[RulerTile]:
    """Return the six tiles.

    10SFF and 10SGF overlap in one zone; 10UGB and 11UKS overlap across a zone boundary; 22JGR lies south of the
    equator and is given in the northern zone with negative northings; 01KAB lies across the antimeridian in a
    user-defined CRS.

    Args:
        shape: (H, W) of each tile in pixels.
    """
    height, width = shape
    shared = min(OVERLAP, 2 * width // 5)
    right = 709800.0  # of 10SFF, as in the real grid
    boundary = {10: _anchor(32610, -120.0, 51.0), 11: _anchor(32611, -120.0, 51.0)}
    dateline = _anchor(32701, 180.0, -17.0)

    def at(anchor: tuple[float, float], share: float) -> tuple[float, float]:
        """Upper-left corner of a tile that has the anchor halfway down at this share of its width."""
        left, top = anchor[0] - PIXEL_M * share * width, anchor[1] + PIXEL_M * height / 2
        return 60 * round(left / 60), 60 * round(top / 60)

    return [
        RulerTile("10SFF", 32610, right - PIXEL_M * width, 4100040, shape, group=0),
        RulerTile("10SGF", 32610, right - PIXEL_M * shared, 4100040, shape, group=0),
        RulerTile("10UGB", 32610, *at(boundary[10], 0.75), shape, group=1),
        RulerTile("11UKS", 32611, *at(boundary[11], 0.25), shape, group=1),
        RulerTile("22JGR", 32622, 699960, 7100020 - 10_000_000, shape, group=2),
        RulerTile("01KAB", 32701, *at(dateline, 0.5), shape, user_defined=True, group=3),
    ]


def _anchor(epsg: int, lon: float, lat: float) -> tuple[float, float]:
    return Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)


def clearly_owned(tile: RulerTile, tiles: Iterable[RulerTile], lon: Floats, lat: Floats) -> NDArray[np.bool_]:
    """Return whether `tile` is the one, among those that hold a place, with the nearest centre.

    False too where another centre is nearly as near, within what ways of measuring distances differ by.
    """
    own = tile.distance(lon, lat)
    owned = tile.inside(lon, lat)
    for other in tiles:
        if other.name != tile.name:
            nearer = 1.006 * own + 2 * PIXEL_M < other.distance(lon, lat)
            owned &= nearer | ~other.inside(lon, lat)
    return owned
