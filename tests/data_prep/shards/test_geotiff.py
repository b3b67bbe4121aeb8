"""The published folders into shards, pixel by pixel, and each way in which the folders can be wrong."""

import json
import pickle
import re
from functools import partial

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data import bands
from biomass_jax.data.sources import ShardSource
from biomass_jax.data.statistics import chip_sums, means_stds
from biomass_jax.errors import PrepError, RasterError
from data_prep.shards import geotiff

SIZE = 224
UTM10 = CRS.from_epsg(32610)
# A WGS 84 UTM zone without an EPSG code, as some HLS files have it.
NAMELESS = CRS.from_wkt(
    UTM10.to_wkt().replace(',AUTHORITY["EPSG","32610"]', "").replace("WGS 84 / UTM zone 10N", "HLS")
)


def make_bands(cell, count, size=SIZE):
    """(count, size, size) float32 integers; band b (from 0) of pixel r, c is 1000 b + 7 cell + (3 r + c) % 400."""
    rows, cols = np.mgrid[:size, :size]
    return np.stack([1000 * b + 7 * cell + (3 * rows + cols) % 400 for b in range(count)]).astype(np.float32)


def make_label(cell, size=SIZE):
    label = np.full((size, size), -1, np.float32)
    label[cell % size, 5] = 100.25 + cell
    label[7, (cell + 3) % size] = 0
    return label


def write(path, values, cell, *, crs=UTM10, nodata=-9999, descriptions=None, shift=0.0):
    values = np.atleast_3d(values) if values.ndim == 3 else values[None]
    row, col = divmod(cell, 16)
    transform = Affine(30, 0, 600000 + col * 6720 + shift, 0, -30, 4200000 - row * 6720)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    with rasterio.open(path, "w", dtype=values.dtype, crs=crs, transform=transform, nodata=nodata, **profile) as dst:
        dst.write(values)
        if descriptions:
            dst.descriptions = descriptions


def write_pair(root, split, cell, *, count=10, tile="T10SFF", image=None, label=None, **settings):
    image = make_bands(cell, count) if image is None else image
    label = make_label(cell, image.shape[1]) if label is None else label
    write(root / f"{split}_images" / f"{tile}_{cell}_tile_img.tif", image, cell, **settings)
    write(root / f"{split}_labels" / f"{tile}_{cell}_tile_label.tif", label, cell, **settings)


@pytest.fixture
def published(tmp_path):
    root = tmp_path / "taiga_datasplit"
    for split, cell, count in (("train", 144, 10), ("train", 37, 11), ("val", 255, 10), ("test", 0, 10)):
        write_pair(root, split, cell, count=count)
    return root


def by_id(folder, split):
    return {record["chip_id"]: record for record in ShardSource(folder, split)}


def test_chips_come_over_with_their_bands_labels_and_places(published, tmp_path):
    out = tmp_path / "out"
    info = geotiff.convert(published, out, workers=1)
    assert {split: sorted(by_id(out, split)) for split in ("train", "val", "test")} == {
        "train": ["10SFF_144", "10SFF_37"],
        "val": ["10SFF_255"],
        "test": ["10SFF_0"],
    }
    for split, cell in (("train", 144), ("train", 37), ("val", 255), ("test", 0)):
        record = by_id(out, split)[f"10SFF_{cell}"]
        assert record["image"].dtype == np.int16
        rows, cols = np.mgrid[:SIZE, :SIZE]
        for band in range(6):  # B02 to B07 are the second to the seventh
            expected = 1000 * (band + 1) + 7 * cell + (3 * rows + cols) % 400
            np.testing.assert_array_equal(record["image"][..., band], expected)
        np.testing.assert_array_equal(record["label"], make_label(cell))
        row, col = cell // 16 * 224, cell % 16 * 224
        assert (record["row"], record["col"], record["tile"], record["epsg"]) == (row, col, "10SFF", 32610)
        assert record["transform"].tolist() == [30, 0, 600000 + 30 * col, 0, -30, 4200000 - 30 * row]
        assert (record["biome"], record["season"], record["sensors"]) == ("unknown", "", "L30")
    ten = [None, "BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2", None, None, None]
    assert info["sources"][0]["bands"] == [ten, [*ten, None]]
    assert info["sources"][0]["folder"] == "taiga_datasplit"
    assert geotiff.verify(published, out) == 4


