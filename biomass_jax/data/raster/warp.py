"""Maps onto other grids by area: what a map is, windows of its bands, and GDAL's sums over the pixels of a grid.

Of GDAL's resamplings only `sum` is exact here: it cuts each pixel of the map, as it lies in the new CRS, along the
pixels of the new grid, and shares it out by area. `average` takes the upright box between two corners of a new pixel:
at 60 degrees north on EPSG:6933, whose pixels are turned by some degrees, narrower than the map's and longer, single
ones come out wrong by up to a tenth. So means are sums of values over sums of ones.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from affine import Affine
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from biomass_jax.data.raster.grid import Grid, grid_of, open_quietly, raster_errors, utm_zone
from biomass_jax.data.raster.identity import identity_of
from biomass_jax.data.raster.image import hidden_pixels
from biomass_jax.errors import RasterError

MOST_PIXELS = 2**19  # of a map that are warped at once
_AT_ONCE = (128, 512)  # rows and columns of a warped raster that GDAL makes in one go
_SIDE_POINTS = 32  # along each side of an outline: sides that are straight in one CRS bulge in another
_AROUND = 2  # pixels of a map around the part that is warped
Part = tuple[int, int, int, int]  # of a grid: top, left, bottom, right, in rows and columns
_FINEST, _COARSEST = 0.01, 512.0**2  # area of a new pixel, in pixels of the map
_WGS84 = "EPSG:4326"
_UNNAMED = re.compile(r"band \d+|.* \(band \d+\)")
# Equal-area like EPSG:6933, and cut at Greenwich in place of the antimeridian.
PACIFIC = "+proj=cea +lat_ts=30 +lon_0=180 +datum=WGS84 +units=m"


@dataclass(frozen=True)
class MapFile:
    """A map on disk, north up, every band of it with a name.

    Attributes:
        path: of the file.
        grid: of its pixels.
        layers: name and unit of each band, in order.
        nodata: the value that stands for none; NaN where there is no such value.
        tags: texts of the file.
        identity: a digest that changes when the file does.
    """

    path: str
    grid: Grid
    layers: Mapping[str, str]
    nodata: float
    tags: Mapping[str, str]
    identity: str

    def read(self, layers: Sequence[str], window: Part) -> tuple[np.ndarray, np.ndarray]:
        """A window of its pixels.

        Args:
            layers: names of bands.
            window: top, left, bottom and right inside of the map, in rows and columns.

        Returns:
            Values (layers, rows, columns), 0 where there are none, and whether there are: bool (rows, columns). A pixel
            without data in one band, not a finite number or masked, has none in any.

        Raises:
            RasterError: it can't be read, or is another file than it was.
        """
        top, left, bottom, right = window
        frame = Window(left, top, right - left, bottom - top)
        with raster_errors(self.path), open_quietly(self.path) as dataset:
            if identity_of(dataset).files != self.identity:
                raise RasterError(
                    f"{self.path}: changed while it was being read; give the same command again once it is whole"
                )
            numbers = [list(self.layers).index(name) + 1 for name in layers]
            values = dataset.read(numbers, window=frame)
            hidden = hidden_pixels(dataset, numbers, {"window": frame})
        valid = (np.isfinite(values) & (values != self.nodata)).all(axis=0)
        if hidden is not None:
            valid &= ~hidden.any(axis=0)
        return np.where(valid, values, 0), valid


def map_file(path: str | os.PathLike[str]) -> MapFile:
    """What a map is; its pixels are left for later.

    Raises:
        RasterError: it can't be opened, has no CRS, no no-data value or isn't north up; a band has no name, or two have
            the same.
    """
    one, _ = _described(os.fspath(path))
    names = list(one.layers)
    if any(_UNNAMED.fullmatch(name) for name in names):
        raise RasterError(
            f"{one.path}: its bands are called {', '.join(names)}; expected a name for each, such as agbd, agbd_sd"
        )
    if math.isnan(one.nodata):
        raise RasterError(f"{one.path}: it has no no-data value; expected one, as maps of biomass-jax predict have")
    return one


def other_raster(path: str | os.PathLike[str]) -> MapFile:
    """What a raster of somebody else's is; its pixels are left for later.

    Bands without a name are called `band 1`, `band 2` ..., those with the name of another `NAME (band 3)`; `nodata` is
    NaN where it has none.

    Raises:
        RasterError: it can't be opened, has no CRS, isn't north up, or its values are stored with a scale or an offset.
    """
    one, scaled = _described(os.fspath(path))
    if scaled:
        raise RasterError(f"{one.path}: its values are stored with a scale or an offset; write them as they are first")
    return one


def _described(name: str) -> tuple[MapFile, bool]:
    """What a raster is, and whether its values are stored with a scale or an offset."""
    with raster_errors(name), open_quietly(name) as dataset:
        grid, names, units = grid_of(dataset), dataset.descriptions, dataset.units
        nodata, identity = dataset.nodata, identity_of(dataset).files
        tags = {key: sys.intern(text) for key, text in dataset.tags().items()}  # thousands of maps have the same ones
        scaled = any(pair != (1, 0) for pair in zip(dataset.scales, dataset.offsets, strict=True))
    if grid.crs is None:
        raise RasterError(f"{name}: it has no CRS, so nothing tells where it lies")
    t = grid.transform
    if t.a <= 0 or t.e >= 0 or t.b or t.d:
        raise RasterError(
            f"{name}: it isn't north up ({grid.describe()}); bring it to an upright grid first (gdalwarp)"
        )
    own = [
        f"band {number}" if not one else one if names.count(one) == 1 else f"{one} (band {number})"
        for number, one in enumerate(names, 1)
    ]
    layers = dict(zip(own, (unit or "" for unit in units), strict=True))
    return MapFile(name, grid, layers, math.nan if nodata is None else nodata, tags, identity), scaled


def crs_of(text: str) -> CRS:
    """A CRS from what rasterio reads: `EPSG:6933`, PROJ's or WKT's words. RasterError where it is none."""
    with raster_errors(f"CRS {text!r}"):
        return CRS.from_user_input(text)


@dataclass(frozen=True)
class PixelLattice:
    """The endless grid of pixels that a map is a part of; equal for maps whose pixels fall on each other.

    Attributes:
        key: of its CRS.
        across, down: of a pixel, in units of the CRS; `down` is negative.
        x, y: of a corner of a pixel near the origin of the CRS, in its units.
        crs: its CRS.
    """

    key: object
    across: float
    down: float
    x: float
    y: float
    crs: CRS = field(compare=False)

    def place(self, grid: Grid) -> tuple[int, int]:
        """Row and column of the upper-left pixel of a grid that is part of it."""
        t = grid.transform
        return round((t.f - self.y) / self.down), round((t.c - self.x) / self.across)

    def grid(self, top: int, left: int, bottom: int, right: int) -> Grid:
        """The part of it from a row and a column to others, which don't belong to it."""
        x, y = self.x + left * self.across, self.y + top * self.down
        return Grid(bottom - top, right - left, self.crs, Affine(self.across, 0, x, 0, self.down, y))

    def cover(self, grid: Grid) -> Part | None:
        """Top, left, bottom and right of its part that covers a grid of any CRS; None where it can't.

        A grid that is part of it is covered by itself, any other with some pixels around it.
        """
        if lattice_of(grid) == self:
            top, left = self.place(grid)
            return top, left, top + grid.height, left + grid.width
        with raster_errors(grid.describe()):
            x, y = (np.array(axis) for axis in warp.transform(grid.crs, self.crs, *grid.ring(_SIDE_POINTS)))
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any():
            return None
        columns, rows = (x[known] - self.x) / self.across, (y[known] - self.y) / self.down
        low, high = np.floor([rows.min(), columns.min()]), np.ceil([rows.max(), columns.max()])
        return (*(int(one) - _AROUND for one in low), *(int(one) + _AROUND for one in high))  # type: ignore[return-value]


