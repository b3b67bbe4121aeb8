"""GeoTIFF folders as a source: the same records that conversion into shards gives, and each fault of the folders."""

import pickle
import shutil

import numpy as np
import pytest
import rasterio
from affine import Affine

from biomass_jax.data import bands, sources
from biomass_jax.data.shards import read_metadata
from biomass_jax.data.sources import ShardSource
from biomass_jax.errors import DataError, RasterError
from biomass_jax.pipeline import batches as pipeline
from data_prep.shards import geotiff

SIZE = 12


@pytest.fixture
def put(write, numbers, tmp_path):
    """Write a chip's files: `put(split, cell, label=..., dtype=..., count=..., size=...)`."""

    def one(split, cell, *, label=True, image=True, dtype="float32", count=10, size=SIZE, **options):
        values = numbers((count, size, size), seed=cell, dtype=dtype)
        values[:, 0, 0] = 0
        options["transform"] = Affine(30, 0, 600000 + 30 * size * cell, 0, -30, 4200000)
        if image:
            write(tmp_path / f"{split}_images" / f"T10SFF_{cell}_tile_img.tif", values, nodata=-9999, **options)
        if label:
            labels = np.full((1, size, size), -1, np.float32)
            labels[0, cell % size, 3] = 100.5 + cell
            write(
                tmp_path / f"{split}_labels" / f"T10SFF_{cell}_tile_label.tif",
                labels,
                nodata=-9999,
                transform=options["transform"],
            )
        return tmp_path

    return one


def test_records_are_those_of_conversion(put, tmp_path):
    for split, cell in (("train", 1), ("train", 7), ("val", 30)):
        root = put(split, cell)
    geotiff.convert(root, tmp_path / "shards")
    source = sources.open_source(root, "train")
    info = source.info
    assert (info.chips, info.image_shape) == (2, (SIZE, SIZE, 6))
    assert (info.image_dtype, info.fill, info.metadata) == (np.float32, -9999.0, {})
    assert info.sensors == ("L30",)
    expected = {record["chip_id"]: record for record in ShardSource(tmp_path / "shards", "train")}
    for chip, index in zip(source.chips(), (0, 1), strict=True):
        record = source[index]
        assert chip == sources.chip_of(record) and chip.place.epsg == 32610
        assert chip[:3] == (record["chip_id"], "10SFF", "unknown")
        for name, value in expected.pop(record["chip_id"]).items():
            np.testing.assert_array_equal(record[name], value, err_msg=name)
        assert record["image"].dtype == np.float32  # what the files hold; shards hold int16
    assert not expected
    means, stds = sources.statistics_of(source)
    written = read_metadata(tmp_path / "shards")
    assert (means.tolist(), stds.tolist()) == (written["means"], written["stds"])
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1]["image"], source[1]["image"])
    batch = next(pipeline.train_batches(source, batch_size=2, seed=0))
    assert sorted(batch.arrays["label"].max((1, 2))) == [101.5, 107.5]


def test_images_alone_have_no_labels(put):
    put("train", 3, label=False, dtype="int16")
    source = sources.open_source(put("train", 4, label=False, dtype="int16"), "train")
    assert len(source) == 2 and source.info.image_dtype == np.int16
    assert source[1]["image"].dtype == np.int16 and source[1]["image"].any()
    assert (source[1]["label"] == -1).all() and source[1]["label"].shape == (SIZE, SIZE)


def test_bands_by_name_or_by_list(put, numbers):
    names = list(reversed(bands.BAND_NAMES))
    root = put("train", 3, count=6, names=names)
    by_name = sources.open_source(root, "train")[0]["image"]
    np.testing.assert_array_equal(np.moveaxis(by_name, -1, 0)[:, 1:], numbers((6, SIZE, SIZE), seed=3)[::-1, 1:])
    root = put("val", 3, count=6)
    with pytest.raises(DataError, match="split val: .*found 6 bands, not all six named, .*config.bands"):
        sources.open_source(root, "val")
    listed = sources.open_source(root, "val", bands=names)[0]["image"]
    np.testing.assert_array_equal(listed, by_name)
    with pytest.raises(DataError, match="unknown band name 'NIR'"):
        sources.open_source(root, "val", bands="NIR")


def test_files_without_a_partner_are_told(put):
    put("train", 1)
    put("train", 2, label=False)
    root = put("train", 3, image=False)
    with pytest.warns(UserWarning, match="2 files without a partner: train_images/T10SFF_2.*train_labels/T10SFF_3"):
        source = sources.open_source(root, "train")
    assert [chip.chip_id for chip in source.chips()] == ["10SFF_1"]


