"""Where chips lie: outlines in longitude and latitude, equal-area blocks, and which chips share ground.

Chips of neighbouring tiles overlap, in one UTM zone, across two, and across the antimeridian. Two outlines are compared
in a plane that touches the ellipsoid at one of them, reached through geocentric coordinates: it knows neither zones nor
a seam at 180 degrees, and over the 20 km that matter here it is true to within 10 cm.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from pyproj import Transformer
from shapely.geometry.polygon import orient

from biomass_jax.data.raster.grid import equal_area_blocks
from biomass_jax.errors import PrepError

TOLERANCE_M = 0.5  # chips that share an edge touch but share no ground; projections agree to about 1 cm
EDGE_POINTS = 4  # along each side of an outline: straight lines in degrees leave a 7 km side by up to a few metres
DIGITS = 9  # of degrees, 0.1 mm: rounded, so that the last bits of a projection don't reach the files
_A = 6378137.0  # WGS 84
_E2 = 0.0066943799901413165  # f (2 - f) with f = 1 / 298.257223563
_RADIUS = 6_371_008.8  # mean of the Earth's
_PAIRS_AT_ONCE = 20_000
_CUBE_M = 50_000.0  # in which distant chips are ruled out together


def chip_outlines(epsg: int, transform: Sequence[float], places: np.ndarray, size: int) -> np.ndarray:
    """Outlines of chips in longitude and latitude (EPSG:4326).

    Args:
        epsg: code of the tile's CRS.
        transform: affine a b c d e f of the tile, from (column, row) of a pixel's corner.
        places: (n, 2) row and column of the chips' upper-left pixels.
        size: pixels along a chip's side.

    Returns:
        (n,) shapely polygons, counter-clockwise; a chip across 180 degrees is a multipolygon of its two sides.
    """
    a, b, c, d, e, f = transform
    step = np.arange(EDGE_POINTS) / EDGE_POINTS
    ring = np.concatenate(  # (row, column) down the west side, along the south, up the east, back along the north
        [
            np.stack([step, 0 * step], 1),
            np.stack([0 * step + 1, step], 1),
            np.stack([1 - step, 0 * step + 1], 1),
            np.stack([0 * step, 1 - step], 1),
        ]
    )
    rows, cols = np.moveaxis(np.asarray(places).reshape(-1, 1, 2) + ring * size, -1, 0)
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    lon, lat = Transformer.from_crs(epsg, 4326, always_xy=True).transform(x, y)
    lon = lon[:, :1] + (lon - lon[:, :1] + 180) % 360 - 180  # one piece, maybe beyond 180
    outlines = shapely.polygons(np.round(np.stack([lon, lat], -1), DIGITS))
    return np.array([_cut_at_antimeridian(outline) for outline in outlines], object)


def _cut_at_antimeridian(outline: Any) -> Any:
    west, _, east, _ = outline.bounds
    if west >= -180 and east <= 180:
        return outline
    parts = []
    for turn in (-360, 0, 360):
        moved = shapely.transform(outline, lambda points, turn=turn: points + (turn, 0))
        part = shapely.intersection(moved, shapely.box(-180, -90, 180, 90))
        if part.area > 0:
            parts.append(shapely.transform(part, lambda points: np.round(points, DIGITS)))
    parts = [orient(shapely.normalize(part)) for part in parts]
    return parts[0] if len(parts) == 1 else shapely.multipolygons(parts)


def geocentric(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Degrees on the WGS 84 ellipsoid -> (..., 3) metres from the Earth's centre."""
    lon, lat = np.radians(lon), np.radians(lat)
    normal = _A / np.sqrt(1 - _E2 * np.sin(lat) ** 2)
    return np.stack(
        [normal * np.cos(lat) * np.cos(lon), normal * np.cos(lat) * np.sin(lon), normal * (1 - _E2) * np.sin(lat)], -1
    )


