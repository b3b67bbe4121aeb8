"""Tables of places from files and into them: field plots, zones, GEDI's footprints."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from biomass_jax.data.labels import BIOMASS, Label
from biomass_jax.errors import BiomassError, RegionalError
from biomass_jax.runtime.files import replacing, write_text

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from pandas import DataFrame
    from shapely import Geometry

PARQUET = (".parquet", ".geoparquet")
TABLES = (".csv", ".gpkg", *PARQUET)  # endings of tables that are written
STYLES = "layer_styles"  # the table of a GeoPackage where QGIS keeps styles
_STEP = 500.0  # metres between corners of an outline that is brought to another CRS, at most
_STEP_DEGREES = 0.005
_TRACK, _ORBIT = 10**11, 10**13  # a shot's number is its orbit, its beam, and 11 digits more
_NEEDED = {"shot_number": "uint64", "lon": "degrees", "lat": "degrees"}  # and the label


def read_table(path: str | Path, what: str, error: type[BiomassError], layer: str | None = None) -> "DataFrame":
    """A CSV, GeoPackage, Parquet or any file that GDAL reads as a frame; a GeoDataFrame where it has places.

    Args:
        path: the file.
        what: its rows are, for messages.
        error: what is raised.
        layer: of a file that has several; None for its only one.

    Raises:
        BiomassError: of the kind `error`: no such file, unreadable, several layers, or a library is missing.
    """
    path = Path(path)
    try:
        import geopandas
        import pandas
    except ImportError as missing:
        raise error(f"{path}: {what} need {missing.name}; pip install 'biomass-jax[regional]'") from missing
    if not path.is_file():
        raise error(f"{path}: no such file; expected {what} as CSV, GeoPackage or Parquet")
    try:
        if path.suffix.lower() == ".csv":
            return pandas.read_csv(path)
        if path.suffix.lower() in PARQUET:
            try:
                return geopandas.read_parquet(path)
            except ValueError:  # no geometry: a plain table
                return pandas.read_parquet(path)
        layers = geopandas.list_layers(path).dropna(subset="geometry_type")["name"].tolist()  # QGIS adds its styles
        if layer is None and len(layers) > 1:
            raise error(f"{path}: found layers {', '.join(layers)}; expected one, or --layer NAME")
        return geopandas.read_file(path, layer=layer or next(iter(layers), None))
    except error:
        raise
    except Exception as cause:  # pandas, pyogrio, pyarrow and shapely each have their own
        raise error(f"{path}: can't be read as {what}: {cause}") from cause


def read_zones(path: str | Path, layer: str | None = None) -> "GeoDataFrame":
    """Zones: polygons with a CRS.

    Args:
        path: GeoPackage, GeoParquet or another file that GDAL reads.
        layer: of a file that has several.

    Raises:
        RegionalError: unreadable, no zone, no CRS, or an outline that is no valid polygon; the row is named.
    """
    import shapely

    frame = read_table(path, "zones", RegionalError, layer)
    if not hasattr(frame, "geometry") or not len(frame):
        raise RegionalError(f"{path}: {len(frame)} rows without outlines; expected polygons")
    if frame.crs is None:
        raise RegionalError(f"{path}: its zones have no CRS; write the file with one")
    frame = frame.reset_index(drop=True)
    for row, outline in enumerate(frame.geometry, 1):
        if outline is None or outline.is_empty or outline.geom_type not in ("Polygon", "MultiPolygon"):
            found = "no outline" if outline is None or outline.is_empty else f"a {outline.geom_type}"
            raise RegionalError(f"{path}: row {row} has {found}; expected a polygon")
        if not outline.is_valid:
            why = shapely.is_valid_reason(outline)
            raise RegionalError(
                f"{path}: row {row}: its outline crosses itself ({why}); mend it (QGIS: Fix geometries)"
            )
    return frame.set_geometry(shapely.force_2d(frame.geometry.array))


def outlines(zones: "GeoDataFrame", name: str) -> list["Geometry"]:
    """Each zone's outline in degrees of WGS 84, longitude first, beyond 180 or -180 where it crosses the antimeridian.

    Edges are straight in the zones' own CRS: they get a corner every 500 m at most.

    Args:
        zones: of `read_zones`.
        name: of their file, for messages.

    Raises:
        RegionalError: an outline around a pole, or one that is more than half the globe wide.
    """
    import shapely
    from pyproj import Transformer

    crs = zones.crs
    step = _STEP_DEGREES if crs.is_geographic else _STEP / crs.axis_info[0].unit_conversion_factor
    forward = Transformer.from_crs(crs, 4326, always_xy=True)

    def place(at: np.ndarray) -> np.ndarray:
        return np.column_stack(forward.transform(at[:, 0], at[:, 1]))

    found = []
    for row, outline in enumerate(shapely.transform(shapely.segmentize(zones.geometry.array, step), place), 1):
        parts = [_unwrapped(part) for part in shapely.get_parts(outline)]
        if any(part is None for part in parts):
            raise RegionalError(
                f"{name}: row {row} goes around a pole or is more than 180 degrees of longitude wide; cut it in pieces "
                "(at 180 degrees, if it crosses the antimeridian)"
            )
        found.append(parts[0] if len(parts) == 1 else _side_by_side(parts))
    return found


def _side_by_side(parts: Sequence["Geometry"]) -> "Geometry":
    """Polygons as one outline, each moved by whole turns to be as near as can be to the first: so cut ones meet."""
    import shapely

    middles = [(part.bounds[0] + part.bounds[2]) / 2 for part in parts]
    turns = [360 * round((middle - middles[0]) / 360) for middle in middles]
    if not any(turns):
        return shapely.multipolygons(parts)
    moved = zip(parts, turns, strict=True)
    return shapely.union_all([shapely.transform(part, lambda at, turn=turn: at - (turn, 0)) for part, turn in moved])


def _unwrapped(part: "Geometry") -> "Geometry | None":
    """A polygon whose longitudes have no jumps of 360 degrees; None where it goes around a pole or half the globe."""
    import shapely

    rings: list[np.ndarray] = []
    for ring in (part.exterior, *part.interiors):
        lon, lat = np.asarray(ring.coords).T
        lon = lon - 360 * np.append(0, np.cumsum(np.round(np.diff(lon) / 360)))
        if abs(lon[-1] - lon[0]) > 1 or np.ptp(lon) > 180 or not np.isfinite(lon + lat).all():
            return None
        # The outer ring begins between -180 and 180, a hole is moved into it.
        turns = np.round((lon.mean() - rings[0][:, 0].mean()) / 360) if rings else np.floor((lon.min() + 180) / 360)
        rings.append(np.column_stack([lon - 360 * turns, lat]))
    return shapely.Polygon(rings[0], rings[1:])


def outlines_on(frame: "GeoDataFrame", crs: str, box: tuple[float, float, float, float]) -> list["Geometry"]:
    """The part of each outline in and about a box, in the box's CRS; empty where none of it lies there.

    Edges are straight in the frame's own CRS: they get corners enough to be so in the other one.

    Args:
        frame: of `read_zones`.
        crs: of the box, as WKT.
        box: (left, bottom, right, top).
    """
    import shapely
    from pyproj import Transformer

    back = Transformer.from_crs(crs, frame.crs, always_xy=True)
    forward = Transformer.from_crs(frame.crs, crs, always_xy=True)
    west, south, east, north = back.transform_bounds(*box, densify_pts=21)
    spans = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]  # across the antimeridian
    about = max(north - south, *(right - left for left, right in spans)) / 10
    near = shapely.union_all(
        [shapely.box(left - about, south - about, right + about, north + about) for left, right in spans]
    )

    def place(at: np.ndarray) -> np.ndarray:
        return np.column_stack(forward.transform(at[:, 0], at[:, 1]))

    clipped = shapely.intersection(frame.geometry.to_numpy(), near)
    return list(shapely.transform(shapely.segmentize(clipped, about / 10), place))


def ground_area(outline: "Geometry") -> float:
    """Geodesic area of an outline in degrees on WGS 84's ellipsoid, hectares."""
    import shapely
    from pyproj import Geod

    oriented = shapely.MultiPolygon([shapely.geometry.polygon.orient(part) for part in shapely.get_parts(outline)])
    return float(Geod(ellps="WGS84").geometry_area_perimeter(oriented)[0]) / 1e4


