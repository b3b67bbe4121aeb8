"""Data preparation: composites, footprints, shards; each beside the plainest way to read or do the same.

`python -m benchmarks.run --only prep`. Composites: see benchmarks/composite.py. Footprints: one synthetic orbit of 8
beams in the layout of the real files. Chips are like real ones: digital numbers with texture and noise, 250 labels
each; GeoTIFFs as the published data set has them (10 bands, float32, LZW, by pixel). Each measurement has a process of
its own.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from benchmarks import common, composite, suite
from benchmarks.table import TableRow
from biomass_jax.data import records
from biomass_jax.data.sources import ShardSource
from data_prep.gedi.names import BEAMS
from data_prep.gedi.orbits import convert_granule
from data_prep.shards import geotiff
from data_prep.synthetic.gedi_file import granule_name, seconds_since_epoch, shot_numbers, write_gedi

FOLDER = common.FOLDER / "data_prep"
SIDE = records.CHIP_SIZE
ROUNDS = 5
CHIPS = 300
SCENES, SCENE_SIDE = 8, 1830  # px; 3660 in HLS
ORBIT, ORBIT_TIME = 8852, datetime(2020, 7, 1, 18, 45, 12)
BEAM_SHOTS = 60_000  # half of what a quarter of an orbit has, most of it over sea
BOX = (-122.0, 37.0, -120.8, 38.0)  # about an HLS tile
Found = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def read_geotiff(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    """Six bands and the label, in the quickest plain way: (6, 224, 224) and (224, 224)."""
    with rasterio.open(image) as bands, rasterio.open(label) as values:
        return bands.read([2, 3, 4, 5, 6, 7]), values.read(1)


def rate(call: Callable[[], Iterable[Any]], count: int) -> float:
    """Chips/s of a call that goes through `count` chips."""
    began = time.perf_counter()
    for _ in call():
        pass
    return count / (time.perf_counter() - began)


def write_orbit(path: Path) -> Path:
    """An orbit that crosses `BOX` from south to north, two thirds of its shots good."""
    beams = {}
    for number, beam in enumerate(BEAMS):
        rng = np.random.default_rng(number)
        along = np.linspace(0, 1, BEAM_SHOTS)
        beams[beam] = {
            "shot_number": shot_numbers(ORBIT, beam, BEAM_SHOTS),
            "delta_time": seconds_since_epoch(ORBIT_TIME) + along * 1400,
            "lat_lowestmode": 20 + 32 * along,
            "lon_lowestmode": -140 + 35 * along + 0.005 * number,
            "agbd": rng.gamma(2, 50, BEAM_SHOTS),
            "l4_quality_flag": (rng.random(BEAM_SHOTS) < 2 / 3).astype(np.uint8),
        }
    return write_gedi(path, beams)


def measure(settings: suite.Settings) -> suite.SuitePart:
    """All of it."""
    found = [measure_composite(settings), measure_footprints(), measure_shards()]
    rows = [row for part in found for row in part.rows]
    return suite.SuitePart(rows, {key: value for part in found for key, value in part.raw.items()})


def measure_composite(settings: suite.Settings) -> suite.SuitePart:
    """M scene-pixels/s of a composite; the limit is reading the same files and nothing else."""
    threads = min(8, len(os.sched_getaffinity(0)))
    result = composite.benchmark(SCENES, SCENE_SIDE, threads, settings.turns(composite.ROUNDS))
    pixels = SCENES * SCENE_SIDE**2 / 1e6
    rates = {way: [pixels / run["seconds"] for run in found["runs"]] for way, found in result["ways"].items()}
    name = f"composite of {SCENES} scenes, {SCENE_SIDE} px"
    row = TableRow("prep", name, "Mpx/s", rates["ours"], rates.get("rival", []), rates["decode"])
    held = {way: found["peak_rss_gib"] for way, found in result["ways"].items()}
    memory = suite.memory_row("prep", "memory of a composite", held["ours"], held.get("rival"))
    return suite.SuitePart([row, memory], {"composite": result})


def measure_footprints() -> suite.SuitePart:
    """M shots of the orbit/s from HDF5 to GeoParquet."""
    orbit = write_orbit(FOLDER / "gedi" / granule_name(ORBIT_TIME, ORBIT))
    found = common.ask("benchmarks.data_prep", "footprints", orbit=str(orbit))
    shutil.rmtree(FOLDER)
    labels = {"orbit": "footprints of an orbit", "tile": "footprints over a tile"}
    rows = [
        TableRow("prep", label, "Mshots/s", [rate / 1e6 for rate in found["shots_per_s"][name]])
        for name, label in labels.items()
    ]
    return suite.SuitePart(rows, {"footprints": found | {"shots": len(BEAMS) * BEAM_SHOTS}})


def measure_shards() -> suite.SuitePart:
    """Chips/s of writing shards, and of reading them beside reading the GeoTIFFs."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    geotiffs, shards = FOLDER / "geotiffs", FOLDER / "shards"
    suite.write_geotiffs(geotiffs, CHIPS)
    places: dict[str, Any] = {"geotiffs": str(geotiffs), "shards_folder": str(shards)}
    writing = {workers: common.ask("benchmarks.data_prep", "writing", workers=workers, **places) for workers in (1, 2)}
    reading = common.ask("benchmarks.data_prep", "reading", **places)
    size = {folder.name: _kib_per_chip(folder) for folder in (geotiffs, shards)}
    shutil.rmtree(FOLDER)
    rows = [
        TableRow("prep", f"write shards, {workers} process{'es' * (workers > 1)}", "chips/s", [found["chips_per_s"]])
        for workers, found in writing.items()
    ]
    rate = reading["chips_per_s"]
    rows.append(TableRow("prep", "read shards; rival: GeoTIFFs", "chips/s", rate["shards"], rate["geotiff"]))
    rows.append(
        TableRow("prep", "a chip on disk; rival: GeoTIFF", "KiB", [size["shards"]], [size["geotiffs"]], less=True)
    )
    return suite.SuitePart(rows, {"writing": writing, "reading": reading, "kib_per_chip": size})


