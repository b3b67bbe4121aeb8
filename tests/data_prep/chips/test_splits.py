"""Splits by ground: blocks, overlaps between tiles, zones and across the antimeridian, histograms."""

from collections import Counter

import geopandas
import numpy as np
import pyproj
import pytest
import shapely

from biomass_jax.errors import BiomassError
from data_prep import ground
from data_prep.chips import cells as chips
from data_prep.chips import index as chip_index
from data_prep.chips import splits
from data_prep.chips.windows import read_record
from data_prep.settings import SPLITS, ChipSettings, SplitSettings
from tests.data_prep.chip_world import SIZE, ramp, scattered, write_tile

CHIP = 224
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def tile_frame(tile, epsg, x, y, *, cells=16, biome="unknown"):
    """All chips of an HLS tile whose upper-left corner is (x, y)."""
    places = np.array([(r * CHIP, c * CHIP) for r in range(cells) for c in range(cells)])
    geometry = ground.chip_outlines(epsg, (30, 0, x, 0, -30, y), places, CHIP)
    ids = [f"{tile}_{i}_2020-06-01" for i in range(len(places))]
    return geopandas.GeoDataFrame(
        {"chip_id": ids, "tile": tile, "biome": biome, "row": places[:, 0], "col": places[:, 1]},
        geometry=geometry,
        crs=4326,
    )


def joined(*frames):
    import pandas

    return pandas.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def neighbours():
    """Two tiles that overlap in one zone, and one that lies across the boundary of the zones."""
    to_11 = pyproj.Transformer.from_crs(32610, 32611, always_xy=True)
    x, y = to_11.transform(809760 - 9000, 4200000)  # 200 px inside the eastern edge of the second tile
    return joined(
        tile_frame("10SFF", 32610, 600000, 4200000),
        tile_frame("10SGF", 32610, 699960, 4200000),
        tile_frame("11SKB", 32611, x, y, biome="taiga"),
    )


def shared_area(frame, split, one, other):
    """m2 of ground that chips of two splits share, by their outlines in EPSG:6933."""
    areas = [frame.geometry[split == name].to_crs(6933).union_all() for name in (one, other)]
    return areas[0].intersection(areas[1]).area


def test_train_val_and_test_share_no_ground(neighbours):
    split, dropped = splits.split_by_blocks(
        neighbours, SplitSettings(buffer_m=0, seed=11, fractions=tuple(SHARES.values()))
    )
    found = Counter(split)
    assert set(found) == {"train", "val", "test", "dropped"}
    assert found["dropped"] == sum(dropped.values()) > 0
    drawn = splits._draw(*block_columns(neighbours), SHARES, 11)
    assert shared_area(neighbours, drawn, "train", "test") > 1e6  # so there was something to drop
    for pair in (("train", "test"), ("train", "val"), ("val", "test")):
        assert shared_area(neighbours, split, *pair) < 1000  # m2: curved edges of 6.7 km in another projection
    assert all((split == "test") == (drawn == "test"))  # test chips stay


def block_columns(frame):
    lon, lat = ground.centres(np.asarray(frame.geometry, object)).T
    return ground.block_names(lon, lat, 50.0), frame["biome"].to_numpy(object)


@pytest.mark.parametrize("seed", [5, 11])  # where val, or train, lies beside test
def test_only_chips_that_meet_another_split_are_dropped(neighbours, seed):
    split, dropped = splits.split_by_blocks(
        neighbours, SplitSettings(buffer_m=0, seed=seed, fractions=tuple(SHARES.values()))
    )
    drawn = splits._draw(*block_columns(neighbours), SHARES, seed)
    # A plain loop over all pairs, in EPSG:6933, where an overlap of less than 0.5 % of a chip is none.
    outlines = np.asarray(neighbours.geometry.to_crs(6933), object)
    area = (CHIP * 30) ** 2
    expected = drawn.copy()
    counts = dict.fromkeys(dropped, 0)
    for leaver, keepers in (("val", ["test"]), ("train", ["test", "val"])):
        for i in np.flatnonzero(drawn == leaver):
            for keeper in keepers:
                overlap = shapely.area(shapely.intersection(outlines[i], outlines[expected == keeper])).max()
                if expected[i] == leaver and overlap > 0.005 * area:
                    expected[i] = "dropped"
                    counts[f"{leaver}_meets_{keeper}"] += 1
    assert counts == dropped
    assert sum(number > 0 for number in dropped.values()) == 2
    np.testing.assert_array_equal(split, expected)


