"""Zero-shot scores by one command: the whole set, one biome, several devices, several processes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.evaluation.worlds import write_world
from tests.prediction.stubs import random_bundle

SCORES = ("n", "rmse", "mae", "bias", "r2", "rmse_low", "rmse_high")

# Two processes of two devices each, as a cluster would start them.
PROCESS = """
import sys
from pathlib import Path
import jax
index, port, bundle, data, out = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
from biomass_jax.evaluation.evaluate import run
from biomass_jax.runtime.mesh import local_placement
from tests.evaluation.worlds import make_config
fields = {"batch_size": 3, "figures.chips": ("10SFF_0", "36NXF_6")}
run(make_config(bundle, data, **fields), Path(out), shardings=local_placement)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return random_bundle(folder / "tiny"), write_world(folder / "shards")


def program(root, workdir, *fields, **environment):
    command = [sys.executable, "-m", "biomass_jax.main", "--config", "configs/evaluate.py", "--workdir", str(workdir)]
    done = subprocess.run(
        [*command, *fields], cwd=root, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )
    return done.returncode, done.stderr


def test_a_missing_field_is_one_line(root, tmp_path):
    status, said = program(root, tmp_path)
    assert status == 1
    assert "config.bundle is not given; add --config.bundle=PATH, the model bundle's folder" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def plain(given, root, tmp_path_factory):
    """All chips on one device."""
    workdir = tmp_path_factory.mktemp("plain")
    status, said = program(
        root, workdir, f"--config.bundle={given[0]}", f"--config.data.path={given[1]}", "--config.block_km=2"
    )
    assert status == 0, said
    return json.loads((workdir / "metrics.json").read_text()), said, workdir


@pytest.mark.slow
def test_all_biomes_and_one_biome_are_a_command_each(given, plain, root, tmp_path):
    found, said, workdir = plain
    assert found["rmse_low"] < found["rmse"] < found["rmse_high"]
    assert f"all                     {found['rmse']:>8.2f}" in said
    assert {"binwise_rmse.csv", "scores.csv", "chips.png", "density_scatter.png", "config.json"} <= {
        path.name for path in workdir.iterdir()
    }
    fields = (
        f"--config.bundle={given[0]}",
        f"--config.data.path={given[1]}",
        "--config.block_km=2",
        "--config.data.biome=taiga",
    )
    status, said = program(root, tmp_path, *fields, "--config.figures.chips=('10SFF_1',)", "--config.batch_size=2")
    assert status == 0, said
    one = json.loads((tmp_path / "metrics.json").read_text())
    (row,) = [row for row in found["tables"] if (row["table"], row["group"]) == ("biome", "taiga")]
    for score in ("n", "rmse", "mae", "bias", "r2"):
        assert one[score] == pytest.approx(row[score], rel=1e-5), score
    assert one["interval"]["is"] == f"none: {row['no_interval']}" == "none: 3 blocks with labels; it takes 5"


@pytest.mark.slow
def test_four_devices_score_as_one(given, plain, root, tmp_path):
    fields = (
        f"--config.bundle={given[0]}",
        f"--config.data.path={given[1]}",
        "--config.block_km=2",
        "--config.batch_size=3",
    )
    status, said = program(
        root, tmp_path, *fields, XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    )
    assert status == 0, said
    assert "batch_size 3 becomes 4: 4 devices" in said
    four = json.loads((tmp_path / "metrics.json").read_text())
    for score in SCORES:
        assert four[score] == pytest.approx(plain[0][score], rel=1e-5), score


@pytest.mark.slow
def test_two_processes_score_as_one(given, plain, root, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(root),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), str(port), *map(str, given), str(tmp_path)],
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [run.communicate(timeout=500)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    two = json.loads((tmp_path / "metrics.json").read_text())
    for score in SCORES:
        assert two[score] == pytest.approx(plain[0][score], rel=1e-5), score
    assert [row["group"] for row in two["tables"]] == [row["group"] for row in plain[0]["tables"]]
    assert (tmp_path / "chips.png").is_file()  # one chip of each process
