"""What counts where maps overlap: against plain NumPy on one grid, and by hand across zones."""

import numpy as np
import pytest
import rasterio
from rasterio import warp

from biomass_jax.regional import overlap
from biomass_jax.regional.mosaic import Mosaic, plan
from biomass_jax.regional.overlap import block_values
from tests.regional.maps import write_map

SIZE = 40
SHIFTS = ((0, 0), (5, 11), (-7, 20))  # rows and columns by which the maps are moved
SEASONS = ("2019-06-01/2019-09-01", "2021-06-01/2021-09-01", "2020-06-01/2020-09-01")
LAYERS = ("agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di")


def three_maps(folder):
    """Maps of one zone that overlap, and each on the grid of them all: (maps, layers, rows, columns), NaN for none."""
    rng = np.random.default_rng(5)
    whole = np.full((3, len(LAYERS), SIZE + 12, SIZE + 20), np.nan)
    paths = []
    for number, (down, right) in enumerate(SHIFTS):
        agbd, sd = rng.gamma(2, 60, (SIZE, SIZE)), rng.uniform(5, 40, (SIZE, SIZE))
        bands = np.stack([agbd, sd, agbd - sd, agbd + 2 * sd, rng.random((SIZE, SIZE))]).astype(np.float32)
        gone = rng.random((SIZE, SIZE)) < 0.15
        bands[:, gone] = -1
        values = dict(zip(LAYERS, bands, strict=True))
        at = {"left": 480_000 + 30 * right, "top": 6_600_000 - 30 * down, "tags": {"SEASON": SEASONS[number]}}
        paths.append(write_map(folder / f"{number}.tif", values, **at))
        whole[number, :, down + 7 : down + 7 + SIZE, right : right + SIZE] = np.where(gone, np.nan, bands)
    return paths, whole


def made(paths, **settings):
    layout = plan(paths, Mosaic(**settings))
    return layout, block_values(layout, 0, 0, layout.grid.height, layout.grid.width)


def mean_of(whole):
    with np.errstate(invalid="ignore"):
        return np.nansum(whole, axis=0) / np.isfinite(whole).sum(axis=0)


def inverse_variance_of(whole):
    weights = 1 / whole[:, 1:2] ** 2
    with np.errstate(invalid="ignore"):
        return np.nansum(weights * whole, axis=0) / np.nansum(weights, axis=0)


def newest_of(whole):
    found = whole[1]
    for older in (whole[2], whole[0]):
        found = np.where(np.isfinite(found), found, older)
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", mean_of),
        ("inverse_variance", inverse_variance_of),
        ("newest", newest_of),
        ("auto", inverse_variance_of),
    ],
)
def test_overlaps_on_one_grid_are_those_of_numpy(tmp_path, rule, expected):
    paths, whole = three_maps(tmp_path)
    layout, values = made(paths, crs="same", overlap=rule)
    assert (layout.grid.transform.c, layout.grid.transform.f) == (480_000, 6_600_210)
    wanted = expected(whole)
    np.testing.assert_array_equal(values == -1, np.isnan(wanted))
    assert 0.1 < np.isnan(wanted).mean() < 0.5
    np.testing.assert_allclose(values, np.where(np.isnan(wanted), -1, wanted), rtol=1e-6)


def test_where_one_map_lies_alone_every_bit_of_it_stays(tmp_path):
    paths, whole = three_maps(tmp_path)
    _, values = made(paths, crs="same")
    alone = np.isfinite(whole[:, 0]).sum(axis=0) == 1
    expected = np.nansum(whole, axis=0).astype(np.float32)
    assert alone.sum() > 500
    np.testing.assert_array_equal(values[:, alone], expected[:, alone])


def test_an_sd_of_zero_weighs_much_and_not_without_end(tmp_path):
    for name, agbd, sd in (("a", 100.0, 0.0), ("b", 200.0, 0.0)):
        write_map(
            tmp_path / f"{name}.tif", {"agbd": np.full((4, 4), agbd), "agbd_sd": np.full((4, 4), sd)}, left=480_000
        )
    _, values = made([tmp_path / "a.tif", tmp_path / "b.tif"], crs="same")
    np.testing.assert_allclose(values[0], 150)


