import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from biomass_jax.errors import BiomassError, PrepError, RasterError
from data_prep.hls import granules as hls
from data_prep.synthetic.granule import Overpass, write_granule

L30 = "HLS.L30.T10SFF.2020183T184512.v2.0"
S30 = "HLS.S30.T10SFF.2020183T184512.v2.0"
SHAPE = (37, 53)


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(3)
    image = rng.integers(-200, 12000, (*SHAPE, 6)).astype(np.int16)
    image[5:9, 7:30] = -9999
    image[20, 20, 4] = -9999
    return image


@pytest.fixture(scope="module")
def codes():
    return np.resize(np.arange(256), SHAPE).astype(np.uint8)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, image, codes):
    folder = tmp_path_factory.mktemp("granules")
    for sensor in ("L30", "S30"):
        write_granule(folder, image, codes, Overpass(sensor=sensor), {"B01": image[..., 0], "B09": image[..., 1]})
    return folder


@pytest.fixture
def copies(tmp_path, originals):
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(path, values=None, *, tags=None, **profile):
    """Write a file again with other values, tags or profile fields."""
    with rasterio.open(path) as dataset:
        old, old_tags, fields = dataset.read(), dataset.tags(), dataset.profile
    values = old if values is None else values
    for field in ("blockxsize", "blockysize", "tiled", "interleave"):
        fields.pop(field, None)
    fields |= {"driver": "GTiff", "height": values.shape[1], "width": values.shape[2], "count": values.shape[0]}
    fields |= {"dtype": values.dtype.name} | profile
    with rasterio.open(path, "w", **fields) as dataset:
        dataset.write(values)
        dataset.update_tags(**(old_tags | (tags or {})))


def rows_of(scene, start, stop):
    """(rows, columns, 6) digital numbers and (rows, columns) Fmask of some rows."""
    planes, fmask = into = hls.buffers(stop - start, scene.grid.width)
    with scene.reader() as read:
        read(Window(0, start, scene.grid.width, stop - start), into)
    return np.moveaxis(planes, 0, -1), fmask


def test_names():
    granule = hls.parse_granule_name(L30)
    assert granule == hls.Granule("L30", "10SFF", datetime(2020, 7, 1, 18, 45, 12, tzinfo=UTC), L30)
    assert hls.parse_granule_name(f"{S30}.B8A.tif").name == S30
    assert hls.parse_granule_name("HLS.L30.T60KXX.2020366T000000.v2.0").acquired.date().isoformat() == "2020-12-31"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("HLS.L30.T10SFF.2020183.v1.4.hdf", "not an HLS granule's name"),
        ("HLS.L30.T10SFF.2020183T184512.v1.5", "version 1.5, expected v2.0"),
        ("HLS.L30.T10SFF.2021366T184512.v2.0", "is no date"),
        ("HLS.L30.T10SFF.2020000T184512.v2.0", "is no date"),
        ("HLS.L30.T10SFF.2020183T246012.v2.0", "is no date"),
        ("HLS.L30.T61SFF.2020183T184512.v2.0", "no UTM zone"),
        ("HLS.L30.T10SFF.2020183T184512.v2.0copy", "not an HLS granule's name"),
        ("HLS.M30.T10SFF.2020183T184512.v2.0", "not an HLS granule's name"),
    ],
)
def test_names_that_are_not_good(name, says):
    with pytest.raises(PrepError, match=says):
        hls.parse_granule_name(name)


