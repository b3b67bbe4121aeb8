"""Maps end to end with Swin-B: `python -m benchmarks.predict`.

A six-band int16 GeoTIFF to a finished COG, in a process of its own each: wall time, peak memory, where the time goes,
and what the chips alone would take (forward passes timed in the same process afterwards). Then start-up: the command's
wall time on one 224 x 224 chip, with an empty and a filled compilation cache, less the forward pass itself.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

BEGAN = time.perf_counter()
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
    ready = time.perf_counter() - BEGAN
    result = model.predict_file(scene(side), common.FOLDER / f"map_{side}.tif", overwrite=True)
    wall = time.perf_counter() - BEGAN
    rss = common.peak_rss_gib()
    chips = np.random.default_rng(0).integers(0, 5000, (batch_size, 224, 224, 6)).astype(np.int16)
    forward = [common.timed(lambda: model.predict_array(chips, mask_nodata=False)) for _ in range(6)][1:]
    peak = common.matmul_peak()
    return {
        "side": side,
        "chips": result.chips,
        "seconds_process": wall,
        "seconds_ready": ready,
        "seconds_map": result.seconds,
        "stages": {name: result.timings[name] for name in STAGES},
        "seconds_chips_alone": result.chips / batch_size * sorted(forward)[len(forward) // 2],
        "gflops_peak": peak(),
        "peak_rss_gib": rss,
    }


def start_up() -> dict[str, float]:
    """Wall seconds of the command on one chip, less one forward pass, with a cold and a warm compilation cache."""
    chip, out, cache = scene(224), common.FOLDER / "start_up", common.FOLDER / "start_up_cache"
    shutil.rmtree(cache, ignore_errors=True)
    bundle = common.random_bundle()
    command = [sys.executable, "-m", "biomass_jax.main", "--config", "configs/predict.py", "--workdir", str(out)]
    command += [f"--config.bundle={bundle}", f"--config.inputs={chip}", "--config.overwrite=true"]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def once() -> float:
        return common.timed(lambda: subprocess.run(command, cwd=common.ROOT, env=env, check=True, capture_output=True))

    cold = once()
    warm = sorted(once() for _ in range(3))[1]
    import biomass_jax

    model = biomass_jax.load(bundle)
    image = np.full((224, 224, 6), 1000, np.int16)
    model.predict_array(image)
    forward = min(common.timed(lambda: model.predict_array(image)) for _ in range(3))
    return {"cold": cold - forward, "warm": warm - forward, "forward": forward}


def main() -> None:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="*", default=[1098, 3660])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, default=common.FOLDER / "predict.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_map(options.sides[0], options.batch_size)))
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
    start = start_up()
    print(
        f"\nstart-up (imports, load, compile, write; one chip): {start['cold']:.1f} s with an empty compilation cache,"
    )
    print(f"{start['warm']:.1f} s with a filled one; one forward pass is {start['forward']:.2f} s")
    common.write_json(options.json, {"machine": common.machine(), "maps": runs, "start_up": start})


if __name__ == "__main__":
    main()
