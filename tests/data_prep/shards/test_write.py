"""Shards: what TFDS opens comes back equal, bytes depend on chips and settings alone, nothing half is left."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from biomass_jax.data.shards import read_metadata, verify
from biomass_jax.data.sources import ShardSource
from biomass_jax.errors import DataError, FolderError, PrepError, RecordError
from biomass_jax.runtime.lock import lock_beside, one_writer
from data_prep.shards import write as shard_writer
from data_prep.shards import write as shards
from tests.data.test_records import make_record

ROOT = Path(__file__).resolve().parents[3]


def make_splits(train=7, val=2, test=3, size=8):
    made = {}
    for split, count in (("train", train), ("val", val), ("test", test)):
        made[split] = []
        for index in range(count):
            rng = np.random.default_rng([index, len(split)])
            image = rng.integers(1, 9000, (size, size, 6)).astype(np.int16)
            made[split].append(make_record(size, chip_id=f"10SFF_{index}_{split}") | {"image": image})
    return made


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name, strict=isinstance(value, np.ndarray))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, splits, metadata) of a data set in several shards."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    splits = make_splits()
    given = {"split": {"kind": "block", "seed": 4}, "chips": {"min_labels": 20}, "gedi": {"version": "002"}}
    return folder, splits, shards.write_shards(splits, folder, metadata=given, records_per_shard=3, seed=5)


def test_two_processes_do_not_write_one_data_set(tmp_path):
    with (
        one_writer(*lock_beside(tmp_path / "shards")),
        pytest.raises(FolderError, match="another run is at work there"),
    ):
        shards.write_shards(make_splits(), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []
    shards.write_shards(make_splits(), tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_tfds_opens_it_and_every_chip_is_equal(written):
    import tensorflow_datasets as tfds

    folder, splits, _ = written
    builder = tfds.builder_from_directory(folder)
    assert set(builder.info.splits) == {"train", "val", "test"}
    for split, made in splits.items():
        source = builder.as_data_source(split)
        assert builder.info.splits[split].num_examples == len(source) == len(made)
        by_id = {record["chip_id"]: record for record in made}
        for index in range(len(source)):
            example = source[index]
            expected = by_id.pop(example["chip_id"].decode())
            for name, value in expected.items():
                value = value.encode() if isinstance(value, str) else value
                np.testing.assert_array_equal(example[name], value, err_msg=name)
                assert getattr(example[name], "dtype", None) == getattr(value, "dtype", None)
        assert not by_id
    assert json.loads(builder.info.metadata["biomass_jax"]) == written[2]


def test_files_are_named_as_tfds_expects_and_of_even_lengths(written):
    folder, _, info = written
    names = [f"biomass-train.array_record-0000{i}-of-00003" for i in range(3)]
    names += ["biomass-val.array_record-00000-of-00001", "biomass-test.array_record-00000-of-00001"]
    assert sorted(content(folder)) == sorted([*names, "dataset_info.json", "features.json", "metadata.json"])
    assert [(shard["file"], shard["records"]) for shard in info["shards"]] == list(
        zip(names, (2, 2, 3, 2, 3), strict=True)
    )
    stored = json.loads((folder / "dataset_info.json").read_text())
    lengths = {split["name"]: split["shardLengths"] for split in stored["splits"]}
    assert lengths == {"train": ["2", "2", "3"], "val": ["2"], "test": ["3"]}
    assert stored["fileFormat"] == "array_record"


def test_metadata_has_the_fields_of_the_contract(written):
    folder, splits, info = written
    assert read_metadata(folder) == info
    train = np.concatenate([record["image"].reshape(-1, 6) for record in splits["train"]]).astype(np.float64)
    assert info["stat_pixels"] == len(train) == 7 * 64
    np.testing.assert_allclose(info["means"], train.mean(0), rtol=1e-14)
    np.testing.assert_allclose(info["stds"], train.std(0), rtol=1e-13)
    assert info["label"] == {"name": "agbd", "units": "Mg ha-1", "none": -1.0}
    assert info["bands"] == ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
    assert (info["schema_version"], info["fill"], info["units"]) == (2, -9999, "digital numbers (reflectance x 10000)")
    assert (info["season"], info["sensors"]) == ("2020-06-01/2020-09-16", ["L30"])
    assert (info["split"], info["gedi"]) == ({"kind": "block", "seed": 4}, {"version": "002"})
    counts = {"train": 7, "val": 2, "test": 3}
    assert info["chips"] == {"min_labels": 20, "size": [8, 8], "dtype": "int16", "tiles": ["10SFF"], "counts": counts}
    for shard in info["shards"]:
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    assert verify(folder) == 5


def test_groups_hold_one_record_and_are_compressed(written):
    from array_record.python.array_record_module import ArrayRecordReader

    folder, _, _ = written
    reader = ArrayRecordReader(str(folder / "biomass-test.array_record-00000-of-00001"))
    options = reader.writer_options_string()
    assert "group_size:1" in options
    assert "zstd:1" in options


def test_nothing_tells_when_or_where_it_was_written(written, tmp_path, monkeypatch):
    folder, splits, _ = written
    monkeypatch.setattr(time, "time", lambda: 2e9)
    given = {"split": {"kind": "block", "seed": 4}, "chips": {"min_labels": 20}, "gedi": {"version": "002"}}
    shards.write_shards(splits, tmp_path / "elsewhere", metadata=given, records_per_shard=3, seed=5)
    assert content(tmp_path / "elsewhere") == content(folder)
    for name, data in content(folder).items():
        if name.endswith(".json"):
            assert not re.search(rb"20\d\d-\d\d-\d\dT|partial|tmp|/", re.sub(rb"2020-06-01/2020-09-16", b"", data)), (
                name
            )


def test_any_number_of_workers_and_any_executor_give_equal_bytes(written, tmp_path):
    folder, splits, info = written
    given = {name: info[name] for name in ("split", "gedi")} | {"chips": {"min_labels": 20}}
    expected = content(folder)
    shards.write_shards(splits, tmp_path / "two", metadata=given, records_per_shard=3, seed=5, workers=2)
    assert content(tmp_path / "two") == expected
    with ThreadPoolExecutor(3) as executor:
        settings = {"metadata": given, "records_per_shard": 3, "seed": 5, "executor": executor}
        shards.write_shards(splits, tmp_path / "three", **settings)
        assert executor.submit(lambda: True).result()  # it stays open
    assert content(tmp_path / "three") == expected
    reading = {split: [partial(dict, record) for record in made] for split, made in splits.items()}
    shards.write_shards(reading, tmp_path / "calls", metadata=given, records_per_shard=3, seed=5)
    assert content(tmp_path / "calls") == expected


def test_the_seed_alone_gives_the_order(written, tmp_path):
    folder, splits, _ = written
    ids = [record["chip_id"] for record in ShardSource(folder, "train")]
    given = [record["chip_id"] for record in splits["train"]]
    assert sorted(ids) == sorted(given)
    assert ids != given
    shards.write_shards(splits, tmp_path / "one", records_per_shard=100, seed=5)
    assert [record["chip_id"] for record in ShardSource(tmp_path / "one", "train")] == ids
    shards.write_shards(splits, tmp_path / "other", records_per_shard=100, seed=6)
    assert [record["chip_id"] for record in ShardSource(tmp_path / "other", "train")] != ids
    # SHA-256 of "5/train/0" to "5/train/6", sorted: as every machine and version has it
    names = {hashlib.sha256(f"5/train/{i}".encode()).hexdigest(): given[i] for i in range(7)}
    assert ids == [names[digest] for digest in sorted(names)]


def test_float32_and_other_sizes(tmp_path):
    record = make_record(16, np.float32)
    record["image"][0, 0, 0] = 0.25
    shards.write_shards({"train": [record]}, tmp_path / "shards")
    assert_equal(ShardSource(tmp_path / "shards", "train")[0], record)
    assert read_metadata(tmp_path / "shards")["chips"]["dtype"] == "float32"


def test_reading_is_a_sequence(written):
    folder, splits, _ = written
    source = ShardSource(folder, "test")
    assert len(source) == len(list(source)) == 3
    assert [record["chip_id"] for record in source] == [source[i]["chip_id"] for i in range(3)]
    with pytest.raises(IndexError, match="split test has 3 chips, no chip 3"):
        source[3]
    with pytest.raises(DataError, match="split 'dev' is not there; found test, train, val"):
        ShardSource(folder, "dev")


def test_an_empty_split_is_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="split val: no chips"):
        info = shards.write_shards(make_splits(val=0), tmp_path / "shards")
    assert info["chips"]["counts"] == {"train": 7, "test": 3}
    assert len(ShardSource(tmp_path / "shards", "train")) == 7
    with (
        pytest.warns(UserWarning),
        pytest.raises(PrepError, match="no records in any split of train, val; nothing to write"),
    ):
        shards.write_shards({"train": [], "val": []}, tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_without_training_chips_there_are_no_statistics(tmp_path):
    with pytest.warns(UserWarning, match="no split train"):
        info = shards.write_shards({"test": make_splits()["test"]}, tmp_path / "shards")
    assert (info["means"], info["stds"], info["stat_pixels"]) == (None, None, 0)


def test_what_is_there_is_kept_unless_overwriting_is_asked_for(tmp_path):
    splits = make_splits()
    folder = tmp_path / "shards"
    shards.write_shards(splits, folder)
    before = content(folder)
    with pytest.raises(PrepError, match="shards: is there already; .*--overwrite"):
        shards.write_shards(splits, folder, seed=9)
    assert content(folder) == before
    shards.write_shards(splits, folder, seed=9, overwrite=True)
    assert content(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("no data set")
    with pytest.raises(PrepError, match="other: found no dataset_info.json.* is not overwritten"):
        shards.write_shards(splits, tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "no data set"


def test_a_failing_chip_leaves_nothing_and_keeps_what_was_there(tmp_path):
    folder = tmp_path / "shards"
    splits = make_splits()
    shards.write_shards(splits, folder)
    before = content(folder)
    splits["train"][4]["label"][0, 0] = -3
    with pytest.raises(RecordError, match="chip '10SFF_4_train': field label: found 1 values like -3"):
        shards.write_shards(splits, folder, overwrite=True)
    splits = make_splits()
    splits["test"][1] = make_record(16, chip_id="10SFF_1_test")
    fault = r"chip '10SFF_1_test': .*found shape \(16, 16, 6\), expected \(8, 8, 6\)"
    with ThreadPoolExecutor(2) as executor, pytest.raises(RecordError, match=fault):
        shards.write_shards(splits, folder, overwrite=True, executor=executor, records_per_shard=3)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_chip_in_two_splits_is_an_error(tmp_path):
    splits = make_splits()
    splits["test"][0]["chip_id"] = "10SFF_3_train"
    with pytest.raises(PrepError, match="chip_id '10SFF_3_train': found in split train and again in test"):
        shards.write_shards(splits, tmp_path / "shards")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("settings", "found"), [({"records_per_shard": 0}, "shard 0"), ({"workers": 0}, "workers 0")])
def test_settings_below_one(tmp_path, settings, found):
    with pytest.raises(PrepError, match=found):
        shards.write_shards(make_splits(), tmp_path / "shards", **settings)


def test_a_changed_or_missing_shard_is_found(tmp_path, capsys):
    shards.write_shards(make_splits(), tmp_path / "shards")
    assert shards.main(["--out", str(tmp_path), "--verify"]) == 0
    assert "3 shards are as they were written" in capsys.readouterr().out
    path = tmp_path / "shards" / "biomass-val.array_record-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert shards.main(["--out", str(tmp_path), "--verify"]) == 1
    assert re.match(r"error: .*biomass-val\S+: found [0-9a-f]{64}, expected a file of sha256", capsys.readouterr().err)
    path.unlink()
    with pytest.raises(DataError, match="biomass-val.*: found no file, expected"):
        verify(tmp_path / "shards")


def test_records_are_compared_with_the_disk_after_writing(tmp_path, monkeypatch):
    items = make_splits()["val"]
    real = shard_writer._digest_of_records

    def swallowed(path, count):  # as a full disk that nobody reports
        os.truncate(path, path.stat().st_size // 2)
        return real(path, count)

    monkeypatch.setattr(shard_writer, "_digest_of_records", swallowed)
    with pytest.raises(PrepError, match="shard: holds other records than were written; is the disk full"):
        shard_writer.write_shard(tmp_path / "shard", items, (8, 8, 6), "int16", None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error(tmp_path):
    (tmp_path / "shard").symlink_to("/dev/full")
    with pytest.raises(PrepError, match="shard: not written: .*No space left on device.*is the disk full"):
        shard_writer.write_shard(tmp_path / "shard", make_splits()["val"], (8, 8, 6), "int16", None)


def test_metadata_of_another_version_is_refused(tmp_path):
    shards.write_shards(make_splits(), tmp_path / "shards")
    file = tmp_path / "shards" / "metadata.json"
    file.write_text(file.read_text().replace('schema_version\\": 2', 'schema_version\\": 7'))
    with pytest.raises(DataError, match="metadata.json: found schema_version 7, expected 1 or 2"):
        read_metadata(tmp_path / "shards")


KILLED = """
import time
from pathlib import Path
from functools import partial
from data_prep.shards import write as shards
from tests.data.test_records import make_record

