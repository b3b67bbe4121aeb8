"""The forest world: granules and orbits over a forest that a model can learn, with a known limit to what it can know.

The limits in `plan.json`: `best` knows the mean biomass of every pixel exactly, `one_pixel` only the colour of the
label's own pixel, without noise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.synthetic.forest.land import Floats, Forest
from data_prep.synthetic.forest.view import Day, shadowed_biomass, surface
from data_prep.synthetic.world import LEFT, TOP, Clear, World, pixels_of_shots, scores, write_world

BINS = 60  # of colours, to find what one pixel tells


def write_forest_world(
    out: Path,
    *,
    shape: tuple[int, int] = (900, 1120),
    scenes: int = 5,
    tiles: int = 1,
    seed: int = 0,
    heights: int | None = None,
) -> dict[str, Any]:
    """Write HLS granules of one to three tiles, GEDI orbits over them, and `plan.json`; return what that holds.

    Args:
        out: folder that takes `granules/hls/`, `granules/gedi/` and `plan.json`.
        shape: (H, W) of a tile in pixels; 900 x 1120 holds 20 chips of 224 x 224.
        scenes: number of dates in the season.
        tiles: number of tiles; neighbours overlap.
        seed: another seed, another forest; the same seed gives the same bytes.
        heights: see `write_world`.

    Raises:
        ValueError: too small a shape, no scene, or not 1 to 3 tiles.
    """
    forest = Forest(seed)

    def clear(left: float, top: float, shape: tuple[int, int]) -> Clear:
        biomass = forest.pixel_biomass(left, top, (shape[0] + 1, shape[1]))
        seen, greenness = shadowed_biomass(biomass), forest.greenness(left, top, shape)

        def of_day(day: Day) -> Floats:
            return surface(seen, greenness, day)

        return of_day

    def limits(shots: Mapping[str, np.ndarray], area: tuple[int, int]) -> dict[str, dict[str, float]]:
        pixels, labels = pixels_of_shots(shots, area)
        biomass = forest.pixel_biomass(LEFT, TOP, (area[0] + 1, area[1]))
        truth, seen = biomass[:-1].ravel()[pixels], shadowed_biomass(biomass).ravel()[pixels]
        return {"best": scores(labels, truth), "one_pixel": scores(labels, _mean_of_alike(seen, labels))}

    world = World("forest", seed, forest.biomass, clear, limits)
    return write_world(world, out, shape=shape, scenes=scenes, tiles=tiles, heights=heights)


def _mean_of_alike(values: Floats, labels: Floats) -> Floats:
    """The mean label of pixels of nearly one value: what is best said of a pixel by that value alone."""
    order = np.argsort(values, kind="stable")
    numbers = np.empty(len(values), np.int64)
    numbers[order] = np.arange(len(values)) * BINS // len(values)
    return np.bincount(numbers, labels)[numbers] / np.bincount(numbers)[numbers]
