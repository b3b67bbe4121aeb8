"""What reading and writing of rasters share: the error, the grid, GDAL's settings, quiet opening."""

import functools
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from rasterio import warp
from rasterio._env import del_gdal_config
from rasterio._err import CPLE_BaseError  # GDAL's own errors reach the caller as these; there is no public name
from rasterio.crs import CRS
from rasterio.env import get_gdal_config
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError, RasterioIOError

from biomass_jax.errors import RasterError
from biomass_jax.runtime import environment
from biomass_jax.runtime.content import TIFF, mistaken

_EQUAL_AREA = 6933  # EASE-Grid 2.0, the whole Earth but the poles
CACHE_BYTES = 256 * 2**20  # GDAL's block cache; its default is a share of the machine's memory
# What bears on results is set here, so that it is the same whatever the shell says. First where GDAL does otherwise:
SETTINGS: dict[str, Any] = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",
    # Far files: five tries within seconds, and no wait without an end.
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_DELAY": "0.5",  # seconds, doubled at each further try
    "GDAL_HTTP_RETRY_CODES": "ALL",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_TIMEOUT": "120",  # for a few MB
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",  # bytes a second
}
# Then GDAL's own defaults, where something else was set.
_DEFAULTS = {
    # GDAL only prints what goes wrong in its threads, and takes the block before for one that didn't come.
    "GDAL_NUM_THREADS": "1",
    "VRT_NUM_THREADS": "1",
    "OPJ_NUM_THREADS": "1",
    # Side-cars are looked for, beside the file.
    "GDAL_PAM_ENABLED": "YES",
    "GDAL_PAM_PROXY_DIR": "",
    "GDAL_DISABLE_READDIR_ON_OPEN": "FALSE",
    "GDAL_READDIR_LIMIT_ON_OPEN": "1000",
    "GDAL_GEOREF_SOURCES": "PAM,INTERNAL,TABFILE,WORLDFILE",
    "GDAL_TIFF_INTERNAL_MASK_TO_8BIT": "YES",
    "GTIFF_POINT_GEO_IGNORE": "NO",
    "GTIFF_HONOUR_NEGATIVE_SCALEY": "NO",
    "GTIFF_REPORT_COMPD_CS": "NO",
    "GTIFF_SRS_SOURCE": "",
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "GTIFF_DIRECT_IO": "NO",
    "GTIFF_VIRTUAL_MEM_IO": "NO",
    "VSI_CACHE": "FALSE",
    "CPL_VSIL_CURL_CHUNK_SIZE": "16384",
    "PROJ_NETWORK": "OFF",
}
_AUTHALIC = "EPSG:6933"  # equal-area on WGS 84's ellipsoid: areas in its plane are those on the ground
_WORLD = 2 * 17_367_530.445161372  # its width in metres
_PATCH = 200.0  # metres, over which the ground area of pixels is taken as even
SOUTHERN_NORTHING = 1e7
_WGS84 = "EPSG:4326"  # a name: to look it up here would be an error of PROJ's at import
EQUATOR_RADIUS, ECCENTRICITY2 = 6_378_137.0, 0.00669437999014  # of WGS 84's ellipsoid, metres and squared
_OPENING = threading.Lock()  # warning filters belong to the process, not to a thread


