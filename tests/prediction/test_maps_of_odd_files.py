"""Files that look right and aren't: the map is that of the plain equivalent, or the cause is named."""

import json

import jax
import numpy as np
import pytest
import rasterio

from biomass_jax.data.raster import grid
from biomass_jax.data.raster.encoding import SCALES
from biomass_jax.errors import PredictionError, RasterError
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.runtime import environment
from tests.data.raster.cloud_optimized import faults
from tests.data.raster.faulty_server import FaultyServer
from tests.prediction.stubs import NIR, nir, stub_bundle, write_raster

SIZE = (61, 83)


def plain_image(rng):
    image = rng.integers(150, 6000, (*SIZE, 6)).astype(np.int16)
    image[5:9, 20:31] = -9999
    return image


def stored_as(rng, image, encoding, dtype):
    """The image in another encoding, its no-data value, and how far a value may be off after the way back."""
    scale, offset = SCALES[encoding]
    values = (image / 1e4 - offset) / scale
    whole = np.issubdtype(dtype, np.integer)
    fill = float(rng.choice([0, 65535] if dtype == np.uint16 else [-9999, -32000]))
    stored = np.where(image == -9999, fill, np.rint(values) if whole else values).astype(dtype)
    return stored, fill, (scale / 1e-4 / 2 if whole else 0) + 1e-2


def read(path):
    with rasterio.open(path) as file:
        return file.read(1), file.tags()


@pytest.mark.parametrize("seed", range(12))
def test_a_map_of_any_encoding_and_mask_is_that_of_the_plain_file(stub, tmp_path, seed):
    rng = np.random.default_rng(seed)
    image = plain_image(rng)
    encoding = list(SCALES)[seed % len(SCALES)]
    types = [np.float32, np.float64]
    if encoding in ("digital_numbers", "landsat_c2", "sentinel2_offset"):
        types += [np.int32, np.uint16]
    stored, fill, tolerance = stored_as(rng, image, encoding, types[rng.integers(len(types))])
    path = write_raster(tmp_path / "odd.tif", stored, nodata=fill)
    asked = {"encoding": encoding}
    if rng.random() < 0.5 and encoding != "digital_numbers":
        scale, offset = SCALES[encoding]
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = (scale,) * 6, (offset,) * 6
        asked = {"encoding": "from_file"}
        if encoding != "reflectance":  # scale 1 and offset 0 are what a file without any has
            with pytest.raises(RasterError, match="has scale .* expected none"):
                stub().predict_file(path, tmp_path / "refused")
        else:
            asked = {"encoding": "reflectance"}
    hidden = rng.random(SIZE) < 0.1
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=bool(rng.integers(2))), rasterio.open(path, "r+") as file:
        file.write_mask(~hidden)
    expected = np.where(hidden | (image[..., 0] == -9999), -1, image[..., NIR]).astype(np.float32)
    found, tags = read(stub().predict_file(path, tmp_path / "out", **asked))
    np.testing.assert_array_equal(found == -1, expected == -1)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert f'"encoding": "{asked["encoding"]}"' in tags["SETTINGS"]


def test_what_is_no_data_for_an_odd_reason_is_logged_with_its_place(stub, tmp_path, caplog):
    image = plain_image(np.random.default_rng(1)).astype(np.float32)
    image[40, 50, 2] = image[41, 3, 2] = np.inf
    found, _ = read(stub().predict_file(write_raster(tmp_path / "a.tif", image), tmp_path / "out"))
    assert found[40, 50] == found[41, 3] == -1 and (found == -1).sum() == 4 * 11 + 2
    assert "a.tif: 2 values are infinite, the first in row 40, column 50; taken as no-data" in caplog.text


ODD = {
    "infinite": (np.float32, np.inf, "infinite"),
    "infinite as float32": (np.float64, -1e39, "infinite"),
    "cast": (np.uint16, 2**16 - 9999, "55537, which is -9999 cast to uint16"),
    "cast to 32 bits": (np.uint32, 2**32 - 9999, "4294957297, which is -9999 cast to uint32"),
}


