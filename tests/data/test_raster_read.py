"""Finding, opening and reading images and masks; every raster is made here, with every dimension different."""

import http.server
import os
import threading
from pathlib import Path, PurePath

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import Resampling, reproject

from biomass_jax.data import bands, raster, raster_read

UTM = CRS.from_epsg(32610)
PLACE = Affine(30, 0, 400020, 0, -30, 4200000)
GRANULE = "HLS.L30.T10SFF.2020183T184512.v2.0"
S30_GRANULE = "HLS.S30.T10SFF.2020185T184921.v2.0"
TEN = "(None,'BLUE','GREEN','RED','NIR_NARROW','SWIR_1','SWIR_2',None,None,None)"


@pytest.fixture(autouse=True)
def _forget_what_was_said(monkeypatch):
    monkeypatch.setattr(raster_read, "_said_unverified", set())


def numbers(shape, seed=0, low=1, high=9000, dtype="int16"):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def moved(columns, rows):
    """PLACE, so many pixels to the east and south."""
    return Affine(30, 0, 400020 + 30 * columns, 0, -30, 4200000 - 30 * rows)


def write(path, data, *, names=None, tags=None, band_tags=None, crs=UTM, transform=PLACE, **options):
    """A GeoTIFF of (bands, rows, columns); its directory comes first, as in a COG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = data.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": data.dtype.name}
    with rasterio.open(path, "w", **profile, crs=crs, transform=transform, **options) as dataset:
        for index, name in enumerate(names or (), 1):
            if name is not None:
                dataset.set_band_description(index, name)
        for index, one in enumerate(band_tags or (), 1):
            dataset.update_tags(index, **one)
        dataset.update_tags(**(tags or {}))
        dataset.write(data)
    return path


def write_granule(folder, granule=GRANULE, layers=None, shape=(37, 53), **options):
    """A folder of an HLS granule's single-band files with quality and angles beside them; {layer: values}."""
    layers = layers or (bands.BANDS[i].l30 for i in range(6))
    made = {}
    for seed, layer in enumerate(layers):
        made[layer] = numbers((1, *shape), seed)
        write(folder / f"{granule}.{layer}.tif", made[layer], nodata=-9999, **options)
    for layer in ("Fmask", "SZA"):
        write(folder / f"{granule}.{layer}.tif", numbers((1, *shape), 99), **options)
    return made


# ---- find_inputs


def test_a_file_is_one_item(tmp_path):
    path = write(tmp_path / "scene.one.tif", numbers((6, 5, 7)))
    assert raster.find_inputs(path) == [raster.InputItem(str(path), (str(path),), PurePath("scene.one"))]


def test_a_folder_is_walked_and_mirrored(tmp_path):
    for name in ("b.tif", "sub/a.TIF", "sub/deep/c.vrt", "d.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for passed in (
        ".b.partial.tif",
        "b_agbd.tif",
        "b_agbd_quicklook.png",
        "notes.txt",
        ".cache/x.tif",
        "b.tif.aux.xml",
    ):
        (tmp_path / passed).parent.mkdir(exist_ok=True)
        (tmp_path / passed).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    items = raster.find_inputs(tmp_path)
    assert [str(item.relative) for item in items] == ["b", "d", "sub/a", "sub/deep/c"]
    assert items[2].paths == (str(tmp_path / "sub/a.TIF"),)


def test_a_granule_is_one_item(tmp_path):
    write_granule(tmp_path / GRANULE)
    (item,) = raster.find_inputs(tmp_path / GRANULE)
    assert item.relative == PurePath(GRANULE)
    assert [Path(p).name.split(".")[-2] for p in item.paths] == ["B02", "B03", "B04", "B05", "B06", "B07"]
    (item,) = raster.find_inputs(tmp_path)
    assert item.relative == PurePath(GRANULE, GRANULE)


def test_granules_in_one_folder_are_one_item_each(tmp_path):
    write_granule(tmp_path)
    write_granule(tmp_path, S30_GRANULE, ("B02", "B8A"))
    write(tmp_path / f"{GRANULE}.stack.tif", numbers((6, 5, 7)))
    items = raster.find_inputs(tmp_path)
    assert [str(i.relative) for i in items] == [GRANULE, f"{GRANULE}.stack", S30_GRANULE]
    assert [len(item.paths) for item in items] == [6, 1, 2]


