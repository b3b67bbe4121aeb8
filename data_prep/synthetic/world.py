"""Writes a world to learn from: granules of one to three tiles, GEDI orbits over them, and `plan.json`.

`plan.json` beside the files:

    world, size, seed    as given
    season               of the scenes and the shots
    tiles.NAME           epsg, transform, scenes [granule]
    gedi                 names of the files
    shots, kept          how many there are, how many a recommended set of filters keeps
    limits               the scores of the kept shots' labels (mean of a pixel's shots) that no model can pass, by what
                         it knows; each with r2, rmse (Mg/ha) and r2_log (of log biomass)
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from biomass_jax.runtime.files import write_json
from data_prep.gedi.names import BEAMS
from data_prep.synthetic.forest.land import Floats
from data_prep.synthetic.forest.view import Day, under_sky
from data_prep.synthetic.gedi_file import fit_error, granule_name, seconds_since_epoch, shot_numbers, write_gedi
from data_prep.synthetic.granule import SMALLEST, Overpass, write_granule
from data_prep.synthetic.height_file import height_name, height_of, profile_of, write_heights
from data_prep.synthetic.landscape import PIXEL_M

TILES = ("10SFF", "10SGF", "10SHF")  # neighbours, from west to east
EPSG, LEFT, TOP = 32610, 600000.0, 4100040.0
SHARED = 328  # pixels that neighbours share
SEASON = (datetime(2020, 5, 1), datetime(2020, 10, 1))
ALONG_M, ACROSS_M, ORBITS_APART_M = 60.0, 600.0, 9000.0  # between shots, beams, orbits
SLANT = 0.75  # metres east a metre north: the orbit's inclination

Clear = Callable[[Day], Floats]


class World(NamedTuple):
    """What a world is made of; places are in metres, areas (H, W) in pixels from `LEFT`, `TOP` on."""

    name: str
    seed: int
    biomass: Callable[[Floats, Floats], Floats]  # Mg/ha at eastings and northings
    clear: Callable[[float, float, tuple[int, int]], Clear]  # (left, top, shape) -> a day's land under a clear sky
    limits: Callable[[Mapping[str, np.ndarray], tuple[int, int]], dict[str, dict[str, float]]]  # of shots and an area
    astray_m: float = 0.0  # standard deviation of a shot's place along each axis: geolocation
    stripes: float = 0.0  # how much the angle of view changes the brightness, as a share


def write_world(
    world: World, out: Path, *, shape: tuple[int, int], scenes: int, tiles: int, heights: int | None = None
) -> dict[str, Any]:
    """Write HLS granules, GEDI orbits over them, and `plan.json`; return what that holds.

    Args:
        world: what to write; the same world gives the same bytes.
        out: folder that takes `granules/hls/`, `granules/gedi/` and `plan.json`.
        shape: (H, W) of a tile in pixels.
        scenes: number of dates in the season.
        tiles: number of tiles; neighbours overlap.
        heights: 2 or 3: write L2A files of that version too, of the same shots, into `granules/gedi_l2a`; a shot's rh98
            follows from its biomass by `height_file.height_of`.

    Raises:
        ValueError: too small a shape, no scene, or not 1 to 3 tiles.
    """
    if min(shape) < SMALLEST or scenes < 1 or not 1 <= tiles <= len(TILES):
        raise ValueError(
            f"a forest of {tiles} tiles of {shape[0]} x {shape[1]} pixels with {scenes} scenes can't be made; expected "
            f"1 to {len(TILES)} tiles of at least {SMALLEST} x {SMALLEST} and a scene"
        )
    step = shape[1] - min(SHARED, 2 * shape[1] // 5)
    plan: dict[str, Any] = {"world": world.name, "size": list(shape), "seed": world.seed, "tiles": {}}
    plan["season"] = "/".join(f"{day:%Y-%m-%d}" for day in SEASON)
    for index, tile in enumerate(TILES[:tiles]):
        left = LEFT + PIXEL_M * step * index
        names = _write_scenes(out / "granules" / "hls", world, tile, left, shape, scenes)
        plan["tiles"][tile] = {"epsg": EPSG, "transform": [PIXEL_M, 0, left, 0, -PIXEL_M, TOP], "scenes": names}
    area = (shape[0], step * (tiles - 1) + shape[1])
    shots, plan["gedi"] = _write_orbits(out / "granules", world, area, heights)
    plan["shots"], plan["kept"] = len(shots["kept"]), int(shots["kept"].sum())
    plan["limits"] = world.limits(shots, area)
    write_json(out / "plan.json", plan, indent=1)
    return plan


def _write_scenes(folder: Path, world: World, tile: str, left: float, shape: tuple[int, int], scenes: int) -> list[str]:
    """Write a tile's granules from the season's start to its end; leaves unfold until the middle and fade slowly."""
    clear = world.clear(left, TOP, shape)
    length, names = SEASON[1] - SEASON[0], []
    for k in range(scenes):
        share = (k + 0.5) / scenes
        leaves = 1 - 1.6 * (share - 0.55) ** 2
        day = Day(leaves, clouds=(0.12, 0.3, 0.2)[k % 3], off_swath=k % 4 == 2, stripes=world.stripes)
        when = SEASON[0] + timedelta(days=int(share * length.days), hours=18, minutes=45, seconds=12)
        overpass = Overpass(tile, when, EPSG, left, TOP, scale=("file", "band", "both")[k % 3], joined=k % 3 == 1)
        image, fmask = under_sky(clear(day), day, np.random.default_rng([world.seed, k, *tile.encode()]))
        names.append(write_granule(folder, image, fmask, overpass).name)
    return names


def _tracks(area: tuple[int, int], rng: np.random.Generator) -> list[dict[str, tuple[Floats, Floats]]]:
    """For each orbit the places (x, y) of each beam's shots in metres: slanting lines that cover an area (H, W).

    The area is in pixels from `LEFT`, `TOP` on; tracks and shots are shifted a little at random.
    """
    height, width = (PIXEL_M * n for n in area)
    north = np.arange(ALONG_M / 2, height, ALONG_M / np.hypot(1, SLANT))
    orbits = []
    for index in range(max(2, int(np.ceil((width + SLANT * height) / ORBITS_APART_M)))):
        middle = ORBITS_APART_M * (index + rng.uniform(0.3, 0.7)) - SLANT * height
        beams = {}
        for k, beam in enumerate(BEAMS):
            east = middle + SLANT * north + ACROSS_M * np.hypot(1, SLANT) * (k - 3.5)
            if index % 2:  # every other orbit comes from the north
                east = width - east
            east = east + rng.uniform(-5, 5, len(north))
            inside = (east >= 0) & (east < width)
            jitter = rng.uniform(-5, 5, len(north))  # off the lines between pixels too
            beams[beam] = (LEFT + east[inside], TOP - height + (north + jitter)[inside])
        orbits.append(beams)
    return orbits


def _write_orbits(
    folder: Path, world: World, area: tuple[int, int], heights: int | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Write the files; return all shots (x, y, agbd, kept) and the files' names."""
    rng = np.random.default_rng([world.seed, 77])
    to_degrees = Transformer.from_crs(EPSG, 4326, always_xy=True)
    orbits = _tracks(area, rng)
    gathered: list[Mapping[str, np.ndarray]] = []
    names = []
    for index, places in enumerate(orbits):
        start = SEASON[0] + (SEASON[1] - SEASON[0]) * (index + 0.5) / len(orbits)
        start, orbit = start.replace(microsecond=0), 7000 + 61 * index
        beams = {}
        for beam, (x, y) in places.items():
            seen = (
                [metres + world.astray_m * rng.standard_normal(len(x)) for metres in (x, y)]
                if world.astray_m
                else (x, y)
            )
            arrays = _measure(world.biomass(*seen), rng)
            lon, lat = to_degrees.transform(x, y)
            arrays |= {
                "shot_number": shot_numbers(orbit, beam, len(x)),
                "delta_time": seconds_since_epoch(start) + np.arange(len(x)) * 0.008264,
                "lon_lowestmode": np.asarray(lon),
                "lat_lowestmode": np.asarray(lat),
            }
            gathered.append({"x": x, "y": y, "agbd": arrays["agbd"], "kept": arrays.pop("kept")})
            beams[beam] = arrays
        names.append(write_gedi(folder / "gedi" / granule_name(start, orbit), beams).name)
        if heights is not None:
            path = folder / "gedi_l2a" / height_name(start, orbit, version=heights)
            write_heights(path, {name: _heights(arrays) for name, arrays in beams.items()}, version=heights)
    return {key: np.concatenate([shots[key] for shots in gathered]) for key in gathered[0]}, names