def slow(index):
    if index == 4:
        Path("reached").touch()
        time.sleep(60)
    return make_record(chip_id=f"a_{index}")

if __name__ == "__main__":
    shards.write_shards({"train": [partial(slow, i) for i in range(6)]}, "shards", records_per_shard=1, workers=2)
"""


def test_a_killed_run_leaves_nothing_half_and_no_writers(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen([sys.executable, "killed.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "reached").exists():
            assert run.poll() is None, "ended before it was killed"
            assert time.monotonic() < deadline, "did not get to the chip at which it is killed"
            time.sleep(0.02)
        workers = children_of(run.pid)
        assert workers
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not (tmp_path / "shards").exists()
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    made = [make_record(chip_id=f"a_{index}") for index in range(6)]
    shards.write_shards({"train": made}, tmp_path / "shards")  # over what the killed run left
    assert len(ShardSource(tmp_path / "shards", "train")) == 6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".shards")]


def children_of(pid):
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_imports_are_light_and_never_tensorflow(tmp_path):
    code = (
        "import sys; from data_prep.shards import write, geotiff, statistics\n"
        "heavy = {'tensorflow_datasets', 'array_record', 'tensorflow', 'jax', 'geopandas', 'h5py'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "from tests.data.test_records import make_record\n"
        "write.write_shards({'train': [make_record()]}, 'shards')\n"
        "from biomass_jax.data.sources import ShardSource; ShardSource('shards', 'train')[0]\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'tensorflow', 'jax', 'tensorflow_datasets'}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['tensorflow_datasets']"]


def test_sets_without_data_or_labels_are_refused_unless_asked_for(tmp_path):
    splits = make_splits()
    for record in (record for made in splits.values() for record in made):
        record["label"] = record["agbd_sigma"] = np.full((8, 8), -1, np.float32)
    with pytest.raises(PrepError, match=r"out: labels of its chips: 0 of 12; allow_empty"):
        shards.write_shards(splits, tmp_path / "out", labelled=True)
    assert list(tmp_path.iterdir()) == []
    shards.write_shards(splits, tmp_path / "unlabelled")  # for pretraining
    for record in (record for made in splits.values() for record in made):
        record["image"] = np.full((8, 8, 6), -9999, np.int16)
    with pytest.raises(PrepError, match=r"out: pixels of its chips with data: 0 of 768; allow_empty"):
        shards.write_shards(splits, tmp_path / "out")
