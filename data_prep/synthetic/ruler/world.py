"""The ruler world: granules and orbits without noise, in which every pixel and every label tells where it belongs.

Bands hold their row and column (`ruler_scenes.band_value`), shots agbd = 4096 row + column. What a correct chain has to
drop carries a poison that is told apart from these. `plan.json` beside the files says what was planted:

    size, seed, year     as given
    tiles.NAME           epsg, user_defined, transform (of the main form), centre [lon, lat], season,
                         scenes [{granule, role}] (role `season`: they count), clear_counts {number of scenes: pixels},
                         labels [[row, col, kept shots]], kept, no_data (good shots on pixels that no scene sees)
    gedi.FILE            version, absent_beams, shots, dropped {filter: shots} in the filters' order,
                         outside (good shots 0.1 m beyond a tile's edge, in no tile)
    shots                [[shot_number, tile, row, col, dx, dy, fate]]: dx and dy in metres from the pixel's centre;
                         fate is `kept`, `no_data`, `outside` or the filter that drops it
"""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biomass_jax.data.bands import BANDS, FILL
from biomass_jax.runtime.files import write_text
from data_prep.hls.granules import FMASK_FILL
from data_prep.synthetic.granule import SMALLEST, Overpass, write_granule
from data_prep.synthetic.landscape import PIXEL_M
from data_prep.synthetic.ruler.shots import Shot, tile_shots, write_orbits
from data_prep.synthetic.ruler.tiles import RulerTile, ruler_tiles

IN_SEASON = 4  # scenes of a season that count
UNUSED = {"L30": ("B01", "B09", "B10", "B11"), "S30": ("B01", "B05", "B06", "B07", "B08", "B09", "B10")}
SCENE_POISONS = {"out_of_season": 3000, "other_year": 2000, "other_sensor": 1500, "older_duplicate": 900}

YEAR = 2020


class PixelState(NamedTuple):
    """What a pixel of a scene is: its Fmask value, what is added to its digital numbers, which of them are fill."""

    fmask: int
    poison: int = 0
    fill: str = ""  # `all` bands, `one` band, or none
    clear: bool = False


STATES = {
    # All that has to be kept: every level of aerosol, water, the unused bit 0, a clear pixel whose Fmask is 0.
    "climatology": PixelState(0b00_000000, clear=True),
    "low": PixelState(0b01_000000, clear=True),
    "average": PixelState(0b10_000000, clear=True),
    "high": PixelState(0b11_000000, clear=True),
    "water": PixelState(0b01_100000, clear=True),
    "cirrus": PixelState(0b01_000001, clear=True),
    # All that has to be dropped.
    "cloud": PixelState(0b11_000010, 7000),
    "adjacent": PixelState(0b01_000100, 500),
    "shadow": PixelState(0b10_001000, -400),
    "snow": PixelState(0b01_010000, 4000),
    "masked": PixelState(FMASK_FILL, 6000),  # values under an Fmask without
    "fill": PixelState(FMASK_FILL, fill="all"),
    "unmasked_fill": PixelState(0b01_000000, fill="all"),
    "one_band": PixelState(0b01_000000, 250, fill="one"),
}
# One row a class of pixels, one column a scene of the season. In rows with one clear state that scene is needed.
PATTERN = [
    ("low", "high", "average", "climatology"),
    ("cloud", "cloud", "cloud", "water"),
    ("adjacent", "shadow", "snow", "high"),
    ("snow", "cloud", "cirrus", "adjacent"),
    ("one_band", "low", "one_band", "average"),
    ("masked", "climatology", "fill", "cloud"),
    ("unmasked_fill", "average", "unmasked_fill", "low"),
    ("low", "cloud", "low", "low"),
    ("water", "adjacent", "water", "cirrus"),
    ("fill", "fill", "low", "fill"),
    ("shadow", "low", "high", "cloud"),
    ("average", "one_band", "adjacent", "shadow"),
    ("low", "low", "low", "low"),
    ("masked", "water", "masked", "one_band"),
    ("cirrus", "snow", "average", "unmasked_fill"),
    ("low", "shadow", "low", "snow"),
    ("cloud", "one_band", "fill", "shadow"),  # never seen: class NEVER, rare
]
NEVER = len(PATTERN) - 1


