"""Maps over zones: each pixel by the share of it inside and its area on the ground, of several maps the first one."""

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from affine import Affine
from rasterio.windows import Window

from biomass_jax.data.labels import BIOMASS, Label, of_bands
from biomass_jax.data.raster.grid import Grid, grid_of, open_quietly, pixel_areas, raster_errors, transformer
from biomass_jax.data.raster.resample import NearestSource
from biomass_jax.data.raster.stac import outline as outline_of
from biomass_jax.errors import RasterError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely import Geometry

UNITS = ("Mg ha-1", "Mg/ha", "Mg ha^-1", "t ha-1", "t/ha")  # of values that times hectares are Mg
SD = "_sd"  # of the band that holds the standard deviation of another one
CHANGE, SIGNIFICANT = "agbd_change", "significant"  # bands of a raster of change
_PIECE = 1024  # pixels along the side of a window
_OPEN = 24  # rasters kept open at once
_PAD = 0.02  # degrees about a map, within which a zone is brought to its grid


class Covered(NamedTuple):
    """Of each polygon: mean of the values inside, share of its area that has values, its area in pixels."""

    mean: np.ndarray
    cover: np.ndarray
    pixels: np.ndarray


def covered_means(path: str | os.PathLike[str], polygons: "GeoDataFrame", *, units: Sequence[str] = ()) -> Covered:
    """Means of a raster's first band over polygons.

    Args:
        path: the raster; its no-data value counts as none.
        polygons: a GeoDataFrame with a CRS; empty outlines, and those elsewhere, get NaN and 0.
        units: that the band may be in, where it tells one; any where there are none.

    Returns:
        float64 (n,) each.

    Raises:
        RasterError: the raster can't be read, has no CRS or another unit, or exactextract is missing.
    """
    exact_extract = _exact_extract()
    found = Covered(np.full(len(polygons), np.nan), np.zeros(len(polygons)), np.zeros(len(polygons)))
    with raster_errors(str(path)), open_quietly(os.fspath(path)) as dataset:
        grid = grid_of(dataset)
        if grid.crs is None:
            raise RasterError(f"{path}: it has no CRS, so nothing tells which polygons lie on it")
        if units and dataset.units[0] and dataset.units[0] not in units:
            raise RasterError(f"{path}: its values are in {dataset.units[0]!r}; expected {units[0]}")
        outlines = polygons.geometry.to_crs(grid.crs.to_wkt())
        pixel = abs(grid.transform.a * grid.transform.e - grid.transform.b * grid.transform.d)
        found.pixels[:] = [outline.area / pixel if outline else 0 for outline in outlines]
        left, bottom, right, top = dataset.bounds
        bounds = outlines.bounds.to_numpy()
        meets = (bounds[:, 0] < right) & (bounds[:, 2] > left) & (bounds[:, 1] < top) & (bounds[:, 3] > bottom)
        places = np.flatnonzero(meets & (found.pixels > 0))
        if len(places):
            layer = outlines.iloc[places].to_frame("geometry").reset_index(drop=True)
            table = exact_extract(dataset, layer, ["mean", "count"], output="pandas", progress=False)
            found.cover[places] = table["count"].to_numpy(float) / found.pixels[places]
            found.mean[places] = np.where(found.cover[places] > 0, table["mean"].to_numpy(float), np.nan)
    return found


class Entry(NamedTuple):
    """One of the maps: where it lies, its CRS and bands, its box of degrees, whose east may be beyond 180, and tags.

    `sign` is the band of a raster of change that says what is significant; None of a map. `about` is its label.
    """

    path: str
    grid: Grid
    crs: Any
    value: int
    sd: int | None
    box: tuple[float, float, float, float]
    sign: int | None
    tags: dict[str, str]
    about: Label


class Cells(NamedTuple):
    """Pixels of a map in a zone, (n,) each; of those that several maps have, the first one's.

    Attributes:
        entry: number of the map.
        row: of the pixel in the map.
        column: likewise.
        value: the map's, NaN where it has none.
        sd: its standard deviation, NaN where it has none.
        area: ha on the ground, of the share that lies in the zone.
        kind: class of the raster of classes, -1 where there is none.
        sign: of a raster of change -1 for a significant loss, 1 for a gain; 0 elsewhere, and of maps of biomass.
    """

    entry: int
    row: np.ndarray
    column: np.ndarray
    value: np.ndarray
    sd: np.ndarray
    area: np.ndarray
    kind: np.ndarray
    sign: np.ndarray


