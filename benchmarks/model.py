"""Forward pass of Swin-B + UPerNet on 224 x 224 chips: `python -m benchmarks.model`.

Each batch size runs in a process of its own, forward passes and matrix products in turn, so that the share of the
matmul peak compares like with like on a machine whose speed drifts.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import common


def measure(batch_size: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Compile and time one batch size in this process."""
    import jax
    import jax.numpy as jnp

    from biomass_jax.models.build import build_module

    module = build_module("biomass", {}, dtype)
    variables = jax.device_put(common.random_variables(module))
    images = jax.random.normal(jax.random.key(0), (batch_size, 224, 224, 6), jnp.float32)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        lowered = jax.jit(module.apply).lower(variables, images)
        compiled: list[Any] = []
        seconds_compile = common.timed(lambda: compiled.append(lowered.compile()))
    forward = compiled[0]
    forward(variables, images).block_until_ready()
    rss = common.peak_rss_gib()
    peak = common.matmul_peak()
    peaks, seconds = [], []
    for _ in range(rounds):
        peaks.append(peak())
        seconds.append(common.timed(lambda: forward(variables, images).block_until_ready()))
    return {
        "batch_size": batch_size,
        "dtype": dtype,
        "seconds_compile": seconds_compile,
        "seconds": common.spread(seconds),
        "gflops_peak": common.spread(peaks),
        "peak_rss_gib": rss,
    }


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, default=common.FOLDER / "model.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.batch_sizes[0], options.rounds, options.dtype)))
        return
    result: dict[str, Any] = {"machine": common.machine(), "runs": []}
    rows = []
    for batch_size in options.batch_sizes:
        arguments = ["--batch-sizes", str(batch_size), "--rounds", str(options.rounds), "--dtype", options.dtype]
        # No compilation cache: the time to compile is one of the figures.
        run = common.run_worker("benchmarks.model", *arguments, env={"JAX_ENABLE_COMPILATION_CACHE": "false"})
        seconds, peak = run["seconds"]["median"], run["gflops_peak"]["median"]
        rate = common.CHIP_GFLOP * batch_size / seconds
        run |= {"chips_per_second": batch_size / seconds, "gflops": rate, "share_of_peak": rate / peak}
        result["runs"].append(run)
        rows.append(
            [
                str(batch_size),
                f"{seconds:.3f} ({run['seconds']['min']:.3f}-{run['seconds']['max']:.3f})",
                f"{batch_size / seconds:.2f}",
                f"{rate:.0f}",
                f"{peak:.0f}",
                f"{rate / peak:.0%}",
                f"{run['peak_rss_gib']:.2f}",
                f"{run['seconds_compile']:.1f}",
            ]
        )
    print(f"Swin-B + UPerNet, 224 x 224, {options.dtype}, {os.cpu_count()} CPUs, medians of {options.rounds} rounds\n")
    common.print_table(
        ["batch", "seconds (min-max)", "chips/s", "GFLOP/s", "matmul peak", "share", "peak RSS GiB", "compile s"], rows
    )
    common.write_json(options.json, result)


if __name__ == "__main__":
    main()