def inside_of(outline: "Geometry", lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Numbers of the places, (n,) each in degrees, that lie in an outline, whose longitudes may be beyond 180."""
    import shapely

    west, south, east, north = outline.bounds
    moved = west + (lon - west) % 360
    near = np.flatnonzero((moved <= east) & (lat >= south) & (lat <= north))
    shapely.prepare(outline)
    return near[shapely.contains_xy(outline, moved[near], lat[near])]


def files_of(paths: Iterable[str | Path], pattern: str, what: str) -> list[Path]:
    """Files, and those of folders that fit a pattern, sorted in each.

    Args:
        paths: files and folders.
        pattern: of names in a folder, of those below it too where it begins with `**/`.
        what: they are, for messages.

    Raises:
        RegionalError: a folder without any.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob(pattern)) if path.is_dir() else [path]
        if not found:
            raise RegionalError(f"{path}: no {pattern.removeprefix('**/')} in it; expected {what}")
        files += found
    return files


class Footprints(NamedTuple):
    """GEDI's footprints, (n,) each.

    Attributes:
        lon: degrees of WGS 84, -180 to 180.
        lat: degrees.
        value: the label, in its unit.
        sigma: its standard error; NaN where there is none.
        track: orbit and beam as one number.
        orbit: number of the orbit.
        number: shot_number, uint64.
    """

    lon: np.ndarray
    lat: np.ndarray
    value: np.ndarray
    sigma: np.ndarray
    track: np.ndarray
    orbit: np.ndarray
    number: np.ndarray


