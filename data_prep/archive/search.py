"""Searches of NASA's archive: by tile, box or polygons; answers are UMM-G records as `earthaccess` gives them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data.labels import BIOMASS
from biomass_jax.errors import PrepError
from data_prep.gedi.names import level_of
from data_prep.hls.granules import VERSION
from data_prep.places import Box, grid_box, grid_centre, tile_grid
from data_prep.season import Season

HLS_PRODUCTS = {"L30": "HLSL30", "S30": "HLSS30"}
GEDI_PRODUCT = "GEDI_L4A_AGB_Density_V2_1_2056"
# Of version 2, whose shots lie where those of the L4A product above do; files of version 3 are read as well.
GEDI_HEIGHTS = {"short_name": "GEDI02_A", "version": "002"}
GEDI_COVERAGE = "GEDI measures from 51.6 S to 51.6 N, from 2019-04-18 to 2023-03-16 and again since April 2024"

Search = Callable[..., Sequence[Mapping[str, Any]]]  # earthaccess.search_data, or recorded answers
Ring = list[tuple[float, float]]


@dataclass(frozen=True)
class Area:
    """Where to search: one of them is set.

    Attributes:
        tile: an MGRS tile (`10SFF`).
        box: (west, south, east, north) in degrees; west > east crosses the antimeridian.
        rings: outlines of polygons, (longitude, latitude), closed and counter-clockwise.
    """

    tile: str | None = None
    box: Box | None = None
    rings: tuple[Ring, ...] = ()

    @property
    def latitude(self) -> float:
        """Of its centre, degrees."""
        if self.tile is not None:
            return grid_centre(tile_grid(self.tile))[1]
        south, north = (self.box[1], self.box[3]) if self.box is not None else self._bounds()[1::2]
        return (south + north) / 2

    def _bounds(self) -> Box:
        lon, lat = zip(*(point for ring in self.rings for point in ring), strict=True)
        return min(lon), min(lat), max(lon), max(lat)

    def queries(self, *, by_name: str | None = None) -> list[dict[str, Any]]:
        """The spatial part of one search each; `by_name` has a place for the tile, None asks for its box."""
        if self.tile is not None and by_name is not None:
            return [{"granule_name": by_name.format(tile=self.tile)}]
        if self.tile is not None:
            return [{"bounding_box": grid_box(tile_grid(self.tile))}]
        if self.box is not None:
            return [{"bounding_box": self.box}]
        return [{"polygon": ring} for ring in self.rings]


def search_hls(
    area: Area, season: Season, *, sensors: Sequence[str] = ("L30",), search: Search
) -> list[Mapping[str, Any]]:
    """Answers (UMM-G granules) of all searches that an area, a season and sensors need."""
    if not sensors or not set(sensors) <= set(HLS_PRODUCTS):
        raise PrepError(f"sensors {tuple(sensors)}: expected L30, S30 or both")
    answers: list[Mapping[str, Any]] = []
    for sensor in sorted(set(sensors)):
        for where in area.queries(by_name=f"HLS.{sensor}.T{{tile}}.*"):
            product = {"short_name": HLS_PRODUCTS[sensor], "version": VERSION}
            answers += _ask(search, **product, **where, temporal=_temporal(season))
    return answers


def search_gedi(
    area: Area, seasons: Sequence[Season], *, search: Search, label: str = BIOMASS.name
) -> list[Mapping[str, Any]]:
    """Answers (UMM-G granules) for the orbits that meet an area in one of the seasons, of the product with the label.

    Raises:
        PrepError: no product has such a label.
    """
    product = {"short_name": GEDI_PRODUCT} if level_of(label).product == "L4A" else GEDI_HEIGHTS
    answers: list[Mapping[str, Any]] = []
    for season in seasons:
        for where in area.queries():
            answers += _ask(search, **product, **where, temporal=_temporal(season))
    return answers


def search_archive(**query: object) -> Sequence[Mapping[str, Any]]:
    """`earthaccess.search_data` for all answers there are."""
    return earthaccess_library().search_data(count=-1, **query)


def earthaccess_library() -> Any:
    """The library, which is slow to import and only needed where the archive is asked.

    Raises:
        PrepError: it isn't installed.
    """
    try:
        import earthaccess
    except ImportError as error:
        raise PrepError(f"downloads need earthaccess: {error}; pip install 'biomass-jax[prep]'") from error
    return earthaccess


def read_area(path: str | os.PathLike[str]) -> Area:
    """The polygons of a GeoJSON file, outer rings only; longitudes from 0 to 360 become those from -180 to 180.

    Raises:
        PrepError: unreadable, or no polygon in it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        rings = tuple(_counter_clockwise(ring) for ring in _rings(content))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PrepError(f"{path}: can't be read as GeoJSON: {error}") from error
    if not rings:
        raise PrepError(f"{path}: no polygon in it; expected Polygon or MultiPolygon geometries")
    for ring in rings:
        if len(ring) < 4 or ring[0] != ring[-1]:
            raise PrepError(f"{path}: an outline of {len(ring)} points that isn't closed; expected 4 or more")
        for lon, lat in ring:
            if not (-180 <= lon <= 180 and -90 <= lat <= 90):
                raise PrepError(f"{path}: a point at ({lon}, {lat}); expected longitude and latitude in degrees")
    return Area(rings=rings)


def _rings(geometry: Mapping[str, Any] | None) -> list[list]:
    if geometry is None:  # a feature that lies nowhere
        return []
    kind = geometry["type"]
    if kind == "FeatureCollection":
        return [ring for feature in geometry["features"] for ring in _rings(feature)]
    if kind == "Feature":
        return _rings(geometry["geometry"])
    if kind == "GeometryCollection":
        return [ring for part in geometry["geometries"] for ring in _rings(part)]
    if kind == "Polygon":
        return [geometry["coordinates"][0]]
    return [polygon[0] for polygon in geometry["coordinates"]] if kind == "MultiPolygon" else []


def _counter_clockwise(points: Sequence[Sequence[float]]) -> Ring:
    ring = [(float(point[0]), float(point[1])) for point in points]
    lon, lat = np.array(ring).T
    areas = [np.sum(x[:-1] * lat[1:] - x[1:] * lat[:-1]) for x in (np.unwrap(lon, period=360), lon)]
    # an edge across the antimeridian is the short one; only around the whole globe there is none
    ring = [(east - 360 if 180 < east <= 360 else east, north) for east, north in ring]
    return ring if (areas[0] or areas[1]) >= 0 else ring[::-1]


def _temporal(season: Season) -> tuple[str, str]:
    """First and last second, as the archive's search includes both."""
    start, stop = season.bounds
    return f"{start:%Y-%m-%dT%H:%M:%SZ}", f"{stop - timedelta(seconds=1):%Y-%m-%dT%H:%M:%SZ}"


def _ask(search: Search, **query: object) -> Sequence[Mapping[str, Any]]:
    try:
        return search(**query)
    except (RuntimeError, OSError) as error:  # what earthaccess raises for a failed search
        raise PrepError(f"the archive's search failed for {query}: {error}") from error
