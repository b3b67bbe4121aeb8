"""Rasters made beside the tests that read them."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data import bands

UTM = CRS.from_epsg(32610)
PLACE = Affine(30, 0, 400020, 0, -30, 4200000)


def _numbers(shape, seed=0, low=1, high=9000, dtype="int16"):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def _write_tiff(path, data, *, names=None, tags=None, band_tags=None, crs=UTM, transform=PLACE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = data.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": data.dtype.name}
    with rasterio.open(path, "w", **profile, crs=crs, transform=transform, **options) as dataset:
        for index, name in enumerate(names or (), 1):
            if name is not None:
                dataset.set_band_description(index, name)
        for index, one in enumerate(band_tags or (), 1):
            dataset.update_tags(index, **one)
        dataset.update_tags(**(tags or {}))
        dataset.write(data)  # last, so that the directory comes first, as in a COG
    return path


def _write_granule(folder, granule="HLS.L30.T10SFF.2020183T184512.v2.0", layers=None, shape=(37, 53), **options):
    made = {}
    for seed, layer in enumerate(layers or [band.l30 for band in bands.BANDS]):
        made[layer] = _numbers((1, *shape), seed)
        _write_tiff(folder / f"{granule}.{layer}.tif", made[layer], nodata=-9999, **options)
    for layer in ("Fmask", "SZA"):
        _write_tiff(folder / f"{granule}.{layer}.tif", _numbers((1, *shape), 99), **options)
    return made


@pytest.fixture(scope="session")
def numbers():
    """Random digital numbers: `numbers(shape, seed, low, high, dtype)`."""
    return _numbers


@pytest.fixture(scope="session")
def write():
    """A GeoTIFF of (bands, rows, columns) in UTM zone 10, 30 m, at (400020, 4200000) unless said otherwise."""
    return _write_tiff


@pytest.fixture(scope="session")
def write_granule():
    """A folder of an HLS granule's single-band files, quality and angles beside them; gives {layer: values}."""
    return _write_granule
