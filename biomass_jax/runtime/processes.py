"""Several processes as one run: how they start, exchange bytes and numbers, stop together, and wait for none lost.

The work is done by `jax.distributed`; here is the decision whether to call it, and with which time limits. Importing
this module doesn't start JAX: a process that is alone needs none of it.
"""

import importlib.util
import logging
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.errors import DistributedError, name_list

log = logging.getLogger(__name__)

# A process that is silent for so long is lost, and the runtime ends the others.
HEARTBEAT_SECONDS = 30
# Processes that were asked to stop leave together; one that doesn't come is not waited for.
LEAVE_SECONDS = 60.0
# Steps between two questions whether to stop. One takes a few milliseconds and lets the devices run dry for as long; of
# steps of up to a second, ten fit well into the half minute that a preempted machine has left.
STOP_EVERY = 10

METADATA_HOST = "169.254.169.254"  # of every Google Cloud machine, answered by the machine's own host
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # as JAX needs them

ALONE, AUTOMATIC = "alone", "automatic"

_place: tuple[int, int] | None = None  # number of this process, number of processes, once it has joined


def start(coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes of the run, where there are any. To be called before anything asks JAX for its devices.

    With no argument a cluster is looked for, by its environment variables: Open MPI, Slurm, TPU slices (on Google Cloud
    machines with TPUs, by the machine's metadata), indexed Kubernetes jobs. One of a single process is none. With
    `process_count=1` this process runs alone wherever it is.

    Args:
        coordinator: HOST:PORT at which process 0 can be reached by all; the port must be free there.
        process_count: processes of the run.
        process_id: number of this one, from 0 on.

    Raises:
        DistributedError: arguments that contradict each other, or a cluster that can't be joined as it is.
    """
    global _place
    arguments: dict[str, Any] = {}
    if check_flags(coordinator, process_count, process_id):
        arguments = {"coordinator_address": coordinator, "num_processes": process_count, "process_id": process_id}
    else:
        cluster = ALONE if process_count == 1 else find_cluster(os.environ)
        if cluster == ALONE:
            return
        if cluster != AUTOMATIC:
            arguments = {"cluster_detection_method": cluster}
    import jax

    # JAX would take SIGTERM for itself; the run has its own answer to it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    _place = jax.process_index(), jax.process_count()
    log.info("process %d of %d, %s", *_place, name_list(map(str, jax.local_devices()), 8))


def place() -> tuple[int, int]:
    """Number of this process and number of processes, (0, 1) where it is alone; doesn't start JAX."""
    return _place or (0, 1)


def check_flags(coordinator: str | None, process_count: int | None, process_id: int | None) -> bool:
    """Whether the processes are given explicitly.

    Raises:
        DistributedError: only some of the arguments are given, or numbers out of range.
    """
    if process_count is not None and process_count < 1:
        raise DistributedError(f"--process_count is {process_count}; expected a number from 1 on")
    if process_id is not None and not 0 <= process_id < (process_count or process_id + 1):
        raise DistributedError(f"--process_id is {process_id}; expected 0 to {(process_count or 1) - 1}")
    if process_count == 1:
        return False
    given = {"--coordinator": coordinator, "--process_count": process_count, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return False
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} not given; --coordinator, --process_count, --process_id go together"
        )
    host, _, port = str(coordinator).rpartition(":")
    if not (host and port.isdigit()):
        raise DistributedError(f"--coordinator is {coordinator!r}; expected HOST:PORT, as 10.0.0.1:8476")
    return True


def find_cluster(environment: Mapping[str, str]) -> str:
    """What this process is part of: ALONE, AUTOMATIC or a `cluster_detection_method` of `jax.distributed.initialize`.

    Raises:
        DistributedError: a cluster in which JAX can't find the other processes by itself.
    """
    for find in (_open_mpi, _slurm, _tpu, _kubernetes):
        if found := find(environment):
            return found
    return ALONE


def _open_mpi(environment: Mapping[str, str]) -> str | None:
    if _number(environment, "OMPI_COMM_WORLD_SIZE") <= 1:
        return None
    if installed("mpi4py"):
        return "mpi4py"
    if "OMPI_MCA_orte_hnp_uri" in environment:  # Open MPI up to 4 says where process 0 is
        return "ompi"
    raise DistributedError(
        f"Open MPI runs {environment['OMPI_COMM_WORLD_SIZE']} processes, but from version 5 on doesn't say where the "
        "first is; install mpi4py, or give --coordinator=HOST:PORT --process_count=$OMPI_COMM_WORLD_SIZE "
        "--process_id=$OMPI_COMM_WORLD_RANK"
    )


def _slurm(environment: Mapping[str, str]) -> str | None:
    if any(name not in environment for name in SLURM):
        return None
    # A shell inside a job may carry the job's number of tasks, but its own step has one.
    tasks = _number(environment, "SLURM_NTASKS")
    return "slurm" if min(tasks, _number(environment, "SLURM_STEP_NUM_TASKS", default=tasks)) > 1 else ALONE


def _tpu(environment: Mapping[str, str]) -> str | None:
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu") or not has_tpu():
        return None
    slices = _number(environment, "MEGASCALE_NUM_SLICES")
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))  # set by GKE
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in environment:  # JAX's own sign that there is nobody to ask
        hosts = metadata("worker-network-endpoints", environment)
        if hosts is not None:
            said = re.search(r"^MEGASCALE_NUM_SLICES:\W*(\d+)", metadata("tpu-env", environment) or "", re.M)
            slices = max(slices, int(said[1]) if said else 1)
    if hosts is None:
        return None
    return AUTOMATIC if len(hosts.split(",")) > 1 or slices > 1 else ALONE