def test_faults_of_folders(put):
    root = put("train", 1)
    with pytest.raises(DataError, match="split 'test' is not there; found train"):
        sources.open_source(root, "test")
    put("train", 2, size=SIZE + 2)
    with pytest.raises(DataError, match="T10SFF_2_tile_img.tif: found 14 x 14 pixels, expected 12 x 12"):
        sources.open_source(root, "train")
    put("val", 5, label=False)
    (root / "val_labels").mkdir()
    with pytest.raises(DataError, match="split val: found no chip, expected T10SFF_144_tile_img.tif in val_images"):
        sources.open_source(root, "val")


def test_a_broken_file_is_named_when_it_is_read(put):
    root = put("train", 1)
    source = sources.open_source(root, "train")
    file = root / "train_images" / "T10SFF_1_tile_img.tif"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(DataError, match="split train, chip number 0: can't be read: .*T10SFF_1_tile_img.tif"):
        source[0]


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_cut_file_is_found_when_the_split_is_opened(put, kind):
    root = put("train", 1)
    file = root / f"train_{kind}s" / f"T10SFF_1_tile_{'img' if kind == 'image' else 'label'}.tif"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(DataError, match=f"split train: {file}"):
        sources.open_source(root, "train")


def test_complex_labels_are_refused_when_the_split_is_opened(put, write):
    root = put("train", 1)
    label = root / "train_labels" / "T10SFF_1_tile_label.tif"
    with rasterio.open(label) as file:
        values, transform = file.read().astype(np.complex64) + 7j, file.transform
    write(label, values, transform=transform)
    with pytest.raises(DataError, match=r"T10SFF_1_tile_label\.tif: its labels are complex64; expected real numbers"):
        sources.open_source(root, "train")


@pytest.mark.parametrize("internal", [True, False])
def test_what_an_image_masks_is_no_data(put, internal):
    root = put("train", 1, dtype="int16")
    image = root / "train_images" / "T10SFF_1_tile_img.tif"
    before = sources.open_source(root, "train")[0]["image"]
    shown = np.full((SIZE, SIZE), 255, np.uint8)
    shown[2:5, 7:] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(image, "r+") as file:
        file.nodata = None  # a no-data value goes before a mask
        file.write_mask(shown)
    assert image.with_name(f"{image.name}.msk").exists() is not internal
    found = sources.open_source(root, "train")[0]["image"]
    assert (found[shown == 0] == bands.FILL).all()
    np.testing.assert_array_equal(found[shown == 255], before[shown == 255])


def test_every_file_is_read_where_it_is_asked_for(put, write):
    root = put("train", 1)
    assert len(sources.open_source(root, "train", verify=True)) == 1
    label = root / "train_labels" / "T10SFF_1_tile_label.tif"
    with rasterio.open(label, "r+") as file:
        file.write(np.full((1, SIZE, SIZE), 3e5, np.float32))
    assert len(sources.open_source(root, "train")) == 1
    with pytest.raises(DataError, match="chip number 0: can't be read: .*labels up to 300000"):
        sources.open_source(root, "train", verify=True)
    with rasterio.open(label, "r+") as file:
        file.write(np.full((1, SIZE, SIZE), np.inf, np.float32))
    with pytest.raises(DataError, match="labels up to inf, 144 of them above inf Mg/ha"):
        sources.open_source(root, "train", label_max=np.inf, verify=True)


def test_the_digest_is_of_the_files_bytes_and_of_what_lies_beside_them(put, tmp_path):
    root = put("train", 1)
    put("train", 3)

    def digest(folder=root):
        return sources.open_source(folder, "train").digest()

    before = digest()
    assert digest(shutil.copytree(root, tmp_path / "again" / "there", copy_function=shutil.copyfile)) == before
    pam = root / "train_images" / "T10SFF_3_tile_img.tif.aux.xml"
    pam.write_text('<PAMDataset><PAMRasterBand band="2"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>')
    one = digest()
    pam.unlink()
    assert digest() == before != one
    with rasterio.open(root / "train_labels" / "T10SFF_1_tile_label.tif", "r+") as file:
        file.write(file.read() + 1)
    assert digest() != before


def test_reflectance_is_refused(put, write, tmp_path):
    root = put("train", 1, size=64)
    image = np.random.default_rng(0).random((10, 64, 64)).astype(np.float32)
    path = root / "train_images" / "T10SFF_1_tile_img.tif"
    with rasterio.open(path) as file:
        place = file.transform
    write(path, image, nodata=-9999, transform=place)
    with pytest.raises(DataError, match="reflectance, not digital numbers"):
        sources.open_source(root, "train")[0]


