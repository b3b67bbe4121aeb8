"""The folder of a run: no second run in it, and none goes on when it is deleted or full."""

import os
import resource
import shutil
import subprocess
import sys
import time

import pytest

from tests.training import world
from tests.training.test_run_resume import command

pytestmark = pytest.mark.slow
FOREVER = 2000  # epochs; equal in both, so that they share compiled programs
# The program under a limit of the size of files, which stands for a full disk.
PROGRAM = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, {resource.RLIM_INFINITY}));"
PROGRAM += "from biomass_jax.main import cli; cli()"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")


def start(root, arguments, **environment):
    return subprocess.Popen(
        arguments,
        cwd=root,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(workdir, *names):
    return {name: (workdir / name).read_bytes() for name in names}


def test_a_second_run_is_refused_and_none_goes_on_without_its_folder(root, shards, tmp_path):
    workdir = tmp_path / "run"
    first = start(root, command(shards, workdir, epochs=FOREVER))
    until = time.monotonic() + 300
    while not (workdir / "best").exists() and first.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    before = contents(workdir, "config.json", ".biomass_jax.lock")

    for more in ({"epochs": 3, "overwrite": True}, {"epochs": 3, "seed": 2}):
        second = start(root, command(shards, workdir, **more))
        _, said = second.communicate(timeout=100)
        assert second.returncode == 1
        (line,) = said.splitlines()
        assert f"{workdir}: another run is at work there: process {first.pid} on {os.uname().nodename} (" in line
        assert contents(workdir, "config.json", ".biomass_jax.lock") == before and (workdir / "best").exists()
    assert first.poll() is None

    workdir.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    began = time.monotonic()
    _, said = first.communicate(timeout=100)
    assert first.returncode == 1, said
    assert time.monotonic() - began < 20  # 10, and patience with a busy machine
    assert f"{workdir}: the folder, or .biomass_jax.lock in it, was deleted under this run" in said
    assert "Traceback" not in said and "stopping at step" not in said


def test_a_disk_that_is_full_ends_the_run_with_its_path(root, shards, tmp_path):
    workdir = tmp_path / "run"
    _, _, _, *arguments = command(shards, workdir, epochs=FOREVER)
    # Programs are read from the cache of the tests, but half a program must not be left there.
    run = start(root, [sys.executable, "-c", PROGRAM, *arguments], JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9")
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert said.splitlines()[-1].endswith(
        f"ERROR {workdir}: can't be written any more: File too large; this run ends here. Make room for it, then give "
        "the same command again"
    )
    assert "Traceback" not in said
    assert not (workdir / ".biomass_jax.lock").exists()
