"""Land-cover masks on a map's grid."""

import numpy as np
import pytest
from affine import Affine
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.warp import Resampling, reproject

from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.resample import MaskSource
from biomass_jax.errors import RasterError

UTM = CRS.from_epsg(32610)
PLACE = Affine(30, 0, 400020, 0, -30, 4200000)


def moved(columns, rows):
    """PLACE, so many pixels to the east and south."""
    return Affine(30, 0, 400020 + 30 * columns, 0, -30, 4200000 - 30 * rows)


def test_a_mask_is_warped_to_the_grid(tmp_path, write):
    classes = np.random.default_rng(1).choice([10, 20, 95], (1, 130, 170)).astype("uint8")
    degrees = CRS.from_epsg(4326)
    fine = Affine(0.00021, 0, -124.1385, 0, -0.00017, 37.9475)  # covers part of the map's 91 x 77 pixels
    path = write(tmp_path / "m.tif", classes, crs=degrees, transform=fine)
    grid = Grid(91, 77, UTM, PLACE)
    expected = np.zeros((91, 77), "uint8")
    reproject(classes[0], expected, src_transform=fine, src_crs=degrees, dst_transform=PLACE, dst_crs=UTM,
              resampling=Resampling.nearest)  # fmt: skip
    with MaskSource(path, grid, (10, 95)) as mask:
        kept = np.concatenate([mask.read_rows(start, min(91, start + 20)) for start in range(0, 91, 20)])
    assert kept.dtype == bool and 0.2 < kept.mean() < 0.6 and (expected == 0).mean() > 0.05
    assert (kept == np.isin(expected, (10, 95))).mean() > 0.999


def test_outside_a_mask_nothing_is_kept(tmp_path, write):
    path = write(tmp_path / "m.tif", np.zeros((1, 20, 30), "uint8"), transform=moved(5, 3))
    with MaskSource(path, Grid(40, 50, UTM, PLACE), (0,)) as mask:
        kept = mask.read_rows(0, 40)
    expected = np.zeros((40, 50), bool)
    expected[3:23, 5:35] = True
    np.testing.assert_array_equal(kept, expected)


def test_no_data_of_a_mask_is_not_kept(tmp_path, write):
    classes = np.full((1, 20, 30), 10, "uint8")
    classes[0, 4] = 0
    path = write(tmp_path / "m.tif", classes, nodata=0)
    grid = Grid(20, 30, UTM, PLACE)
    with MaskSource(path, grid, (10,)) as mask:
        assert np.nonzero(~mask.read_rows(0, 20).all(axis=1))[0].tolist() == [4]
    with pytest.raises(RasterError, match=r"m\.tif: class 0 is to be kept, but marks no-data"):
        MaskSource(path, grid, (0, 10))


def test_a_mask_without_crs_must_lie_on_the_same_grid(tmp_path, numbers, write):
    classes = numbers((1, 20, 30), high=4, dtype="uint8")
    path = write(tmp_path / "m.tif", classes, crs=None)
    with MaskSource(path, Grid(20, 30, UTM, PLACE), (2,)) as mask:
        np.testing.assert_array_equal(mask.read_rows(3, 9), classes[0, 3:9] == 2)
    with pytest.raises(RasterError, match=r"m\.tif: the mask has no CRS and the grids differ"):
        MaskSource(path, Grid(20, 31, UTM, PLACE), (2,))
    path = write(tmp_path / "n.tif", classes)
    with pytest.raises(RasterError, match="the map has no CRS and the grids differ"):
        MaskSource(path, Grid(20, 30, None, moved(1, 0)), (2,))


def test_masks_that_cannot_be(tmp_path, numbers, write):
    grid = Grid(20, 30, UTM, PLACE)
    path = write(tmp_path / "m.tif", numbers((2, 20, 30), dtype="uint8"))
    with pytest.raises(RasterError, match="2 bands; a mask has one"):
        MaskSource(path, grid, (1,))
    with pytest.raises(RasterError, match="no class to keep"):
        MaskSource(path, grid, ())
    with pytest.raises(RasterError, match="absent.tif"):
        MaskSource(tmp_path / "absent.tif", grid, (1,))


def classes_at(lon, lat):
    """Degrees -> classes 1 to 3 in cells of a third of a degree."""
    return ((np.floor(lon * 3) + np.floor(lat * 3)) % 3 + 1).astype("uint8")


@pytest.mark.parametrize("west", [-180, 0])
@pytest.mark.parametrize(
    ("epsg", "left", "top"), [(32610, 550020, 4100040), (32701, 116400, 8000000), (32731, 116400, 8000000)]
)
def test_masks_in_either_convention_of_longitude(tmp_path, write, west, epsg, left, top):
    """In California, across the antimeridian and across Greenwich, where the two conventions break."""
    step = 0.1
    lon, lat = west + (np.arange(3600) + 0.5) * step, 40 - (np.arange(650) + 0.5) * step
    classes = classes_at((lon + 180) % 360 - 180, lat[:, None])
    path = write(
        tmp_path / "m.tif", classes[None], crs=CRS.from_epsg(4326), transform=Affine(step, 0, west, 0, -step, 40)
    )
    grid = Grid(60, 330, CRS.from_epsg(epsg), Affine(300, 0, left, 0, -300, top))
    with MaskSource(path, grid, (2,)) as mask:
        kept = mask.read_rows(0, 60)
    x, y = left + 300 * (np.arange(330) + 0.5), top - 300 * (np.arange(60) + 0.5)
    places = Transformer.from_crs(epsg, 4326, always_xy=True).transform(*np.meshgrid(x, y))
    expected = classes_at(*places) == 2
    for columns in (slice(0, 110), slice(110, 220), slice(220, 330)):
        assert expected[:, columns].any()
        assert (kept == expected)[:, columns].mean() > 0.8  # within a pixel of the mask
