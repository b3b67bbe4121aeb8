"""What a run learns from: changed between a stop and a start it is named; what is missing is found before compiling."""

import json
import shutil

import numpy as np
import pytest
import rasterio

from biomass_jax import bundle
from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.data.blocks import draw_blocks
from biomass_jax.data.sources import open_source
from biomass_jax.errors import BundleError, CheckpointError, ConfigError, DataError
from biomass_jax.training import run as training
from configs import finetune_all_biomes
from tests.prediction.stubs import random_bundle
from tests.training import world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("model") / "bundle")


def config_of(path, **fields):
    return world.configure(finetune_all_biomes.get_config(), data__path=str(path), epochs=2, **fields)


def save(config, workdir):
    """What a run leaves that is stopped before its first step."""
    begun = training.set_up(config, workdir, command="")
    begun.checkpoints.save(begun.state, begun.host, loss=None)
    begun.close()


def folders(root, change=0, seed=0, apart=960):
    """GeoTIFF folders of a few chips, metres `apart`; `change` is added to the last validation label."""
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            record = world.make_record(split, index, seed)
            label = record["label"][None] + (change if (split, index) == ("val", 1) else 0)
            for kind, values, dtype in (
                ("img", np.moveaxis(record["image"], -1, 0), "int16"),
                ("label", label, "float32"),
            ):
                folder = root / f"{split}_{'images' if kind == 'img' else 'labels'}"
                folder.mkdir(parents=True, exist_ok=True)
                size = {"count": len(values), "height": world.SIDE, "width": world.SIDE}
                place = rasterio.Affine(30, 0, 600000 + apart * index, 0, -30, 4100000)
                with rasterio.open(
                    folder / f"T10SFF_{index}_tile_{kind}.tif", "w", driver="GTiff", dtype=dtype, crs="EPSG:32610",
                    transform=place, **size,
                ) as file:  # fmt: skip
                    file.write(values)
                    if kind == "img":
                        file.descriptions = BAND_NAMES
    return root


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved") / "run"
    save(config_of(shards), workdir)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.slow
def test_the_same_shards_elsewhere_are_the_same(shards, workdir, tmp_path):
    training.set_up(config_of(shutil.copytree(shards, tmp_path / "moved")), workdir, command="").close()


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "words"), [(1, "data.train.sha256: was "), (0, "data.val.chips: was 7, now 6")])
def test_shards_made_anew_end_a_resumed_run_by_name(workdir, tmp_path, seed, words):
    other = world.write(tmp_path / "shards", seed=seed, val=7 if seed else 6)
    with pytest.raises(CheckpointError, match="can't resume at step 0") as caught:
        training.set_up(config_of(other), workdir, command="")
    assert words in str(caught.value)
    assert (workdir / "checkpoints" / "step_0").is_dir()


@pytest.mark.slow
def test_a_refused_run_leaves_the_earlier_ones_config(shards, workdir):
    (workdir / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="config.seed: was 42, now 5"):
        training.train_and_evaluate(config_of(shards, seed=5), workdir, stop=lambda: False)
    assert (workdir / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_a_label_changed_in_place_and_a_bundle_edited_are_named(model, tmp_path):
    data = folders(tmp_path / "data")
    model = shutil.copytree(model, tmp_path / "model")
    config = config_of(data, init_from=str(model), load="encoder", model__decoder_channels=8)
    save(config, tmp_path / "run")
    training.set_up(config, tmp_path / "run", command="").close()
    folders(data, change=1)
    with pytest.raises(CheckpointError, match="data.val.sha256: was .*, now "):
        training.set_up(config, tmp_path / "run", command="")
    folders(data)
    meta = bundle.read_meta(model)
    meta["input"]["means"][2] += 1
    (model / "bundle.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="statistics.means: was "):
        training.set_up(config, tmp_path / "run", command="")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:tiles 10SFF")  # whose cells lie side by side, and these chips don't
def test_a_bootstrap_changes_the_training_chips_and_nothing_else(tmp_path):
    data = folders(tmp_path / "data", apart=60_000)  # four chips in blocks of their own
    whole, drawn = (
        training.set_up(config_of(data, data__bootstrap=seed), tmp_path / str(seed), command="") for seed in (None, 1)
    )
    whole.close()
    found, expected = drawn.host.inputs, whole.host.inputs
    assert found["data"]["val"] == expected["data"]["val"]
    assert found["statistics"] == expected["statistics"]
    assert found["data"]["train"]["chips"] == expected["data"]["train"]["chips"] == 4
    assert found["data"]["train"]["sha256"] != expected["data"]["train"]["sha256"]
    numbers = draw_blocks(open_source(data, "train"), 1)
    assert len({*numbers}) < 4
    batch = next(drawn.feed.batches(start=0))
    assert sorted(chip.chip_id for chip in batch.chips) == sorted(f"10SFF_{number}" for number in numbers)
    drawn.checkpoints.save(drawn.state, drawn.host, loss=None)
    drawn.close()
    with pytest.raises(CheckpointError, match="config.data.bootstrap: was 1, now 2"):
        training.set_up(config_of(data, data__bootstrap=2), tmp_path / "1", command="")


def no_compiling(monkeypatch):
    def fail(*_):
        raise AssertionError("the state was drawn before the fault was found")

    monkeypatch.setattr(training, "create_train_state", fail)


@pytest.mark.parametrize(
    "fault", ["shard gone", "shard cut", "another data set's", "verify", "no bundle", "optimizer", "shapes"]
)
def test_what_a_run_cannot_do_without_is_missed_before_compiling(shards, model, tmp_path, monkeypatch, fault):
    no_compiling(monkeypatch)
    data, fields, error = shutil.copytree(shards, tmp_path / "shards"), {}, DataError
    last = sorted(data.glob("*-train.array_record*"))[-1]
    if fault == "shard gone":
        last.unlink()
        words = f"{last}: no such file"
    elif fault == "shard cut":
        size = last.stat().st_size
        last.write_bytes(last.read_bytes()[:1000])
        words = f"found 1,000 bytes, expected {size:,}"
    elif fault == "another data set's":
        other = world.write(tmp_path / "other", train=19)
        shutil.copy(other / "dataset_info.json", data)
        words = "dataset_info.json tells of 19 chips, metadata.json of 20"
    elif fault == "verify":
        text = bytearray(last.read_bytes())
        text[1000] ^= 1
        last.write_bytes(text)
        fields, words = {"data__verify": True}, f"{last}: found "
    elif fault == "no bundle":
        fields, words, error = {"init_from": str(tmp_path / "absent")}, "absent: not a model bundle", BundleError
    elif fault == "optimizer":
        fields = {"init_from": str(model), "resume_optimizer": True, "model__decoder_channels": 8}
        words, error = "holds no optimizer/", ConfigError
    else:
        fields = {"init_from": str(model), "load": "encoder", "model__embed_dim": 16}
        words, error = "the model of this config", BundleError
    with pytest.raises(error) as caught:
        training.set_up(config_of(data, **fields), tmp_path / "run", command="")
    assert words in str(caught.value)