@pytest.mark.parametrize("name", [L30, S30])
def test_rows_come_as_stored(originals, image, codes, name):
    scene = hls.open_scene(originals / name)
    got, fmask = rows_of(scene, 4, 31)
    assert got.dtype == np.int16
    assert fmask.dtype == np.uint8
    assert (got == image[4:31]).all()
    assert (fmask == codes[4:31]).all()
    with scene.reader() as read:
        planes, fmask = into = hls.buffers(7, 29)
        read(Window(11, 30, 29, 7), into)
        assert (np.moveaxis(planes, 0, -1) == image[30:37, 11:40]).all()
        assert (fmask == codes[30:37, 11:40]).all()
        read(Window(0, 0, SHAPE[1], 2), into := hls.buffers(2, SHAPE[1]))
        assert (np.moveaxis(into[0], 0, -1) == image[:2]).all()
    assert (scene.grid.height, scene.grid.width) == SHAPE
    assert scene.processing_time == datetime(2020, 7, 3, 18, 45, 12, tzinfo=UTC)
    layers = [Path(path).name.split(".")[-2] for path in scene.paths]
    assert layers == (
        ["B02", "B03", "B04", "B05", "B06", "B07", "Fmask"]
        if "L30" in name
        else ["B02", "B03", "B04", "B8A", "B11", "B12", "Fmask"]
    )


def is_clear(values, code, water, aerosol):
    """The rule, pixel by pixel, as the issue words it."""
    if code == 255:
        return False
    bits = [(code >> bit) % 2 for bit in range(8)]
    if any(bits[1:5]) or (water and bits[5]) or (aerosol and bits[6] and bits[7]):
        return False
    return all(value != -9999 for value in values)


@pytest.mark.parametrize("water", [False, True])
@pytest.mark.parametrize("aerosol", [False, True])
def test_clear_pixels_of_all_codes_against_a_loop(image, codes, water, aerosol):
    expected = [
        [is_clear(image[r, c].tolist(), int(codes[r, c]), water, aerosol) for c in range(SHAPE[1])]
        for r in range(SHAPE[0])
    ]
    got = hls.clear(image, codes, drop_water=water, drop_high_aerosol=aerosol)
    assert got.tolist() == expected
    assert got.any()


def test_bits_by_hand():
    good = np.full((1, 6), 100, np.int16)

    def one(code, **settings):
        return bool(hls.clear(good, np.array([code], np.uint8), **settings)[0])

    assert [code for code in range(32) if one(code)] == [0, 1]
    assert one(0b11100001)  # water, high aerosol, bit 0
    assert not one(0b00100000, drop_water=True)
    assert not one(0b11000000, drop_high_aerosol=True)
    assert one(0b10000000, drop_high_aerosol=True) and one(0b01000000, drop_high_aerosol=True)
    assert not one(255)
    assert hls.observed(np.array([0, 254, 255], np.uint8)).tolist() == [True, True, False]
    for band in range(6):
        bad = good.copy()
        bad[0, band] = -9999
        assert not hls.clear(bad, np.zeros(1, np.uint8))[0]


def test_the_real_fmask(samples):
    with rasterio.open(samples / "HLS.L30.T06WVS.2024120T211159.v2.0.Fmask.tif") as dataset:
        fmask = dataset.read(1)
        key = hls.tile_grid_key(dataset.crs, dataset.transform)
    good = np.full((1, 1, 6), 100, np.int16)
    assert hls.observed(fmask).sum() == 13_377_440
    assert hls.clear(good, fmask).sum() == 11_236_106
    assert hls.clear(good, fmask, drop_water=True).sum() == 11_114_931
    assert key == (6, 399960, 7200000, 30, -30)


USER_DEFINED = Overpass(tile="60KXX", epsg=32760, left=600000, top=7800040, user_defined=True)


