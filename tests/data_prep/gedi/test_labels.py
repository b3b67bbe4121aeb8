"""Labels: each shot in the pixel and tile where an independent projection puts it."""

import json
from datetime import date

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data.raster.cog import write_cog
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import PrepError
from data_prep.gedi import labels
from data_prep.gedi.footprints import write_footprints
from data_prep.gedi.labels import label_raster, owner_tile, pixel_of, write_labels
from data_prep.places import tile_grid, transformer
from data_prep.season import Season
from tests.data.raster.cloud_optimized import faults
from tests.data_prep.utm_series import to_degrees, to_utm

FIRST = 88520500200000001  # above 2**53
SEASON = Season(date(2020, 5, 1), date(2020, 10, 1))
H, W = 46, 70


def user_defined(zone, northing):
    """A UTM CRS without a code, as some HLS files carry it."""
    return CRS.from_wkt(
        f'PROJCS["UTM Zone {zone}",GEOGCS["Unknown datum based upon the WGS 84 ellipsoid",'
        'DATUM["Not_specified_based_on_WGS_84_spheroid",SPHEROID["WGS 84",6378137,298.257223563]],'
        'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
        f'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",{6 * zone - 183}],'
        'PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],'
        f'PARAMETER["false_northing",{northing}],UNIT["metre",1]]'
    )


# (zone, CRS, false northing, left, top with negative northings in the south)
GROUNDS = {
    "north": (10, CRS.from_epsg(32610), 0, 600000, 4100040),
    "far north at the zone's edge": (6, CRS.from_epsg(32606), 0, 300000, 7700040),
    "north, user-defined": (10, user_defined(10, 0), 0, 600000, 4100040),
    "across the equator": (31, CRS.from_epsg(32631), 0, 499980, 600),
    "south as a north zone": (23, CRS.from_epsg(32623), 0, 600000, -2499960),
    "south": (23, CRS.from_epsg(32723), 10_000_000, 600000, -2499960),
    "south, user-defined": (23, user_defined(23, 10_000_000), 10_000_000, 600000, -2499960),
    "antimeridian, user-defined": (60, user_defined(60, 0), 0, 818640, -1800000),
    "antimeridian from the east": (1, CRS.from_epsg(32701), 10_000_000, 178250, -1800000),
}


def ground(name, shape=(H, W)):
    zone, crs, northing, left, top = GROUNDS[name]
    return Grid(*shape, crs, Affine(30, 0, left, 0, -30, top + northing)), zone, left, top


def shots(lon, lat, agbd, numbers=None, time="2020-07-01", granule="GEDI04_A_x_02_002_02_V002"):
    n = len(lon)
    return {
        "shot_number": np.uint64(FIRST) + np.arange(n, dtype=np.uint64) if numbers is None else numbers,
        "lon": np.asarray(lon, float),
        "lat": np.asarray(lat, float),
        "time": np.full(n, np.datetime64(time, "us")),
        "beam": np.full(n, "BEAM0101", object),
        "agbd": np.asarray(agbd, np.float32),
        "agbd_se": np.full(n, 3, np.float32),
        "agbd_sigma": np.full(n, 20, np.float32),
        "sensitivity": np.full(n, 0.97, np.float32),
        **{name: np.ones(n, np.uint8) for name in ("l4_quality_flag", "selected_algorithm", "pft_class")},
        **{name: np.zeros(n, np.uint8) for name in ("degrade_flag", "leaf_off_flag")},
        "granule": np.full(n, granule, object),
    }


def everywhere(grid):
    return np.ones((grid.height, grid.width), bool)


def at_pixels(name, rows, cols, dx=0.0, dy=0.0):
    """Longitude and latitude of places dx, dy metres from pixels' centres, by the series."""
    _, zone, left, top = ground(name)
    return to_degrees(left + 30 * (np.asarray(cols) + 0.5) + dx, top - 30 * (np.asarray(rows) + 0.5) + dy, zone)


def test_the_series_is_its_own_inverse_and_agrees_with_the_meridian_arc():
    east, north = np.meshgrid(np.linspace(170000, 830000, 7), np.linspace(-9e6, 9e6, 9))
    back = to_utm(*to_degrees(east, north, 33), 33)
    np.testing.assert_allclose(back, (east, north), atol=1e-4)
    # The meridian of WGS 84 from the equator to 45 degrees is 4,984,944.378 m long.
    assert to_utm(15.0, np.float64(45), 33)[1] == pytest.approx(4_984_944.378 * 0.9996, abs=1e-3)


