"""Maps: a raster in a running process, and sixteen chips from the start of a process, beside the rival's.

The part `uncertainty`: what it costs that a map says how sure it is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import common, suite
from benchmarks.table import TableRow, Target

SIDE = 1098  # px; 36 tiles
MAP_ROUNDS, START_ROUNDS = 3, 3
CHIPS = 16
MAP_TARGET, START_TARGET = Target("ratio", ">=", 1.4), Target("ratio", ">=", 2.5)
MEMORY_TARGET = Target("ratio", ">=", 1.0)
SURE_ROUNDS = 9
SAMPLES, MEMBERS = 10, 5
# Name of a way, and at most so many times the plain map's time. The job `uncertainty` of benchmarks/jax_work.py knows
# what each of them is.
WAYS = {
    "dropout": (f"sd by {SAMPLES} samples of the head's dropout", Target("ours", "<=", 1.3)),
    "symmetries": ("mean and sd of the eight symmetries", Target("ours", "<=", 8.2)),
    "ensemble": (f"ensemble of {MEMBERS} on one encoder", Target("ours", "<=", 1.2)),
}


def scene(side: int, folder: Path = common.FOLDER, seed: int = 0) -> Path:
    """A side x side raster of smooth random digital numbers, 1 % no-data, tiled as HLS is; written once."""
    import rasterio
    from affine import Affine

    path = folder / f"scene_{side}_{seed}.tif"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([side, seed])
    partial = path.with_suffix(".partial")
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 6, "dtype": "int16", "nodata": -9999}
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    place = {"crs": "EPSG:32610", "transform": Affine(30, 0, 600000, 0, -30, 4200000)}
    hole = rng.random((side, side)) < 0.01
    with rasterio.open(partial, "w", **profile, **layout, **place) as dst:
        for band, mean in enumerate(common.GRANITE_MEANS):
            coarse = rng.normal(mean, 0.3 * mean, (side // 61 + 2, side // 61 + 2))
            image = np.kron(coarse, np.ones((61, 61)))[:side, :side] + rng.normal(0, 30, (side, side))
            dst.write(np.where(hole, -9999, image).astype(np.int16), band + 1)
            dst.set_band_description(band + 1, ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")[band])
    partial.rename(path)
    return path


def measure(settings: suite.Settings) -> suite.SuitePart:
    """Both."""
    found = measure_map(settings)
    start = measure_start(settings)
    return suite.SuitePart(found.rows + start.rows, {"map": found.raw, "start": start.raw})


def measure_map(settings: suite.Settings) -> suite.SuitePart:
    """A raster in a running process; the rival's way is the original's, eager and float32."""
    places = {"scene": str(scene(SIDE)), "out": str(common.FOLDER / "ours.tif")}
    rival = "eager" if "eager" in settings.rivals else None
    with common.Crew() as workers:
        workers["ours"] = common.Worker(suite.OURS, "map", settings.env(), bundle=settings.bundle, **places)
        if rival:
            places |= {"out": str(common.FOLDER / "rival.tif"), "device": settings.torch_device}
            workers[rival] = common.Worker(
                suite.RIVAL, "map", settings.env(), weights=suite.weights(settings.bundle), **places
            )
        runs = common.in_turns(workers, settings.turns(MAP_ROUNDS))
    chips = runs["ours"][0]["chips"]
    peak = settings.known_peak or common.ask(suite.OURS, "peak", settings.env())["gflops_peak"]
    limit = [chips * common.CHIP_GFLOP / peak]
    theirs = common.column(runs[rival], "seconds") if rival else []
    name, seconds = f"map of {SIDE} x {SIDE} px, {chips} tiles", common.column(runs["ours"], "seconds")
    goal = MAP_TARGET if settings.device == "cpu" else None
    held = {way: max(common.column(found, "memory_gib")) for way, found in runs.items()}
    rows = [
        TableRow("predict", name, "s", seconds, theirs, limit, less=True, target=goal),
        suite.memory_row("predict", "memory of a mapping process", held["ours"], held.get(rival or ""), MEMORY_TARGET),
    ]
    return suite.SuitePart(rows, {"rounds": runs})


def measure_start(settings: suite.Settings) -> suite.SuitePart:
    """Seconds from the start of a process to its end, with sixteen chips mapped in between.

    Ours as a user starts it, with an empty and with a filled compilation cache; the rival imports torch and rasterio
    alone, less than the original.
    """
    images, out = common.FOLDER / "chips", common.FOLDER / "chip_maps"
    for seed in range(CHIPS):
        scene(224, images, seed)
    cache = common.FOLDER / "start_up_cache"
    bundle = settings.bundle
    config = ["--config", "configs/predict.py", "--workdir", str(out), f"--config.bundle={bundle}"]
    ours = [sys.executable, "-m", "biomass_jax.main", *config, f"--config.inputs={images}"]
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    if rival := "eager" in settings.rivals:
        seconds["rival"] = []
        arguments = {"weights": suite.weights(settings.bundle), "folder": str(images), "out": str(out)}
        arguments["device"] = settings.torch_device
    for _ in range(settings.turns(START_ROUNDS)):
        shutil.rmtree(cache, ignore_errors=True)
        for state in ("cold", "warm"):
            shutil.rmtree(out, ignore_errors=True)
            seconds[state].append(common.timed(lambda: _run(ours, settings.env(cache))))
            _expect(out)
        if rival:
            shutil.rmtree(out, ignore_errors=True)
            seconds["rival"].append(common.timed(lambda: common.ask(suite.RIVAL, "maps", settings.env(), **arguments)))
            _expect(out)
    theirs = seconds.get("rival", [])
    goal = START_TARGET if settings.device == "cpu" else None
    name = f"process start to {CHIPS} maps"
    rows = [
        TableRow("predict", f"{name}, compiled before", "s", seconds["warm"], theirs, less=True, target=goal),
        TableRow("predict", f"{name}, empty cache", "s", seconds["cold"], theirs, less=True),
    ]
    return suite.SuitePart(rows, {"seconds": seconds})


def measure_uncertainty(settings: suite.Settings) -> suite.SuitePart:
    """How many times as long a batch takes by each way of being sure as plain, in turns in one process."""
    ensemble = settings.bundle_of({"members": MEMBERS, "shared_encoder": True})
    arguments = {"bundle": settings.bundle, "ensemble": ensemble, "samples": SAMPLES}
    arguments |= {"side": suite.SIDE, "dtype": settings.dtype}
    with common.Crew() as workers:
        workers["ours"] = common.Worker(suite.OURS, "uncertainty", settings.env(), **arguments)
        facts = workers["ours"].facts
        runs = common.in_turns(workers, settings.turns(SURE_ROUNDS))["ours"]
    rows = [
        TableRow("uncertainty", f"{name}, of a plain map's time", "x", costs(runs, way), less=True, target=target)
        for way, (name, target) in WAYS.items()
    ]
    return suite.SuitePart(rows, {"facts": facts, "rounds": runs})


def costs(runs: list[dict[str, float]], way: str) -> list[float]:
    """How many times as long as a plain map a way took, round by round."""
    return [run[way] / run["plain"] for run in runs]


def _run(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=common.ROOT, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise common.WorkerError(f"{' '.join(command)} failed:\n{done.stderr}")


def _expect(folder: Path) -> None:
    """A process that ends early must not look fast."""
    if (count := len(list(folder.glob("*.tif")))) != CHIPS:
        raise common.WorkerError(f"{folder}: {count} maps; expected {CHIPS}")
