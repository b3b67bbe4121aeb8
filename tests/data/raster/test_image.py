"""Opening and reading images; every raster is made here, with every dimension different."""

import os

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data import bands
from biomass_jax.data.raster import image as raster_read
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import open_image, read_preview
from biomass_jax.errors import RasterError

UTM = CRS.from_epsg(32610)
PLACE = Affine(30, 0, 400020, 0, -30, 4200000)
GRANULE = "HLS.L30.T10SFF.2020183T184512.v2.0"
S30_GRANULE = "HLS.S30.T10SFF.2020185T184921.v2.0"
TEN = "(None,'BLUE','GREEN','RED','NIR_NARROW','SWIR_1','SWIR_2',None,None,None)"


@pytest.fixture(autouse=True)
def _forget_what_was_said(monkeypatch):
    monkeypatch.setattr(raster_read, "_said_unverified", set())


def moved(columns, rows):
    """PLACE, so many pixels to the east and south."""
    return Affine(30, 0, 400020 + 30 * columns, 0, -30, 4200000 - 30 * rows)


def test_bands_are_read_by_name_as_stored(tmp_path, numbers, write):
    data = numbers((8, 61, 43), low=-300, high=12000)
    names = ["B01", "SWIR_2", "RED", "GREEN", "BLUE", "SWIR_1", "NIR_NARROW", "Fmask"]
    path = write(tmp_path / "a.tif", data, names=names, nodata=-9999, tags={"scale_factor": "0.0001"})
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.0001,) * 8
    with open_image(path) as image:
        assert (image.grid.height, image.grid.width) == (61, 43)
        assert (image.grid.crs, image.grid.transform) == (UTM, PLACE)
        assert (image.dtype, image.fill, image.warnings) == (np.int16, -9999, [])
        assert image.check_units() is None
        rows = image.read_rows(17, 40)
    assert rows.dtype == np.int16 and rows.shape == (23, 43, 6)
    np.testing.assert_array_equal(rows, np.moveaxis(data[[4, 3, 2, 6, 5, 1], 17:40], 0, -1))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_other_types_become_float32(tmp_path, dtype, numbers, write):
    data = numbers((6, 11, 13), dtype=dtype)
    path = write(tmp_path / "a.tif", data, names=bands.BAND_NAMES)
    with open_image(path) as image:
        rows = image.read_rows(0, 11)
    assert rows.dtype == np.float32 and image.fill is None
    np.testing.assert_array_equal(rows, np.moveaxis(data, 0, -1))


def test_an_explicit_list_and_an_explicit_fill(tmp_path, numbers, write):
    data = numbers((10, 9, 12))
    path = write(tmp_path / "a.tif", data, nodata=-9999)
    with open_image(path, band_list=TEN, fill=-1, wanted=("SWIR_2", "BLUE")) as image:
        np.testing.assert_array_equal(image.read_rows(2, 5), np.moveaxis(data[[6, 1], 2:5], 0, -1))
        assert image.fill == -1 and image.bands == ("SWIR_2", "BLUE")


def test_wrong_bands_are_raster_errors_that_name_the_file(tmp_path, numbers, write):
    path = write(tmp_path / "a.tif", numbers((9, 9, 12)))
    for options, message in (
        ({}, r"a\.tif: no band description"),
        ({"band_list": TEN}, r"a\.tif: the band list has 10 entries"),
        ({"band_list": "BLUE,GREEEN"}, r"a\.tif: unknown band name 'GREEEN'"),
    ):
        with pytest.raises(RasterError, match=message):
            open_image(path, **options)


@pytest.mark.parametrize(("granule", "field"), [(GRANULE, "l30"), (S30_GRANULE, "s30")])
def test_a_granule_is_read_from_its_single_band_files(tmp_path, granule, field, write_granule):
    layers = [getattr(band, field) for band in bands.BANDS]
    made = write_granule(tmp_path, granule, [*layers[::-1], "B01", "B09"], tags={"SENSOR": granule[4:7]})
    (tmp_path / f"{granule}.B09.tif").write_bytes(b"broken, and not needed")
    with open_image(tmp_path) as image:
        expected = np.concatenate([made[layer] for layer in layers])
        np.testing.assert_array_equal(image.read_rows(5, 30), np.moveaxis(expected[:, 5:30], 0, -1))
        assert image.sensor == granule[4:7] and image.fill == -9999 and image.dtype == np.int16
        assert image.season == {"l30": "2020-07-01/2020-07-02", "s30": "2020-07-03/2020-07-04"}[field]
        assert image.sources == tuple(f"{granule}.{layer}.tif" for layer in layers)
    trained = [w for w in image.warnings if "trained on L30 alone" in w]
    assert bool(trained) == (field == "s30")
    with open_image(tmp_path, model_sensors=("L30", "S30")) as image:
        assert image.warnings == []


