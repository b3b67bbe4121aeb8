"""Opening shards and mixtures, what their info says, and statistics; each fault of a data set is named."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from biomass_jax.data import records, sources
from biomass_jax.data import statistics as stats
from biomass_jax.data.shards import read_metadata
from biomass_jax.data.sources import Chip, Place
from biomass_jax.errors import DataError
from data_prep.shards import write as shards
from tests.data.chip_sources import Memory


def make_record(number, size=8, dtype=np.int16):
    rng = np.random.default_rng(number)
    image = rng.integers(-200, 9000, (size, size, 6)).astype(dtype)
    image[rng.random((size, size)) < 0.1] = (0, -9999)[number % 2]
    label = np.where(rng.random((size, size)) < 0.2, rng.integers(0, 500, (size, size)), -1).astype(np.float32)
    return records.Record(
        image=image,
        label=label,
        agbd_sigma=np.where(label > 100, label / 8, np.float32(-1)),
        chip_id=f"10SFF_{number}_2020-06-01",
        tile="10SFF",
        row=8 * number,
        col=0,
        epsg=32610,
        transform=np.array([30.0, 0, 600000, 0, -30, 4200000 - 240 * number]),
        biome="taiga",
        season="2020-06-01/2020-09-16",
        sensors="L30",
        schema_version=records.SCHEMA_VERSION,
    )


CHIPS = {"train": list(range(7)), "val": [7, 8]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    shards.write_shards(
        {split: [make_record(n) for n in of] for split, of in CHIPS.items()}, folder, records_per_shard=3
    )
    return folder


def test_shards_of_version_1_open_as_they_did():
    """A folder as version 1 of the schema wrote it, of the same chips."""
    old = Path(__file__).parent / "shards_version_1"
    assert json.loads(json.loads((old / "metadata.json").read_text())["biomass_jax"])["schema_version"] == 1
    source = sources.open_source(old, "train", verify=True)
    assert len(source) == 2
    for number in range(2):
        (found,) = (record for record in source if record["chip_id"] == make_record(number)["chip_id"])
        records.validate(found)
        assert found["schema_version"] == 2
        assert (found["agbd_sigma"] == -1).all()
        for name in ("image", "label", "transform"):
            np.testing.assert_array_equal(found[name], make_record(number)[name])


def test_records_come_back_from_shards(written):
    for split, expected in CHIPS.items():
        source = sources.open_source(written, split)
        found = {source[i]["chip_id"]: source[i] for i in range(len(source))}
        assert set(found) == {make_record(n)["chip_id"] for n in expected}
        for n in expected:
            record = make_record(n)
            for name, value in record.items():
                np.testing.assert_array_equal(found[record["chip_id"]][name], value, err_msg=name)
        for chip, record in zip(source.chips(), source, strict=True):
            place = Place(32610, 600000 + 4 * 30, record["transform"][5] - 4 * 30)  # of its centre
            assert chip == Chip(record["chip_id"], "10SFF", "taiga", place)


def test_a_chip_without_coordinates_has_no_place():
    record = make_record(0)
    assert sources.chip_of(record | {"epsg": 0, "transform": np.zeros(6)}).place == Place(0, 0, 0)


def test_info_of_shards(written):
    info = sources.open_source(written, "val").info
    assert (info.path, info.split, info.chips) == (str(written), "val", 2)
    assert (info.image_shape, info.image_dtype, info.fill) == ((8, 8, 6), np.int16, -9999.0)
    assert (info.season, info.sensors) == ("2020-06-01/2020-09-16", ("L30",))
    assert info.metadata == read_metadata(written)


def test_a_source_can_be_pickled(written):
    source = sources.open_source(written, "train")
    source[0]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[6]["image"], source[6]["image"])


def test_numbers_out_of_range(written):
    source = sources.open_source(written, "val")
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"split val has 2 chips, no chip {index}"):
            source[index]


def test_faults_of_a_data_set(written, tmp_path):
    with pytest.raises(DataError, match="split 'test' is not there; found train, val"):
        sources.open_source(written, "test")
    with pytest.raises(DataError, match="config.bands is set, but records know their bands"):
        sources.open_source(written, "val", bands="BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2")
    with pytest.raises(DataError, match="none: split train: no such folder; expected shards"):
        sources.open_source(tmp_path / "none", "train")
    with pytest.raises(DataError, match=f"split val: found shards; expected .*did you mean {written}?"):
        sources.open_source(written.parent, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "found schema_version 3, expected 1 or 2"),
        ({"bands": ["BLUE"]}, r"found bands \['BLUE'\], expected \['BLUE', 'GREEN'"),
        ({"means": [1.0, 2.0]}, r"means: found \[1.0, 2.0\], expected 6 numbers"),
        (None, "found no biomass_jax metadata"),
    ],
)
def test_faults_of_metadata(written, tmp_path, change, message):
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in written.iterdir():
        (folder / file.name).symlink_to(file)
    text = (written / "metadata.json").read_text()
    (folder / "metadata.json").unlink()
    if change is not None:
        info = json.loads(json.loads(text)["biomass_jax"]) | change
        (folder / "metadata.json").write_text(json.dumps({"biomass_jax": json.dumps(info)}))
    with pytest.raises(DataError, match=message):
        sources.open_source(folder, "train")


def test_a_damaged_shard_is_named(written, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in written.iterdir():
        data = bytearray(file.read_bytes())
        if "-val." in file.name:
            data[1500:1700] = bytes(200)
        (folder / file.name).write_bytes(data)
    source = sources.open_source(folder, "val")
    with pytest.raises(DataError, match="split val, chip number 1: can't be read: .*hash mismatch"):
        [source[i] for i in range(2)]


def test_a_mixture_joins_what_it_is_made_of(written):
    mixture = sources.open_mixture([(written, 1.0), (written, 1.0)], "val")
    assert len(mixture) == 4 and mixture.info.metadata == {}
    assert [chip.chip_id for chip in mixture.chips()[:2]] == [chip.chip_id for chip in mixture.chips()[2:]]
    one = sources.open_mixture([(written, 2.5)], "train")
    assert one.shares == ((7, 7),) and one.info.metadata["means"]
    both = sources.Mixture([(Memory(3), 1.0), (Memory(3, first=50, dtype=np.float32), 1.0)])
    assert both.info.image_dtype == np.float32
    assert [both[i]["image"].dtype for i in (0, 3)] == [np.float32, np.float32]
    assert [both[i]["chip_id"] for i in (2, 3, 5)] == ["chip_2", "chip_50", "chip_52"]


def test_shares_of_a_mixture():
    def shares(*parts):
        return [seen for _, seen in sources.Mixture([(Memory(count), weight) for count, weight in parts]).shares]

    assert shares((10, 1), (10, 1)) == [10, 10]
    assert shares((10, 1), (100, 2)) == [10, 20]
    assert shares((10, 0.1), (100, 0.3), (1000, 0.6)) == [10, 30, 60]
    assert shares((1, 0.09), (100, 0.18)) == [1, 2]  # 1 / 0.09 * 0.09 is just below 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no path: found weights"),
        ([(4, 0.0)], r"found weights \[0.0\], expected one or more, each above 0"),
        ([(4, 1.0), (5, 1.0)], r"found chips \(5, 5, 6\) .*expected \(4, 4, 6\)"),
    ],
)
def test_faults_of_a_mixture(parts, message):
    with pytest.raises(DataError, match=message):
        sources.Mixture([(Memory(3, size=size), weight) for size, weight in parts])


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("reference", [False, True])
def test_statistics_are_those_of_data_preparation_to_the_last_bit(dtype, reference):
    class Plain(Memory):
        def _read(self, index):
            return make_record(index, 4, dtype)

    images = [make_record(n, 4, dtype)["image"] for n in range(5)]
    expected = stats.means_stds(stats.combine(stats.chip_sums(image, reference=reference) for image in images))
    means, stds = sources.statistics_of(Plain(5), reference=reference)
    assert (means.tolist(), stds.tolist()) == expected
    for band in range(6):
        values = np.concatenate([image[..., band].ravel() for image in images]).astype(float)
        everything = np.concatenate([image.reshape(-1, 6) for image in images])
        values = (
            values[values != -9999] if reference else values[~(everything[:, :1] == -9999).any(1) & everything.any(1)]
        )
        np.testing.assert_allclose((means[band], stds[band]), (values.mean(), values.std()), rtol=1e-12)


def test_statistics_of_shards_are_written_in_them(written, monkeypatch):
    source = sources.open_source(written, "val")
    means, stds = sources.statistics_of(source)
    assert means.dtype == stds.dtype == np.float64
    assert (means.tolist(), stds.tolist()) == (source.info.metadata["means"], source.info.metadata["stds"])
    with pytest.raises(DataError, match="statistics come from split train, found val"):
        sources.statistics_of(source, reference=True)
    counting_zeros, _ = sources.statistics_of(sources.open_source(written, "train"), reference=True)
    assert (counting_zeros < means).all()  # pixels of zeros and other bands than the one of -9999


def test_a_band_without_data_has_no_statistics():
    class Empty(Memory):
        def _read(self, index):
            return super()._read(index) | {"image": np.zeros((4, 4, 6), np.int16)}

    with pytest.raises(DataError, match="band BLUE has no pixel with data"):
        sources.statistics_of(Empty(2))


def old_metadata(folder):
    """As an older version wrote them: without the shards' sizes."""
    path = folder / "metadata.json"
    info = json.loads(json.loads(path.read_text())["biomass_jax"])
    for shard in info["shards"]:
        del shard["bytes"]
    path.write_text(json.dumps({"biomass_jax": json.dumps(info)}))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "no such file"),
        (lambda data: data[: len(data) // 2], "found .*, expected"),
        (lambda data: data[:-1], "found .*, expected"),
        (lambda data: b"", "found .*, expected"),
        (lambda data: data + b"more", "found .*, expected"),
    ],
)
def test_shards_lost_or_cut_are_found_when_the_split_is_opened(written, tmp_path, old, change, words):
    folder = shutil.copytree(written, tmp_path / "shards")
    if old:
        old_metadata(folder)
        assert len(sources.open_source(folder, "train")) == len(CHIPS["train"])
    path = sorted(folder.glob("*-train.*"))[-1]
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    with pytest.raises(DataError, match=f"{path}: {words}.*copy the data set again"):
        sources.open_source(folder, "train")
    assert len(sources.open_source(folder, "val")) == 2  # whose files are all there
    for other in folder.glob("*-train.*"):
        other.unlink()
    with pytest.raises(DataError, match="; 2 more of 3 shards are not as they were written; copy"):
        sources.open_source(folder, "train")


