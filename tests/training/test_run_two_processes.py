"""A run of two real processes against one process, with as many devices or with one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from biomass_jax import bundle
from tests.runtime.test_processes import free_port
from tests.training import meshes, world
from tests.training.test_run_meshes import assert_same_training, observe, write

pytestmark = pytest.mark.long


def lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_two_devices_do(root, tmp_path):
    shards = world.write(tmp_path / "shards")
    fields = [f"--config.{name}={value!r}" for name, value in world.TINY.items()]
    fields += [f"--config.data.path={shards}", "--config.epochs=2", "--config.optimizer.learning_rate=1e-3"]
    fields += ["--config.data.bootstrap=1"]  # of two tiles one twice
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


@pytest.mark.parametrize(("kind", "mesh"), [("finetune", "1x4"), ("pretrain", "2x2")])
def test_two_processes_with_two_devices_each_train_as_one_device_does(root, tmp_path, kind, mesh):
    folder = write(tmp_path)
    one = observe(root, folder, kind, ("1x1",), devices=1)["1x1"]
    command = [sys.executable, "-m", "tests.training.meshes", str(folder), kind, mesh, f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | meshes.environment(2)
    pair = [subprocess.Popen([*command, str(n)], cwd=root, env=environment, **pipes) for n in range(2)]
    said = [process.communicate(timeout=400)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said[0][-3000:] + said[1][-3000:]
    two = dict(np.load(folder / f"{mesh}.npz"))
    assert_same_training(one, two)
    assert two["split"] > 5
    # A checkpoint of one process resumes in two, and the other way round.
    np.testing.assert_allclose(two["next/1x1"], one["loss/0"][meshes.SAVED], rtol=1e-5)
    here = meshes.World(meshes.config_of(kind, folder / "shards"), 1, 1)
    np.testing.assert_allclose(here.next_loss(folder / mesh)[0], two["loss/0"][meshes.SAVED], rtol=1e-5)