def test_one_key_for_all_forms_of_a_southern_tile():
    north = Affine(30, 0, 600000, 0, -30, 7800040 - 1e7)
    south = Affine(30, 0, 600000, 0, -30, 7800040)
    keys = {
        hls.tile_grid_key(CRS.from_epsg(32660), north),
        hls.tile_grid_key(CRS.from_epsg(32760), south),
        hls.tile_grid_key(USER_DEFINED.crs, south),
    }
    assert keys == {(60, 600000.0, 7800040 - 1e7, 30.0, -30.0)}
    assert hls.tile_grid_key(CRS.from_epsg(32660), south) not in keys
    assert hls.tile_grid_key(CRS.from_epsg(32759), south) not in keys
    with pytest.raises(PrepError, match="expected UTM"):
        hls.tile_grid_key(CRS.from_epsg(4326), south)
    with pytest.raises(PrepError, match="expected UTM"):
        hls.tile_grid_key(None, south)
    with pytest.raises(PrepError, match="rotated"):
        hls.tile_grid_key(CRS.from_epsg(32760), Affine(30, 1, 0, 0, -30, 0))


def test_southern_granules_in_either_form(tmp_path, image, codes):
    for top, epsg, user_defined in ((-2199960, 32660, False), (7800040, 32760, False), (7800040, 32760, True)):
        place = Overpass(tile="60KXX", epsg=epsg, left=600000, top=top, user_defined=user_defined)
        scene = hls.open_scene(write_granule(tmp_path, image, codes, place))
        assert hls.tile_grid_key(scene.grid.crs, scene.grid.transform) == (60, 600000, -2199960, 30, -30)


@pytest.mark.parametrize(("epsg", "top"), [(32660, 7800040), (32760, 7800040 + 1e7), (32760, -2199960 + 2e7)])
def test_a_southern_tile_placed_in_the_north(tmp_path, image, codes, epsg, top):
    folder = write_granule(tmp_path, image, codes, Overpass(tile="60KXX", epsg=epsg, left=600000, top=top))
    with pytest.raises(PrepError, match="lies north of the equator, tile 60KXX south"):
        hls.open_scene(folder)


def test_a_tile_in_another_zone(tmp_path, image, codes):
    with pytest.raises(PrepError, match="UTM zone 11, tile 10SFF is not"):
        hls.open_scene(write_granule(tmp_path, image, codes, Overpass(epsg=32611)))


def test_scale_is_never_applied_and_joined_tags_are_read(tmp_path, image, codes):
    for scale in ("file", "band", "both"):
        scene = hls.open_scene(write_granule(tmp_path, image, codes, Overpass(scale=scale, joined=True)))
        assert (rows_of(scene, 0, 37)[0] == image).all()
        assert ";" in scene.tags["SENSOR"]


def test_find_scenes(copies):
    (copies / "notes").mkdir()
    (copies / "empty").mkdir()
    shutil.move(copies / S30, copies / "notes" / S30)
    assert [folder.name for folder in hls.find_scenes(copies)] == [L30, S30]
    assert hls.find_scenes(copies / L30) == [copies / L30]
    with pytest.raises(PrepError, match="no such folder"):
        hls.find_scenes(copies / "nowhere")
    with pytest.raises(PrepError, match="no granules below it"):
        hls.find_scenes(copies / "empty")


def rename_band(old, new):
    def break_it(folder):
        (folder / f"{folder.name}.{old}.tif").rename(folder / f"{folder.name}.{new}.tif")

    return break_it


def changed(layer, values=None, **changes):
    def break_it(folder):
        path = folder / f"{folder.name}.{layer}.tif"
        with rasterio.open(path) as dataset:
            old = dataset.read()
        change(path, None if values is None else values(old), **changes)

    return break_it


def s30_numbers_on_l30(folder):
    """The red edges of S30 under the numbers of L30: the files of an S30 granule, renamed."""
    for number in (1, 2, 3):
        change(folder / f"{folder.name}.B0{number + 4}.tif", tags={"long_name": f"Red_Edge{number}"})


def l30_files_named_as_s30_numbers(folder):
    for old, new in (("B05", "B8A"), ("B06", "B11"), ("B07", "B12")):
        rename_band(old, new)(folder)


def cut(layer, keep):
    def break_it(folder):
        path = folder / f"{folder.name}.{layer}.tif"
        os.truncate(path, int(path.stat().st_size * keep))

    return break_it


