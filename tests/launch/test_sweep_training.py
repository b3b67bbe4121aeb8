"""A sweep of real trainings, killed half-way: minutes on two cores."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="sweeps need the extra 'sweep'")

from tests.training import world  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
SPACE = """
from optuna.distributions import FloatDistribution

def get_space():
    return {"optimizer.learning_rate": FloatDistribution(1e-3, 1e-2, log=True)}
"""
TINY = [f"--config.{name}={value}" for name, value in world.TINY.items()]


@pytest.mark.long
@pytest.mark.timeout(1200)  # five trainings, each with JAX's start and compilation
def test_a_sweep_of_trainings_killed_half_way_ends_and_its_best_config_runs(tmp_path):
    shards = world.write(tmp_path / "shards", train=8, val=4, test=0)
    (tmp_path / "space.py").write_text(SPACE)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.sweep", "--config", "configs/demo_finetune.py"]
    command += ["--space", str(tmp_path / "space.py"), "--workdir", str(out), "--trials", "3", "--parallel", "2"]
    command += [f"--config.data.path={shards}", "--config.epochs=3", "--config.checkpoint.keep=1", *TINY]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 300
    while not any("val/loss" in path.read_text() for path in out.glob("trials/*/metrics.jsonl")):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    first.kill()
    first.communicate()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert re.search(r"trial [01] resumes", again.stderr)
    assert "3 trials finished, 0 pruned, 0 failed" in again.stderr
    assert len(again.stdout.splitlines()) == 4

    best = again.stdout.splitlines()[1].split()
    config = runpy.run_path(str(out / "best_config.py"))["get_config"]()
    assert f"{config.optimizer.learning_rate:.4g}" == best[4]
    workdir = tmp_path / "best"
    run = [sys.executable, "-m", "biomass_jax.main", "--config", str(out / "best_config.py"), "--workdir", str(workdir)]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    metrics = (workdir / "metrics.jsonl").read_text()
    losses = [float(loss) for loss in re.findall(r'"val/loss": ([\d.e+-]+)', metrics)]
    assert min(losses) == pytest.approx(float(best[2]), rel=1e-4)  # the same seed: the trial over again
