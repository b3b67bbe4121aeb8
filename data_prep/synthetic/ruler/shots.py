"""The ruler world's shots: every label tells its row and column, and every shot to be dropped carries a poison."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gedi.names import BEAMS
from data_prep.season import Season
from data_prep.synthetic.gedi_file import EPOCH, granule_name, seconds_since_epoch, shot_numbers, write_gedi
from data_prep.synthetic.ruler.tiles import RulerTile, clearly_owned

CELL = 112  # pixels: shots are spread evenly over cells of this size
PIXELS_PER_CELL = 32
CORNER_M = 14.9  # from the centre of a pixel, whose edge is at 15
CORNERS = [(-CORNER_M, -CORNER_M), (CORNER_M, -CORNER_M), (-CORNER_M, CORNER_M), (CORNER_M, CORNER_M)]
SHOT_POISONS = {
    "l4_quality_flag": 1100,
    "degrade_flag": 1200,
    "selected_algorithm": 1300,
    "leaf_off_flag": 1400,
    "season": 1500,
    "other_year": 1600,
    "outside": 1700,
    "water_persistence_below": 1800,
    "urban_proportion_below": 1900,
    "sensitivity_min": 2000,
    "sensitivity_min_tropical_evergreen": 2100,
}
# Filters in their order; `other_year` is one of `season`.
FILTERS = (
    "algorithm_run_flag",
    "l4_quality_flag",
    "agbd_valid",
    "degrade_flag",
    "selected_algorithm",
    "leaf_off_flag",
    "water_persistence_below",
    "urban_proportion_below",
    "season",
    "sensitivity_min",
    "sensitivity_min_tropical_evergreen",
)
# What a pixel is there for, in turn. `kept` is one good shot, `corners` four of them.
KINDS = (
    "corners", "l4_quality_flag", "kept", "zero", "degrade_flag", "algorithm_10", "leaf_off_flag", "corners", "season",
    "kept", "other_year", "algorithm_run_flag", "kept", "selected_algorithm", "agbd_valid", "degraded", "kept", "alone",
    "water_persistence_below", "urban_proportion_below", "sensitivity_min", "sensitivity_min_tropical_evergreen",
)  # fmt: skip
_LEAF_OFF = "land_cover_data/leaf_off_flag"
_WATER, _URBAN = "land_cover_data/landsat_water_persistence", "land_cover_data/urban_proportion"
_PFT, _EVERGREEN = "land_cover_data/pft_class", 2  # evergreen broadleaf trees
_HARDLY = {
    "water_persistence_below": {_WATER: 9},
    "urban_proportion_below": {_URBAN: 49},
}  # good ones, close to the bar
# One file each for every group of tiles: product version and beams that it lacks.
FILES = {
    "new": ("002_02", ()),
    "old": ("002_01", ("BEAM0010",)),
    "season": ("002_02", ()),
    "other_year": ("002_02", ()),
}


@dataclass
class Shot:
    """One shot to be made. `fate` is `kept`, `no_data`, `outside` or the name of the filter that drops it."""

    tile: str
    row: int
    col: int
    corner: tuple[float, float]
    file: str
    agbd: float
    fate: str = "kept"
    flags: dict[str, Any] = field(default_factory=dict)
    lon: float = 0.0
    lat: float = 0.0
    number: int = 0


def tile_shots(tile: RulerTile, tiles: list[RulerTile], seen: NDArray[np.bool_], seed: int) -> list[Shot]:
    """Return a tile's shots, at pixels that it owns among all tiles, with their longitudes and latitudes.

    `seen` (H, W) says whether any scene of the season sees a pixel clear; another seed, other pixels.
    """
    shots = list(_edge_shots(tile)) + list(_pixel_shots(_pixels(tile, tiles, seen, seed), tile, seen))
    rows, cols, dx, dy = np.array([(s.row, s.col, *s.corner) for s in shots], np.float64).T
    lon, lat = tile.places(rows, cols, dx, dy)
    held = np.any([other.inside(lon, lat) for other in tiles], axis=0)
    kept = []
    for shot, x, y, in_a_tile in zip(shots, lon, lat, held, strict=True):
        shot.lon, shot.lat = float(x), float(y)
        if shot.fate != "outside" or not in_a_tile:  # what is outside one tile may be inside its neighbour
            kept.append(shot)
    return kept


def _pixels(tile: RulerTile, tiles: list[RulerTile], seen: NDArray[np.bool_], seed: int) -> list[tuple[int, int]]:
    """Pixels for shots: some of each cell, and some that no scene sees; all clearly the tile's own."""
    rng = np.random.default_rng([seed, tile.zone, *tile.name.encode()])
    height, width = tile.shape
    rows, cols = [], []
    for top in range(0, height, CELL):
        for left in range(0, width, CELL):
            h, w = min(CELL, height - top), min(CELL, width - left)
            picked = rng.choice(h * w, min(PIXELS_PER_CELL, h * w // 8), replace=False)
            rows.append(top + picked // w)
            cols.append(left + picked % w)
    r, c = np.concatenate(rows), np.concatenate(cols)
    # A poison in the first row could pass for a label of that row.
    good = (r > 0) & seen[r, c]
    hidden = np.argwhere(~seen[1:])[:: max(1, (~seen).sum() // 20)] + (1, 0)
    r, c = np.concatenate([r[good], hidden[:, 0]]), np.concatenate([c[good], hidden[:, 1]])
    # At a pixel's corners, where shots are, not at its centre: a neighbour's edge may run between them.
    corners = [np.full((2, len(r)), [[dx], [dy]]) for dx, dy in CORNERS]
    owned = np.all(
        [clearly_owned(tile, tiles, *tile.places(r.astype(float), c.astype(float), *offset)) for offset in corners],
        axis=0,
    )
    return [(int(row), int(col)) for row, col in zip(r[owned], c[owned], strict=True)]


def _pixel_shots(pixels: list[tuple[int, int]], tile: RulerTile, seen: NDArray[np.bool_]) -> Iterator[Shot]:
    """Make the shots of each pixel; kinds, corners and flags take turns."""
    kinds, corners, leaf = cycle(KINDS), cycle(CORNERS), cycle((255, 0, 255))
    degrade, degraded, invalid = cycle((4, 34, 74)), cycle((38, 3, 8, 10, 68)), cycle((np.nan, -9999.0, -1.0, np.inf))
    good_files = cycle(("new", "new", "old"))
    water, urban, tropical = cycle((10, 80, 255)), cycle((50, 100)), abs(tile.centre[1]) < 23.5

    def shot(file: str, agbd: float, fate: str = "kept", flags: dict[str, Any] | None = None) -> Shot:
        return Shot(tile.name, row, col, next(corners), file, agbd, fate, {_LEAF_OFF: next(leaf)} | (flags or {}))

    for row, col in pixels:
        code = 4096.0 * row + col
        if not seen[row, col]:
            yield shot("new", code, "no_data")
            continue
        kind = next(kinds)
        poison = SHOT_POISONS.get(kind, 0)
        if kind == "corners":
            yield from [shot(next(good_files), code) for _ in CORNERS]
        elif kind == "zero":  # together they tell the place; without the clipped one the label is twice as high
            yield shot("new", 0.0)
            yield shot("new", 2 * code)
        elif kind == "algorithm_10":
            yield shot("new", code, flags={"selected_algorithm": 10})
        elif kind == "degraded":
            yield shot("new", code, flags={"degrade_flag": next(degraded)})
        elif kind == "alone":  # a poison without a good shot beside it
            yield shot("new", SHOT_POISONS["l4_quality_flag"], "l4_quality_flag", {"l4_quality_flag": 0})
        else:
            yield shot(next(good_files), code, flags=_HARDLY.get(kind))
        if kind == "l4_quality_flag":
            yield shot("old", poison, kind, {kind: 0})
        elif kind == "degrade_flag":
            yield shot("new", poison, kind, {kind: next(degrade)})
        elif kind == "leaf_off_flag":
            yield shot("new", poison, kind, {_LEAF_OFF: 1})
        elif kind == "selected_algorithm":
            yield shot("old", poison, kind, {kind: 10})
        elif kind == "algorithm_run_flag":
            yield shot("new", -9999.0, kind, {kind: 0, "l4_quality_flag": 0, "l2_quality_flag": 0})
        elif kind == "agbd_valid":
            yield shot("new", next(invalid), kind)
        elif kind == "water_persistence_below":
            yield shot("new", poison, kind, {_WATER: next(water)})
        elif kind == "urban_proportion_below":
            yield shot("new", poison, kind, {_URBAN: next(urban)})
        elif kind == "sensitivity_min":
            yield shot("new", poison, kind, {"sensitivity": 0.94})
        elif kind == "sensitivity_min_tropical_evergreen":  # elsewhere such a shot is a good one
            value, fate = (poison, kind) if tropical else (code, "kept")
            yield shot("new", value, fate, {"sensitivity": 0.97, _PFT: _EVERGREEN})
        elif kind in ("season", "other_year"):
            yield shot(kind, poison, "season")


def _edge_shots(tile: RulerTile) -> Iterator[Shot]:
    """Good shots 0.1 m beyond the four sides: cutting off decimals instead of flooring would let some in."""
    height, width = tile.shape
    sides = {(-1, width // 3): (0.0, -CORNER_M), (height, width // 2): (0.0, CORNER_M)}
    sides |= {(height // 3, -1): (CORNER_M, 0.0), (height // 2, width): (-CORNER_M, 0.0)}
    for (row, col), corner in sides.items():
        yield Shot(tile.name, row, col, corner, "new", SHOT_POISONS["outside"], "outside")


def write_orbits(folder: Path, shots: list[Shot], season: Season, group: int) -> dict[str, dict[str, Any]]:
    """Write the files of one group of tiles, whose season and shots these are; the shots' `number` is set.

    Returns:
        By file name: product version, absent beams, number of shots, and how many each filter drops.
    """
    plan = {}
    for index, (file, (version, absent)) in enumerate(FILES.items()):
        orbit = 6500 + 100 * group + index
        mine = [shot for shot in shots if shot.file == file]
        # Good shots take the first and the last moment of the season.
        mine.sort(key=lambda shot: (shot.fate != "kept") == (shot.file == "new"))
        seconds = _seconds(file, season, len(mine))
        beams = [beam for beam in BEAMS if beam not in absent][: len(mine)]  # no beam without a shot
        path = folder / granule_name(EPOCH + timedelta(seconds=seconds[0]), orbit, version=version)
        arrays = {}
        for k, beam in enumerate(beams):
            numbers = shot_numbers(orbit, beam, len(mine[k :: len(beams)]))
            arrays[beam] = _beam(mine[k :: len(beams)], numbers, seconds[k :: len(beams)])
        write_gedi(path, arrays)
        plan[path.name] = {
            "version": version,
            "absent_beams": [beam for beam in BEAMS if beam not in beams],
            "shots": len(mine),
            "dropped": {name: sum(shot.fate == name for shot in mine) for name in FILTERS},
            "outside": sum(shot.fate == "outside" for shot in mine),
        }
    return plan


def _seconds(file: str, season: Season, count: int) -> list[float]:
    """When the shots of a file were taken: from the first moment of the season, until its last, and right after it."""
    start, stop = (seconds_since_epoch(datetime.combine(day, time())) for day in (season.start, season.stop))
    step = 1 / 128  # exact in binary; real shots follow each other after 8.264 ms
    first = {"new": start, "old": stop - count * step, "season": stop, "other_year": start + 406 * 86400}[file]
    return [first + i * step for i in range(count)]


def _beam(shots: list[Shot], numbers: NDArray[np.uint64], seconds: list[float]) -> dict[str, Any]:
    """The arrays of one beam's shots, whose numbers are set."""
    for shot, number in zip(shots, numbers, strict=True):
        shot.number = int(number)
    turns, ones = np.arange(len(shots)), np.ones(len(shots))
    classes = np.array([1, _EVERGREEN, 4, 5, 6, 11])[turns % 6]
    flagged = ("selected_algorithm", "l4_quality_flag", "l2_quality_flag", "algorithm_run_flag")
    arrays = dict.fromkeys(flagged, ones) | {
        "sensitivity": np.where(classes == _EVERGREEN, 0.981, 0.951 + 0.004 * (turns % 10)),
        _PFT: classes,
    }
    for name in sorted({name for shot in shots for name in shot.flags}):
        usual = arrays.get(name, 0 * ones)
        arrays[name] = np.array([shot.flags.get(name, usual[k]) for k, shot in enumerate(shots)])
    return arrays | {
        "shot_number": numbers,
        "delta_time": np.array(seconds),
        "lat_lowestmode": np.array([shot.lat for shot in shots]),
        "lon_lowestmode": np.array([shot.lon for shot in shots]),
        "agbd": np.array([shot.agbd for shot in shots], np.float32),
        "solar_elevation": np.where(turns % 2, 35.0, -25.0),
    }
