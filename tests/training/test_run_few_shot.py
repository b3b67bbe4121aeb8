"""The reference's few-shot run: its all-biome checkpoint continues, moments, learning rate and plateau with it."""

import json
import math

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.bundle import flatten
from biomass_jax.convert import __main__ as convert
from biomass_jax.convert import torch_file
from biomass_jax.errors import ConfigError
from biomass_jax.training import run as training
from configs import few_shot_taiga
from tests.training import world
from tests.training.moments import export_adam

NORM_OR_BIAS = ("scale", "bias", "relative_position_bias_table")
# Their true gradient is 0: a softmax is blind to what is added to all its keys, the batch's mean takes the rest.
NO_GRADIENT = ("stages_0/norm/bias", "stages_1/norm/bias", "stages_2/norm/bias")

pytestmark = pytest.mark.long  # whole runs: each compiles its own step


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    """The reference's full Lightning file as a bundle."""
    folder = tmp_path_factory.mktemp("model") / "bundle"
    source = golden / "ckpt_micro_cli" / "lightning.ckpt"
    arguments = ["--input", source, "--statistics", "granite", "--with-optimizer", "--output", folder]
    assert convert.main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards", train=8, val=2, test=0)


def config_of(model, shards, **fields):
    config = few_shot_taiga.get_config()
    given = {"data.path": str(shards), "data.threads": 2, "batch_size": 4, "init_from": str(model)} | fields
    config.update_from_flattened_dict(given)
    return config


@pytest.fixture(scope="module")
def begun(model, shards, tmp_path_factory):
    """The run before its first step, and its state then, which the step gives away."""
    return begin(config_of(model, shards), tmp_path_factory.mktemp("few_shot"))


def begin(config, workdir):
    run = training.set_up(config, workdir, command="")
    run.close()
    return run, jax.tree.map(np.asarray, run.state)


def test_it_starts_with_the_checkpoints_weights_moments_and_learning_rate(begun, model):
    _, before = begun
    loaded = bundle.load(model)
    stored = bundle.load_optimizer(loaded)
    count, mu, nu = export_adam(before.opt_state, before.params)
    assert (count, before.step) == (6, 0)
    trees = {"mu": (mu, stored["mu"]), "nu": (nu, stored["nu"]), "params": (before.params, loaded.variables["params"])}
    for name, (found, expected) in trees.items():
        found, expected = flatten(found), flatten(expected)
        assert found.keys() == expected.keys() and len(found) == 171
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value, err_msg=f"{name}/{path}")
    assert before.learning_rate == np.float32(3.1406904191973693e-4)


def test_the_owed_step_of_the_plateau_is_made(begun, golden):
    run, _ = begun
    root = torch_file.read(golden / "ckpt_micro_cli" / "lightning.ckpt").root
    scheduler = root["lr_schedulers"][0]
    # The callback that wrote the file; the one for the weights alone comes after it.
    (writer,) = (c for name, c in root["callbacks"].items() if "'save_weights_only': False" in name)
    owed = float(writer["current_score"].array())
    assert owed < scheduler["best"] * (1 - 1e-4)  # a better epoch that the scheduler has not seen
    found = run.host.plateau
    assert (scheduler["num_bad_epochs"], found["num_bad_epochs"]) == (1, 0)
    assert (found["last_epoch"], found["best"]) == (scheduler["last_epoch"] + 1, owed)
    assert math.isclose(found["lr"], 3.1406904191973693e-4, rel_tol=1e-7)  # a bundle's numbers are float32


def test_statistics_are_those_of_its_own_chips(begun, shards, model):
    run, _ = begun
    metadata = json.loads(json.loads((shards / "metadata.json").read_text())["biomass_jax"])
    found = run.about["input"]
    assert (found["means"], found["stds"]) == (metadata["means"], metadata["stds"])
    assert found["means"] != bundle.read_meta(model)["input"]["means"]
    assert run.task.statistics.means.tolist() == metadata["means"]


def by_hand(run, before, batch, *, decayed):
    """Loss, and weights after AdamW's seventh step (Loshchilov and Hutter, arXiv 1711.05101) in float64."""
    task, seed = run.task, few_shot_taiga.get_config().seed
    inputs_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))

    def loss(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        total, count, _ = task.loss_sums(variables, task.inputs(batch, inputs_key), jax.random.fold_in(model_key, 0))
        return task.finish(total, count)

    value, gradient = jax.jit(jax.value_and_grad(loss))(before.params)
    _, mu, nu = export_adam(before.opt_state, before.params)
    trees = (flatten(tree) for tree in (before.params, gradient, mu, nu))
    params, gradient, mu, nu = ({k: np.asarray(v, np.float64) for k, v in tree.items()} for tree in trees)
    expected, rate, decay = {}, 3.1406904191973693e-4, 0.03283253068408954
    for path, weight in params.items():
        first = (0.9 * mu[path] + 0.1 * gradient[path]) / (1 - 0.9**7)
        second = (0.999 * nu[path] + 0.001 * gradient[path] ** 2) / (1 - 0.999**7)
        kept = weight * (1 - rate * decay * decayed(path))
        expected[path] = kept - rate * first / (np.sqrt(second) + 1e-8)
    return float(value), expected


def assert_step(begun, decayed):
    run, before = begun
    batch = next(run.feed.batches(start=0)).arrays
    after, metrics = run.steps.train(run.state, batch)
    loss, expected = by_hand(run, before, batch, decayed=decayed)
    assert math.isclose(metrics["loss"], loss, rel_tol=1e-6) and loss > 1
    found, old = flatten(after.params), flatten(before.params)
    assert found.keys() == expected.keys()
    moved = 0
    for path, value in expected.items():
        if path.endswith(NO_GRADIENT):
            continue
        if path.endswith("qkv/bias"):  # the middle third belongs to the keys
            found[path], value, old[path] = (np.split(x, 3)[::2] for x in (found[path], value, old[path]))
        np.testing.assert_allclose(found[path], value, rtol=1e-6, atol=1e-6, err_msg=path)
        moved += np.abs(np.subtract(found[path], old[path])).max() > 1e-4
    assert moved > 100
    assert (after.step, export_adam(after.opt_state, after.params)[0]) == (1, 7)


@pytest.mark.long
def test_the_first_update_is_adamws_seventh_from_those_moments(begun):
    assert_step(begun, lambda path: not path.endswith(NORM_OR_BIAS))


@pytest.mark.long
def test_the_references_first_update_decays_every_parameter(model, shards, tmp_path):
    assert_step(begin(config_of(model, shards, reference=True), tmp_path), lambda path: True)


def test_a_bundle_without_moments_is_told_what_to_do(golden, shards, tmp_path, capsys):
    source = str(golden / "ckpt_micro_cli" / "state_dict.ckpt")
    arguments = ["--input", source, "--statistics", "granite", "--output", str(tmp_path / "bundle")]
    assert convert.main([*arguments, "--with-optimizer"]) == 1
    assert "state_dict.ckpt has no optimiser's state, which --with-optimizer asks for" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(SystemExit):
        convert.main([*arguments, "--with-optimizer", "--no-optimizer"])
    assert convert.main(arguments) == 0
    with pytest.raises(ConfigError, match="holds no optimizer/; convert the full Lightning file"):
        training.check_start(None, bundle.load(tmp_path / "bundle"), config_of(tmp_path / "bundle", shards))
