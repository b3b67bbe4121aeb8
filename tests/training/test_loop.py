"""Whole runs on small shards: what is written, and that a run that was cut is the same run."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.errors import TrainingError
from biomass_jax.training import loop
from configs import finetune_all_biomes
from tests.training import world
from tests.training.runs import assert_same_run, final_state, lines, train

pytestmark = pytest.mark.slow  # whole runs: each compiles its own step


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    place = {"epsg": 32610, "transform": np.array([27.0, 0, 600000, 0, -27, 4100000])}
    return world.write(tmp_path_factory.mktemp("data") / "shards", change=lambda record: record | place)


def config_of(shards, **fields):
    fields = {"epochs": 3, "data__path": str(shards), "optimizer__learning_rate": 1e-3} | fields
    return world.configure(finetune_all_biomes.get_config(), **fields)


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    config = config_of(shards)
    assert train(config, workdir)
    return workdir, final_state(workdir, config)


def test_a_run_writes_lines_checkpoints_events_and_the_best_model(unbroken, shards):
    workdir, state = unbroken
    found = lines(workdir)
    # 20 chips in batches of 4: 5 steps an epoch, a line every second step and at the end, one a validation
    assert [line["step"] for line in found if "train/loss" in line] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [(line["step"], line["epoch"]) for line in found if "val/loss" in line] == [(5, 1), (10, 2), (15, 3)]
    assert state[".step"] == 15
    assert list(workdir.glob("events.out.tfevents.*"))
    best = min((line for line in found if "val/loss" in line), key=lambda line: line["val/loss"])
    meta = bundle.read_meta(workdir / "best")
    assert meta["training"]["step"] == best["step"]
    assert meta["training"]["scores"]["val/rmse"] == best["val/rmse"]
    assert meta["training"]["dataset"] == str(shards)
    assert meta["output"] == {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1}
    assert meta["input"]["pixel_size"] == 27.0
    metadata = json.loads(json.loads((shards / "metadata.json").read_text())["biomass_jax"])
    np.testing.assert_allclose(meta["input"]["means"], metadata["means"], rtol=1e-12)


def test_the_exported_model_has_the_score_that_the_run_printed(unbroken, shards):
    workdir, _ = unbroken
    loaded = bundle.load(workdir / "best")
    records = [world.make_record("val", index) for index in range(7)]
    images = (np.stack([record["image"] for record in records]).astype(np.float32) - loaded.means) / loaded.stds
    labels = np.stack([record["label"] for record in records])
    predictions = np.asarray(jax.jit(loaded.module().apply)(loaded.variables, images), np.float64)
    known = labels >= 0
    squares, count = ((predictions - labels)[known] ** 2).sum(), known.sum()
    scores = loaded.meta["training"]["scores"]
    assert scores["val/n"] == count
    np.testing.assert_allclose(scores["val/rmse"], np.sqrt(squares / count), rtol=1e-5)
    np.testing.assert_allclose(scores["val/loss"], np.sqrt(squares / count), rtol=1e-5)


@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.long), 5, pytest.param(7, marks=pytest.mark.long)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(unbroken, shards, tmp_path, when):
    calls = iter(range(1, 100))
    assert not train(config_of(shards), tmp_path / "run", stop=lambda: next(calls) == when)
    assert train(config_of(shards), tmp_path / "run")
    assert_same_run(tmp_path / "run", config_of(shards), unbroken)


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 would, without anything being tidied up."""


@pytest.mark.parametrize(
    "place", [pytest.param("save", marks=pytest.mark.long), "write", pytest.param("export", marks=pytest.mark.long)]
)
def test_a_run_killed_within_an_epochs_end_goes_on_as_if_it_had_not_been(
    unbroken, shards, tmp_path, monkeypatch, place
):
    def die(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if place == "save":  # validated, not saved
            patch.setattr(loop.Run, "_save", die)
        elif place == "write":  # saved, no line
            patch.setattr(loop.Run, "_finish_epoch", lambda self: None if self.host.line is None else die())
        else:  # saved, line written, not exported
            patch.setattr(loop, "export_best", die)
        with pytest.raises(Killed):
            train(config_of(shards), tmp_path / "run")
    assert train(config_of(shards), tmp_path / "run")
    assert_same_run(tmp_path / "run", config_of(shards), unbroken)


def test_a_finished_run_does_nothing_more(unbroken, shards):
    workdir, _ = unbroken
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(config_of(shards), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(shards, tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(config_of(shards, optimizer__learning_rate=1e30, epochs=4), tmp_path / "run")
    said = str(caught.value)
    assert "the loss became" in said and "at step" in said
    assert said.count("train_") == 4  # the chips of the batch
    assert "The last good checkpoint: " in said


@pytest.mark.long
def test_early_stopping_ends_the_run(shards, tmp_path):
    # a rate of 0 changes nothing but batch statistics
    config = config_of(shards, optimizer__learning_rate=0.0, epochs=50, schedule__stop_patience=2)
    assert train(config, tmp_path / "run")
    epochs = [line for line in lines(tmp_path / "run") if "val/loss" in line]
    assert len(epochs) < 50
    losses = [line["val/loss"] for line in epochs]
    assert np.argmin(losses) == len(losses) - 3


@pytest.mark.long
def test_kill_9_at_random_moments(root, shards, unbroken, tmp_path):
    rng = np.random.default_rng(5)
    workdir = tmp_path / "run"
    fields = [f"--config.{name}={value!r}" for name, value in world.TINY.items()]
    fields += [f"--config.data.path={shards}", "--config.epochs=3", "--config.optimizer.learning_rate=1e-3"]
    fields += ["--config.checkpoint.every_steps=2"]
    command = [sys.executable, "-m", "biomass_jax.main", "--config", "configs/finetune_all_biomes.py"]
    command += ["--workdir", str(workdir), *fields]
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(5, 14))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
    assert kills
    assert subprocess.run(command, cwd=root, timeout=300).returncode == 0
    assert_same_run(workdir, config_of(shards, checkpoint__every_steps=2), unbroken)
