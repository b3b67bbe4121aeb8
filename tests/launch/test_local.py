"""`launch/local.sh`, run for real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biomass_jax.errors import UsageError
from launch import local

PROGRAM = """
import os, signal, sys, time
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
number = int(flags["process_id"])
print("started", number, "of", flags["process_count"], flush=True)
"""

# The launcher forks this process, which holds JAX where another test has loaded it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@pytest.fixture
def launch(root):
    """Start `launch/local.sh COUNT -- python -c PROGRAM + CODE`; what still runs at the end is ended."""
    started = []

    def start(count, code, **environment):
        command = [str(root / "launch" / "local.sh"), str(count), "--", sys.executable, "-c", PROGRAM + code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | environment
        started.append(subprocess.Popen(command, env=environment, cwd="/", **pipes))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate()


def test_a_killed_process_is_named_and_the_other_ended(launch):
    began = time.monotonic()
    process = launch(2, "if number == 1: time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)")
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 8
    assert process.returncode == 128 + signal.SIGKILL
    assert error == "[launch] process 1 of 2 was killed by signal 9 (SIGKILL); ending the other 1\n"
    assert sorted(out.splitlines()) == ["[0] started 0 of 2", "[1] started 1 of 2"]


def test_a_failed_process_gives_its_exit_code(launch):
    process = launch(2, "if number == 0: sys.exit(3)\ntime.sleep(100)")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "process 0 of 2 ended with exit code 3; ending the other 1" in error


def test_processes_that_finish_give_0(launch):
    process = launch(3, "time.sleep(0.2 * number)\nprint('last', number)")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out.splitlines()[-1] == "[2] last 2"


def test_sigterm_is_handed_on_and_75_passed_on(launch):
    code = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3 * number), print("saved", flush=True), os._exit(75)))
print("ready", flush=True)
time.sleep(100)
"""
    process = launch(2, code)
    lines = [process.stdout.readline() for _ in range(4)]
    assert sorted(lines)[0] == "[0] ready\n"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.splitlines() == ["[0] saved", "[1] saved"]
    assert error.startswith("[launch] process 0 of 2 ended with exit code 75 (stopped, can be resumed)")


def test_a_process_that_ignores_sigterm_is_killed(launch, monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.5)
    code = """
if number == 0:
    time.sleep(0.5)
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
"""
    began = time.monotonic()
    assert local.main(["2", "--", sys.executable, "-c", PROGRAM + code]) == 1
    assert time.monotonic() - began < 8


def running(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # a zombie's is empty
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell a process of its parent's end")
def test_a_killed_launcher_takes_its_processes_with_it(launch):
    process = launch(2, "print('pid', os.getpid(), flush=True)\ntime.sleep(100)")
    lines = [process.stdout.readline() for _ in range(4)]
    pids = [int(line.split()[-1]) for line in lines if " pid " in line]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(pids) == 2


def test_a_run_is_what_a_config_names():
    assert local.parse(["2", "--config", "c"]) == (2, [sys.executable, "-m", "biomass_jax.main", "--config", "c"])


@pytest.mark.parametrize("argv", [[], ["2"], ["0", "--config"], ["two", "--config"], ["2", "--"]])
def test_a_command_line_that_cannot_run(argv, capsys):
    assert local.main(argv) == 2
    assert capsys.readouterr().err.startswith("usage: launch/local.sh N --config")


def test_one_gpu_a_process(monkeypatch, capsys):
    assert local.choose_gpus(2, {"CUDA_VISIBLE_DEVICES": "4,5,6"}) == ["4", "5"]
    assert local.choose_gpus(2, {"CUDA_VISIBLE_DEVICES": "4,5", "JAX_PLATFORMS": "cpu"}) == []
    assert local.choose_gpus(2, {"CUDA_VISIBLE_DEVICES": ""}) == []
    with pytest.raises(UsageError, match="3 processes, but 2 GPUs"):
        local.choose_gpus(3, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_gpus_are_counted_by_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert local.choose_gpus(2, {}) == ["0", "1"]


def test_processes_go_on_where_nobody_listens(launch, tmp_path):
    """As when the terminal is closed: more lines than a pipe holds."""
    done = tmp_path / "done"
    process = launch(1, f"time.sleep(0.5)\nfor _ in range(20_000): print('a line')\nopen({str(done)!r}, 'w').close()")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=30) == 0
    assert done.exists()
    process.stdout = process.stderr = None