@pytest.mark.parametrize("encoding", ["digital_numbers", "landsat_c2"])
@pytest.mark.parametrize("kind", ODD)
def test_arrays_have_no_data_where_their_files_have_none_and_tell_it_alike(stub, tmp_path, caplog, kind, encoding):
    dtype, odd, told = ODD[kind]
    image = np.random.default_rng(4).integers(8000, 15_000, (30, 40, 6)).astype(dtype)
    image[7, 9, 1] = image[7, 9, 4] = image[20, 30, 5] = odd
    as_it_came = image.copy()
    path = write_raster(tmp_path / "a.tif", image, nodata=None)
    expected, _ = read(stub().predict_file(path, tmp_path, encoding=encoding))
    assert np.argwhere(expected == -1).tolist() == [[7, 9], [20, 30]]
    caplog.clear()
    found = stub().predict_array(image, encoding=encoding)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [record.message for record in caplog.records if "taken as" in record.message] == [
        f"image: 3 values are {told}, the first in row 7, column 9; taken as no-data"
    ]
    caplog.clear()
    np.testing.assert_array_equal(
        stub().predict_array(np.stack([image[:5], image[5:10]]), encoding=encoding)[1], found[5:10]
    )
    assert f"image 1 of 2: 2 values are {told}, the first in row 2, column 9" in caplog.text
    assert np.isfinite(stub().predict_array(image, False, encoding=encoding)).all()
    np.testing.assert_array_equal(image, as_it_came)


def test_an_array_s_pixel_with_data_has_a_number_or_the_model_is_blamed(stub):
    def faulty(variables, x):
        return np.float32("nan") / (x[..., NIR] - 300) * variables["scale"]

    image = np.full((2, 8, 9, 6), 700, np.int16)
    image[1, 2] = -9999
    with pytest.raises(PredictionError, match="the model returned nan for 72 pixels with data, the first at row 0"):
        stub(faulty).predict_array(image)


