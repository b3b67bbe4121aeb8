"""Rasters that are written are Cloud-Optimized GeoTIFFs by what validators look at."""

import shutil

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling

from biomass_jax.data.raster.cog import MapWriter, write_cog
from biomass_jax.data.raster.grid import Grid
from tests.data.raster.cloud_optimized import faults

GRID = Grid(1201, 1437, CRS.from_epsg(32610), Affine(30, 0, 400020, 0, -30, 4200000))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogs")
    values = np.random.default_rng(0).integers(1, 300, (3, GRID.height, GRID.width)).astype(np.int16)
    values[:, 600:] = -1  # blocks without data
    with MapWriter(folder / "map.tif", GRID, nodata=-1, layers={"agbd": "Mg ha-1"}, tags={"A": "b"}) as writer:
        for start in range(0, GRID.height, 100):
            writer.write_rows(start, values[0, start : start + 100].astype(np.float32))
    names = ("BLUE", "GREEN", "COUNT")
    write_cog(folder / "bands.tif", [values], GRID, dtype="int16", band_names=names, nodata=-1, tags={"A": "b"})
    return folder


@pytest.mark.parametrize("name", ["map.tif", "bands.tif"])
def test_what_is_written_is_cloud_optimized(made, name):
    assert faults(made / name) == []


def test_what_is_not_cloud_optimized_is_noticed(made, tmp_path):
    path = tmp_path / "a.tif"
    with rasterio.open(made / "map.tif") as file:
        values, profile = file.read(), {k: v for k, v in file.profile.items() if k != "blockxsize"}
    for options, words in (
        ({"tiled": False, "blockysize": 1}, "is not tiled"),
        ({"blockxsize": 512}, "overviews [], expected some down to 512"),
    ):
        with rasterio.open(path, "w", **{**profile, **options}) as file:
            file.write(values)
        assert any(words in fault for fault in faults(path)), words
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], Resampling.average)
    assert "blocks of a finer image lie before those of a coarser one" in faults(path)
    shutil.copy(made / "map.tif", path)
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.update_tags(A="longer" * 1000)  # moves the directory to the file's end
    assert "not as GDAL's COG driver left it" in faults(path)
