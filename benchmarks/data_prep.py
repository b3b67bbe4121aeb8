"""Data preparation: chips/s of writing and reading shards beside reading the same chips as float32 GeoTIFFs.

`python -m benchmarks.data_prep` prints a table and writes JSON. Chips are like the real ones: digital numbers with
texture and noise, 250 labels each; GeoTIFFs as the published data set has them (10 bands, float32, LZW, by pixel).
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine

from benchmarks import common
from biomass_jax.data import records
from data_prep import geotiff, shards

FOLDER = common.FOLDER / "data_prep"
SIDE = records.CHIP_SIZE
ROUNDS = 5


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
    print(f"Shards of {chips} chips beside float32 GeoTIFFs; {os.cpu_count()} CPUs, {ROUNDS} rounds\n")
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


def main() -> None:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", type=int, default=300, help="chips of the data set to write and read")
    parser.add_argument("--json", type=Path, default=common.FOLDER / "data_prep.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("writing", "reading"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_writing(options.workers) if options.what == "writing" else measure_reading()))
        return
    result = {"machine": common.machine(), "shards": benchmark_shards(options.chips)}
    common.write_json(options.json, result)


if __name__ == "__main__":
    main()
