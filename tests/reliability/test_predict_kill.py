"""Prediction runs that are killed, stopped, or out of disk: nothing half-written, and the same map in the end."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from biomass_jax.data.raster.image import read_tags
from biomass_jax.data.raster.tiff import verify_blocks
from tests.prediction.stubs import coded_image, random_bundle, read_map, write_raster

pytestmark = pytest.mark.slow

# The program under a limit of the size of files, which stands for a full disk.
PROGRAM = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from biomass_jax.main import cli
cli()
"""
MAP = "scene_agbd.tif"
HEIGHT, WIDTH = 1500, 600  # three bands of 512 rows: the first is on disk long before the last


@pytest.fixture(scope="module")
def setting(tmp_path_factory, root):
    """Function that starts the program in a workdir, and the map of an unbroken run."""
    folder = tmp_path_factory.mktemp("predict")
    model = random_bundle(folder / "bundle")
    scene = write_raster(folder / "scene.tif", coded_image(HEIGHT, WIDTH))

    def start(workdir: Path, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
        arguments = [
            *(sys.executable, "-c", PROGRAM, str(limit), "--config", "configs/predict.py", "--workdir", str(workdir)),
            *(f"--config.bundle={model}", f"--config.inputs={scene}", "--config.tile=64", "--config.stride=48"),
        ]
        return subprocess.Popen(arguments, cwd=root, stderr=subprocess.PIPE, text=True)

    whole = folder / "whole"
    assert finish(start(whole))[0] == 0
    return start, whole / MAP


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def half_way(process: subprocess.Popen, workdir: Path) -> None:
    """Wait until rows are on disk."""
    partial = workdir / f".{Path(MAP).stem}.partial.tif"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if partial.exists() and partial.stat().st_size > 100_000:
            return
        assert process.poll() is None, f"ended before it was half-way: {process.communicate()[1]}"
        time.sleep(0.005)
    raise AssertionError("no rows on disk after two minutes")


def left(workdir: Path) -> set[str]:
    return {path.name for path in workdir.iterdir()} - {
        "config.json",
        ".biomass_jax.lock",
    }  # of a killed run, or one at work


def same(ours: Path, whole: Path) -> None:
    np.testing.assert_array_equal(read_map(ours), read_map(whole))
    assert read_tags(ours) == read_tags(whole)
    verify_blocks(ours)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ended_half_way_and_started_again_makes_the_same_map(setting, tmp_path, sign):
    start, whole = setting
    process = start(tmp_path)
    half_way(process, tmp_path)
    process.send_signal(sign)
    status, said = finish(process)
    assert MAP not in left(tmp_path)
    if sign == signal.SIGTERM:
        assert status == 75
        assert "stopped by SIGTERM" in said
        assert "Traceback" not in said
        assert left(tmp_path) == set()
    assert (tmp_path / ".biomass_jax.lock").exists() == (sign == signal.SIGKILL)
    status, said = finish(start(tmp_path))
    assert status == 0, said
    assert left(tmp_path) == {MAP}
    same(tmp_path / MAP, whole)
    status, said = finish(start(tmp_path))
    assert (status, "0 maps written in 0 s, 1 finished before" in said) == (0, True)


@pytest.mark.parametrize("share", [0.1, 0.9])  # the working copy breaks off early, or the COG late
def test_a_full_disk_fails_loudly_and_leaves_no_map(setting, tmp_path, share):
    start, whole = setting
    limit = int(os.path.getsize(whole) * share)
    process = start(tmp_path, limit)
    status, said = finish(process)
    assert status == 1
    assert "scene.tif" in said
    assert "1 of 1 inputs failed" in said
    assert left(tmp_path) == set()


def test_one_run_at_a_time_and_none_without_its_folder(setting, tmp_path):
    start, _ = setting
    process = start(tmp_path / "maps")
    half_way(process, tmp_path / "maps")
    process.send_signal(signal.SIGSTOP)  # it waits here for the second one, and lives
    before = left(tmp_path / "maps")
    status, said = finish(start(tmp_path / "maps"))
    assert status == 1
    assert f"{tmp_path / 'maps'}: another run is at work there: process {process.pid} on " in said
    assert len(said.splitlines()) == 1
    assert left(tmp_path / "maps") == before
    (tmp_path / "maps").rename(tmp_path / "gone")
    process.send_signal(signal.SIGCONT)
    status, said = finish(process)
    assert status == 1
    assert f"{tmp_path / 'maps'}: the folder, or .biomass_jax.lock in it, was deleted under this run" in said