def test_chips_of_a_block_go_together(neighbours):
    drawn = splits._draw(*block_columns(neighbours), SHARES, 3)
    names = block_columns(neighbours)[0]
    assert len(set(names)) > 8
    assert all(len(set(drawn[names == name])) == 1 for name in set(names))


def test_blocks_are_those_of_the_equal_area_grid():
    to_grid = pyproj.Transformer.from_crs(6933, 4326, always_xy=True)
    inside = [
        (x * 50e3 + dx, y * 50e3 + dy) for x, y, dx, dy in [(-3, 7, 1, 1), (-3, 7, 49999, 49999), (4, -2, 1, 49999)]
    ]
    lon, lat = to_grid.transform(*np.array(inside).T)
    assert ground.block_names(lon, lat, 50).tolist() == ["-3_7", "-3_7", "4_-2"]


def test_the_draw_depends_on_the_seed_and_on_nothing_else(neighbours):
    first, _ = splits.split_by_blocks(neighbours, SplitSettings(buffer_m=0, seed=3, fractions=tuple(SHARES.values())))
    again, _ = splits.split_by_blocks(neighbours, SplitSettings(buffer_m=0, seed=3, fractions=tuple(SHARES.values())))
    np.testing.assert_array_equal(first, again)
    shuffled = neighbours.sample(frac=1, random_state=1)
    moved, _ = splits.split_by_blocks(shuffled, SplitSettings(buffer_m=0, seed=3, fractions=tuple(SHARES.values())))
    assert dict(zip(shuffled["chip_id"], moved, strict=True)) == dict(zip(neighbours["chip_id"], first, strict=True))
    assert any(
        (
            splits.split_by_blocks(neighbours, SplitSettings(buffer_m=0, seed=s, fractions=tuple(SHARES.values())))[0]
            != first
        ).any()
        for s in (4, 5)
    )


def test_each_biome_gets_its_share():
    names = np.array([f"{i}_{i % 7}" for i in range(400) for _ in range(5)], object)
    strata = np.array([("dry", "taiga", "wet", "wet")[i % 4] for i in range(400) for _ in range(5)], object)
    split = splits._draw(names, strata, {"train": 0.7, "val": 0.1, "test": 0.2}, 0)
    for stratum in ("dry", "taiga", "wet"):
        found = Counter(split[strata == stratum])
        total = sum(found.values())
        for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            assert abs(found[name] - share * total) <= 5, (stratum, name)  # a block


def test_a_block_belongs_to_the_biome_of_most_of_its_chips():
    # Blocks of 3 chips, most of them of one biome: both biomes can be halved only if blocks count as that one.
    names = np.array([name for name in "abcdefgh" for _ in range(3)], object)
    strata = np.array([s for name in "abcdefgh" for s in ("xxy" if name in "aceg" else "yyx")], object)
    halves = {"train": 0.5, "val": 0.0, "test": 0.5}
    draws = [splits._draw(names, strata, halves, seed) for seed in range(10)]
    for split in draws:
        for stratum in ("aceg", "bdfh"):
            assert Counter(split[np.isin(names, list(stratum))]) == {"train": 6, "test": 6}
    assert len({tuple(split) for split in draws}) > 5


def test_few_blocks_leave_no_split_empty():
    names = np.array(["a"] * 50 + ["b", "c"], object)
    strata = np.full(52, "all", object)
    assert set(splits._draw(names, strata, dict(zip(SPLITS, SplitSettings().fractions, strict=True)), 0)) == {
        "train",
        "val",
        "test",
    }
    assert set(splits._draw(names, strata, {"train": 0.5, "val": 0, "test": 0.5}, 0)) == {"train", "test"}


def test_an_empty_split_is_said():
    frame = tile_frame("10SFF", 32610, 600000, 4200000, cells=2)
    with pytest.warns(UserWarning, match="no chip is left for val, test: 4 chips"):
        split, _ = splits.split_by_blocks(frame, SplitSettings(block_km=500))
    assert set(split) == {"train"}


def test_whole_tiles_under_the_same_overlap_rule(neighbours):
    split, dropped = splits.split_by_blocks(
        neighbours, SplitSettings(kind="tile", buffer_m=0, fractions=tuple(SHARES.values()), seed=0, stratify="none")
    )
    for tile in ("10SFF", "10SGF", "11SKB"):
        assert len(set(split[neighbours["tile"] == tile]) - {"dropped"}) == 1
    assert sum(dropped.values()) > 30
    assert shared_area(neighbours, split, "train", "test") < 1000