def foreign_file(folder):
    other = L30.replace("SFF", "SGF")
    shutil.copy(folder / f"{L30}.B02.tif", folder / f"{other}.B02.tif")


def saved_as(layer, content):
    return lambda folder: Path(folder, f"{folder.name}.{layer}.tif").write_bytes(content)


def not_ended(layer):
    return lambda folder: Path(folder, f"{folder.name}.{layer}.tif").rename(folder / f"{folder.name}.{layer}.tif.part")


def scaled(layer, scale, offset):
    def break_it(folder):
        path = folder / f"{folder.name}.{layer}.tif"
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
            dataset.scales, dataset.offsets = (scale,), (offset,)

    return break_it


def no_rasters(folder):
    for path in folder.iterdir():
        path.rename(path.with_suffix(".tif.aux"))


def twice(folder):
    shutil.copy(folder / f"{folder.name}.B05.tif", folder / f"{folder.name}.B05.TIFF")


def empty_file(folder):
    Path(folder, f"{folder.name}.B02.tif").write_bytes(b"")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (rename_band("B06", "B16"), r"B06 \(SWIR_1\) not found"),
        (rename_band("Fmask", "fmask_old"), r"no HLS\.L30.*\.Fmask\.tif; found layers B01, B02"),
        (l30_files_named_as_s30_numbers, "said to be L30, but B12, B8A is found on S30 alone"),
        (s30_numbers_on_l30, "said to be L30, but Red_Edge"),
        (foreign_file, r"T10SGF.*B02\.tif: doesn't belong into this folder"),
        (
            changed("B04", tags={"SENTINEL2_TILEID": "10SGF"}),
            r"B04\.tif: wrong tile: its tag SENTINEL2_TILEID is '10SGF'",
        ),
        (changed("B04", tags={"SENSOR": "MSI"}), r"B04\.tif: its tag SENSOR is 'MSI', its name says L30"),
        (
            changed("B03", values=lambda v: (v / 1e4).astype(np.float32)),
            r"B03\.tif: float32, expected int16: reflectance",
        ),
        (
            changed("B03", values=lambda v: v.astype(np.float32)),
            r"B03\.tif: float32, expected int16; --encoding .* converts it",
        ),
        (changed("B03", values=lambda v: v.astype(np.int32)), r"B03\.tif: int32, expected int16; --encoding"),
        (changed("B03", nodata=0), r"B03\.tif: its no-data value is 0, expected -9999"),
        (changed("Fmask", nodata=0), r"Fmask\.tif: its no-data value is 0, expected 255"),
        (changed("B07", values=lambda v: np.repeat(v, 2, axis=0)), r"B07\.tif: 2 bands, expected 1"),
        (changed("B07", values=lambda v: v[:, :-1]), r"B07\.tif: its grid is 36 x 53"),
        (changed("Fmask", values=lambda v: v[:, :, :-1]), r"Fmask\.tif: its grid is 37 x 52"),
        (changed("B07", transform=Affine(30, 0, 600030, 0, -30, 4100040)), r"B07\.tif: its grid is"),
        (changed("B07", crs=CRS.from_epsg(32710)), r"B07\.tif: its grid is"),
        (cut("B06", 0.5), r"B06\.tif.*truncated TIFF"),
        (cut("Fmask", 0.9), r"Fmask\.tif.*truncated TIFF"),
        (empty_file, r"B02\.tif: not a TIFF, it is an empty file"),
        (
            saved_as("B03", b"<html><title>Earthdata Login</title>"),
            r"B03\.tif: not a TIFF, it is an HTML page .*log in",
        ),
        (saved_as("Fmask", b'{"message": "Unauthorized"}'), r"Fmask\.tif: not a TIFF, it is JSON .*'Unauthorized'"),
        (not_ended("B05"), r"B05\.tif\.part: a download that wasn't finished"),
        (not_ended("Fmask"), r"Fmask\.tif\.part: a download that wasn't finished"),
        (no_rasters, r"no \.tif file in it, found HLS\..*B01\.tif\.aux, .*; expected HLS.*B02\.tif and so on"),
        (twice, r"B05\.tif: the same layer as .*B05\.TIFF;"),
    ],
)
def test_granules_that_cannot_be_used(copies, break_it, says):
    break_it(copies / L30)
    with pytest.raises(BiomassError, match=says):
        hls.open_scene(copies / L30)


