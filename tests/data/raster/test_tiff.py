"""Images that can't be read, come from afar, or are in other units."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data import bands
from biomass_jax.data.raster import grid
from biomass_jax.data.raster import image as raster_read
from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.inputs import find_inputs
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import RasterError

UTM = CRS.from_epsg(32610)
PLACE = Affine(30, 0, 400020, 0, -30, 4200000)


TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}


@pytest.mark.parametrize(
    "options",
    [{**TILED, "compress": "deflate"}, TILED, {"compress": "lzw"}, {}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}],
)
@pytest.mark.parametrize("kept", [0.4, 0.995])
@pytest.mark.parametrize("through_vrt", [False, True])
def test_a_truncated_tiff_is_refused(tmp_path, options, kept, through_vrt, numbers, write):
    path = write(tmp_path / "a.tif", numbers((6, 211, 157)), names=bands.BAND_NAMES, **options)
    opened = path
    if through_vrt:
        opened = tmp_path / "a.vrt"
        rasterio.shutil.copy(path, opened, driver="VRT")
    verify_blocks(path)
    with open_image(opened) as image:
        image.read_rows(0, 211)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(RasterError, match=r"a\.tif.*truncated TIFF.*blocks are not in the file"):
        open_image(opened)


@pytest.mark.parametrize("options", [{**TILED, "compress": "deflate"}, TILED, {}])
def test_a_truncated_block_is_never_read_as_zeros(tmp_path, monkeypatch, options, numbers, write):
    """GDAL alone has to notice where the blocks can't be checked beforehand (URLs)."""
    monkeypatch.setattr(raster_read, "is_tiff", lambda path: False)
    path = write(tmp_path / "a.tif", numbers((6, 211, 157)), names=bands.BAND_NAMES, **options)
    os.truncate(path, int(path.stat().st_size * 0.99))
    with open_image(path) as image, pytest.raises(RasterError, match=r"a\.tif: reading rows 190 to 211"):
        image.read_rows(190, 211)


def test_absent_blocks_of_a_sparse_file_are_no_data(tmp_path, numbers):
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 6, "height": 211, "width": 157, "dtype": "int16", "crs": UTM}
    with rasterio.open(path, "w", **profile, transform=PLACE, nodata=-9999, SPARSE_OK=True, **TILED) as dataset:
        for index, name in enumerate(bands.BAND_NAMES, 1):
            dataset.set_band_description(index, name)
        dataset.write(numbers((6, 64, 64)), window=((64, 128), (0, 64)))
    with open_image(path) as image:
        missing = bands.no_data(image.read_rows(0, 211), image.fill)
    assert not missing[64:128, :64].any() and missing.sum() == 211 * 157 - 64 * 64
    with pytest.raises(RasterError, match="block 0 is missing"):
        verify_blocks(path)