REFLECTANCE = np.random.default_rng(4).uniform(0.01, 0.6, (9, 10, SIZE, SIZE))
KINDS = {
    "percent": (np.rint(REFLECTANCE * 100).astype(np.int16), "very low for .*, perhaps percent: encoding='percent'"),
    "landsat_c2": (
        np.rint((REFLECTANCE + 0.2) / 2.75e-5).astype(np.int16),
        "probably Landsat Collection 2 .* encoding='landsat_c2'",
    ),
    "uint8": (np.rint(REFLECTANCE * 255).astype(np.uint8), r"\(uint8\) .* a picture of 8 bits"),
    "reflectance": (REFLECTANCE.astype(np.float32), "probably reflectance, .*encoding='reflectance'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_holds_no_digital_numbers_is_refused_though_each_chip_may_be_odd(put, write, tmp_path, kind):
    """Each chip is too small to tell, or may be all water."""
    images, words = KINDS[kind]
    for cell, image in enumerate(images):
        root = put("train", cell)
        path = root / "train_images" / f"T10SFF_{cell}_tile_img.tif"
        with rasterio.open(path) as file:
            place = file.transform
        write(path, image, transform=place)
    with pytest.raises(DataError, match=rf"split train: .*train_images \(9 of 9 chips\): percentiles .*{words}"):
        sources.open_source(root, "train")
    with pytest.raises(RasterError, match=rf"\(9 of 9 chips\): percentiles .*{words}"):
        geotiff.convert(root, tmp_path / "shards")
    overruled = sources.open_source(root, "train", encoding="digital_numbers")
    np.testing.assert_array_equal(overruled[0]["image"], np.moveaxis(images[0, 1:7], 0, -1))
    if kind != "uint8":
        converted = sources.open_source(root, "train", encoding=kind)[0]["image"]
        np.testing.assert_allclose(converted, np.moveaxis(REFLECTANCE[0, 1:7], 0, -1) * 1e4, atol=51)


def test_chips_of_dark_water_are_told_once_and_taken(put, write):
    for cell in range(5):
        root = put("train", cell, size=40, dtype="int16")
    for cell in (1, 3):
        path = root / "train_images" / f"T10SFF_{cell}_tile_img.tif"
        with rasterio.open(path, "r+") as file:
            file.write(file.read() % 60)
    source = sources.open_source(root, "train")
    with pytest.warns(UserWarning, match="split train: chips whose units to check: 2 of very low values for") as told:
        for _ in range(2):
            assert len(list(source)) == 5
    assert len(told) == 1


def test_what_was_taken_as_no_data_or_no_label_is_told_once_for_all_chips(put, write, tmp_path):
    for cell in (1, 2, 3):
        root = put("train", cell)
    image, label = (root / f"train_{kind}s" for kind in ("image", "label"))
    with rasterio.open(image / "T10SFF_1_tile_img.tif", "r+") as file:
        values = file.read()
        values[2, 5, 5:8], values[3, 6, 6] = np.inf, -np.inf
        file.write(values)
    with rasterio.open(image / "T10SFF_2_tile_img.tif") as file:
        values, place = file.read().astype(np.uint16), file.transform
    values[1:7, 7, 7] = 2**16 - 9999
    write(image / "T10SFF_2_tile_img.tif", values, transform=place)
    for cell, odd in ((1, [np.nan, -9999, -7]), (3, [-3])):
        with rasterio.open(label / f"T10SFF_{cell}_tile_label.tif", "r+") as file:
            values = file.read()
            values[0, 8, : len(odd)] = odd
            file.write(values)
    expected = (
        "labels taken as none: 1 NaN, 2 below 0, 1 its no-data value -9999; values taken as no-data: "
        "6 55537, which is -9999 cast to uint16, 4 infinite"
    )
    source = sources.open_source(root, "train")
    with pytest.warns(UserWarning, match=f"{root}: split train: {expected}$") as told:
        records = [source[index] for index in (0, 1, 2, 0)]
    assert len(told) == 1
    assert [int(bands.no_data(record["image"]).sum()) for record in records[:3]] == [5, 2, 1]
    with pytest.warns(UserWarning, match=f"shards: {expected}$") as told:
        geotiff.convert(root, tmp_path / "shards", workers=2, records_per_shard=2)
    assert len(told) == 1
