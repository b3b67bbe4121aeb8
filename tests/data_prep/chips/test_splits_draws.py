"""Many draws: each stratum's share, folds, what is left out, the buffer and its cost, distances and their picture."""

import dataclasses
from collections import Counter

import geopandas
import numpy as np
import pytest
import shapely
from PIL import Image

from biomass_jax.data.shards import read_metadata
from biomass_jax.data.sources import ShardSource
from biomass_jax.runtime.settings import to_config
from data_prep import ground
from data_prep.chips import cells as chips
from data_prep.chips import index as chip_index
from data_prep.chips import splits
from data_prep.prepare.steps import index_with_splits
from data_prep.settings import SPLITS, ChipSettings, Prepare, SplitSettings
from data_prep.shards.items import index_metadata, items_of
from data_prep.shards.write import write_shards
from tests.data_prep.chip_world import SIZE, ramp, scattered, write_tile

TENTHS = {"train": 0.8, "val": 0.1, "test": 0.1}
DRAWS = 200


def strata_of_blocks(blocks):
    """{stratum: chips of each of its blocks} -> (n,) block names, (n,) strata."""
    names = [f"{s}_{b}" for s, sizes in blocks.items() for b, size in enumerate(sizes) for _ in range(size)]
    return np.array(names, object), np.array([name.split("_")[0] for name in names], object)


def world_of(numbers, seed):
    """Strata with so many blocks of 1 to 12 chips."""
    rng = np.random.default_rng(seed)
    return {f"biome{i:02d}": rng.integers(1, 13, number).tolist() for i, number in enumerate(numbers)}


@pytest.mark.parametrize("numbers", [[8] * 10, [3, 4, 5, 6, 3] * 3], ids=["10 of 8 blocks", "15 of 3 to 6"])
def test_no_biome_goes_without_a_split(numbers):
    for seed in range(DRAWS):
        names, strata = strata_of_blocks(world_of(numbers, seed))
        split = splits._draw(names, strata, TENTHS, seed)
        for stratum in set(strata):
            assert set(split[strata == stratum]) == set(SPLITS), (seed, stratum)


def test_each_of_ten_biomes_gets_its_fractions_in_every_draw():
    names, strata = strata_of_blocks({f"biome{i}": [7] * 8 for i in range(10)})
    drawn = Counter()
    for seed in range(DRAWS):
        split = splits._draw(names, strata, TENTHS, seed)
        for stratum in set(strata):
            assert Counter(split[strata == stratum]) == {"train": 42, "val": 7, "test": 7}, (seed, stratum)
        drawn.update(set(names[split == "test"]))
    # Every block has its turn: 1 of 8, so 25 of 200 draws, and 5 standard deviations of the binomial about that.
    assert len(drawn) == 80 and all(abs(count - 25) < 5 * np.sqrt(200 / 8 * 7 / 8) for count in drawn.values())


def test_unequal_blocks_come_within_one_block_of_the_fractions():
    for seed in range(DRAWS):
        blocks = world_of([12, 20, 9], seed)
        names, strata = strata_of_blocks(blocks)
        split = splits._draw(names, strata, {"train": 0.6, "val": 0.2, "test": 0.2}, seed)
        for stratum, sizes in blocks.items():
            found = Counter(split[strata == stratum])
            for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
                assert abs(found[name] - share * sum(sizes)) <= max(sizes), (seed, stratum, name)


def test_of_two_blocks_one_is_for_train_and_one_for_test_and_a_single_one_trains():
    for seed in range(DRAWS):
        names, strata = strata_of_blocks({"many": [5] * 9, "one": [4], "two": [9, 2]})
        split = splits._draw(names, strata, TENTHS, seed)
        assert set(split[strata == "two"]) == {"train", "test"}
        assert set(split[strata == "one"]) == {"train"}
    names, strata = strata_of_blocks({f"s{i}": [3] for i in range(5)})  # then some of them, by the seed
    draws = [splits._draw(names, strata, TENTHS, seed) for seed in range(30)]
    assert all(Counter(split) == {"train": 9, "val": 3, "test": 3} for split in draws)
    assert len({tuple(split) for split in draws}) > 8


