"""Boxes: tile names against grids that HLS publishes, points inside, the antimeridian."""

import numpy as np
import pytest

from biomass_jax.errors import PrepError
from data_prep.places import boxes_meet, check_box, grid_box, grid_centre, in_box, tile_grid


@pytest.mark.parametrize(
    ("tile", "zone", "left", "top"),
    [
        ("06WVS", 6, 399960, 7200000),  # from the real Fmask file
        ("T10SFF", 10, 600000, 4100040),
        ("31TCJ", 31, 300000, 4900020),
        ("31NAA", 31, 99960, 100020),  # the first square north of the equator, odd zone
        ("13SFR", 13, 600000, 3600000),  # HLS's name for a square that MGRS has in band R
    ],
)
def test_a_tile_s_name_gives_its_grid(tile, zone, left, top):
    grid = tile_grid(tile)
    assert grid.crs.to_epsg() == 32600 + zone
    assert (grid.transform.c, grid.transform.f) == (left, top)
    assert (grid.height, grid.width, grid.transform.a, grid.transform.e) == (3660, 3660, 30, -30)


def test_a_southern_tile_has_negative_northings():
    grid = tile_grid("23KPQ")  # Rio de Janeiro
    assert grid.crs.to_epsg() == 32623
    assert grid.transform.c == 600000
    assert 0 <= grid.transform.f - (7_500_000 - 10_000_000) < 60
    lon, lat = grid_centre(grid)
    assert (lon, lat) == (pytest.approx(-43.49, abs=0.01), pytest.approx(-23.09, abs=0.01))


@pytest.mark.parametrize("tile", ["10SFW", "10SZF", "61SFF", "00SFF", "10IFF", "10SFFF", "sff"])
def test_a_name_that_no_tile_has_is_refused(tile):
    with pytest.raises(PrepError, match="MGRS tile"):
        tile_grid(tile)


def test_the_box_of_a_tile_holds_all_its_pixels():
    grid = tile_grid("06WVS")  # far north: its edges bend
    west, south, east, north = grid_box(grid, margin=0)
    # Outermost corners of the real granule in its metadata (CMR); they are those of its data, a little inside.
    assert (west, south) == (pytest.approx(-149.1146, abs=0.001), pytest.approx(63.9245, abs=0.001))
    assert (east, north) == (pytest.approx(-146.7936, abs=0.001), pytest.approx(64.9240, abs=0.001))
    assert west < grid_centre(grid)[0] < east
    assert south < grid_centre(grid)[1] < north
    grown = grid_box(grid, margin=1000)
    assert grown[1] == pytest.approx(south - 1 / 111.4, abs=1e-3)
    assert grown[3] == pytest.approx(north + 1 / 111.4, abs=1e-3)


def test_a_tile_across_the_antimeridian_has_its_west_beyond_its_east():
    west, _, east, _ = grid_box(tile_grid("01KAB"))
    assert 179 < west < 180
    assert -180 < east < -179
    inside = in_box(np.array([179.9, -179.9, 0, 178, np.nan]), np.full(5, -17.0), grid_box(tile_grid("01KAB")))
    assert inside.tolist() == [True, True, False, False, False]


def test_edges_of_a_box_belong_to_it():
    box = (10.0, -1.0, 11.0, 1.0)
    lon, lat = np.array([10, 11, 10.5, 10.5, 9.99, 11.01, 10.5, 10.5]), np.array([0, 0, -1, 1, 0, 0, -1.01, 1.01])
    assert in_box(lon, lat, box).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("other", "meets"),
    [
        ((-179.5, 0, -179.0, 1), True),
        ((179.0, 0, 179.6, 1), True),
        ((170.0, 0, -170.0, 1), True),
        ((170.0, 0, 179.0, 1), False),
        ((-178.0, 0, 179.0, 1), False),
        ((179.0, 2.1, -179.0, 3), False),
    ],
)
def test_boxes_meet_across_the_antimeridian(other, meets):
    box = (179.5, -1.0, -178.5, 2.0)
    assert boxes_meet(box, other) is meets
    assert boxes_meet(other, box) is meets


@pytest.mark.parametrize("box", [(1, 2, 3), (0, 1, 1, 1), (0, 2, 1, 1), (0, 0, 361, 1), (0, 0, float("nan"), 1)])
def test_what_is_no_box_is_refused(box):
    with pytest.raises(PrepError, match="box"):
        check_box(box)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((200, -1, 210, 1), (-160, -1, -150, 1)),
        ((170, -1, 190, 1), (170, -1, -170, 1)),
        ((350, -1, 10, 1), (-10, -1, 10, 1)),
        ((0, -1, 360, 1), (-180, -1, 180, 1)),
        ((180, -1, 270, 1), (-180, -1, -90, 1)),
        ((90, -1, 180, 1), (90, -1, 180, 1)),
        ((-200, -1, -170, 1), (160, -1, -170, 1)),
        (("170", "-1", "190", "1"), (170, -1, -170, 1)),
    ],
)
def test_boxes_in_either_convention_of_longitude(given, expected):
    box = check_box(given)
    assert box == expected
    lon = np.linspace(-179.5, 179.5, 360)
    here = in_box(lon, 0 * lon, box)
    np.testing.assert_array_equal(in_box(lon % 360, 0 * lon, box), here)
    west, east = float(given[0]), float(given[2])
    east += 360 if east < west else 0
    turns = [(lon + turn >= west) & (lon + turn <= east) for turn in (-360, 0, 360, 720)]
    np.testing.assert_array_equal(here, np.logical_or.reduce(turns))
