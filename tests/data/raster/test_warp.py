"""Maps onto other grids by area: against polygons cut by shapely, and where maps can't be brought."""

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio import warp as rasterio_warp
from rasterio.crs import CRS
from rasterio.enums import Resampling

from biomass_jax.data.raster import warp
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.warp import (
    PACIFIC,
    area_means,
    check_together,
    crs_of,
    lattice_of,
    map_file,
    part_of,
    place,
    snapped,
)
from biomass_jax.errors import RasterError
from tests.regional.maps import UNIT, write_map

EASE = CRS.from_epsg(6933)


def grid(epsg=32633, left=499_980.0, top=6_650_010.0, height=20, width=30, pixel=30.0):
    return Grid(height, width, CRS.from_epsg(epsg), Affine(pixel, 0, left, 0, -pixel, top))


def near(lon, lat, pixel, size=12, crs=EASE):
    """A snapped grid of some pixels around a place."""
    x, y = (axis[0] for axis in rasterio_warp.transform("EPSG:4326", crs, [lon], [lat]))
    return snapped([(x, y, x + size * pixel, y + size * pixel)], crs, pixel)


def cut_by_polygons(values, valid, source, target):
    """The same by shapely: each source pixel's outline in the new CRS, cut along each new pixel."""
    column, row = np.meshgrid(np.arange(source.width + 1), np.arange(source.height + 1))
    t = source.transform
    x, y = t.c + t.a * column, t.f + t.e * row
    places = rasterio_warp.transform(source.crs, target.crs, x.ravel(), y.ravel())
    x, y = (np.reshape(axis, column.shape) for axis in places)
    corners = [np.stack([axis[i : i - 1 or None, j : j - 1 or None] for axis in (x, y)], -1) for i, j in _CORNERS]
    outlines = shapely.polygons(np.stack(corners, axis=-2).reshape(-1, 4, 2))
    means, share = np.zeros((target.height, target.width)), np.zeros((target.height, target.width))
    t, tree = target.transform, shapely.STRtree(outlines)
    for i, j in np.ndindex(means.shape):
        box = shapely.box(t.c + j * t.a, t.f + (i + 1) * t.e, t.c + (j + 1) * t.a, t.f + i * t.e)
        near_by = tree.query(box)
        area = shapely.area(shapely.intersection(outlines[near_by], box)) * valid.ravel()[near_by]
        share[i, j] = area.sum() / box.area
        means[i, j] = (area * values.ravel()[near_by]).sum() / max(area.sum(), 1e-12)
    return means, share


_CORNERS = ((0, 0), (0, 1), (1, 1), (1, 0))


@pytest.mark.parametrize(
    ("lon", "lat", "pixel"), [(17.5, 0.5, 30.0), (12.1, 60.0, 30.0), (17.9, 60.0, 80.0), (12.5, -45.0, 12.0)]
)
def test_means_are_those_of_polygons_cut_by_area(lon, lat, pixel):
    target = near(lon, lat, pixel)
    lattice = lattice_of(grid(epsg=32633 if lat > 0 else 32733))
    source = lattice.grid(*lattice.cover(target))
    rng = np.random.default_rng(3)
    values = rng.gamma(2, 60, (source.height, source.width))
    valid = rng.random(values.shape) > 0.2
    (means,), share = area_means(values[None], valid, source, target)
    expected, expected_share = cut_by_polygons(values, valid, source, target)
    counted = expected_share > 0.05  # of slivers no mean has all digits
    assert counted.mean() > 0.8 and 0.05 < 1 - expected_share.mean() < 0.4
    np.testing.assert_allclose(share, expected_share, atol=1e-4)
    np.testing.assert_allclose(means[counted], expected[counted], rtol=1e-4)


def test_gdals_average_is_no_such_mean():
    """The reason for `sum`, were GDAL to mend `average` one day."""
    target = near(12.1, 60, 30.0)
    lattice = lattice_of(grid())
    source = lattice.grid(*lattice.cover(target))
    values = np.random.default_rng(3).gamma(2, 60, (source.height, source.width))
    expected, _ = cut_by_polygons(values, np.ones_like(values), source, target)
    found = np.zeros_like(expected)
    rasterio_warp.reproject(
        values,
        found,
        src_crs=source.crs,
        src_transform=source.transform,
        dst_crs=target.crs,
        dst_transform=target.transform,
        resampling=Resampling.average,
        tolerance=0,
    )
    assert np.abs(found - expected).max() > 0.03 * values.mean()


def test_a_part_of_a_grid_gets_what_the_whole_gets():
    target = near(12.1, 60, 30.0, size=40)
    lattice = lattice_of(grid())

    def means(part):
        source = lattice.grid(*lattice.cover(part))
        top, left = lattice.place(source)
        row, column = np.mgrid[top : top + source.height, left : left + source.width]
        return area_means(np.sin(1.7 * row + column)[None], (row + column) % 3 > 0, source, part)

    (whole,), share = means(target)
    (part,), part_share = means(part_of(target, 13, 7, 29, 31))
    np.testing.assert_allclose(part, whole[13:29, 7:31], atol=1e-6)
    np.testing.assert_allclose(part_share, share[13:29, 7:31], atol=1e-6)