@dataclass(frozen=True)
class Grid:
    """Size and place of a raster.

    Attributes:
        height: rows.
        width: columns.
        crs: rasterio CRS, or None.
        transform: affine from (column, row) of a pixel's upper-left corner to x, y; the identity where unknown.
    """

    height: int
    width: int
    crs: CRS | None
    transform: Affine

    def same_as(self, other: "Grid", tolerance: float = 0.01) -> bool:
        """Whether both are the same pixels on the ground, corners within `tolerance` pixels.

        CRSs are compared by what they mean: a UTM zone with or without an EPSG code, and a southern tile given in the
        north zone with negative northings, are the same ground as the usual southern zone.
        """
        if (self.height, self.width) != (other.height, other.width):
            return False
        mine, theirs = utm_zone(self.crs), utm_zone(other.crs)
        shift = 0.0
        if mine is not None and theirs is not None:
            if mine[0] != theirs[0]:
                return False
            shift = mine[1] - theirs[1]
        elif self.crs != other.crs:
            return False
        size = max(abs(self.transform.a), abs(self.transform.b), abs(self.transform.e), abs(self.transform.d))
        for corner in ((0, 0), (self.width, 0), (0, self.height), (self.width, self.height)):
            x, y = _place(self.transform, *corner)
            other_x, other_y = _place(other.transform, *corner)
            if max(abs(x - other_x), abs(y - shift - other_y)) > tolerance * size:
                return False
        return True

    def pixel_size(self) -> tuple[float, float] | None:
        """Width and height in metres on the ground of the pixel in the middle, None without a CRS.

        Where the CRS's own units agree with the ground within 1 %, as UTM's do, they are taken: 30 m stay 30 m.

        Raises:
            RasterError: the middle is nowhere on Earth.
        """
        if self.crs is None:
            return None
        t = self.transform
        column, row = self.width / 2, self.height / 2
        ends = [_place(t, column + dx, row + dy) for dx, dy in ((-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5))]
        try:
            lon, lat = (np.radians(axis) for axis in warp.transform(self.crs, _WGS84, *zip(*ends, strict=True)))
        except (RasterioError, CRSError, CPLE_BaseError) as error:
            raise RasterError(f"{self.describe()}: its place can't be told: {error}") from error
        if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
            raise RasterError(f"{self.describe()}: its place is nowhere on Earth")
        # Lengths of a radian along a meridian and a parallel of the ellipsoid at that latitude.
        flat = 1 - ECCENTRICITY2 * np.sin(lat.mean()) ** 2
        along_meridian = EQUATOR_RADIUS * (1 - ECCENTRICITY2) / flat**1.5
        along_parallel = EQUATOR_RADIUS / flat**0.5 * np.cos(lat.mean())
        east = ((np.diff(lon)[::2] + np.pi) % (2 * np.pi) - np.pi) * along_parallel  # across the date line, too
        ground = np.hypot(east, np.diff(lat)[::2] * along_meridian)
        if self.crs.is_projected:
            own = np.hypot([t.a, t.b], [t.d, t.e]) * self.crs.linear_units_factor[1]
            ground = np.where(np.abs(own / ground - 1) < 0.01, own, ground)
        return float(ground[0]), float(ground[1])

    def coarser(self, across: float, down: float) -> "Grid":
        """The grid of pixels so many times as wide and high, from the same corner; what is left over is cut off."""
        t = self.transform
        transform = Affine(t.a * across, t.b * down, t.c, t.d * across, t.e * down, t.f)
        return Grid(max(int(self.height / down), 1), max(int(self.width / across), 1), self.crs, transform)

    def rows(self, start: int, stop: int, margin: int = 0) -> "Grid":
        """The grid of some rows, with so many pixels more on every side, which may lie outside of this one."""
        x, y = _place(self.transform, -margin, start - margin)
        t = self.transform
        corner = Affine(t.a, t.b, x, t.d, t.e, y)
        return Grid(stop - start + 2 * margin, self.width + 2 * margin, self.crs, corner)

    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) of all pixels, in the CRS's units."""
        x, y = zip(*(_place(self.transform, i, j) for i in (0, self.width) for j in (0, self.height)), strict=True)
        return min(x), min(y), max(x), max(y)

    def ring(self, side_points: int) -> tuple[np.ndarray, np.ndarray]:
        """x and y of points along its outline, so many on each side; counterclockwise where north is up, not closed."""
        steps = np.arange(side_points) / side_points
        zero, one = np.zeros_like(steps), np.ones_like(steps)
        column = np.concatenate([zero, steps, one, 1 - steps]) * self.width
        row = np.concatenate([steps, one, 1 - steps, zero]) * self.height
        t = self.transform
        return t.a * column + t.b * row + t.c, t.d * column + t.e * row + t.f

    def describe(self) -> str:
        """Size, upper-left corner, pixel size and CRS in words."""
        t = self.transform
        return (
            f"{self.height} x {self.width} pixels of {t.a:g} x {t.e:g} at ({t.c:.10g}, {t.f:.10g}), "
            f"{'no CRS' if self.crs is None else self.crs.to_string()}"
        )


def _place(t: Affine, column: float, row: float) -> tuple[float, float]:
    # by hand: affine 2 knows only `transform * point`, affine 3 deprecates it
    return t.a * column + t.b * row + t.c, t.d * column + t.e * row + t.f