def centres(outlines: Any) -> np.ndarray:
    """(n, 2) longitude and latitude of the outlines' centres, also of those cut at 180 degrees."""
    if not len(outlines):
        return np.empty((0, 2))
    corners = _corners(outlines)
    origin = corners.mean(axis=1)
    east, north = _axes(origin)
    middle = shapely.get_coordinates(shapely.centroid(_hulls(corners, origin, east, north)))
    x, y, z = (origin + middle[:, :1] * east + middle[:, 1:] * north).T
    return np.stack([np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, (1 - _E2) * np.hypot(x, y)))], -1)


def block_names(lon: np.ndarray, lat: np.ndarray, block_km: float) -> np.ndarray:
    """Names `x_y` of the blocks of an equal-area grid (EPSG:6933) in which places lie.

    Args:
        lon: (n,) degrees.
        lat: (n,) degrees.
        block_km: square root of a block's area; on the ground blocks are square at 30 degrees of latitude.
    """
    if not block_km > 0:
        raise PrepError(f"block_km: found {block_km}, expected kilometres above 0")
    return np.array(equal_area_blocks(4326, lon, lat, block_km), object)


def meets(outlines: Any, others: Any, *, buffer_m: float = 0.0) -> np.ndarray:
    """Which outlines share ground with any of the others, or come closer to one than `buffer_m`.

    Args:
        outlines: (n,) polygons in longitude and latitude, about convex.
        others: (m,) likewise.
        buffer_m: metres on the ground. With 0, outlines that only share an edge don't meet.

    Returns:
        bool (n,).
    """
    met = np.zeros(len(outlines), bool)
    if not len(outlines) or not len(others):
        return met
    mine, theirs = _corners(outlines), _corners(others)
    pairs = _near(mine, theirs, buffer_m)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        i, j = pairs[start : start + _PAIRS_AT_ONCE].T
        origin = theirs[j].mean(axis=1)
        east, north = _axes(origin)
        one = shapely.buffer(_hulls(mine[i], origin, east, north), -2 * TOLERANCE_M, join_style="mitre")
        distance = shapely.distance(one, _hulls(theirs[j], origin, east, north))
        met[i[distance < buffer_m + TOLERANCE_M]] = True
    return met


