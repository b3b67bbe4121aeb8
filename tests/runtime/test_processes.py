"""Processes of a run: where they are looked for, and what real ones do. Those run on CPU, over gloo."""

import contextlib
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from biomass_jax.errors import DistributedError
from biomass_jax.runtime import processes as distributed
from biomass_jax.runtime.processes import ALONE, AUTOMATIC, check_flags, find_cluster

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
CLUSTER = re.compile("SLURM|OMPI|TPU|MEGASCALE|KUBERNETES|JOB_COMPLETION|JAX_COORD|GCE")


@pytest.fixture
def packages(monkeypatch):
    """Names of optional packages that seem to be installed; add to it."""
    names: set[str] = set()
    monkeypatch.setattr(distributed, "installed", lambda name: name in names)
    return names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "--process_count and --process_id not given"),
        ((None, 2, None), "--coordinator and --process_id not given"),
        ((None, None, 1), "--coordinator and --process_count not given"),
        (("h:1", 2, None), "--process_id not given"),
        (("h:1", 2, 2), "--process_id is 2; expected 0 to 1"),
        (("h:1", 2, -1), "--process_id is -1"),
        ((None, 1, 1), "--process_id is 1; expected 0 to 0"),
        (("h:1", 0, 0), "--process_count is 0"),
        (("h", 2, 0), "--coordinator is 'h'; expected HOST:PORT"),
        (("h:x", 2, 0), "--coordinator is 'h:x'; expected HOST:PORT"),
    ],
)
def test_flags_that_contradict_each_other(arguments, message):
    with pytest.raises(DistributedError, match=re.escape(message)):
        check_flags(*arguments)


def test_flags_that_fit():
    assert check_flags("10.0.0.1:8476", 4, 3) and check_flags("[::1]:8476", 2, 0)
    assert not check_flags(None, None, None)
    assert not check_flags(None, 1, None)  # alone wherever it is
    assert not check_flags("h:1", 1, 0)


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, ALONE),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ALONE),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # a shell inside a job of two tasks
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, ALONE),  # a batch script without srun
        (OPEN_MPI, "ompi"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ALONE),
        (OPEN_MPI | SLURM, "ompi"),  # mpirun inside a Slurm job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ALONE),  # a pod of its own
        ({"JOB_COMPLETION_INDEX": "0"}, ALONE),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ALONE),  # no TPU here
    ],
)
def test_clusters_are_known_by_their_variables(environment, cluster, packages):
    assert find_cluster(environment) == cluster


def test_open_mpi_5_needs_mpi4py(packages):
    environment = {k: v for k, v in OPEN_MPI.items() if "URI" not in k.upper()}
    with pytest.raises(DistributedError, match="install mpi4py, or give --coordinator"):
        find_cluster(environment)
    packages.add("mpi4py")
    assert find_cluster(environment) == "mpi4py"


def test_indexed_jobs_of_kubernetes_need_its_package_or_flags(packages):
    with pytest.raises(DistributedError, match="--process_count=1 if this pod is to run alone"):
        find_cluster(POD)
    packages.add("kubernetes")
    assert find_cluster(POD) == AUTOMATIC


def test_a_variable_that_is_no_number():
    with pytest.raises(DistributedError, match="SLURM_NTASKS='two'"):
        find_cluster(SLURM | {"SLURM_NTASKS": "two"})


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, AUTOMATIC),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, AUTOMATIC),
        ({"TPU_WORKER_HOSTNAMES": "localhost"} | POD, ALONE),  # one pod with all its chips
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, AUTOMATIC),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, ALONE),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ALONE),
    ],
)
def test_tpu_slices_on_kubernetes(environment, cluster, packages, monkeypatch):
    monkeypatch.setattr(distributed, "has_tpu", lambda: True)
    assert find_cluster(environment) == cluster


@contextlib.contextmanager
def metadata_server(attributes):
    """Google's metadata as a TPU VM sees it; gives HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.rpartition("/")[2])
            self.send_response(200 if text is not None and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("attributes", "cluster"),
    [
        ({"worker-network-endpoints": "u:0:10.0.0.2"}, ALONE),
        ({"worker-network-endpoints": "u:0:10.0.0.2,u:1:10.0.0.3"}, AUTOMATIC),
        ({"worker-network-endpoints": "a", "tpu-env": "X: '1'\nMEGASCALE_NUM_SLICES: '2'\n"}, AUTOMATIC),
        ({"worker-network-endpoints": "a", "tpu-env": "X: '1'\n"}, ALONE),
        ({}, ALONE),  # a machine that is no TPU VM
    ],
)
def test_tpu_vms_are_asked_by_their_metadata(attributes, cluster, packages, monkeypatch):
    monkeypatch.setattr(distributed, "has_tpu", lambda: True)
    with metadata_server(attributes) as address:
        assert find_cluster({"GCE_METADATA_IP": address}) == cluster


def test_nobody_waits_for_metadata_that_never_come(packages, monkeypatch):
    monkeypatch.setattr(distributed, "has_tpu", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert find_cluster({"GCE_METADATA_IP": f"127.0.0.1:{silent.getsockname()[1]}"}) == ALONE
    assert time.monotonic() - began < 2.5


def environment(**more):
    """This process's environment without signs of a cluster."""
    kept = {name: value for name, value in os.environ.items() if not CLUSTER.search(name)}
    return kept | {"JAX_PLATFORMS": "cpu"} | more


