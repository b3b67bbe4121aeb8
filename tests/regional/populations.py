"""Simulated populations: a known biomass surface, map errors that go together, tracks of footprints as a sample.

`python -m tests.regional.populations` prints the tables of docs/regional.md: what intervals hold, also where what they
take for granted isn't so.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import geopandas
import numpy as np
import rasterio
import shapely
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data.raster.cog import MapWriter, write_cog
from biomass_jax.data.raster.grid import Grid
from biomass_jax.regional import estimators
from biomass_jax.regional.change import change, without_small_patches
from biomass_jax.regional.estimators import Correlation, Lattice, Sums
from biomass_jax.regional.zones import zones

PIXEL = 200.0  # metres: errors within are as good as shared
SIZE = 500  # pixels along a side: 100 km, 1 Mha
# Sides of the zones in pixels: 100 ha, 2,500 ha, 40,000 ha, 1 Mha
SIDES = (5, 25, 100, 500)
TRUTH = Correlation(3000.0, 0.35, 0.65)
LEVEL = 0.95
DRAWS = 600


class Land(NamedTuple):
    """What doesn't change: (SIZE, SIZE) biomass and the standard deviations that a map states, Mg/ha."""

    biomass: np.ndarray
    sd: np.ndarray


def field(rng, count=1, correlation=TRUTH, extent=SIZE, pixel=PIXEL):
    """(count, extent, extent) standard errors of maps, by Fourier transforms on a torus that is some ranges larger."""
    size = extent + 116
    lag = np.minimum(np.arange(size), size - np.arange(size)) * pixel
    spectrum = np.fft.fft2(correlation.decaying(np.hypot(lag[:, None], lag))).real
    root = np.sqrt(np.maximum(spectrum, 0)) / size
    found = np.empty((count + count % 2, extent, extent))
    for place in range(0, count, 2):
        noise = rng.normal(size=(size, size)) + 1j * rng.normal(size=(size, size))
        both = np.fft.fft2(root * noise)[:extent, :extent]
        found[place], found[place + 1] = both.real, both.imag
    found += rng.normal(0, np.sqrt(correlation.nugget), found.shape)
    return found[:count]


def land(seed=0):
    rng = np.random.default_rng(seed)
    smooth = (
        field(rng, 1, Correlation(20_000.0, 0.0, 1.0))[0] * 0.6 + field(rng, 1, Correlation(2000.0, 0.3, 0.7))[0] * 0.5
    )
    biomass = np.clip(120 + 60 * smooth, 0, None)
    return Land(biomass, 15 + 0.2 * biomass)


def middle(values, side):
    """What of (..., n, n) values lies in a zone in the middle."""
    start = (values.shape[-1] - side) // 2
    return values[..., start : start + side, start : start + side]