def _kib_per_chip(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / CHIPS / 1024


def job_writing(geotiffs: str, shards_folder: str, workers: int) -> Found:
    """Chips/s from GeoTIFFs to checked shards: reading, encoding, compressing, statistics, reading back."""
    # two shards a worker, so that none waits for long
    settings: dict[str, Any] = {"records_per_shard": -(-CHIPS // (2 * workers)), "workers": workers, "overwrite": True}
    seconds = common.timed(lambda: geotiff.convert(Path(geotiffs), Path(shards_folder), **settings))
    return {"chips_per_s": CHIPS / seconds, "peak_rss_gib": common.peak_rss_gib()}, dict


def job_reading(geotiffs: str, shards_folder: str) -> Found:
    """Chips/s of shards and of GeoTIFFs, in turns in one process, in random order, files in the page cache."""
    pairs = geotiff.find_pairs(Path(geotiffs))[0]["train"]
    source = ShardSource(Path(shards_folder), "train")
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "geotiff": lambda: (read_geotiff(*pairs[i]) for i in order),
        "shards": lambda: (source[i] for i in order),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):  # the first brings files into the page cache
        for name, way in ways.items():
            found = rate(way, len(order))
            rates[name] += [found] if number else []
    return {"chips_per_s": rates, "peak_rss_gib": common.peak_rss_gib()}, dict


def job_footprints(orbit: str) -> Found:
    """Shots/s from an orbit to GeoParquet: the whole of it, and the part that lies over a tile."""
    rates: dict[str, list[float]] = {"orbit": [], "tile": []}
    kept = {}
    for number in range(ROUNDS + 1):  # the first loads libraries
        for name, box in (("orbit", None), ("tile", BOX)):
            began = time.perf_counter()
            _, counts = convert_granule(Path(orbit), FOLDER / "footprints", bbox=box)
            rates[name] += [counts["shots"] / (time.perf_counter() - began)] if number else []
            kept[name] = list(counts.values())[-1]
    return {"shots_per_s": rates, "kept": kept, "peak_rss_gib": common.peak_rss_gib()}, dict


JOBS: dict[str, common.Job] = {"writing": job_writing, "reading": job_reading, "footprints": job_footprints}

if __name__ == "__main__":
    common.serve(JOBS)