def test_a_random_split_warns_and_drops_nothing(neighbours):
    with pytest.warns(UserWarning, match=r"random split leaks.* and \d\d+ of 768 chips share ground"):
        split, dropped = splits.split_by_blocks(
            neighbours,
            SplitSettings(kind="random", buffer_m=0, fractions=tuple(SHARES.values()), seed=0, stratify="none"),
        )
    assert Counter(split) == {"train": 461, "val": 154, "test": 153}
    assert set(dropped.values()) == {0}


def test_a_dropped_val_chip_drops_no_train_chip():
    # Three chips of 480 m in a row, each over the next: 400 m from one to the next.
    x = [600000 + 400 * i for i in range(3)]
    geometry = [ground.chip_outlines(32610, (30, 0, x[i], 0, -30, 4e6), np.array([(0, 0)]), 16)[0] for i in range(3)]
    names = ["10SFA", "10SFB", "10SFC"]
    columns = {"chip_id": names, "tile": names, "biome": "unknown"}
    frame = geopandas.GeoDataFrame(columns, geometry=geometry, crs=4326)
    thirds = dict.fromkeys(SPLITS, 1 / 3)
    blocks, strata = np.array(names, object), np.full(3, "unknown", object)
    seed = next(s for s in range(99) if splits._draw(blocks, strata, thirds, s).tolist() == ["train", "val", "test"])
    with pytest.warns(UserWarning, match="no chip is left for val"):
        split, dropped = splits.split_by_blocks(
            frame, SplitSettings(kind="tile", buffer_m=0, fractions=tuple(thirds.values()), seed=seed)
        )
    assert split.tolist() == ["train", "dropped", "test"]
    assert dropped == {"train_meets_test": 0, "train_meets_val": 0, "val_meets_test": 1}


# --- which chips meet ---


def pair_at(epsg_one, x_one, y_one, epsg_other, x_other, y_other, size=16):
    """Two chips of 480 m, by the coordinates of their upper-left corners."""
    outlines = [
        ground.chip_outlines(epsg, (30, 0, x, 0, -30, y), np.array([(0, 0)]), size)
        for epsg, x, y in ((epsg_one, x_one, y_one), (epsg_other, x_other, y_other))
    ]
    return ground.meets(*outlines), [ground.meets(*outlines, buffer_m=buffer) for buffer in (20, 40)]


def test_geocentric_places_are_those_of_proj():
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, 9), rng.uniform(-85, 85, 9)
    expected = pyproj.Transformer.from_crs(4979, 4978, always_xy=True).transform(lon, lat, np.zeros(9))
    np.testing.assert_allclose(ground.geocentric(lon, lat), np.stack(expected, -1), atol=1e-6)


@pytest.mark.parametrize("y", [4200000.0, 20000.0, 7800000.0])
def test_a_shared_edge_is_no_shared_ground_and_a_buffer_counts_from_edges(y):
    x = 600000.0
    for dx, dy, expected in [
        (480, 0, (False, True, True)),  # side by side
        (480, 480, (False, True, True)),  # corner by corner
        (479, 0, (True, True, True)),
        (0, -450, (True, True, True)),  # one row of pixels
        (510, 0, (False, False, True)),  # 30 m apart
        (0, 530, (False, False, False)),
    ]:
        bare, buffered = pair_at(32610, x, y, 32610, x + dx, y + dy)
        assert (bare[0], *(one[0] for one in buffered)) == expected, (dx, dy)


@pytest.mark.parametrize(
    ("one", "other", "lat"), [(32610, 32611, 38.0), (32760, 32701, -17.0), (32660, 32701, -17.0), (32660, 32601, 68.0)]
)
def test_chips_of_two_zones_meet_where_they_share_ground(one, other, lat):
    # On the boundary of the zones, which is the antimeridian for all but the first pair.
    lon = -120.0 if one == 32610 else 180.0
    places = [pyproj.Transformer.from_crs(4326, code, always_xy=True).transform(lon, lat) for code in (one, other)]
    geod = pyproj.Geod(ellps="WGS84")
    for shift in (-900, -700, -540, -400, 0, 400, 540, 700, 900):
        outlines = [
            ground.chip_outlines(code, (30, 0, x - 240 + dx, 0, -30, y + 240), np.array([(0, 0)]), 16)
            for code, (x, y), dx in ((one, places[0], 0), (other, places[1], shift))
        ]
        # Far from the seam, in a plane through their own centre: azimuthal equidistant.
        plane = pyproj.Transformer.from_crs(4326, f"+proj=aeqd +lon_0={lon} +lat_0={lat} +ellps=WGS84", always_xy=True)
        moved = [
            shapely.convex_hull(
                shapely.transform(outline[0], lambda points, plane=plane: np.stack(plane.transform(*points.T), -1))
            )
            for outline in outlines
        ]
        assert abs(geod.geometry_area_perimeter(outlines[0][0])[0]) == pytest.approx(moved[0].area, rel=1e-3)
        gap = moved[0].distance(moved[1])
        assert abs(gap - 100) > 5 and (gap > 5 or moved[0].intersection(moved[1]).area > 5000)  # no case is close
        assert ground.meets(*outlines)[0] == (gap == 0), shift
        assert ground.meets(*outlines, buffer_m=100)[0] == (gap < 100), shift


