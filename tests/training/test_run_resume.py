"""The real command: stopped, given again, changed, begun anew; and what a run takes from a bundle."""

import json
import logging
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.bundle import flatten
from biomass_jax.errors import ConfigError
from biomass_jax.training import loop
from biomass_jax.training import run as training
from configs import finetune_all_biomes, finetune_frozen_encoder
from tests.prediction.stubs import random_bundle
from tests.training import world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")


def lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def command(shards, workdir, **fields):
    values = world.TINY | {"data.path": str(shards), "epochs": 3, "optimizer.learning_rate": 1e-3, "seed": 1} | fields
    given = [f"--config.{name}={value if isinstance(value, str) else repr(value)}" for name, value in values.items()]
    config = ["--config", "configs/finetune_all_biomes.py", "--workdir", str(workdir)]
    return [sys.executable, "-m", "biomass_jax.main", *config, *given]


def call(root, *arguments, **fields):
    done = subprocess.run(command(*arguments, **fields), cwd=root, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def stopped(root, shards, tmp_path_factory):
    """A run that SIGTERM stopped after its first line; what it said, and its exit code."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    process = subprocess.Popen(
        command(shards, workdir, epochs=2000), cwd=root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    until = time.monotonic() + 300
    while time.monotonic() < until and not ((workdir / "metrics.jsonl").exists() and lines(workdir)):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    return workdir, process.returncode, said


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_the_same_command_finishes(stopped, root, shards):
    workdir, status, said = stopped
    assert status == 75, said
    assert not (workdir / ".biomass_jax.lock").exists()
    assert "stopping at step" in said and "give the same command again to resume" in said
    (saved,) = {int(path.name[5:]) for path in (workdir / "checkpoints").iterdir()} & {
        int(said.split("stopping at step ")[1].split(":")[0])
    }
    epochs = saved // 5 + 2
    status, said = call(root, shards, workdir, epochs=epochs)
    assert status == 0, said
    assert f"resuming from step {saved} of {5 * epochs}" in said
    assert "another config" not in said  # a run may be made longer or shorter
    found = [line["step"] for line in lines(workdir) if "train/loss" in line]
    assert found == sorted(set(found)) and found[-1] == 5 * epochs

    status, said = call(root, shards, workdir, epochs=epochs, **{"optimizer.weight_decay": 0.5})
    assert status == 0
    assert "the run resumes with another config.optimizer.weight_decay: was 0.03283253068408954, now 0.5" in said

    status, said = call(root, shards, workdir, **{"model.embed_dim": 16})
    assert status == 1
    assert "doesn't fit this config" in said and "start in another workdir" in said and "Traceback" not in said

    status, said = call(root, shards, workdir, epochs=1, overwrite=True)
    assert status == 0 and "resuming" not in said
    assert [line["step"] for line in lines(workdir)] == [2, 4, 5, 5]
    assert bundle.read_meta(workdir / "best")["training"]["step"] == 5


@pytest.mark.slow
def test_a_faulty_field_is_one_line_and_exit_code_1(root, shards, tmp_path):
    status, said = call(root, shards, tmp_path / "run", loss="l2")
    assert status == 1
    assert "config.loss is 'l2'; expected one of rmse, mse, mae, huber" in said
    assert "Traceback" not in said and len(said.splitlines()) <= 2


def test_a_config_that_cannot_run_costs_no_earlier_run(shards, tmp_path):
    (tmp_path / "best").mkdir()
    config = world.configure(finetune_all_biomes.get_config(), data__path=str(shards), epochs=1, overwrite=True)
    config.optimizer.freeze = ("encodr",)
    with pytest.raises(ConfigError):
        training.set_up(config, tmp_path, command="")
    assert (tmp_path / "best").is_dir()


@pytest.fixture(scope="module")
def partial(shards, tmp_path_factory):
    """A frozen encoder from a bundle, averages, a cosine: the loop at its end, its exports, what it said."""
    folder = tmp_path_factory.mktemp("partial")
    loaded = bundle.load(random_bundle(folder / "bundle"))
    config = finetune_frozen_encoder.get_config()
    given = {"init_from": str(loaded.path), "data.path": str(shards), "data.threads": 2, "batch_size": 4, "epochs": 2}
    given |= {"model.decoder_channels": 8}
    given |= {"log_every": 1, "optimizer.ema_decay": 0.8, "optimizer.learning_rate": 0.004, "schedule.kind": "cosine"}
    given |= {"schedule.warmup_epochs": 0.6, "schedule.warmup_from": 0.001, "schedule.min_lr": 0.0005, "draw_every": 0}
    config.update_from_flattened_dict(given)
    said, exported = [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("biomass_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        real = loop.export_best

        def export(workdir, about, state, best):
            exported.append(jax.tree.map(np.array, {"ema": state.ema, "params": state.params}))
            real(workdir, about, state, best)

        patch.setattr(loop, "export_best", export)
        begun = training.set_up(config, folder / "run", command="")
        before = jax.tree.map(np.array, begun.state)
        assert begun.fit(stop=lambda: False)
        begun.close()
    logger.removeHandler(handler)
    logger.setLevel(level)
    return loaded, before, begun, exported, said


@pytest.mark.slow
def test_the_encoder_is_the_bundles_and_stays_so_to_the_bit(partial):
    loaded, before, ended, *_ = partial
    encoder, decoder = (flatten(loaded.variables["params"][name]) for name in ("encoder", "decoder"))
    for state in (before, ended.state):
        for path, value in flatten(state.params["encoder"]).items():
            np.testing.assert_array_equal(value, encoder[path], err_msg=path)
    fresh, trained = flatten(before.params["decoder"]), flatten(ended.state.params["decoder"])
    kernels = [path for path in decoder if path.endswith("kernel")]
    assert all(np.abs(fresh[path] - decoder[path]).max() > 0.01 for path in kernels)  # drawn, not loaded
    assert all(np.abs(trained[path] - fresh[path]).max() > 1e-4 for path in kernels)


@pytest.mark.slow
def test_what_is_loaded_and_what_is_not_is_listed(partial):
    loaded, before, _, _, said = partial
    parts = [path for path in flatten(loaded.variables) if path.startswith("params/encoder/")]
    assert f"{loaded.path}: {len(parts)} of {len(flatten(loaded.variables))} arrays loaded" in said
    variables = {"params": before.params, "batch_stats": before.batch_stats}
    others = [path for path in flatten(variables) if not path.startswith("params/encoder/")]
    for what in ("not loaded, drawn anew: ", "in the bundle, not used: "):
        (line,) = (text for text in said if text.startswith(what))
        assert line.startswith(f"{what}{len(others)} arrays, of decoder/bottleneck, decoder/fpn_bottleneck, ")
        assert line.endswith(" in all)") and len(line) < 200


@pytest.mark.slow
def test_the_best_model_is_the_average(partial):
    _, _, ended, exported, _ = partial
    best = bundle.load(ended.workdir / "best")
    saved, average = flatten(best.variables), flatten(exported[-1]["ema"])
    assert saved.keys() == average.keys()
    for path, value in average.items():
        np.testing.assert_array_equal(saved[path], value, err_msg=path)
    weights = flatten(exported[-1]["params"])
    assert np.abs(saved["params/head/final/kernel"] - weights["head/final/kernel"]).max() > 1e-4
    # Its score is the one that the run chose it by.
    records = [world.make_record("val", index) for index in range(7)]
    images = (np.stack([record["image"] for record in records]).astype(np.float32) - best.means) / best.stds
    labels = np.stack([record["label"] for record in records])
    predictions = np.asarray(jax.jit(best.module().apply)(best.variables, images), np.float64)
    rmse = np.sqrt(((predictions - labels)[labels >= 0] ** 2).mean())
    chosen = min(line["val/loss"] for line in lines(ended.workdir) if "val/loss" in line)
    np.testing.assert_allclose([chosen, best.meta["training"]["scores"]["val/rmse"]], rmse, rtol=1e-5)


@pytest.mark.slow
def test_rates_in_the_lines_are_the_schedules(partial):
    found = [line["train/learning_rate"] for line in lines(partial[2].workdir) if "train/loss" in line]
    rising = [0.001 + t * 0.001 for t in range(3)]  # 0.6 epochs of 5 steps
    falling = [0.0005 + 0.00175 * (1 + np.cos(np.pi * t / 10)) for t in range(3, 10)]
    np.testing.assert_allclose(found, rising + falling, rtol=1e-5)