def test_command_with_season_biome_and_verify(published, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(published), "--out", str(out), "--season", "2020-06-01/2020-09-16", "--biome", "taiga"]
    assert geotiff.main([*arguments, "--verify"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{out}: 2 train, 1 val, 1 test chips in 3 shards",
        f"{out}: 4 chips equal their files, pixel by pixel",
    ]
    record = ShardSource(out, "val")[0]
    assert (record["chip_id"], record["season"]) == ("10SFF_255_2020-06-01", "2020-06-01/2020-09-16")
    assert record["biome"] == "taiga"
    assert geotiff.main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
    assert geotiff.main([*arguments, "--verify-only"]) == 0
    assert geotiff.main([str(published), "--out", str(tmp_path / "other"), "--biome", "Taiga!"]) == 1
    assert "error: chip '10SFF_144': field biome: found 'Taiga!'" in capsys.readouterr().err


def change(path, place, value):
    with rasterio.open(path, "r+") as dst:
        values = dst.read()
        values[place] = value
        dst.write(values)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        (
            "train_images/T10SFF_144_tile_img.tif",
            (3, 5, 7),
            1,
            r"chip 10SFF_144: 1 values differ, first at \[\[5, 7, 2\]\]",
        ),
        (
            "test_labels/T10SFF_0_tile_label.tif",
            (0, 200, 9),
            5,
            r"chip 10SFF_0: 1 values differ, first at \[\[200, 9\]\]",
        ),
    ],
)
def test_verify_finds_one_changed_pixel(published, tmp_path, name, place, value, message):
    geotiff.convert(published, tmp_path / "out")
    change(published / "train_images" / "T10SFF_144_tile_img.tif", (0, 5, 7), 9)  # a band that isn't used
    assert geotiff.verify(published, tmp_path / "out") == 4
    change(published / name, place, value)
    with pytest.raises(PrepError, match=f"{name}: {message}"):
        geotiff.verify(published, tmp_path / "out")


def test_verify_finds_another_place_and_other_chips(published, tmp_path):
    geotiff.convert(published, tmp_path / "out")
    write(published / "val_images" / "T10SFF_255_tile_img.tif", make_bands(255, 10), 255, shift=30)
    with (
        pytest.warns(UserWarning, match="tiles 10SFF: their chips' cells and coordinates contradict"),
        pytest.raises(PrepError, match="chip 10SFF_255: found 224 x 224 .*700800.* expected .*700830"),
    ):
        geotiff.verify(published, tmp_path / "out")
    write_pair(published, "val", 255)
    write_pair(published, "val", 3)
    with pytest.raises(PrepError, match="found {'test': 1, 'train': 2, 'val': 1} chips, expected .*'val': 2"):
        geotiff.verify(published, tmp_path / "out")


def test_files_without_a_partner_are_listed(published, tmp_path):
    write(published / "train_images" / "T10SFF_9_tile_img.tif", make_bands(9, 10), 9)
    write(published / "val_labels" / "T10SFF_8_tile_label.tif", make_label(8), 8)
    write(published / "val_labels" / "T10SFF_255_tile_mask.tif", make_label(8), 8)
    alone = [
        "train_images/T10SFF_9_tile_img.tif",
        "val_labels/T10SFF_255_tile_mask.tif",
        "val_labels/T10SFF_8_tile_label.tif",
    ]
    with pytest.warns(UserWarning, match=f"3 files without a partner: {', '.join(alone)}"):
        info = geotiff.convert(published, tmp_path / "out")
    assert info["sources"][0]["unpaired"] == alone
    assert info["chips"]["counts"] == {"train": 2, "val": 1, "test": 1}


def test_no_data_stays_as_it_is_and_does_not_count(published, tmp_path):
    image = make_bands(144, 10)
    image[:, 0, :50] = 0  # in all bands, though the tag says -9999
    image[2, 1, :9] = -9999
    image[4, 2, :30] = 0
    write_pair(published, "train", 144, image=image)
    (published / "train_images" / "T10SFF_37_tile_img.tif").unlink()
    (published / "train_labels" / "T10SFF_37_tile_label.tif").unlink()
    info = geotiff.convert(published, tmp_path / "out")
    record = ShardSource(tmp_path / "out", "train")[0]
    np.testing.assert_array_equal(record["image"], np.moveaxis(image[1:7], 0, -1))
    assert info["stat_pixels"] == SIZE * SIZE - 59
    other = geotiff.convert(published, tmp_path / "zeros", reference_statistics=True)
    assert other["stat_pixels"] == [SIZE * SIZE, SIZE * SIZE - 9, *[SIZE * SIZE] * 4]