def test_tiles_across_the_antimeridian_leave_no_shared_ground_between_splits():
    to_1 = pyproj.Transformer.from_crs(32760, 32701, always_xy=True)
    x, y = pyproj.Transformer.from_crs(4326, 32760, always_xy=True).transform(179.6, -17)
    east = to_1.transform(x + 40000, y)
    frame = joined(tile_frame("60KXX", 32660, x, y - 1e7), tile_frame("01KAB", 32701, *east))
    crossing = [outline.geom_type == "MultiPolygon" for outline in frame.geometry]
    assert 16 <= sum(crossing) < 100
    split, dropped = splits.split_by_blocks(
        frame, SplitSettings(kind="tile", buffer_m=0, seed=1, fractions=(0.5, 0, 0.5))
    )
    assert dropped["train_meets_test"] > 80
    # Longitudes from 0 to 360 have no seam here.
    frame["geometry"] = [
        shapely.union_all([shapely.transform(p, lambda xy: np.stack([xy[:, 0] % 360, xy[:, 1]], -1)) for p in parts(g)])
        for g in frame.geometry
        if g is not None
    ]
    assert all(g.bounds[2] - g.bounds[0] < 1 for g in frame.geometry if g.geom_type == "Polygon")
    areas = [shapely.union_all(frame.geometry[split == name]) for name in ("train", "test")]
    kept = areas[0].intersection(areas[1]).area * 111e3**2 * np.cos(np.radians(17))
    assert kept < 3000
    wrongly = [g for g in frame.geometry[split == "dropped"] if g.intersection(areas[1]).area < 1e-8]
    assert not wrongly


def parts(outline):
    return outline.geoms if outline.geom_type == "MultiPolygon" else [outline]


def test_meeting_of_many_is_that_of_each_pair(neighbours):
    outlines = np.asarray(neighbours.geometry, object)
    rng = np.random.default_rng(0)
    some, others = rng.choice(len(outlines), (2, 40), replace=False)
    for buffer_m in (0.0, 3000.0):
        expected = [any(ground.meets(outlines[[i]], outlines[[j]], buffer_m=buffer_m)[0] for j in others) for i in some]
        assert any(expected) and not all(expected)
        assert ground.meets(outlines[some], outlines[others], buffer_m=buffer_m).tolist() == expected
    assert ground.meets(outlines[some], outlines[:0]).tolist() == [False] * 40


# --- in the index ---


@pytest.fixture
def world(tmp_path):
    shots = scattered(64, 80, 900, seed=5)
    write_tile(tmp_path, "10SFF", image=ramp(64, 80), shots=shots)
    chips.index_folder(tmp_path, ChipSettings(size=SIZE))
    return tmp_path, np.array([s[3] for s in shots])


def test_the_command_writes_splits_into_the_index(world, capsys):
    root, _ = world
    path = chip_index.path_in(root)
    given = f"--out {root} --block-km 0.7 --buffer-m 0 --seed 2 --fractions 0.6 0.2 0.2".split()
    before = chip_index.read_index(path)
    assert splits.main(given) == 0
    out = capsys.readouterr().out
    after = chip_index.read_index(path)
    assert set(after["split"]) == {"train", "val", "test"}
    for name in before.columns.drop("split"):
        assert [np.asarray(v).tolist() for v in before[name]] == [np.asarray(v).tolist() for v in after[name]], name
    stored = chip_index.read_metadata(path)
    assert stored["chips"]["size"] == SIZE
    assert {key: stored["split"][key] for key in ("kind", "block_km", "buffer_m", "seed", "stratify")} == {
        "kind": "block",
        "block_km": 0.7,
        "buffer_m": 0.0,
        "seed": 2,
        "stratify": "biome",
    }
    counts = Counter(after["split"])
    assert stored["split"]["counts"] == {name: counts[name] for name in ("train", "val", "test", "dropped")}
    assert "dropped for shared ground: 0 train meets test, 0 val meets test, 0 train meets val" in out
    assert "of these by buffer_m 0 alone: 0 of 20 chips (0.0%)" in out
    assert f"{counts['test']} test chips to the nearest train chip: 0.0 km" in out
    written = path.read_bytes()
    assert splits.main(given) == 0
    assert path.read_bytes() == written


