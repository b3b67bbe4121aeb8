"""A finished map as a STAC item beside it, for catalogs: place, time, sources, statistics, size and checksum.

Fields are those of STAC 1.1 and of its extensions projection, raster, file and processing. Mosaics and changes of maps
have items of the same form; their keyword tells which they are.
"""

import datetime
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
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
_EXTENSION = "https://stac-extensions.github.io/{}/schema.json"
EXTENSIONS = {  # by what their fields begin with
    "proj": _EXTENSION.format("projection/v2.0.0"),
    "raster": _EXTENSION.format("raster/v1.1.0"),
    "file": _EXTENSION.format("file/v2.1.0"),
    "processing": _EXTENSION.format("processing/v1.1.0"),
}
MEDIA_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
ITEM_TYPE, JSON_TYPE = "application/geo+json", "application/json"
_NASA = "https://cmr.earthdata.nasa.gov/stac/LPCLOUD/collections/HLS{sensor}_{version}/items/{granule}"
_SHA256 = "1220"  # how a multihash begins that is one: its code and its length
_SIDE_POINTS = 8  # along each side of the outline: a straight line of a UTM zone is none in degrees
_DIGITS = 7  # of a degree: a centimetre
KINDS = ("map", "mosaic", "change")  # keyword of an item
_UP = ("root", "parent", "collection")  # an item's links to its collection
_QUICKLOOK = "quicklook"


def item_path(path: Path) -> Path:
    """`<map's stem>.json` beside the map."""
    return path.with_name(f"{path.stem}.json")


def quicklook_path(path: Path) -> Path:
    """`<map's stem>_quicklook.png` beside the map."""
    return path.with_name(f"{path.stem}_quicklook.png")


def read_item(path: Path) -> dict[str, Any]:
    """The item beside a map; empty where there is none, or where another file has its name."""
    try:
        found = json.loads(item_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ours = isinstance(found, dict) and found.get("stac_version") and found.get("id") == path.stem
    return found if ours else {}


def write_item(path: Path, *sources: str) -> str:
    """Write the item of a finished map beside it, whole; where a map can't have one, a warning says why.

    Args:
        path: the map, a mosaic of maps or their change.
        sources: paths and URLs of what it was made from; of a map, its image. Granules are those of its tag
            DATA_SOURCES.

    Returns:
        Why it has none, "" where it has one.

    Raises:
        RasterError: the map can't be read.
        OSError: the item can't be written.
    """
    with raster_errors(str(path)), open_quietly(str(path)) as dataset:
        grid, tags = grid_of(dataset), dataset.tags()
        bands = [_band(dataset, number) for number in dataset.indexes]
        name = dataset.descriptions[0] or "data"
    granules = _granules(tags.get("DATA_SOURCES", ""))
    try:
        if item_path(path).exists() and not read_item(path):
            raise RasterError(f"{item_path(path)} lies there and is another file; move that one, or the map")
        about = _about(grid, tags, granules)
        for band in bands:
            band["spatial_resolution"] = float(np.mean(grid.pixel_size() or ()))
    except RasterError as error:
        log.warning("%s: has no STAC item: %s", path, error)
        return str(error)
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
        "stac_extensions": [*EXTENSIONS.values()],
        "id": path.stem,
        **about,
        "links": _links(granules, sources, path),
        "assets": {name: asset, **_pictures(path)},
    }
    write_json(item_path(path), item)
    return ""


def renew_item(path: Path) -> str:
    """Write a map's item where there is none, or where it isn't that of the map and its picture as they are now.

    What the map was made from stays, where its item tells of this very file. Returns and raises as `write_item`.
    """
    item = read_item(path)
    fits = _tells_of(item, path)
    pictures = {name: asset for name, asset in item.get("assets", {}).items() if name == _QUICKLOOK} if fits else {}
    told = {*item["properties"].get("keywords", ())} & {*KINDS} if fits else {}  # older versions didn't tell
    if told and pictures == _pictures(path):
        return ""
    links = [link["href"] for link in item["links"] if link["rel"] == "derived_from"] if fits else []
    return write_item(path, *(_absolute(href, path) for href in links if granule_name(href) is None))


def remove_item(path: Path) -> None:
    """Remove the item of a map that is made again: its checksum would be another one's. Other files stay."""
    if read_item(path):
        item_path(path).unlink()


def join_collection(path: Path, collection: Path, name: str) -> None:
    """Let a map's item lead to its collection's file, and to the items of other maps that it was made from."""
    item = read_item(path)
    up = {"href": href_to(collection, path.parent), "type": JSON_TYPE}
    kept = [
        _source_link(_absolute(link["href"], path), path)
        if link["rel"] == "derived_from" and "type" not in link
        else link
        for link in item["links"]
        if link["rel"] not in _UP
    ]
    joined = item | {"collection": name, "links": [*({"rel": rel, **up} for rel in _UP), *kept]}
    if joined != item:
        write_json(item_path(path), joined)


def href_to(place: str | Path, folder: Path) -> str:
    """The way from a folder to a file, as hrefs have it."""
    try:
        way = Path(os.path.relpath(place, folder)).as_posix()
    except ValueError:  # another drive
        return Path(place).absolute().as_uri()
    return way if way.startswith("../") else f"./{way}"


