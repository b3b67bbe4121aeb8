"""Composites: scene-pixels/s beside decoding the same files alone, and beside the same work in rioxarray + xarray.

`python -m benchmarks.data_prep` runs this with the rest; `--scenes 40 --side 3660` shows what a whole season takes.
All ways take turns, each time in a process of its own, files in the page cache.
Scenes are like real ones: textured land with noise of their own, clouds, COGs with 256-pixel blocks, deflate.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window

from benchmarks import common
from biomass_jax.data.bands import FILL
from data_prep.hls.composite import composite
from data_prep.hls.granules import CLOUD, FMASK_FILL, SHADOW, find_scenes, needed_layers
from data_prep.season import Season
from data_prep.synthetic.granule import Overpass, write_granule
from data_prep.synthetic.landscape import fractal, make_landscape
from data_prep.synthetic.scene import digital_numbers, fmask

FOLDER = common.FOLDER / "composite"
SEASON = Season.parse("2020-05-01/2020-10-01")
ROUNDS = 3
LAND = 610  # pixels of the land that is repeated to fill a scene
DISTINCT = 8  # scenes made; more are links to them under other dates
BLOCK = 256
RIVAL_BYTES = 100  # memory of a pixel of a scene in the rival, as measured


def write_scenes(scenes: int, side: int) -> Path:
    """L30 granules of one tile; those of an earlier run are kept. Returns their folder."""
    folder = FOLDER / f"{scenes}x{side}"
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    land = make_landscape((LAND, LAND))
    repeats = -(-side // LAND)
    image = np.tile(digital_numbers(land), (repeats, repeats, 1))[:side, :side]
    quality = np.tile(fmask(land), (repeats, repeats))[:side, :side]
    made: list[Path] = []
    for index in range(scenes):
        overpass = Overpass(time=datetime(2020, 5, 2, 18, 45, 12) + timedelta(days=3 * index))
        if index >= DISTINCT:
            _link(made[index % DISTINCT], partial / overpass.granule)
            continue
        made.append(write_granule(partial, *_sensed(image, quality, index), overpass))
    return partial.rename(folder)


def _sensed(image: np.ndarray, quality: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What one day shows of the land: the same, a little brighter or darker, with noise, clouds and shadows."""
    rng = np.random.default_rng(seed)
    seen = np.empty_like(image)
    for band in range(image.shape[-1]):
        noise = rng.normal(0, 15, image.shape[:2]).astype(np.float32)
        seen[..., band] = np.rint(image[..., band] * np.float32(rng.uniform(0.9, 1.1)) + noise)
    seen[image == FILL] = FILL
    coarse = fractal((-(-image.shape[0] // 4), -(-image.shape[1] // 4)), rng, roughness=1.5, largest=80)
    thick = coarse.repeat(4, axis=0).repeat(4, axis=1)[: image.shape[0], : image.shape[1]]
    bits = quality.copy()
    bits[thick > 0.8] |= CLOUD
    bits[(thick < -1.8) & (bits != FMASK_FILL)] |= SHADOW
    cloud = (thick > 0.8) & (quality != FMASK_FILL)
    seen[cloud] += 3000
    return seen, bits


def _link(made: Path, folder: Path) -> None:
    folder.mkdir()
    for file in made.iterdir():
        os.link(file, folder / file.name.replace(made.name, folder.name))


def ours(scenes: list[Path], dst: Path, threads: int) -> None:
    """The composite as `data_prep.composite` makes it: granules checked, the file verified."""
    composite(scenes, dst, season=SEASON, threads=threads, min_clear=1)  # as the rival takes them


def decode(scenes: list[Path], dst: Path, threads: int) -> None:
    """The same files' pixels, read and dropped: rows of blocks into memory that is used again."""

    def read(path: Path) -> None:
        with rasterio.open(path) as dataset:
            out = np.empty((BLOCK, dataset.width), dataset.dtypes[0])
            for top in range(0, dataset.height, BLOCK):
                rows = min(BLOCK, dataset.height - top)
                dataset.read(1, window=Window(0, top, dataset.width, rows), out=out[:rows])

    paths = [path for scene in scenes for layer in needed_layers("L30") for path in scene.glob(f"*.{layer}.tif")]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, paths))


def rival(scenes: list[Path], dst: Path, threads: int) -> None:
    """The same composite as one writes it with rioxarray and xarray."""
    import rioxarray
    import xarray as xr

    images, clears = [], []
    for scene in scenes:
        bands = [
            rioxarray.open_rasterio(path).squeeze("band", drop=True)
            for number in ("B02", "B03", "B04", "B05", "B06", "B07")
            for path in scene.glob(f"*.{number}.tif")
        ]
        quality = rioxarray.open_rasterio(next(scene.glob("*.Fmask.tif"))).squeeze("band", drop=True)
        image = xr.concat(bands, dim="band")
        clear = (quality != 255) & (quality & 0b11110 == 0) & (image != -9999).all("band")
        images.append(image.where(clear))
        clears.append(clear)
    mean = xr.concat(images, dim="time").mean("time").round().fillna(-9999)
    count = xr.concat(clears, dim="time").sum("time").expand_dims("band")
    result = xr.concat([mean.astype("int16"), count.astype("int16")], dim="band")
    result.rio.write_nodata(-9999).rio.to_raster(dst, driver="COG", compress="deflate")


WAYS: dict[str, Callable[[list[Path], Path, int], None]] = {"ours": ours, "decode": decode, "rival": rival}
LABELS = {"ours": "data_prep.composite", "decode": "decoding alone", "rival": "rioxarray + xarray"}


def measure(way: str, folder: Path, threads: int) -> dict[str, float]:
    """Seconds of one way by the clock and of all cores, imports not counted, and the process's memory."""
    if way == "rival":
        import rioxarray
        import xarray

        assert rioxarray and xarray
    scenes = find_scenes(folder)
    before = time.process_time()
    seconds = common.timed(lambda: WAYS[way](scenes, FOLDER / f"{way}.tif", threads))
    return {"seconds": seconds, "cpu_seconds": time.process_time() - before, "peak_rss_gib": common.peak_rss_gib()}


def check_equal() -> int:
    """Compare both files pixel by pixel; returns how many pixels have values."""
    with rasterio.open(FOLDER / "ours.tif") as mine, rasterio.open(FOLDER / "rival.tif") as other:
        a, b = mine.read(), other.read()
    if not np.array_equal(a, b):
        raise SystemExit(f"the composites differ in {np.count_nonzero((a != b).any(axis=0)):,} pixels")
    return int(np.count_nonzero(a[-1]))


def benchmark(scenes: int, side: int, threads: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Make scenes, measure all ways in turns; prints the table."""
    folder = write_scenes(scenes, side)
    pixels = scenes * side**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    fits = pixels * RIVAL_BYTES < memory  # the rival holds all scenes at once
    ways = [way for way in WAYS if way != "rival" or fits]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            arguments = ("--what", way, "--folder", str(folder), "--threads", str(threads))
            runs[way].append(common.run_worker("benchmarks.composite", *arguments))
    result: dict[str, Any] = {"scenes": scenes, "side": side, "threads": threads, "rounds": rounds, "ways": {}}
    print(f"\nComposite of {scenes} scenes of {side} x {side}, {threads} threads, {rounds} rounds in turns\n")
    rows = []
    for way in ways:
        found = _summary(runs[way], runs["decode"], pixels)
        result["ways"][way] = found | {"runs": runs[way]}
        rate, times = found["mpixel_per_s"], found["to_decode"]
        spans = [
            f"{one['median']:.{n}f} ({one['min']:.{n}f} to {one['max']:.{n}f})" for one, n in ((rate, 1), (times, 2))
        ]
        rows.append([LABELS[way], *spans, f"{found['cpu_to_decode']:.2f}", f"{found['peak_rss_gib']:.2f}"])
    common.print_table(["", "M scene-pixels/s", "time / decoding", "CPU time / decoding", "peak RSS GiB"], rows)
    if fits:
        result["covered"] = check_equal()
        pairs = zip(runs["ours"], runs["rival"], strict=True)
        ratio = result["faster_than_rival"] = common.spread([b["seconds"] / a["seconds"] for a, b in pairs])
        print(
            f"\n{ratio['median']:.1f} times as fast as rioxarray + xarray ({ratio['min']:.1f} to {ratio['max']:.1f}); "
            f"equal in all {side * side:,} pixels, {result['covered']:,} with values"
        )
    else:
        print(f"\nrioxarray + xarray not run: it would take about {pixels * RIVAL_BYTES / 2**30:.0f} GiB")
    for way in ways:
        (FOLDER / f"{way}.tif").unlink(missing_ok=True)
    return result


def _summary(runs: list[dict[str, float]], decoding: list[dict[str, float]], pixels: int) -> dict[str, Any]:
    """Rates of a way and, by each round itself, its time beside decoding: a busy machine slows neighbours alike."""
    clock = [run["seconds"] / other["seconds"] for run, other in zip(runs, decoding, strict=True)]
    cpu = [run["cpu_seconds"] / other["cpu_seconds"] for run, other in zip(runs, decoding, strict=True)]
    return {
        "mpixel_per_s": common.spread([pixels / run["seconds"] / 1e6 for run in runs]),
        "to_decode": common.spread(clock),
        "cpu_to_decode": statistics.median(cpu),
        "peak_rss_gib": max(run["peak_rss_gib"] for run in runs),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `benchmarks.run --only prep` shares."""
    parser.add_argument("--scenes", type=int, default=8, help="scenes of the composite")
    parser.add_argument("--side", type=int, default=1830, help="pixels of their edge; 3660 in HLS")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))), help="for decoding")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each way is run")


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--json", type=Path, default=common.FOLDER / "composite.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.what, options.folder, options.threads)))
        return
    result = benchmark(options.scenes, options.side, options.threads, options.rounds)
    common.write_json(options.json, {"machine": common.machine(), "composite": result})


if __name__ == "__main__":
    main()
