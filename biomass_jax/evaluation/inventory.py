"""Field plots from files: their biomass, its error, their outlines and dates."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomass_jax.data.vectors import read_table
from biomass_jax.errors import EvaluationError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries
    from pandas import DataFrame

# What columns are called where --agb and the others don't say; the first that is there counts.
COLUMNS: dict[str, tuple[str, ...]] = {
    "agb": ("agb", "agbd", "agb_mg_ha", "agb_t_ha", "biomass"),
    "error": ("agb_se", "agb_sd", "agb_error", "agbd_se", "se", "sd"),
    "area_ha": ("area_ha", "plot_area_ha", "size_ha"),
    "date": ("date", "measured", "year", "survey_date", "survey_year"),
    "kind": ("forest_type", "biome", "type"),
    "lon": ("lon", "longitude", "x"),
    "lat": ("lat", "latitude", "y"),
    "id": ("id", "plot_id", "plot", "name"),
}
_RING = 64  # corners of a round plot's outline


def read_plots(path: str | Path, columns: Mapping[str, str | None], area_ha: float | None = None) -> "GeoDataFrame":
    """Plots as a GeoDataFrame in longitude and latitude.

    Args:
        path: CSV with longitudes and latitudes, GeoPackage or another file that GDAL reads, Parquet or GeoParquet.
        columns: what of `COLUMNS` stands in which column; None to look for the usual names.
        area_ha: of plots that are points in a file without areas; each becomes a circle.

    Returns:
        Columns `id`, `agb` and `error` in Mg/ha (`error` NaN where unknown), `area_ha`, `year` with its fraction (NaN
        where unknown), `kind` (text, "" where unknown), and the outlines as its geometry.

    Raises:
        EvaluationError: unreadable, without places, biomass or areas; a biomass or an error below 0.
    """
    frame = read_table(path, "plots", EvaluationError)  # which says what is missing where pandas is
    import pandas

    named = {what: _column(frame, what, columns.get(what), str(path)) for what in COLUMNS}
    if named["agb"] is None:
        raise EvaluationError(
            f"{path}: no column of biomass; found {', '.join(map(str, frame.columns))}, expected one of "
            f"{', '.join(COLUMNS['agb'])}, or --agb COLUMN"
        )
    found = pandas.DataFrame(index=frame.index)
    found["id"] = frame[named["id"]].astype(str) if named["id"] else [str(i) for i in range(1, len(frame) + 1)]
    for what in ("agb", "error", "area_ha"):
        found[what] = _numbers(frame, named[what], str(path))
    if (found["agb"] < 0).any() or (found["error"] < 0).any():
        raise EvaluationError(f"{path}: biomass or errors below 0; expected Mg/ha, and no value where there is none")
    found["year"] = _years(frame, named["date"], str(path))
    found["kind"] = frame[named["kind"]].fillna("").astype(str) if named["kind"] else ""
    if area_ha is not None:
        found["area_ha"] = found["area_ha"].fillna(area_ha)
    return _with_outlines(found, _places(frame, named, str(path)), str(path))


def _column(frame: "DataFrame", what: str, given: str | None, path: str) -> str | None:
    """The column that holds something; None where none does."""
    if given is not None:
        if given not in frame.columns:
            raise EvaluationError(f"{path}: no column {given!r}; found {', '.join(map(str, frame.columns))}")
        return given
    known = {str(name).casefold(): str(name) for name in reversed(frame.columns)}
    return next((known[name] for name in COLUMNS[what] if name in known), None)


def _numbers(frame: "DataFrame", column: str | None, path: str) -> Any:
    """A column as numbers (n,); NaN where there is no such column."""
    import pandas

    if column is None:
        return np.nan
    try:
        return pandas.to_numeric(frame[column])
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: column {column} holds something else than numbers: {error}") from error


def _years(frame: "DataFrame", column: str | None, path: str) -> Any:
    """Years with their fraction: of a date its day, of a year its middle."""
    import pandas

    if column is None:
        return np.nan
    values = frame[column]
    if pandas.api.types.is_numeric_dtype(values):
        if not values.dropna().between(1900, 2200).all():
            raise EvaluationError(f"{path}: column {column} holds numbers that are no years, such as {values.iloc[0]}")
        return values + 0.5
    try:
        days = pandas.to_datetime(values, format="ISO8601")  # 02/07/2019 is July here and February there
    except (ValueError, TypeError) as error:
        raise EvaluationError(
            f"{path}: column {column} can't be read as dates: {error}; expected 2019-07-02 or a year"
        ) from error
    return days.dt.year + (days.dt.day_of_year - 0.5) / 365.25


def _places(frame: "DataFrame", named: Mapping[str, str | None], path: str) -> "GeoSeries":
    """Geometries in longitude and latitude."""
    import geopandas

    if isinstance(frame, geopandas.GeoDataFrame):
        if frame.crs is None:
            raise EvaluationError(f"{path}: its places have no CRS; write the file with one")
        return frame.geometry.to_crs(4326)
    lon, lat = (_numbers(frame, named[axis], path) for axis in ("lon", "lat"))
    if np.ndim(lon) == 0 or np.ndim(lat) == 0:
        raise EvaluationError(
            f"{path}: no places; found columns {', '.join(map(str, frame.columns))}, expected lon and lat in degrees"
        )
    if not (lon.dropna().between(-180, 360).all() and lat.dropna().between(-90, 90).all()):
        raise EvaluationError(f"{path}: longitudes or latitudes beyond 180 and 90; expected degrees, WGS 84")
    return geopandas.GeoSeries(geopandas.points_from_xy(lon, lat), index=frame.index, crs=4326)


def _with_outlines(found: "DataFrame", places: "GeoSeries", path: str) -> "GeoDataFrame":
    """The frame with each plot's outline: its polygon, or a circle of its area about its point."""
    import geopandas
    import shapely
    from pyproj import Geod

    geod = Geod(ellps="WGS84")
    points = places.geom_type == "Point"
    if missing := int((points & ~places.is_empty & found["area_ha"].isna()).sum()):
        raise EvaluationError(
            f"{path}: {missing} plots are points without an area; give a column area_ha, --area-column, or one area "
            "for all by --area-ha"
        )
    if (found["area_ha"] <= 0).any():
        raise EvaluationError(f"{path}: areas of 0 or less; expected hectares")
    outlines = list(places)
    turns = np.linspace(0, 360, _RING, endpoint=False)
    for place in np.flatnonzero(points & ~places.is_empty):
        # as large as the circle, though it has corners
        radius = np.sqrt(found["area_ha"].iloc[place] * 1e4 / (_RING / 2 * np.sin(2 * np.pi / _RING)))
        point = outlines[place]
        lon, lat, _ = geod.fwd(np.full(_RING, point.x), np.full(_RING, point.y), turns, np.full(_RING, radius))
        outlines[place] = shapely.Polygon(np.column_stack([lon, lat]))
    areas = [
        abs(geod.geometry_area_perimeter(one)[0]) / 1e4 if one and not one.is_empty else np.nan for one in outlines
    ]
    found = found.assign(area_ha=areas)
    return geopandas.GeoDataFrame(found, geometry=outlines, crs=4326)
