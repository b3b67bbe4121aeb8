"""The label of the chips becomes that of the run's bundles; weights of another unit are no beginning."""

import pytest

from biomass_jax import bundle
from biomass_jax.data import labels, sources
from biomass_jax.errors import ConfigError
from biomass_jax.tasks.create import choose
from configs import finetune_all_biomes
from data_prep.shards import write as shards
from tests.prediction.stubs import random_bundle
from tests.training import world


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    splits = {"train": [world.make_record("train", index) for index in range(2)]}
    shards.write_shards(splits, folder, metadata={"label": labels.parse("rh98").metadata()})
    return sources.open_source(folder, "train")


def begun(train, loaded=None, **fields):
    return choose(world.configure(finetune_all_biomes.get_config(), **fields), train, loaded, command="")


def test_name_unit_bins_and_limit_go_into_the_bundle(train):
    task, about = begun(train, loss="beta_nll", model__spread="gaussian")
    bins = [[0, 10], [10, 20], [20, 30], [0, 30], [30, None]]
    told = {"bands": ["rh98", "rh98_sd"], "units": "m", "nodata": -1, "top": 150.0, "bins": bins}
    assert about["output"] == told and task.label == labels.parse("rh98")
    assert labels.of_output(about["output"]) == labels.parse("rh98")


def test_a_run_does_not_begin_from_a_head_of_biomass_but_from_its_encoder(train, tmp_path):
    loaded = bundle.load(random_bundle(tmp_path / "bundle"))
    assert loaded.label == labels.BIOMASS
    with pytest.raises(ConfigError, match=r"gives agbd in Mg ha-1, the labels of .* are rh98 in m; begin from its enc"):
        begun(train, loaded, load="all")
    assert begun(train, loaded, load="encoder")[1]["output"]["bands"] == ["rh98"]
    loaded.meta["output"] = {"bands": ["canopy_height"], "units": "m", "nodata": -1}  # the released model's
    assert begun(train, loaded, load="all")[1]["output"]["bands"] == ["rh98"]