def lattice_of(grid: Grid) -> PixelLattice:
    """The lattice of a grid that is north up; places are told to some ten-thousandths of a pixel."""
    t = grid.transform
    digits = 4 - math.floor(math.log10(t.a))
    x, y = (round(start % step, digits) % round(step, digits) for start, step in ((t.c, t.a), (t.f, -t.e)))
    return PixelLattice(
        utm_zone(grid.crs) or (grid.crs and grid.crs.to_wkt()), round(t.a, 9), round(t.e, 9), x, y, grid.crs
    )


@dataclass(frozen=True)
class Placed:
    """A map in another CRS: left, bottom, right and top of its outline, and its middle in degrees."""

    bounds: tuple[float, float, float, float]
    longitude: float
    latitude: float


def place(grid: Grid, crs: CRS, pixel: float, name: str) -> Placed:
    """Where a grid lies in another CRS.

    Args:
        grid: of a map, with a CRS.
        crs: the other one.
        pixel: edge of the new pixels, in units of the other CRS.
        name: of the map, for messages.

    Raises:
        RasterError: it doesn't lie there whole, is cut in two, as at the antimeridian, or new pixels are far larger or
            smaller than its own.
    """
    ring = grid.ring(_SIDE_POINTS)
    t, (row, column) = grid.transform, (grid.height // 2, grid.width // 2)
    corner = Affine(t.a, t.b, t.c + t.a * column + t.b * row, t.d, t.e, t.f + t.d * column + t.e * row)
    middle = Grid(1, 1, grid.crs, corner).ring(1)
    with raster_errors(name):
        x, y = (np.array(axis) for axis in warp.transform(grid.crs, crs, *ring))
        one = np.array(warp.transform(grid.crs, crs, *middle))
        lon, _ = (np.array(axis) for axis in warp.transform(grid.crs, _WGS84, *ring))
        here = [axis[0] for axis in warp.transform(grid.crs, _WGS84, *middle)]
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(lon).all()):
        raise RasterError(f"{name}: parts of it lie nowhere in {crs.to_string()}; give a CRS for that place (--crs)")
    if _cut(crs, lon, x, y):
        raise RasterError(f"{name}: {crs.to_string()} cuts it in two at the antimeridian; {_INSTEAD}")
    own = abs(np.sum(one[0] * np.roll(one[1], -1) - np.roll(one[0], -1) * one[1])) / 2
    if not _FINEST <= pixel**2 / own <= _COARSEST:
        raise RasterError(
            f"{name}: its pixels are {own**0.5:.4g} wide in the units of {crs.to_string()}, and the new ones are to be "
            f"{pixel:g}; expected {_FINEST**0.5:g} to {_COARSEST**0.5:g} times as much (--pixel)"
        )
    return Placed((x.min(), y.min(), x.max(), y.max()), *here)