def test_what_lies_beyond_a_grid_tells_nothing_in_it():
    """GDAL's `sum` gives far pixels a part of what reaches beyond the right edge, in single rows of large grids."""
    target = near(12.1, 60, 30.0, size=511)
    lattice = lattice_of(grid())
    source = lattice.grid(*lattice.cover(target))
    column, row = np.meshgrid(np.arange(source.width + 1), np.arange(source.height + 1))
    s, t = source.transform, target.transform
    places = rasterio_warp.transform(source.crs, EASE, (s.c + 30 * column).ravel(), (s.f - 30 * row).ravel())
    x, y = (np.reshape(axis, column.shape) for axis in places)
    x, y = (np.stack([axis[i : i - 1 or None, j : j - 1 or None] for i, j in _CORNERS]) for axis in (x, y))
    left, right, top, bottom = t.c, t.c + 30 * target.width, t.f, t.f - 30 * target.height
    beyond = (x > right).all(0) | (x < left).all(0) | (y > top).all(0) | (y < bottom).all(0)
    assert 0.05 < beyond.mean() < 0.5
    means, share = area_means(np.where(beyond, 1e6, 0)[None], np.ones(beyond.shape, bool), source, target)
    assert share.min() == 1 and means.max() < 1e-6


def test_the_grid_of_the_map_itself_keeps_every_bit():
    values = np.random.default_rng(0).gamma(2, 60, (2, 20, 30)).astype(np.float32)
    valid = values[0] > 30
    means, share = area_means(values, valid, grid(), grid())
    np.testing.assert_array_equal(means, np.where(valid, values, 0))
    np.testing.assert_array_equal(share, valid)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (grid(left=609_780.0, top=6_700_020.0), True),  # as HLS's tiles of one zone
        (grid(left=499_995.0), False),
        (grid(pixel=10.0), False),
        (grid(epsg=32634), False),
    ],
)
def test_pixels_that_fall_on_each_other_are_one_lattice(other, same):
    assert (lattice_of(other) == lattice_of(grid())) is same


def test_a_lattice_finds_its_grids_again():
    lattice = lattice_of(grid(left=499_995.0))
    top, left = lattice.place(grid(left=499_995.0))
    assert lattice.grid(top, left, top + 20, left + 30) == grid(left=499_995.0)
    part = part_of(grid(left=499_995.0), 3, 4, 9, 11)
    assert lattice.cover(part) == (top + 3, left + 4, top + 9, left + 11)


def test_grids_of_neighbours_fit():
    left = snapped([(10.0, 100.0, 205.0, 160.0)], EASE, 30.0)
    assert (left.transform.c, left.transform.f, left.height, left.width) == (0, 180, 3, 7)
    both = snapped([(10.0, 100.0, 205.0, 160.0), (210.0, 90.0, 300.0, 160.0)], EASE, 30.0)
    assert (both.transform.c, both.transform.f, both.height, both.width) == (0, 180, 3, 10)
    assert snapped([(0.1 * 3, 0.0, 0.1 * 9, 0.1)], CRS.from_epsg(4326), 0.1).width == 6  # no pixel from rounding


def at_the_antimeridian(zone, x, **more):
    return grid(epsg=32600 + zone, left=x, top=4_000_020.0, height=400, width=400, **more)


def test_a_map_that_the_crs_cuts_in_two_is_refused_by_name():
    crossing = at_the_antimeridian(60, 764_000.0)
    with pytest.raises(RasterError, match=r"fiji\.tif: EPSG:6933 cuts it in two.*--crs '\+proj=cea.*lon_0=180"):
        place(crossing, EASE, 30.0, "fiji.tif")
    left, _, right, _ = place(crossing, crs_of(PACIFIC), 30.0, "fiji.tif").bounds
    assert left < 0 < right and right - left < 20_000


def test_maps_on_both_sides_of_the_cut_are_refused_by_name():
    names = ["west.tif", "east.tif"]
    grids = [at_the_antimeridian(60, 700_020.0), at_the_antimeridian(1, 300_000.0)]
    placed = [place(one, EASE, 30.0, name) for one, name in zip(grids, names, strict=True)]
    with pytest.raises(RasterError, match=r"west\.tif, east\.tif: they lie on both sides of the antimeridian"):
        check_together(EASE, placed, names)
    pacific = crs_of(PACIFIC)
    check_together(pacific, [place(one, pacific, 30.0, "a") for one in grids], names)


