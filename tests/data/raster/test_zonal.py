"""Zones on maps: areas against geodesics, sums against the surface that the maps were made of, each piece once."""

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import Geod, Transformer

from biomass_jax.data.raster.zonal import Maps
from biomass_jax.data.vectors import ground_area, outlines
from biomass_jax.errors import RasterError

GEOD = Geod(ellps="WGS84")


def surface(lon, lat):
    """Biomass as a function of place."""
    return 100 + 40 * np.sin(40 * np.radians(lon)) + 30 * np.cos(60 * np.radians(lat))


def write_map(path, crs, transform, shape, value=surface, sd=None, unit="Mg ha-1", names=("agbd", "agbd_sd")):
    """A map of a surface, or of an array, and of a constant standard deviation where one is given."""
    if callable(value):
        column, row = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
        x, y = transform.c + transform.a * column, transform.f + transform.e * row
        lon, lat = Transformer.from_crs(crs, 4326, always_xy=True).transform(x, y)
        value = value(np.asarray(lon), np.asarray(lat))
    layers = [np.broadcast_to(value, shape)]
    if sd is not None:
        layers.append(np.where(layers[0] == -1, -1, sd))
    profile = {"driver": "GTiff", "height": shape[0], "width": shape[1], "count": len(layers), "dtype": "float32"}
    with rasterio.open(path, "w", crs=crs, transform=transform, nodata=-1, tiled=True, **profile) as file:
        for band, layer in enumerate(layers, 1):
            file.write(layer.astype(np.float32), band)
            file.set_band_description(band, names[band - 1])
        file.units = [unit] * len(layers)
    return path


def in_degrees(geometry, crs):
    (found,) = outlines(geopandas.GeoDataFrame(geometry=[geometry], crs=crs), "zones")
    return found


def summed(maps, outline):
    """Area and total of what a zone has."""
    area = total = 0.0
    for cells in maps.cells(outline):
        seen = np.isfinite(cells.value)
        area += cells.area[seen].sum()
        total += (cells.area * cells.value)[seen].sum()
    return area, total


def truth(west, south, east, north):
    """The surface's total over a box of degrees, Mg, by small equal-angle pieces of the ellipsoid."""
    lon, lat = (low + (np.arange(400) + 0.5) / 400 * (high - low) for low, high in ((west, east), (south, north)))
    edges = np.radians(np.linspace(south, north, 401))
    e = 0.0818191908426215
    q = np.sin(edges) / (1 - (e * np.sin(edges)) ** 2) + np.arctanh(e * np.sin(edges)) / e
    strip = np.diff(q) * 6378137.0**2 * (1 - e**2) / 2 * np.radians((east - west) / 400) / 1e4
    return float((surface(lon[None], lat[:, None]) * strip[:, None]).sum())


def test_a_zone_at_60_north_over_two_utm_zones(tmp_path):
    """12 degrees east parts zones 32 and 33; both maps reach beyond it, and their overlap counts once."""
    west = write_map(tmp_path / "west.tif", "EPSG:32632", Affine(60, 0, 640000, 0, -60, 6690000), (700, 700))
    east = write_map(tmp_path / "east.tif", "EPSG:32633", Affine(60, 0, 321000, 0, -60, 6690000), (700, 700))
    box = (11.75, 60.0, 12.25, 60.25)
    zone = in_degrees(shapely.box(*box), 4326)
    area = ground_area(zone)
    with Maps([west, east]) as maps:
        assert len(maps.meeting(zone)) == 2
        found, total = summed(maps, zone)
        assert found == pytest.approx(area, rel=1e-4)
        assert total == pytest.approx(truth(*box), rel=2e-4)
        # Parts of it that lie across the seam add up to it, in whatever CRS they are cut.
        cuts = [shapely.Point(12.0, 60.1).buffer(0.09), shapely.box(11.9, 60.05, 12.1, 60.2)]
        parts = [shapely.intersection(shapely.box(*box), cuts[0]), shapely.difference(shapely.box(*box), cuts[0])]
        parts = [one for part in parts for one in (shapely.intersection(part, cuts[1]), part.difference(cuts[1]))]
        sums = np.array([summed(maps, in_degrees(part, 4326)) for part in parts])
        assert sums.sum(0) == pytest.approx((found, total), rel=1e-6)
    with Maps([east, west]) as maps:
        assert summed(maps, zone) == pytest.approx((found, total), rel=1e-4)
    with Maps([west, east, west]) as maps:
        assert summed(maps, zone) == (found, total)


