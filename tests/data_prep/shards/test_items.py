"""From the index of chips to shards: the right windows, each in its split, and how the rasters were made."""

import json

import numpy as np
import pytest
import rasterio

from biomass_jax.data.shards import read_metadata
from biomass_jax.data.sources import ShardSource
from biomass_jax.errors import PrepError
from data_prep.chips import cells as chips
from data_prep.chips import index as chip_index
from data_prep.settings import ChipSettings
from data_prep.shards import statistics as stats
from data_prep.shards import write as shards
from data_prep.shards.items import index_metadata, items_of
from tests.data_prep.chip_world import SEASON, SIZE, ramp, scattered, write_tile

TILES = {"10SFF": (600000.0, 4200000.0), "10SGF": (699960.0, 4200000.0)}
ROWS, COLUMNS = 2, 3  # cells of each tile


def write_tags(path, **tags):
    with rasterio.open(path, "r+") as dst:
        dst.update_tags(**tags)


@pytest.fixture
def world(tmp_path):
    """Two tiles of 2 x 3 chips; the last chip of each is dropped, and the chips of a column share a split."""
    for number, (tile, origin) in enumerate(TILES.items()):
        image = ramp(ROWS * SIZE, COLUMNS * SIZE) + np.int16(2000 * number)
        shots = scattered(ROWS * SIZE, COLUMNS * SIZE, 500, seed=number, first=2**63 + 1000 * number)
        composite, label, _ = write_tile(tmp_path, tile, origin=origin, image=image, shots=shots)
        made = {"statistic": "mean", "sensors": ["L30"], "counts": {"scenes": 2 + number}}
        write_tags(composite, COMPOSITE=json.dumps(made), SCENES=f"{tile}_a,{tile}_b", DUPLICATES="")
        gedi = {"product": "GEDI_L4A", "versions": ["V2.1"], "filters": {"leaf_off": True}, "granules": [f"O{number}"]}
        counts = {"used": 500 + number, "no_data": number}
        write_tags(label, LABELS=json.dumps({"shot_owner": "nearest", "counts": counts, "gedi": gedi, "tiles": [tile]}))
    chips.index_folder(tmp_path, ChipSettings(size=SIZE))
    frame = chip_index.read_index(chip_index.path_in(tmp_path))
    split = ["train" if col == 0 else "val" if col == SIZE else "test" for col in frame["col"]]
    split = [
        "dropped" if (r, c) == (SIZE, 2 * SIZE) else s
        for r, c, s in zip(frame["row"], frame["col"], split, strict=True)
    ]
    chip_index.set_split(chip_index.path_in(tmp_path), split, {"kind": "tile", "seed": 3})
    return tmp_path


def test_command_writes_every_chip_into_its_split(world, capsys):
    assert shards.main(["--out", str(world), "--records-per-shard", "2"]) == 0
    assert capsys.readouterr().out == f"{world}/shards: 4 train, 4 val, 2 test chips in 5 shards\n"
    seen = set()
    for split in ("train", "val", "test"):
        for record in ShardSource(world / "shards", split):
            number = list(TILES).index(record["tile"])
            row, col = record["row"], record["col"]
            rows, cols = np.mgrid[row : row + SIZE, col : col + SIZE]
            expected = [(band + 1) * 1500 + 20 * rows + cols + 2000 * number for band in range(6)]
            np.testing.assert_array_equal(record["image"], np.stack(expected, -1).astype(np.int16))
            shots = scattered(ROWS * SIZE, COLUMNS * SIZE, 500, seed=number)
            label = {(r - row, c - col): agbd for _, r, c, agbd in shots}
            for place in np.ndindex(SIZE, SIZE):
                assert record["label"][place] == np.float32(label.get(place, -1))
            west, north = TILES[record["tile"]]
            assert record["transform"].tolist() == [30, 0, west + 30 * col, 0, -30, north - 30 * row]
            assert (record["season"], record["sensors"], record["epsg"]) == (SEASON, "L30", 32610)
            assert split == {0: "train", SIZE: "val", 2 * SIZE: "test"}[col]
            assert record["chip_id"] == f"{record['tile']}_{row // SIZE * COLUMNS + col // SIZE}_2020-06-01"
            seen.add(record["chip_id"])
    assert len(seen) == 10


def test_metadata_tells_how_chips_were_made(world):
    shards.main(["--out", str(world)])
    info = read_metadata(world / "shards")
    assert info["composite"] == {"statistic": "mean", "sensors": ["L30"]}
    assert info["gedi"] == {
        "shot_owner": "nearest",
        "product": "GEDI_L4A",
        "versions": ["V2.1"],
        "filters": {"leaf_off": True},
        "counts": {"used": 1001, "no_data": 1},
    }
    assert info["split"] == {"kind": "tile", "seed": 3}
    assert info["chips"]["min_labels"] == 20
    assert info["chips"]["counts"] == {"train": 4, "val": 4, "test": 2}
    assert info["chips"]["tiles"] == list(TILES)
    stem = SEASON.replace("/", "_")
    assert info["sources"] == {
        f"composites/10SFF/10SFF_{stem}.tif": {
            "scenes": ["10SFF_a", "10SFF_b"],
            "duplicates": [],
            "counts": {"scenes": 2},
        },
        f"composites/10SGF/10SGF_{stem}.tif": {
            "scenes": ["10SGF_a", "10SGF_b"],
            "duplicates": [],
            "counts": {"scenes": 3},
        },
        f"labels/10SFF/10SFF_{stem}_agbd.tif": {"granules": ["O0"], "counts": {"used": 500, "no_data": 0}},
        f"labels/10SGF/10SGF_{stem}_agbd.tif": {"granules": ["O1"], "counts": {"used": 501, "no_data": 1}},
    }


def test_statistics_of_the_index_are_those_of_its_shards(world, capsys):
    shards.main(["--out", str(world)])
    capsys.readouterr()
    assert stats.main([str(chip_index.path_in(world))]) == 0
    printed = json.loads(capsys.readouterr().out)
    info = read_metadata(world / "shards")
    names = ("means", "stds", "stat_pixels", "bands")
    assert [printed[name] for name in names] == [info[name] for name in names]


def test_rasters_made_with_different_settings_are_told(world):
    path = next((world / "composites" / "10SGF").glob("*.tif"))
    write_tags(path, COMPOSITE=json.dumps({"statistic": "median"}))
    with pytest.warns(
        UserWarning, match="composites were made with different settings, among them .*10SFF.* and .*10SGF"
    ):
        info = index_metadata(chip_index.path_in(world))
    assert info["composite"] == [{"statistic": "mean", "sensors": ["L30"]}, {"statistic": "median"}]


def test_a_changed_raster_and_missing_splits_are_errors(world, tmp_path):
    index = chip_index.path_in(world)
    label = next((world / "labels" / "10SFF").glob("*.tif"))
    with rasterio.open(label, "r+") as dst:
        dst.write(np.full((1, ROWS * SIZE, COLUMNS * SIZE), -1, np.float32))
    with pytest.raises(PrepError, match="10SFF.*a raster was changed after the index was made"):
        shards.write_shards(items_of(index), tmp_path / "shards")
    chip_index.set_split(index, [""] * 12, {})
    with pytest.raises(PrepError, match="none of its 12 chips has a split; run python -m data_prep.splits first"):
        items_of(index)
    with pytest.raises(PrepError, match="nowhere/chips.parquet: no such file"):
        items_of(world / "nowhere" / "chips.parquet")
