"""What the labels of a source are: told by shards, by the files of folders or by the user; one label a model."""

import numpy as np
import pytest
import rasterio

from biomass_jax.data import labels, sources
from biomass_jax.data.shards import label_of, read_metadata
from biomass_jax.errors import DataError
from data_prep.shards import geotiff
from data_prep.shards import write as shards
from tests.training import world

HEIGHT = labels.parse("rh98")


def written(folder, metadata=None):
    splits = {"train": [world.make_record("train", index) for index in range(3)]}
    shards.write_shards(splits, folder, metadata=metadata)
    return folder


@pytest.fixture
def chips(write, numbers, tmp_path):
    """A folder of GeoTIFFs with a label of 12.5 each: `chips(description)` of the labels' band, `tall` the highest."""

    def one(called=None, tall=12.5):
        write(tmp_path / "train_images" / "T10SFF_1_tile_img.tif", numbers((10, 8, 8), dtype="int16"), nodata=-9999)
        label = np.full((1, 8, 8), -1, np.float32)
        label[0, 3, 5] = tall
        path = tmp_path / "train_labels" / "T10SFF_1_tile_label.tif"
        write(path, label)
        if called is not None:
            with rasterio.open(path, "r+") as file:
                file.set_band_description(1, called)
        return tmp_path

    return one


def test_shards_tell_their_label_and_biomass_is_written_as_ever(tmp_path):
    plain = written(tmp_path / "plain")
    assert read_metadata(plain)["label"] == {"name": "agbd", "units": "Mg ha-1", "none": -1.0}
    tall = written(tmp_path / "tall", {"label": HEIGHT.metadata()})
    assert (label_of(plain), label_of(tall)) == (labels.BIOMASS, HEIGHT)
    assert sources.open_source(tall, "train", label="rh98").info.label == HEIGHT
    with pytest.raises(DataError, match="label is 'agbd', but its records hold rh98; leave it out"):
        sources.open_source(tall, "train", label="agbd")
    with pytest.raises(DataError, match="the label rh98 is in 'Mg ha-1'; expected m"):
        written(tmp_path / "odd", {"label": {"name": "rh98", "units": "Mg ha-1"}})


def test_a_mixture_of_labels_can_be_looked_at_and_not_learnt_from(tmp_path):
    plain, tall = written(tmp_path / "plain"), written(tmp_path / "tall", {"label": HEIGHT.metadata()})
    both = sources.open_mixture([(plain, 1), (tall, 1)], "train")  # pretraining leaves labels alone
    assert len(both) == 6
    with pytest.raises(DataError, match="chips with labels agbd and rh98; a model learns one label"):
        assert both.info.label
    assert sources.open_mixture([(tall, 1), (tall, 1)], "train").info.label == HEIGHT


@pytest.mark.parametrize(
    ("called", "label", "expected"),
    [(None, None, "agbd"), ("Band 1", None, "agbd"), ("rh98", None, "rh98"), (None, "canopy_height", "canopy_height")],
)
def test_folders_tell_by_their_files_or_are_told(chips, called, label, expected):
    source = sources.open_source(chips(called), "train", label=label)
    assert source.info.label.name == expected
    assert source.info.metadata == ({} if expected == "agbd" else {"label": labels.parse(expected).metadata()})
    assert source[0]["label"].max() == 12.5


def test_a_height_of_150_m_and_more_is_none(chips):
    folder = chips(tall=1250.0)  # centimetres, or biomass
    assert sources.open_source(folder, "train")[0]["label"].max() == 1250
    with pytest.raises(DataError, match="labels up to 1250, 1 of them above 150 m; probably centimetres"):
        sources.open_source(folder, "train", label="canopy_height")[0]
    with pytest.raises(DataError, match="label is 'height'; expected agbd, canopy_height"):
        sources.open_source(folder, "train", label="height")


def test_folders_become_shards_with_their_label(chips, tmp_path, capsys):
    folder = chips("rh95")
    assert geotiff.main([str(folder), "--out", str(tmp_path / "a"), "--verify"]) == 0
    assert geotiff.main([str(folder), "--out", str(tmp_path / "b"), "--label", "canopy_height"]) == 0
    assert "1 chips equal their files" in capsys.readouterr().out
    assert (label_of(tmp_path / "a").name, label_of(tmp_path / "b").name) == ("rh95", "canopy_height")