@pytest.mark.parametrize("crs", [4326, 32701, "+proj=longlat +datum=WGS84 +lon_wrap=180"])
def test_a_zone_across_the_antimeridian(tmp_path, crs):
    there = write_map(tmp_path / "60.tif", "EPSG:32760", Affine(60, 0, 780000, 0, -60, 8125000), (650, 650))
    here = write_map(tmp_path / "1.tif", "EPSG:32701", Affine(60, 0, 178000, 0, -60, 8125000), (650, 650))
    box = (179.85, -17.2, 180.1, -17.0)
    outline = shapely.segmentize(shapely.box(*box), 0.01)
    if crs == 4326:  # as GeoJSON has it: cut in two
        halves = [shapely.box(box[0], box[1], 180, box[3]), shapely.box(-180, box[1], -179.9, box[3])]
        outline = shapely.MultiPolygon(halves[::-1])  # the eastern one first
    elif crs == 32701:
        outline = shapely.transform(
            outline, Transformer.from_crs(4326, crs, always_xy=True).transform, interleaved=False
        )
    zone = in_degrees(outline, crs)
    area = sum(abs(GEOD.geometry_area_perimeter(shapely.box(*part))[0]) for part in (box,)) / 1e4
    assert ground_area(zone) == pytest.approx(area, rel=1e-5)
    with Maps([there, here]) as maps:
        assert summed(maps, zone) == pytest.approx((area, truth(*box)), rel=1e-4)
        plane = maps.plane(zone)
    assert np.array(plane.shape) * plane.spacing == pytest.approx([22_130, 26_600], rel=0.02)


def test_maps_in_degrees_from_0_to_360_and_over_the_whole_globe(tmp_path):
    box = (-10.3, 59.8, -9.9, 60.2)
    some = write_map(tmp_path / "some.tif", "EPSG:4326", Affine(0.001, 0, 349, 0, -0.001, 61), (2000, 2000))
    world = write_map(tmp_path / "world.tif", "EPSG:4326", Affine(0.25, 0, -180, 0, -0.25, 90), (720, 1440))
    zone = in_degrees(shapely.box(*box), 4326)
    with Maps([some]) as maps:
        assert summed(maps, zone) == pytest.approx((ground_area(zone), truth(*box)), rel=1e-4)
        assert maps.at(np.array([-10.1]), np.array([60.0])).value == pytest.approx(surface(-10.1, 60.0), rel=1e-3)
    for wide in ((170, -60, 200, -50), (-185, 10, -178, 12)):
        zone = in_degrees(shapely.box(*wide), 4326)
        with Maps([world]) as maps:
            assert summed(maps, zone)[0] == pytest.approx(ground_area(zone), rel=2e-3)  # geodesics aren't parallels


def test_a_place_without_data_is_taken_from_the_next_map(tmp_path):
    transform = Affine(30, 0, 600000, 0, -30, 4100000)
    first = np.full((60, 80), 50.0)
    first[20:40, 10:30] = -1
    a = write_map(tmp_path / "a.tif", "EPSG:32610", transform, (60, 80), first)
    second = np.full((60, 80), 90.0)
    second[30:40, 10:30] = -1
    b = write_map(tmp_path / "b.tif", "EPSG:32610", transform, (60, 80), second)
    zone = in_degrees(shapely.box(600000 + 30 * 5, 4100000 - 30 * 50, 600000 + 30 * 70, 4100000 - 30 * 10), 32610)
    with Maps([a, b]) as maps:
        area, total = summed(maps, zone)
        lon, lat = Transformer.from_crs(32610, 4326, always_xy=True).transform(
            transform.c + 30 * np.array([12.5, 12.5, 50.5, 500.0]), transform.f - 30 * np.array([25.5, 35.5, 25.5, 5.0])
        )
        at = maps.at(lon, lat)
    pixel = ground_area(zone) / (65 * 40)
    assert area == pytest.approx((65 * 40 - 200) * pixel, rel=1e-5)
    assert total == pytest.approx((50 * (65 * 40 - 400) + 90 * 200) * pixel, rel=1e-4)
    np.testing.assert_array_equal(at.value, [90, np.nan, 50, np.nan])
    assert np.isnan(at.sd).all() and (at.kind == -1).all()


def test_a_map_without_a_no_data_value_ends_where_it_ends(tmp_path):
    transform = Affine(30, 0, 600000, 0, -30, 4100000)
    first = write_map(tmp_path / "a.tif", "EPSG:32610", transform, (60, 40), np.full((60, 40), 50.0))
    with rasterio.open(first, "r+") as file:
        file.nodata = None
    second = write_map(tmp_path / "b.tif", "EPSG:32610", transform, (60, 80), np.full((60, 80), 90.0))
    zone = in_degrees(shapely.box(600000, 4100000 - 30 * 60, 600000 + 30 * 80, 4100000), 32610)
    with Maps([first, second]) as maps:
        area, total = summed(maps, zone)
    assert (area, total / area) == pytest.approx((ground_area(zone), 70), rel=1e-4)