def test_patterns(tmp_path):
    for name in ("y1/a.tif", "y1/b.tif", "y2/a.tif", "y2/a_agbd.tif", "y2/z/c.tif", "y2/a.txt", "y2/p.jp2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern):
        return [str(item.relative) for item in raster.find_inputs(str(tmp_path / pattern))]

    assert found("*/a*.tif") == ["y1/a", "y2/a"]
    assert found("y2/**") == ["a", "z/c"]
    assert found("**/*.tif") == ["y1/a", "y1/b", "y2/a", "y2/z/c"]
    assert found("y?") == ["y1/a", "y1/b", "y2/a", "y2/z/c"]
    assert found("y2/*.jp2") == ["p"]
    write_granule(tmp_path / "g")
    assert found("g/*.B0*.tif") == [GRANULE]


def test_a_name_that_looks_like_a_pattern_is_a_file(tmp_path):
    path = tmp_path / "a[1].tif"
    path.touch()
    assert raster.find_inputs(path)[0].paths == (str(path),)


@pytest.mark.parametrize(
    ("url", "path", "name", "relative"),
    [
        ("https://h.org/d/a.tif?sig=SECRET", "/vsicurl/https://h.org/d/a.tif?sig=SECRET", "https://h.org/d/a.tif", "a"),
        ("http://me:PW@h.org/a.b.tif", "/vsicurl/http://me:PW@h.org/a.b.tif", "http://h.org/a.b.tif", "a.b"),
        ("s3://bucket/k/a.tif", "/vsis3/bucket/k/a.tif", "s3://bucket/k/a.tif", "a"),
        ("gs://bucket/a.tif", "/vsigs/bucket/a.tif", "gs://bucket/a.tif", "a"),
        ("/vsizip/x.zip/a.tif", "/vsizip/x.zip/a.tif", "/vsizip/x.zip/a.tif", "a"),
    ],
)
def test_urls(url, path, name, relative):
    assert raster.find_inputs(url) == [raster.InputItem(name, (path,), PurePath(relative))]


def test_nothing_found_says_what_was_looked_for(tmp_path):
    (tmp_path / f"{GRANULE}.Fmask.tif").touch()
    with pytest.raises(raster.RasterError, match=r"no images in this folder.*\*\.tif.*Fmask"):
        raster.find_inputs(tmp_path)
    with pytest.raises(raster.RasterError, match="no image matches this pattern"):
        raster.find_inputs(str(tmp_path / "*.vrt"))
    with pytest.raises(raster.RasterError, match="absent.tif: no such file or folder"):
        raster.find_inputs(tmp_path / "absent.tif")
    with pytest.raises(raster.RasterError, match="unknown kind of URL"):
        raster.find_inputs("ftp://h.org/a.tif")


def test_two_inputs_of_one_output_name(tmp_path):
    for name in ("s/a.tif", "s/a.vrt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(raster.RasterError, match=r"s/a\.tif and .*s/a\.vrt would both become s/a_agbd\.tif"):
        raster.find_inputs(tmp_path)


# ---- open_image


def test_bands_are_read_by_name_as_stored(tmp_path):
    data = numbers((8, 61, 43), low=-300, high=12000)
    names = ["B01", "SWIR_2", "RED", "GREEN", "BLUE", "SWIR_1", "NIR_NARROW", "Fmask"]
    path = write(tmp_path / "a.tif", data, names=names, nodata=-9999, tags={"scale_factor": "0.0001"})
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.0001,) * 8
    with raster.open_image(path) as image:
        assert (image.grid.height, image.grid.width) == (61, 43)
        assert (image.grid.crs, image.grid.transform) == (UTM, PLACE)
        assert (image.dtype, image.fill, image.warnings) == (np.int16, -9999, [])
        assert image.check_units() is None
        rows = image.read_rows(17, 40)
    assert rows.dtype == np.int16 and rows.shape == (23, 43, 6)
    np.testing.assert_array_equal(rows, np.moveaxis(data[[4, 3, 2, 6, 5, 1], 17:40], 0, -1))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_other_types_become_float32(tmp_path, dtype):
    data = numbers((6, 11, 13), dtype=dtype)
    path = write(tmp_path / "a.tif", data, names=bands.BAND_NAMES)
    with raster.open_image(path) as image:
        rows = image.read_rows(0, 11)
    assert rows.dtype == np.float32 and image.fill is None
    np.testing.assert_array_equal(rows, np.moveaxis(data, 0, -1))


def test_an_explicit_list_and_an_explicit_fill(tmp_path):
    data = numbers((10, 9, 12))
    path = write(tmp_path / "a.tif", data, nodata=-9999)
    with raster.open_image(path, band_list=TEN, fill=-1, wanted=("SWIR_2", "BLUE")) as image:
        np.testing.assert_array_equal(image.read_rows(2, 5), np.moveaxis(data[[6, 1], 2:5], 0, -1))
        assert image.fill == -1 and image.bands == ("SWIR_2", "BLUE")


def test_wrong_bands_are_raster_errors_that_name_the_file(tmp_path):
    path = write(tmp_path / "a.tif", numbers((9, 9, 12)))
    for options, message in (
        ({}, r"a\.tif: no band description"),
        ({"band_list": TEN}, r"a\.tif: the band list has 10 entries"),
        ({"band_list": "BLUE,GREEEN"}, r"a\.tif: unknown band name 'GREEEN'"),
    ):
        with pytest.raises(raster.RasterError, match=message):
            raster.open_image(path, **options)


@pytest.mark.parametrize(("granule", "field"), [(GRANULE, "l30"), (S30_GRANULE, "s30")])
def test_a_granule_is_read_from_its_single_band_files(tmp_path, granule, field):
    layers = [getattr(band, field) for band in bands.BANDS]
    made = write_granule(tmp_path, granule, [*layers[::-1], "B01", "B09"], tags={"SENSOR": granule[4:7]})
    (tmp_path / f"{granule}.B09.tif").write_bytes(b"broken, and not needed")
    with raster.open_image(tmp_path) as image:
        expected = np.concatenate([made[layer] for layer in layers])
        np.testing.assert_array_equal(image.read_rows(5, 30), np.moveaxis(expected[:, 5:30], 0, -1))
        assert image.sensor == granule[4:7] and image.fill == -9999 and image.dtype == np.int16
        assert image.season == {"l30": "2020-07-01/2020-07-01", "s30": "2020-07-03/2020-07-03"}[field]
        assert image.sources == tuple(f"{granule}.{layer}.tif" for layer in layers)
    trained = [w for w in image.warnings if "trained on L30 alone" in w]
    assert bool(trained) == (field == "s30")
    with raster.open_image(tmp_path, model_sensors=("L30", "S30")) as image:
        assert image.warnings == []


def test_an_s30_granule_with_the_numbers_of_l30(tmp_path):
    write_granule(tmp_path, S30_GRANULE)
    with pytest.raises(raster.RasterError, match=rf"{S30_GRANULE}: an S30 file with the band numbers of L30.*B8A"):
        raster.open_image(tmp_path)


def test_a_long_name_unmasks_an_s30_file(tmp_path):
    long_names = [{"long_name": n} for n in ("Blue", "Green", "Red", "Red_Edge1", "Red_Edge2", "Red_Edge3")]
    numbers_ = ["B02", "B03", "B04", "B05", "B06", "B07"]
    path = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=numbers_, band_tags=long_names)
    with pytest.raises(raster.RasterError, match="S30 file with the band numbers of L30"):
        raster.open_image(path)
    write_granule(tmp_path / "g", tags={"long_name": "Red_Edge1"})
    with pytest.raises(raster.RasterError, match=r"Red_Edge1.*is found on S30 alone"):
        raster.open_image(tmp_path / "g")