class RulerScene(NamedTuple):
    """A granule to be made: what it is there for, when and how it was sensed, which column of PATTERN it shows."""

    role: str  # `season` or a key of SCENE_POISONS
    overpass: Overpass
    column: int | None = None


def band_value(name: str, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the digital number of a band at rows and columns (broadcast)."""
    return {
        "BLUE": 1 + rows + 0 * cols,
        "GREEN": 4001 + 0 * rows + cols,
        "RED": 8001 + (rows + 2 * cols) % 1000,
        "NIR_NARROW": 9501 + (2 * rows + cols) % 1000,
        "SWIR_1": 11001 + 0 * (rows + cols),
        "SWIR_2": 12001 + 0 * (rows + cols),
    }[name]


def pixel_classes(shape: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Return (H, W) which row of PATTERN each pixel follows; about one in a hundred is NEVER seen."""
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    classes = (3 * rows + 5 * cols + 7 * (rows // 16) + seed) % NEVER
    return np.where((7 * rows + 11 * cols + seed) % 97 == 5, NEVER, classes).astype(np.uint8)


def clear_counts(shape: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Return (H, W) how many scenes of the season see each pixel clear."""
    counts = [sum(STATES[state].clear for state in states) for states in PATTERN]
    return np.array(counts, np.uint8)[pixel_classes(shape, seed)]


def _ruler_image(
    shape: tuple[int, int], seed: int, column: int | None, poison: int
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Digital numbers (H, W, 6), to each of which `poison` is added, and Fmask (H, W) of a scene.

    It shows a column of PATTERN, or a clear sky where that is None; the seed shifts the classes of pixels.
    """
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    states = [STATES["low"] if column is None else STATES[row[column]] for row in PATTERN]
    classes = pixel_classes(shape, seed)
    added = np.array([state.poison for state in states], np.int16)[classes] + np.int16(poison)
    missing = np.array([["", "all", "one"].index(state.fill) for state in states], np.uint8)[classes]
    image = np.empty((*shape, len(BANDS)), np.int16)
    for index, band in enumerate(BANDS):
        values = band_value(band.name, rows, cols).astype(np.int16) + added
        gone = (missing == 1) | ((missing == 2) & ((rows + cols) % len(BANDS) == index))
        image[..., index] = np.where(gone, FILL, values)
    return image, np.array([state.fmask for state in states], np.uint8)[classes]


def _tile_scenes(tile: RulerTile, index: int) -> list[RulerScene]:
    """A tile's scenes: those of the season, from its first day to its last, and four that don't count.

    Tiles differ by their `index` in which of two duplicates comes first by name.
    """
    start, stop = tile.season(YEAR).start, tile.season(YEAR).stop
    days = (stop - start).days
    noon = datetime.combine(start, time(18, 45, 12))
    passes = [noon + timedelta(days=d) for d in (0, days // 3, 2 * days // 3, days - 1)]
    if index == 0:
        passes[2] = passes[1] + timedelta(minutes=10)  # ten minutes apart: no duplicates
    first: dict[str, Any] = {"tile": tile.name, "left": tile.left, "top": tile.top, "epsg": tile.epsg}
    first["user_defined"] = tile.user_defined
    scenes = [
        RulerScene("season", Overpass(time=passes[k], scale=("file", "band", "both")[k % 3], joined=k == 1, **first), k)
        for k in range(IN_SEASON)
    ]
    if tile.epsg // 100 == 326 and tile.top < 0:  # one scene in the usual southern form
        usual = first | {"epsg": tile.epsg + 100, "top": tile.top + 1e7}
        scenes[1] = RulerScene("season", Overpass(time=passes[1], scale="band", joined=True, **usual), 1)
    elif tile.user_defined:
        scenes[2] = RulerScene("season", Overpass(time=passes[2], scale="both", **first | {"user_defined": False}), 2)

    outside = start - timedelta(days=1) if index % 2 else stop  # the day before the season, or the first after it
    apart = timedelta(minutes=9, seconds=59) if index % 2 else timedelta(seconds=-24)
    processed = scenes[0].overpass.processing_time - timedelta(days=1)

    def other(role: str, when: datetime, **how: object) -> RulerScene:
        return RulerScene(role, Overpass(time=when, **(first | how)))

    return [
        *scenes,
        # it sees what the newer one sees and no more, or its values would be used there
        other("older_duplicate", passes[0] + apart, processed=processed)._replace(column=0),
        other("out_of_season", datetime.combine(outside, time(18, 45, 12))),
        other("other_year", passes[1] - timedelta(days=366)),
        other("other_sensor", passes[1] + timedelta(minutes=2), sensor="S30", scale="band"),
    ]


def write_ruler_world(
    out: Path, *, shape: tuple[int, int] = (460, 700), seed: int = 0, tiles: Sequence[str] | None = None
) -> Path:
    """Write HLS granules of six tiles (or some of them), GEDI orbits over them, and what a correct chain makes of them.

    Args:
        out: folder that takes `granules/hls/`, `granules/gedi/` and `plan.json`.
        shape: (H, W) of a tile in pixels; not square, so that rows and columns aren't mistaken for each other.
        seed: another seed, other pixels for shots and clouds; the same seed gives the same bytes.
        tiles: names of the tiles to write, all six where None; images, labels and poisons of a tile are the same then.

    Returns:
        The path of `plan.json`.

    Raises:
        ValueError: too small a shape, or an unknown tile.
    """
    if min(shape) < SMALLEST:
        raise ValueError(f"a tile of {shape[0]} x {shape[1]} pixels is too small; at least {SMALLEST} x {SMALLEST}")
    everything = ruler_tiles(shape)
    names = [tile.name for tile in everything]
    unknown = sorted(set(tiles or ()) - set(names))
    if unknown:
        raise ValueError(f"the ruler world has no tile {', '.join(unknown)}; it has {', '.join(names)}")

    plan: dict[str, Any] = {"world": "ruler", "size": list(shape), "seed": seed, "year": YEAR, "tiles": {}, "gedi": {}}
    by_group: dict[int, list[Shot]] = {}
    for index, tile in enumerate(everything):
        if tiles is None or tile.name in tiles:
            counts = clear_counts(shape, seed + index)
            shots = tile_shots(tile, everything, counts > 0, seed)
            by_group.setdefault(tile.group, []).extend(shots)
            scenes = _write_scenes(out / "granules" / "hls", tile, index, seed)
            plan["tiles"][tile.name] = _tile_plan(tile, scenes, counts, shots)
    for group, shots in by_group.items():
        season = next(tile for tile in everything if tile.group == group).season(YEAR)
        plan["gedi"] |= write_orbits(out / "granules" / "gedi", shots, season, group)
    plan["shots"] = [
        [shot.number, shot.tile, shot.row, shot.col, *shot.corner, shot.fate]
        for shot in sorted((shot for shots in by_group.values() for shot in shots), key=lambda shot: shot.number)
    ]
    path = out / "plan.json"
    write_text(path, json.dumps(plan, separators=(",", ":")).replace('],["', '],\n["') + "\n")
    return path


def _write_scenes(folder: Path, tile: RulerTile, index: int, seed: int) -> list[dict[str, str]]:
    written = []
    for scene in _tile_scenes(tile, index):
        poison = SCENE_POISONS.get(scene.role, 0)
        image, fmask = _ruler_image(tile.shape, seed + index, scene.column, poison)
        # Real granules have all their bands; most users fetch the six.
        whole = scene.column == 0 or scene.role == "other_sensor"
        unused = UNUSED[scene.overpass.sensor] if whole else ()
        others = {number: np.full(tile.shape, 20000 + int(number[1:]), np.int16) for number in unused}
        write_granule(folder, image, fmask, scene.overpass, others)
        written.append({"granule": scene.overpass.granule, "role": scene.role})
    return written


def _tile_plan(tile: RulerTile, scenes: list[dict[str, str]], counts: np.ndarray, shots: list[Shot]) -> dict[str, Any]:
    labels = Counter((shot.row, shot.col) for shot in shots if shot.fate == "kept")
    return {
        "epsg": tile.epsg,
        "user_defined": tile.user_defined,
        "transform": [PIXEL_M, 0, tile.left, 0, -PIXEL_M, tile.top],
        "centre": list(tile.centre),
        "season": tile.season(YEAR).text,
        "scenes": scenes,
        "clear_counts": {str(n): int(pixels) for n, pixels in enumerate(np.bincount(counts.ravel())) if pixels},
        "labels": [[row, col, number] for (row, col), number in sorted(labels.items())],
        "kept": sum(labels.values()),
        "no_data": sum(shot.fate == "no_data" for shot in shots),
    }
