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
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.runtime.files import write_text
from data_prep.synthetic.granule import SMALLEST, write_granule
from data_prep.synthetic.landscape import PIXEL_M
from data_prep.synthetic.ruler.scenes import SCENE_POISONS, clear_counts, ruler_image, tile_scenes, unused_bands
from data_prep.synthetic.ruler.shots import Shot, tile_shots, write_orbits
from data_prep.synthetic.ruler.tiles import RulerTile, ruler_tiles

YEAR = 2020


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
    for scene in tile_scenes(tile, YEAR, index):
        poison = SCENE_POISONS.get(scene.role, 0)
        image, fmask = ruler_image(tile.shape, seed + index, scene.column, poison)
        # Real granules have all their bands; most users fetch the six.
        whole = scene.column == 0 or scene.role == "other_sensor"
        others = unused_bands(tile.shape, scene.overpass.sensor) if whole else {}
        write_granule(folder, image, fmask, scene.overpass, others)
        written.append({"granule": scene.overpass.granule, "role": scene.role})
    return written


def _tile_plan(tile: RulerTile, scenes: list[dict[str, str]], counts: np.ndarray, shots: list[Shot]) -> dict[str, Any]:
    labels = Counter((shot.row, shot.col) for shot in shots if shot.fate == "kept")
    start, stop = tile.season(YEAR)
    return {
        "epsg": tile.epsg,
        "user_defined": tile.user_defined,
        "transform": [PIXEL_M, 0, tile.left, 0, -PIXEL_M, tile.top],
        "centre": list(tile.centre),
        "season": f"{start:%Y-%m-%d}/{stop:%Y-%m-%d}",
        "scenes": scenes,
        "clear_counts": {str(n): int(pixels) for n, pixels in enumerate(np.bincount(counts.ravel())) if pixels},
        "labels": [[row, col, number] for (row, col), number in sorted(labels.items())],
        "kept": sum(labels.values()),
        "no_data": sum(shot.fate == "no_data" for shot in shots),
    }