_INSTEAD = f"give another CRS, such as --crs '{PACIFIC}', which is equal-area, too"


def check_together(crs: CRS, placed: Sequence[Placed], names: Sequence[str]) -> None:
    """Refuse maps on both sides of where a CRS is cut: their grid would go around the Earth for a half of it or less.

    Raises:
        RasterError: two of them have the cut between them.
    """
    lon = np.array([one.longitude for one in placed])
    order = np.argsort(lon, kind="stable")
    gaps = np.diff(lon[order], append=lon[order[0]] + 360)
    if gaps.max() < 180:
        return
    order = np.roll(order, -int(np.argmax(gaps)) - 1)  # from west to east, beginning behind the widest gap
    x, y = (np.array([one.bounds[side] + one.bounds[side + 2] for one in placed]) / 2 for side in (0, 1))
    for west, east in zip(order[:-1], order[1:], strict=True):
        pair = [west, east]
        if _cut(crs, lon[pair], x[pair], y[pair]):
            raise RasterError(
                f"{names[west]}, {names[east]}: they lie on both sides of the antimeridian, where {crs.to_string()} is "
                f"cut; {_INSTEAD}"
            )


def _cut(crs: CRS, lon: np.ndarray, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether a CRS is cut between neighbours of a ring: half way from one to the other lies far from both."""
    with raster_errors(crs.to_string()):
        half = warp.transform(crs, _WGS84, (x + np.roll(x, -1)) / 2, (y + np.roll(y, -1)) / 2)[0]
    step = (np.roll(lon, -1) - lon + 180) % 360 - 180
    off = (np.array(half) - lon - step / 2 + 180) % 360 - 180
    return bool((~(np.abs(off) < 90)).any())


def snapped(bounds: Sequence[tuple[float, float, float, float]], crs: CRS, pixel: float) -> Grid:
    """The grid over bounds (left, bottom, right, top) whose edges are whole multiples of the pixel."""
    left, bottom, right, top = (np.array(side) / pixel for side in zip(*bounds, strict=True))
    near = 1e-6  # of a pixel: nothing that rounding left over gets a pixel of its own
    first, last = int(np.floor(left.min() + near)), int(np.ceil(right.max() - near))
    high, low = int(np.ceil(top.max() - near)), int(np.floor(bottom.min() + near))
    return Grid(high - low, last - first, crs, Affine(pixel, 0, first * pixel, 0, -pixel, high * pixel))


def part_of(grid: Grid, top: int, left: int, bottom: int, right: int) -> Grid:
    """Part of an upright grid, from a row and a column to others, which don't belong to it."""
    t = grid.transform
    return Grid(bottom - top, right - left, grid.crs, Affine(t.a, 0, t.c + left * t.a, 0, t.e, t.f + top * t.e))


def places_of(grid: Grid, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of the middles of pixels of an upright grid with a CRS, (n,) each.

    Raises:
        RasterError: a pixel that lies nowhere on Earth.
    """
    t = grid.transform
    with raster_errors(grid.describe()):
        x, y = t.c + t.a * (columns + 0.5), t.f + t.e * (rows + 0.5)
        lon, lat = (np.array(axis) for axis in warp.transform(grid.crs, _WGS84, x, y))
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):  # GDAL tells the first such errors of a process only
        raise RasterError(f"{grid.describe()}: some of its pixels lie nowhere on Earth")
    return lon, lat


def area_means(values: np.ndarray, valid: np.ndarray, source: Grid, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Means over the pixels of a grid, by the area of what each source pixel has in them.

    Args:
        values: (layers, rows, columns).
        valid: bool (rows, columns), where there are some.
        source: their grid, which covers the other one.
        grid: the other one.

    Returns:
        float64 means (layers, height, width), 0 where nothing is valid, and the valid share of each pixel's area.

    Raises:
        RasterError: GDAL can't bring one grid to the other.
    """
    if source.same_as(grid, 1e-3):
        return np.where(valid, values, 0).astype(np.float64), valid.astype(np.float64)
    given = np.concatenate([np.where(valid, values, 0), valid[None], np.ones_like(valid)[None]], dtype=np.float64)
    sums = np.zeros((len(given), grid.height, grid.width))
    with raster_errors(source.describe()):
        for (top, left, bottom, right), (high, west, low, east), frame in _pieces(source, grid):
            if not valid[high:low, west:east].any():
                continue
            piece = _sums(given[:, high:low, west:east], part_of(source, high, west, low, east), part_of(grid, *frame))
            rows, columns = slice(top - frame[0], bottom - frame[0]), slice(left - frame[1], right - frame[1])
            sums[:, top:bottom, left:right] = piece[:, rows, columns]
    covered, whole = sums[-2:]
    share = np.minimum(covered / np.where(whole > 0, whole, 1), 1.0)
    return sums[:-2] / np.where(covered > 0, covered, 1), share


def _pieces(source: Grid, grid: Grid) -> Iterator[tuple[Part, Part, Part]]:
    """Parts of a grid that GDAL can do at once, the part of the source that covers each, and the grid around that."""
    lattice, waiting = lattice_of(source), [(0, 0, grid.height, grid.width)]
    row, column = lattice.place(source)
    while waiting:
        part = top, left, bottom, right = waiting.pop()
        cover = lattice.cover(part_of(grid, *part))
        if cover is None:
            continue
        high, west = max(cover[0] - row, 0), max(cover[1] - column, 0)
        low, east = min(cover[2] - row, source.height), min(cover[3] - column, source.width)
        x, y = warp.transform(source.crs, grid.crs, *part_of(source, high, west, low, east).ring(_SIDE_POINTS))
        t = grid.transform
        columns, rows = (np.array(x) - t.c) / t.a, (np.array(y) - t.f) / t.e
        columns, rows = columns[np.isfinite(columns)], rows[np.isfinite(rows)]
        # GDAL's `sum` is wrong about pixels of the source that reach beyond the grid: here none does.
        frame = (
            math.floor(min(rows.min(), top)) - 1,
            math.floor(min(columns.min(), left)) - 1,
            math.ceil(max(rows.max(), bottom)) + 1,
            math.ceil(max(columns.max(), right)) + 1,
        )
        tall, wide = (frame[2] - frame[0]) / _AT_ONCE[0], (frame[3] - frame[1]) / _AT_ONCE[1]
        if max(tall, wide) <= 1 or (bottom - top) * (right - left) == 1:
            yield part, (high, west, low, east), frame
        elif (tall > wide and bottom - top > 1) or right - left == 1:
            waiting += [(top, left, (top + bottom) // 2, right), ((top + bottom) // 2, left, bottom, right)]
        else:
            waiting += [(top, left, bottom, (left + right) // 2), (top, (left + right) // 2, bottom, right)]


def _sums(given: np.ndarray, source: Grid, grid: Grid) -> np.ndarray:
    """Sums of (layers, rows, columns) over the pixels of a grid of one block, by area."""
    form = {"count": len(given), "height": source.height, "width": source.width, "dtype": given.dtype.name}
    target = {"crs": grid.crs, "transform": grid.transform, "height": grid.height, "width": grid.width}
    with MemoryFile() as file:
        with file.open(driver="GTiff", crs=source.crs, transform=source.transform, **form) as made:
            made.write(given)
        # By default places may be off by an eighth of a pixel; 0 GDAL doesn't take.
        with file.open() as made, WarpedVRT(made, resampling=Resampling.sum, tolerance=1e-9, **target) as warped:
            found: np.ndarray = warped.read()
    return found