@pytest.mark.parametrize("name", GROUNDS)
def test_the_raster_s_own_crs_agrees_with_the_series_to_a_millimetre(name):
    grid, zone, left, top = ground(name, (3660, 3660))
    rows, cols = (axis.ravel() for axis in np.meshgrid([0, 1829.5, 3660], [0, 1829.5, 3660]))
    lon, lat = to_degrees(left + 30 * cols, top - 30 * rows, zone)
    x, y = transformer(grid).transform(lon, lat)
    np.testing.assert_allclose(x, grid.transform.c + 30 * cols, atol=1e-3)
    np.testing.assert_allclose(y, grid.transform.f - 30 * rows, atol=1e-3)


@pytest.mark.parametrize("name", GROUNDS)
def test_every_pixel_gets_the_shots_at_its_four_corners(name):
    grid = ground(name)[0]
    rows, cols = (axis.ravel() for axis in np.meshgrid(np.arange(H), np.arange(W), indexing="ij"))
    code = 4096.0 * rows + cols
    for dx, dy in ((-14.9, -14.9), (14.9, -14.9), (-14.9, 14.9), (14.9, 14.9)):
        made = label_raster(shots(*at_pixels(name, rows, cols, dx, dy), code), grid, everywhere(grid))
        np.testing.assert_array_equal(made.label, code.reshape(H, W))
        np.testing.assert_array_equal(made.shots["row"], rows)
        np.testing.assert_array_equal(made.shots["col"], cols)
        assert made.counts["used"] == made.counts["pixels"] == H * W


def test_the_antimeridian_does_cross_the_ground_that_the_tests_take():
    for name in ("antimeridian, user-defined", "antimeridian from the east"):
        lon, _ = at_pixels(name, np.zeros(W), np.arange(W))
        assert lon.min() < -179.9
        assert lon.max() > 179.9


def test_shots_a_hand_s_breadth_outside_are_not_in_the_first_row_or_column():
    grid = ground("south")[0]
    middle = (H // 2, W // 2)
    outside = [((-1, middle[1]), (0, -14.9)), ((H, middle[1]), (0, 14.9))]
    outside += [((middle[0], -1), (14.9, 0)), ((middle[0], W), (-14.9, 0))]
    places = np.array([at_pixels("south", *pixel, *offset) for pixel, offset in outside])
    far = np.array([[0, 0], [-133, 23], [137, 0], [47, 89.9]])  # other side of the Earth too
    made = label_raster(shots(*np.concatenate([places, far]).T, np.ones(8)), grid, everywhere(grid))
    assert (made.counts["outside"], made.counts["used"]) == (8, 0)
    assert (made.label == -1).all()


def test_a_pixel_s_upper_left_edge_belongs_to_it():
    # On a grid in degrees PROJ changes nothing, so places on edges are exact.
    grid = Grid(4, 6, CRS.from_epsg(4326), Affine(0.25, 0, 10, 0, -0.25, 51))
    lon = np.array([10, 10.25, 11.25, np.nextafter(10.25, 0), 11.5, np.nextafter(11.5, 0)])
    lat = np.array([51, 50.75, 50.25, np.nextafter(50.75, 99), 50.5, 50.5])
    row, col, inside = pixel_of(lon, lat, grid)
    assert row.tolist() == [0, 1, 3, 0, -1, 2]
    assert col.tolist() == [0, 1, 5, 0, -1, 5]
    assert inside.tolist() == [True] * 4 + [False, True]
    with pytest.raises(PrepError, match="without a CRS"):
        pixel_of(lon, lat, Grid(4, 6, None, grid.transform))


def test_the_mean_is_float64_and_does_not_depend_on_the_order_of_the_shots():
    grid = ground("north")[0]
    agbd = np.concatenate([[16777216.0], np.ones(16), [0.0, 7.0], np.geomspace(1e-3, 1e3, 40)]).astype(np.float32)
    rows = np.array([3] * 17 + [5, 5] + [7] * 40)
    table = shots(*at_pixels("north", rows, rows + 20), agbd)
    made = label_raster(table, grid, everywhere(grid))
    assert made.label[3, 23] == np.float32((16777216 + 16) / 17)  # a float32 sum loses all sixteen
    assert made.label[5, 25] == 3.5
    total = 0.0
    for value in agbd[19:]:
        total += float(value)
    assert made.label[7, 27] == np.float32(total / 40)
    assert (made.counts["used"], made.counts["pixels"]) == (59, 3)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(agbd))
        again = label_raster({key: values[order] for key, values in table.items()}, grid, everywhere(grid))
        assert again.label.tobytes() == made.label.tobytes()
        assert again.shots["shot_number"].tolist() == list(range(FIRST, FIRST + 59))