@pytest.mark.parametrize(
    "content", [b"", b"no raster", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0"]
)
def test_what_is_no_raster(tmp_path, content):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(RasterError, match=r"a\.tif"):
        open_image(path)
    with pytest.raises(RasterError, match=r"a\.tif: (not a|truncated) TIFF"):
        verify_blocks(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<!DOCTYPE html><html><title>Earthdata Login</title>", "an HTML page .*Earthdata Login.*log in"),
        (b"<Error><Code>AccessDenied</Code></Error>", "XML text that says 'AccessDenied'"),
        (b'{"message": "Unauthorized"}', "JSON text that says 'Unauthorized'"),
        (b"", "an empty file"),
        (b"PK\x03\x04" + bytes(50), "a zip archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    ],
)
def test_what_was_saved_as_a_tiff_is_named(tmp_path, content, says):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(RasterError, match=rf"a\.tif: not recognized as a raster, it is {says}"):
        open_image(path)
    with pytest.raises(RasterError, match=rf"a\.tif: not a TIFF, it is {says}"):
        verify_blocks(path)


def test_a_vrt_whose_file_is_gone(tmp_path, numbers, write):
    made = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES)
    rasterio.shutil.copy(made, tmp_path / "b.vrt", driver="VRT")
    made.unlink()
    with pytest.raises(RasterError, match=r"b\.vrt.*a\.tif"), open_image(tmp_path / "b.vrt") as image:
        image.read_rows(0, 5)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(grid.SETTINGS, "GDAL_HTTP_RETRY_DELAY", "0.01")
    command = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


def test_a_url_is_read_through_gdal(tmp_path, server, numbers, write):
    data = numbers((6, 130, 90))
    path = write(tmp_path / "far.tif", data, names=bands.BAND_NAMES, compress="deflate", **TILED)
    (item,) = find_inputs(f"{server}/far.tif?token=SECRET")
    with open_image(item) as image:
        np.testing.assert_array_equal(image.read_rows(33, 99), np.moveaxis(data[:, 33:99], 0, -1))
        assert image.name == f"{server}/far.tif" and image.sources == ("far.tif",)
        before = image.identity()
        assert (before["size"], before["mtime_ns"]) == (path.stat().st_size, 0)
    # side files are not looked for: a far folder can be large, and slow to list
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    # newer GDAL asks for one table whatever it is told
    assert {line for line in asked if ".vat.dbf" not in line} == {"/far.tif?token=SECRET"}
    with pytest.raises(RasterError, match="absent.tif"):
        open_image(f"{server}/absent.tif")


@pytest.mark.parametrize("compress", ["deflate", "none"])
def test_another_far_image_of_the_same_address_is_noticed(tmp_path, server, numbers, write, compress):
    def identity(seed, *, token="a"):
        shape, options = (6, 130, 90), {"names": bands.BAND_NAMES, "compress": compress, **TILED}
        write(tmp_path / f"{token}{seed}.tif", numbers(shape, seed=seed // 10), **options)
        (item,) = find_inputs(f"{server}/{token}{seed}.tif?token={token}{seed}")  # other names: GDAL remembers pages
        with open_image(item) as image:
            return image.identity()

    first, same, other = identity(10), identity(11, token="b"), identity(20)
    assert first == same
    assert first["files"] != other["files"]
    assert compress == "deflate" or first["size"] == other["size"]


def spectrum(shape, scale, dtype):
    """(6, rows, columns) plausible values: bright infrared, dark visible bands."""
    level = np.array([500, 800, 900, 2600, 2000, 1200]).reshape(6, 1, 1)
    return (np.random.default_rng(0).normal(level, 100, (6, *shape)) * scale).astype(dtype)


@pytest.mark.parametrize(
    ("scale", "dtype", "verdict"),
    [
        (1, "int16", None),
        (1, "float32", None),
        (1e-4, "float32", "error"),
        (4e-4, "float32", "error"),
        (0.03, "float32", "error"),
        (0.03, "int16", "low"),
        (5e-4, "int16", "low"),  # ones and zeros: no fractions
    ],
)
def test_units(tmp_path, scale, dtype, verdict, write):
    data = spectrum((61, 43), scale, dtype)
    data[:, :9] = -9999
    path = write(tmp_path / "a.tif", data, names=bands.BAND_NAMES, nodata=-9999)
    with open_image(path) as image:
        if verdict == "error":
            with pytest.raises(
                RasterError, match=r"a\.tif: percentiles.*probably (reflectance|percent), not digital numbers"
            ):
                image.check_units()
            return
        if verdict == "low":  # refused, but of a chip, which may be all dark water
            with pytest.raises(RasterError, match=r"a\.tif: percentiles.*very low"):
                image.check_units()
        warning = image.check_units(one_of_many=verdict == "low")
    assert (warning is not None) == (verdict == "low")
    assert image.warnings == ([] if verdict is None else [warning])


def test_too_few_valid_pixels_give_no_verdict(tmp_path, write):
    for valid, refused in ((999, False), (1000, True)):
        data = spectrum((61, 43), 1e-4, "float32").reshape(6, -1)
        data[:, valid:] = np.nan
        path = write(tmp_path / f"{valid}.tif", data.reshape(6, 61, 43), names=bands.BAND_NAMES)
        with open_image(path) as image:
            if refused:
                with pytest.raises(RasterError, match="over 1,000 valid pixels"):
                    image.check_units()
            else:
                assert image.check_units() is None and image.warnings == []


def test_units_of_a_large_raster_with_data_in_one_corner(tmp_path):
    """A sparse 70,000 x 80,000 raster: bounded time and memory, and the filled corner is met."""
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 6, "height": 70000, "width": 80000, "dtype": "float32", "crs": UTM}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "bigtiff": "YES"}
    with rasterio.open(path, "w", **profile, **layout, transform=PLACE, nodata=-9999, SPARSE_OK=True) as dataset:
        for index, name in enumerate(bands.BAND_NAMES, 1):
            dataset.set_band_description(index, name)
        dataset.write(spectrum((512, 1024), 1e-4, "float32"), window=((0, 512), (0, 1024)))
    with open_image(path) as image, pytest.raises(RasterError, match="reflectance"):
        image.check_units()