def test_histograms_count_each_splits_labels(world):
    root, agbd = world
    splits.run(
        chip_index.path_in(root),
        SplitSettings(kind="block", block_km=0.7, buffer_m=0, seed=2, fractions=tuple(SHARES.values())),
    )
    frame = chip_index.read_index(chip_index.path_in(root))
    found = chip_index.read_metadata(chip_index.path_in(root))["split"]["label_histograms"]
    edges = [*chip_index.LABEL_EDGES, np.inf]
    np.testing.assert_array_equal(sum(np.array(one) for one in found.values()), np.histogram(agbd, edges)[0])
    for name in ("train", "val", "test"):
        values = [read_record(row, root)["label"] for _, row in frame[frame["split"] == name].iterrows()]
        assert found[name] == np.histogram(np.concatenate(values)[np.concatenate(values) >= 0], edges)[0].tolist()


def test_settings_left_out_are_written_too(world):
    with pytest.warns(UserWarning, match="no chip is left for train, val: 20 chips are too few .* buffer_m 10000"):
        written = splits.run(chip_index.path_in(world[0]), SplitSettings(block_km=0.7))
    expected = {"kind": "block", "block_km": 0.7, "buffer_m": 10_000.0, "seed": 0, "stratify": "biome"}
    expected |= {"folds": 5, "fold": 0, "leave_out": ""}
    expected["fractions"] = {"train": 0.8, "val": 0.1, "test": 0.1}
    assert {name: written[name] for name in expected} == expected
    assert chip_index.read_metadata(chip_index.path_in(world[0]))["split"] == written


def test_random_in_the_command(world, capsys):
    assert splits.main(["--out", str(world[0]), "--kind", "random", "--buffer-m", "0", "--stratify", "none"]) == 0
    assert "warning: a random split leaks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "file"}, "kind: found 'file', expected one of block, tile, folds, random"),
        ({"fractions": (0.8, 0.1, 0.2)}, "add up to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "shares from 0 on for train, val, test"),
        ({"fractions": (1.0,)}, "fractions is .*; expected 3 values"),
        ({"buffer_m": -1}, "buffer_m: found -1"),
        ({"block_km": 0}, "block_km: found 0"),
        ({"stratify": "ecoregion"}, "stratify: found no column 'ecoregion'"),
        ({"kind": "folds", "folds": 1}, "fold: found 0 of folds 1, expected 2 folds or more"),
        ({"kind": "folds", "folds": 3, "fold": 3}, "fold: found 3 of folds 3"),
        ({"kind": "folds", "folds": 3, "block_km": 500}, "folds: found 1 blocks for 3 folds"),
        ({"kind": "folds", "folds": 2, "block_km": 5, "fractions": (0, 0, 1)}, "expected a share above 0 for train"),
        ({"leave_out": "taiga"}, "leave_out: found 'taiga', expected COLUMN=VALUE"),
        ({"leave_out": "tile=10SFG"}, r"leave_out: no chip of tile '10SFG'; found 10SFF \(4\)"),
        ({"leave_out": "ecoregion=x"}, "leave_out: found no column 'ecoregion'"),
        ({"leave_out": "tile=10SFF", "kind": "folds"}, "leave_out: found 'tile=10SFF' with kind folds"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(BiomassError, match=message):
        splits.split_by_blocks(tile_frame("10SFF", 32610, 600000, 4200000, cells=2), SplitSettings(**settings))


def test_without_an_index_the_step_before_is_named(tmp_path, capsys):
    assert splits.main(["--out", str(tmp_path)]) == 1
    assert "make it with python -m data_prep chips" in capsys.readouterr().err
    path = chip_index.path_in(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"PAR1 and no more")
    assert splits.main(["--out", str(tmp_path)]) == 1
    assert "not a readable Parquet file" in capsys.readouterr().err
