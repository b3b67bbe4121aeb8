"""A loss and the model's spread belong together; the bands that a bundle with a spread has."""

import pytest

from biomass_jax import bundle
from biomass_jax.data import sources
from biomass_jax.errors import ConfigError
from biomass_jax.tasks.create import choose
from configs import finetune_all_biomes
from tests.prediction.stubs import random_bundle
from tests.training import world


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = world.write(tmp_path_factory.mktemp("data") / "shards", train=2, val=0, test=0)
    return sources.open_source(folder, "train")


SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Bundles of each kind whose `bundle.json` alone is asked for."""
    folder = tmp_path_factory.mktemp("model")
    loaded = bundle.load(random_bundle(folder / "none", **SMALL))
    meta = loaded.meta
    architecture = meta["architecture"] | {"spread": "laplace", "spread_scale": 11.0}
    return {"none": loaded, "laplace": bundle.Bundle(folder / "laplace", meta | {"architecture": architecture}, {})}


def begun(train, loaded=None, **fields):
    config = world.configure(finetune_all_biomes.get_config(), **fields)
    if loaded is not None:
        config.model.decoder_channels = config.model.mlp_ratio = config.model.embed_dim = None
        config.model.depths = config.model.num_heads = config.model.drop_path_rate = None
    return choose(config, train, loaded, command="")


@pytest.mark.parametrize(
    ("loss", "spread", "suffixes", "nodata"),
    [
        ("rmse", None, [""], -1),
        ("gaussian_nll", "gaussian", ["", "_sd"], -1),
        ("beta_nll", "gaussian", ["", "_sd"], -1),
        ("laplace_nll", "laplace", ["", "_sd"], -1),
        ("pinball", "quantiles", ["", "_lo", "_hi"], -9999),
    ],
)
def test_bands_of_a_bundle(train, loss, spread, suffixes, nodata):
    task, about = begun(train, loss=loss, model__spread=spread)
    assert about["output"]["bands"] == [f"agbd{suffix}" for suffix in suffixes]
    assert about["output"]["nodata"] == nodata  # a quantile may be -1
    assert about["architecture"].get("spread") == spread  # of a model without one nothing is said, as ever
    assert task.module.spread_scale == 30 and task.module.quantile_levels == (0.05, 0.95)


def test_the_spread_is_that_of_the_bundle_where_none_is_given(train, models):
    task, about = begun(train, models["laplace"], loss="laplace_nll")
    assert (task.module.spread, task.module.spread_scale) == ("laplace", 11)
    assert about["output"]["bands"] == ["agbd", "agbd_sd"]
    task, _ = begun(train, models["laplace"], loss="gaussian_nll", load="encoder", model__spread="gaussian")
    assert (task.module.spread, task.module.spread_scale) == ("gaussian", 30)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (
            None,
            {"loss": "gaussian_nll"},
            "config.loss=gaussian_nll needs config.model.spread=gaussian, found config.mod",
        ),
        (
            None,
            {"loss": "pinball", "model__spread": "laplace"},
            "add --config.model.spread=quantiles, or choose another",
        ),
        (
            None,
            {"model__spread": "gaussian"},
            "config.loss=rmse doesn't train what config.model.spread=gaussian adds; set ",
        ),
        (None, {"model__spread": "gaussian"}, "--config.loss=gaussian_nll or beta_nll, or --config.model.spread=none"),
        ("laplace", {}, "config.model.spread=laplace, as .*laplace has it adds; set --config.loss=laplace_nll, or"),
        (
            "laplace",
            {"loss": "gaussian_nll"},
            "needs config.model.spread=gaussian, found config.model.spread=laplace, as",
        ),
        (
            None,
            {"spread_only": True},
            "config.spread_only with config.loss=rmse, which trains no spread; expected one of",
        ),
        (
            None,
            {"model__spread_scale": 3.0},
            "config.model.spread_scale with config.model.spread=none: nothing reads it",
        ),
        (
            None,
            {"loss": "laplace_nll", "model__spread": "laplace", "model__quantile_levels": (0.1, 0.9)},
            "config.model.quantile_levels with config.model.spread=laplace: nothing reads it; leave it out",
        ),
        (
            "none",
            {"loss": "laplace_nll", "model__spread": "laplace", "model__output_scale": 2.0, "spread_only": True},
            "config.spread_only with config.model.output_scale=2.0: .* has 1.0, and its mean has to stay",
        ),
    ],
)
def test_contradictions_are_named(train, models, kind, fields, words):
    with pytest.raises(ConfigError, match=words):
        begun(train, models.get(kind), **fields)


def test_a_spread_alone_may_be_trained_with_every_field_of_its_own(train, models):
    own = {"model__spread": "quantiles", "model__spread_scale": 5.0, "model__quantile_levels": (0.1, 0.5, 0.9)}
    task, about = begun(train, models["none"], loss="pinball", spread_only=True, **own)
    assert task.module.outputs == ("mean", "q0.1", "q0.5", "q0.9")
    assert about["output"]["bands"] == ["agbd", "agbd_lo", "agbd_hi"]