def test_every_shot_is_counted_once_under_what_dropped_it():
    grid = ground("north")[0]
    valid = everywhere(grid)
    valid[10, 10] = False
    rows, cols = np.array([10, 10, 11, 12, 13, -1]), np.array([10, 11, 11, 11, 11, 3])
    table = shots(*at_pixels("north", rows, cols), [5, 0.0, 7, 8, 9, 6])
    table["time"][2] = np.datetime64("2020-04-30T23:59:59.999999")
    table["time"][3] = np.datetime64("2020-05-01T00:00:00")
    table["time"][4] = np.datetime64("2020-10-01T00:00:00")
    twice = {key: np.concatenate([values, values[1:2]]) for key, values in table.items()}
    made = label_raster(twice, grid, valid, seasons=[SEASON])
    assert made.counts == {
        "shots": 7,
        "repeated": 1,
        "other_season": 2,
        "outside": 1,
        "other_tile": 0,
        "no_data": 1,
        "used": 2,
        "without_sigma": 0,
        "pixels": 2,
    }
    assert (made.label[10, 11], made.label[12, 11], made.label[10, 10]) == (0.0, 8.0, -1.0)
    assert made.shots["shot_number"].tolist() == [FIRST + 1, FIRST + 3]
    assert made.shots["shot_number"].dtype == np.uint64
    wide = label_raster(twice, grid, valid, seasons=None)
    assert (wide.counts["other_season"], wide.counts["used"]) == (0, 4)


def test_of_two_releases_of_a_shot_the_latest_counts():
    grid = ground("north")[0]
    lon, lat = at_pixels("north", [3, 3], [4, 4])
    table = shots(lon, lat, [500.0, 20.0], numbers=np.full(2, FIRST, np.uint64))
    table["granule"] = np.array(["GEDI04_A_x_02_002_01_V002", "GEDI04_A_x_02_002_02_V002"], object)
    for order in ([0, 1], [1, 0]):
        made = label_raster({key: values[order] for key, values in table.items()}, grid, everywhere(grid))
        assert made.label[3, 4] == 20
        assert made.counts["repeated"] == 1


@pytest.mark.parametrize("bad", [-9999.0, np.nan, np.inf, -0.5])
def test_agbd_that_is_no_biomass_is_an_error(bad):
    grid = ground("north")[0]
    with pytest.raises(PrepError, match=f"first shot_number {FIRST + 1}"):
        label_raster(shots(*at_pixels("north", [1, 2], [1, 2]), [1, bad]), grid, everywhere(grid))
    with pytest.raises(PrepError, match="shot_owner"):
        label_raster(shots([], [], []), grid, everywhere(grid), shot_owner="first")


def great_circle_owner(lon, lat, centres):
    """The nearest centre by the haversine formula, a plain loop."""
    owners = []
    for x, y in zip(np.radians(lon), np.radians(lat), strict=True):
        best = None
        for name, (cx, cy) in centres.items():
            cx, cy = np.radians(cx), np.radians(cy)
            h = np.sin((y - cy) / 2) ** 2 + np.cos(y) * np.cos(cy) * np.sin((x - cx) / 2) ** 2
            if best is None or h < best[0]:
                best = (h, name)
        owners.append(best[1])
    return np.array(owners, object)