def test_an_s30_granule_with_the_numbers_of_l30(tmp_path, write_granule):
    write_granule(tmp_path, S30_GRANULE)
    with pytest.raises(RasterError, match=rf"{S30_GRANULE}: an S30 file with the band numbers of L30.*B8A"):
        open_image(tmp_path)


def test_a_long_name_unmasks_an_s30_file(tmp_path, numbers, write, write_granule):
    long_names = [{"long_name": n} for n in ("Blue", "Green", "Red", "Red_Edge1", "Red_Edge2", "Red_Edge3")]
    numbers_ = ["B02", "B03", "B04", "B05", "B06", "B07"]
    path = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=numbers_, band_tags=long_names)
    with pytest.raises(RasterError, match="S30 file with the band numbers of L30"):
        open_image(path)
    write_granule(tmp_path / "g", tags={"long_name": "Red_Edge1"})
    with pytest.raises(RasterError, match=r"Red_Edge1.*is found on S30 alone"):
        open_image(tmp_path / "g")


def test_a_sensor_tag_decides_and_must_agree_with_the_name(tmp_path, numbers, write):
    names = ["B02", "B03", "B04", "B05", "B06", "B07"]
    path = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=names, tags={"SENSOR": "OLI_TIRS; OLI_TIRS"})
    with open_image(path) as image:
        assert image.sensor == "L30" and image.warnings == []
    path = write(tmp_path / "b.tif", numbers((6, 5, 7)), names=names, tags={"SPACECRAFT_NAME": "Sentinel-2B"})
    with pytest.raises(RasterError, match="S30 file with the band numbers of L30"):
        open_image(path)
    path = write(tmp_path / f"{GRANULE}.tif", numbers((6, 5, 7)), names=names, tags={"SENSORS": "S30"})
    with pytest.raises(RasterError, match="its name says L30, its sensor tag S30"):
        open_image(path)


def test_unverified_is_said_once_for_each_kind(tmp_path, numbers, write):
    numbered = write(tmp_path / "n.tif", numbers((6, 5, 7)), names=["B02", "B03", "B04", "B05", "B06", "B07"])
    positional = write(tmp_path / "p.tif", numbers((10, 5, 7)))
    heard = []
    for path, listed in ((numbered, None), (numbered, None), (positional, TEN), (positional, TEN)):
        with open_image(path, band_list=listed) as image:
            heard.append([("by numbers" in w, "by positions" in w) for w in image.warnings])
    assert heard == [[(True, False)], [], [(False, True)], []]


def test_season_tag(tmp_path, numbers, write):
    path = write(tmp_path / f"{GRANULE}.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES, tags={"SEASON": "a/b"})
    with open_image(path) as image:
        assert image.season == "a/b" and image.tags["SEASON"] == "a/b"


def test_files_of_a_granule_on_different_grids(tmp_path, numbers, write, write_granule):
    write_granule(tmp_path)
    for other in ({"shape": (37, 54)}, {"transform": moved(1, 0)}, {"crs": CRS.from_epsg(32611)}):
        shape = other.pop("shape", (37, 53))
        write(tmp_path / f"{GRANULE}.B06.tif", numbers((1, *shape)), **other)
        with pytest.raises(RasterError, match=r"different grids: .*B02\.tif is 37 x 53.*B06\.tif is"):
            open_image(tmp_path)


def test_grids_are_compared_by_what_their_crs_means():
    spelled = CRS.from_wkt(
        'PROJCS["mine",GEOGCS["unknown",DATUM["based on WGS 84",SPHEROID["WGS 84",6378137,298.257223563]],'
        'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
        'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",-123],PARAMETER["scale_factor",0.9996],'
        'PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1]]'
    )
    grid = Grid(37, 53, UTM, PLACE)
    assert grid.same_as(Grid(37, 53, spelled, PLACE))
    north = Affine(30, 0, 400020, 0, -30, -4200000)  # a southern tile labelled with the north zone
    south = Affine(30, 0, 400020, 0, -30, 5800000)
    assert Grid(5, 7, UTM, north).same_as(Grid(5, 7, CRS.from_epsg(32710), south))
    assert not Grid(5, 7, UTM, south).same_as(Grid(5, 7, CRS.from_epsg(32710), south))
    assert not Grid(5, 7, CRS.from_epsg(32611), north).same_as(Grid(5, 7, CRS.from_epsg(32710), south))
    assert not grid.same_as(Grid(37, 53, None, PLACE))
    assert not grid.same_as(Grid(37, 53, CRS.from_epsg(3857), PLACE))
    assert not grid.same_as(Grid(37, 53, UTM, Affine(30.3, 0, 400020, 0, -30.3, 4200000)))


def test_fills_that_differ_become_one(tmp_path, numbers, write, write_granule):
    write_granule(tmp_path)
    data = numbers((1, 37, 53), 7)
    data[0, 3, 4] = data[0, 8, 50] = -32768
    write(tmp_path / f"{GRANULE}.B06.tif", data, nodata=-32768)
    with open_image(tmp_path) as image:
        rows = image.read_rows(0, 37)
        missing = bands.no_data(rows, image.fill)
    assert image.fill == -9999
    assert sorted(zip(*np.nonzero(missing), strict=True)) == [(3, 4), (8, 50)]
    assert rows[3, 4, 4] == -9999 and rows[3, 4, 3] != -9999


def test_no_crs_is_a_warning(tmp_path, numbers, write):
    path = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES, crs=None)
    with open_image(path) as image:
        assert image.grid.crs is None and image.grid.transform == PLACE
    assert [w for w in image.warnings if "a.tif: no CRS" in w]


