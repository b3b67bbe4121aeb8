"""Data preparation: composites, footprints, shards; each beside the plainest way to read or do the same.

`python -m benchmarks.data_prep` prints tables and writes JSON. Composites: see benchmarks/composite.py. Footprints: one
made-up orbit of 8 beams in the layout of the real files. Chips are like real ones: digital numbers with texture and
noise, 250 labels each; GeoTIFFs as the published data set has them (10 bands, float32, LZW, by pixel).
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine

from benchmarks import common, composite
from biomass_jax.data import records
from data_prep import geotiff, shards
from data_prep.gedi import convert_granule
from data_prep.synthetic.gedi_file import BEAMS, granule_name, seconds_since_epoch, shot_numbers, write_gedi

FOLDER = common.FOLDER / "data_prep"
SIDE = records.CHIP_SIZE
ROUNDS = 5
ORBIT, ORBIT_TIME = 8852, datetime(2020, 7, 1, 18, 45, 12)
BEAM_SHOTS = 60_000  # half of what a quarter of an orbit has, most of it over sea
BOX = (-122.0, 37.0, -120.8, 38.0)  # about an HLS tile


def make_chip(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A made-up chip: (10, 224, 224) float32 digital numbers, as integers, and (224, 224) float32 labels."""
    rng = np.random.default_rng(index)
    rows, cols = np.mgrid[:SIDE, :SIDE] / SIDE
    image = np.empty((10, SIDE, SIDE), np.float32)
    for band in range(10):
        waves = sum(np.sin(2 * np.pi * (a * rows + b * cols + c)) for a, b, c in rng.uniform(0, 9, (3, 3)))
        image[band] = np.rint(400 * (band + 2) + 150 * waves + rng.normal(0, 40, (SIDE, SIDE)))
    label = np.full(SIDE * SIDE, -1, np.float32)
    label[rng.choice(label.size, 250, replace=False)] = rng.gamma(2, 50, 250)
    return image, label.reshape(SIDE, SIDE)


