"""The context world's truth, held against plain loops over its own picture."""

import numpy as np
import pytest

from data_prep.synthetic.context import land
from data_prep.synthetic.context.land import Context, biomass_of, factors

LEFT, TOP = 600000.0, 4100040.0
SHAPE = (240, 260)


@pytest.fixture(scope="module")
def at() -> land.Ground:
    return Context(3).pixels(LEFT, TOP, SHAPE)


def test_places_do_not_depend_on_the_window_and_points_lie_in_their_pixel():
    context = Context(3)
    whole = context.pixel_biomass(LEFT, TOP, (120, 160))
    part = context.pixel_biomass(LEFT + 30 * 40, TOP - 30 * 50, (60, 70))
    np.testing.assert_array_equal(part, whole[50:110, 40:110])
    x, y = np.meshgrid(LEFT + 30 * 7 + np.array([0.5, 15, 29.5]), TOP - 30 * 9 - np.array([0.5, 15, 29.5]))
    assert (context.biomass(x, y) == whole[9, 7]).all()
    assert np.mean(Context(4).pixel_biomass(LEFT, TOP, (50, 50)) == whole[:50, :50]) < 0.2


def test_biomass_is_the_product_in_each_biome(at):
    found = biomass_of(at)
    rng = np.random.default_rng(0)
    for row, col in rng.integers(0, SHAPE, (300, 2)):
        one = {name: value[row, col] for name, value in at._asdict().items()}
        stature, shelter, moisture = (0.55, 0.7, 0.45) if one["moist"] else (0.65, 0.5, 0.6)
        expected = one["cover"] * (1 + stature * one["stature"]) * (1 - shelter * one["lee"])
        expected *= 1 + moisture * (2 * np.exp(-one["river"] / 18) - 1)
        expected *= not (one["bare"] or one["water"])
        assert found[row, col] == pytest.approx(expected)
    assert 0.1 < at.moist.mean() < 0.9
    # None of the factors is told by the cover, nor by another factor.
    forest = ~(at.bare | at.water) & at.moist
    parts = [values[forest] for values in (np.log(at.cover), *factors(at))]
    assert np.abs(np.corrcoef(parts) - np.eye(4)).max() < 0.25


def test_the_lee_is_that_of_the_nearest_cut_in_the_west(at):
    bare = at.bare
    assert 0.03 < bare.mean() < 0.12
    rows = np.flatnonzero(~at.water.any(1))  # rivers hide cuts
    assert len(rows) > 20
    for row in rows:
        for col in range(40, SHAPE[1]):
            if bare[row, col]:
                continue
            near = [d for d in range(1, land.LEE + 1) if bare[row, col - d]]
            expected = 1 - (near[0] - 1) / land.LEE if near else 0
            assert at.lee[row, col] == pytest.approx(expected), (row, col)


def test_rivers_are_water_and_distances_are_to_it(at):
    rows, cols = np.nonzero(at.water)
    assert 0.01 < at.water.mean() < 0.06
    far = 0.0
    for row, col in np.random.default_rng(1).integers((40, 40), (200, 220), (400, 2)):
        plain = np.hypot(rows - row, cols - col).min() if not at.water[row, col] else 0
        if plain < 25:  # beyond, the nearest may lie outside the window
            assert abs(at.river[row, col] - plain) < 3 + 0.2 * plain, (row, col)
        far = max(far, at.river[row, col])
    assert far > 25
