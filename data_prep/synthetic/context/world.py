"""The context world's granules and orbits, and how well a model can do that sees so far and no farther.

The limits in `plan.json`, each of a model that knows without noise all that its range can tell: `one_pixel` the label's
own colour, `window` the texture around it too, `neighbours` also what lies beyond the window's border, `stages` the
distance to the river too, `oracle` the biomass of every pixel. None knows which pixel a shot hit: shots lie astray.
"""

import functools
from collections.abc import Mapping
from math import erf, exp, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.synthetic.context.land import BRIGHT, Context, Ground, biomass_of, factors
from data_prep.synthetic.context.view import lit, surface
from data_prep.synthetic.forest.land import Floats
from data_prep.synthetic.forest.view import Day
from data_prep.synthetic.landscape import PIXEL_M
from data_prep.synthetic.world import LEFT, TOP, Clear, World, pixels_of_shots, scores, write_world

ASTRAY_M = 10 / sqrt(2)  # along each axis: 10 m from its place, root mean square
STRIPES = 0.02
SIMULATED = 400_000  # shots, to find what is best said of a colour
BINS = 40  # of cover, in each biome and fifth of the light
RANGES = ("window", "neighbours", "stages")


def write_context_world(
    out: Path, *, shape: tuple[int, int] = (900, 1120), scenes: int = 5, tiles: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Write HLS granules of one to three tiles, GEDI orbits over them, and `plan.json`; return what that holds.

    Arguments and errors are those of `write_forest_world`.
    """
    land = Context(seed)
    pixels = functools.lru_cache(maxsize=1)(land.pixels)  # a single tile's scenes and its limits want the same ones

    def clear(left: float, top: float, shape: tuple[int, int]) -> Clear:
        at, crowns = pixels(left, top, shape), land.crowns(left, top, (shape[0] + 1, shape[1]))

        def of_day(day: Day) -> Floats:
            return surface(at, crowns, day.leaves)

        return of_day

    def limits(shots: Mapping[str, np.ndarray], area: tuple[int, int]) -> dict[str, dict[str, float]]:
        numbers, labels = pixels_of_shots(shots, area)
        at = pixels(LEFT, TOP, area)
        light = np.abs(lit(at, land.crowns(LEFT, TOP, (area[0] + 1, area[1]))) - 1)
        told = {"one_pixel": of_colour(at, light, np.random.default_rng(seed))} | known(at)
        return {name: scores(labels, predicted.ravel()[numbers]) for name, predicted in told.items()}

    world = World("context", seed, land.biomass, clear, limits, astray_m=ASTRAY_M, stripes=STRIPES)
    return write_world(world, out, shape=shape, scenes=scenes, tiles=tiles)


def known(at: Ground) -> dict[str, Floats]:
    """Return (H, W) biomass in Mg/ha as a model of each range beyond one pixel knows it, and as the oracle does.

    What a range can't tell is replaced by its mean over the biome's forest, and a colour that has saturated by the mean
    cover of such pixels; all are means over the pixels that a shot may have hit.
    """
    forest = ~(at.bare | at.water)

    def unknown(values: Floats, among: Any) -> Floats:
        means = [values[forest & among & (at.moist == moist)].mean() for moist in (False, True)]
        return np.where(at.moist, means[1], means[0])

    bright = at.cover > BRIGHT
    cover = np.where(bright, unknown(at.cover, bright), at.cover)
    parts = factors(at)
    found = {}
    for reach, name in enumerate(RANGES, start=1):
        tells = [part if k < reach else unknown(part, True) for k, part in enumerate(parts)]
        found[name] = around(np.where(forest, cover * np.prod(tells, axis=0), 0))
    return found | {"oracle": around(biomass_of(at))}


def of_colour(at: Ground, light: Floats, rng: np.random.Generator) -> Floats:
    """Return (H, W) the mean biomass in Mg/ha of many shots whose label lies in a pixel of that colour.

    Args:
        at: (H, W), what is true of the pixels; a colour tells biome, cover as far as it goes, cuts and water.
        light: (H, W), how far the light on the crowns is from its mean: the colour tells that too.
        rng: draws the shots.
    """
    height, width = at.cover.shape
    classes = np.minimum(at.cover, BRIGHT)
    for low, where in ((-1.0, at.bare), (-2.0, at.water)):
        classes = np.where(where, low, classes)
    groups = 2 * np.searchsorted(np.quantile(light, (0.2, 0.4, 0.6, 0.8)), light) + at.moist
    edges = np.unique(np.quantile(classes[classes > 0], np.linspace(0, 1, BINS + 1)[1:]))
    colours = np.searchsorted(np.concatenate([[-1.5, 0], edges[:-1]]), classes, side="right") * 10 + groups
    places = rng.uniform(0, (height, width), (SIMULATED, 2))
    row, col = np.floor(places).astype(np.int64).T
    hit = np.floor(places + ASTRAY_M / PIXEL_M * rng.standard_normal(places.shape)).astype(np.int64)
    hit_row, hit_col = np.clip(hit, 0, (height - 1, width - 1)).T
    seen, count = colours[row, col], int(colours.max()) + 1
    shots = np.bincount(seen, minlength=count)
    means = np.bincount(seen, biomass_of(at)[hit_row, hit_col], count) / np.maximum(shots, 1)
    return means[colours]


def around(values: Floats) -> Floats:
    """Return (H, W) means over the pixels that a shot may have hit whose label lies in each pixel.

    A place is uniform in its pixel and a normal error is added: by the closed form of the share that stays.
    """
    stays = share_that_stays(ASTRAY_M / PIXEL_M)
    for axis in (0, 1):
        padded = np.pad(values, [(int(axis == a), int(axis == a)) for a in (0, 1)], mode="edge")
        before, after = (np.take(padded, range(k, k + values.shape[axis]), axis) for k in (0, 2))
        values = stays * values + (1 - stays) / 2 * (before + after)
    return values


def share_that_stays(sigma: float) -> float:
    """The share of places, uniform in an interval of length 1, that a normal error of `sigma` leaves in it."""
    # Integral of (1 - |e|) over the density of e in -1..1.
    return erf(1 / (sigma * sqrt(2))) - sigma * sqrt(2 / pi) * (1 - exp(-1 / (2 * sigma**2)))