def test_a_sensor_tag_decides_and_must_agree_with_the_name(tmp_path):
    names = ["B02", "B03", "B04", "B05", "B06", "B07"]
    path = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=names, tags={"SENSOR": "OLI_TIRS; OLI_TIRS"})
    with raster.open_image(path) as image:
        assert image.sensor == "L30" and image.warnings == []
    path = write(tmp_path / "b.tif", numbers((6, 5, 7)), names=names, tags={"SPACECRAFT_NAME": "Sentinel-2B"})
    with pytest.raises(raster.RasterError, match="S30 file with the band numbers of L30"):
        raster.open_image(path)
    path = write(tmp_path / f"{GRANULE}.tif", numbers((6, 5, 7)), names=names, tags={"SENSORS": "S30"})
    with pytest.raises(raster.RasterError, match="its name says L30, its sensor tag S30"):
        raster.open_image(path)


def test_unverified_is_said_once_for_each_kind(tmp_path):
    numbered = write(tmp_path / "n.tif", numbers((6, 5, 7)), names=["B02", "B03", "B04", "B05", "B06", "B07"])
    positional = write(tmp_path / "p.tif", numbers((10, 5, 7)))
    heard = []
    for path, listed in ((numbered, None), (numbered, None), (positional, TEN), (positional, TEN)):
        with raster.open_image(path, band_list=listed) as image:
            heard.append([("by numbers" in w, "by positions" in w) for w in image.warnings])
    assert heard == [[(True, False)], [], [(False, True)], []]