@pytest.fixture
def python():
    """Start `python -c CODE ARGUMENTS`; what still runs at the end is killed."""
    started = []

    def start(code, *arguments, **more):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment(**more), **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_laptop_starts_without_jax_and_without_the_network(python):
    code = """
import socket, sys
socket.socket.connect = lambda *_: sys.exit("connected")
from biomass_jax.runtime import processes as distributed
distributed.start(); distributed.start(process_count=1)
distributed.finish(); distributed.abandon(3)
print("jax" in sys.modules, distributed.place())
"""
    out, _ = (process := python(code)).communicate(timeout=60)
    assert (process.returncode, out) == (0, "False (0, 1)\n")


JOIN = """
import logging, os, signal, sys, time
import numpy as np
logging.basicConfig(format="%(message)s", level=logging.INFO)
from biomass_jax.runtime import processes as distributed
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM is ours", flush=True))
address, number = sys.argv[1], int(sys.argv[2])
distributed.start(*((address, 2, number) if address != "found" else ()))
os.kill(os.getpid(), signal.SIGTERM)
distributed.STOP_EVERY = 1
def agree_to_stop(mine):
    return distributed.AgreedStop(lambda: mine)()
"""
AGREE = """
assert distributed.place() == (number, 2)
for mine in ((False, False), (False, True), (True, False)):
    print(agree_to_stop(mine[number]), flush=True)
calls = 0
def stop():
    global calls
    calls += 1
    return number == 1 and calls >= 4
distributed.STOP_EVERY = 3
together = distributed.AgreedStop(stop)
print([together() for _ in range(6)], flush=True)
distributed.finish()
os._exit(75)
"""
AGREED = ["SIGTERM is ours", "False", "True", "True", str([False] * 5 + [True])]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def check_agreed(pair):
    for number, process in enumerate(pair):
        out, _ = process.communicate(timeout=120)
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert process.returncode == 75, out
        assert f"process {number} of 2, cpu:" in lines[-len(AGREED) - 1], out
        assert lines[-len(AGREED) :] == AGREED, out


def test_two_processes_join_by_flags_and_stop_together(python):
    address = f"127.0.0.1:{free_port()}"
    check_agreed([python(JOIN + AGREE, address, number) for number in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("common", "rank", "local"),
    [(SLURM, "SLURM_PROCID", "SLURM_LOCALID"), (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")],
    ids=["slurm", "open_mpi"],
)
def test_two_processes_join_by_the_variables_of_a_cluster(python, common, rank, local):
    more = [common | {rank: str(number), local: str(number)} for number in range(2)]
    port = str(free_port())
    check_agreed([python(JOIN + AGREE, "found", n, JAX_COORDINATOR_PORT=port, **more[n]) for n in range(2)])


LOSE = """
if number == int(sys.argv[3]):
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] == "idle":
    time.sleep(90)
try:
    for _ in range(1000):
        time.sleep(0.1)
        agree_to_stop(False)
except Exception as error:
    logging.error("lost: %s", error)
    distributed.abandon(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1], ids=["coordinator", "other"])
def test_a_lost_process_ends_the_other_within_a_minute(python, lost):
    pairs = {}
    for busy in ("idle", "working"):  # at the same time: half a minute goes by before a process is missed
        address = f"127.0.0.1:{free_port()}"
        pairs[busy] = [python(JOIN + LOSE, address, number, lost, busy) for number in range(2)]
    for pair in pairs.values():
        pair[lost].communicate(timeout=120)
        assert pair[lost].returncode == -signal.SIGKILL
    began = time.monotonic()
    for busy, pair in pairs.items():
        out, _ = pair[1 - lost].communicate(timeout=120)
        assert time.monotonic() - began < 60, busy
        assert pair[1 - lost].returncode not in (0, 75), busy
        assert "Terminating process because the JAX distributed service" in out or (
            f"process {1 - lost} of 2 ends here" in out and "lost: " in out
        ), busy


def test_a_failed_process_leaves_at_once(python):
    code = """
agree_to_stop(False)
if number == 1:
    distributed.abandon(7)
try:
    agree_to_stop(False)
except Exception:
    distributed.abandon(8)
"""
    address = f"127.0.0.1:{free_port()}"
    pair = [python(JOIN + code, address, number) for number in range(2)]
    pair[1].communicate(timeout=60)
    began = time.monotonic()
    out, _ = pair[0].communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert [process.returncode for process in pair] == [8, 7]
    assert "process 0 of 2 ends here, and the others within a minute" in out