def _heights(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What L2A tells of the shots of a beam of L4A; where that has no biomass, the waveform is no good either."""
    same = (
        *("shot_number", "delta_time", "lon_lowestmode", "lat_lowestmode", "degrade_flag", "selected_algorithm"),
        *("sensitivity", "solar_elevation", "land_cover_data/leaf_off_flag", "land_cover_data/pft_class"),
    )
    rh = profile_of(height_of(arrays["agbd"]))
    return {name: arrays[name] for name in same} | {"rh": rh, "quality_flag": arrays["l2_quality_flag"]}


def _measure(biomass: Floats, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Return what GEDI makes of biomass (N,): values with noise, errors, and flags; bad shots hold nonsense."""
    count = len(biomass)
    error = rng.choice([3.0, 4.0, 5.0], count) * rng.uniform(0.97, 1.03, count)
    agbd = np.maximum(biomass + error * rng.standard_normal(count), 0)
    run = rng.uniform(size=count) > 0.05
    quality = run & (rng.uniform(size=count) > 0.15)
    leaf_off = rng.choice(np.array([0, 255, 1]), count, p=[0.37, 0.6, 0.03])
    degrade = rng.choice(np.array([0, 3, 8, 38, 4, 34]), count, p=[0.8, 0.05, 0.05, 0.05, 0.03, 0.02])
    kept = quality & (leaf_off != 1) & (degrade % 10 != 4)
    agbd = np.where(kept, agbd, rng.exponential(250, count)).astype(np.float32)
    made = {
        "agbd": np.where(run, agbd, np.float32(-9999)),
        "algorithm_run_flag": run,
        "l2_quality_flag": quality,
        "l4_quality_flag": quality,
        "degrade_flag": degrade,
        "selected_algorithm": rng.choice(np.array([1, 2, 10]), count),
        "sensitivity": np.where(quality, rng.uniform(0.951, 0.99, count), rng.uniform(0.3, 0.95, count)),
        "solar_elevation": rng.uniform(-50, 50, count),
        "land_cover_data/leaf_off_flag": leaf_off,
        "land_cover_data/pft_class": rng.choice(np.array([1, 4]), count),
        "kept": kept,
    }
    t_se = fit_error(error, agbd.astype(np.float64), made["land_cover_data/pft_class"])
    return made | {"agbd_t_se": np.where(run, t_se, -9999)}


def pixels_of_shots(shots: Mapping[str, np.ndarray], area: tuple[int, int]) -> tuple[NDArray[np.int64], Floats]:
    """The pixels of an area that hold kept shots, as numbers row by row, and their labels, Mg/ha."""
    keep = shots["kept"]
    cols = np.floor((shots["x"][keep] - LEFT) / PIXEL_M).astype(np.int64)
    rows = np.floor((TOP - shots["y"][keep]) / PIXEL_M).astype(np.int64)
    pixels, inverse = np.unique(rows * area[1] + cols, return_inverse=True)
    return pixels, np.bincount(inverse, shots["agbd"][keep].astype(np.float64)) / np.bincount(inverse)


def scores(labels: Floats, predicted: Floats) -> dict[str, float]:
    """R2, RMSE (Mg/ha) and R2 of logs of predictions; labels and predictions of 0 are left out of the last."""
    positive = (labels > 0) & (predicted > 0)
    logs = np.log(labels[positive])
    squares = float(np.mean((labels - predicted) ** 2))
    return {
        "r2": round(1 - squares / float(labels.var()), 4),
        "rmse": round(squares**0.5, 3),
        "r2_log": round(1 - float(np.mean((logs - np.log(predicted[positive])) ** 2)) / float(logs.var()), 4),
    }