def test_classes_are_those_at_the_pixels_centres(tmp_path):
    transform = Affine(30, 0, 600000, 0, -30, 4100000)
    path = write_map(tmp_path / "a.tif", "EPSG:32610", transform, (40, 60), np.full((40, 60), 80.0))
    classes = np.repeat(np.repeat(np.arange(1, 5).reshape(2, 2), 60, 0), 90, 1).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 120, "width": 180, "count": 1, "dtype": "uint8"}
    fine = Affine(10, 0, 600000, 0, -10, 4100000)
    with rasterio.open(tmp_path / "classes.tif", "w", crs="EPSG:32610", transform=fine, **profile) as file:
        file.write(classes, 1)
    zone = in_degrees(shapely.box(600000, 4100000 - 1200, 601800 - 30 * 10, 4100000), 32610)
    with Maps([path], tmp_path / "classes.tif") as maps:
        areas = np.zeros(5)
        for cells in maps.cells(zone):
            np.add.at(areas, cells.kind, cells.area)
    assert areas / areas.sum() == pytest.approx([0, 0.3, 0.2, 0.3, 0.2], rel=1e-4)
    floats = np.where(classes == 3, np.nan, classes).astype(np.float32)
    profile |= {"dtype": "float32", "width": 90}  # of the western half alone
    with rasterio.open(tmp_path / "floats.tif", "w", crs="EPSG:32610", transform=fine, **profile) as file:
        file.write(floats[:, :90], 1)
    with Maps([path], tmp_path / "floats.tif") as maps:
        kinds = np.concatenate([cells.kind for cells in maps.cells(zone)])
    assert np.unique(kinds, return_counts=True)[0].tolist() == [-1, 1] and (kinds == 1).sum() == 600


def test_the_plane_of_a_zone_keeps_distances(tmp_path):
    west = write_map(tmp_path / "west.tif", "EPSG:32632", Affine(60, 0, 640000, 0, -60, 6690000), (350, 700))
    east = write_map(tmp_path / "east.tif", "EPSG:32633", Affine(60, 0, 321000, 0, -60, 6690000), (350, 700))
    south = write_map(tmp_path / "south.tif", "EPSG:32632", Affine(60, 0, 640600, 0, -60, 6690000 - 21000), (350, 700))
    for paths, tolerance in (
        ([west, east], 90.0),
        ([west, south], 50.0),
    ):  # half a pixel's diagonal each, and the scale
        zone = in_degrees(shapely.box(11.85, 60.03, 12.15, 60.2), 4326)
        with Maps(paths) as maps:
            plane, places = maps.plane(zone), []
            for cells in maps.cells(zone):
                row, column = maps.in_plane(plane, cells)
                assert row.min() >= 1 and column.min() >= 1
                assert row.max() < plane.shape[0] - 1 and column.max() < plane.shape[1] - 1
                grid = maps.entries[cells.entry].grid
                x, y = grid.transform.c + 60 * (cells.column + 0.5), grid.transform.f - 60 * (cells.row + 0.5)
                lon, lat = Transformer.from_crs(grid.crs.to_wkt(), 4326, always_xy=True).transform(x, y)
                places.append(np.column_stack([row, column, lon, lat])[:: max(len(row) // 5, 1)])
        assert plane.spacing == pytest.approx((60, 60), rel=1e-3)
        at = np.concatenate(places)
        for one in at:
            metres = np.array([GEOD.inv(*one[2:], *other[2:])[2] for other in at])
            assert np.hypot(*(60 * (at[:, :2] - one[:2])).T) == pytest.approx(metres, abs=tolerance)


def test_what_is_no_map_of_biomass_is_refused(tmp_path):
    transform = Affine(30, 0, 600000, 0, -30, 4100000)
    with pytest.raises(RasterError, match=r"a.tif: band 1 is in 'kg m-2'; expected Mg ha-1"):
        Maps([write_map(tmp_path / "a.tif", "EPSG:32610", transform, (4, 4), np.ones((4, 4)), unit="kg m-2")])
    with pytest.raises(RasterError, match=r"b.tif: found bands height, agbd_lo; expected one .* agbd"):
        Maps([write_map(tmp_path / "b.tif", "EPSG:32610", transform, (4, 4), 1.0, 2.0, names=("height", "agbd_lo"))])
    with pytest.raises(RasterError, match=r"c.tif: it has no CRS"):
        Maps([write_map(tmp_path / "c.tif", None, transform, (4, 4), np.ones((4, 4)))])
    bad = write_map(tmp_path / "d.tif", "EPSG:32610", transform, (4, 4), np.ones((4, 4)), -3.0)
    with Maps([bad]) as maps, pytest.raises(RasterError, match="band 2 holds -3; expected standard deviations"):
        summed(maps, in_degrees(shapely.box(600000, 4099880, 600120, 4100000), 32610))


def test_a_zones_plane_has_the_grounds_distances(tmp_path):
    """Where an equal-area CRS stretches pixels: at 60 degrees north 30 m of EPSG:6933 are 17 m by 52 m."""
    path = write_map(tmp_path / "map.tif", "EPSG:6933", Affine(30, 0, 300000, 0, -30, 6340000), (200, 200))
    with Maps([path]) as maps:
        west, south, east, north = maps.entries[0].box
        plane = maps.plane(in_degrees(shapely.box(west, south, east, north), 4326))
    across = GEOD.inv(west, (south + north) / 2, east, (south + north) / 2)[2] / 200
    down = GEOD.inv(west, south, west, north)[2] / 200
    assert plane.spacing == pytest.approx((down, across), rel=1e-2) and across < 20 < 50 < down
    assert min(plane.shape) >= 200 and max(plane.shape) < 210
