"""Biomes from polygons: which one lies at a place."""

import os
import re
from typing import Any

import numpy as np

from biomass_jax.data import records
from data_prep.errors import PrepError


class Biomes:
    """Polygons that name the biome at a place."""

    def __init__(self, path: str | os.PathLike[str], field: str) -> None:
        """Read the polygons.

        Args:
            path: any file that GDAL reads, or GeoParquet.
            field: the column with the name.

        Raises:
            PrepError: unreadable, without a CRS or without that column.
        """
        import geopandas
        from shapely import STRtree

        try:
            is_parquet = str(path).endswith((".parquet", ".geoparquet"))
            frame = geopandas.read_parquet(path) if is_parquet else geopandas.read_file(path)
        except Exception as error:  # pyogrio, pyarrow and shapely each have their own
            raise PrepError(f"{path}: can't be read as polygons: {error}") from error
        if field not in frame.columns or frame.crs is None:
            raise PrepError(
                f"{path}: found columns {', '.join(frame.columns)} and CRS {frame.crs}, expected {field} and a CRS"
            )
        frame = frame.to_crs(4326)
        self._slugs = [slug(value) for value in frame[field]]
        self._tree = STRtree(np.asarray(frame.geometry, object))

    def at(self, places: np.ndarray) -> list[str]:
        """Slugs at (n, 2) longitudes and latitudes: that of the first polygon in the file, else `unknown`."""
        import shapely

        found: dict[int, int] = {}
        points, polygons = self._tree.query(shapely.points(places), predicate="intersects")
        for point, polygon in zip(points.tolist(), polygons.tolist(), strict=True):
            found[point] = min(polygon, found.get(point, polygon))
        return [self._slugs[found[i]] if i in found else records.UNKNOWN_BIOME for i in range(len(places))]


def slug(value: Any) -> str:
    """`boreal-forests-taiga` for 'Boreal Forests/Taiga'; `unknown` where no letter or digit is left."""
    text = "" if value is None or value != value else str(value)
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-") or records.UNKNOWN_BIOME