def utm_zone(crs: CRS | None) -> tuple[int, float] | None:
    """(zone, false northing) of a WGS 84 UTM CRS however it is spelled, None for any other CRS."""
    if crs is None:
        return None
    fields = crs.to_dict()
    if "WGS84" not in (fields.get("datum"), fields.get("ellps")) or fields.get("units", "m") != "m":
        return None
    if fields.get("proj") == "utm":
        return int(fields["zone"]), SOUTHERN_NORTHING if fields.get("south") else 0.0
    if fields.get("proj") != "tmerc" or fields.get("lat_0", 0) != 0:
        return None
    zone = (fields.get("lon_0", 0) + 183) / 6
    if fields.get("k", fields.get("k_0")) != 0.9996 or fields.get("x_0") != 500000 or zone != int(zone):
        return None
    return int(zone), float(fields.get("y_0", 0))


def equal_area_blocks(epsg: int, x: np.ndarray, y: np.ndarray, block_km: float) -> list[str]:
    """Names `column_row` of the blocks of an equal-area grid (EPSG:6933) in which places lie.

    Args:
        epsg: code of the places' CRS; 4326 for longitudes and latitudes.
        x: (n,) in it, or longitudes.
        y: (n,) in it, or latitudes.
        block_km: square root of a block's area; on the ground blocks are square at 30 degrees of latitude.

    Raises:
        RasterError: no such CRS, or a place that can't be on the Earth.
    """
    try:
        places = warp.transform(CRS.from_epsg(epsg), CRS.from_epsg(_EQUAL_AREA), [*map(float, x)], [*map(float, y)])
    except (CRSError, CPLE_BaseError) as error:
        raise RasterError(f"EPSG:{epsg}: can't be brought to EPSG:{_EQUAL_AREA}: {error}") from error
    columns, rows = (np.floor(np.array(place) / (block_km * 1000)) for place in places[:2])
    if (lost := ~np.isfinite(columns + rows)).any():
        first = int(np.argmax(lost))
        raise RasterError(f"EPSG:{epsg}: found x {x[first]}, y {y[first]}, expected a place on the Earth")
    return [f"{column:.0f}_{row:.0f}" for column, row in zip(columns, rows, strict=True)]


def epsg_code(crs: CRS, path: str) -> int:
    """The EPSG code of a raster's CRS; that of the UTM zone for WGS 84 UTM without one.

    Args:
        crs: rasterio CRS or None.
        path: the raster, for messages.

    Raises:
        RasterError: no CRS, or one without a code that is no WGS 84 UTM zone.
    """
    if crs is None:
        raise RasterError(f"{path}: found no CRS, expected the UTM zone of an HLS tile")
    zone = utm_zone(crs)
    if zone is not None and zone[1] in (0.0, SOUTHERN_NORTHING):
        return (32700 if zone[1] else 32600) + zone[0]
    code = crs.to_epsg()
    if code is None:
        raise RasterError(f"{path}: found a CRS without an EPSG code that is no UTM zone of WGS 84: {crs.to_string()}")
    return int(code)


class _Listener(logging.Filter):
    """Hears the errors that GDAL signals, which rasterio only logs where GDAL calls its work done all the same."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.local()
        self._levels: dict[str, int] = {}
        for name in ("rasterio._env", "rasterio._err"):
            log = logging.getLogger(name)
            self._levels[name] = log.level
            log.setLevel(logging.INFO)  # which it logs them at
            log.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep an error for the piece of work of this thread; whether the record is shown is as it was."""
        text = record.getMessage()
        if record.levelno >= logging.ERROR or text.startswith("GDAL signalled an error"):
            for heard in self._thread.__dict__.get("work", ())[-1:]:
                heard.append(str(record.args[-1]) if isinstance(record.args, tuple) and record.args else text)
        level = self._levels[record.name] or logging.getLogger("rasterio").getEffectiveLevel()
        return record.levelno >= level

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        """A list of the errors that this thread's work meets meanwhile."""
        work: list[list[str]] = self._thread.__dict__.setdefault("work", [])
        work.append([])
        try:
            yield work[-1]
        finally:
            work.pop()


_listener = _Listener()


