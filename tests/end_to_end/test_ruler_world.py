"""The ruler world through the whole chain, read back from shards: each pixel and each label says where it belongs.

Nothing here reads through the pipeline's own helpers: shards by TFDS, rasters by rasterio, tables by pyarrow, and
longitudes and latitudes by a series, not PROJ. What numbers have to be is written out once more from the world's rules.
"""

import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio

from data_prep.hls import composite
from data_prep.prepare import run as prepare
from data_prep.synthetic.ruler.world import write_ruler_world
from tests.data_prep.utm_series import to_utm
from tests.end_to_end.ruler_chain import FILL, SPLITS, Chain, metres_between, pixel_places, ran, run_chain, run_tiles

pytestmark = pytest.mark.slow
TILES = ["10SFF", "10SGF", "10UGB", "11UKS", "22JGR", "01KAB"]
EPSG = {"10SFF": 32610, "10SGF": 32610, "10UGB": 32610, "11UKS": 32611, "22JGR": 32622, "01KAB": 32701}
MILLIMETRE = 1e-3
WORLDS = {
    "small": {"shape": (150, 220), "size": 64, "block_km": 3.0, "min_labels": 1},
    "chips of 224": {"shape": (460, 700), "size": 224, "block_km": 9.0},
}


# The two differ in their sizes alone.
@pytest.fixture(scope="module", params=["small", pytest.param("chips of 224", marks=pytest.mark.long)])
def chain(request, tmp_path_factory) -> Chain:
    return run_chain(tmp_path_factory.mktemp("ruler"), **WORLDS[request.param])