@pytest.mark.parametrize(
    "names",
    [
        ("10SFF", "10SEF", "10SFG", "10SEG"),  # four that meet in one zone
        ("10SGF", "11SKA"),  # across a zone boundary
        ("60KZF", "01KAB"),  # across the antimeridian
    ],
)
def test_shots_in_overlaps_belong_to_the_nearest_centre_and_count_once(names):
    tiles = {name: tile_grid(name) for name in names}
    zones = {name: int(name[:2]) for name in names}
    rng = np.random.default_rng(0)
    places = []
    for name in names:  # all over each tile
        t = tiles[name].transform
        x, y = t.c + rng.uniform(0, 109800, 900), t.f - rng.uniform(0, 109800, 900)
        places.append(to_degrees(x, y, zones[name]))
    lon, lat = np.concatenate(places, axis=1)
    inside = {}
    for name in names:
        x, y = to_utm(lon, lat, zones[name])
        t = tiles[name].transform
        inside[name] = (x > t.c) & (x < t.c + 109800) & (y < t.f) & (y > t.f - 109800)
    holders = np.sum(list(inside.values()), axis=0)
    assert (holders > 1).sum() >= 30  # there is an overlap to decide
    centres = {
        name: to_degrees(np.array(t.transform.c + 54900.0), np.array(t.transform.f - 54900.0), zones[name])
        for name, t in tiles.items()
    }
    expected = great_circle_owner(lon, lat, centres)
    owner = owner_tile(lon, lat, tiles)
    overlap = holders > 1
    for name in names:  # only tiles that hold a shot can own it
        alone = inside[name] & ~overlap
        assert (owner[alone] == name).all()
    agree = np.array([inside[want][k] for k, want in enumerate(expected)]) & overlap
    assert agree.sum() >= 0.9 * overlap.sum()
    same = owner[agree] == expected[agree]
    assert same.mean() > 0.98  # the sphere of the plain loop is off by some metres close to the middle

    table = shots(lon, lat, rng.uniform(0, 300, len(lon)))
    used = [label_raster(table, grid, everywhere(grid), tile=name, tiles=tiles) for name, grid in tiles.items()]
    numbers = np.concatenate([made.shots["shot_number"] for made in used])
    assert sorted(numbers.tolist()) == table["shot_number"].tolist()  # every shot once
    assert sum(made.counts["other_tile"] for made in used) == (holders - 1).sum()
    both = [
        label_raster(table, grid, everywhere(grid), tile=name, tiles=tiles, shot_owner="all")
        for name, grid in tiles.items()
    ]
    assert sum(made.counts["used"] for made in both) == holders.sum()


def test_of_two_centres_equally_near_the_first_name_wins_and_nobody_owns_what_lies_outside():
    grid = ground("north")[0]
    assert owner_tile(np.array([0.0]), np.array([0.0]), {"b": grid}).tolist() == [""]
    lon, lat = at_pixels("north", [5], [5])
    assert owner_tile(lon, lat, {"b": grid, "a": grid}).tolist() == ["a"]
    with pytest.raises(PrepError, match="its grid isn't among"):
        label_raster(shots(lon, lat, [1]), grid, everywhere(grid), tile="c", tiles={"a": grid})


def write_composite(folder, name, *, season=SEASON, tile="10SFF"):
    """A composite with one pixel of fill and one that is 0 in all bands."""
    grid = ground(name)[0]
    image = np.full((7, H, W), 500, np.int16)
    image[:6, 10, 10] = -9999
    image[:6, 11, 10] = 0
    image[0, 12, 10] = 0
    bands = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2", "CLEAR_COUNT"]
    path = folder / "composites" / tile / f"{tile}_{season.start}_{season.stop}.tif"
    tags = {"TILE": tile, "SEASON": season.text, "SENSORS": "L30"}
    return write_cog(path, [image], grid, "int16", bands, -9999, tags)


def write_orbits(folder, name, filters=None):
    rows, cols = np.array([10, 11, 12, 20, 20, 45]), np.array([10, 10, 10, 30, 30, 69])
    table = shots(*at_pixels(name, rows, cols), [1, 2, 3, 10, 21, 0.0])
    table["agbd_se"] = np.arange(3, 9, dtype=np.float32)
    table["agbd_sigma"] = np.array([1, 1, np.nan, 3, 4, 6], np.float32)
    paths = []
    for k, part in enumerate((slice(0, 4), slice(4, 6))):
        settings = {"filters": filters[k] if filters else {"a": 1}, "release": "002_02", "version": "V002"}
        orbit = {key: values[part].copy() for key, values in table.items()}
        orbit["granule"][:] = f"GEDI04_A_{k}"
        paths.append(write_footprints(orbit, folder / "footprints" / f"GEDI04_A_{k}.parquet", settings))
    return paths