def test_no_georeference_at_all(tmp_path, numbers):
    path = tmp_path / "a.png"
    profile = {"driver": "PNG", "count": 1, "height": 5, "width": 7, "dtype": "uint8"}
    with raster_read.open_quietly(path, "w", **profile) as dataset:
        dataset.write(numbers((1, 5, 7), high=255, dtype="uint8"))
    with open_image(path, band_list="RED", wanted=("RED",)) as image:
        assert image.grid.transform == Affine.identity() and image.dtype == np.float32
        assert any("no CRS" in warning for warning in image.warnings)


def test_identity_follows_the_files(tmp_path, numbers, write, write_granule):
    made = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES)
    rasterio.shutil.copy(made, tmp_path / "b.vrt", driver="VRT")

    def identity(path):
        with open_image(path) as image:
            found = image.identity()
            return {name: found[name] for name in ("size", "mtime_ns")}

    status = made.stat()
    assert identity(made) == {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    before = identity(tmp_path / "b.vrt")
    assert before["size"] == status.st_size + (tmp_path / "b.vrt").stat().st_size
    later = max(before["mtime_ns"], status.st_mtime_ns) + 10**9
    os.utime(made, ns=(later, later))
    assert identity(tmp_path / "b.vrt") == {"size": before["size"], "mtime_ns": later}
    write_granule(tmp_path / "g")
    files = [p for p in (tmp_path / "g").iterdir() if ".B0" in p.name]
    expected = {"size": sum(p.stat().st_size for p in files), "mtime_ns": max(p.stat().st_mtime_ns for p in files)}
    assert identity(tmp_path / "g") == expected


def test_preview_of_an_image(tmp_path, numbers, write):
    data = np.repeat(np.repeat(numbers((6, 20, 30)), 4, 1), 4, 2)
    data[:, :8, :8] = 0
    path = write(tmp_path / "a.tif", data, names=bands.BAND_NAMES)
    preview = read_preview(path, 30, wanted=("RED", "BLUE"))
    assert preview.shape == (20, 30, 2) and preview.dtype == np.float32
    assert np.isnan(preview[:2, :2]).all() and np.isnan(preview).sum() == 8
    np.testing.assert_array_equal(preview[2:], np.moveaxis(data[[2, 0], 8::4, ::4], 0, -1))


def test_preview_of_a_map(tmp_path, write):
    values = np.arange(7 * 9, dtype=np.float32).reshape(1, 7, 9)
    values[0, 2, 3] = -1
    path = write(tmp_path / "a.tif", values, nodata=-1)
    preview = read_preview(path, 100)
    assert preview.shape == (7, 9) and np.argwhere(np.isnan(preview)).tolist() == [[2, 3]]
    assert preview[6, 8] == 62


def test_the_real_chip(samples):
    with open_image(samples / "chip_input.tif", band_list=TEN) as image:
        assert image.check_units() is None
        rows = image.read_rows(0, 224)
        assert bands.no_data(rows, image.fill).sum() == 79
    with rasterio.open(samples / "chip_input.tif") as dataset:
        np.testing.assert_array_equal(rows, np.moveaxis(dataset.read((2, 3, 4, 5, 6, 7)), 0, -1))