class At(NamedTuple):
    """Maps at places, (n,) each: value, its standard deviation (NaN where there is none), class (-1 likewise)."""

    value: np.ndarray
    sd: np.ndarray
    kind: np.ndarray


class Plane(NamedTuple):
    """A plane about a zone in which its pixels have whole rows and columns.

    Attributes:
        spacing: metres between them, down and across.
        shape: rows and columns that the zone's pixels may have, from 0.
        crs: of the plane.
        origin: x and y of its upper-left corner.
        step: x and y from one row, and from one column, to the next: (across, down).
    """

    spacing: tuple[float, float]
    shape: tuple[int, int]
    crs: Any
    origin: tuple[float, float]
    step: tuple[float, float]


class Maps:
    """Several maps as one surface: where they overlap, a pixel counts if no map before its own has data at its centre.

    So each piece of ground counts once, whatever the zones, and sums over zones that share no ground add up. Only a
    few rasters are open at a time; memory doesn't grow with their size.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], classes: str | os.PathLike[str] | None = None) -> None:
        """Look at each.

        Args:
            paths: of the maps; bands `agbd` and, where there is one, `agbd_sd` are found by their descriptions, as
                are those of heights (`rh98`); in place of them all three of a raster of change of biomass.
            classes: a raster of whole numbers, taken at the pixels' centres.

        Raises:
            RasterError: one can't be read, has no CRS, no such band, or another unit than its label's; maps and rasters
                of change together, or maps of different labels.
        """
        self._datasets: OrderedDict[Any, Any] = OrderedDict()
        self.classes = None if classes is None else os.fspath(classes)
        self.entries = [_entry(os.fspath(path)) for path in paths]
        kinds = {entry.sign is None: entry.path for entry in self.entries}
        if len(kinds) > 1:
            raise RasterError(
                f"{kinds[False]} is a raster of change, {kinds[True]} a map of biomass; give one kind alone"
            )
        for entry in self.entries[1:]:
            if entry.about != self.label:
                first = self.entries[0].path
                raise RasterError(
                    f"{first} is of {self.label.name}, {entry.path} of {entry.about.name}; give one alone"
                )
        self._boxes = np.array([entry.box for entry in self.entries]).reshape(-1, 4)
        self._before: dict[int, list[int]] = {}

    @property
    def label(self) -> Label:
        """What the maps are of; biomass where there is none."""
        return self.entries[0].about if self.entries else BIOMASS

    @property
    def of_change(self) -> bool:
        """Whether they are rasters of change."""
        return bool(self.entries) and self.entries[0].sign is not None

    def __enter__(self) -> "Maps":
        return self

    def __exit__(self, *error: object) -> None:
        while self._datasets:
            self._datasets.popitem()[1].close()

    def meeting(self, outline: "Geometry") -> list[int]:
        """Numbers of the maps whose box meets that of an outline in degrees."""
        return np.flatnonzero(_meet(self._boxes, outline.bounds)).tolist()

    def cells(self, outline: "Geometry") -> Iterator[Cells]:
        """The pixels of a zone, piece by piece.

        Args:
            outline: a shapely polygon in degrees of WGS 84, longitude first, with a corner every few hundred metres.

        Raises:
            RasterError: a map can't be read.
        """
        for number in self.meeting(outline):
            entry = self.entries[number]
            part = _in_pixels(entry, outline)
            for row, column, height, width in _windows(part, entry.grid):
                share = _shares(part, row, column, height, width)
                inside = share > 0
                if not inside.any():
                    continue
                value, *others = self._read(number, row, column, height, width)
                inside &= ~self._had_before(number, row, column, height, width)
                area = share * pixel_areas(entry.grid, row, column, height, width)
                rows, columns = np.nonzero(inside)
                sd, kind, sign = (layer[inside] for layer in others)
                yield Cells(number, rows + row, columns + column, value[inside], sd, area[inside], kind, sign)

    def plane(self, outline: "Geometry") -> Plane:
        """The plane of a zone: the maps' own grid where they share one in metres, else one about the zone's middle.

        Args:
            outline: as for `cells`; a map meets it.
        """
        import shapely

        entries = [self.entries[number] for number in self.meeting(outline)]
        first = entries[0].grid
        t, base = first.transform, entries[0].crs
        own = all(_alike(entries[0], entry) for entry in entries)
        across, down = first.pixel_size() or (1.0, 1.0)  # on the ground: an equal-area CRS may stretch it
        west, south, east, north = outline.bounds
        boxes = [
            shapely.intersection(shapely.box(west + turn, south, east + turn, north), shapely.box(*entry.box))
            for entry in entries
            for turn in _turns(entry.box, outline.bounds)
        ]
        corners = shapely.get_coordinates(shapely.segmentize(boxes, _PAD))
        corners[:, 0] -= 360 * np.round((corners[:, 0] - corners[0, 0]) / 360)  # a zone may be cut at 180 degrees
        if own:
            crs, step = base.to_wkt(), (t.a, t.e)
        else:
            lon, lat = (corners.min(0) + corners.max(0)) / 2
            crs = f"+proj=laea +lat_0={lat:.6f} +lon_0={lon:.6f} +datum=WGS84 +units=m"
            step = (across, -down)
        x, y = transformer("EPSG:4326", crs).transform(*corners.T)
        columns, rows = ((x - t.c) / step[0], (y - t.f) / step[1]) if own else (x / step[0], y / step[1])
        left, top = np.floor(columns.min()) - 2, np.floor(rows.min()) - 2  # outlines bend between corners
        shape = (int(np.ceil(rows.max()) - top) + 3, int(np.ceil(columns.max()) - left) + 3)
        start = (t.c, t.f) if own else (0.0, 0.0)
        return Plane((down, across), shape, crs, (start[0] + left * step[0], start[1] + top * step[1]), step)

    def in_plane(self, plane: Plane, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns (n,) of pixels in a zone's plane."""
        entry = self.entries[cells.entry]
        t, c, r = entry.grid.transform, cells.column + 0.5, cells.row + 0.5
        x, y = t.a * c + t.b * r + t.c, t.d * c + t.e * r + t.f
        if (source := entry.crs.to_wkt()) != plane.crs:
            x, y = transformer(source, plane.crs).transform(x, y)
        at = ((y - plane.origin[1]) / plane.step[1], (x - plane.origin[0]) / plane.step[0])
        row, column = (
            np.clip(np.floor(axis).astype(int), 0, size - 1) for axis, size in zip(at, plane.shape, strict=True)
        )
        return row, column

    def at(self, lon: np.ndarray, lat: np.ndarray) -> At:
        """The maps at places.

        Args:
            lon: (n,) degrees of WGS 84.
            lat: (n,) likewise.

        Returns:
            Of the first map that has data there.

        Raises:
            RasterError: a map can't be read.
        """
        found = At(np.full(len(lon), np.nan), np.full(len(lon), np.nan), np.full(len(lon), -1))
        for number, entry in enumerate(self.entries):
            west, south, east, north = entry.box
            near = (lat >= south) & (lat <= north) & ((lon - west) % 360 <= east - west)
            places = np.flatnonzero(near & np.isnan(found.value))
            if not len(places):
                continue
            x, y = transformer("EPSG:4326", entry.crs.to_wkt()).transform(lon[places], lat[places])
            if entry.crs.is_geographic:
                x = entry.grid.transform.c + (x - entry.grid.transform.c) % 360
            row, column = _pixels_at(entry.grid, x, y)
            inside = (row >= 0) & (row < entry.grid.height) & (column >= 0) & (column < entry.grid.width)
            places, row, column = places[inside], row[inside], column[inside]
            pieces = row // _PIECE * (entry.grid.width // _PIECE + 1) + column // _PIECE
            for piece in np.unique(pieces):
                mine = pieces == piece
                r, c = row[mine], column[mine]
                top, left = r.min(), c.min()
                window = (int(top), int(left), int(r.max() - top) + 1, int(c.max() - left) + 1)
                for kept, values in zip(found, self._read(number, *window)[:3], strict=True):
                    kept[places[mine]] = values[r - top, c - left]
        return found

    def _read(self, number: int, row: int, column: int, height: int, width: int) -> tuple[np.ndarray, ...]:
        """Value, sd, class and sign (height, width) of a window."""
        entry, window = self.entries[number], Window(column, row, width, height)
        dataset = self._opened(number, lambda: open_quietly(entry.path))
        with raster_errors(f"{entry.path}: reading rows {row} to {row + height}"):
            value = _filled(dataset.read(entry.value, window=window, masked=True))
            sd = np.full_like(value, np.nan)
            if entry.sd is not None:
                sd = np.where(np.isnan(value), np.nan, _filled(dataset.read(entry.sd, window=window, masked=True)))
            sign = np.zeros(value.shape)
            if entry.sign is not None:
                sign = np.nan_to_num(_filled(dataset.read(entry.sign, window=window, masked=True)))
        if (sd < 0).any():
            raise RasterError(f"{entry.path}: band {entry.sd} holds {np.nanmin(sd):g}; expected standard deviations")
        if (odd := sign[~np.isin(sign, (-1, 0, 1))]).size:
            raise RasterError(
                f"{entry.path}: band {entry.sign} holds {odd[0]:g}; expected -1 for loss, 1 for gain, or 0"
            )
        kind = np.full(value.shape, -1)
        if self.classes is not None:
            path = self.classes
            source = self._opened(("classes", number), lambda: NearestSource(path, entry.grid))
            found = source.read(row, column, height, width)
            kind = np.where(np.ma.getmaskarray(found), -1, np.nan_to_num(np.ma.getdata(found))).astype(int)
        return value, sd, kind, sign.astype(int)

    def _had_before(self, number: int, row: int, column: int, height: int, width: int) -> np.ndarray:
        """bool (height, width): where a map before this one has data; and this one's place is taken."""
        entry, taken = self.entries[number], np.zeros((height, width), bool)
        if number not in self._before:
            self._before[number] = np.flatnonzero(_meet(self._boxes[:number], entry.box)).tolist()
        for other in self._before[number]:
            before = self.entries[other]
            make = functools.partial(NearestSource, before.path, entry.grid, before.value)
            source = self._opened((other, number), make)
            taken |= ~np.ma.getmaskarray(source.read(row, column, height, width))
        return taken

    def _opened(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._datasets:
            while len(self._datasets) >= _OPEN:
                self._datasets.popitem(last=False)[1].close()
            self._datasets[key] = make()
        self._datasets.move_to_end(key)
        return self._datasets[key]


def _entry(path: str) -> Entry:
    with raster_errors(path), open_quietly(path) as dataset:
        grid = grid_of(dataset)
        if grid.crs is None:
            raise RasterError(f"{path}: it has no CRS, so nothing tells which zones lie on it")
        names, tags, sign = [name or "" for name in dataset.descriptions], dataset.tags(), None
        about = of_bands(names)
        if f"{about.name}_change" in names and not about.adds_up:
            raise RasterError(
                f"{path}: a change of {about.name} in {about.units}, of which zones have no losses and gains as "
                "amounts; give the maps of each year, whose means by zone can be compared"
            )
        if CHANGE in names:
            if lost := {f"{CHANGE}{SD}", SIGNIFICANT} - {*names}:
                raise RasterError(f"{path}: a band {CHANGE} and none {min(lost)}; make it anew with biomass-jax change")
            value, sign = names.index(CHANGE) + 1, names.index(SIGNIFICANT) + 1
        elif about.name in names:
            value = names.index(about.name) + 1
        elif dataset.count == 1:
            value = 1
        else:
            raise RasterError(f"{path}: found bands {', '.join(names)}; expected one that is described as agbd")
        sd = names.index(f"{names[value - 1]}{SD}") + 1 if f"{names[value - 1]}{SD}" in names else None
        for band in filter(None, (value, sd)):
            unit = dataset.units[band - 1]
            if unit and unit not in (UNITS if about == BIOMASS else (about.units,)):
                what = "biomass" if about == BIOMASS else about.name
                raise RasterError(f"{path}: band {band} is in {unit!r}; expected {about.units}, a map of {what}")
            if (dataset.scales[band - 1], dataset.offsets[band - 1]) != (1, 0):
                raise RasterError(f"{path}: band {band} has a scale or an offset; expected {about.unit} as they are")
    west, south, east, north = outline_of(grid)["bbox"]
    return Entry(path, grid, grid.crs, value, sd, (west, south, east + 360 * (east < west), north), sign, tags, about)


def _alike(one: Entry, other: Entry) -> bool:
    """Whether the grids of two maps have one CRS in metres and one pixel size, north up."""
    t, u = one.grid.transform, other.grid.transform
    same = one.crs == other.crs and one.crs.to_wkt() == other.crs.to_wkt() and one.crs.is_projected
    return bool(same and (t.b, t.d, u.b, u.d) == (0, 0, 0, 0) and (t.a, t.e) == (u.a, u.e))


def _filled(values: np.ma.MaskedArray) -> np.ndarray:
    return np.ma.filled(values.astype(np.float64), np.nan)


_TURNS = (-360.0, 0.0, 360.0)


def _turns(box: Sequence[float], other: Sequence[float]) -> list[float]:
    """By how many degrees of longitude another box is moved so that it meets a box."""
    return [turn for turn in _TURNS if other[0] + turn <= box[2] and other[2] + turn >= box[0]]


def _meet(boxes: np.ndarray, other: Sequence[float]) -> np.ndarray:
    """Which (n,) of boxes (n, 4) another one meets, whatever the turn."""
    west, south, east, north = boxes.T
    around = [(other[0] + turn <= east) & (other[2] + turn >= west) for turn in _TURNS]
    return np.logical_or.reduce(around) & (other[1] <= north) & (other[3] >= south)


def _in_pixels(entry: Entry, outline: "Geometry") -> "Geometry":
    """What of an outline in degrees lies about a map, in columns and rows of its grid (rows negative: north is up)."""
    import shapely

    crs, (west, south, east, north) = entry.crs, entry.box
    pad = 0.0 if crs.is_geographic else _PAD  # which would go around the globe
    near = shapely.segmentize(shapely.box(west - pad, south - pad, east + pad, north + pad), 5 * _PAD)
    parts = [
        shapely.intersection(shapely.transform(outline, lambda at, turn=turn: at + (turn, 0)), near)
        for turn in _turns(entry.box, outline.bounds)
    ]
    part = shapely.union_all(parts)
    forward, inverse = transformer("EPSG:4326", crs.to_wkt()), ~entry.grid.transform
    own = 360 * np.round((entry.grid.transform.c - west) / 360)  # longitudes of a map may run from 0 to 360

    def place(at: np.ndarray) -> np.ndarray:
        x, y = forward.transform(at[:, 0], at[:, 1])
        if crs.is_geographic:
            x = x + 360 * np.round((at[:, 0] - x) / 360) + own
        return np.column_stack(
            [inverse.a * x + inverse.b * y + inverse.c, -(inverse.d * x + inverse.e * y + inverse.f)]
        )

    found = shapely.transform(part, place)
    return found if found.is_valid else shapely.make_valid(found)  # corners that all but touch may change sides


def _windows(part: "Geometry", grid: Grid) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, height and width of windows that together hold an outline in pixels, aligned to the map's blocks."""
    if part.is_empty:
        return
    left, low, right, high = part.bounds
    first_row, last_row = max(int(np.floor(-high)), 0), min(int(np.ceil(-low)), grid.height)
    first_column, last_column = max(int(np.floor(left)), 0), min(int(np.ceil(right)), grid.width)
    for top in range(first_row // _PIECE * _PIECE, last_row, _PIECE):
        for start in range(first_column // _PIECE * _PIECE, last_column, _PIECE):
            row, column = max(top, first_row), max(start, first_column)
            height, width = min(top + _PIECE, last_row) - row, min(start + _PIECE, last_column) - column
            if height > 0 and width > 0:
                yield row, column, height, width


def _shares(part: "Geometry", row: int, column: int, height: int, width: int) -> np.ndarray:
    """Share (height, width) of each pixel of a window that lies inside of an outline in pixels."""
    import shapely
    from exactextract.raster import NumPyRasterSource

    exact_extract = _exact_extract()
    found = np.zeros((height, width))
    box = (column, -(row + height), column + width, -row)
    inside = shapely.intersection(part, shapely.box(*box))
    if inside.is_empty or inside.area == 0:
        return found
    if inside.area == height * width:
        return np.ones((height, width))
    kinds = shapely.get_parts(inside)
    inside = shapely.multipolygons(kinds[shapely.get_type_id(kinds) == 3])  # a touch leaves lines, too
    source = NumPyRasterSource(np.zeros((height, width), np.uint8), *box)
    feature = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(inside)}
    (cells,) = (one["properties"] for one in exact_extract(source, feature, ["cell_id", "coverage"], progress=False))
    found.ravel()[cells["cell_id"]] = cells["coverage"]
    return found


def _exact_extract() -> Any:
    try:
        from exactextract import exact_extract
    except ImportError as error:
        raise RasterError(
            f"means over polygons need exactextract: pip install 'biomass-jax[regional]' ({error})"
        ) from error
    return exact_extract


def _pixels_at(grid: Grid, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the pixels in which places of a grid's CRS lie; -1 for those that lie nowhere."""
    inverse: Affine = ~grid.transform
    row = np.floor(inverse.d * x + inverse.e * y + inverse.f)
    column = np.floor(inverse.a * x + inverse.b * y + inverse.c)
    lost = ~(np.isfinite(row) & np.isfinite(column))
    return np.where(lost, -1, row).astype(int), np.where(lost, -1, column).astype(int)