def read_footprints(
    paths: Iterable[str | Path], boxes: Sequence[tuple[float, float, float, float]], label: Label = BIOMASS
) -> Footprints:
    """Footprints of tables as `prepare` writes them.

    Args:
        paths: files, and folders of which all tables are read.
        boxes: (west, south, east, north) in degrees, east perhaps beyond 180; what is far from all of them is left out.
        label: what is read of them.

    Returns:
        Each footprint once, though several tables have it.

    Raises:
        RegionalError: no table, or one that isn't of footprints.
    """
    files = files_of(paths, "*.parquet", "tables of footprints (biomass-jax gedi)")
    near = _near(boxes)
    tables: list[dict[str, np.ndarray]] = []
    for file in files:
        table = _read_footprints(file, label)
        at = (np.floor(table["lat"] + 90).astype(int), np.floor((table["lon"] + 180) % 360).astype(int))
        kept = near[at] & np.isfinite(table["value"])
        tables.append({name: values[kept] for name, values in table.items()})
    whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    number, first = np.unique(whole["number"], return_index=True)
    whole = {name: values[first] for name, values in whole.items()}
    return Footprints(**whole, track=number // _TRACK, orbit=number // _ORBIT)


def _near(boxes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    """bool (181, 360), degree by degree of latitude and longitude: which may lie in a box."""
    near = np.zeros((181, 360), bool)
    for west, south, east, north in boxes:
        rows = slice(int(np.floor(south + 90)), int(np.floor(north + 90)) + 1)
        columns = np.arange(np.floor(west + 180), np.floor(east + 180) + 1).astype(int) % 360
        near[rows, columns] = True
    return near


def _read_footprints(file: Path, label: Label) -> dict[str, np.ndarray]:
    """Columns of a table."""
    needed = _NEEDED | {label.name: label.unit}
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RegionalError(f"{file}: footprints need pyarrow; pip install 'biomass-jax[regional]'") from error
    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            more = {f"{label.name}_sigma"} & set(schema.names)
            lacking = [name for name in needed if name not in schema.names]
            table = None if lacking else opened.read(columns=[*needed, *more])
    except (OSError, pa.ArrowException) as error:
        raise RegionalError(f"{file}: can't be read as a table of footprints (Parquet): {error}") from error
    if table is None:
        raise RegionalError(
            f"{file}: found columns {', '.join(schema.names)}, expected {lacking[0]} ({needed[lacking[0]]}); give "
            "tables that biomass-jax gedi, or prepare, has written"
        )
    if not pa.types.is_integer(schema.field("shot_number").type):
        raise RegionalError(f"{file}: shot_number is {schema.field('shot_number').type}; expected uint64")
    columns = {name: table.column(name).to_numpy().astype(float) for name in ("lon", "lat")}
    columns["value"] = table.column(label.name).to_numpy().astype(float)
    columns["number"] = table.column("shot_number").to_numpy().astype(np.uint64)
    bad = ~((np.abs(columns["lat"]) <= 90) & (np.abs(columns["lon"]) <= 180))
    if bad.any():
        raise RegionalError(f"{file}: row {np.argmax(bad) + 1}: lon or lat is no degree of WGS 84")
    if (columns["number"] < _ORBIT).any():
        raise RegionalError(
            f"{file}: shot_number {columns['number'].min()} is none of GEDI's; expected orbit, beam and 11 digits "
            "more, which tell the tracks apart"
        )
    nothing = np.full(len(table), np.nan)
    columns["sigma"] = table.column(*more).to_numpy().astype(float) if more else nothing
    return columns


def check_table(path: str | Path) -> None:
    """Refuse an ending that `write_table` doesn't know.

    Raises:
        RegionalError: it is none of `TABLES`.
    """
    if Path(path).suffix.lower() not in TABLES:
        raise RegionalError(f"{path}: expected a name that ends in {', '.join(TABLES)}")


def write_table(frame: "GeoDataFrame", path: str | Path, layer: str, style: str = "") -> None:
    """Write a table, whole, by the ending of its name; a CSV is without the outlines.

    Args:
        frame: with outlines.
        path: ends in one of `TABLES`.
        layer: its name in a GeoPackage.
        style: of QGIS, which a GeoPackage takes along and QGIS then uses by itself.

    Raises:
        RegionalError: another ending, or the place can't be written.
    """
    check_table(path)
    path = Path(path)
    try:
        if path.suffix.lower() == ".csv":
            write_text(path, frame.drop(columns=frame.geometry.name).to_csv(index=False))
            return
        with replacing(path, suffix=path.suffix.lower()) as partial:
            if path.suffix.lower() == ".gpkg":
                frame.to_file(partial, driver="GPKG", layer=layer)
                if style:
                    _add_style(partial, layer, style)
            else:
                frame.to_parquet(partial)
    except Exception as error:  # pyogrio, pyarrow and the system each have their own
        raise RegionalError(f"{path}: can't be written: {error}") from error


def _add_style(path: Path, layer: str, style: str) -> None:
    """Into the table where QGIS keeps the styles of a GeoPackage's layers."""
    import pandas
    import pyogrio

    row: dict[str, object] = {"f_table_catalog": "", "f_table_schema": "", "f_table_name": layer}
    row |= {"f_geometry_column": "geom", "styleName": layer, "styleQML": style, "styleSLD": "", "useAsDefault": True}
    row |= {"description": "", "owner": "", "ui": "", "update_time": pandas.Timestamp.now(tz="UTC")}
    pyogrio.write_dataframe(pandas.DataFrame([row]), path, layer=STYLES, driver="GPKG")


def add_columns(frame: "GeoDataFrame", columns: Mapping[str, Sequence[Any]]) -> "GeoDataFrame":
    """A frame with more columns, between its own and the outlines.

    One of its own that has the name of a new one, in any case, becomes `zone_NAME`.

    Raises:
        RegionalError: the outlines' column has such a name.
    """
    new = {name.casefold() for name in columns}
    taken = {name: f"zone_{name}" for name in frame.columns if str(name).casefold() in new}
    geometry = frame.geometry.name
    if geometry in taken:
        raise RegionalError(f"the column of outlines is called {geometry}; expected another name, such as geometry")
    found = frame.rename(columns=taken)
    for name, values in columns.items():
        found[name] = values
    return found[[name for name in found.columns if name != geometry] + [geometry]]
