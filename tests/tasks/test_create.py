"""The size of the chips' pixels: noted in a run's bundles, compared with that of the bundle that a run begins from."""

import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.data import sources
from biomass_jax.errors import DataError
from biomass_jax.tasks.create import choose
from configs import finetune_all_biomes
from tests.prediction.stubs import random_bundle
from tests.training import world


def at(side, epsg=32610):
    """Records whose pixels have that side, in metres."""
    place = np.array([side, 0, 600000, 0, -side, 4100000], np.float64)
    return lambda record: record | {"epsg": epsg, "transform": place if epsg else np.zeros(6)}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Chips whose pixels have a side -> the folder of their shards."""
    return lambda *how: world.write(tmp_path_factory.mktemp("data") / "shards", train=2, val=0, test=0, change=at(*how))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bundle that tells no pixel size: 30 m."""
    return bundle.load(random_bundle(tmp_path_factory.mktemp("model") / "bundle"))


def begun(train, loaded, **fields):
    config = world.configure(finetune_all_biomes.get_config(), **fields)
    return choose(config, train, loaded, command="")[1]


@pytest.mark.parametrize(("how", "expected"), [((20.0,), 20.0), ((27.04,), 27.0), ((20.0, 0), 30.0)])
def test_a_run_s_bundles_tell_the_pixel_size_of_its_chips(write, how, expected):
    about = begun(sources.open_source(write(*how), "train"), None)
    assert about["input"]["pixel_size"] == expected


@pytest.mark.parametrize("load", ["all", "encoder"])
@pytest.mark.parametrize("side", [10.0, 24.9, 36.1])
def test_a_run_from_a_bundle_of_another_pixel_size_is_refused(write, model, side, load):
    train = sources.open_source(write(side), "train")
    message = f"split train, chip number 0: its pixels are {side:g} x {side:g} m on the ground, but .* trained on 30 m"
    with pytest.raises(DataError, match=message):
        begun(train, model, load=load)
    model.meta["input"]["pixel_size"] = side
    try:
        assert begun(train, model, load=load)["input"]["pixel_size"] == side
    finally:
        del model.meta["input"]["pixel_size"]


@pytest.mark.parametrize("how", [(25.1,), (35.9,), (10.0, 0)])
def test_chips_of_about_that_size_or_without_a_place_pass(write, model, how):
    begun(sources.open_source(write(*how), "train"), model)


def test_each_data_set_of_a_mixture_is_looked_at(write, model):
    mixed = sources.open_mixture([(write(30.0), 1.0), (write(10.0), 1.0)], "train")
    with pytest.raises(DataError, match="chip number 2: its pixels are 10 x 10 m"):
        begun(mixed, model)
