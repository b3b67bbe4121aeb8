"""What the benchmarks share: a random model, the machine's peak, worker processes taking turns, JSON."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "benchmarks"

# Multiply-adds of granite's Swin-B forward on one 224 x 224 chip: encoder, UPerNet, head. Two operations each.
CHIP_GFLOP = 2 * (15.45 + 0.19 + 0.58)
TRAINING = 3  # the backward pass is twice the forward's work

GRANITE_MEANS = [547.36707, 898.5121, 1020.9082, 2665.5352, 2340.584, 1610.1407]
GRANITE_STDS = [411.4701, 558.54065, 815.94025, 812.4403, 1113.7145, 1067.641]

# What counts of a worker's turn lasts about so long: far above the clock's grain and a GPU's queue.
SECONDS_A_CALL = 0.3
# Before a call the others' threads, which spin for a while when they are done, have come to rest.
REST = 0.05

Job = Callable[..., tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


def random_variables(module: Any, seed: int = 0) -> dict[str, Any]:
    """Variables of a model that has learnt nothing: float32 NumPy arrays, kernels of variance 1 / fan-in.

    Everything else is random too, so that two implementations agree only where they agree in all of it.
    """
    import jax

    from biomass_jax.models.build import abstract_variables

    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.8, 1.25, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 25
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(fan_in) ** 0.5

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(module))


def random_bundle(architecture: Mapping[str, Any], path: Path) -> Path:
    """A bundle with random weights, Swin-B where the architecture says nothing; written once."""
    from biomass_jax import bundle
    from biomass_jax.models.build import build_module

    if not path.exists():
        bundle.save(
            path,
            random_variables(build_module("biomass", dict(architecture))),
            task="biomass",
            architecture=dict(architecture),
            input={
                "bands": ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"],
                "units": "digital numbers (reflectance x 10000)",
                "fill": -9999,
                "means": GRANITE_MEANS,
                "stds": GRANITE_STDS,
                "sensors": ["L30"],
            },
            output={
                "bands": ["agbd", "agbd_sd"] if "members" in architecture else ["agbd"],
                "units": "Mg ha-1",
                "nodata": -1,
            },
            training={},
            provenance={"source": "random weights, for benchmarks"},
        )
    return path


def matmul_peak(dtype: str = "float32", size: int | None = None) -> Callable[[], float]:
    """A matrix product whose call returns the rate reached, GFLOP/s: what this machine's cores can do.

    `size` is its side; where not given, one large enough for the machine.
    """
    import jax
    import jax.numpy as jnp

    size = size or (3072 if jax.default_backend() == "cpu" else 16384)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()

    def rate() -> float:
        return 2e-9 * size**3 / timed(lambda: product(a).block_until_ready())

    return rate


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def per_call(call: Callable[[], Any], finish: Callable[[], Any]) -> Callable[[], float]:
    """Seconds a call takes, as the mean of as many as fill `SECONDS_A_CALL`, without waiting between them.

    Each time one more goes before, which doesn't count: while others had their turn, a virtual machine may have handed
    freed memory back to its host, and the first call waits until it is there again.

    Args:
        call: begins the work; called twice at once, to warm up and to see how long it takes.
        finish: waits until all of it is done.
    """

    def several(count: int) -> float:
        return timed(lambda: ([call() for _ in range(count)], finish())) / count

    def turn() -> float:
        several(1)
        return several(count)

    several(1)
    count = max(1, min(100, math.ceil(SECONDS_A_CALL / several(1))))
    return turn


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, GiB (Linux).

    `getrusage` would count what the parent held when it forked.
    """
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def run_worker(module: str, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `python -m module --worker ...` in a process of its own; the JSON object on its last line."""
    command = [sys.executable, "-m", module, "--worker", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


class WorkerError(RuntimeError):
    """A worker ended before it answered; what it said went to stderr."""


class Worker:
    """A process that sets a job up and then waits; each `once` has it done one time.

    Two frameworks in one process fight for threads; in two that take turns each has the machine to itself.

    Attributes:
        facts: what the job's setting-up told.
    """

    def __init__(self, module: str, job: str, env: Mapping[str, str] | None = None, **arguments: Any) -> None:
        self._what = f"python -m {module} {job} '{json.dumps(arguments)}'"
        command = [sys.executable, "-m", module, job, json.dumps(arguments)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | dict(env or {}), stdin=pipe, stdout=pipe, text=True
        )
        self.facts = self._answer()

    def once(self) -> dict[str, Any]:
        """What one turn found."""
        time.sleep(REST)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process: without more input it finishes by itself."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise WorkerError(f"{self._what} failed")
        return json.loads(line)


def serve(jobs: Mapping[str, Job]) -> None:
    """The other side of `Worker`: set up the job that the command line names, then do it for each line of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    facts, once = jobs[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), file=answers, flush=True)


class Crew(dict[str, Worker]):
    """Workers by name, which are ended together."""

    def __enter__(self) -> "Crew":
        """Nothing to begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        for worker in self.values():
            worker.close()


def ask(module: str, job: str, env: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """The facts of a job, from a process of its own.

    Raises:
        WorkerError: it failed.
    """
    with Crew() as workers:
        workers[job] = Worker(module, job, env, **arguments)
        return workers[job].facts


def in_turns(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each worker found in each round; one round is a turn of every worker, so that ratios compare neighbours."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker.once())
    return found


def column(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """One figure of all rounds."""
    return [run[name] for run in runs]


def installed(*names: str) -> dict[str, str]:
    """Versions of those packages that are there."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    from biomass_jax import bundle

    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": bundle.software_versions() | installed("torch", "rasterio", "rioxarray"),
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, Markdown."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result and say where it lies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")
