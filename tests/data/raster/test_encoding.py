"""Scales, offsets and values that are no digital numbers: converted when asked, refused by name otherwise."""

import numpy as np
import pytest
import rasterio

from biomass_jax.data import bands
from biomass_jax.data.raster import encoding
from biomass_jax.data.raster.image import open_image
from biomass_jax.errors import RasterError

SHAPE = (6, 41, 53)


def image_of(path, **options):
    with open_image(path, **options) as image:
        image.check_units()
        return image.read_rows(0, image.grid.height), image.fill


@pytest.mark.parametrize(
    ("band", "tags", "band_tags", "expected"),
    [
        (None, {}, {}, None),
        ((1e-4, 0), {}, {}, (1e-4, 0)),
        ((1e-4, -0.1), {"scale_factor": "0.0001"}, {}, (1e-4, -0.1)),
        (None, {"scale_factor": "0.0001", "add_offset": "0.0"}, {}, (1e-4, 0)),
        (None, {"Scale_Factor": "2.75e-05; 2.75e-05", "add_offset": "-0.2"}, {}, (2.75e-5, -0.2)),
        (None, {"scale_factor": "0.0001; 0.0002"}, {}, None),  # contradictory: nobody knows
        (None, {"scale_factor": "unknown"}, {}, None),
        (None, {"scale_factor": "0.5"}, {"scale_factor": "0.25"}, (0.25, 0)),
    ],
)
def test_a_scale_is_found_in_header_or_tags(tmp_path, numbers, write, band, tags, band_tags, expected):
    path = write(tmp_path / "a.tif", numbers((1, 5, 7)), tags=tags, band_tags=[band_tags])
    if band is not None:
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = (band[0],), (band[1],)
    with rasterio.open(path) as file:
        found = encoding.declared(file, 1)
    assert found == (None if expected is None else pytest.approx(expected))


def encoded(path, scale, offset):
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (scale,) * 6, (offset,) * 6
    return path


def test_sentinel_2_with_its_offset_is_refused_and_converted_when_asked(tmp_path, numbers, write):
    plain = numbers(SHAPE, low=200, high=6000, dtype="uint16")
    plain[:, 3, 4] = 0
    shifted = np.where(plain == 0, 0, plain + 1000).astype(np.uint16)
    path = encoded(write(tmp_path / "a.tif", shifted, names=bands.BAND_NAMES, nodata=0), 1e-4, -0.1)
    with pytest.raises(RasterError, match=r"a\.tif: band BLUE has scale 0.0001 and offset -0.1; .*'from_file'"):
        open_image(path)
    for chosen in ("from_file", "sentinel2_offset"):
        rows, fill = image_of(path, encoding=chosen)
        missing = bands.no_data(rows, fill)
        assert np.argwhere(missing).tolist() == [[3, 4]]
        np.testing.assert_array_equal(rows[~missing], np.moveaxis(plain, 0, -1)[~missing])
    raw, _ = image_of(path, encoding="digital_numbers")
    np.testing.assert_array_equal(raw, np.moveaxis(shifted, 0, -1))


def test_from_file_wants_a_scale_and_a_known_name(tmp_path, numbers, write):
    path = write(tmp_path / "a.tif", numbers(SHAPE), names=bands.BAND_NAMES)
    with pytest.raises(RasterError, match=r"a\.tif: encoding is 'from_file', but the file tells no scale of band BLUE"):
        open_image(path, encoding="from_file")
    with pytest.raises(RasterError, match=r"encoding is 'percents'; expected one of auto, from_file, digital_numbers"):
        open_image(path, encoding="percents")


PLAIN = np.random.default_rng(5).integers(100, 4000, SHAPE)