def test_equal_sizes_with_other_bytes_are_found_where_it_is_asked_for(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "shards")
    path = sorted(folder.glob("*-val.*"))[0]
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    sources.open_source(folder, "val")
    sources.open_source(folder, "train", verify=True)
    with pytest.raises(DataError, match=f"{path}: found [0-9a-f]+, expected a file of sha256"):
        sources.open_source(folder, "val", verify=True)


def test_the_digest_is_of_the_chips_and_not_of_the_place(written, tmp_path):
    copied = shutil.copytree(written, tmp_path / "elsewhere")
    found = {split: sources.open_source(copied, split).digest() for split in CHIPS}
    assert found == {split: sources.open_source(written, split).digest() for split in CHIPS}
    other = tmp_path / "other"
    changed = [make_record(n) for n in CHIPS["train"]]
    changed[0]["label"] = changed[0]["label"] + 1
    shards.write_shards({"train": changed, "val": [make_record(n) for n in CHIPS["val"]]}, other, records_per_shard=3)
    assert sources.open_source(other, "train").digest() != found["train"]
    assert sources.open_source(other, "val").digest() == found["val"]
    mixed = [sources.open_mixture([(copied, 1), (other, share)], "train").digest() for share in (1, 1, 2)]
    assert mixed[0] == mixed[1] != mixed[2]