def test_season_tag(tmp_path):
    path = write(tmp_path / f"{GRANULE}.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES, tags={"SEASON": "a/b"})
    with raster.open_image(path) as image:
        assert image.season == "a/b" and image.tags["SEASON"] == "a/b"


def test_files_of_a_granule_on_different_grids(tmp_path):
    write_granule(tmp_path)
    for other in ({"shape": (37, 54)}, {"transform": moved(1, 0)}, {"crs": CRS.from_epsg(32611)}):
        shape = other.pop("shape", (37, 53))
        write(tmp_path / f"{GRANULE}.B06.tif", numbers((1, *shape)), **other)
        with pytest.raises(raster.RasterError, match=r"different grids: .*B02\.tif is 37 x 53.*B06\.tif is"):
            raster.open_image(tmp_path)


def test_grids_are_compared_by_what_their_crs_means():
    spelled = CRS.from_wkt(
        'PROJCS["mine",GEOGCS["unknown",DATUM["based on WGS 84",SPHEROID["WGS 84",6378137,298.257223563]],'
        'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
        'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",-123],PARAMETER["scale_factor",0.9996],'
        'PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1]]'
    )
    grid = raster.Grid(37, 53, UTM, PLACE)
    assert grid.same_as(raster.Grid(37, 53, spelled, PLACE))
    north = Affine(30, 0, 400020, 0, -30, -4200000)  # a southern tile labelled with the north zone
    south = Affine(30, 0, 400020, 0, -30, 5800000)
    assert raster.Grid(5, 7, UTM, north).same_as(raster.Grid(5, 7, CRS.from_epsg(32710), south))
    assert not raster.Grid(5, 7, UTM, south).same_as(raster.Grid(5, 7, CRS.from_epsg(32710), south))
    assert not raster.Grid(5, 7, CRS.from_epsg(32611), north).same_as(raster.Grid(5, 7, CRS.from_epsg(32710), south))
    assert not grid.same_as(raster.Grid(37, 53, None, PLACE))
    assert not grid.same_as(raster.Grid(37, 53, CRS.from_epsg(3857), PLACE))
    assert not grid.same_as(raster.Grid(37, 53, UTM, Affine(30.3, 0, 400020, 0, -30.3, 4200000)))


def test_fills_that_differ_become_one(tmp_path):
    write_granule(tmp_path)
    data = numbers((1, 37, 53), 7)
    data[0, 3, 4] = data[0, 8, 50] = -32768
    write(tmp_path / f"{GRANULE}.B06.tif", data, nodata=-32768)
    with raster.open_image(tmp_path) as image:
        rows = image.read_rows(0, 37)
        missing = bands.no_data(rows, image.fill)
    assert image.fill == -9999
    assert sorted(zip(*np.nonzero(missing), strict=True)) == [(3, 4), (8, 50)]
    assert rows[3, 4, 4] == -9999 and rows[3, 4, 3] != -9999


def test_no_crs_is_a_warning(tmp_path):
    path = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES, crs=None)
    with raster.open_image(path) as image:
        assert image.grid.crs is None and image.grid.transform == PLACE
    assert [w for w in image.warnings if "a.tif: no CRS" in w]


def test_no_georeference_at_all(tmp_path):
    path = tmp_path / "a.png"
    profile = {"driver": "PNG", "count": 1, "height": 5, "width": 7, "dtype": "uint8"}
    with raster_read.open_quietly(path, "w", **profile) as dataset:
        dataset.write(numbers((1, 5, 7), high=255, dtype="uint8"))
    with raster.open_image(path, band_list="RED", wanted=("RED",)) as image:
        assert image.grid.transform == Affine.identity() and image.dtype == np.float32
        assert any("no CRS" in warning for warning in image.warnings)


