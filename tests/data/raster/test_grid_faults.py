"""Reads that fail in part: the file's own pixels or an error that names it, never pixels of other blocks."""

import time

import numpy as np
import pytest
import rasterio

from biomass_jax.data import bands
from biomass_jax.data.raster import grid
from biomass_jax.data.raster.image import open_image
from biomass_jax.errors import RasterError
from tests.data.raster.faulty_server import FAULTS, FaultyServer

QUICK = tuple(fault for fault in FAULTS if fault != "half, then silence")  # each of which takes a second
COMPRESSIONS = ("none", "packbits", "lzw", "deflate", "zstd", "lzma", "lerc", "lerc_deflate", "lerc_zstd")
LAYOUTS = {
    "tiled by band": {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "band"},
    "strips by pixel": {"blockysize": 8, "interleave": "pixel"},
}
HOSTILE = {
    "GDAL_NUM_THREADS": "4",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_MAX_RETRY": "0",
    "GTIFF_IGNORE_READ_ERRORS": "YES",
    "GTIFF_DIRECT_IO": "YES",
    "VSI_CACHE": "TRUE",
    "CPL_VSIL_CURL_CHUNK_SIZE": "65536",
}


def image(seed=0, shape=(6, 128, 128)):
    rng = np.random.default_rng(seed)
    return (np.linspace(100, 3000, np.prod(shape)).reshape(shape) + rng.integers(0, 400, shape)).astype(np.int16)


def write(path, values, **form):
    place = {"crs": "EPSG:32610", "transform": rasterio.Affine(30, 0, 500_000, 0, -30, 4_000_000)}
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", **size, **place, **form) as file:
        file.write(values)
        file.descriptions = bands.BAND_NAMES[:count]
    return path


@pytest.fixture
def hurried(monkeypatch):
    """GDAL's waits, shortened."""
    quick = {"GDAL_HTTP_RETRY_DELAY": "0.01", "GDAL_HTTP_TIMEOUT": "0.5", "GDAL_HTTP_MAX_RETRY": "1"}
    monkeypatch.setattr(grid, "SETTINGS", {**grid.SETTINGS, **quick})


def read_all(path, step=64):
    with open_image(path) as source:
        parts = [
            source.read_rows(top, min(top + step, source.grid.height)) for top in range(0, source.grid.height, step)
        ]
    return np.moveaxis(np.concatenate(parts), -1, 0)


def pixels_or_an_error_by_name(folder, name, values, **server_settings):
    """Whether there was an error; it or the pixels are checked."""
    with FaultyServer(folder, **server_settings) as server:
        url = f"{server.url}/{name}"
        try:
            assert np.array_equal(read_all(url), values)
        except RasterError as error:
            assert server.failed and str(error).startswith(f"{url}: "), error
            assert str(error).endswith("give the same command again later")
            return True
    return False


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_failing_server_gives_the_pixels_or_an_error_by_name(tmp_path, monkeypatch, hurried, compression, layout):
    values = image()
    write(tmp_path / "scene.tif", values, compress=compression, **LAYOUTS[layout])
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    seed = COMPRESSIONS.index(compression)
    pixels_or_an_error_by_name(tmp_path, "scene.tif", values, faults=QUICK, seed=seed, share=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("shell", [{}, HOSTILE], ids=["plain shell", "hostile shell"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_way_to_fail_gives_the_pixels_or_an_error_by_name(tmp_path, monkeypatch, hurried, shell, fault):
    values = image()
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    silent = {"silence": 2.0} if fault == "half, then silence" else {}
    met = set()
    for seed, compression in enumerate(("none", "deflate", "zstd")[: 1 if silent else 3]):
        write(tmp_path / f"{compression}.tif", values, compress=compression, **LAYOUTS["tiled by band"])
        for share in (0.2, 1.0):
            found = pixels_or_an_error_by_name(
                tmp_path, f"{compression}.tif", values, faults=(fault,), seed=seed, share=share, **silent
            )
            met.add((share, found))
    assert (1.0, True) in met and (1.0, False) not in met


def test_a_server_that_falls_silent_is_not_waited_for_without_end(tmp_path, monkeypatch, hurried):
    monkeypatch.setattr(grid, "SETTINGS", {**grid.SETTINGS, "GDAL_HTTP_MAX_RETRY": "0", "GDAL_HTTP_TIMEOUT": "0.2"})
    write(tmp_path / "scene.tif", image(), **LAYOUTS["tiled by band"])
    began = time.monotonic()
    with (
        FaultyServer(tmp_path, faults=("half, then silence",), share=1, silence=60) as server,
        pytest.raises(RasterError, match=f"^{server.url}/scene.tif: .*give the same command again later"),
    ):
        read_all(f"{server.url}/scene.tif")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("threads", ["1", "4"])
@pytest.mark.parametrize("compression", ("lzw", "deflate", "zstd", "lzma", "lerc_deflate", "lerc_zstd"))
def test_a_damaged_block_of_a_local_file_is_an_error_by_name(tmp_path, monkeypatch, compression, threads):
    monkeypatch.setenv("GDAL_NUM_THREADS", threads)
    monkeypatch.setenv("GTIFF_IGNORE_READ_ERRORS", "YES")
    values = image()
    path = write(tmp_path / "scene.tif", values, compress=compression, **LAYOUTS["tiled by band"])
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(1000, len(data) - 64, 6):
        data[place : place + 32] = bytes(32)
    path.write_bytes(data)
    try:
        assert np.array_equal(read_all(path), values)
    except RasterError as error:
        assert str(error).startswith(f"{path}: reading rows ")
    else:
        pytest.fail("the damage wasn't noticed")


def test_a_damaged_mask_beside_the_file_is_an_error_by_name(tmp_path):
    path = write(tmp_path / "scene.tif", image(), **LAYOUTS["tiled by band"])
    hidden = np.random.default_rng(0).random((128, 128)) < 0.5
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.write_mask(~hidden)
    mask = tmp_path / "scene.tif.msk"
    whole = mask.read_bytes()
    assert (read_all(path)[:, hidden] == bands.FILL).all()
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    mask.write_bytes(damaged)
    with pytest.raises(RasterError, match=f"{path}: reading rows "):
        read_all(path)
    mask.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RasterError, match=f"{path}"):
        read_all(path)


def test_a_damaged_side_car_is_an_error_by_name_and_the_log_as_quiet_as_it_was(tmp_path, caplog):
    path = write(tmp_path / "scene.tif", image())
    side_car = path.with_name("scene.tif.aux.xml")
    side_car.write_text("<PAMDataset><PAMRasterBand band='1'><NoDataValue>7<", encoding="utf-8")
    with pytest.raises(RasterError, match=f"^{side_car}: damaged: "):
        open_image(path)
    side_car.unlink()
    path.write_bytes(b"no image")
    with pytest.raises(RasterError, match=f"^{path}: .*not recognized"):
        open_image(path)
    assert not caplog.records


def test_secrets_of_a_url_stay_out_of_what_gdal_says(tmp_path, hurried):
    with FaultyServer(tmp_path) as server:
        url = server.url.replace("://", "://me:PASSWORD@")
        with pytest.raises(RasterError) as caught:
            open_image(f"{url}/missing.tif?token=SECRET")
    assert "SECRET" not in str(caught.value) and "PASSWORD" not in str(caught.value)
    assert str(caught.value).startswith(f"{server.url}/missing.tif: ")