def test_an_s30_granule_with_the_numbers_of_l30(copies):
    for old, new in (("B8A", "B05"), ("B11", "B06"), ("B12", "B07")):
        rename_band(old, new)(copies / S30)
    with pytest.raises(PrepError, match="an S30 file with the band numbers of L30"):
        hls.open_scene(copies / S30)


def test_an_l30_granule_renamed_to_s30(copies):
    l30_files_named_as_s30_numbers(copies / L30)
    shutil.rmtree(copies / S30)
    for file in (copies / L30).iterdir():
        file.rename(file.with_name(file.name.replace("L30", "S30")))
    (copies / L30).rename(copies / S30)
    with pytest.raises(PrepError, match=r"tag SENSOR is 'OLI_TIRS', its name says S30"):
        hls.open_scene(copies / S30)


def test_folders_of_other_names(copies):
    (copies / L30).rename(copies / f"{L30}.B02")
    with pytest.raises(PrepError, match=f"expected a folder named {L30}$"):
        hls.open_scene(copies / f"{L30}.B02")
    with pytest.raises(PrepError, match="can't be read: No such file"):
        hls.open_scene(copies / L30)


def test_blocks_that_do_not_decode(copies):
    scene = hls.open_scene(copies / L30)
    path = Path(scene.paths[2])
    with rasterio.open(path) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    with pytest.raises(RasterError, match=r"B04\.tif"):
        rows_of(scene, 0, 10)


def test_a_processing_time_that_is_no_time(copies):
    for path in (copies / L30).glob("*.tif"):
        change(path, tags={"HLS_PROCESSING_TIME": "yesterday"})
    with pytest.raises(PrepError, match="HLS_PROCESSING_TIME is 'yesterday'"):
        _ = hls.open_scene(copies / L30).processing_time


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, -0.1), (2.75e-5, -0.2)])
def test_another_scale_is_refused_and_converted_when_asked(copies, image, codes, scale, offset):
    for number in ("B02", "B03", "B04", "B05", "B06", "B07"):
        scaled(number, scale, offset)(copies / L30)
    with pytest.raises(
        RasterError, match=rf"B02\.tif has scale {scale:g} and offset {offset:g}; .*composite\.encoding"
    ):
        hls.open_scene(copies / L30)
    got, fmask = rows_of(hls.open_scene(copies / L30, "from_file"), 0, 37)
    expected = np.rint((image * np.float64(scale) + offset) * 1e4)
    expected[(image == -9999).any(axis=-1)] = -9999
    assert np.abs(got - expected).max() <= 1  # halves may go either way
    np.testing.assert_array_equal(fmask, codes)
    taken, _ = rows_of(hls.open_scene(copies / L30, "digital_numbers"), 0, 37)
    np.testing.assert_array_equal(taken, image)


@pytest.mark.parametrize("encoding", ["auto", "digital_numbers", "reflectance"])
def test_complex_numbers_are_refused_without_advice_that_cannot_help(copies, encoding):
    changed("B04", values=lambda v: v.astype(np.complex64) + 7j, nodata=None)(copies / L30)
    with pytest.raises(PrepError, match=r"B04\.tif: complex64, expected int16$"):
        hls.open_scene(copies / L30, encoding)