def test_maps_around_the_earth_on_one_side_of_the_cut_are_taken():
    grids = [at_the_antimeridian(zone, 500_010.0) for zone in (2, 15, 30, 45, 59)]
    check_together(EASE, [place(one, EASE, 30.0, "a") for one in grids], list("abcde"))


@pytest.mark.parametrize(
    ("crs", "pixel", "said"),
    [
        ("EPSG:4326", 30.0, "new ones are to be 30"),
        ("EPSG:6933", 1.0, "new ones are to be 1"),
        ("EPSG:6933", 1e5, "expected 0.1 to 512 times as much"),
    ],
)
def test_pixels_far_from_those_of_a_map_are_refused(crs, pixel, said):
    with pytest.raises(RasterError, match=rf"a\.tif: its pixels are .* wide.*{said}"):
        place(grid(), crs_of(crs), pixel, "a.tif")


def test_what_is_no_crs_is_told():
    with pytest.raises(RasterError, match="CRS 'EPSG:1'"):
        crs_of("EPSG:1")


def layers(**changed):
    return {"agbd": np.full((6, 8), 100.0), "agbd_sd": np.full((6, 8), 20.0), **changed}


def test_a_pixel_without_data_in_one_band_has_none_in_any(tmp_path):
    agbd, sd = np.arange(48.0).reshape(6, 8), np.full((6, 8), 20.0)
    agbd[1, 2], sd[3, 4], sd[5, 6] = -1, -1, np.nan
    made = map_file(write_map(tmp_path / "a.tif", layers(agbd=agbd, agbd_sd=sd)))
    assert made.layers == {"agbd": UNIT, "agbd_sd": UNIT} and made.nodata == -1
    values, valid = made.read(["agbd_sd", "agbd"], (1, 2, 6, 8))
    expected = np.ones((6, 8), bool)
    expected[1, 2] = expected[3, 4] = expected[5, 6] = False
    np.testing.assert_array_equal(valid, expected[1:, 2:])
    np.testing.assert_array_equal(values[1], np.where(expected, agbd, 0)[1:, 2:])
    np.testing.assert_array_equal(values[0], np.where(expected, 20, 0)[1:, 2:])


def test_what_a_mask_beside_the_map_hides_is_no_data(tmp_path):
    path = write_map(tmp_path / "a.tif", layers())
    with rasterio.open(path, "r+") as file:
        file.write_mask(np.arange(48).reshape(6, 8) != 11)
    _, valid = map_file(path).read(["agbd"], (0, 0, 6, 8))
    np.testing.assert_array_equal(valid, np.arange(48).reshape(6, 8) != 11)


def test_a_map_that_changes_while_it_is_used_is_named(tmp_path):
    made = map_file(write_map(tmp_path / "a.tif", layers()))
    write_map(tmp_path / "a.tif", layers(agbd=np.full((6, 8), 7.0)))
    with pytest.raises(RasterError, match=r"a\.tif: changed while"):
        made.read(["agbd"], (0, 0, 6, 8))


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("its bands are called agbd, band 2; expected a name for each", {"descriptions": ("agbd", None)}),
        (
            "its bands are called agbd \\(band 1\\), agbd \\(band 2\\); expected a name for each",
            {"descriptions": ("agbd", "agbd")},
        ),
        ("it has no CRS", {"crs": None}),
        ("it has no no-data value", {"nodata": None}),
        ("it isn't north up", {"transform": Affine(30, 2, 500_000, 2, -30, 6_650_010)}),
    ],
)
def test_what_is_no_map_is_told(tmp_path, said, change):
    shape = {"count": 2, "height": 6, "width": 8, "dtype": "float32", "driver": "GTiff"}
    form = {"crs": CRS.from_epsg(32633), "nodata": -1, "transform": grid().transform, **shape}
    names = change.pop("descriptions", ("agbd", "agbd_sd"))
    with rasterio.open(tmp_path / "a.tif", "w", **{**form, **change}) as file:
        file.write(np.ones((2, 6, 8), np.float32))
        for number, name in enumerate(names, 1):
            if name:
                file.set_band_description(number, name)
    with pytest.raises(RasterError, match=rf"a\.tif: {said}"):
        map_file(tmp_path / "a.tif")


def test_middles_of_pixels_have_their_places():
    from pyproj import Transformer

    grid = Grid(20, 30, CRS.from_epsg(32610), Affine(30, 0, 600000, 0, -60, 4200000))
    lon, lat = warp.places_of(grid, np.array([0, 19]), np.array([7, 29]))
    found = Transformer.from_crs(4326, 32610, always_xy=True).transform(lon, lat)
    np.testing.assert_allclose(found, [[600225, 600885], [4199970, 4198830]], atol=1e-3)
    with pytest.raises(RasterError, match=r"2 x 2 pixels of 1 x -1 .*EPSG:6933: "):
        warp.places_of(Grid(2, 2, CRS.from_epsg(6933), Affine(1, 0, 9e9, 0, -1, 9e9)), np.array([0]), np.array([0]))
