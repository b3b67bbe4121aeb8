"""A run that trains a spread alone: what it learns, and that nothing else moves by a bit."""

import logging

import jax
import numpy as np
import pytest
from scipy import stats

from biomass_jax import bundle
from biomass_jax.bundle import flatten
from biomass_jax.data import records
from biomass_jax.errors import BundleError, ConfigError
from biomass_jax.training import run as training
from configs import spread
from tests.prediction.stubs import random_bundle
from tests.training import world
from tests.training.runs import lines

pytestmark = pytest.mark.slow
SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 8}
SCALE = 12.0  # Mg/ha


def images_of(split, count, loaded):
    images = np.stack([world.make_record(split, index)["image"] for index in range(count)]).astype(np.float32)
    return (images - loaded.means) / loaded.stds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bundle without a spread, whose estimates are far from 0."""
    return bundle.load(random_bundle(tmp_path_factory.mktemp("model") / "bundle", **SMALL, final_relu=False))


@pytest.fixture(scope="module")
def truth(model, tmp_path_factory):
    """Shards labelled everywhere with the bundle's estimate and noise of a known sd; that of the validation chips."""
    module = model.module().clone(spread="gaussian", spread_scale=SCALE)
    rng = np.random.default_rng(5)
    counts = {"train": 96, "val": 6}
    sds, labels = {}, {}
    layer = {"kernel": rng.normal(0, 1.5, (1, 1, 8, 1)).astype(np.float32), "bias": np.float32([0])}
    variables = model.variables | {"params": model.variables["params"] | {}}
    variables["params"]["head"] = variables["params"]["head"] | {"spread": layer}
    forward = jax.jit(module.apply)
    off = 5 * np.arctanh((np.asarray(forward(variables, images_of("train", 96, model)))[..., 1] - np.log(SCALE)) / 5)
    layer["bias"] -= off.mean()
    for split, count in counts.items():
        found = np.asarray(forward(variables, images_of(split, count, model)))
        sds[split] = np.exp(found[..., 1])
        labels[split] = found[..., 0] + sds[split] * rng.standard_normal(found.shape[:3]).astype(np.float32)
        assert labels[split].min() > 0, labels[split].min()
    assert np.quantile(sds["val"], 0.95) > 2 * np.quantile(sds["val"], 0.05)

    def change(record):
        split, index = record["chip_id"].split("_")
        known = np.ones((world.SIDE, world.SIDE), bool)
        return record | {"label": labels[split][int(index)], "agbd_sigma": records.unknown_sigma(known)}

    folder = world.write(tmp_path_factory.mktemp("data") / "shards", **counts, test=0, change=change)
    return folder, sds["val"], labels["val"]