def grid_frame(cells, *, biome=lambda row, col: "taiga", tile="10SFF"):
    """Chips of 224 pixels side by side in EPSG:32610."""
    places = np.array([(r * 224, c * 224) for r in range(cells[0]) for c in range(cells[1])])
    columns = {
        "chip_id": [f"{tile}_{i}" for i in range(len(places))],
        "tile": tile,
        "biome": [biome(*place) for place in places // 224],
    }
    outlines = ground.chip_outlines(32610, (30, 0, 5e5, 0, -30, 4.2e6), places, 224)
    return geopandas.GeoDataFrame(columns, geometry=outlines, crs=4326)


def edges_apart(frame, some, others):
    """(n,) metres from each of some chips to the nearest of others, in UTM by shapely."""
    plane = np.asarray(frame.geometry.to_crs(32610), object)
    return np.array([shapely.distance(one, plane[others]).min() for one in plane[some]])


def test_a_stratum_that_cannot_have_all_splits_is_said_and_counted():
    frame = grid_frame((8, 24), biome=lambda row, col: ("east", "west")[int(col < 21)])  # west: several blocks of 25 km
    settings = SplitSettings(block_km=60, buffer_m=0)
    with pytest.warns(UserWarning, match=r"biome \(and its chips\): no (val|test) chips of east \(24\)"):
        split, _ = splits.split_by_blocks(frame, settings)
    counts = splits.by_stratum(frame, split, settings)
    assert set(counts) == {"east", "west"}
    for value, found in counts.items():
        assert found == {n: int(((frame["biome"] == value) & (split == n)).sum()) for n in (*SPLITS, "dropped")}
    assert splits.by_stratum(frame, split, SplitSettings(stratify="none")) == {}


def test_the_order_of_chips_does_not_matter_to_any_kind():
    frame = grid_frame((12, 12), biome=lambda row, col: ("dry", "wet", "taiga")[(row // 4 + col // 4) % 3])
    shuffled = frame.sample(frac=1, random_state=3)
    for settings in (
        SplitSettings(block_km=20, buffer_m=0),
        SplitSettings(kind="folds", block_km=20, buffer_m=0, fold=2),
        SplitSettings(block_km=14, buffer_m=0, leave_out="biome=wet"),
    ):
        one, other = (splits.split_by_blocks(chosen, settings)[0] for chosen in (frame, shuffled))
        assert dict(zip(frame["chip_id"], one, strict=True)) == dict(zip(shuffled["chip_id"], other, strict=True))


@pytest.mark.parametrize("folds", [3, 5])
def test_over_the_folds_every_chip_is_tested_once(folds):
    frame = grid_frame((16, 16), biome=lambda row, col: "dry" if col < 8 else "wet")
    tested = np.zeros(len(frame), int)
    for fold in range(folds):
        settings = SplitSettings(kind="folds", block_km=14, buffer_m=0, folds=folds, fold=fold, seed=4)
        split, _ = splits.split_by_blocks(frame, settings)
        tested += split == "test"
        for biome in ("dry", "wet"):
            here = split[frame["biome"] == biome]
            assert abs((here == "test").mean() - 1 / folds) < 0.06, (fold, biome)
            assert abs((here == "val").mean() / (here != "test").mean() - 1 / 9) < 0.06, (fold, biome)
    assert (tested == 1).all()


def test_blocks_stay_whole_in_folds_and_small_strata_are_dealt_out():
    names, strata = strata_of_blocks({"big": [3] * 11} | {f"s{i}": [2] for i in range(4)})
    fold = splits._folds(names, strata, 5, 0)
    assert all(len(set(fold[names == name])) == 1 for name in set(names))
    assert set(fold[strata == "big"]) == set(range(5))
    sizes = Counter(fold.tolist())
    assert max(sizes.values()) - min(sizes.values()) <= 3  # of 41 chips in blocks of 3 and 2


@pytest.mark.parametrize("left_out", ["biome=wet", "tile=10SGF"])
def test_one_biome_or_one_tile_alone_is_test(left_out):
    frames = [
        grid_frame((9, 12), biome=lambda row, col: "dry" if row < 5 else "wet", tile=t) for t in ("10SFF", "10SGF")
    ]
    frames[1]["geometry"] = frames[1].translate(2.0)  # degrees
    frame = chips_of(frames)
    name, value = left_out.split("=")
    settings = SplitSettings(block_km=14, leave_out=left_out, stratify="biome", buffer_m=0)
    split, _ = splits.split_by_blocks(frame, settings)
    np.testing.assert_array_equal(split == "test", frame[name] == value)
    rest = split[frame[name] != value]
    assert abs((rest == "val").sum() / np.isin(rest, ["train", "val"]).sum() - 1 / 9) < 0.08
    apart, dropped = splits.split_by_blocks(frame, SplitSettings(block_km=14, leave_out=left_out, buffer_m=7_000))
    np.testing.assert_array_equal(apart == "test", frame[name] == value)
    assert (dropped["train_meets_test"] > 0) == (name == "biome")  # the tiles lie far apart


def chips_of(frames):
    import pandas

    return pandas.concat(frames, ignore_index=True)


# --- the buffer, and how far chips lie apart ---


def test_by_default_chips_of_two_splits_lie_10_km_apart():
    assert to_config(Prepare).splits.buffer_m == 10_000
    frame = grid_frame((20, 40), biome=lambda row, col: "taiga")
    settings = SplitSettings(seed=1)
    split, dropped = splits.split_by_blocks(frame, settings)
    drawn = splits._drawn(frame, settings)
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        assert edges_apart(frame, split == one, split == other).min() > 10_000 - 20, (one, other)  # UTM's scale
    # The cost, by a loop that knows no buffer: here no chip shares ground, so all that are dropped are its cost.
    assert splits._lost_to_buffer(frame, settings, dropped) == sum(dropped.values()) == (split == "dropped").sum() > 80
    lost = edges_apart(frame, (drawn == "train") & (split == "dropped"), np.isin(drawn, ["test", "val"]))
    assert lost.max() < 10_000 + 20
    assert splits._lost_to_buffer(frame, SplitSettings(seed=1, buffer_m=0), {"train_meets_test": 3}) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tile of 16 x 14 cells of 480 m, of which those of the two last columns have no labels."""
    root = tmp_path_factory.mktemp("splits")
    height, width = 16 * SIZE, 14 * SIZE + 5
    shots = [shot for shot in scattered(height, width, 2_000, seed=5) if shot[2] < 12 * SIZE]
    write_tile(root, "10SFF", image=ramp(height, width), shots=shots)
    chips.index_folder(root, ChipSettings(size=SIZE, min_labels=1))
    return root


SMALL = {"block_km": 1.5, "buffer_m": 500.0, "seed": 3, "fractions": (0.7, 0.1, 0.2)}


@pytest.fixture(scope="module")
def split_world(world):
    written = splits.run(chip_index.path_in(world), SplitSettings(**SMALL))
    return world, written, chip_index.read_index(chip_index.path_in(world))


def test_distances_are_of_test_chips_and_of_all_cells_of_the_composite(split_world):
    root, written, frame = split_world
    x, y = np.meshgrid(600000 + 480 * np.arange(14), 4200000 - 480 * np.arange(16))
    cells = shapely.box(x.ravel(), y.ravel() - 480, x.ravel() + 480, y.ravel())
    places = frame["row"] // SIZE * 14 + frame["col"] // SIZE
    train, test = (cells[places[frame["split"] == name]] for name in ("train", "test"))
    assert len(frame) == 192 and min(len(train), len(test)) > 5
    expected = {}
    for what, some in (("test", test), ("predicted", cells)):
        apart = [shapely.distance(one, train).min() for one in some]
        expected |= {f"{what}_chips": len(some), f"{what}_median_m": pytest.approx(np.median(apart), abs=1.0)}
    assert written["distances"] == expected | {"test_touching": 0}
    assert written["distances"]["test_median_m"] > 500
    assert written["lost_to_buffer"] == (frame["split"] == "dropped").sum() > 0
    assert index_metadata(chip_index.path_in(root))["split"] == written  # so the shards' metadata carry it


def test_the_picture_lies_beside_the_index_and_is_the_same_again(split_world, capsys):
    root, written, _ = split_world
    path = root / "chips" / "splits.png"
    before = path.read_bytes()
    with Image.open(path) as picture:
        assert picture.info["Title"] == "block of 1.5 km, buffer 500 m"
    assert splits.run(chip_index.path_in(root), SplitSettings(**SMALL)) == written
    said = capsys.readouterr().out
    assert f"of these by buffer_m 500 alone: {written['lost_to_buffer']} of 192 chips" in said
    assert "median distance of 224 chips of a map to the nearest train chip: " in said
    assert f"where they lie, and how far apart: {path}" in said
    assert path.read_bytes() == before


def test_prepare_reports_distances_and_cost_and_leaves_the_picture(split_world):
    root, written, frame = split_world
    index, part = chip_index.path_in(root), root / "part.parquet"
    index.rename(part)
    (root / "chips" / "splits.png").unlink()
    made = index_with_splits({frame["composite"][0]: part}, index, dataclasses.asdict(ChipSettings(size=SIZE)), SMALL)
    told = ("counts", "dropped", "lost_to_buffer", "strata", "distances")
    assert {name: made[name] for name in told} == {name: written[name] for name in told}
    assert (root / "chips" / "splits.png").is_file()


def test_without_its_composite_the_cells_of_the_index_count(world, tmp_path):
    index = chip_index.path_in(tmp_path)
    index.parent.mkdir()
    index.write_bytes(chip_index.path_in(world).read_bytes())
    with pytest.warns(UserWarning, match="10SFF_.*tif: no such composite; of its cells those of the index count"):
        written = splits.run(index, SplitSettings(**SMALL))
    assert written["distances"]["predicted_chips"] == 192


@pytest.mark.slow
def test_the_shards_of_all_folds_together_test_every_chip_once(world):
    index = chip_index.path_in(world)
    tested, everything = [], set(chip_index.read_index(index)["chip_id"])
    for fold in range(3):
        settings = SplitSettings(kind="folds", folds=3, fold=fold, block_km=1.5, buffer_m=0)
        splits.run(index, settings)
        folder = world / f"shards{fold}"
        write_shards(items_of(index), folder, metadata=index_metadata(index))
        source = ShardSource(folder, "test")
        tested += [chip.chip_id for chip in source.chips()]
        told = read_metadata(folder)["split"]
        assert (told["kind"], told["fold"], told["buffer_m"]) == ("folds", fold, 0.0)
        assert told["distances"]["test_chips"] == len(source)
    assert sorted(tested) == sorted(everything)