def _absolute(href: str, path: Path) -> str:
    """What an href of a map's item leads to."""
    return href if _is_far(href) else str(path.parent / href)


def _is_far(source: str) -> bool:
    return "://" in source or source.startswith("/vsi")


def _tells_of(item: dict[str, Any], path: Path) -> bool:
    """Whether an item tells of the map as it is, by size, and by checksum where the map is newer than the item."""
    try:
        if not isinstance(item["links"], list) or not {"bbox", "properties"} <= item.keys():
            return False
        (asset,) = (one for one in item["assets"].values() if one["href"] == f"./{path.name}")
        status = path.stat()
        return bool(asset["file:size"] == status.st_size) and (
            status.st_mtime_ns <= item_path(path).stat().st_mtime_ns
            or asset["file:checksum"] == _SHA256 + sha256_of(path)
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # none, or not one of ours
        return False


def _pictures(path: Path) -> dict[str, Any]:
    """The asset of the picture beside a map, if there is one."""
    picture = quicklook_path(path)
    asset = {"href": f"./{picture.name}", "type": "image/png", "roles": ["thumbnail", "overview"]}
    return {_QUICKLOOK: asset} if picture.is_file() else {}


def _about(grid: Grid, tags: Mapping[str, str], granules: list[GranuleName]) -> dict[str, Any]:
    """Place, time and history of a raster, as items have them.

    Raises:
        RasterError: it has no place, or nothing tells its time.
    """
    if grid.crs is None:
        raise RasterError("it has no CRS")
    when = _time(_season(tags), granules)
    if when is None:
        raise RasterError("nothing tells its date; give the image a tag SEASON, as 2020-06-01/2020-09-01")
    return {
        **outline(grid),
        "properties": {
            **when,
            **_projection(grid.crs),
            "proj:shape": [grid.height, grid.width],
            "proj:transform": list(grid.transform)[:6],
            **_history(tags, granules),
        },
    }


def kind_of(tags: Mapping[str, str]) -> str:
    """Which of `KINDS` a raster is by its tags; "" for one that is none of ours."""
    if "BEFORE" in tags and "AFTER" in tags:
        return "change"
    return "mosaic" if "MOSAIC_SHA256" in tags else "map" if "MODEL_SHA256" in tags else ""


def models_of(tags: Mapping[str, str]) -> list[str]:
    """SHA-256 of the weights of all models that a raster was made by, sorted."""
    every = "; ".join(tags.get(f"MODEL_SHA256{of}", "") for of in ("", "_BEFORE", "_AFTER"))
    return sorted({*every.split("; ")} - {""})


def _history(tags: Mapping[str, str], granules: list[GranuleName]) -> dict[str, Any]:
    """What kind of raster it is, how it was made, and by which program and models."""
    kind = kind_of(tags) or "map"  # old ones don't tell their model
    if kind == "change":
        made = f"{tags['AFTER']} less {tags['BEFORE']}"
    elif kind == "mosaic":
        made = f"{tags.get('MAPS', 'several')} maps, where they overlap by {tags.get('OVERLAP', 'a rule')}"
    else:
        image = tags.get("SOURCE_NAMES") or ("" if granules else tags.get("DATA_SOURCES", ""))
        of = f"{len(granules)} HLS granule{'' if len(granules) == 1 else 's'}" if granules else ""
        made = f"predicted from {' of '.join(filter(None, (image, of))) or 'an image'}"
    models = "; ".join(models_of(tags))
    name, _, version = tags.get("SOFTWARE", "").rpartition(" ")
    # The weights are versions of the program that made the values as much as the package's own.
    software = {key: text for key, text in ((name, version), ("model", models)) if key and text}
    by = f"; SHA-256 of the model's weights: {models}" if models else ""
    return {
        "keywords": [kind],
        "processing:lineage": f"{kind}: {made}{by}",
        **({"processing:software": software} if software else {}),
    }


def _season(tags: Mapping[str, str]) -> str:
    """Of a map or a mosaic; of a change, from the beginning of the first to the end of the second."""
    before, after = tags.get("SEASON_BEFORE", ""), tags.get("SEASON_AFTER", "")
    if is_season(before) and is_season(after):
        return f"{before.split('/')[0]}/{after.split('/')[1]}"
    return tags.get("SEASON", "")


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
    nodata = "nan" if dataset.nodata is not None and np.isnan(dataset.nodata) else dataset.nodata  # JSON has no NaN
    band = {"data_type": kind, "nodata": nodata, "unit": unit, "sampling": "area"}
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


def _links(granules: list[GranuleName], sources: Sequence[str], path: Path) -> list[dict[str, str]]:
    """To what a map was made from: the granules, and other files than those."""
    links = [
        {"rel": "derived_from", "href": _NASA.format(**vars(one)), "type": ITEM_TYPE, "title": one.granule}
        for one in granules
    ]
    return links + [_source_link(one, path) for one in sources if not (granules and granule_name(one))]


def _source_link(source: str, path: Path) -> dict[str, str]:
    """To a file that a map was made from, or to that one's item, which is what such a link is for."""
    if _is_far(source):
        return {"rel": "derived_from", "href": source}
    if read_item(Path(source)):
        return {"rel": "derived_from", "href": href_to(item_path(Path(source)), path.parent), "type": ITEM_TYPE}
    return {"rel": "derived_from", "href": href_to(source, path.parent)}
