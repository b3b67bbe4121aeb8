"""Boxes of longitude and latitude: of a raster's grid, of an MGRS tile's name, and which points lie inside.

A box is (west, south, east, north) in degrees WGS 84; as in GeoJSON, west > east means that it crosses the
antimeridian.
"""

import functools
import re

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer
from rasterio.crs import CRS as RasterCRS

from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import PrepError

Box = tuple[float, float, float, float]

TILE_PIXELS, PIXEL_M = 3660, 30
_TILE = re.compile(r"T?(\d{2})([C-HJ-NP-X])([A-HJ-NP-Z])([A-HJ-NP-V])")
_BANDS = "CDEFGHJKLMNPQRSTUVWX"  # of 8 degrees from 80 S, the last of 12
_COLUMNS = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")  # of 100 km squares, by zone modulo 3
_ROWS = "ABCDEFGHJKLMNPQRSTUV"  # from the equator in odd zones, from F in even ones; the same again every 2,000 km
_METRES_A_DEGREE = 111_000.0  # enough to tell one cycle of rows from the next
_EDGE_POINTS = 33  # along each edge of a grid: an edge of 110 km is straight in degrees to some metres between them


def check_box(box: Box) -> Box:
    """The box as floats, with longitudes from -180 to 180; those from 0 to 360 are taken as well.

    Raises:
        PrepError: not four finite numbers in degrees, or south of its own southern edge.
    """
    values = tuple(float(number) for number in box)
    if len(values) != 4 or not np.isfinite(values).all():
        raise PrepError(f"box {box}: expected four numbers, west south east north, in degrees")
    west, south, east, north = values
    if not (-360 <= west <= 360 and -360 <= east <= 360 and -90 <= south < north <= 90):
        raise PrepError(
            f"box {box}: expected west and east within -180..180 or 0..360 and south < north within -90..90 degrees; "
            "west > east means across the antimeridian"
        )
    if max(abs(west), abs(east)) > 180:
        if east - west >= 360:
            return -180.0, south, 180.0, north
        west, east = (west + 180) % 360 - 180, 180 - (180 - east) % 360
    return west, south, east, north


def in_box(lon: np.ndarray, lat: np.ndarray, box: Box) -> np.ndarray:
    """Which points lie in a box, its edges included: bool of the points' shape. NaN lies nowhere.

    Longitudes may run from -180 to 180 or from 0 to 360; those of the box are as `check_box` gives them.
    """
    west, south, east, north = box
    lon = np.where(lon > 180, lon - 360, lon)  # longitudes from 0 to 360
    across = (lon >= west) & (lon <= east) if west <= east else (lon >= west) | (lon <= east)
    return across & (lat >= south) & (lat <= north)


def tile_grid(tile: str) -> Grid:
    """The grid of an HLS tile from its MGRS name: 3660 x 3660 pixels in its UTM zone, as a *north* zone.

    The tile begins at its 100 km square's upper-left corner, rounded outwards to 60 m, and reaches 9.8 km into the
    squares to the east and south. Rows of squares south of the equator have negative northings here.

    Args:
        tile: for example `10SFF` or `T10SFF`.

    Raises:
        PrepError: no such tile.
    """
    match = _TILE.fullmatch(tile)
    zone = int(match[1]) if match else 0
    columns = _COLUMNS[zone % 3]
    if match is None or not 1 <= zone <= 60 or match[3] not in columns:
        hint = f"; zone {zone} has the columns {columns}" if match else ""
        raise PrepError(f"tile {tile!r}: expected an MGRS tile of 100 km such as 10SFF{hint}")
    left = (columns.index(match[3]) + 1) * 100_000
    row = (_ROWS.index(match[4]) - (0 if zone % 2 else 5)) % len(_ROWS)
    middle = (-76 + 8 * _BANDS.index(match[2])) * _METRES_A_DEGREE
    bottom = row * 100_000 + 2_000_000 * round((middle - row * 100_000 - 50_000) / 2_000_000)
    corner = (left // 60 * 60, -(-(bottom + 100_000) // 60) * 60)
    transform = Affine(PIXEL_M, 0, corner[0], 0, -PIXEL_M, corner[1])
    return Grid(TILE_PIXELS, TILE_PIXELS, RasterCRS.from_epsg(32600 + zone), transform)


def transformer(grid: Grid) -> Transformer:
    """From longitude, latitude (in this order) to x, y of the grid's own CRS.

    Raises:
        PrepError: the grid has no CRS.
    """
    if grid.crs is None:
        raise PrepError(f"{grid.describe()}: footprints can't be placed without a CRS")
    return _transformer(grid.crs.to_wkt())


@functools.lru_cache(maxsize=128)
def _transformer(wkt: str) -> Transformer:
    return Transformer.from_crs(CRS.from_epsg(4326), CRS.from_wkt(wkt), always_xy=True)


def grid_centre(grid: Grid) -> tuple[float, float]:
    """Longitude and latitude of a grid's centre, degrees."""
    t = grid.transform
    x = t.c + t.a * grid.width / 2 + t.b * grid.height / 2
    y = t.f + t.d * grid.width / 2 + t.e * grid.height / 2
    lon, lat = transformer(grid).transform(x, y, direction="INVERSE")
    return float(lon), float(lat)


def grid_box(grid: Grid, *, margin: float = 100.0) -> Box:
    """The box around a grid, grown by `margin` (units of its CRS) on all sides; west > east across the antimeridian."""
    t = grid.transform
    line, ones = np.linspace(0, 1, _EDGE_POINTS), np.ones(_EDGE_POINTS)
    beyond = margin / abs(t.a)
    along = np.concatenate([line, line, 0 * ones, ones]) * (grid.width + 2 * beyond) - beyond
    down = np.concatenate([0 * ones, ones, line, line]) * (grid.height + 2 * beyond) - beyond
    x, y = t.c + t.a * along + t.b * down, t.f + t.d * along + t.e * down
    lon, lat = transformer(grid).transform(x, y, direction="INVERSE")
    middle = grid_centre(grid)[0]
    lon = (lon - middle + 180) % 360 - 180 + middle  # no jump of 360 degrees inside the tile
    west, east = ((edge + 180) % 360 - 180 for edge in (lon.min(), lon.max()))
    return float(west), float(lat.min()), float(east), float(lat.max())


def boxes_meet(one: Box, other: Box) -> bool:
    """Whether two boxes share a point."""
    if one[3] < other[1] or other[3] < one[1]:
        return False
    return any(a <= d and c <= b for a, b in _spans(one) for c, d in _spans(other))


def _spans(box: Box) -> list[tuple[float, float]]:
    west, _, east, _ = box
    return [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