def two_zones(folder, **tags):
    """Even maps of zones 33 and 34 over the same ground at 18 degrees east, the second without its western half."""
    paths = []
    for number, (epsg, agbd, sd) in enumerate(((32633, 100.0, 10.0), (32634, 200.0, 20.0))):
        (x,), (y,) = warp.transform("EPSG:4326", f"EPSG:{epsg}", [18.0], [60.0])
        left, top = round(x / 30) * 30 - 30 * 40, round(y / 30) * 30 + 30 * 40
        values = {"agbd": np.full((80, 80), agbd), "agbd_sd": np.full((80, 80), sd)}
        if number:
            for band in values.values():
                band[:, :40] = -1
        season = {"SEASON": tags["seasons"][number]} if tags else {}
        paths.append(write_map(folder / f"{epsg}.tif", values, epsg=epsg, left=left, top=top, tags=season))
    return paths


def middles(values):
    """Values well inside of where the first map lies alone, and of where both do."""
    rows, width = values.shape[1] // 2, values.shape[2]
    return values[:, rows, width // 4], values[:, rows, 5 * width // 8]


@pytest.mark.parametrize(
    ("rule", "agbd", "sd"), [("mean", 150.0, 15.0), ("inverse_variance", 0.8 * 100 + 0.2 * 200, 0.8 * 10 + 0.2 * 20)]
)
def test_overlaps_across_zones_weigh_alike(tmp_path, rule, agbd, sd):
    _, values = made(two_zones(tmp_path), overlap=rule)
    alone, both = middles(values)
    np.testing.assert_allclose(alone, [100, 10], rtol=1e-6)
    np.testing.assert_allclose(both, [agbd, sd], rtol=1e-6)


@pytest.mark.parametrize(("seasons", "agbd"), [(SEASONS[:2], 200.0), (SEASONS[1:], 100.0)])
def test_the_newest_of_two_zones_hides_the_other_to_its_edge(tmp_path, seasons, agbd):
    _, values = made(two_zones(tmp_path, seasons=seasons), overlap="newest")
    alone, both = middles(values)
    assert (alone[0], both[0]) == pytest.approx((100, agbd), rel=1e-6)
    # Where the newer one covers a pixel in part, the older one fills it up; no pixel is far from both.
    assert values[0][values[0] != -1].min() >= 100 - 1e-3 and values.max() <= 200 + 1e-3
    lines = values[0][20:-20]
    assert ((lines > 101) & (lines < 199)).sum() <= 2 * len(lines)


def test_two_maps_of_a_zone_count_twice_beside_one_of_another(tmp_path):
    first, second = two_zones(tmp_path)
    with rasterio.open(first) as file:
        bands = file.read()
    twin = dict(zip(("agbd", "agbd_sd"), bands + [[[30.0]], [[0.0]]], strict=True))
    with rasterio.open(first) as file:
        at = {"left": file.transform.c, "top": file.transform.f}
    write_map(tmp_path / "twin.tif", twin, **at)
    paths = [first, second, tmp_path / "twin.tif"]
    assert middles(made(paths, overlap="mean")[1])[1][0] == pytest.approx((100 + 130 + 200) / 3, rel=1e-6)
    weights = np.array([1 / 100, 1 / 400, 1 / 100])
    expected = (weights * [100, 200, 130]).sum() / weights.sum()
    assert middles(made(paths)[1])[1][0] == pytest.approx(expected, rel=1e-6)


def test_a_pixel_counts_where_half_of_its_area_has_data(tmp_path):
    agbd = np.full((6, 6), 100.0)
    agbd[:, 2] = -1  # a half of the second pixel of 60 m
    agbd[2:4, 4] = agbd[2, 5] = -1  # three quarters of one in the third column
    path = write_map(tmp_path / "a.tif", {"agbd": agbd}, left=480_000, top=6_600_000)
    _, values = made([path], crs="same", pixel=60.0)
    expected = np.full((3, 3), 100.0)
    expected[1, 2] = -1
    np.testing.assert_allclose(values[0], expected, rtol=1e-6)


def test_work_that_is_cut_gives_the_same(tmp_path, monkeypatch):
    paths, _ = three_maps(tmp_path)
    _, whole = made(paths, pixel=45.0)
    monkeypatch.setattr(overlap, "MOST_PIXELS", 300)
    _, cut = made(paths, pixel=45.0)
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    assert (whole != -1).mean() > 0.4


def test_only_maps_that_meet_a_block_are_opened(tmp_path, monkeypatch):
    near = write_map(tmp_path / "near.tif", {"agbd": np.full((20, 20), 50.0)}, left=480_000)
    write_map(tmp_path / "far.tif", {"agbd": np.full((20, 20), 60.0)}, left=540_000)
    layout = plan([near, tmp_path / "far.tif"], Mosaic(crs="same"))
    (tmp_path / "far.tif").unlink()
    assert (block_values(layout, 0, 0, 20, 200)[0, :, :20] == 50).all()
    assert layout.meeting(0, 30, 20, 1000) == []
