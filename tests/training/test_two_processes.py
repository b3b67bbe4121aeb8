"""A run of two real processes against one process with as many devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from biomass_jax import bundle
from tests.training import world

pytestmark = pytest.mark.slow


def lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_two_devices_do(root, tmp_path):
    shards = world.write(tmp_path / "shards")
    fields = [f"--config.{name}={value!r}" for name, value in world.TINY.items()]
    fields += [f"--config.data.path={shards}", "--config.epochs=2", "--config.optimizer.learning_rate=1e-3"]
    arguments = ["--config", "configs/finetune_all_biomes.py", *fields]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }

    def run(command, devices):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run(command, cwd=root, env=environment | flags, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]

    run(["launch/local.sh", "2", *arguments, "--workdir", str(tmp_path / "two")], devices=1)
    run([sys.executable, "-m", "biomass_jax.main", *arguments, "--workdir", str(tmp_path / "one")], devices=2)
    two, one = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for name in ("train/loss", "val/loss", "val/rmse", "val/r2", "val/n"):
        found, expected = ([line[name] for line in run if name in line] for run in (two, one))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
    best = [bundle.load(tmp_path / name / "best") for name in ("two", "one")]
    assert best[0].meta["training"]["step"] == best[1].meta["training"]["step"]