def test_other_types_are_converted_and_cast_fill_is_told(copies, image):
    """uint16 with -9999 as 55,537, as a cast makes it, and reflectance with NaN; infinite values are none."""
    known = np.where(image == -9999, 100, np.abs(image)).astype(np.uint16)
    known[5, 7] = 55537
    bands = ("B02", "B03", "B04", "B05", "B06", "B07")
    for index, number in enumerate(bands):
        change(copies / L30 / f"{L30}.{number}.tif", known[None, ..., index], nodata=None)
    with pytest.raises(PrepError, match="uint16, expected int16; --encoding .* converts it"):
        hls.open_scene(copies / L30)
    scene = hls.open_scene(copies / L30, "digital_numbers")
    planes, fmask = into = hls.buffers(37, 53)
    with scene.reader() as read:
        found = read(Window(0, 0, 53, 37), into)
    assert found == {(L30, "55537, which is -9999 cast to uint16"): 6}
    assert np.argwhere((planes == -9999).all(axis=0)).tolist() == [[5, 7]]
    real = (known / 1e4).astype(np.float32)
    real[5, 7], real[6, 8] = np.nan, np.inf
    for index, number in enumerate(bands):
        change(copies / L30 / f"{L30}.{number}.tif", real[None, ..., index], nodata=None)
    with hls.open_scene(copies / L30, "reflectance").reader() as read:
        assert read(Window(0, 0, 53, 37), into) == {(L30, "infinite"): 6}
    missing = (planes == -9999).any(axis=0)
    assert np.argwhere(missing).tolist() == [[5, 7], [6, 8]]
    np.testing.assert_array_equal(planes[:, ~missing], np.moveaxis(known, -1, 0)[:, ~missing])


@pytest.mark.parametrize("kind", ["internal", "side-car", "alpha"])
@pytest.mark.parametrize("layer", ["B05", "Fmask"])
def test_what_a_mask_hides_is_no_data(copies, image, codes, kind, layer):
    path = copies / L30 / f"{L30}.{layer}.tif"
    hidden = np.zeros(SHAPE, bool)
    hidden[3:6, 30:41] = True
    if kind == "alpha":
        with rasterio.open(path) as dataset:
            values = dataset.read(1)
        change(
            path,
            np.stack([values, np.where(hidden, 0, 255)]).astype(values.dtype),
            photometric="minisblack",
            alpha="yes",
        )
    else:
        change(path)  # a COG takes no mask afterwards
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal"), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(~hidden)
    scene = hls.open_scene(copies / L30)
    got, fmask = rows_of(scene, 0, 37)
    if layer == "Fmask":
        np.testing.assert_array_equal(fmask, np.where(hidden, 255, codes))
    else:
        np.testing.assert_array_equal((got == -9999).any(axis=-1), (image == -9999).any(axis=-1) | hidden)
        np.testing.assert_array_equal(fmask, codes)


def test_endings_in_capitals_and_files_that_are_no_layers(copies, image):
    for path in sorted((copies / L30).iterdir()):
        path.rename(path.with_suffix(".TIF"))
    for name in (f"{L30}.B05.TIF.aux.xml", f"._{L30}.B05.tif", f".{L30}.B05.tif.part", f"{L30}.B05.tif.tmp"):
        (copies / L30 / name).write_bytes(b"")
    (copies / L30 / f"{L30}.B05.TIF.aux.xml").write_text("<PAMDataset/>")
    assert (rows_of(hls.open_scene(copies / L30), 0, 37)[0] == image).all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("HLSL30.020_B02_doy2020183_aid0001.tif", r"found HLSL30\..*AppEEARS.*data_prep download hls .*gdalbuildvrt"),
        (f"{L30}.B02.tif", rf"found {L30}\.B02\.tif: put each granule's files into a folder of its name, here {L30}$"),
    ],
)
def test_files_outside_of_granules_folders_get_advice_that_helps(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PrepError, match=rf"no granules below it; .*{says}"):
        hls.find_scenes(tmp_path)