@pytest.mark.parametrize(
    ("stored", "probably"),
    [
        ((PLAIN / 1e4).astype(np.float32), "reflectance"),
        ((PLAIN / 100).astype(np.float32), "percent"),
        (np.rint((PLAIN / 1e4 + 0.2) / 2.75e-5).astype(np.uint16), "landsat_c2"),
    ],
)
def test_what_values_probably_are_is_named_and_converted_when_asked(tmp_path, write, stored, probably):
    path = write(tmp_path / "a.tif", stored, names=bands.BAND_NAMES)
    with pytest.raises(RasterError, match=rf"a\.tif: percentiles .*encoding='{probably}'"):
        image_of(path)
    rows, _ = image_of(path, encoding=probably)
    # A Landsat number stands for 0.275 digital numbers.
    np.testing.assert_allclose(rows, np.moveaxis(PLAIN, 0, -1), atol=0.2 if probably == "landsat_c2" else 1e-3)
    raw, _ = image_of(path, encoding="digital_numbers")
    np.testing.assert_array_equal(raw, np.moveaxis(stored, 0, -1))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.minimum(PLAIN // 16, 255).astype(np.uint8), r"\(uint8\) .*: a picture of 8 bits"),
        ((PLAIN // 100).astype(np.int16), "very low for digital numbers.*encoding='percent'"),
        ((PLAIN * 9).astype(np.uint16), r"\d+% of them beyond 0 to 16,000"),
    ],
)
def test_other_values_that_cannot_be(tmp_path, write, stored, message):
    path = write(tmp_path / "a.tif", stored, names=bands.BAND_NAMES)
    with pytest.raises(RasterError, match=message):
        image_of(path)
    raw, _ = image_of(path, encoding="digital_numbers")
    np.testing.assert_array_equal(raw, np.moveaxis(stored, 0, -1))


def test_plausible_values_pass():
    rng = np.random.default_rng(8)
    bright = rng.integers(-200, 15_000, (2000, 6))  # snow beside shadow
    desert = rng.integers(1500, 6000, (2000, 6))
    for values in (bright, desert, bright[:999] * 1e-4):  # the last are too few to tell
        assert encoding.check_plausible(values, "int16", "a") is None
    dark = rng.integers(0, 60, (2000, 6))  # a chip of water
    assert "very low" in encoding.check_plausible(dark, "int16", "a", one_of_many=True)


def test_a_mask_hides_pixels_wherever_it_lies(tmp_path, numbers, write):
    data = numbers(SHAPE, low=500)
    hidden = np.zeros(SHAPE[1:], bool)
    hidden[2:5, 7:11] = True
    expected = np.moveaxis(data, 0, -1).copy()
    expected[hidden] = bands.FILL
    for where in (True, False):
        path = write(tmp_path / f"{where}.tif", data, names=bands.BAND_NAMES)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=where), rasterio.open(path, "r+") as file:
            file.write_mask(~hidden)
        assert path.with_name(f"{path.name}.msk").exists() != where
        rows, fill = image_of(path)
        np.testing.assert_array_equal(rows, expected)
        assert fill is None and rows.dtype == np.int16
    alpha = np.where(hidden, 0, 10_000).astype(np.int16)
    path = write(tmp_path / "alpha.tif", np.concatenate([data, alpha[None]]), names=[*bands.BAND_NAMES, "alpha"])
    with rasterio.open(path, "r+") as file:
        file.colorinterp = (*file.colorinterp[:6], rasterio.enums.ColorInterp.alpha)
    rows, _ = image_of(path)
    np.testing.assert_array_equal(rows, expected)


def test_infinite_values_and_fills_that_were_cast_are_no_data_and_counted(tmp_path, numbers, write):
    floats = numbers(SHAPE, low=500, dtype="float32")
    floats[2, 17, 19], floats[4, 30, 1] = np.inf, -np.inf
    with open_image(write(tmp_path / "a.tif", floats, names=bands.BAND_NAMES)) as image:
        rows = np.concatenate([image.read_rows(0, 20), image.read_rows(20, 41)])
        assert image.oddities == {"infinite": (2, 17, 19)}
        assert np.argwhere(bands.no_data(rows, image.fill)).tolist() == [[17, 19], [30, 1]]
    cast = numbers(SHAPE, low=500, dtype="uint16")
    cast[:, 9, 10:13] = 2**16 - 9999
    with open_image(write(tmp_path / "b.tif", cast, names=bands.BAND_NAMES)) as image:
        rows = image.read_rows(0, 41)
        assert image.oddities == {"55537, which is -9999 cast to uint16": (18, 9, 10)}
        assert np.argwhere(bands.no_data(rows, image.fill)).tolist() == [[9, 10], [9, 11], [9, 12]]
    with open_image(write(tmp_path / "c.tif", cast, names=bands.BAND_NAMES, nodata=55537)) as image:
        assert bands.no_data(image.read_rows(0, 41), image.fill).sum() == 3 and image.oddities == {}


def test_complex_numbers_are_refused(tmp_path, numbers, write):
    path = write(tmp_path / "a.tif", numbers(SHAPE).astype(np.complex64), names=bands.BAND_NAMES)
    with pytest.raises(RasterError, match=r"a\.tif: its values are complex64; expected real numbers"):
        open_image(path)


def test_the_shell_does_not_hide_side_cars(tmp_path, numbers, write, monkeypatch):
    path = write(tmp_path / "a.tif", numbers(SHAPE, low=500), names=bands.BAND_NAMES)
    with rasterio.open(path) as file:
        assert file.nodata is None
    path.with_name("a.tif.aux.xml").write_text(
        "<PAMDataset>"
        + "".join(f'<PAMRasterBand band="{i}"><NoDataValue>777</NoDataValue></PAMRasterBand>' for i in range(1, 7))
        + "</PAMDataset>"
    )
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")
    monkeypatch.setenv("GDAL_PAM_ENABLED", "NO")
    with open_image(path) as image:
        assert image.fill == 777
        assert image.reading()["nodata"] == ["777.0"] * 6