def test_what_int16_cannot_hold_becomes_float32(published, tmp_path):
    image = make_bands(255, 10)
    image[5, 0, 0] = 0.5
    image[5, 0, 1] = np.nan
    write_pair(published, "val", 255, image=image)
    with pytest.warns(UserWarning, match="T10SFF_255_tile_img.tif: found 0.5, which int16 can't hold .* as float32"):
        info = geotiff.convert(published, tmp_path / "out")
    assert info["chips"]["dtype"] == "float32"
    record = ShardSource(tmp_path / "out", "val")[0]
    np.testing.assert_array_equal(record["image"], np.moveaxis(image[1:7], 0, -1), strict=True)
    assert geotiff.verify(published, tmp_path / "out") == 4


def test_named_bands_go_before_the_published_order(tmp_path):
    names = ("SWIR_2", "SWIR_1", "NIR_NARROW", "RED", "GREEN", "BLUE")
    write_pair(tmp_path / "in", "train", 3, count=6, descriptions=None)
    write(tmp_path / "in/train_images/T10SFF_3_tile_img.tif", make_bands(3, 6), 3, descriptions=names)
    info = geotiff.convert(tmp_path / "in", tmp_path / "out")
    record = ShardSource(tmp_path / "out", "train")[0]
    np.testing.assert_array_equal(record["image"][0, 0], np.arange(5, -1, -1) * 1000 + 21)
    assert info["sources"][0]["bands"] == [None]
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


def test_a_band_list_of_ones_own(tmp_path, capsys):
    write_pair(tmp_path / "in", "train", 3, count=7)
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert geotiff.main(arguments) == 1
    message = capsys.readouterr().err
    assert "T10SFF_3_tile_img.tif: found 7 bands, not all six named, expected names, or 10 or 11 bands" in message
    listed = "BLUE,None,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2"
    assert geotiff.main([*arguments, "--bands", listed, "--verify"]) == 0
    record = ShardSource(tmp_path / "out", "train")[0]
    np.testing.assert_array_equal(record["image"][0, 0], np.array([0, 2, 3, 4, 5, 6]) * 1000 + 21)
    assert geotiff.main([*arguments, "--overwrite", "--bands", "BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2"]) == 1
    assert "the band list has 6 entries" in capsys.readouterr().err


def test_a_crs_without_code_is_the_utm_zone_it_describes(tmp_path):
    assert NAMELESS.to_epsg(confidence_threshold=100) is None
    write_pair(tmp_path / "in", "train", 3, crs=NAMELESS)
    geotiff.convert(tmp_path / "in", tmp_path / "out")
    assert ShardSource(tmp_path / "out", "train")[0]["epsg"] == 32610
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_names_of_another_form_have_no_place(tmp_path):
    for kind, values in (("img", make_bands(1, 10, 48)), ("label", make_label(1, 48))):
        folder = {"img": "train_images", "label": "train_labels"}[kind]
        write(tmp_path / "in" / folder / f"somewhere_{kind}.tif", values, 0, crs=None)
    geotiff.convert(tmp_path / "in", tmp_path / "out")
    record = ShardSource(tmp_path / "out", "train")[0]
    fields = [record[name] for name in ("chip_id", "tile", "row", "col", "epsg")]
    assert fields == ["somewhere", "", -1, -1, 0]
    assert not record["transform"].any()
    assert record["image"].shape == (48, 48, 6)
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


def test_cells_and_coordinates_that_contradict_each_other_leave_the_place_unknown(published, tmp_path):
    write_pair(published, "train", 38, shift=6720)  # as if cells counted along columns
    write_pair(published, "train", 38, tile="T11SFF")
    with pytest.warns(UserWarning, match="tiles 10SFF: their chips' cells .* row and col are left unknown"):
        geotiff.convert(published, tmp_path / "out")
    places = {name: (record["row"], record["col"]) for name, record in by_id(tmp_path / "out", "train").items()}
    assert places == {"10SFF_144": (-1, -1), "10SFF_37": (-1, -1), "10SFF_38": (-1, -1), "11SFF_38": (448, 1344)}


