"""Chips of heights: labels by their name, bins and limits of their own, and what is told of them on the way."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio

from biomass_jax.data import labels
from biomass_jax.errors import DataError, PrepError, RasterError
from biomass_jax.figures import style
from data_prep.chips import cells as chips
from data_prep.chips import folders, splits
from data_prep.chips import index as chip_index
from data_prep.inspect import check, preview
from data_prep.settings import ChipSettings, SplitSettings
from data_prep.shards.items import index_metadata, items_of
from data_prep.shards.write import write_shards
from tests.data_prep.chip_world import SIZE, ramp, scattered, write_tile

TILE, HEIGHT, WIDTH = "10SFF", 48, 70
RH98 = labels.parse("rh98")


def write_heights(root, tags=True, scale=0.1, **settings):
    """A tile whose labels of biomass become heights: a tenth of them, in metres."""
    shots = [(n, row, col, scale * value) for n, row, col, value in scattered(HEIGHT, WIDTH, 900, seed=4)]
    _, old, table = write_tile(root, TILE, image=ramp(HEIGHT, WIDTH), shots=shots, **settings)
    path = old.rename(old.with_name(old.name.replace("_agbd", "_rh98")))
    columns = pq.read_table(table)
    pq.write_table(columns.rename_columns([*columns.column_names[:3], "rh98"]), path.with_suffix(".parquet"))
    table.unlink()
    with rasterio.open(path, "r+") as file:
        file.set_band_description(1, "rh98")
        if tags:
            file.update_tags(LABELS=json.dumps({"label": RH98.metadata()}))
    return path, [value for *_, value in shots]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_heights(root)
    chips.index_folder(root, ChipSettings(size=SIZE, min_labels=1), label="rh98")
    settings = SplitSettings(block_km=0.5, buffer_m=0, fractions=(0.6, 0.2, 0.2))
    splits.run(chip_index.path_in(root), settings)
    return root


def test_labels_are_counted_in_the_bins_of_heights(world):
    frame = chip_index.read_index(chip_index.path_in(world))
    with rasterio.open(next(world.glob("labels/*/*_rh98.tif"))) as file:
        label = file.read(1)
    for _, row in frame.iterrows():
        values = label[row["row"] : row["row"] + SIZE, row["col"] : row["col"] + SIZE]
        expected = [
            ((values >= low) & (values < high)).sum()
            for low, high in zip(RH98.edges, (*RH98.edges[1:], 1e9), strict=True)
        ]
        assert row["label_counts"].tolist() == expected
    told = chip_index.read_metadata(chip_index.path_in(world))
    assert told["chips"]["label_edges"] == list(RH98.edges) == told["split"]["label_edges"]
    assert chip_index.label_of(chip_index.path_in(world)) == RH98


def test_shards_of_the_index_say_so_and_so_does_what_is_drawn(world, tmp_path, capsys, monkeypatch):
    index = chip_index.path_in(world)
    info = write_shards(items_of(index), tmp_path / "shards", metadata=index_metadata(index))
    assert info["label"] == RH98.metadata() | {"none": -1.0}
    assert check.main(["--shards", str(tmp_path / "shards"), "--figures", str(tmp_path)]) == 0
    assert " m, " in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(style, "save_titled", lambda path, figure, title: drawn.append(figure) or path)
    chip = chip_index.read_index(index)["chip_id"][0]
    assert preview.main(["--out", str(world), "--chip", chip]) == 0
    assert preview.main(["--out", str(world), "--tile", TILE, "--label", "rh98"]) == 0
    for figure in drawn:
        assert "rh98 (m)" in {axes.get_ylabel() for axes in figure.axes} and " m" in figure.axes[0].get_title()
    folders.write_folders(world, tmp_path / "folders")
    with rasterio.open(next((tmp_path / "folders").glob("*_labels/*.tif"))) as file:
        assert file.descriptions == ("rh98",)


def test_labels_of_another_kind_are_not_taken(tmp_path):
    write_heights(tmp_path)
    with pytest.warns(UserWarning, match="no label raster .*_agbd.tif"), pytest.raises(PrepError, match=r"\*_agbd.tif"):
        chips.index_folder(tmp_path, ChipSettings(size=SIZE))
    with pytest.raises(PrepError, match="its band is called rh98, its tag LABELS tells of agbd"):
        write_heights(tmp_path, tags=False)
        chips.index_folder(tmp_path, ChipSettings(size=SIZE), label="rh98")
    with pytest.raises(DataError, match="label is 'height'"):
        chips.index_folder(tmp_path, ChipSettings(size=SIZE), label="height")


def test_heights_above_150_m_are_refused_whatever_biomass_may_be(tmp_path):
    write_heights(tmp_path, scale=1.0)
    with pytest.raises(RasterError, match="of them above 150 m; probably centimetres"):
        chips.index_folder(tmp_path, ChipSettings(size=SIZE), label="rh98")


def test_biomass_keeps_its_bins_and_says_nothing_new(tmp_path):
    write_tile(tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=scattered(HEIGHT, WIDTH, 900, seed=4))
    chips.index_folder(tmp_path, ChipSettings(size=SIZE, min_labels=1))
    told = chip_index.read_metadata(chip_index.path_in(tmp_path))
    assert set(told) == {"chips"} and told["chips"]["label_edges"][-1] == 500
    assert np.isfinite(told["chips"]["label_max"])
