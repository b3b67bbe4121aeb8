"""A finished map as a STAC item beside it, for catalogs: place, time, sources, statistics, size and checksum.

Fields are those of STAC 1.1 and of its extensions projection, raster, file and processing.
"""

import datetime
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio import warp
from rasterio.crs import CRS
from rasterio.enums import WktVersion

from biomass_jax.data.raster.grid import Grid, epsg_code, grid_of, open_quietly, raster_errors
from biomass_jax.data.raster.inputs import GranuleName, granule_name, season_of
from biomass_jax.data.records import is_season
from biomass_jax.errors import RasterError
from biomass_jax.runtime.files import sha256_of, write_json

log = logging.getLogger(__name__)

VERSION = "1.1.0"
EXTENSIONS = ("projection/v2.0.0", "raster/v1.1.0", "file/v2.1.0", "processing/v1.1.0")
MEDIA_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
_NASA = "https://cmr.earthdata.nasa.gov/stac/LPCLOUD/collections/HLS{sensor}_{version}/items/{granule}"
_SHA256 = "1220"  # how a multihash begins that is one: its code and its length
_SIDE_POINTS = 8  # along each side of the outline: a straight line of a UTM zone is none in degrees
_DIGITS = 7  # of a degree: a centimetre


def item_path(path: Path) -> Path:
    """`<map's stem>.json` beside the map."""
    return path.with_name(f"{path.stem}.json")


def write_item(path: Path, source: str) -> None:
    """Write the item of a finished map beside it, whole; where a map can't have one, a warning says why.

    Args:
        path: the map.
        source: what it was made from, where its tag DATA_SOURCES names no granules: a path or a URL.

    Raises:
        RasterError: the map can't be read.
        OSError: the item can't be written.
    """
    with raster_errors(str(path)), open_quietly(str(path)) as dataset:
        grid, tags = grid_of(dataset), dataset.tags()
        bands = [_band(dataset, number) for number in dataset.indexes]
        name = dataset.descriptions[0] or "data"
    granules = _granules(tags.get("DATA_SOURCES", ""))
    when = _time(tags.get("SEASON", ""), granules)
    try:
        if grid.crs is None:
            raise RasterError("it has no CRS")
        if when is None:
            raise RasterError("nothing tells its date; give the image a tag SEASON, as 2020-06-01/2020-09-01")
        place = outline(grid)
        for band in bands:
            band["spatial_resolution"] = float(np.mean(grid.pixel_size() or ()))
    except RasterError as error:
        log.warning("%s: has no STAC item: %s", path, error)
        return
    software, _, version = tags.get("SOFTWARE", "").rpartition(" ")
    asset = {
        "href": f"./{path.name}",
        "type": MEDIA_TYPE,
        "roles": ["data"],
        "file:size": path.stat().st_size,
        "file:checksum": _SHA256 + sha256_of(path),
        "raster:bands": bands,
    }
    item = {
        "type": "Feature",
        "stac_version": VERSION,
        "stac_extensions": [f"https://stac-extensions.github.io/{one}/schema.json" for one in EXTENSIONS],
        "id": path.stem,
        **place,
        "properties": {
            **when,
            **_projection(grid.crs),
            "proj:shape": [grid.height, grid.width],
            "proj:transform": list(grid.transform)[:6],
            **({"processing:software": {software: version}} if software else {}),
        },
        "links": _links(granules, source, path),
        "assets": {name: asset},
    }
    write_json(item_path(path), item)


def remove_item(path: Path) -> None:
    """Remove the item of a map that is made again: its checksum would be another one's. Other files stay."""
    place = item_path(path)
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(found, dict) and found.get("stac_version") and found.get("id") == path.stem:
        place.unlink()


def outline(grid: Grid) -> dict[str, Any]:
    """`geometry` and `bbox` (west, south, east, north) of a grid as GeoJSON has them, in degrees of WGS 84.

    Where it crosses the antimeridian, it is cut there in two, and west is more than east (RFC 7946, 3.1.9 and 5.2).

    Raises:
        RasterError: a grid without a CRS, one that lies nowhere on Earth or one around a pole.
    """
    with raster_errors(grid.describe()):
        lon, lat = warp.transform(grid.crs, "EPSG:4326", *grid.ring(_SIDE_POINTS))
    ring = np.array([lon, lat]).T
    if not np.isfinite(ring).all():
        raise RasterError(f"{grid.describe()}: its outline is nowhere on Earth")
    turns = (np.diff(ring[:, 0], append=ring[0, 0]) + 180) % 360 - 180
    if abs(turns.sum()) > 1:
        raise RasterError(f"{grid.describe()}: its outline goes around a pole")
    ring[:, 0] = ring[0, 0] + np.cumsum(turns) - turns  # without jumps of 360 degrees
    ring[:, 0] -= 360 * np.floor((ring[:, 0].min() + 180) / 360)
    x, y = ring.T
    if np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) < 0:
        ring = ring[::-1]
    (west, south), (east, north) = np.round(ring.min(axis=0), _DIGITS), np.round(ring.max(axis=0), _DIGITS)
    if east <= 180:
        geometry: dict[str, Any] = {"type": "Polygon", "coordinates": [_closed(ring)]}
    else:
        parts = [_cut(ring, -1.0), _cut(ring, 1.0) - (360, 0)]
        geometry = {"type": "MultiPolygon", "coordinates": [[_closed(part)] for part in parts]}
        east -= 360
    return {"geometry": geometry, "bbox": [float(edge) for edge in (west, south, east, north)]}


