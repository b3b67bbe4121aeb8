"""Maps as `biomass-jax predict` makes them, of a surface that is known everywhere."""

import numpy as np
import rasterio
from affine import Affine
from rasterio import warp
from rasterio.crs import CRS

UNIT = "Mg ha-1"
TAGS = {"SEASON": "2020-06-01/2020-09-01", "MODEL_SHA256": "a" * 64, "SETTINGS": '{"tile": 224}'}


def write_map(path, values, *, epsg=32633, left=500_000, top=6_650_010, pixel=30.0, tags=None, units=None):
    """A map of layers (name -> (rows, columns)) whose upper-left corner lies at `left`, `top`; -1 is no data."""
    bands = np.stack([np.asarray(band, np.float32) for band in values.values()])
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": "float32"}
    transform = Affine(pixel, 0, left, 0, -pixel, top)
    with rasterio.open(
        path, "w", driver="GTiff", crs=CRS.from_epsg(epsg), transform=transform, nodata=-1, **shape
    ) as file:
        file.write(bands)
        file.descriptions = tuple(values)
        file.units = tuple(units or ("1" if name == "di" else UNIT for name in values))
        file.update_tags(**(TAGS | (tags or {})))
    return path


def degrees(crs, transform, height, width):
    """Longitudes and latitudes of the middles of pixels, each (height, width)."""
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = transform.a * column + transform.c, transform.e * row + transform.f
    lon, lat = (np.reshape(axis, column.shape) for axis in warp.transform(crs, "EPSG:4326", x.ravel(), y.ravel()))
    return lon, lat


def surface(lon, lat):
    """Biomass, Mg/ha, smooth and without a jump at the antimeridian."""
    return 200 + 80 * np.sin(np.radians(15 * lon)) + 60 * np.cos(np.radians(45 * lat))


def write_surface(path, *, epsg, left, top, size, pixel=1000.0):
    """A square map of `surface`."""
    lon, lat = degrees(CRS.from_epsg(epsg), Affine(pixel, 0, left, 0, -pixel, top), size, size)
    return write_map(path, {"agbd": surface(lon, lat)}, epsg=epsg, left=left, top=top, pixel=pixel)


def read(path):
    """Bands by name, and the dataset's tags, CRS and transform."""
    with rasterio.open(path) as file:
        return dict(zip(file.descriptions, file.read(), strict=True)), file.tags(), file.crs, file.transform