def test_a_side_car_that_changes_makes_the_map_anew(stub, tmp_path):
    image = plain_image(np.random.default_rng(2))
    image[:, :30] = 777
    path = write_raster(tmp_path / "scene.tif", image, nodata=None)
    predictor = stub()
    assert predictor.predict_file(path, tmp_path).status == "written"
    assert predictor.predict_file(path, tmp_path).status == "skipped"
    bands = "".join(f'<PAMRasterBand band="{i}"><NoDataValue>777</NoDataValue></PAMRasterBand>' for i in range(1, 7))
    path.with_name("scene.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
    again = predictor.predict_file(path, tmp_path)
    assert again.status == "written"
    assert (read(again)[0][:, :30] == -1).all()


def test_arrays_that_hold_no_digital_numbers_are_refused_unless_told(stub):
    image = plain_image(np.random.default_rng(3)).astype(np.float32)
    image[image == -9999] = np.nan
    with pytest.raises(PredictionError, match="image: percentiles .* probably reflectance"):
        stub().predict_array(image / 1e4)
    found = stub().predict_array(image / 1e4, encoding="reflectance")
    np.testing.assert_allclose(found, np.where(np.isnan(image[..., NIR]), -1, image[..., NIR]), atol=1e-2)
    raw = stub().predict_array(image / 1e4, encoding="digital_numbers")
    np.testing.assert_allclose(raw[30:], image[30:, :, NIR] / 1e4)
    with pytest.raises(PredictionError, match=r"dtype complex64; expected digital numbers"):
        stub().predict_array(image.astype(np.complex64))


def test_an_empty_map_is_refused_unless_asked_for(stub, tmp_path):
    """For want of data, or because the mask keeps next to nothing; in one pass and in tiles."""
    image = np.random.default_rng(1).integers(150, 6000, (61, 83, 6)).astype(np.int16)
    classes = np.zeros((61, 83, 1), np.uint8)
    classes[3, 4:9] = 7  # 5 of 5,063 pixels: below 0.1 %
    mask = write_raster(tmp_path / "mask.tif", classes, nodata=None, named=False)
    empty = write_raster(tmp_path / "empty.tif", np.full_like(image, -9999), nodata=-9999)
    full = write_raster(tmp_path / "full.tif", image, nodata=-9999)
    for tile in (224, 32):
        predictor = stub(**({"tile": tile, "stride": 24, "margin": 4} if tile == 32 else {}))
        with pytest.raises(PredictionError, match=r"empty\.tif: pixels with data: 0 of 5,063; allow_empty"):
            predictor.predict_file(empty, tmp_path / "out")
        kept = {"mask": mask, "mask_keep": (7,)}
        with pytest.raises(
            PredictionError, match=r"pixels of the 5,063 with data that the mask .*mask\.tif keeps: 5 of"
        ):
            predictor.predict_file(full, tmp_path / "out", **kept)
        assert not list((tmp_path / "out").glob("*.tif"))
        values, _ = read(predictor.predict_file(full, tmp_path / "asked", allow_empty=True, overwrite=True, **kept))
        assert np.argwhere(values != -1).tolist() == [[3, column] for column in range(4, 9)]


def test_no_map_is_left_of_an_image_that_a_server_gave_in_part(tmp_path, monkeypatch):
    quick = {"GDAL_HTTP_RETRY_DELAY": "0.01", "GDAL_HTTP_MAX_RETRY": "0"}
    monkeypatch.setattr(grid, "SETTINGS", {**grid.SETTINGS, **quick})
    monkeypatch.setenv("GDAL_NUM_THREADS", "4")
    image = np.random.default_rng(0).integers(100, 3000, (256, 256, 6)).astype(np.int16)
    write_raster(tmp_path / "scene.tif", image)
    predictor = Predictor(stub_bundle(), model_fn=nir, tile=64, stride=48)
    with (
        FaultyServer(tmp_path, faults=("503", "half, as if whole"), share=1, well=3) as server,
        pytest.raises(RasterError, match=f"^{server.url}/scene.tif: "),
    ):
        predictor.predict_file(f"{server.url}/scene.tif", tmp_path / "maps")
    assert not list((tmp_path / "maps").glob("*"))


def test_a_map_is_the_same_where_a_program_has_set_jax_and_gdal_otherwise(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(100, 3000, (96, 96, 6)).astype(np.int16)
    write_raster(tmp_path / "scene.tif", image, nodata=None)
    side_car = "<PAMDataset><PAMRasterBand band='{}'><NoDataValue>{}</NoDataValue></PAMRasterBand></PAMDataset>"
    (tmp_path / "scene.tif.aux.xml").write_text(side_car.format(1, image[5, 7, 0]), encoding="utf-8")

    def made(folder):
        predictor = Predictor(stub_bundle(means=900.0, stds=7.0), model_fn=lambda v, x: x.mean(-1) * v["scale"])
        path = predictor.predict_file(tmp_path / "scene.tif", tmp_path / folder).path
        with rasterio.open(path) as file:
            return file.read(1)

    plain = made("plain")
    assert plain[5, 7] == -1
    for name, value in (("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR"), ("GDAL_PAM_ENABLED", "NO")):
        monkeypatch.setenv(name, value)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        assert np.array_equal(made("other"), plain)


def test_a_map_is_the_same_under_another_time_zone_and_with_commas_for_points(tmp_path, elsewhere):
    image = np.random.default_rng(0).integers(100, 3000, (96, 96, 6)).astype(np.int16)
    path = write_raster(tmp_path / "HLS.L30.T10SFF.2020183T184512.v2.0.tif", image, nodata=None)
    side_car = "<PAMDataset><PAMRasterBand band='1'><NoDataValue>{}</NoDataValue></PAMRasterBand></PAMDataset>"
    path.with_name(f"{path.name}.aux.xml").write_text(side_car.format(f"{image[5, 7, 0]}.0"), encoding="utf-8")
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1e-4,) * 6, (0.125,) * 6

    def made(folder):
        predictor = Predictor(stub_bundle(means=900.5, stds=7.25), model_fn=lambda v, x: x.mean(-1) * v["scale"])
        found = predictor.predict_file(path, tmp_path / folder, encoding="from_file", style=True, stac=True)
        with rasterio.open(found.path) as file:
            tags = {name: text for name, text in file.tags().items() if name != "ENVIRONMENT"}
            seen = file.read(1), (tags, file.tags(1), file.profile, file.transform, file.crs.to_wkt())
        assert faults(found.path) == []
        kinds = {".json", ".qml", ".txt"}
        beside = {p.suffix: p.read_text("utf-8") for p in found.path.parent.iterdir() if p.suffix in kinds}
        item = json.loads(beside.pop(".json"))
        for asset in item["assets"].values():  # the file holds its environment
            asset.pop("file:checksum", None), asset.pop("file:size", None)
        return seen, beside, item

    (here, told_here), beside_here, item_here = made("here")
    assert here[5, 7] == -1 and (here != -1).mean() > 0.9 and beside_here.keys() == {".qml", ".txt"}
    for zone in ("Kathmandu", "Marquesas"):
        elsewhere(zone)
        (there, told_there), beside_there, item_there = made(zone)
        np.testing.assert_array_equal(there, here)
        assert told_there == told_here and beside_there == beside_here and item_there == item_here
    assert environment.recorded().keys() >= {"TZ", "LANG", "LC_ALL", "LC_NUMERIC"}