def shots(rng, side, tracks, spacing=60.0):
    """Rows, columns and track of shots in a zone that so many tracks meet, at random places, in two directions.

    As GEDI's: footprints every 60 m, and gaps where clouds were.
    """
    width = side * PIXEL
    rows, columns, names = [], [], []
    while len(names) < tracks:
        angle = rng.choice([-1, 1]) * np.radians(38)
        offset = rng.uniform(-width, width)  # of the line from the zone's middle
        along = np.arange(-0.75 * width, 0.75 * width, spacing) + rng.uniform(0, spacing)
        cloud = np.repeat(rng.random(len(along) // 10 + 1) < 0.35, 10)[: len(along)]
        x = along * np.sin(angle) + offset * np.cos(angle) + width / 2
        y = along * np.cos(angle) - offset * np.sin(angle) + width / 2
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < width) & ~cloud
        if inside.any():
            rows.append((y[inside] / PIXEL).astype(int))
            columns.append((x[inside] / PIXEL).astype(int))
            names.append(np.full(inside.sum(), len(names)))
    corner = (SIZE - side) // 2
    return np.concatenate(rows) + corner, np.concatenate(columns) + corner, np.concatenate(names)


def holds(estimate, truth, level=LEVEL):
    """Whether an interval holds the truth."""
    return abs(estimate.mean - truth) <= estimators.quantile(level, estimate.freedom) * estimate.se


def lattice_of(sd, side):
    found = Lattice((PIXEL, PIXEL), (side, side))
    rows, columns = np.indices((side, side)).reshape(2, -1)
    found.add(rows, columns, middle(sd, side).ravel())
    return found


def map_draws(draws, correlation=TRUTH, seed=1, bias=0.0):
    """Coverage of the map's intervals by side of the zone, where errors are drawn as TRUTH says.

    Args:
        draws: how many maps of the largest zone; four times as many of the others.
        correlation: what intervals are made with.
        seed: of the draws.
        bias: of all maps, in standard deviations; another one each time, up or down.
    """
    world, rng, found = land(), np.random.default_rng(seed), {}
    for extent, times, sides in ((100, 4 * draws, (5, 25, 100)), (SIZE, draws, (SIZE,))):
        sd = middle(world.sd, extent)
        ses = {side: np.sqrt(lattice_of(sd, side).variance(correlation)) / side**2 for side in sides}
        held = dict.fromkeys(sides, 0)
        for start in range(0, times, 2):
            for errors in field(rng, min(2, times - start), extent=extent):
                off = sd * (errors + bias * rng.normal())
                for side in sides:
                    held[side] += holds(estimators.Estimate(middle(off, side).mean(), ses[side], np.inf), 0.0)
        found |= {side: count / times for side, count in held.items()}
    return found


def fitted_draws(draws, seed=2, footprints=4000, noise=12.0):
    """As `map_draws`, with how errors go together fitted to residuals at held-out footprints on other ground."""
    world, rng = land(), np.random.default_rng(seed)
    lattices = {side: lattice_of(world.sd, side) for side in SIDES}
    held = dict.fromkeys(SIDES, 0)
    for _ in range(draws):
        errors, elsewhere = world.sd * field(rng, 2)
        rows, columns, _ = shots(rng, SIZE, 60)
        pixels = rng.permutation(np.unique(rows * SIZE + columns))[:footprints]  # one in a pixel
        at = np.divmod(pixels, SIZE)
        off = elsewhere[at] - rng.normal(0, noise, footprints)  # map - footprint
        places = PIXEL * np.column_stack(at)
        drawn = int(rng.integers(2**31))
        correlation = estimators.fit_correlation(places, off / world.sd[at], reach=20_000.0, seed=drawn)
        for side, lattice in lattices.items():
            sums = Sums(side**2, middle(errors, side).sum(), side**2, lattice)
            estimate = estimators.by_map(sums, correlation)
            held[side] += holds(estimate, 0.0)
    return {side: count / draws for side, count in held.items()}


def two_fitted_draws(draws):
    """`fitted_draws` of two seeds together, half of the draws each."""
    one, two = (fitted_draws(draws // 2, seed) for seed in (2, 3))
    return {side: (one[side] + two[side]) / 2 for side in SIDES}


def assisted_draws(draws, tracks, seed=3, noise=15.0, by_shot=False, gedi_bias=0.0):
    """Coverage of the model-assisted intervals by side of the zone.

    Args:
        draws: how many maps and samples.
        tracks: that meet a zone, by its side.
        seed: of the draws.
        noise: of a footprint, Mg/ha.
        by_shot: whether footprints are taken as independent.
        gedi_bias: of all footprints, Mg/ha.
    """
    world, rng = land(), np.random.default_rng(seed)
    held = dict.fromkeys(SIDES, 0)
    for start in range(0, draws, 2):
        for errors in field(rng, min(2, draws - start)):
            mapped = 10 + 0.85 * world.biomass + 0.6 * world.sd * errors  # saturates, too
            for side in SIDES:
                rows, columns, names = shots(rng, side, tracks[side])
                residuals = world.biomass[rows, columns] - mapped[rows, columns] + gedi_bias
                residuals += rng.normal(0, noise, len(rows))
                clusters = np.arange(len(rows)) if by_shot else names
                found = estimators.model_assisted(middle(mapped, side).mean(), residuals, clusters)
                held[side] += holds(found, middle(world.biomass, side).mean())
    return {side: count / draws for side, count in held.items()}


def hybrid_draws(draws, tracks, seed=4, with_model=True):
    """Coverage of hybrid intervals by side of the zone: biomass = (a + b x)^2, a and b estimated anew each time."""
    world, rng = land(), np.random.default_rng(seed)
    truth_parameters = np.array([-4.0, 1.1])
    covariance = np.array([[0.35, -0.02], [-0.02, 0.0016]])
    height = (np.sqrt(world.biomass) - truth_parameters[0]) / truth_parameters[1]
    held = dict.fromkeys(SIDES, 0)
    for _ in range(draws):
        a, b = rng.multivariate_normal(truth_parameters, covariance)
        for side in SIDES:
            rows, columns, names = shots(rng, side, tracks[side])
            x = height[rows, columns]
            t = a + b * x
            gradients = (2 * t)[:, None] * np.column_stack([np.ones_like(x), x])
            strata = np.full(len(x), "one")
            variance = estimators.parameter_variance(gradients, strata, {"one": covariance}) if with_model else 0.0
            found = estimators.hybrid(t**2, names, variance)
            held[side] += holds(found, middle(world.biomass, side).mean())
    return {side: count / draws for side, count in held.items()}


# Two dates: nine zones of 900 ha with a clearing of 90 ha each, on the left of ground that is known to be stable.
CHANGED = Grid(300, 400, CRS.from_epsg(32733), Affine(30, 0, 320_000, 0, -30, 8_500_000))
TOGETHER = Correlation(600.0, 0.35, 0.65)
GROWTH, LOSS = 3.0, -120.0


def two_dates(folder, seed, loss=LOSS, growth=GROWTH, shift=0.0):
    """Maps of two years with errors of which 0.6 goes together, stable ground, zones; the true change (300, 400)."""
    rng = np.random.default_rng(seed)
    truth = np.full((300, 400), growth)
    truth[:, 300:] = 0
    for row, column in np.ndindex(3, 3):
        truth[100 * row + 40 : 100 * row + 70, 100 * column + 30 : 100 * column + 63] = loss
    shared, one, other = field(rng, 3, TOGETHER, 400, 30.0)[:, :300]
    for name, errors, sd, value in (("before", one, 24, 300), ("after", other, 20, 300 + truth + shift)):
        layers = dict.fromkeys(("agbd", "agbd_sd"), "Mg ha-1")
        year = 2019 + 2 * (name == "after")
        tags = {"SENSORS": "L30", "MODEL_SHA256": "a", "SEASON": f"{year}-05-01/{year}-10-01"}
        mean = value + sd * (np.sqrt(0.6) * shared + np.sqrt(0.4) * errors)
        with MapWriter(folder / f"{name}.tif", CHANGED, nodata=-1, layers=layers, tags=tags) as writer:
            writer.write_rows(0, np.stack([mean, np.full_like(mean, sd)], axis=-1).astype(np.float32))
    stable = np.ones((1, 300, 400), np.uint8)
    stable[:, :, :300] = 2
    write_cog(folder / "stable.tif", [stable], CHANGED, np.uint8, ["classes"], 0, {})
    t = CHANGED.transform
    corners = [(t.c + 3000 * column, t.f - 3000 * row) for row, column in np.ndindex(3, 3)]
    boxes = [shapely.box(x, y - 3000, x + 3000, y) for x, y in corners]
    geopandas.GeoDataFrame(geometry=boxes, crs=CHANGED.crs.to_wkt()).to_file(folder / "zones.gpkg")
    return truth


def selected_draws(draws, correlation=TOGETHER, loss=LOSS, seed=5):
    """Coverage of net change and of sums of losses with a correlation that is told, by numbers alone.

    Args:
        draws: of 25 zones of 900 ha each, an even number.
        correlation: what intervals are made with; errors are drawn as TOGETHER says, with a standard deviation of 20.
        loss: in the zone's clearing of 90 ha; growth elsewhere.
        seed: of the draws.
    """
    rng, truth, held = np.random.default_rng(seed), np.full((100, 100), GROWTH), np.zeros(2)
    truth[40:70, 30:63] = loss
    for _ in range(draws // 2):
        for errors in 20 * field(rng, 2, TOGETHER, pixel=30.0):
            for row, column in np.ndindex(5, 5):
                d = truth + errors[100 * row : 100 * row + 100, 100 * column : 100 * column + 100]
                lost = without_small_patches(np.where(d < -2.9 * 20, -1, 0), 6) == -1
                for number, which in enumerate((np.ones_like(lost), lost)):
                    lattice = Lattice((30.0, 30.0), lost.shape)
                    lattice.add(*np.nonzero(which), np.full(which.sum(), 20.0))
                    found = estimators.by_map(Sums(which.sum(), d[which].sum(), which.sum(), lattice), correlation)
                    held[number] += holds(found, truth[which].mean())
    return dict(zip(("net", "loss"), held / (25 * draws), strict=True))


def change_draws(draws, stable=True, by_hand=None, **planted):
    """Coverage of the intervals of net change and of the sum of losses, by maps' files, `change` and `zones`.

    Args:
        draws: pairs of maps, of nine zones each.
        stable: whether stable ground is told.
        by_hand: settings of `zones`, in place of what `change` finds.
        **planted: of `two_dates`.
    """
    held, known = np.zeros(2), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if stable:
            known = {"stable": str(folder / "stable.tif"), "stable_keep": (1.0,)}
        for seed in range(draws):
            truth = two_dates(folder, seed, **planted)
            change(folder / "before.tif", folder / "after.tif", folder / "change.tif", **known)
            table = zones([folder / "change.tif"], folder / "zones.gpkg", **(by_hand or {})).table
            with rasterio.open(folder / "change.tif") as file:
                lost = file.read(3) == -1
            for number, (row, column) in enumerate(np.ndindex(3, 3)):
                part = np.s_[100 * row : 100 * row + 100, 100 * column : 100 * column + 100]
                found = table.loc[number]
                true = {"net": truth[part].mean() * found["covered_ha"]}
                true["loss"] = truth[part][lost[part]].mean() * found["loss_ha"] if lost[part].any() else 0.0
                held += [found[f"{kind}_lo"] <= true[kind] <= found[f"{kind}_hi"] for kind in ("net", "loss")]
    return dict(zip(("net", "loss"), held / (9 * draws), strict=True))


TRACKS = {5: 10, 25: 15, 100: 25, 500: 60}


TABLE = {
    "map, correlation known": lambda: map_draws(DRAWS),
    "map, correlation fitted to held-out footprints": lambda: two_fitted_draws(500),
    "map, as if pixels were independent": lambda: map_draws(DRAWS, Correlation(1.0, 1.0, 0.0)),
    "map, a bias of 0.3 sd that nothing tells": lambda: map_draws(DRAWS, bias=0.3),
    "model-assisted, by tracks": lambda: assisted_draws(DRAWS, TRACKS),
    "model-assisted, as if footprints were independent": lambda: assisted_draws(DRAWS, TRACKS, by_shot=True),
    "model-assisted, GEDI 10 Mg/ha too high": lambda: assisted_draws(DRAWS, TRACKS, gedi_bias=10.0),
    "hybrid": lambda: hybrid_draws(DRAWS, TRACKS),
    "hybrid, without the models' part": lambda: hybrid_draws(DRAWS, TRACKS, with_model=False),
}

OF_CHANGE = {
    "change, correlation fitted on stable ground": lambda: change_draws(60),
    "change, correlation fitted where nothing is significant": lambda: change_draws(60, stable=False),
    "change, as if pixels were independent": lambda: change_draws(60, by_hand={"range_km": 0.001, "nugget": 1.0}),
    "change, later map 5 Mg/ha too high, stable ground": lambda: change_draws(60, shift=5.0),
    "change, later map 5 Mg/ha too high, no stable ground": lambda: change_draws(60, stable=False, shift=5.0),
    "change, clearings of 50 Mg/ha in place of 120": lambda: change_draws(60, loss=-50.0),
}


def main(words):
    """Print the tables' rows, those whose names hold a word."""
    print("| | " + " | ".join(f"{side**2 * PIXEL**2 / 1e4:,.0f} ha" for side in SIDES) + " |")
    print("|---|" + "---|" * len(SIDES))
    for name, draw in TABLE.items():
        if not words or any(word in name for word in words):
            held = draw()
            print(f"| {name} | " + " | ".join(f"{100 * held[side]:.1f}" for side in SIDES) + " |", flush=True)
    print("\n| | net change | losses |\n|---|---|---|")
    for name, draw in OF_CHANGE.items():
        if not words or any(word in name for word in words):
            print(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in draw().values()) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