def _kubernetes(environment: Mapping[str, str]) -> str | None:
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    if installed("kubernetes"):
        return AUTOMATIC
    raise DistributedError(
        "this pod is one of an indexed Kubernetes job; install jax[k8s] so that JAX finds the others, or give "
        "--coordinator=HOST:PORT --process_count=PODS --process_id=$JOB_COMPLETION_INDEX (launch/README.md), or "
        "--process_count=1 if this pod is to run alone"
    )


def installed(package: str) -> bool:
    """Whether a package can be imported; doesn't import it."""
    return importlib.util.find_spec(package) is not None


def has_tpu() -> bool:
    """Whether TPU devices and their driver are on this machine; doesn't start JAX."""
    devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) and installed("libtpu")


def metadata(name: str, environment: Mapping[str, str]) -> str | None:
    """An attribute of a Google Cloud machine; None where it has none, or where nobody answers within a second."""
    host = environment.get("GCE_METADATA_IP", METADATA_HOST)
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=1.0) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def _number(environment: Mapping[str, str], name: str, *, default: int = 1) -> int:
    text = environment.get(name, str(default))
    if not text.strip().isdigit():
        raise DistributedError(f"the environment has {name}={text!r}; expected a number")
    return int(text)


class AgreedStop:
    """`stop` of all processes: to be asked after each step, and true at the same step in each of them.

    Every `STOP_EVERY` steps the processes ask each other, which waits for the steps that were given to the devices
    before; a process that is alone is heard at once.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        """Take this process's own `stop`, which stays true once it was."""
        self._stop, self._asked = stop, 0

    def __call__(self) -> bool:
        """Ask; every process must ask equally often."""
        import jax
        from jax.experimental import multihost_utils

        wanted = self._stop()
        if jax.process_count() == 1:
            return wanted
        self._asked += 1
        if self._asked % STOP_EVERY:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.asarray([wanted]))))


def finish() -> None:
    """Leave together with the other processes, so that none takes another for lost. Does nothing where there are none.

    To be called before a process that has finished or stopped as agreed ends by `os._exit`; an ordinary end of the
    program does the same by itself.
    """
    if _place is None:
        return
    import jax

    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)
    if leaving.is_alive():
        log.warning("the other processes didn't come to their end within %.0f s; leaving without them", LEAVE_SECONDS)


def abandon(code: int) -> None:
    """End this process at once after a failure, whose message was given. Does nothing where it is alone.

    An ordinary end would wait minutes for the other processes, which wait for this one.
    """
    if _place is None:
        return
    log.error(
        "process %d of %d ends here, and the others within a minute; the first that failed says why. The same command "
        "resumes from the last checkpoint",
        *_place,
    )
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(data: bytes) -> list[bytes]:
    """What each process has given, in their order, at each of them; all must call it.

    Waits for the last one as long as it takes, and a signal is answered meanwhile.
    """
    import jax

    if jax.process_count() == 1:
        return [data]
    found: Future[list[bytes]] = Future()

    def exchange() -> None:
        try:
            found.set_result(_exchange(np.frombuffer(data, np.uint8)))
        except BaseException as error:  # raised again where the result is asked for
            found.set_exception(error)

    # Python answers no signal as long as its main thread is inside of JAX.
    threading.Thread(target=exchange, daemon=True).start()
    return found.result()


def _exchange(data: np.ndarray) -> list[bytes]:
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.array([data.size], np.int32))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def local_rows(array: Any) -> np.ndarray:
    """This process's rows of an array that is split by rows over the devices, in order."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def exchange(vector: np.ndarray) -> list[np.ndarray]:
    """The float64 vectors of all processes, in their order; all must have the same length.

    They travel as bytes: as float64 JAX would round them to float32.
    """
    return [np.frombuffer(data, np.float64) for data in gather(np.asarray(vector, np.float64).tobytes())]


def to_host(tree: object) -> Any:
    """A tree of device arrays as NumPy, array by array, so that no device holds more than one of them whole."""
    import jax
    from jax.experimental import multihost_utils

    def fetch(leaf: Any) -> np.ndarray:
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
