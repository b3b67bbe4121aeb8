"""Finished maps: bands by their names, no-data in all of them at once."""

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.maps import MapFile
from biomass_jax.errors import RasterError

GRID = Grid(20, 30, CRS.from_epsg(32610), Affine(30, 0, 600000, 0, -30, 4200000))


def written(path, **bands):
    layers = dict.fromkeys(bands, "Mg ha-1")
    with MapWriter(path, GRID, nodata=-1, layers=layers, tags={"SEASON": "2019-05-01/2019-10-01"}) as writer:
        writer.write_rows(0, np.stack(list(bands.values()), axis=-1))
    return path


def test_rows_by_name(tmp_path):
    rng = np.random.default_rng(0)
    mean, sd = rng.uniform(0, 300, (2, 20, 30)).astype(np.float32)
    mean[3, 4], sd[3, 4] = -1, -1
    mean[5, 6] = -1  # in one band alone
    with MapFile(written(tmp_path / "a.tif", agbd=mean, agbd_sd=sd)) as found:
        assert (found.bands, found.units(), found.tags["SEASON"]) == (
            ("agbd", "agbd_sd"),
            ("Mg ha-1", "Mg ha-1"),
            "2019-05-01/2019-10-01",
        )
        assert found.grid.same_as(GRID)
        rows = found.rows(2, 7, ["agbd_sd", "agbd"])
        with pytest.raises(RasterError, match=r"a\.tif: it has no band di; found agbd, agbd_sd"):
            found.rows(0, 1, ["di"])
    expected = np.stack([sd, mean])[:, 2:7].astype(np.float64)
    expected[:, 1, 4] = expected[:, 3, 6] = np.nan
    np.testing.assert_array_equal(rows, expected)


def test_other_rasters_are_refused(tmp_path, write, numbers):
    path = write(tmp_path / "image.tif", numbers((2, 12, 12), seed=1))
    with pytest.raises(RasterError, match=r"image\.tif: its band 1 has no name; expected a map"):
        MapFile(path)
    path = write(tmp_path / "nowhere.tif", numbers((2, 12, 12), seed=1), crs=None)
    with pytest.raises(RasterError, match=r"nowhere\.tif: it has no CRS"):
        MapFile(path)
