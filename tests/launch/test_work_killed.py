"""Real processes that are killed and stopped: every item is finished once, and maps are those of `predict`."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.work.__main__ import simulate
from launch.work_table import Table, listed
from tests.prediction.stubs import coded_image, random_bundle, write_raster

HEIGHT, WIDTH = 600, 400  # long enough under way to be killed there


@pytest.mark.parametrize(
    ("items", "workers"),
    [pytest.param(300, 8, marks=pytest.mark.slow), pytest.param(10_000, 8, marks=pytest.mark.long)],
)
def test_items_are_finished_once_whoever_is_killed(tmp_path, items, workers):
    """5 % of the items have their worker killed: before their work, after it, or once they are finished."""
    played = simulate(tmp_path / "table", items, workers=workers, kills=0.05)
    table = Table(tmp_path / "table")
    assert sorted(mark.number for mark in table.marks("done")) == list(range(items))
    assert not [*table.marks("waiting"), *table.marks("failed"), *table.workers()]
    assert played.starts == workers + played.kills and 0.02 * items < played.kills < 0.09 * items
    assert played.twice == 0  # none was begun again once it was done
    assert set(played.did) == set(range(items))
    assert not [n for n, times in played.did.items() if times > 1 + played.killed[n]]
    for mark in table.marks("done"):
        assert mark.tries == 1 + played.killed[mark.number]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, root):
    """A model, four images, and their maps by `predict` in one process."""
    folder = tmp_path_factory.mktemp("work")
    random_bundle(folder / "model")
    for number in range(4):
        write_raster(folder / "scenes" / f"s{number}.tif", coded_image(HEIGHT, WIDTH) % (9001 + number))
    done = command(folder, "predict", "--workdir", "whole", *settings())
    assert done.wait(timeout=300) == 0
    return folder


def settings():
    return ["--bundle", "model", "--inputs", "scenes", "--tile", "64", "--stride", "48", "--quicklook"]


def command(folder, *words):
    """A command of ours in a process; its log goes to a file of its number."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "JAX_LOG_COMPILES": "1"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "biomass_jax.cli", *words],
            **{"cwd": folder, "env": environment, "stdout": log, "stderr": subprocess.STDOUT},
        )
    (folder / "log").rename(folder / f"{process.pid}.log")
    return process


def made(folder, name):
    """A table over the images; its folder, and that of its maps."""
    process = command(folder, "work", "make", f"table_{name}", "--out", f"maps_{name}", *settings())
    assert process.wait(timeout=300) == 0, log_of(folder, process)
    return folder / f"table_{name}", folder / f"maps_{name}"


def log_of(folder, process):
    return (folder / f"{process.pid}.log").read_text()


def wait_for(what, *processes):
    deadline = time.monotonic() + 200
    while not what():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.005)


def under_way(maps, process):
    """Whether a worker has rows of a map on its disk."""
    found = maps.glob(f".work_*/*-{process.pid}-*/*/.*.partial.tif")
    return any(path.stat().st_size > 20_000 for path in found)


def same_as_predict(maps):
    """Whether the same files with the same bytes lie there as `predict` has made in one process."""
    whole = maps.parent / "whole"
    names = sorted(path.name for path in whole.glob("*_agbd*"))
    assert len(names) == 8
    assert sorted(path.name for path in maps.iterdir() if path.name != ".jax_cache") == names
    for name in names:
        assert (maps / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_maps_of_workers_that_are_killed_and_stopped_are_those_of_predict(folder):
    table, maps = made(folder, "killed")
    killed, stopped = (command(folder, "work", "run", table.name, "--share", f"{number}/2") for number in range(2))
    wait_for(lambda: under_way(maps, killed), killed)
    killed.kill()
    killed.wait()
    wait_for(lambda: under_way(maps, stopped), stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 75
    assert "stopped by SIGTERM; what was taken waits again" in log_of(folder, stopped)
    before = Table(table).rows()
    # What the first had taken is lost, or found by the second and given back.
    assert {(row.state, row.tries) for row in before} <= {("done", 1), ("lost", 1), ("waiting", 0), ("waiting", 1)}
    assert {row.tries for row in before if row.state != "done"} >= {1}

    last = command(folder, "work", "run", table.name)
    assert last.wait(timeout=300) == 0, log_of(folder, last)
    same_as_predict(maps)
    assert [row.tries for row in Table(table).rows()] == [row.tries + (row.state != "done") for row in before]
    for worker in (stopped, last):  # once for all of its maps
        assert len(re.findall(r"Compiling jit\(_predict\)", log_of(folder, worker))) == 1


@pytest.mark.long
def test_dask_starts_a_worker_anew_that_is_lost(folder):
    pytest.importorskip("distributed")
    table, maps = made(folder, "dask")
    engine = command(folder, "work", "run", table.name, "--workers", "2")
    taken = table / "taken"
    wait_for(lambda: any(map(listed, taken.iterdir())), engine)
    victim = next(path for path in taken.iterdir() if listed(path))
    os.kill(int(victim.name.split("-")[-2]), signal.SIGKILL)
    assert engine.wait(timeout=400) == 0, log_of(folder, engine)
    same_as_predict(maps)
    assert max(row.tries for row in Table(table).rows()) == 2
    assert not list(table.glob("stop_*"))


@pytest.mark.long
def test_dasks_workers_finish_what_they_have_when_it_is_stopped(folder):
    pytest.importorskip("distributed")
    table, _ = made(folder, "dask_stopped")
    engine = command(folder, "work", "run", table.name, "--workers", "1")
    wait_for(lambda: any(map(listed, (table / "taken").iterdir())), engine)
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(timeout=120) == 75, log_of(folder, engine)
    assert {(row.state, row.tries) for row in Table(table).rows()} == {("done", 1), ("waiting", 0)}
    assert not list(table.glob("stop_*")) and not list((table / "taken").iterdir())