@contextmanager
def raster_errors(name: str, options: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a piece of GDAL work with this module's settings; its errors become RasterErrors that name the file.

    So do errors after which GDAL goes on, with a block that it has not read, or without a side-car that is damaged.

    Args:
        name: what messages call it.
        options: GDAL's settings for this piece of work alone, such as a server's login.
    """
    with _listener.listening() as heard:
        try:
            other = {key: value for key in _DEFAULTS if (value := get_gdal_config(key, normalize=False))}
            try:
                with rasterio.Env(**{**SETTINGS, **{key: _DEFAULTS[key] for key in other}, **(options or {})}):
                    yield
            finally:
                for option, value in other.items():
                    if os.environ.get(option) == value:  # rasterio would put it back for good
                        del_gdal_config(option)
        except (RasterioError, CRSError, CPLE_BaseError, OSError) as error:
            # rasterio's own message for a failed read or write only points to GDAL's, whose first word names the cause
            raise RasterError(_failure(name, [*heard, str(error.__cause__ or error)][0])) from error
        if heard:
            raise RasterError(_failure(name, heard[0]))


def _failure(name: str, cause: str) -> str:
    """What failed and why, without what a URL keeps secret."""
    cause = re.sub(r"(?<=://)[^\s/'@]*@|\?[^\s']*(?=')", "", cause)
    why = environment.explain(cause)
    if why is None and ("://" in name or name.startswith("/vsi")):
        why = "the server failed, or the connection broke: give the same command again later"
    return f"{name}: {cause}" if why is None else f"{name}: {cause}; {why}"


@functools.cache
def _check_proj() -> None:
    with raster_errors("PROJ"):
        CRS.from_epsg(4326)


def open_quietly(path: str, mode: str = "r", **options: object) -> Any:
    """`rasterio.open` without its warning about a raster without a georeference, which the callers report.

    Raises:
        RasterioIOError: GDAL can't open it.
        RasterError: nor could anybody: a local file of another kind; its side-car `.aux.xml` is damaged, which GDAL
            would pass over together with the no-data in it; or PROJ has no data, without which GDAL goes on with CRSs
            that have lost their codes.
    """
    _check_proj()
    if mode == "r" and os.path.isfile(side_car := f"{path}.aux.xml"):
        try:
            ElementTree.parse(side_car)
        except ElementTree.ParseError as error:
            raise RasterError(f"{side_car}: damaged: {error}; mend it, or remove it where it isn't needed") from error
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            return rasterio.open(path, mode, **options)
        except RasterioIOError as error:
            meaning = mistaken(path, *TIFF) if mode == "r" and "not recognized" in str(error) else None
            if meaning is None:
                raise
            raise RasterError(f"{path}: not recognized as a raster, it is {meaning}") from error


def grid_of(dataset: rasterio.DatasetReader) -> Grid:
    """The grid of an open dataset."""
    return Grid(dataset.height, dataset.width, dataset.crs or None, dataset.transform)


@functools.lru_cache(64)
def transformer(source: str, target: str) -> Any:
    """PROJ's way from one CRS to another, x or longitude first; made once each."""
    from pyproj import Transformer

    return Transformer.from_crs(source, target, always_xy=True)


def pixel_areas(grid: Grid, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Areas of pixels on WGS 84's ellipsoid.

    Corners are brought to an equal-area plane. There, patches of some hundred metres are measured, and
    their pixels share the patch evenly: the scale of a CRS changes by less than 1e-5 within.

    Args:
        grid: of the map, with a CRS.
        row: the first of the window.
        column: likewise.
        height: rows of the window.
        width: columns of the window.

    Returns:
        (height, width) hectares.

    Raises:
        RasterError: a window that lies nowhere on Earth.
    """
    size = grid.pixel_size()
    if grid.crs is None or size is None:
        raise RasterError(f"{grid.describe()}: nothing tells how large its pixels are on the ground")
    step = int(np.clip(_PATCH / max(size), 1, 64))
    rows, columns = (
        np.unique(np.append(np.arange(start, start + count, step), start + count))
        for start, count in ((row, height), (column, width))
    )
    t = grid.transform
    c, r = columns.astype(float)[None], rows.astype(float)[:, None]
    x, y = transformer(grid.crs.to_wkt(), _AUTHALIC).transform(t.a * c + t.b * r + t.c, t.d * c + t.e * r + t.f)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise RasterError(f"{grid.describe()}: rows {row} to {row + height} lie nowhere on Earth")

    def diagonal(values: np.ndarray, falling: bool) -> np.ndarray:
        return values[1:, 1:] - values[:-1, :-1] if falling else values[:-1, 1:] - values[1:, :-1]

    dx, ex = ((diagonal(x, falling) + _WORLD / 2) % _WORLD - _WORLD / 2 for falling in (True, False))
    patch = 0.5 * np.abs(dx * diagonal(y, False) - ex * diagonal(y, True)) / 1e4
    down, across = np.diff(rows), np.diff(columns)
    return np.repeat(np.repeat(patch / (down[:, None] * across), down, 0), across, 1)