def _cut(ring: np.ndarray, side: float) -> np.ndarray:
    """What of a ring lies west (-1) or east (1) of 180 degrees (Sutherland and Hodgman 1974)."""
    kept = []
    for here, there in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        before, after = side * (here[0] - 180), side * (there[0] - 180)
        if before >= 0:
            kept.append(here)
        if before * after < 0:
            kept.append(here + (there - here) * before / (before - after))
    return np.array(kept)


def _closed(ring: np.ndarray) -> list[list[float]]:
    points: list[list[float]] = np.round(ring, _DIGITS).tolist()
    return [*points, points[0]]


def _projection(crs: CRS) -> dict[str, Any]:
    try:
        return {"proj:code": f"EPSG:{epsg_code(crs, '')}"}
    except RasterError:  # a CRS of its own
        return {"proj:code": None, "proj:wkt2": crs.to_wkt(version=WktVersion.WKT2_2019)}


def _band(dataset: rasterio.DatasetReader, number: int) -> dict[str, Any]:
    """What a band of the map holds; statistics are those that the file carries, where they are no estimates."""
    found = _statistics(dataset, number)
    kind, unit = dataset.dtypes[number - 1], dataset.units[number - 1]
    band = {"data_type": kind, "nodata": dataset.nodata, "unit": unit, "sampling": "area"}
    if dataset.count > 1:
        band = {"name": dataset.descriptions[number - 1], **band}
    return {key: value for key, value in {**band, "statistics": found or None}.items() if value is not None}


def _statistics(dataset: rasterio.DatasetReader, number: int) -> dict[str, float]:
    tags = dataset.tags(number)
    names = () if "STATISTICS_APPROXIMATE" in tags else ("minimum", "maximum", "mean", "stddev", "valid_percent")
    texts = {name: tags.get(f"STATISTICS_{name.upper()}") for name in names}
    return {name: float(text) for name, text in texts.items() if text is not None}


def statistics_of(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """minimum, maximum, mean, stddev and valid_percent of each band, as its file tells them; {} where it doesn't.

    Raises:
        RasterError: it can't be read.
    """
    with raster_errors(os.fspath(path)), open_quietly(os.fspath(path)) as dataset:
        return [_statistics(dataset, number) for number in dataset.indexes]


def _granules(sources: str) -> list[GranuleName]:
    """The HLS granules that DATA_SOURCES names, each once."""
    found = (granule_name(name) for name in re.split(r"[;,]\s*", sources))
    return list({granule.granule: granule for granule in found if granule is not None}.values())


def _time(season: str, granules: list[GranuleName]) -> dict[str, Any] | None:
    """STAC's fields of time; None where nothing tells it."""
    days = sorted(season_of(granule.date) for granule in granules if season_of(granule.date))
    if not is_season(season):
        if not days:
            return None
        season = f"{days[0].split('/')[0]}/{days[-1].split('/')[1]}"
    if len(granules) == 1 and days == [season]:
        moment = datetime.datetime.strptime(granules[0].date + granules[0].time, "%Y%j%H%M%S")
        return {"datetime": f"{moment:%Y-%m-%dT%H:%M:%SZ}"}
    start, stop = (datetime.date.fromisoformat(day) for day in season.split("/"))
    last = stop - datetime.timedelta(days=1)  # a season ends before its second day
    return {"datetime": None, "start_datetime": f"{start}T00:00:00Z", "end_datetime": f"{last}T23:59:59Z"}


def _links(granules: list[GranuleName], source: str, path: Path) -> list[dict[str, str]]:
    if granules:
        return [
            {
                "rel": "derived_from",
                "href": _NASA.format(**vars(one)),
                "type": "application/geo+json",
                "title": one.granule,
            }
            for one in granules
        ]
    if "://" not in source and not source.startswith("/vsi"):
        try:
            source = Path(os.path.relpath(source, path.parent)).as_posix()
        except ValueError:  # another drive
            source = Path(source).absolute().as_uri()
    return [{"rel": "derived_from", "href": source}]