def write_geotiffs(folder: Path, count: int) -> None:
    """`count` chips in the published layout, train only."""
    form = {
        "driver": "GTiff",
        "width": SIDE,
        "height": SIDE,
        "dtype": "float32",
        "compress": "lzw",
        "interleave": "pixel",
    }
    place = {"crs": "EPSG:32610", "nodata": -9999}
    for index in range(count):
        image, label = make_chip(index)
        tile, cell = divmod(index, 256)
        transform = Affine(30, 0, 600000 + cell % 16 * SIDE * 30, 0, -30, 4200000 - cell // 16 * SIDE * 30)
        name = f"T10S{chr(65 + tile // 26)}{chr(65 + tile % 26)}_{cell}_tile"
        for kind, ending, values in (("images", "img", image), ("labels", "label", label[None])):
            path = folder / f"train_{kind}" / f"{name}_{ending}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path, "w", count=len(values), transform=transform, **form, **place) as dst:
                dst.write(values)


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


def measure_writing(workers: int) -> dict[str, Any]:
    """Chips/s from GeoTIFFs to checked shards: reading, encoding, compressing, statistics, reading back."""
    count = len(_pairs())
    folder = FOLDER / "shards"
    # two shards a worker, so that none waits for long
    settings = {"records_per_shard": -(-count // (2 * workers)), "workers": workers, "overwrite": True}
    seconds = common.timed(lambda: geotiff.convert(FOLDER / "geotiffs", folder, **settings))
    return {"chips_per_s": count / seconds, "peak_rss_gib": common.peak_rss_gib()}


def measure_reading() -> dict[str, Any]:
    """Chips/s of shards and of GeoTIFFs, in turns in one process, in random order, files in the page cache."""
    pairs = _pairs()
    source = shards.read(FOLDER / "shards", "train")
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "geotiff": lambda: (read_geotiff(*pairs[i]) for i in order),
        "shards": lambda: (source[i] for i in order),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        rate(way, len(order))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            rates[name].append(rate(way, len(order)))
    ratios = [a / b for a, b in zip(rates["shards"], rates["geotiff"], strict=True)]
    return {
        "chips_per_s": {name: common.spread(values) for name, values in rates.items()},
        "ratio": common.spread(ratios),
        "peak_rss_gib": common.peak_rss_gib(),
    }


def _pairs() -> list[tuple[Path, Path]]:
    return geotiff.find_pairs(FOLDER / "geotiffs")[0]["train"]


def benchmark_shards(chips: int) -> dict[str, Any]:
    """Write and read shards, each in a process of its own; prints its table."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_geotiffs(FOLDER / "geotiffs", chips)
    result: dict[str, Any] = {"chips": chips, "writing": {}}
    for workers in (1, 2):
        run = common.run_worker("benchmarks.data_prep", "--what", "writing", "--workers", str(workers))
        result["writing"][str(workers)] = run
    result["reading"] = common.run_worker("benchmarks.data_prep", "--what", "reading")
    result["kib_per_chip"] = {
        name: sum(path.stat().st_size for path in (FOLDER / name).rglob("*") if path.is_file()) / chips / 1024
        for name in ("geotiffs", "shards")
    }
    shutil.rmtree(FOLDER)
    print(f"\nShards of {chips} chips beside float32 GeoTIFFs; {os.cpu_count()} CPUs, {ROUNDS} rounds\n")
    reading = result["reading"]["chips_per_s"]
    rows = [
        [
            f"write shards, {workers} worker{'s' * (workers != '1')}",
            f"{run['chips_per_s']:.0f}",
            "",
            f"{run['peak_rss_gib']:.2f}",
        ]
        for workers, run in result["writing"].items()
    ]
    for name, label in (("geotiff", "read GeoTIFFs"), ("shards", "read shards")):
        spread = reading[name]
        rows.append(
            [
                label,
                f"{spread['median']:.0f}",
                f"{spread['min']:.0f} to {spread['max']:.0f}",
                f"{result['reading']['peak_rss_gib']:.2f}",
            ]
        )
    common.print_table(["one process reads", "chips/s", "from - to", "peak RSS GiB"], rows)
    ratio, size = result["reading"]["ratio"], result["kib_per_chip"]
    print(
        f"\nshards are read {ratio['median']:.1f} times as fast ({ratio['min']:.1f} to {ratio['max']:.1f}); "
        f"a chip takes {size['shards']:.0f} KiB, as GeoTIFF {size['geotiffs']:.0f} KiB"
    )
    return result


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
            "agbd_se": rng.uniform(5, 17, BEAM_SHOTS),
            "l4_quality_flag": (rng.random(BEAM_SHOTS) < 2 / 3).astype(np.uint8),
        }
    return write_gedi(path, beams)


def measure_footprints() -> dict[str, Any]:
    """Shots/s from an orbit to GeoParquet: the whole of it, and the part that lies over a tile."""
    path = next((FOLDER / "gedi").glob("*.h5"))
    rates: dict[str, list[float]] = {"orbit": [], "tile": []}
    kept = {}
    for _ in range(ROUNDS + 1):
        for name, box in (("orbit", None), ("tile", BOX)):
            began = time.perf_counter()
            _, counts = convert_granule(path, FOLDER / "footprints", bbox=box)
            rates[name].append(counts["shots"] / (time.perf_counter() - began))
            kept[name] = list(counts.values())[-1]
    # the first of each loads libraries
    spreads = {name: common.spread(values[1:]) for name, values in rates.items()}
    return {"shots_per_s": spreads, "kept": kept, "peak_rss_gib": common.peak_rss_gib()}


def benchmark_footprints() -> dict[str, Any]:
    """Convert an orbit in a process of its own; prints its table."""
    write_orbit(FOLDER / "gedi" / granule_name(ORBIT_TIME, ORBIT))
    run = common.run_worker("benchmarks.data_prep", "--what", "footprints")
    shutil.rmtree(FOLDER)
    print(f"\nGEDI shots to GeoParquet, an orbit of {len(BEAMS) * BEAM_SHOTS:,}; {ROUNDS} rounds\n")
    rows = []
    for name, label in (("orbit", "the whole orbit"), ("tile", "its part over a tile")):
        rate = run["shots_per_s"][name]
        span = f"{rate['min'] / 1e6:.2f} to {rate['max'] / 1e6:.2f}"
        rows.append(
            [label, f"{run['kept'][name]:,}", f"{rate['median'] / 1e6:.2f}", span, f"{run['peak_rss_gib']:.2f}"]
        )
    common.print_table(["", "shots kept", "M shots of the orbit/s", "from - to", "peak RSS GiB"], rows)
    return run


MEASURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "writing": measure_writing,
    "reading": lambda workers: measure_reading(),
    "footprints": lambda workers: measure_footprints(),
}


def main() -> None:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", type=int, default=300, help="chips of the data set to write and read")
    composite.add_options(parser)
    parser.add_argument("--json", type=Path, default=common.FOLDER / "data_prep.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=tuple(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(MEASURES[options.what](options.workers)))
        return
    result = {
        "machine": common.machine(),
        "composite": composite.benchmark(options.scenes, options.side, options.threads, options.rounds),
        "footprints": benchmark_footprints(),
        "shards": benchmark_shards(options.chips),
    }
    common.write_json(options.json, result)


if __name__ == "__main__":
    main()
