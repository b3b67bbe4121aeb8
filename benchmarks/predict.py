"""Maps end to end with Swin-B: `python -m benchmarks.predict`.

A six-band int16 GeoTIFF to a finished COG, in a warm process of its own each: wall time, peak memory, where the time
goes, and what the chips alone would take (forward passes timed in the same process before and after). Then start-up:
from the start of a process until it can send its first batch, with an empty and a filled compilation cache.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

STAGES = ("read", "compute", "blend", "write", "verify", "copy")


def scene(side: int) -> Path:
    """A side x side raster of smooth random digital numbers, 1 % no-data, tiled as HLS is; written once."""
    import rasterio
    from rasterio.transform import from_origin

    path = common.FOLDER / f"scene_{side}.tif"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(side)
    partial = path.with_suffix(".partial.tif")
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 6, "dtype": "int16", "nodata": -9999}
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    place = {"crs": "EPSG:32610", "transform": from_origin(600000, 4200000, 30, 30)}
    hole = rng.random((side, side)) < 0.01
    with rasterio.open(partial, "w", **profile, **layout, **place) as dst:
        for band, mean in enumerate(common.GRANITE_MEANS):
            coarse = rng.normal(mean, 0.3 * mean, (side // 61 + 2, side // 61 + 2))
            image = np.kron(coarse, np.ones((61, 61)))[:side, :side] + rng.normal(0, 30, (side, side))
            dst.write(np.where(hole, -9999, image).astype(np.int16), band + 1)
            dst.set_band_description(band + 1, ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")[band])
    partial.rename(path)
    return path


def measure_map(side: int, batch_size: int) -> dict[str, Any]:
    """Map one scene in this process, then time the forward passes alone."""
    import biomass_jax

    model = biomass_jax.load(common.random_bundle(), batch_size=batch_size)
    chips = np.random.default_rng(0).integers(0, 5000, (batch_size, 224, 224, 6)).astype(np.int16)

    def forward(rounds: int) -> list[float]:
        return [common.timed(lambda: model.predict_array(chips, mask_nodata=False)) for _ in range(rounds)]

    forward(2)  # compiles
    batches = forward(15)  # and as many after the map: the machine's speed drifts
    result = model.predict_file(scene(side), common.FOLDER / f"map_{side}.tif", overwrite=True)
    rss = common.peak_rss_gib()
    batches += forward(15)
    return {
        "side": side,
        "chips": result.chips,
        "seconds_map": result.seconds,
        "stages": {name: result.timings[name] for name in STAGES},
        "seconds_batch": common.spread(batches),
        "seconds_chips_alone": result.chips / batch_size * statistics.mean(batches),
        "gflops_peak": common.matmul_peak()(),
        "peak_rss_gib": rss,
    }


def measure_start(batch_size: int) -> dict[str, Any]:
    """Seconds from this process's start until the first batch can be sent to the device."""
    from biomass_jax.main import local_shardings
    from biomass_jax.prediction.predictor import Predictor

    Predictor.open(common.random_bundle(), batch_size=batch_size, **local_shardings()).warm_up()
    return {"seconds": seconds_since_start()}


def seconds_since_start() -> float:
    """Age of this process, interpreter start included (Linux)."""
    started = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def start_up(batch_size: int, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Start-up seconds with an empty and with a filled compilation cache."""
    cache = common.FOLDER / "start_up_cache"
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for state in seconds:
            arguments = ("--start", "--batch-size", str(batch_size))
            run = common.run_worker("benchmarks.predict", *arguments, env={"JAX_COMPILATION_CACHE_DIR": str(cache)})
            seconds[state].append(run["seconds"])
    return {state: common.spread(values) for state, values in seconds.items()}


def main() -> None:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="*", default=[1098, 3660])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, default=common.FOLDER / "predict.json")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run = measure_start(options.batch_size) if options.start else measure_map(options.sides[0], options.batch_size)
        print(json.dumps(run))
        return
    common.random_bundle()
    rows, runs = [], []
    for side in options.sides:
        scene(side)
        run = common.run_worker("benchmarks.predict", "--sides", str(side), "--batch-size", str(options.batch_size))
        runs.append(run)
        limit = run["seconds_chips_alone"] + run["stages"]["copy"]
        run["ratio_to_limit"] = run["seconds_map"] / limit
        shares = [f"{run['stages'][name] / run['seconds_map']:.1%}" for name in STAGES]
        rows.append(
            [str(side), str(run["chips"]), f"{run['seconds_map']:.1f}", f"{limit:.1f}", f"{run['ratio_to_limit']:.2f}"]
            + [f"{run['peak_rss_gib']:.2f}", *shares]
        )
    print(f"Maps with Swin-B, float32, batch {options.batch_size}, {os.cpu_count()} CPUs; stages overlap\n")
    header = ["side px", "chips", "map s", "chips alone + copy s", "ratio", "peak RSS GiB", *STAGES]
    common.print_table(header, rows)
    start = start_up(options.batch_size)
    print("\nstart-up (process start, imports, weights, compiling; until the first batch can be sent), medians of 3:")
    cold, warm = (start[state]["median"] for state in ("cold", "warm"))
    print(f"{cold:.1f} s with an empty compilation cache, {warm:.1f} s with a filled one")
    common.write_json(options.json, {"machine": common.machine(), "maps": runs, "start_up": start})


if __name__ == "__main__":
    main()
