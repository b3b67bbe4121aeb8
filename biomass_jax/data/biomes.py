"""Biomes of chips: from polygons, or from the name of a published folder.

Polygons need the libraries of the extra `prep` (geopandas, shapely, pyproj), which are loaded when they are asked for.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import records
from biomass_jax.errors import BiomeError

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

    a, b, c, d, e, f = (float(value) for value in transform)
    row, col = shape[0] / 2, shape[1] / 2
    x, y = a * col + b * row + c, d * col + e * row + f
    lon, lat = Transformer.from_crs(int(epsg), 4326, always_xy=True).transform(x, y)
    return float(lon), float(lat)
