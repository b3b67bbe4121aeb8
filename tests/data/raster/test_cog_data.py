import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data.raster import cog
from biomass_jax.data.raster.cog import CogWriter, write_cog
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import RasterError

GRID = Grid(301, 523, CRS.from_epsg(32733), Affine(30, 0, 399960, 0, -30, 7200000))
NAMES = ("BLUE", "GREEN", "COUNT")


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(5)
    values = rng.integers(-200, 12000, (3, GRID.height, GRID.width)).astype(np.int16)
    values[:, 40:170, 100:330] = -9999
    return values


def pieces(values, rows):
    return (values[:, top : top + rows] for top in range(0, values.shape[1], rows))


def write(path, arrays, **changes):
    settings = {"dtype": "int16", "band_names": NAMES, "nodata": -9999, "tags": {"SEASON": "a/b", "TILE": "33KXX"}}
    return write_cog(path, arrays, GRID, **(settings | changes))


def test_everything_comes_back(tmp_path, values):
    path = write(tmp_path / "new" / "a.tif", pieces(values, 100), units=("x", "y", "z"))
    with rasterio.open(path) as dataset:
        assert (dataset.read() == values).all()
        assert dataset.dtypes == ("int16",) * 3
        assert dataset.crs == GRID.crs
        assert dataset.transform == GRID.transform
        assert dataset.nodata == -9999
        assert dataset.descriptions == NAMES
        assert dataset.units == ("x", "y", "z")
        tags = dataset.tags()
        assert (tags["SEASON"], tags["TILE"], tags["AREA_OR_POINT"]) == ("a/b", "33KXX", "Area")
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.block_shapes == [(256, 256)] * 3
        assert dataset.overviews(1) == [2, 4]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.tif"]


def test_overviews_are_means_of_valid_pixels(tmp_path, values):
    even = values[:, 1:, 1:].copy()  # GDAL weights halves of an odd size otherwise
    grid = Grid(300, 522, GRID.crs, GRID.transform)
    path = write_cog(tmp_path / "a.tif", [even], grid, "int16", NAMES, -9999, {})
    with rasterio.open(path, overview_level=0) as dataset:
        overview = dataset.read(1)
    four = np.ma.masked_equal(even[0].reshape(150, 2, 261, 2), -9999)
    expected = four.mean(axis=(1, 3))
    assert (np.abs(overview - expected.filled(-9999)) <= 0.5).all()
    assert 0 < (overview == -9999).sum() == expected.mask.sum()


def test_heights_of_pieces_and_repetition_change_no_byte(tmp_path, values):
    first = write(tmp_path / "a.tif", [values]).read_bytes()
    for index, rows in enumerate((1, 97, 256, 300)):
        assert write(tmp_path / f"{index}.tif", pieces(values, rows)).read_bytes() == first


def test_floats(tmp_path, values):
    label = np.where(values[:1] > 11000, values[:1] / np.float32(7), np.float32(-1)).astype(np.float32)
    path = write(tmp_path / "a.tif", [label], dtype="float32", band_names=("agbd",), nodata=-1)
    with rasterio.open(path) as dataset:
        assert (dataset.read() == label).all()
        assert dataset.nodata == -1


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (lambda v: [v[:, :300]], "300 of 301 rows"),
        (lambda v: [v, v[:, :1]], "rows 301 to 302 of a raster with 301"),
        (lambda v: [v[:, :, 1:]], r"got int16 \(3, 301, 522\) for row 0, expected int16 \(3, rows, 523\)"),
        (lambda v: [v[:2]], r"got int16 \(2, 301, 523\)"),
        (lambda v: [v.astype(np.int32)], "got int32"),
    ],
)
def test_wrong_rows_leave_the_old_file_and_nothing_else(tmp_path, values, arrays, says):
    path = tmp_path / "a.tif"
    path.write_bytes(b"old")
    with pytest.raises(RasterError, match=says):
        write(path, arrays(values))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tif"]


def test_an_error_while_rows_are_made_passes_through(tmp_path, values):
    def rows():
        yield values[:, :280]
        raise OSError(5, "the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        write(tmp_path / "a.tif", rows())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["partial", "cog"])
def test_a_file_cut_by_a_full_disk_is_noticed(tmp_path, values, monkeypatch, which):
    verify = cog.verify_blocks

    def cut_first(path):
        if which in Path(path).name:
            os.truncate(path, os.path.getsize(path) - 3000)
        verify(path)

    monkeypatch.setattr(cog, "verify_blocks", cut_first)
    with pytest.raises(RasterError, match=r"a\.tif: not written whole; is the disk full.*truncated TIFF"):
        write(tmp_path / "a.tif", [values])
    assert list(tmp_path.iterdir()) == []


def test_other_values_in_the_copy_are_noticed(tmp_path, values, monkeypatch):
    copy = CogWriter._copy

    def damaged(self):
        with rasterio.open(self._partial, "r+") as dataset:
            band = dataset.read(2)
            band[300, 522] += 1
            dataset.write(band, 2)
        copy(self)

    monkeypatch.setattr(CogWriter, "_copy", damaged)
    with pytest.raises(RasterError, match=r"other values than were written, in the block at row 256, column 512"):
        write(tmp_path / "a.tif", [values])
    assert list(tmp_path.iterdir()) == []


def test_no_room_and_no_folder(tmp_path, values, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RasterError, match="file: can't make this folder: File exists"):
        write(tmp_path / "file" / "a.tif", [values])
    (tmp_path / "b.tif").mkdir()
    with pytest.raises(RasterError, match="there is a folder of this name"):
        write(tmp_path / "b.tif", [values])
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(RasterError, match="1.0 MB free"):
        write(tmp_path / "a.tif", [values])
