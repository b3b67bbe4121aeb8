"""Pixel sizes on the ground, and finer images brought to 30 m."""

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data import bands
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.resample import area_mean, factors
from biomass_jax.errors import RasterError


def degrees(latitude, step, longitude=20.0):
    """A grid of 100 x 100 pixels of `step` degrees around a place."""
    return Grid(100, 100, CRS.from_epsg(4326), Affine(step, 0, longitude - 50 * step, 0, -step, latitude + 50 * step))


def utm(size, epsg=32610, height=90, width=120):
    return Grid(height, width, CRS.from_epsg(epsg), Affine(size, 0, 400020, 0, -size, 4200000))


# A second of arc in metres, from published tables of the WGS 84 ellipsoid.
@pytest.mark.parametrize(
    ("latitude", "east", "north"), [(0, 111_319.5, 110_574.3), (45, 78_846.8, 111_131.7), (60, 55_800.0, 111_412.2)]
)
def test_degrees_are_measured_at_the_middle(latitude, east, north):
    assert degrees(latitude, 0.00027).pixel_size() == pytest.approx((0.00027 * east, 0.00027 * north), rel=1e-4)
    assert degrees(latitude, 0.00027, 180.0).pixel_size()[0] == pytest.approx(0.00027 * east, rel=1e-4)


def test_metres_and_feet_stay_what_they_are_and_mercator_is_measured():
    assert utm(30).pixel_size() == (30, 30)
    feet = Grid(90, 120, CRS.from_epsg(2227), Affine(98.4, 0, 6_000_000, 0, -98.4, 2_100_000))
    assert feet.pixel_size() == pytest.approx((98.4 * 0.3048, 98.4 * 0.3048), rel=1e-5)
    mercator = Grid(90, 120, CRS.from_epsg(3857), Affine(60, 0, 0, 0, -60, 8_399_737))  # 60 degrees north
    assert mercator.pixel_size() == pytest.approx((30, 30), rel=0.01)
    a, b = 30 * np.cos(0.5), 30 * np.sin(0.5)
    turned = Grid(90, 120, CRS.from_epsg(32610), Affine(a, b, 400020, b, -a, 4200000))
    assert turned.pixel_size() == pytest.approx((30, 30))
    assert Grid(5, 7, None, Affine.identity()).pixel_size() is None
    with pytest.raises(RasterError, match="nowhere on Earth|can't be told"):
        Grid(5, 7, CRS.from_epsg(32610), Affine(30, 0, 1e12, 0, -30, 1e12)).pixel_size()


def test_other_sizes_are_refused_and_resampled_when_asked():
    for size in (25, 30, 36):
        assert factors(utm(size), 30, None, "a") is None and factors(utm(size), 30, 30, "a") is None
    assert factors(Grid(5, 7, None, Affine.identity()), 30, None, "a") is None
    with pytest.raises(RasterError, match=r"a: its pixels are 10 x 10 m on the ground, .* 30 m; resample=30"):
        factors(utm(10), 30, None, "a")
    assert factors(utm(10), 30, 30, "a") == (3, 3)
    assert factors(utm(20), 30, 30, "a") == (1.5, 1.5)
    assert factors(degrees(60, 0.00027), 30, 30, "a") == (2, 1)  # 15.07 m wide, 30.08 m high
    across, down = factors(degrees(45, 0.00027), 30, 30, "a")  # 21.289 m wide, 30.006 m high
    assert across == pytest.approx(30 / 21.2886, abs=1e-3) and down == 1
    for resample in (None, 30):
        with pytest.raises(RasterError, match="60 x 60 m .*coarser images can't be made finer"):
            factors(utm(60), 30, resample, "a")
    with pytest.raises(RasterError, match="resample is 10 m, but the model was trained on pixels of 30 m"):
        factors(utm(10), 30, 10, "a")


def by_hand(image, missing, rows, columns):
    """Every pixel's share of every area, by plain loops."""
    out = np.empty((len(rows) - 1, len(columns) - 1, image.shape[-1]))
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            total, weight = np.zeros(image.shape[-1]), 0.0
            for y in range(int(rows[i]), min(int(rows[i + 1]) + 1, image.shape[0])):
                for x in range(int(columns[j]), min(int(columns[j + 1]) + 1, image.shape[1])):
                    high = max(min(rows[i + 1], y + 1) - max(rows[i], y), 0)
                    wide = max(min(columns[j + 1], x + 1) - max(columns[j], x), 0)
                    if not missing[y, x]:
                        total, weight = total + high * wide * image[y, x], weight + high * wide
            area = (rows[i + 1] - rows[i]) * (columns[j + 1] - columns[j])
            out[i, j] = total / weight if weight >= area / 2 else bands.FILL
    return out


@pytest.mark.parametrize(("down", "across"), [(3, 2), (1.5, 2.3), (1.0, 1.9913)])
def test_means_over_areas(numbers, down, across):
    image = np.moveaxis(numbers((6, 13, 17)), 0, -1)
    missing = np.random.default_rng(4).random((13, 17)) < 0.4
    image[missing] = -9999
    rows, columns = np.arange(int(13 / down) + 1) * down, np.arange(int(17 / across) + 1) * across
    found = area_mean(image, missing, rows, columns)
    np.testing.assert_allclose(found, by_hand(image, missing, rows, columns), rtol=1e-5)
    assert (found == bands.FILL).any() and (found != bands.FILL).any()


@pytest.mark.parametrize("size", [10, 20])
def test_an_image_is_read_at_30_m_whatever_rows_are_asked_for(tmp_path, numbers, write, size):
    factor = 30 / size
    data = numbers((6, 64, 91), low=200)
    data[:, 10:22, 30:50] = -9999
    path = write(
        tmp_path / "a.tif",
        data,
        names=bands.BAND_NAMES,
        nodata=-9999,
        transform=Affine(size, 0, 400020, 0, -size, 4200000),
    )
    with pytest.raises(RasterError, match=rf"a\.tif: its pixels are {size} x {size} m"):
        open_image(path, pixel_size=30)
    with open_image(path, pixel_size=30, resample=30) as image:
        height, width = int(64 / factor), int(91 / factor)
        assert (image.grid.height, image.grid.width, image.fill, image.dtype) == (height, width, -9999, np.float32)
        assert tuple(image.grid.transform)[:6] == (30, 0, 400020, 0, -30, 4200000)
        whole = image.read_rows(0, height)
        parts = np.concatenate([image.read_rows(0, 7), image.read_rows(7, height)])
        assert image.read_preview(10).shape[1] == 10
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    native = np.moveaxis(data, 0, -1)
    expected = by_hand(native, native[..., 0] == -9999, np.arange(height + 1) * factor, np.arange(width + 1) * factor)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
