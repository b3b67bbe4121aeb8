"""Outlines of chips: codes of UTM zones however they are spelled, southern tiles, the antimeridian."""

import numpy as np
import pyproj
import pytest
import rasterio
import shapely

from biomass_jax.data.raster.grid import epsg_code
from biomass_jax.errors import RasterError
from data_prep import ground
from tests.data_prep.chip_world import SIZE

HLS_SOUTHERN = (  # as real HLS files spell a zone without an EPSG code
    'PROJCS["UTM Zone {zone}, {half} Hemisphere",GEOGCS["Unknown datum based upon the WGS 84 ellipsoid",'
    'DATUM["Not specified (based on WGS 84 spheroid)",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",{meridian}],PARAMETER["scale_factor",0.9996],'
    'PARAMETER["false_easting",500000],PARAMETER["false_northing",{northing}],UNIT["metre",1]]'
)


@pytest.mark.parametrize(("half", "northing", "code"), [("Northern", 0, 32660), ("Southern", 10000000, 32760)])
def test_user_defined_utm_has_the_code_of_its_zone(half, northing, code):
    wkt = HLS_SOUTHERN.format(zone=60, half=half, meridian=177, northing=northing)
    assert epsg_code(rasterio.CRS.from_wkt(wkt), "file") == code
    odd = HLS_SOUTHERN.format(zone=60, half=half, meridian=178.5, northing=northing)
    with pytest.raises(RasterError, match="file: found a CRS without an EPSG code"):
        epsg_code(rasterio.CRS.from_wkt(odd), "file")


def test_both_forms_of_a_southern_tile_have_one_outline():
    places = np.array([(0, 0), (16, 32)])
    north = ground.chip_outlines(32760, (30, 0, 700000, 0, -30, 8100000), places, SIZE)
    south = ground.chip_outlines(32660, (30, 0, 700000, 0, -30, -1900000), places, SIZE)
    for one, other in zip(north, south, strict=True):
        assert shapely.equals_exact(one, other, 1e-9)


def test_outlines_across_the_antimeridian_are_cut_in_two():
    # Zone 60's eastern edge at 17 S lies near x = 819,800 m.
    to_utm = pyproj.Transformer.from_crs(4326, 32760, always_xy=True)
    x, y = to_utm.transform(180, -17)
    (outline,) = ground.chip_outlines(32760, (30, 0, x - 160, 0, -30, y), np.array([(0, 0)]), SIZE)
    assert outline.geom_type == "MultiPolygon"
    assert outline.is_valid
    west, _, east, _ = outline.bounds
    assert (west, east) == (-180, 180)
    geod = pyproj.Geod(ellps="WGS84")
    areas = [abs(geod.geometry_area_perimeter(part)[0]) for part in outline.geoms]
    assert sum(areas) == pytest.approx(480**2, rel=5e-3)
    assert max(areas) / sum(areas) == pytest.approx(2 / 3, abs=0.02)
    lon, lat = ground.centres([outline])[0]
    expected = pyproj.Transformer.from_crs(32760, 4326, always_xy=True).transform(x - 160 + 240, y - 240)
    assert (lon % 360, lat) == pytest.approx((expected[0] % 360, expected[1]), abs=1e-7)


def chip_at(lon, lat):
    """A chip of 6.72 km around a place, in the place's UTM zone."""
    epsg = (32600 if lat >= 0 else 32700) + int((lon + 180) // 6) + 1
    x, y = pyproj.Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)
    return ground.chip_outlines(epsg, (30, 0, x - 3360, 0, -30, y + 3360), np.array([(0, 0)]), 224)[0]


def along_the_ellipsoid(one, other):
    """Metres between two outlines by geodesics between points on both, about 200 m apart."""
    points = [shapely.get_coordinates(shapely.segmentize(outline, 0.002)) for outline in (one, other)]
    i, j = (grid.ravel() for grid in np.meshgrid(*(np.arange(len(found)) for found in points)))
    return pyproj.Geod(ellps="WGS84").inv(*points[0][i].T, *points[1][j].T)[2].min()


@pytest.mark.parametrize(
    ("place", "other", "within"),
    [
        ((-121.0, 37.0), (-120.9, 37.1), 2.0),
        ((-120.1, 61.0), (-119.7, 61.1), 2.0),  # in two zones
        ((30.0, -3.0), (30.8, -2.4), 2.0),
        ((179.9, -17.0), (-179.8, -17.2), 2.0),  # across the antimeridian
        ((10.0, 50.0), (14.0, 53.0), 10.0),
        ((-60.0, -10.0), (20.0, 40.0), 15_000.0),
    ],
)
def test_distances_are_those_along_the_ellipsoid(place, other, within):
    one, two = chip_at(*place), chip_at(*other)
    expected = along_the_ellipsoid(one, two)
    assert ground.nearest([one], [two])[0] == pytest.approx(expected, abs=within)
    assert ground.nearest([two], [one])[0] == pytest.approx(expected, abs=within)


def test_the_nearest_of_many_is_that_of_a_loop_over_all_pairs():
    rng = np.random.default_rng(2)
    some = np.array([chip_at(*place) for place in rng.uniform((-119.5, 40), (-118, 41), (15, 2))], object)
    others = np.array([chip_at(*place) for place in rng.uniform((-119, 40), (-117, 41), (20, 2))], object)
    expected = [min(ground.nearest([one], [other])[0] for other in others) for one in some]
    assert min(expected) == 0 < max(expected)
    np.testing.assert_allclose(ground.nearest(some, others), expected, atol=1e-6)
    assert ground.nearest(some, others[:0]).tolist() == [np.inf] * 15
    assert ground.nearest(some[:0], others).tolist() == []


def test_neighbours_in_a_grid_touch_and_those_after_are_a_chip_away():
    places = np.array([(0, c * 224) for c in range(4)])
    row = ground.chip_outlines(32610, (30, 0, 5e5, 0, -30, 4.2e6), places, 224)
    np.testing.assert_allclose(ground.nearest(row, row[:1]), [0, 0, 6720 / 0.9996, 13440 / 0.9996], atol=1.0)