def nearest(outlines: Sequence[object] | np.ndarray, others: Sequence[object] | np.ndarray) -> np.ndarray:
    """How far each outline lies from the nearest of the others, from edge to edge.

    Args:
        outlines: (n,) polygons in longitude and latitude, about convex and no larger than a chip.
        others: (m,) likewise.

    Returns:
        (n,) metres on the ground, true to within 1 m up to 100 km and 0.5 % beyond; 0 where they touch or share ground,
        inf where there are no others.
    """
    found = np.full(len(outlines), np.inf)
    if not len(outlines) or not len(others):
        return found
    mine, theirs = _corners(outlines), _corners(others)
    (places, radii), (other_places, other_radii) = _circles(mine), _circles(theirs)
    cubes = _by_cube(other_places)
    middles, spreads = (np.array(part) for part in zip(*(_ball(other_places[cube]) for cube in cubes), strict=True))
    for group in _by_cube(places):
        # Cubes of others that may hold a nearest one, then the chips of these whose circles come close enough.
        middle, spread = _ball(places[group])
        apart = np.linalg.norm(middles - middle, axis=1)
        reach = (apart + spreads).min() + 2 * spread + radii[group].max() + other_radii.max()
        near = np.concatenate([cube for cube, close in zip(cubes, apart - spreads <= reach, strict=True) if close])
        between = np.linalg.norm(places[group][:, None] - other_places[near], axis=-1)
        gap = _gaps(mine[group], theirs[near[between.argmin(axis=1)]])
        closer = (between - radii[group][:, None] - other_radii[near] < gap[:, None]) & (gap[:, None] > 0)
        i, j = np.nonzero(closer)
        for start in range(0, len(i), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            np.minimum.at(gap, i[some], _gaps(mine[group[i[some]]], theirs[near[j[some]]]))
        found[group] = gap
    return found


def _gaps(corners: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Metres between the outlines of each pair, by a plane halfway between them; 0 where they touch.

    (n, points, 3) and (n, points, 3) geocentric metres -> (n,).
    """
    origin = (corners.mean(axis=1) + others.mean(axis=1)) / 2
    east, north = _axes(origin)
    flat = shapely.distance(_hulls(corners, origin, east, north), _hulls(others, origin, east, north))
    along = 2 * _RADIUS * np.arcsin(np.minimum(flat / (2 * _RADIUS), 1))
    return np.where(along < TOLERANCE_M, 0.0, along)


def _circles(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middles (n, 3) of outlines' corners, and the distance (n,) of the corner that is farthest from each."""
    places = corners.mean(axis=1)
    return places, np.linalg.norm(corners - places[:, None], axis=-1).max(axis=1)


def _ball(places: np.ndarray) -> tuple[np.ndarray, float]:
    """Middle of places (n, 3), and the distance of the one that is farthest from it."""
    middle = places.mean(axis=0)
    return middle, float(np.linalg.norm(places - middle, axis=1).max())


def _by_cube(places: np.ndarray) -> list[np.ndarray]:
    """Indexes of the places (n, 3) of each cube of `_CUBE_M`."""
    _, cube, counts = np.unique(np.floor(places / _CUBE_M), axis=0, return_inverse=True, return_counts=True)
    return np.split(np.argsort(cube.ravel(), kind="stable"), np.cumsum(counts)[:-1])


def _corners(outlines: object) -> np.ndarray:
    """(n, points, 3) geocentric metres; outlines with fewer points repeat their last."""
    outlines = np.asarray(outlines, object)
    points, owner = shapely.get_coordinates(outlines, return_index=True)
    counts = np.bincount(owner, minlength=len(outlines))
    first = np.cumsum(counts) - counts
    index = first[:, None] + np.minimum(np.arange(counts.max()), counts[:, None] - 1)
    return geocentric(*points.T)[index]


def _axes(origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """East and north (n, 3) of planes that touch the Earth at (n, 3)."""
    east = np.stack([-origin[:, 1], origin[:, 0], np.zeros(len(origin))], -1)
    east /= np.linalg.norm(east, axis=1, keepdims=True)
    north = np.cross(origin, east)
    return east, north / np.linalg.norm(north, axis=1, keepdims=True)


def _hulls(corners: np.ndarray, origin: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """Outlines as convex polygons in metres of the plane at their origin."""
    offset = corners - origin[:, None]
    plane = np.stack([np.einsum("npk,nk->np", offset, axis) for axis in (east, north)], -1)
    owner = np.repeat(np.arange(len(plane)), plane.shape[1])
    return shapely.convex_hull(shapely.multipoints(plane.reshape(-1, 2), indices=owner))


def _near(mine: np.ndarray, theirs: np.ndarray, buffer_m: float) -> np.ndarray:
    """(pairs, 2) indexes of outlines that come close enough to be compared, by a grid of cubes."""
    places, radii = zip(*(_circles(corners) for corners in (mine, theirs)), strict=True)
    edge = radii[0].max() + radii[1].max() + buffer_m
    cubes: dict[tuple[int, ...], list[int]] = {}
    for j, cube in enumerate(np.floor(places[1] / edge).astype(int).tolist()):
        cubes.setdefault(tuple(cube), []).append(j)
    around = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
    pairs = [
        (i, j)
        for i, (x, y, z) in enumerate(np.floor(places[0] / edge).astype(int).tolist())
        for dx, dy, dz in around
        for j in cubes.get((x + dx, y + dy, z + dz), ())
    ]
    found = np.array(pairs, int).reshape(-1, 2)
    apart = np.linalg.norm(places[0][found[:, 0]] - places[1][found[:, 1]], axis=1)
    return found[apart <= radii[0][found[:, 0]] + radii[1][found[:, 1]] + buffer_m]