@pytest.mark.parametrize("name", ["north", "south as a north zone", "south, user-defined"])
def test_written_labels_lie_on_the_composite_s_grid(tmp_path, name):
    composite, orbits = write_composite(tmp_path, name), write_orbits(tmp_path, name)
    dst, counts = write_labels(composite, orbits, tmp_path / "labels")
    assert dst == tmp_path / "labels" / "10SFF" / "10SFF_2020-05-01_2020-10-01_agbd.tif"
    assert faults(dst) == []
    with rasterio.open(dst) as label, rasterio.open(composite) as image:
        assert (label.transform, label.crs, label.shape) == (image.transform, image.crs, image.shape)
        assert (label.dtypes, label.nodata) == (("float32",) * 2, -1)
        assert (label.descriptions, label.units) == (("agbd", "agbd_sigma"), ("Mg ha-1",) * 2)
        tags, values, errors = label.tags(), label.read(1), label.read(2)
    expected = np.full((H, W), -1, np.float32)
    expected[12, 10], expected[20, 30], expected[45, 69] = 3, 15.5, 0
    np.testing.assert_array_equal(values, expected)
    expected[12, 10], expected[20, 30], expected[45, 69] = -1, 2.5, 6  # unknown; sqrt(3 ** 2 + 4 ** 2) / 2; one shot
    np.testing.assert_array_equal(errors, expected)
    assert (tags["TILE"], tags["SEASON"], tags["SENSORS"]) == ("10SFF", SEASON.text, "L30")
    stored = json.loads(tags["LABELS"])
    assert stored["counts"] == counts
    assert (counts["no_data"], counts["used"], counts["without_sigma"], counts["pixels"]) == (2, 4, 1, 3)
    assert stored["sigma"] == "sqrt(sum of squares) / number of shots"
    assert stored["gedi"]["filters"] == {"a": 1}
    assert stored["gedi"]["granules"] == ["GEDI04_A_0", "GEDI04_A_1"]
    table = pq.read_table(dst.with_suffix(".parquet"))
    assert table.schema.names == ["shot_number", "row", "col", "agbd", "agbd_se", "agbd_sigma"]
    assert table["agbd_sigma"].to_pylist()[1:] == [3, 4, 6]
    assert table.drop_columns(["agbd_sigma"]).to_pydict() == {
        "shot_number": [FIRST + k for k in (2, 3, 4, 5)],
        "row": [12, 20, 20, 45],
        "col": [10, 30, 30, 69],
        "agbd": [3, 10, 21, 0],
        "agbd_se": [5, 6, 7, 8],
    }
    first = [path.read_bytes() for path in (dst, dst.with_suffix(".parquet"))]
    write_labels(composite, orbits[::-1], tmp_path / "labels")
    assert [path.read_bytes() for path in (dst, dst.with_suffix(".parquet"))] == first
    assert len(list(dst.parent.iterdir())) == 2


def test_tables_of_different_filters_are_refused(tmp_path):
    composite = write_composite(tmp_path, "north")
    orbits = write_orbits(tmp_path, "north", filters=[{"leaf_off_flag": True}, {"leaf_off_flag": False}])
    with pytest.raises(PrepError, match="GEDI04_A_1.parquet: made with other filters"):
        write_labels(composite, orbits, tmp_path / "labels")
    with pytest.raises(PrepError, match="no footprint tables"):
        write_labels(composite, [], tmp_path / "labels")


def test_the_command_labels_every_tile_and_widens_on_request(tmp_path, capsys):
    write_orbits(tmp_path, "north")
    write_composite(tmp_path, "north")
    write_composite(tmp_path, "north", tile="10SEF", season=Season(date(2021, 5, 1), date(2021, 10, 1)))
    assert labels.main(["--out", str(tmp_path)]) == 1
    assert "10SEF_2021-05-01_2021-10-01.tif: shots of 2021-05-01/2021-10-01" in capsys.readouterr().err
    assert labels.main(["--out", str(tmp_path), "--allow-empty"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "6 shots" in said[0]
    assert "6 other_season" in said[0]  # of 2021
    assert "6 other_tile" in said[1]  # the same ground: the first name owns it
    assert labels.main(["--out", str(tmp_path), "--tile", "10SEF", "--label-years", "1"]) == 0
    assert "4 used" in capsys.readouterr().out
    assert labels.main(["--out", str(tmp_path), "--tile", "10SFF", "--shot-owner", "all"]) == 0
    assert "4 used" in capsys.readouterr().out
    assert labels.main(["--out", str(tmp_path), "--tile", "10SXX"]) == 1
    assert "no composites of tile 10SXX" in capsys.readouterr().err


def test_a_raster_that_is_no_composite_is_refused(tmp_path):
    composite = write_composite(tmp_path, "north")
    with rasterio.open(composite, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as image:
        image.update_tags(SEASON="")
    with pytest.raises(PrepError, match="no tag SEASON"):
        write_labels(composite, write_orbits(tmp_path, "north"), tmp_path / "labels")
