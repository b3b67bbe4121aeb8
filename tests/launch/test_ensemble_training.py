"""An ensemble of real trainings, interrupted and resumed: minutes on two cores."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.data.blocks import draw_blocks
from biomass_jax.data.sources import open_source
from tests.training import world
from tests.training.runs import lines

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = [f"--config.{name}={value}" for name, value in world.TINY.items()]
FIELDS = ["--config.epochs=3", "--config.seed=11", "--config.optimizer.learning_rate=3e-3", *TINY]


def run(words, **options):
    command = [sys.executable, "-m", "biomass_jax.cli", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, **pipes)


def finish(words):
    process = run(words)
    said = process.communicate(timeout=600)[0]
    return process.returncode, said


@pytest.mark.long
@pytest.mark.timeout(1200)  # three trainings, each with JAX's start and compilation
def test_an_ensemble_interrupted_in_its_second_member_ends_and_shares_its_frozen_encoder(tmp_path):
    shards = world.write(tmp_path / "shards", train=8, val=4, test=2)
    data = [f"--config.data.path={shards}", *FIELDS]
    config = ["--config", "finetune_all_biomes"]
    code, said = finish(["finetune", *config, "--workdir", str(tmp_path / "first"), *data])
    assert code == 0, said
    out = tmp_path / "out"
    words = ["ensemble", "--members", "2", *config, "--workdir", str(out), *data]
    words += [f"--config.init_from={tmp_path / 'first' / 'best'}", "--config.optimizer.freeze=('encoder',)"]
    process, end = run(words), time.monotonic() + 400
    while not (out / "member_1" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 75, said
    assert "[member_0] " in said and not (out / "ensemble").exists()
    before = lines(out / "member_0")
    code, said = finish(words)
    assert code == 0, said
    assert "member_0: is finished" in said and "member_1: resumes" in said and "2 members, one encoder" in said
    assert lines(out / "member_0") == before

    made = bundle.load(out / "ensemble")
    assert bundle.verify(made.path)["values"] < 1e-6
    start = bundle.load(tmp_path / "first" / "best").variables["params"]
    for path, value in bundle.flatten(start["encoder"]).items():
        np.testing.assert_array_equal(bundle.flatten(made.variables["params"]["encoder"])[path], value, err_msg=path)
    heads = [np.asarray(made.variables["params"][f"member_{n}"]["head"]["final"]["kernel"]) for n in range(2)]
    assert len({head.tobytes() for head in (*heads, np.asarray(start["head"]["final"]["kernel"]))}) == 3
    for number, told in enumerate(made.meta["provenance"]["members"]):
        best = bundle.read_meta(out / f"member_{number}" / "best")
        assert (told["weights_sha256"], told["seed"], told["bootstrap"]) == (
            best["weights_sha256"],
            11 + number,
            number + 1,
        )
        chips = len(draw_blocks(open_source(shards, "train"), number + 1))
        assert lines(out / f"member_{number}")[-1]["step"] == 3 * (chips // 4)
