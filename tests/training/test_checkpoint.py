"""Checkpoints: what comes back, which are kept, and what doesn't fit."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.errors import CheckpointError
from biomass_jax.runtime.settings import changed_fields
from biomass_jax.training.checkpoint import Checkpoints, HostState
from biomass_jax.training.plateau import early_stop_init
from biomass_jax.training.run import check_same, resume_host, tell_changes
from biomass_jax.training.state import TrainState
from tests.training.test_steps import begin


def state_of(step=0, shape=(3, 2), ema=False):
    weights = {"head": {"kernel": jnp.full(shape, step + 0.1, jnp.float32)}}
    averages = {"params": jax.tree.map(lambda leaf: leaf + 1, weights), "batch_stats": {}} if ema else None
    return TrainState(jnp.asarray(step, jnp.int32), weights, {}, (jnp.zeros(shape),), averages, jnp.float32(0.1))


HOST = HostState({"seed": 1}, step=4, epoch=1, window=[0.1, 2.5], plateau={"lr": 0.1, "best": 3.0})


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path, keep=2)
    yield opened
    opened.close()


def test_state_and_host_come_back_to_the_bit(checkpoints, tmp_path):
    state = state_of(4, ema=True)
    assert checkpoints.latest is None
    checkpoints.save(state, HOST, loss=2.0)
    checkpoints.wait()
    again = Checkpoints(tmp_path, keep=2)
    found, host = again.restore(state_of(ema=True), step=again.latest)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert host == HOST


def test_what_the_host_does_after_save_is_not_in_the_checkpoint(checkpoints, monkeypatch):
    host, changed, dumps = dataclasses.replace(HOST, line={"epoch": 1}), threading.Event(), json.dumps

    def late(value, *args, **kwargs):
        if isinstance(value, dict) and "window" in value:
            changed.wait(30)  # Orbax's thread is slow to write
        return dumps(value, *args, **kwargs)

    monkeypatch.setattr(json, "dumps", late)
    checkpoints.save(state_of(4), host, loss=2.0)
    host.line = None
    host.window = []
    changed.set()
    checkpoints.wait()
    _, found = checkpoints.restore(state_of(), step=4)
    assert (found.line, found.window) == ({"epoch": 1}, HOST.window)


def test_the_latest_and_the_best_are_kept(checkpoints):
    for step, loss in ((1, 5.0), (2, 1.0), (3, None), (4, 4.0), (5, 3.0), (6, None)):
        checkpoints.save(state_of(step), dataclasses.replace(HOST, step=step), loss=loss)
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_2", "step_5", "step_6"]
    assert checkpoints.latest == 6


def test_a_checkpoint_cut_short_is_not_seen(checkpoints, tmp_path):
    checkpoints.save(state_of(4), HOST, loss=2.0)
    checkpoints.wait()
    (checkpoints.folder / "step_9.orbax-checkpoint-tmp-1").mkdir()
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == 4
    again.close()


@pytest.mark.parametrize("other", ["shape", "more", "less"])
def test_another_config_is_told_what_to_do(checkpoints, other, capfd):
    other, words = {
        "shape": (state_of(shape=(3, 5)), "opt_state.0: found (3, 2), expected (3, 5)"),
        "more": (state_of(ema=True), "ema.params.head.kernel: found none, expected (3, 2)"),
        "less": (dataclasses.replace(state_of(), learning_rate=None), "learning_rate: found (), expected none"),
    }[other]
    checkpoints.save(state_of(4), HOST, loss=2.0)
    checkpoints.wait()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(other, step=4)
    said = str(caught.value)
    assert "step_4 doesn't fit this config" in said and "start in another workdir" in said
    assert words in said and "\n" not in said
    assert capfd.readouterr().err == ""


def test_changed_fields_are_named_and_harmless_ones_are_not(tmp_path, caplog):
    before = {"seed": 1, "log_every": 5, "data": {"path": "a", "threads": 2}, "betas": [0.9, 0.999], "loss": "rmse"}
    now = {"seed": 2, "log_every": 9, "data": {"path": "b", "threads": 8}, "betas": (0.9, 0.999), "new": None}
    changes = changed_fields(before, now)
    assert changes == [
        "data.path: was 'a', now 'b'",
        "data.threads: was 2, now 8",
        "log_every: was 5, now 9",
        "loss: was 'rmse', now None",
        "seed: was 1, now 2",
    ]
    tell_changes(before, now, tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path}: the run resumes with another config.{change}"
        for change in changes
        if "threads" not in change and "log_every" not in change
    ]


def test_counters_go_on_and_early_stopping_by_the_new_patience():
    stopped = {"patience": 3, "min_delta": 0.0, "best": 1.0, "wait_count": 3, "stop": True}
    saved = HostState({"a": 1}, step=9, early_stop=stopped)
    fresh = HostState({"a": 2}, early_stop=early_stop_init(5))
    found = resume_host(saved, fresh)
    assert (found.step, found.config) == (9, {"a": 2})
    assert found.early_stop == stopped | {"patience": 5, "stop": False}
    assert resume_host(saved, dataclasses.replace(fresh, early_stop=None)).early_stop is None
    assert resume_host(dataclasses.replace(saved, early_stop=None), fresh).early_stop == fresh.early_stop
    assert resume_host(saved, dataclasses.replace(fresh, early_stop=early_stop_init(2))).early_stop["stop"]


@pytest.mark.parametrize("which", ["saved", "fresh"])
def test_a_plateau_is_neither_begun_nor_left_half_way(which):
    plain, moved = HostState({}), HostState({}, plateau={"lr": 0.1})
    with pytest.raises(CheckpointError, match="config.schedule.kind: .* another workdir"):
        resume_host(*((moved, plain) if which == "saved" else (plain, moved)))


def test_a_real_optimisers_state_fits_itself(checkpoints):
    state, _ = begin(freeze=("encoder",), ema=0.9, rate=0.1)
    checkpoints.save(state, HOST, loss=2.0)
    checkpoints.wait()
    found, _ = checkpoints.restore(state, step=4)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


INPUTS = {
    "statistics": {"means": [1.0, 2.0]},
    "data": {"train": {"chips": 8, "sha256": "aa"}, "val": {"chips": 3, "sha256": "bb"}},
    "init_from": None,
}


@pytest.mark.parametrize(
    ("config", "inputs", "words"),
    [
        ({"batch_size": 8}, {}, "config.batch_size: was 4, now 8; put back"),
        ({"data": {"label_max": 9.0}}, {}, "config.data.label_max: was 2000.0, now 9.0; put back"),
        ({}, {"statistics": {"means": [1.0, 2.5]}}, "statistics.means: was [1.0, 2.0], now [1.0, 2.5]; put back"),
        (
            {},
            {"data": INPUTS["data"] | {"val": {"chips": 4, "sha256": "cc"}}},
            "data.val.chips: was 3, now 4, and 1 more",
        ),
        ({}, {"init_from": {"weights_sha256": "dd"}}, "init_from: was None, now {'weights_sha256': 'dd'}; put back"),
        ({"loss": "mae"}, {"init_from": {"weights_sha256": "dd"}}, "config.loss: was 'rmse', now 'mae', and 1 more"),
    ],
)
def test_a_run_of_other_chips_or_another_measure_is_refused_and_both_named(tmp_path, config, inputs, words):
    before = {"batch_size": 4, "loss": "rmse", "data": {"label_max": 2000.0, "path": "a"}}
    saved = HostState(before, step=7, inputs=INPUTS)
    with pytest.raises(CheckpointError) as caught:
        check_same(saved, HostState(before | config, inputs=INPUTS | inputs), tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: can't resume at step 7") and words in said and "overwrite=True" in said


def test_a_run_with_fields_that_an_older_one_lacks_or_another_rate_resumes(tmp_path, caplog):
    before = {"batch_size": 4, "optimizer": {"learning_rate": 0.1}, "data": {"path": "a"}}
    now = {"batch_size": 4, "optimizer": {"learning_rate": 0.2}, "data": {"path": "b", "label_max": 1.0}, "seed": 3}
    check_same(HostState(before, inputs=INPUTS), HostState(now, inputs=INPUTS), tmp_path)
    assert not caplog.records
    check_same(HostState(before), HostState(now, inputs=INPUTS), tmp_path)
    assert "doesn't tell which data it is of; resumed as it is" in caplog.text
    tell_changes(before, now, tmp_path)
    assert "data.path: was 'a', now 'b'" in caplog.text and "label_max" not in caplog.text
