"""Canopy height from imitated GEDI L2A files to a map in metres: the forest world's shots, by a user's commands."""

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio

from biomass_jax import bundle as bundles
from biomass_jax import main as runner
from biomass_jax.data.raster.inputs import find_inputs
from biomass_jax.data.shards import read_metadata
from biomass_jax.data.sources import open_source
from biomass_jax.errors import RasterError
from configs import evaluate as evaluate_config
from configs import finetune_all_biomes
from configs import predict as predict_config
from data_prep.prepare import run as prepare
from data_prep.synthetic.forest.land import Forest
from data_prep.synthetic.forest.world import write_forest_world
from data_prep.synthetic.height_file import height_of
from data_prep.synthetic.world import LEFT, TOP
from tests.training import world

pytestmark = pytest.mark.slow
SHAPE, SIDE = (340, 350), 64  # pixels of the tile; of a chip
STEM = "10SFF_2020-05-01_2020-10-01"


def mode(config, workdir, monkeypatch, **fields):
    """Run a config as `main` does."""
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    workdir.mkdir(parents=True)
    runner.MODES[config.mode](config, workdir)
    return workdir


@pytest.fixture(scope="module", params=[2, 3])
def prepared(request, tmp_path_factory):
    """Shards of heights, of files of each version."""
    out = tmp_path_factory.mktemp(f"heights{request.param}")
    write_forest_world(out, shape=SHAPE, seed=3, heights=request.param)
    changes = {
        **{"season": "2020-05-01/2020-10-01", "granules.gedi": out / "granules" / "gedi_l2a", "labels.label": "rh98"},
        **{"composite.min_clear": 1, "chips.size": SIDE, "splits.block_km": 2, "splits.buffer_m": 0},
        "splits.fractions": "(0.6,0.2,0.2)",
    }
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    assert prepare.main(["--config", "prepare", "--out", str(out), *given]) == 0
    return out


def test_labels_are_the_heights_of_the_shots_at_their_pixels(prepared):
    """Each label against the forest's truth, of which it is a monotone function, and against the table of its shots."""
    with rasterio.open(prepared / "labels" / "10SFF" / f"{STEM}_rh98.tif") as file:
        assert (file.count, file.descriptions, file.units, file.nodata) == (1, ("rh98",), ("m",), -1)
        label = file.read(1)
    shots = pq.read_table(prepared / "labels" / "10SFF" / f"{STEM}_rh98.parquet")
    assert shots.column_names == ["shot_number", "row", "col", "rh98"]
    row, col, height = (shots[name].to_numpy() for name in ("row", "col", "rh98"))
    for pixel in set(zip(row.tolist(), col.tolist(), strict=True)):
        mine = (row == pixel[0]) & (col == pixel[1])
        assert label[pixel] == pytest.approx(height[mine].mean(), rel=1e-6)
    assert (label >= 0).sum() == len(set(zip(row.tolist(), col.tolist(), strict=True)))
    truth = height_of(Forest(3).pixel_biomass(LEFT, TOP, SHAPE))
    known = label >= 0
    assert np.corrcoef(label[known], truth[known])[0, 1] > 0.95
    assert np.abs(label[known] - truth[known]).mean() < 1.0  # metres


def test_shards_say_what_their_labels_are(prepared):
    told = read_metadata(prepared / "shards")
    bins = [[0, 10], [10, 20], [20, 30], [0, 30], [30, None]]
    assert told["label"] == {"name": "rh98", "units": "m", "none": -1, "top": 150.0, "bins": bins}
    assert told["gedi"]["product"] == "GEDI_L2A" and "l4_quality_flag" not in told["gedi"]["filters"]
    record = open_source(prepared / "shards", "train")[0]
    assert (record["agbd_sigma"] == -1).all() and 3 < record["label"].max() < 80


@pytest.mark.parametrize("prepared", [3], indirect=True)
def test_from_shards_to_scores_and_a_map_in_metres(prepared, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    shards = prepared / "shards"
    config = world.configure(finetune_all_biomes.get_config().unlock(), data__path=str(shards), epochs=2)
    tuned = mode(config, tmp_path / "run", monkeypatch, model__output_scale=8.0, model__output_offset=22.0)
    meta = json.loads((tuned / "best" / "bundle.json").read_text())
    assert (meta["output"]["bands"], meta["output"]["units"], meta["output"]["top"]) == (["rh98"], "m", 150.0)

    scored = mode(
        evaluate_config.get_config().unlock(),
        tmp_path / "scores",
        monkeypatch,
        **{"bundle": str(tuned / "best"), "data.path": str(shards), "block_km": 2.0, "figures.count": 1},
    )
    found = json.loads((scored / "metrics.json").read_text())
    assert found["label"] == {"name": "rh98", "units": "m"}
    groups = [row["group"] for row in found["tables"] if row["table"] == "label_bin"]
    assert groups == ["0-10", "10-20", "20-30", "0-30", "30-inf"]
    assert (scored / "binwise_rmse.csv").read_text().startswith("experiment_name,0-10,10-20,20-30,0-30,30-inf\n")
    assert 0 < found["rmse"] < 20  # metres; of Mg/ha it would be ten times as much
    assert "(m):" in caplog.text and "Mg/ha" not in caplog.text

    image = prepared / "composites" / "10SFF" / f"{STEM}.tif"
    fields = {"bundle": str(tuned / "best"), "inputs": str(image), "quicklook": True, "style": True, "stac": True}
    maps = mode(predict_config.get_config().unlock(), tmp_path / "maps", monkeypatch, **fields)
    with rasterio.open(maps / f"{STEM}_rh98.tif") as file, rasterio.open(image) as source:
        assert (file.descriptions, file.units, file.nodata) == (("rh98",), ("m",), -1)
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        values = file.read(1)
    assert 5 < values[values >= 0].mean() < 60
    style = (maps / f"{STEM}_rh98.qml").read_text()
    assert ' m"' in style and "Mg/ha" not in style
    assert "Relative height" in (maps / f"{STEM}_rh98_colours.txt").read_text()
    assert "Mg" not in (maps / f"{STEM}_rh98.json").read_text()
    model = bundles.load(tuned / "best")
    assert model.label.title == "Relative height, 98 % of the energy below" and model.label.bins[0] == (0, 10)
    with pytest.raises(RasterError, match="no images in this folder"):  # a map is no input of the next prediction
        find_inputs(maps)