def test_identity_follows_the_files(tmp_path):
    made = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES)
    rasterio.shutil.copy(made, tmp_path / "b.vrt", driver="VRT")

    def identity(path):
        with raster.open_image(path) as image:
            return image.identity()

    status = made.stat()
    assert identity(made) == {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    before = identity(tmp_path / "b.vrt")
    assert before["size"] == status.st_size + (tmp_path / "b.vrt").stat().st_size
    later = max(before["mtime_ns"], status.st_mtime_ns) + 10**9
    os.utime(made, ns=(later, later))
    assert identity(tmp_path / "b.vrt") == {"size": before["size"], "mtime_ns": later}
    write_granule(tmp_path / "g")
    files = [p for p in (tmp_path / "g").iterdir() if ".B0" in p.name]
    expected = {
        "size": sum(p.stat().st_size for p in files),
        "mtime_ns": max(p.stat().st_mtime_ns for p in files),
    }
    assert identity(tmp_path / "g") == expected


# ---- unreadable


TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}


@pytest.mark.parametrize(
    "options",
    [{**TILED, "compress": "deflate"}, TILED, {"compress": "lzw"}, {}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}],
)
@pytest.mark.parametrize("kept", [0.4, 0.995])
@pytest.mark.parametrize("through_vrt", [False, True])
def test_a_truncated_tiff_is_refused(tmp_path, options, kept, through_vrt):
    path = write(tmp_path / "a.tif", numbers((6, 211, 157)), names=bands.BAND_NAMES, **options)
    opened = path
    if through_vrt:
        opened = tmp_path / "a.vrt"
        rasterio.shutil.copy(path, opened, driver="VRT")
    raster.verify_blocks(path)
    with raster.open_image(opened) as image:
        image.read_rows(0, 211)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(raster.RasterError, match=r"a\.tif.*truncated TIFF.*blocks are not in the file"):
        raster.open_image(opened)


@pytest.mark.parametrize("options", [{**TILED, "compress": "deflate"}, TILED, {}])
def test_a_truncated_block_is_never_read_as_zeros(tmp_path, monkeypatch, options):
    """GDAL alone has to notice where the blocks can't be checked beforehand (URLs)."""
    monkeypatch.setattr(raster_read, "is_tiff", lambda path: False)
    path = write(tmp_path / "a.tif", numbers((6, 211, 157)), names=bands.BAND_NAMES, **options)
    os.truncate(path, int(path.stat().st_size * 0.99))
    with raster.open_image(path) as image, pytest.raises(raster.RasterError, match=r"a\.tif: reading rows 190 to 211"):
        image.read_rows(190, 211)


def test_absent_blocks_of_a_sparse_file_are_no_data(tmp_path):
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 6, "height": 211, "width": 157, "dtype": "int16", "crs": UTM}
    with rasterio.open(path, "w", **profile, transform=PLACE, nodata=-9999, SPARSE_OK=True, **TILED) as dataset:
        for index, name in enumerate(bands.BAND_NAMES, 1):
            dataset.set_band_description(index, name)
        dataset.write(numbers((6, 64, 64)), window=((64, 128), (0, 64)))
    with raster.open_image(path) as image:
        missing = bands.no_data(image.read_rows(0, 211), image.fill)
    assert not missing[64:128, :64].any() and missing.sum() == 211 * 157 - 64 * 64
    with pytest.raises(raster.RasterError, match="block 0 is missing"):
        raster.verify_blocks(path)