def truth(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """(..., 6) digital numbers at rows and columns of a tile."""
    same = np.zeros_like(rows + cols)
    bands = [1 + rows, 4001 + cols, 8001 + (rows + 2 * cols) % 1000, 9501 + (2 * rows + cols) % 1000, 11001, 12001]
    return np.stack([band + same for band in bands], axis=-1)


def places(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns in the tile of a record's pixels."""
    height, width = record["label"].shape
    rows, cols = np.mgrid[:height, :width]
    return rows + record["row"], cols + record["col"]


def tile_of(record: dict) -> str:
    return record["tile"].decode()


def kept_shots(chain: Chain) -> dict[tuple[str, int, int], list[list]]:
    """(tile, row, col) -> the planned shots that make the label there."""
    found: dict[tuple[str, int, int], list[list]] = {}
    for shot in chain.plan["shots"]:
        if shot[6] == "kept":
            found.setdefault((shot[1], shot[2], shot[3]), []).append(shot)
    return found


def test_all_tiles_and_splits_are_there(chain):
    assert sorted(chain.records) == sorted(SPLITS)
    assert {tile_of(record) for record in chain.everything} == set(TILES)
    height, width = chain.plan["size"]
    cells = {(row, col) for row in range(0, height, chain.size) for col in range(0, width, chain.size)}
    whole = {(row, col) for row, col in cells if row + chain.size <= height and col + chain.size <= width}
    assert len(whole) == 6
    by_tile = {tile: {(r["row"], r["col"]) for r in chain.index if r["tile"] == tile} for tile in TILES}
    assert by_tile["22JGR"] == by_tile["01KAB"] == whole
    assert all(chips <= whole for chips in by_tile.values())
    for record in chain.everything:
        assert record["image"].shape == (chain.size, chain.size, 6)
        assert record["image"].dtype == np.int16
        assert record["label"].dtype == np.float32
        assert record["season"].decode() == chain.plan["tiles"][tile_of(record)]["season"]


def test_every_pixel_tells_its_own_row_and_column(chain):
    missing = Counter()
    for record in chain.everything:
        image, expected = record["image"], truth(*places(record))
        gone = (image == FILL).all(axis=-1)
        missing[record["chip_id"]] = int(gone.sum())
        assert gone.mean() < 0.02
        np.testing.assert_array_equal(image[~gone], expected[~gone], str(record["chip_id"]))
    assert sum(missing.values()) > 0


def test_composites_hold_every_pixel_and_count_scenes_as_planned(chain):
    for tile, planned in chain.plan["tiles"].items():
        *image, counts = chain.raster("composites", tile)
        assert {str(n): int(found) for n, found in enumerate(np.bincount(counts.ravel())) if found} == planned[
            "clear_counts"
        ], tile
        rows, cols = np.mgrid[: counts.shape[0], : counts.shape[1]]
        expected = np.where((counts > 0)[..., None], truth(rows, cols), FILL)
        np.testing.assert_array_equal(np.stack(image, -1), expected, tile)


def test_scenes_used_and_pixels_counted_are_as_planned(chain):
    """The composite's tags against the scenes' Fmask and bands, read and judged here."""
    for tile, planned in chain.plan["tiles"].items():
        (path,) = (chain.out / "composites" / tile).glob("*.tif")
        with rasterio.open(path) as src:
            tags = src.tags()
        scenes = [scene["granule"] for scene in planned["scenes"] if scene["role"] == "season"]
        dropped = [scene["granule"] for scene in planned["scenes"] if scene["role"] == "older_duplicate"]
        assert sorted(tags["SCENES"].split(",")) == sorted(scenes)
        assert [pair.split("=")[0] for pair in tags["DUPLICATES"].split(",")] == dropped
        assert tags["SENSORS"] == "L30"
        expected = {name: pixels_of_scene(chain.out / "granules" / "hls" / name) for name in scenes}
        assert json.loads(tags["COMPOSITE"])["counts"]["by_scene"] == expected


def pixels_of_scene(folder: Path) -> dict[str, int]:
    layers = []
    for layer in ("Fmask", "B02", "B03", "B04", "B05", "B06", "B07"):
        with rasterio.open(folder / f"{folder.name}.{layer}.tif") as src:
            layers.append(src.read(1))
    fmask, image = layers[0], np.stack(layers[1:])
    good = (fmask != 255) & ((fmask & 0b00011110) == 0) & (image != FILL).all(axis=0)
    return {"observed": int((fmask != 255).sum()), "clear": int(good.sum())}


def test_every_label_tells_its_own_row_and_column(chain):
    planned = {name: {(r, c) for r, c, _ in tile["labels"]} for name, tile in chain.plan["tiles"].items()}
    total = 0
    for record in chain.everything:
        rows, cols = places(record)
        label = record["label"]
        has = label != -1
        np.testing.assert_array_equal(label[has], (4096 * rows + cols)[has], str(record["chip_id"]))
        inside = set(zip(rows.ravel().tolist(), cols.ravel().tolist(), strict=True))
        found = set(zip(rows[has].tolist(), cols[has].tolist(), strict=True))
        assert found == planned[tile_of(record)] & inside
        total += len(found)
    assert total > 100


def test_label_rasters_hold_what_was_planned_and_no_poison(chain):
    for tile, planned in chain.plan["tiles"].items():
        label, _ = chain.raster("labels", tile)
        expected = np.full(label.shape, -1, np.float32)
        for row, col, _ in planned["labels"]:
            expected[row, col] = 4096 * row + col
        np.testing.assert_array_equal(label, expected, tile)


def test_transform_gives_longitude_and_latitude_to_a_millimetre(chain):
    """Each shot's place in its HDF5 file, from the record's transform and its planned offset in its pixel."""
    shots, checked = kept_shots(chain), Counter()
    for record in chain.everything:
        tile = tile_of(record)
        assert record["epsg"] == EPSG[tile]
        rows, cols = places(record)
        has = record["label"] != -1
        for row, col in zip(rows[has].tolist(), cols[has].tolist(), strict=True):
            for number, _, _, _, dx, dy, _ in shots[tile, row, col]:
                down, right = row - record["row"] + 0.5 - dy / 30, col - record["col"] + 0.5 + dx / 30
                lon, lat = pixel_places(record, np.array(down), np.array(right))
                assert metres_between(lon, lat, *chain.shots[number]) < MILLIMETRE
                checked[tile] += 1
    assert min(checked[tile] for tile in TILES) > 20


def test_transform_moves_with_the_chip(chain):
    for record in chain.everything:
        a, b, left, d, e, top = chain.plan["tiles"][tile_of(record)]["transform"]
        expected = [a, b, left + 30 * record["col"], d, e, top - 30 * record["row"]]
        assert record["transform"].tolist() == expected


def left_after(path: Path) -> dict[str, int]:
    """Shots left after each step, from a footprint table."""
    return dict(json.loads(pq.read_schema(path).metadata[b"biomass_jax"])["counts"])


def test_filters_drop_what_was_planned(chain):
    for name, planned in chain.plan["gedi"].items():
        left = left_after(chain.out / "footprints" / f"{Path(name).stem}.parquet")
        assert left["shots"] == planned["shots"]
        steps = list(left)
        dropped = {step: left[before] - left[step] for before, step in zip(steps, steps[1:], strict=False)}
        expected = dict(planned["dropped"])
        if planned["version"] != "002_01":
            assert expected.pop("selected_algorithm") == 0
        assert dropped == expected, name
        assert steps[1:] == list(expected), name


def test_labels_drop_what_was_planned_and_shots_in_overlaps_count_once(chain):
    planned = chain.plan["tiles"]
    used: Counter[int] = Counter()
    shared = 0
    for tile in TILES:
        (path,) = (chain.out / "labels" / tile).glob("*.parquet")
        table = pq.read_table(path)
        counts = json.loads(table.schema.metadata[b"biomass_jax"])["counts"]
        assert counts["used"] == len(table) == planned[tile]["kept"]
        assert counts["no_data"] == planned[tile]["no_data"]
        assert counts["pixels"] == len(planned[tile]["labels"])
        assert counts["repeated"] == counts["other_season"] == 0
        gone = sum(counts[name] for name in ("outside", "other_tile", "no_data", "used"))
        assert gone == counts["shots"]
        shared += counts["other_tile"]
        used.update(table["shot_number"].to_pylist())
    assert set(used.values()) == {1}
    assert set(used) == {shot[0] for shot in chain.plan["shots"] if shot[6] == "kept"}
    assert shared > 0  # or no overlap was tried


def test_shot_numbers_of_chips_are_exact_and_disjoint_between_splits(chain):
    by_split: dict[str, set[int]] = {split: set() for split in SPLITS}
    in_shards = {r["chip_id"].decode(): split for split, records in chain.records.items() for r in records}
    shots = kept_shots(chain)
    for row in chain.index:
        inside = [
            shot[0]
            for (tile, r, c), found in shots.items()
            for shot in found
            if tile == row["tile"] and 0 <= r - row["row"] < chain.size and 0 <= c - row["col"] < chain.size
        ]
        assert row["shot_numbers"] == sorted(inside)
        assert row["split"] == in_shards.get(row["chip_id"], "dropped")
        if row["split"] != "dropped":
            by_split[row["split"]] |= set(inside)
    assert all(by_split.values())
    for one, other in permutations(SPLITS, 2):
        assert not by_split[one] & by_split[other]


def shares_ground(one: dict, other: dict) -> bool:
    """Whether centres of pixels of one chip lie in the other, in whose zone they are looked up."""
    chip_size = one["label"].shape[0]
    steps = np.append(np.arange(0.5, chip_size, max(1, chip_size // 16)), chip_size - 0.5)
    rows, cols = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    lon, lat = pixel_places(one, rows, cols)
    epsg = int(other["epsg"])
    middle = math.radians(6 * (epsg % 100) - 183)
    near = np.abs((np.radians(lon) - middle + math.pi) % (2 * math.pi) - math.pi) < math.radians(5)
    east, north = to_utm(lon, lat, epsg % 100)
    north = north + (1e7 if epsg // 100 == 327 else 0)
    a, _, left, _, e, top = other["transform"]
    col, row = (east - left) / a, (north - top) / e
    return bool((near & (row > 0) & (row < chip_size) & (col > 0) & (col < chip_size)).any())


def test_ground_of_splits_is_disjoint(chain):
    for one, other in permutations(SPLITS, 2):
        for mine in chain.records[one]:
            for theirs in chain.records[other]:
                assert not shares_ground(mine, theirs), (mine["chip_id"], theirs["chip_id"])
    # Some chips do share ground, in one zone and in two, or nothing was tried.
    everything = chain.everything + [row_as_record(row) for row in chain.index if row["split"] == "dropped"]
    met = {
        frozenset((name_of(one), name_of(other)))
        for one, other in permutations(everything, 2)
        if name_of(one) != name_of(other) and shares_ground(one, other)
    }
    assert met == {frozenset(("10SFF", "10SGF")), frozenset(("10UGB", "11UKS"))}


def name_of(record: dict) -> str:
    return record["tile"] if isinstance(record["tile"], str) else tile_of(record)


def row_as_record(row: dict) -> dict:
    return row | {"label": np.empty((row["size"], row["size"]))}


def test_chips_that_meet_those_of_another_split_are_dropped_and_counted(chain):
    dropped = [row for row in chain.index if row["split"] == "dropped"]
    stored = json.loads(pq.read_schema(chain.out / "chips" / "chips.parquet").metadata[b"biomass_jax"])
    assert sum(stored["split"]["dropped"].values()) == len(dropped) > 0
    for row in dropped:
        assert any(shares_ground(row_as_record(row), record) for record in chain.everything) or any(
            shares_ground(row_as_record(row), row_as_record(other)) for other in dropped if other is not row
        )


def test_statistics_are_of_train_alone(chain):
    def statistics(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.concatenate([r["image"].reshape(-1, 6) for r in records]).astype(np.float64)
        pixels = pixels[(pixels != FILL).all(axis=-1)]
        return pixels.mean(axis=0), pixels.std(axis=0)

    means, stds = statistics(chain.records["train"])
    np.testing.assert_allclose(chain.metadata["means"], means, rtol=1e-12)
    np.testing.assert_allclose(chain.metadata["stds"], stds, rtol=1e-9, atol=1e-9)
    assert np.abs(statistics(chain.everything)[1] - stds).max() > 1e-3


@pytest.mark.parametrize("tile", ["10SFF"])
def test_other_sensor_by_its_own_band_numbers(chain, tile, tmp_path):
    """The one S30 scene has a clear sky, 1500 more in each band, and its unused bands hold 20000 + number."""
    folder = chain.out / "granules" / "hls"
    only = ["--tile", tile, "--sensors", "S30", "--min-clear", "1"]
    ran(composite.main([str(folder), "--out", str(tmp_path), "--season", "2020", *only]))
    (path,) = tmp_path.rglob("*.tif")
    with rasterio.open(path) as src:
        *image, counts = src.read()
    rows, cols = np.mgrid[: counts.shape[0], : counts.shape[1]]
    assert (counts == 1).all()
    np.testing.assert_array_equal(np.stack(image, -1), truth(rows, cols) + 1500)


def test_prepare_makes_the_same_records(chain, tmp_path, root):
    """The chain from one config, with two workers; seasons of all tiles at once go to its orbits."""
    granules = chain.out / "granules"
    fields = {"season": "2020", "granules.hls": granules / "hls", "granules.gedi": granules / "gedi"}
    fields |= {"chips.size": chain.size, "chips.min_labels": chain.min_labels, "chips.label_max": 1e9}
    fields |= {"splits.block_km": chain.block_km, "splits.buffer_m": 0, "composite.min_clear": 1}
    fields |= {"splits.fractions": "(0.5,0.25,0.25)", "shards.records_per_shard": 5}
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    config = str(root / "configs" / "prepare.py")
    ran(prepare.main(["--config", config, "--out", str(tmp_path), "--workers", "2", *given]))
    files = sorted((chain.out / "shards").glob("*.array_record*"))
    assert [path.name for path in files] == sorted(path.name for path in (tmp_path / "shards").glob("*.array_record*"))
    for path in files:
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes(), path.name


@pytest.mark.long
def test_a_tile_of_full_size(tmp_path):
    """3660 x 3660 pixels make 16 x 16 chips."""
    write_ruler_world(tmp_path, shape=(3660, 3660), seed=2, tiles=["22JGR"])
    tile = Chain(tmp_path, 224, 50.0, 20)
    run_tiles(tile)
    test_composites_hold_every_pixel_and_count_scenes_as_planned(tile)
    test_label_rasters_hold_what_was_planned_and_no_poison(tile)
    test_filters_drop_what_was_planned(tile)
    places = [(row["row"], row["col"]) for row in tile.index]
    assert places == [(224 * row, 224 * col) for row in range(16) for col in range(16)]
    assert sum(len(row["shot_numbers"]) for row in tile.index) < tile.plan["tiles"]["22JGR"]["kept"]  # 76 px make none