def test_errors_name_the_file(published, tmp_path):
    def fails(match, error=RasterError):
        with pytest.raises(error, match=match):
            geotiff.convert(published, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    write(published / "val_labels" / "T10SFF_255_tile_label.tif", make_label(255), 255, shift=30)
    fails("T10SFF_255_tile_label.tif: found 1 band.* expected one on the grid of T10SFF_255_tile_img.tif")
    write_pair(published, "val", 255, nodata=0)
    fails("T10SFF_255_tile_img.tif: no-data value: found 0, expected -9999")
    write_pair(published, "val", 255, image=make_bands(255, 10) / np.float32(10000))
    fails("T10SFF_255_tile_img.tif: .*reflectance, not digital numbers", RasterError)
    for odd in (199_865, 65_535, 3.4e38):  # kg, and no-data values that no tag names
        label = make_label(255)
        label[3, 3] = odd
        write_pair(published, "val", 255, label=label)
        fails("T10SFF_255_tile_label.tif: labels up to .*, 1 of them above 2000 Mg/ha; probably kg")
    write_pair(published, "val", 255)
    path = published / "val_images" / "T10SFF_255_tile_img.tif"
    path.write_bytes(path.read_bytes()[:-40_000])
    fails("T10SFF_255_tile_img.tif", RasterError)


def test_a_stem_in_two_splits_or_no_pairs(published, tmp_path):
    write_pair(published, "val", 144)
    with pytest.raises(RasterError, match="val_images/T10SFF_144_tile_img.tif: found in train_images too"):
        geotiff.find_pairs(published)
    with pytest.raises(RasterError, match="found no pair of images and labels, expected folders like train_images"):
        geotiff.find_pairs(tmp_path)


@pytest.mark.parametrize("tag", [0, 65535, 3.4e38])
def test_what_the_labels_own_tag_calls_no_data_is_no_label(tmp_path, tag):
    label = make_label(3)
    label[7, 6] = 12  # the only 0 of it
    stored = np.where(label == -1, np.float32(tag), label)
    write_pair(tmp_path / "in", "train", 3)
    write(tmp_path / "in" / "train_labels" / "T10SFF_3_tile_label.tif", stored, 3, nodata=tag)
    with pytest.warns(
        UserWarning, match=f"labels taken as none: 50,17[0-9] its no-data value {re.escape(f'{tag:g}')}$"
    ):
        geotiff.convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(ShardSource(tmp_path / "out", "train")[0]["label"], label)
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


def test_labels_below_0_and_masked_ones_are_none(tmp_path):
    label, expected = make_label(3), make_label(3)
    label[3, 3] = -7
    write_pair(tmp_path / "in", "train", 3, label=label)
    path = tmp_path / "in" / "train_labels" / "T10SFF_3_tile_label.tif"
    hidden = np.zeros(label.shape, bool)
    hidden[3, 5] = True  # where the label of cell 3 lies
    expected[3, 5] = -1
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(~hidden)
    with pytest.warns(UserWarning, match="out: labels taken as none: 1 below 0, 1 hidden by a mask$"):
        geotiff.convert(tmp_path / "in", tmp_path / "out", workers=1)
    np.testing.assert_array_equal(ShardSource(tmp_path / "out", "train")[0]["label"], expected)
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


def test_high_labels_that_are_right_and_images_of_another_encoding(tmp_path):
    label = make_label(3)
    label[3, 3] = 2345
    plain = make_bands(3, 10)
    plain[:, 0, :7] = -9999
    image = np.where(plain == -9999, -9999, plain / 1e4).astype(np.float32)
    write_pair(tmp_path / "in", "train", 3, label=label, image=image)
    with pytest.warns(UserWarning, match="all images are written as float32"):
        geotiff.convert(tmp_path / "in", tmp_path / "out", encoding="reflectance", label_max=3000)
    (record,) = ShardSource(tmp_path / "out", "train")
    np.testing.assert_array_equal(record["label"], label)
    np.testing.assert_allclose(record["image"], np.moveaxis(plain[1:7], 0, -1), atol=1e-3)
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


def test_the_labels_tag_and_nan_mean_no_label(tmp_path):
    label = make_label(3)
    label[0, 0], label[0, 1] = -9999, np.nan
    write_pair(tmp_path / "in", "train", 3, label=label)
    with pytest.warns(UserWarning, match="out: labels taken as none: 1 NaN, 1 its no-data value -9999$"):
        geotiff.convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(ShardSource(tmp_path / "out", "train")[0]["label"], make_label(3))
    assert geotiff.verify(tmp_path / "in", tmp_path / "out") == 1


def test_pairs_travel_to_other_processes(published):
    pairs, _ = geotiff.find_pairs(published)
    (pair,) = geotiff.describe_pairs(pairs["val"])
    reading = pickle.loads(pickle.dumps(partial(geotiff.read_pair, pair)))
    np.testing.assert_array_equal(reading()[0]["image"], geotiff.read_pair(pair)[0]["image"])


def test_the_real_chip_makes_a_shard_and_comes_back_equal(samples, tmp_path):
    with rasterio.open(samples / "chip_input.tif") as image, rasterio.open(samples / "chip_label.tif") as label:
        expected, agbd = image.read([2, 3, 4, 5, 6, 7]), label.read(1)
    for kind, name, source in (("images", "img", "chip_input.tif"), ("labels", "label", "chip_label.tif")):
        folder = tmp_path / "real" / f"train_{kind}"
        folder.mkdir(parents=True)
        (folder / f"T14RMR_102_tile_{name}.tif").symlink_to(samples / source)
    info = geotiff.convert(tmp_path / "real", tmp_path / "out")
    (record,) = ShardSource(tmp_path / "out", "train")
    assert record["image"].dtype == np.int16
    np.testing.assert_array_equal(record["image"], np.moveaxis(expected, 0, -1))
    np.testing.assert_array_equal(record["label"], agbd, strict=True)
    assert (record["epsg"], record["transform"].tolist()) == (32614, [30, 0, 440280, 0, -30, 3159720])
    assert (record["label"] >= 0).sum() == 246
    assert info["stat_pixels"] == 224 * 224 - 79  # 79 are 0 in every band
    assert (info["means"], info["stds"]) == means_stds(chip_sums(record["image"]))
    assert geotiff.verify(tmp_path / "real", tmp_path / "out") == 1
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["biomass_jax"]


def test_verify_knows_all_that_conversion_takes_as_no_data(tmp_path):
    """An alpha band, Inf, and -9999 that was cast, in images and in labels."""
    root = tmp_path / "in"
    for cell in (3, 4):
        write_pair(root, "train", cell)
    odd = np.concatenate([make_bands(3, 10), np.full((1, SIZE, SIZE), 255, np.float32)])
    odd[2, 9, 9], odd[3, 9, 10], odd[10, 9, 11] = np.inf, -np.inf, 0
    image = root / "train_images" / "T10SFF_3_tile_img.tif"
    write(image, odd, 3, nodata=None, descriptions=(None, *bands.BAND_NAMES, *[None] * 3, "alpha"))
    label = np.stack([make_label(3), np.full((SIZE, SIZE), 255, np.float32)])
    label[1, 3, 5] = 0  # hides the label of cell 3
    write(root / "train_labels" / "T10SFF_3_tile_label.tif", label, 3, nodata=None)
    for path in (image, root / "train_labels" / "T10SFF_3_tile_label.tif"):
        with rasterio.open(path, "r+") as file:
            file.colorinterp = (*file.colorinterp[:-1], rasterio.enums.ColorInterp.alpha)
    cast = make_bands(4, 10).astype(np.uint16)
    cast[1, 7, 7] = 55537
    write(root / "train_images" / "T10SFF_4_tile_img.tif", cast, 4, nodata=None)
    with pytest.warns(UserWarning, match="values taken as no-data: 1 55537, .*, 2 infinite"):
        geotiff.convert(root, tmp_path / "out")
    found = by_id(tmp_path / "out", "train")
    missing = {name: np.argwhere(bands.no_data(record["image"])).tolist() for name, record in found.items()}
    assert missing == {"10SFF_3": [[9, 9], [9, 10], [9, 11]], "10SFF_4": [[7, 7]]}
    assert geotiff.verify(root, tmp_path / "out") == 2
    change(image, (10, 9, 11), 255)  # no longer hidden: the shards hold no data where the file has some
    with pytest.raises(PrepError, match="chip 10SFF_3: 6 values differ"):
        geotiff.verify(root, tmp_path / "out")
