"""What the benchmarks share: a random model, the machine's peak, worker processes, tables and JSON."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "benchmarks"

# Multiply-adds of granite's Swin-B forward on one 224 x 224 chip: encoder, UPerNet, head. Two operations each.
CHIP_GFLOP = 2 * (15.45 + 0.19 + 0.58)

GRANITE_MEANS = [547.36707, 898.5121, 1020.9082, 2665.5352, 2340.584, 1610.1407]
GRANITE_STDS = [411.4701, 558.54065, 815.94025, 812.4403, 1113.7145, 1067.641]


def random_variables(module: Any, seed: int = 0) -> dict[str, Any]:
    """Variables of a model that has learnt nothing: float32 NumPy arrays, kernels of variance 1 / fan-in."""
    import jax

    from biomass_jax.models.build import abstract_variables

    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if name == "kernel":
            return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.prod(leaf.shape[:-1])) ** 0.5
        return np.zeros(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(module))


def random_bundle() -> Path:
    """A full Swin-B bundle with random weights, written once."""
    from biomass_jax import bundle
    from biomass_jax.models.build import build_module

    path = FOLDER / "random_swin_b"
    if not path.exists():
        bundle.save(
            path,
            random_variables(build_module("biomass", {})),
            task="biomass",
            architecture={},
            input={
                "bands": ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"],
                "units": "digital numbers (reflectance x 10000)",
                "fill": -9999,
                "means": GRANITE_MEANS,
                "stds": GRANITE_STDS,
                "sensors": ["L30"],
            },
            output={"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1},
            training={},
            provenance={"source": "random weights, for benchmarks"},
        )
    return path


def matmul_peak() -> Callable[[], float]:
    """A float32 matrix product whose call returns the rate reached, GFLOP/s: what this machine's cores can do."""
    import jax

    size = 3072
    a = jax.random.normal(jax.random.key(0), (size, size))
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


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
        "versions": bundle.software_versions(),
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
