"""The record contract: names and dtypes of fields, exact bytes, and an error for each thing that can be wrong."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from biomass_jax.data import records
from biomass_jax.errors import RecordError

# The contract in words of its own: name -> dtype as TFDS tells it, and shape.
CONTRACT = {
    "image": ("int16", (224, 224, 6)),
    "label": ("float32", (224, 224)),
    "agbd_sigma": ("float32", (224, 224)),
    "chip_id": ("object", ()),
    "tile": ("object", ()),
    "row": ("int32", ()),
    "col": ("int32", ()),
    "epsg": ("int32", ()),
    "transform": ("float64", (6,)),
    "biome": ("object", ()),
    "season": ("object", ()),
    "sensors": ("object", ()),
    "schema_version": ("int32", ()),
}


def make_record(size=8, dtype=np.int16, **changes):
    rng = np.random.default_rng(3)
    label = np.full((size, size), -1, np.float32)
    label[1, 2], label[size - 1, 0] = 0.0, 213.4375
    record = {
        "image": rng.integers(-200, 12_000, (size, size, 6)).astype(dtype),
        "label": label,
        "agbd_sigma": np.full((size, size), -1, np.float32),
        "chip_id": "10SFF_144_2020-06-01",
        "tile": "10SFF",
        "row": 2016,
        "col": 0,
        "epsg": 32610,
        # the thirds have no float32 that equals them
        "transform": np.array([30.0, 0.0, 600000 + 1 / 3, 0.0, -30.0, 4200000 - 1 / 3]),
        "biome": "boreal-forests",
        "season": "2020-06-01/2020-09-16",
        "sensors": "L30",
        "schema_version": 2,
    }
    return record | changes


def test_features_have_the_names_and_dtypes_of_the_contract():
    found = {name: (np.dtype(f.np_dtype).name, tuple(f.shape)) for name, f in records.features().items()}
    assert found == CONTRACT
    other = records.features((64, 32, 6), np.float32)
    assert (other["image"].shape, other["image"].np_dtype, other["label"].shape) == ((64, 32, 6), np.float32, (64, 32))
    assert set(records.FIELDS) == set(CONTRACT)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_record_comes_back_bit_for_bit(dtype):
    record = make_record(dtype=dtype)
    if dtype == np.float32:
        record["image"][0, 0] += 0.25
        record["image"][0, 1, 0] = np.nan
    example = records.features(record["image"].shape, dtype).deserialize_example_np(records.encode(record))
    back = records.from_example(example)
    records.validate(back)
    assert set(back) == set(record)
    for name, value in record.items():
        if isinstance(value, np.ndarray):
            assert back[name].dtype == value.dtype
            np.testing.assert_array_equal(back[name], value, err_msg=name)
        else:
            assert back[name] == value, name


def test_bytes_do_not_depend_on_the_process():
    code = (
        "import hashlib, importlib.util, sys; spec = importlib.util.spec_from_file_location('these', sys.argv[1])\n"
        "these = importlib.util.module_from_spec(spec); spec.loader.exec_module(these)\n"
        "print(hashlib.sha256(these.records.encode(these.make_record())).hexdigest())"
    )
    command = [sys.executable, "-c", code, __file__]
    here = hashlib.sha256(records.encode(make_record())).hexdigest()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == here


def test_import_is_light_and_tfds_comes_without_tensorflow():
    code = (
        "import sys; from biomass_jax.data import records\n"
        "assert 'tensorflow_datasets' not in sys.modules and 'jax' not in sys.modules\n"
        "records.features(); assert 'tensorflow_datasets' in sys.modules\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'tf', 'jax', 'clu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_chip_id_counts_cells_along_rows():
    assert records.chip_id("10SFF", 2016, 0, 3660, "2020-06-01") == "10SFF_144_2020-06-01"
    assert records.chip_id("10SFF", 15 * 224, 15 * 224, 3660, "2020-06-01") == "10SFF_255_2020-06-01"
    assert records.chip_id("10SFF", 0, 448, 700, "") == "10SFF_2"  # three cells a row
    assert records.chip_id("10SFF", 224, 0, 700, "") == "10SFF_3"
    with pytest.raises(RecordError, match="3584.*3660 px wide"):
        records.chip_id("10SFF", 0, 3584, 3660, "2020-06-01")
    with pytest.raises(RecordError, match="row -1"):
        records.chip_id("10SFF", -1, -1, 3660, "2020-06-01")


def test_valid_records_pass():
    records.validate(make_record())
    records.validate(make_record(row=-1, col=-1, epsg=0, transform=np.zeros(6), tile="", season="", biome="unknown"))
    records.validate(make_record(sensors="L30+S30", row=np.int32(4)), image_shape=(8, 8, 6), image_dtype=np.int16)


def label_with(value):
    label = make_record()["label"]
    label[3, 3] = value
    return label


TRANSFORM = make_record()["transform"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": make_record()["image"].astype(np.int32)}, "field image: found int32 .*expected .*int16 or float32"),
        ({"image": [1, 2]}, "field image: found list"),
        ({"image": make_record()["image"][..., :5]}, r"field image: found shape \(8, 8, 5\), expected \(H, W, 6\)"),
        ({"image": np.full((8, 8, 6), np.inf, np.float32)}, "field image: found infinite"),
        ({"label": make_record()["label"].astype(np.float64)}, "field label: found float64"),
        ({"label": make_record()["label"][:7]}, r"field label: found shape \(7, 8\), expected \(8, 8\)"),
        ({"label": label_with(-9999)}, "field label: found 1 values like -9999, expected .* -1 for none"),
        ({"label": label_with(np.nan)}, "field label: found 1 values like nan"),
        ({"label": label_with(np.inf)}, "field label: found 1 values like inf"),
        ({"label": label_with(-0.5)}, "field label: found 1 values like -0.5"),
        ({"chip_id": b"10SFF_144"}, "field chip_id: found bytes"),
        ({"chip_id": ""}, "field chip_id: found empty"),
        ({"tile": "T10SFF"}, "field tile: found 'T10SFF', expected .*without its T"),
        ({"row": -1}, "field row: found row -1 and col 0"),
        ({"row": -2, "col": -2}, "field row: found row -2"),
        ({"row": 1.0}, "field row: found float 1.0"),
        ({"epsg": 0}, "field transform: found .* with epsg 0, expected zeros"),
        ({"transform": np.zeros(6)}, "field transform: found .*expected .* north-up"),
        ({"transform": TRANSFORM * [1, 1, 1, 1, -1, 1]}, "field transform: found .*a > 0 > e"),
        ({"transform": TRANSFORM.astype(np.float32)}, "field transform: found float32"),
        ({"transform": TRANSFORM[:5]}, r"field transform: found float64 \(5,\)"),
        ({"epsg": -1}, "field epsg: found -1"),
        ({"epsg": 2**31}, "field epsg: found int 2147483648"),
        ({"biome": "Boreal Forests"}, "field biome: found 'Boreal Forests', expected a slug"),
        ({"season": "2020"}, "field season: found '2020'"),
        ({"season": "2020-09-16/2020-06-01"}, "field season: found"),
        ({"season": "2020-06-31/2020-09-16"}, "field season: found"),
        ({"sensors": "HLS"}, "field sensors: found 'HLS', expected one of L30, S30"),
        ({"agbd_sigma": np.zeros((8, 8))}, "field agbd_sigma: found float64"),
        ({"agbd_sigma": np.full((8, 7), -1, np.float32)}, r"field agbd_sigma: found shape \(8, 7\)"),
        ({"agbd_sigma": np.full((8, 8), np.nan, np.float32)}, "field agbd_sigma: found 64 values like nan"),
        ({"agbd_sigma": np.ones((8, 8), np.float32)}, "field agbd_sigma: found 62 errors where there is no label"),
        ({"schema_version": 1}, "field schema_version: found 1, expected 2"),
    ],
)
def test_each_fault_names_chip_field_found_and_expected(changes, message):
    with pytest.raises(RecordError, match=message) as error:
        records.validate(make_record(**changes))
    assert str(error.value).startswith(f"chip {changes.get('chip_id', '10SFF_144_2020-06-01')!r}: ")


def test_fields_are_exactly_those_of_the_contract():
    less = make_record()
    del less["biome"]
    with pytest.raises(RecordError, match="missing biome; unknown fmask; expected image, label, agbd_sigma, chip_id"):
        records.validate(less | {"fmask": 1})


def test_a_data_set_has_one_shape_and_dtype():
    with pytest.raises(RecordError, match=r"found shape \(8, 8, 6\), expected \(224, 224, 6\)"):
        records.validate(make_record(), image_shape=(224, 224, 6))
    with pytest.raises(RecordError, match="found float32, expected int16"):
        records.validate(make_record(dtype=np.float32), image_dtype=np.int16)