@pytest.mark.parametrize(
    "content", [b"", b"no raster", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0"]
)
def test_what_is_no_raster(tmp_path, content):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(raster.RasterError, match=r"a\.tif"):
        raster.open_image(path)
    with pytest.raises(raster.RasterError, match=r"a\.tif: (not a|truncated) TIFF"):
        raster.verify_blocks(path)


def test_a_vrt_whose_file_is_gone(tmp_path):
    made = write(tmp_path / "a.tif", numbers((6, 5, 7)), names=bands.BAND_NAMES)
    rasterio.shutil.copy(made, tmp_path / "b.vrt", driver="VRT")
    made.unlink()
    with pytest.raises(raster.RasterError, match=r"b\.vrt.*a\.tif"), raster.open_image(tmp_path / "b.vrt") as image:
        image.read_rows(0, 5)


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that understands `Range: bytes=a-b`, as object stores do."""

    def do_GET(self):
        body = self._body()
        first, last = 0, len(body) - 1
        asked = self.headers.get("Range")
        if asked:
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            last = min(last, len(body) - 1)
        self._head(206 if asked else 200, body, first, last)
        self.wfile.write(body[first : last + 1])

    def do_HEAD(self):
        body = self._body()
        self._head(200, body, 0, len(body) - 1)

    def _body(self):
        path = Path(self.directory, self.path.split("?")[0].lstrip("/"))
        return path.read_bytes() if path.is_file() else b""

    def _head(self, status, body, first, last):
        self.send_response(status if body else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(max(0, last - first + 1)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = lambda *args: _Ranges(*args, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()
        thread.join()


def test_a_url_is_read_through_gdal(tmp_path, server):
    data = numbers((6, 130, 90))
    path = write(tmp_path / "far.tif", data, names=bands.BAND_NAMES, compress="deflate", **TILED)
    (item,) = raster.find_inputs(f"{server}/far.tif?token=SECRET")
    with raster.open_image(item) as image:
        np.testing.assert_array_equal(image.read_rows(33, 99), np.moveaxis(data[:, 33:99], 0, -1))
        assert image.name == f"{server}/far.tif" and image.sources == ("far.tif",)
        assert image.identity() == {"size": path.stat().st_size, "mtime_ns": 0}
    with pytest.raises(raster.RasterError, match="absent.tif"):
        raster.open_image(f"{server}/absent.tif")


# ---- units


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
        (0.03, "float32", "warning"),
        (0.03, "int16", "warning"),
        (5e-4, "int16", "warning"),  # ones and zeros: no fractions
    ],
)
def test_units(tmp_path, scale, dtype, verdict):
    data = spectrum((61, 43), scale, dtype)
    data[:, :9] = -9999
    path = write(tmp_path / "a.tif", data, names=bands.BAND_NAMES, nodata=-9999)
    with raster.open_image(path) as image:
        if verdict == "error":
            with pytest.raises(
                raster.RasterError, match=r"a\.tif: the 99th percentile.*reflectance, not digital numbers"
            ):
                image.check_units()
            return
        warning = image.check_units()
    assert (warning is not None) == (verdict == "warning")
    assert image.warnings == ([] if verdict is None else [warning])


def test_too_few_valid_pixels_give_no_verdict(tmp_path):
    for valid, refused in ((999, False), (1000, True)):
        data = spectrum((61, 43), 1e-4, "float32").reshape(6, -1)
        data[:, valid:] = np.nan
        path = write(tmp_path / f"{valid}.tif", data.reshape(6, 61, 43), names=bands.BAND_NAMES)
        with raster.open_image(path) as image:
            if refused:
                with pytest.raises(raster.RasterError, match="over 1,000 valid pixels"):
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
    with raster.open_image(path) as image, pytest.raises(raster.RasterError, match="reflectance"):
        image.check_units()


# ---- previews


def test_preview_of_an_image(tmp_path):
    data = np.repeat(np.repeat(numbers((6, 20, 30)), 4, 1), 4, 2)
    data[:, :8, :8] = 0
    path = write(tmp_path / "a.tif", data, names=bands.BAND_NAMES)
    preview = raster.read_preview(path, 30, wanted=("RED", "BLUE"))
    assert preview.shape == (20, 30, 2) and preview.dtype == np.float32
    assert np.isnan(preview[:2, :2]).all() and np.isnan(preview).sum() == 8
    np.testing.assert_array_equal(preview[2:], np.moveaxis(data[[2, 0], 8::4, ::4], 0, -1))


def test_preview_of_a_map(tmp_path):
    values = np.arange(7 * 9, dtype=np.float32).reshape(1, 7, 9)
    values[0, 2, 3] = -1
    path = write(tmp_path / "a.tif", values, nodata=-1)
    preview = raster.read_preview(path, 100)
    assert preview.shape == (7, 9) and np.argwhere(np.isnan(preview)).tolist() == [[2, 3]]
    assert preview[6, 8] == 62


# ---- masks


def test_a_mask_is_warped_to_the_grid(tmp_path):
    classes = np.random.default_rng(1).choice([10, 20, 95], (1, 130, 170)).astype("uint8")
    degrees = CRS.from_epsg(4326)
    fine = Affine(0.00021, 0, -124.1385, 0, -0.00017, 37.9475)  # covers part of the map's 91 x 77 pixels
    path = write(tmp_path / "m.tif", classes, crs=degrees, transform=fine)
    grid = raster.Grid(91, 77, UTM, PLACE)
    expected = np.zeros((91, 77), "uint8")
    reproject(classes[0], expected, src_transform=fine, src_crs=degrees, dst_transform=PLACE, dst_crs=UTM,
              resampling=Resampling.nearest)  # fmt: skip
    with raster.MaskSource(path, grid, (10, 95)) as mask:
        kept = np.concatenate([mask.read_rows(start, min(91, start + 20)) for start in range(0, 91, 20)])
    assert kept.dtype == bool and 0.2 < kept.mean() < 0.6 and (expected == 0).mean() > 0.05
    assert (kept == np.isin(expected, (10, 95))).mean() > 0.999


def test_outside_a_mask_nothing_is_kept(tmp_path):
    path = write(tmp_path / "m.tif", np.zeros((1, 20, 30), "uint8"), transform=moved(5, 3))
    with raster.MaskSource(path, raster.Grid(40, 50, UTM, PLACE), (0,)) as mask:
        kept = mask.read_rows(0, 40)
    expected = np.zeros((40, 50), bool)
    expected[3:23, 5:35] = True
    np.testing.assert_array_equal(kept, expected)


def test_no_data_of_a_mask_is_not_kept(tmp_path):
    classes = np.full((1, 20, 30), 10, "uint8")
    classes[0, 4] = 0
    path = write(tmp_path / "m.tif", classes, nodata=0)
    grid = raster.Grid(20, 30, UTM, PLACE)
    with raster.MaskSource(path, grid, (10,)) as mask:
        assert np.nonzero(~mask.read_rows(0, 20).all(axis=1))[0].tolist() == [4]
    with pytest.raises(raster.RasterError, match=r"m\.tif: class 0 is to be kept, but marks no-data"):
        raster.MaskSource(path, grid, (0, 10))


def test_a_mask_without_crs_must_lie_on_the_same_grid(tmp_path):
    classes = numbers((1, 20, 30), high=4, dtype="uint8")
    path = write(tmp_path / "m.tif", classes, crs=None)
    with raster.MaskSource(path, raster.Grid(20, 30, UTM, PLACE), (2,)) as mask:
        np.testing.assert_array_equal(mask.read_rows(3, 9), classes[0, 3:9] == 2)
    with pytest.raises(raster.RasterError, match=r"m\.tif: the mask has no CRS and the grids differ"):
        raster.MaskSource(path, raster.Grid(20, 31, UTM, PLACE), (2,))
    path = write(tmp_path / "n.tif", classes)
    with pytest.raises(raster.RasterError, match="the map has no CRS and the grids differ"):
        raster.MaskSource(path, raster.Grid(20, 30, None, moved(1, 0)), (2,))


def test_masks_that_cannot_be(tmp_path):
    grid = raster.Grid(20, 30, UTM, PLACE)
    path = write(tmp_path / "m.tif", numbers((2, 20, 30), dtype="uint8"))
    with pytest.raises(raster.RasterError, match="2 bands; a mask has one"):
        raster.MaskSource(path, grid, (1,))
    with pytest.raises(raster.RasterError, match="no class to keep"):
        raster.MaskSource(path, grid, ())
    with pytest.raises(raster.RasterError, match="absent.tif"):
        raster.MaskSource(tmp_path / "absent.tif", grid, (1,))


# ---- real files


def test_the_real_chip(samples):
    with raster.open_image(samples / "chip_input.tif", band_list=TEN) as image:
        assert image.check_units() is None
        rows = image.read_rows(0, 224)
        assert bands.no_data(rows, image.fill).sum() == 79
    with rasterio.open(samples / "chip_input.tif") as dataset:
        np.testing.assert_array_equal(rows, np.moveaxis(dataset.read((2, 3, 4, 5, 6, 7)), 0, -1))


def test_the_real_quality_layer_is_passed_over(samples):
    assert [str(item.relative) for item in raster.find_inputs(samples)] == ["chip_input", "chip_label"]
