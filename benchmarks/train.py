"""Training step of Swin-B + UPerNet, and the input pipeline that feeds it: `python -m benchmarks.train`.

The step is the one that `biomass_jax.main` compiles: int16 chips in; no-data, augmentation, z-scores, forward, backward
and AdamW inside. It runs in turns with matrix products. The pipeline reads made-up shards; the share of time that
training waits for it is what a run of the loop wrote.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

STATISTICS = {"data.means": tuple(common.GRANITE_MEANS), "data.stds": tuple(common.GRANITE_STDS)}
SHARDS = common.FOLDER / "train_shards"


def make_shards(chips: int) -> None:
    """Shards of chips with texture, which zstd can't do away with; written once for each number."""
    from benchmarks.data_prep import make_chip
    from biomass_jax.data import records
    from data_prep import shards

    if (SHARDS / "dataset_info.json").exists() and shards.read_metadata(SHARDS)["chips"]["counts"]["train"] == chips:
        return

    def record(split: str, index: int) -> records.Record:
        image, label = make_chip(index)
        return records.Record(
            image=np.ascontiguousarray(image[:6].transpose(1, 2, 0)).astype(np.int16),
            label=label,
            chip_id=f"{split}_{index}",
            tile="10SFF",
            row=0,
            col=0,
            epsg=0,
            transform=np.zeros(6),
            biome="unknown",
            season="",
            sensors="L30",
            schema_version=1,
        )

    splits = {"train": [record("train", i) for i in range(chips)], "val": [record("val", i) for i in range(4)]}
    shards.write_shards(splits, SHARDS, overwrite=True)


def run_config(batch_size: int, dtype: str, steps: int) -> Any:
    """The config of the released model's training, on the benchmark's shards."""
    from configs import finetune_all_biomes

    config = finetune_all_biomes.get_config()
    config.data.path = str(SHARDS)
    config.data.threads = min(8, 2 * (os.cpu_count() or 1))
    config.batch_size, config.dtype, config.epochs, config.steps = batch_size, dtype, None, steps
    config.log_every = 1
    return config


def measure_step(batch_size: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Compile and time the step in this process."""
    import jax

    from biomass_jax.training.build import build_run

    with tempfile.TemporaryDirectory(dir=common.FOLDER) as folder:
        run = build_run(run_config(batch_size, dtype, 1), Path(folder), command="")
        batch, state = next(run.feed.batches(start=0)).arrays, run.state
        run.close()
    lowered = run.steps.train.lower(state, batch)
    del run  # holds the first state, which the step is given
    compiled: list[Any] = []
    seconds_compile = common.timed(lambda: compiled.append(lowered.compile()))
    step = compiled[0]

    def once() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    once()
    rss = common.peak_rss_gib()
    peak = common.matmul_peak()
    peaks, seconds = [], []
    for _ in range(rounds):
        peaks.append(peak())
        seconds.append(common.timed(once))
    return {
        "batch_size": batch_size,
        "dtype": dtype,
        "seconds_compile": seconds_compile,
        "seconds": common.spread(seconds),
        "gflops_peak": common.spread(peaks),
        "peak_rss_gib": rss,
    }


def measure_input(batch_size: int, rounds: int) -> dict[str, Any]:
    """Chips/s of the pipeline alone, an epoch a round, shards in the page cache."""
    from biomass_jax.data import pipeline, sources

    source = sources.open_source(str(SHARDS), "train")
    threads = run_config(batch_size, "float32", 1).data.threads
    rates = []
    for number in range(rounds):
        batches = pipeline.train_batches(source, batch_size=batch_size, seed=number, threads=threads)
        next(batches)  # threads have started
        count = batches.steps_per_epoch - 1
        rates.append(batch_size * count / common.timed(lambda: [next(batches) for _ in range(count)]))  # noqa: B023
        batches.close()
    return {"threads": threads, "chips_per_s": common.spread(rates)}


def measure_waiting(batch_size: int, steps: int, dtype: str) -> dict[str, Any]:
    """What a run of the loop says of itself, without its first lines."""
    from biomass_jax.training.run import train_and_evaluate

    with tempfile.TemporaryDirectory(dir=common.FOLDER) as folder:
        train_and_evaluate(run_config(batch_size, dtype, steps), Path(folder), stop=lambda: False)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "perf/waiting" in line][3:]
    return {
        "waiting": common.spread([line["perf/waiting"] for line in found]),
        "chips_per_s": common.spread([line["perf/chips_per_s"] for line in found]),
        "peak_rss_gib": common.peak_rss_gib(),
    }


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of the run whose waiting is measured")
    parser.add_argument("--chips", type=int, default=256, help="in the shards")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, default=common.FOLDER / "train.json")
    parser.add_argument("--worker", choices=("step", "input", "waiting"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = options.batch_size
    if options.worker:
        measured = {
            "step": lambda: measure_step(size, options.rounds, options.dtype),
            "input": lambda: measure_input(size, options.rounds),
            "waiting": lambda: measure_waiting(size, options.steps, options.dtype),
        }[options.worker]()
        print(json.dumps(measured))
        return
    common.FOLDER.mkdir(parents=True, exist_ok=True)
    make_shards(options.chips)
    flags = ["--batch-size", str(size), "--rounds", str(options.rounds), "--steps", str(options.steps)]
    flags += ["--dtype", options.dtype]
    env = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # the time to compile is one of the figures
    step, read, waiting = (
        common.run_worker("benchmarks.train", what, *flags, env=env) for what in ("step", "input", "waiting")
    )
    shutil.rmtree(SHARDS)
    report(size, options, step, read, waiting)
    common.write_json(options.json, {"machine": common.machine(), "step": step, "input": read, "waiting": waiting})


def report(size: int, options: Any, step: dict[str, Any], read: dict[str, Any], waiting: dict[str, Any]) -> None:
    """Print the table."""
    seconds, peak = step["seconds"]["median"], step["gflops_peak"]["median"]
    rate = 3 * common.CHIP_GFLOP * size / seconds  # the backward pass is twice the forward's work
    print(f"Training Swin-B + UPerNet, 224 x 224, batch {size}, {options.dtype}, {os.cpu_count()} CPUs\n")
    common.print_table(
        ["what", "figure"],
        [
            ["step", f"{seconds:.2f} s ({step['seconds']['min']:.2f}-{step['seconds']['max']:.2f})"],
            ["chips/s", f"{size / seconds:.2f}"],
            ["share of the matmul peak", f"{rate:.0f} of {peak:.0f} GFLOP/s, {rate / peak:.0%}"],
            ["peak RSS of the step", f"{step['peak_rss_gib']:.2f} GiB"],
            ["peak RSS of a run with validation and checkpoint", f"{waiting['peak_rss_gib']:.2f} GiB"],
            ["compile", f"{step['seconds_compile']:.0f} s"],
            ["pipeline alone", f"{read['chips_per_s']['median']:.0f} chips/s, {read['threads']} threads"],
            [
                "waiting for data",
                f"{waiting['waiting']['median']:.2%} of the time (worst {waiting['waiting']['max']:.2%})",
            ],
        ],
    )


if __name__ == "__main__":
    main()
