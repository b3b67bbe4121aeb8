"""Biomes of chips: from polygons, or from the name of a published folder.

Polygons need the libraries of the extra `prep` (geopandas, shapely, pyproj), which are loaded when they are asked for.
"""

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import records
from biomass_jax.data.records import Record
from biomass_jax.data.sources import Source
from biomass_jax.errors import BiomeError

log = logging.getLogger(__name__)

_READERS = 8  # threads
_ALL = "all_ecos"  # the published folder that holds every biome


class Biomes:
    """Polygons that name the biome at a place."""

    def __init__(self, path: str | os.PathLike[str], field: str) -> None:
        """Read the polygons.

        Args:
            path: any file that GDAL reads, or GeoParquet.
            field: the column with the name.

        Raises:
            BiomeError: unreadable, without a CRS or without that column; or the libraries aren't installed.
        """
        from shapely import STRtree

        frame = read_polygons(path, field).to_crs(4326)
        self._slugs = [slug(value) for value in frame[field]]
        self._tree = STRtree(np.asarray(frame.geometry, object))

    def at(self, places: np.ndarray) -> list[str]:
        """Slugs at (n, 2) longitudes and latitudes: that of the first polygon in the file, else `unknown`.

        Longitudes of either may run from -180 to 180 or from 0 to 360.
        """
        import shapely

        found: dict[int, int] = {}
        for turn in (0, -360, 360):  # polygons from 0 to 360 degrees, or across the antimeridian
            points, polygons = self._tree.query(shapely.points(places + [turn, 0]), predicate="intersects")
            for point, polygon in zip(points.tolist(), polygons.tolist(), strict=True):
                found[point] = min(polygon, found.get(point, polygon))
        return [self._slugs[found[i]] if i in found else records.UNKNOWN_BIOME for i in range(len(places))]


def read_polygons(path: str | os.PathLike[str], field: str, rows: int | None = None) -> Any:
    """A GeoDataFrame of polygons, or of the first `rows` of them where only the file is looked at.

    Raises:
        BiomeError: see `Biomes`.
    """
    try:
        import geopandas
    except ImportError as error:
        raise BiomeError(f"{path}: polygons need {error.name}; pip install 'biomass-jax[prep]'") from error
    try:
        is_parquet = str(path).endswith((".parquet", ".geoparquet"))
        frame = geopandas.read_parquet(path) if is_parquet else geopandas.read_file(path, rows=rows)
    except Exception as error:  # pyogrio, pyarrow and shapely each have their own
        raise BiomeError(f"{path}: can't be read as polygons: {error}") from error
    if field not in frame.columns or frame.crs is None:
        raise BiomeError(
            f"{path}: found columns {', '.join(frame.columns)} and CRS {frame.crs}, expected {field} and a CRS"
        )
    return frame


def slug(value: object) -> str:
    """`boreal-forests-taiga` for 'Boreal Forests/Taiga'; `unknown` where no letter or digit is left."""
    text = "" if value is None or value != value else str(value)
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-") or records.UNKNOWN_BIOME


def folder_biome(path: str | os.PathLike[str]) -> str:
    """`taiga` for `.../taiga_datasplit`, as the published folders are named; `unknown` for all other names."""
    name = Path(path).absolute().name
    biome = name.removesuffix("_datasplit")
    return records.UNKNOWN_BIOME if biome in (name, _ALL) else slug(biome)


def centre(epsg: int, transform: np.ndarray, shape: tuple[int, int]) -> tuple[float, float]:
    """Longitude and latitude of a chip's centre.

    Args:
        epsg: code of its CRS, not 0.
        transform: (6,) affine a b c d e f of its upper-left corner.
        shape: (H, W).
    """
    from pyproj import Transformer

    lon, lat = Transformer.from_crs(int(epsg), 4326, always_xy=True).transform(*records.centre(transform, shape))
    return float(lon), float(lat)


class NamedSource(Source):
    """Chips of a source with biomes from elsewhere; all of them, or a choice.

    Args:
        source: the chips.
        kept: numbers of those to keep, in order.
        biomes: of all chips; None for what the records say.
        default: for chips that are `unknown`.
    """

    def __init__(self, source: Source, kept: Sequence[int], biomes: list[str] | None, default: str) -> None:
        self._source, self._kept, self._biomes, self._default = source, kept, biomes, default
        self.info = dataclasses.replace(source.info, chips=len(kept))

    def _read(self, index: int) -> Record:
        number = self._kept[index]
        record = self._source[number]
        biome = record["biome"] if self._biomes is None else self._biomes[number]
        return {**record, "biome": self._default if biome == records.UNKNOWN_BIOME else biome}

    def digest(self) -> str:
        """See Source: that of the chips that these are chosen from."""
        return self._source.digest()


def with_biomes(
    source: Source,
    path: str | os.PathLike[str],
    *,
    biome: str | None = None,
    polygons: str | os.PathLike[str] | None = None,
    field: str | None = None,
) -> Source:
    """A source whose chips know their biomes, of one biome where one is asked for.

    Polygons count before the records, and these before the name of a published folder (`taiga_datasplit`). Polygons
    and the choice of one biome read every chip once before scoring begins.

    Args:
        source: as `data.sources.open_source` gives it.
        path: of the data set.
        biome: slug of the only biome to keep; None for all chips.
        polygons: file of polygons that name biomes; the one at a chip's centre counts.
        field: the file's column of names.

    Raises:
        BiomeError: the biome that was asked for isn't there, or can't be known; chips without a place in polygons;
            see `Biomes` too.
    """
    if bool(polygons) != bool(field):
        raise BiomeError("config.data.biomes and config.data.biome_field go together: a polygon file, and its column")
    default = records.UNKNOWN_BIOME if polygons else folder_biome(path)
    if not (polygons or biome):
        return source if default == records.UNKNOWN_BIOME else NamedSource(source, range(len(source)), None, default)
    log.info("%s: finding the biomes of %d chips", path, len(source))
    if polygons:
        found = Biomes(polygons, str(field)).at(_centres(source, path))
    else:
        found = [default if chip.biome == records.UNKNOWN_BIOME else chip.biome for chip in source.chips()]
    counts = Counter(found)
    if biome and set(counts) <= {records.UNKNOWN_BIOME}:
        raise BiomeError(
            f"{path}: no chip's biome is known, so {biome!r} can't be chosen; give polygons (config.data.biomes=FILE "
            "and config.data.biome_field=COLUMN), or a folder named after its biome, such as taiga_datasplit"
        )
    if biome and biome not in counts:
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise BiomeError(f"{path}: no chip of biome {biome!r}; found {there}")
    kept = [number for number, name in enumerate(found) if not biome or name == biome]
    return NamedSource(source, kept, found, records.UNKNOWN_BIOME)


def _centres(source: Source, path: str | os.PathLike[str]) -> np.ndarray:
    """(n, 2) longitudes and latitudes of the chips' centres."""

    def place(index: int) -> tuple[float, float]:
        record = source[index]
        if not record["epsg"]:
            raise BiomeError(f"{path}: chip {record['chip_id']} has no coordinates, so no polygon tells its biome")
        height, width = record["label"].shape
        return centre(record["epsg"], record["transform"], (height, width))

    with ThreadPoolExecutor(_READERS) as pool:
        return np.array(list(pool.map(place, range(len(source)))), np.float64).reshape(-1, 2)
