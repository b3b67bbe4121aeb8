"""Means over polygons against thousands of points in each pixel."""

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine

from biomass_jax.data.raster.zonal import covered_means
from biomass_jax.errors import RasterError

SHAPE = (40, 50)
FINE = 40  # points along each side of a pixel


def write(path, values, transform, crs):
    profile = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 1, "dtype": "float32", "nodata": -1}
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as file:
        file.write(values.astype(np.float32), 1)
    return path


def by_points(values, transform, outline):
    """Mean, share of the area with values, and area in pixels, from points."""
    rows, columns = (np.arange(size * FINE) / FINE + 0.5 / FINE for size in SHAPE)
    x = transform.c + columns[None] * transform.a + 0 * rows[:, None]
    y = transform.f + rows[:, None] * transform.e + 0 * columns[None]
    inside = shapely.contains_xy(outline, x, y)
    fine = np.repeat(np.repeat(values, FINE, 0), FINE, 1)
    seen = inside & (fine != -1)
    return fine[seen].mean(), seen.sum() / inside.sum(), inside.sum() / FINE**2


@pytest.mark.parametrize(
    ("crs", "transform"),
    [("EPSG:32610", Affine(30, 0, 600000, 0, -30, 4100000)), ("EPSG:4326", Affine(3e-4, 0, -121, 0, -2e-4, 37))],
)
def test_pixels_count_by_the_share_that_lies_inside(tmp_path, crs, transform):
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 300, SHAPE)
    values[10:14, 20:30] = -1
    path = write(tmp_path / "map.tif", values, transform, crs)

    def at(column, row):
        return transform.c + column * transform.a, transform.f + row * transform.e

    outlines = [
        shapely.Polygon([at(5.2, 5.7), at(9.9, 6.1), at(8.3, 9.4), at(5.5, 8.8)]),
        shapely.Polygon([at(20.3, 20.3), at(20.7, 20.3), at(20.7, 20.6)]),  # within a pixel
        shapely.Polygon([at(18.5, 9.5), at(25.1, 8.9), at(24.4, 12.2)]),  # some of it without values
    ]
    frame = geopandas.GeoDataFrame(geometry=outlines, crs=crs)
    far = geopandas.GeoDataFrame(geometry=[shapely.box(*at(200, 210), *at(210, 200)), shapely.Polygon()], crs=crs)
    # Outlines in another CRS: those of a file in UTM come back from degrees to a hundredth of a millimetre.
    found = covered_means(path, geopandas.GeoDataFrame(geometry=[*frame.geometry, *far.geometry], crs=crs).to_crs(4326))
    for place, outline in enumerate(outlines):
        mean, cover, pixels = by_points(values, transform, outline)
        assert found.mean[place] == pytest.approx(mean, rel=5e-3)
        assert found.cover[place] == pytest.approx(cover, abs=5e-3)
        assert found.pixels[place] == pytest.approx(pixels, rel=2e-2)
    assert found.cover[2] < 0.9 < found.cover[0]
    assert np.isnan(found.mean[3:]).all() and (found.cover[3:] == 0).all()


def test_a_raster_without_a_crs_is_refused(tmp_path):
    path = write(tmp_path / "map.tif", np.ones(SHAPE), Affine(30, 0, 0, 0, -30, 0), None)
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)], crs=4326)
    with pytest.raises(RasterError, match="map.tif: it has no CRS"):
        covered_means(path, frame)