def config_of(model, shards, **fields):
    config = spread.get_config()
    given = {"init_from": str(model.path), "data.path": str(shards), "data.threads": 2, "batch_size": 4, "steps": 192}
    given |= {
        "model.spread_scale": 40.0,
        "optimizer.learning_rate": 0.1,
        "optimizer.ema_decay": 0.7,
        "log_every": 48,
        "draw_every": 8,
    }
    # Turned features aren't turned estimates, which these labels follow.
    given |= {"augment.flip": False, "augment.turn": False, "optimizer.weight_decay": 0.1}
    config.update_from_flattened_dict(given | {name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module")
def trained(model, truth, tmp_path_factory):
    """The run at its end, its fresh state, what it said."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("biomass_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    begun = training.set_up(config_of(model, truth[0]), workdir, command="")
    before = jax.tree.map(np.array, begun.state)
    assert begun.fit(stop=lambda: False)
    begun.close()
    logger.removeHandler(handler)
    logger.setLevel(level)
    return begun, before, said


def test_everything_but_the_spread_keeps_every_bit(model, trained):
    begun, before, _ = trained
    best = bundle.load(begun.workdir / "best")
    found, old = flatten(best.variables), flatten(model.variables)
    new = {"params/head/spread/kernel", "params/head/spread/bias"}
    assert found.keys() - old.keys() == new and old.keys() < found.keys()
    assert any(path.startswith("batch_stats/") for path in old)
    for variables in (found, flatten({"params": begun.state.params, "batch_stats": begun.state.batch_stats})):
        for path, value in old.items():
            np.testing.assert_array_equal(variables[path], value, err_msg=path)
    for path in new:
        fresh = flatten({"params": before.params})[path]
        assert np.abs(found[path] - fresh).max() > 1e-2
    images = images_of("val", 6, model)
    means = np.asarray(jax.jit(best.module().apply)(best.variables, images))[..., 0]
    np.testing.assert_array_equal(means, jax.jit(model.module().apply)(model.variables, images))
    assert best.meta["architecture"]["spread"] == "gaussian" and best.meta["architecture"]["spread_scale"] == 40
    assert best.meta["output"] == {"bands": ["agbd", "agbd_sd"], "units": "Mg ha-1", "nodata": -9999}
    assert best.meta["input"]["means"] == model.meta["input"]["means"]


def test_moments_are_those_of_the_spread_alone(trained):
    moments = [leaf.size for leaf in jax.tree.leaves(trained[0].state.opt_state)]
    assert sum(moments) == 2 * (8 + 1) + 1


def test_what_begins_anew_is_said(model, trained):
    count = len(flatten(model.variables))
    assert f"{model.path}: {count} of {count} arrays loaded" in trained[2]
    assert "not loaded, drawn anew: 2 arrays, of head/spread" in trained[2]


def test_the_sd_is_learnt(trained, truth, model):
    """Within 15 %; a log variance in its place would be off by the sd itself, a factor of 5 to 40 here."""
    best = bundle.load(trained[0].workdir / "best")
    found = np.asarray(jax.jit(best.module().apply)(best.variables, images_of("val", 6, model)))
    ratio = np.exp(found[..., 1]) / truth[1]
    assert np.abs(ratio - 1).mean() < 0.05 and np.quantile(np.abs(ratio - 1), 0.95) < 0.15
    z = (truth[2] - found[..., 0]) / np.exp(found[..., 1])
    assert 0.9 < z.var() < 1.1
    # Its score is the density's.
    expected = -stats.norm.logpdf(truth[2], *np.float64([found[..., 0], np.exp(found[..., 1])])).mean()
    last = [line for line in lines(trained[0].workdir) if "val/loss" in line]
    np.testing.assert_allclose(min(line["val/loss"] for line in last), expected, rtol=1e-5)
    rmse = np.sqrt(((truth[2] - found[..., 0]).astype(np.float64) ** 2).mean())
    np.testing.assert_allclose([line["val/rmse"] for line in last], rmse, rtol=1e-6)
    one_for_all = np.log(rmse) + 0.5 * np.log(2 * np.pi * np.e)
    assert expected < one_for_all - 0.02


def test_a_picture_is_of_the_mean(trained):
    begun = trained[0]
    assert (begun.workdir / "figures" / "validation.png").is_file()
    batch = {"image": np.zeros((4, 32, 32, 6), np.int16), "label": np.zeros((4, 32, 32), np.float32)}
    outputs, shown = jax.eval_shape(begun.task.evaluate, begun.state.evaluated(), batch, np.int32(0))
    assert outputs["prediction"].shape == (4, 32, 32) and outputs["spread"].shape == (4, 32, 32, 1)
    assert shown["prediction"].shape == (3, 32, 32)


@pytest.mark.long
@pytest.mark.parametrize("loss", ["laplace_nll", "pinball", "beta_nll"])
def test_each_loss_trains_its_spread_with_the_whole_model_and_scores_it(model, truth, tmp_path, loss):
    kind = {"laplace_nll": "laplace", "pinball": "quantiles", "beta_nll": "gaussian"}[loss]
    given = {"loss": loss, "spread_only": False, "model__spread": kind, "steps": 3, "optimizer__ema_decay": 0.0}
    begun = training.set_up(config_of(model, truth[0], **given), tmp_path / "run", command="")
    before = jax.tree.map(np.array, begun.state)
    assert begun.fit(stop=lambda: False)
    begun.close()
    for path, value in flatten(begun.state.params).items():
        if path.endswith("kernel"):
            assert np.abs(value - flatten(before.params)[path]).max() > 0, path
    best = bundle.load(tmp_path / "run" / "best")
    end = {"laplace": ["_sd"], "gaussian": ["_sd"], "quantiles": ["_lo", "_hi"]}[kind]
    assert best.meta["output"]["bands"] == ["agbd", *(f"agbd{suffix}" for suffix in end)]
    found = np.asarray(jax.jit(best.module().apply)(best.variables, images_of("val", 6, model)), np.float64)
    label = truth[2].astype(np.float64)
    if loss == "pinball":  # with its term of the mean
        below = [
            np.where(label >= q, t, 1 - t) * np.abs(label - q)
            for t, q in ((0.05, found[..., 1]), (0.95, found[..., 2]))
        ]
        expected = np.mean(below) + ((label - found[..., 0]) ** 2).mean() / 80
    elif loss == "laplace_nll":
        expected = -stats.laplace.logpdf(label, found[..., 0], np.exp(found[..., 1])).mean()
    else:  # without its weight
        expected = -stats.norm.logpdf(label, found[..., 0], np.exp(found[..., 1])).mean()
    chosen = min(line["val/loss"] for line in lines(tmp_path / "run") if "val/loss" in line)
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)


def test_a_spread_goes_on_from_a_bundle_that_has_one_and_is_left_out_on_request(model, trained, truth, tmp_path):
    best = bundle.load(trained[0].workdir / "best")
    given = {"model__spread": None, "model__spread_scale": None}
    begun = training.set_up(config_of(best, truth[0], **given), tmp_path / "on", command="")
    np.testing.assert_array_equal(
        begun.state.params["head"]["spread"]["kernel"], best.variables["params"]["head"]["spread"]["kernel"]
    )
    begun.close()
    given |= {"model__spread": "none", "spread_only": False, "loss": "rmse"}
    begun = training.set_up(config_of(best, truth[0], **given), tmp_path / "out", command="")
    assert begun.state.params["head"].keys() == model.variables["params"]["head"].keys()
    begun.close()
    with pytest.raises(BundleError, match=r"head/spread/bias has shape \(1,\), the model of this config \(2,\)"):
        given = {"model__spread": "quantiles", "loss": "pinball"}
        training.set_up(config_of(best, truth[0], **given), tmp_path / "other", command="")


def test_moments_of_a_bundle_without_a_spread_are_refused(model, truth, tmp_path):
    (model.path / "optimizer").mkdir(exist_ok=True)
    config = config_of(model, truth[0], spread_only=False, resume_optimizer=True)
    with pytest.raises(ConfigError, match="has no params/head/spread/bias, params/head/spread/kernel, nor moments of"):
        training.set_up(config, tmp_path / "run", command="")
    (model.path / "optimizer").rmdir()


def test_a_checkpoint_from_before_there_were_spreads_is_resumed(model, truth, tmp_path, monkeypatch):
    given = {"model__spread": None, "model__spread_scale": None, "spread_only": False, "loss": "rmse"}
    config = config_of(model, truth[0], **given)
    begun = training.set_up(config, tmp_path / "run", command="")
    assert not {"spread", "spread_scale", "quantile_levels"} & set(begun.host.inputs["model"])  # as it was then
    begun.checkpoints.save(begun.state, begun.host, loss=None)
    begun.close()
    training.set_up(config, tmp_path / "run", command="").close()
