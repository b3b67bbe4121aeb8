"""Areas of pixels on the ground against geodesics."""

import pytest
import rasterio
from affine import Affine
from pyproj import Geod, Transformer

from biomass_jax.data.raster.grid import Grid, pixel_areas

GEOD = Geod(ellps="WGS84")


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32633", Affine(30, 0, 300000, 0, -30, 6700000)),  # 60 north, the edge of a zone
        ("EPSG:32760", Affine(30, 0, 750000, 0, -30, 8000000)),  # across the antimeridian
        ("EPSG:4326", Affine(2.5e-4, 0, 179.9, 0, -2.5e-4, 60.3)),
        ("EPSG:3857", Affine(30, 0, 300000, 0, -30, 8399737)),
        ("EPSG:6933", Affine(100, 0, 300000, 0, -100, 6700000)),
    ],
)
def test_pixels_have_their_geodesic_areas(crs, transform):
    grid = Grid(3000, 3000, rasterio.crs.CRS.from_string(crs), transform)
    found = pixel_areas(grid, 100, 200, 700, 900)
    back = Transformer.from_crs(crs, 4326, always_xy=True)
    for row, column in ((0, 0), (699, 899), (350, 17), (13, 700), (6, 7)):
        x = [transform.c + transform.a * (200 + column + one) for one in (0, 1, 1, 0)]
        y = [transform.f + transform.e * (100 + row + one) for one in (0, 0, 1, 1)]
        area = abs(GEOD.polygon_area_perimeter(*back.transform(x, y))[0]) / 1e4
        assert found[row, column] == pytest.approx(area, rel=1e-4)
