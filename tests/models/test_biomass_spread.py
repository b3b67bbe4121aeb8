"""A model with a spread: the same mean to the bit, the spread's closed form, quantiles in their order."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from biomass_jax import bundle
from biomass_jax.models.biomass import SPREADS, BiomassModel
from biomass_jax.models.build import abstract_variables
from biomass_jax.models.layers import bilinear_matrix
from tests.prediction.stubs import random_bundle

TINY = {"embed_dim": 4, "depths": (1, 1), "num_heads": (1, 2), "mlp_ratio": 2.0, "decoder_channels": 5}
TINY |= {"output_scale": 3.0, "output_offset": 20.0}
NAMES = {
    "none": ("mean",),
    "gaussian": ("mean", "log_scale"),
    "laplace": ("mean", "log_scale"),
    "quantiles": ("mean", "q0.05", "q0.5", "q0.975"),
}
LEVELS = (0.05, 0.5, 0.975)


def model_of(spread, **fields):
    return BiomassModel(**TINY | fields, spread=spread, spread_scale=7.0, quantile_levels=LEVELS)


def draw(flat):
    rng = np.random.default_rng(0)
    values = {path: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in flat.items()}
    return values | {path: np.exp(leaf) for path, leaf in values.items() if path.endswith(("scale", "var"))}


def variables_of(drawn, spread, size=1.0):
    """Of variables with quantiles those of another spread."""
    channels = len(NAMES[spread]) - 1
    flat = {}
    for path, value in drawn.items():
        if not path.startswith("params/head/spread/"):
            flat[path] = value
        elif channels:
            flat[path] = size * value[..., :channels]
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def drawn():
    """The last layers of a model with quantiles."""
    flat = bundle.flatten(abstract_variables(model_of("quantiles")))
    return draw(
        {path: leaf for path, leaf in flat.items() if path.startswith(("params/head/final", "params/head/spr"))}
    )


@pytest.fixture(scope="module")
def features():
    """Of an image of 30 x 33 px, which is no multiple of 4."""
    return 2 * np.random.default_rng(1).standard_normal((2, 32, 36, 5)).astype(np.float32)


def estimate(spread, drawn, features, *, size=1.0, train=False, key=0, **fields):
    model, variables = model_of(spread, **fields), variables_of(drawn, spread, size)
    rngs = {"dropout": jax.random.key(key)}
    return np.asarray(model.apply(variables, features, (30, 33), train=train, method="estimate", rngs=rngs))


@pytest.fixture(scope="module")
def found(drawn, features):
    return {spread: estimate(spread, drawn, features) for spread in SPREADS}


@pytest.mark.parametrize("spread", SPREADS)
def test_outputs_are_named_and_the_mean_is_that_of_the_model_without_a_spread_to_the_bit(found, spread):
    assert model_of(spread).outputs == NAMES[spread]
    plain = found["none"]
    assert plain.shape == (2, 30, 33) and (plain > 0).mean() > 0.5
    if spread != "none":
        assert found[spread].shape == (2, 30, 33, len(NAMES[spread])) and found[spread].dtype == np.float32
        np.testing.assert_array_equal(found[spread][..., 0], plain)


@pytest.mark.slow
def test_whole_models_have_the_same_mean_to_the_bit_and_are_their_three_methods():
    drawn = draw(bundle.flatten(abstract_variables(model_of("quantiles"))))
    images = np.random.default_rng(1).standard_normal((2, 30, 33, 6)).astype(np.float32)
    outputs = {}
    for spread in ("none", "quantiles"):
        variables = variables_of(drawn, spread)
        outputs[spread] = np.asarray(jax.jit(model_of(spread).apply)(variables, images))
    np.testing.assert_array_equal(outputs["quantiles"][..., 0], outputs["none"])
    maps = jax.jit(functools.partial(model_of("quantiles").apply, method="encode"))(variables, images)
    features = jax.jit(functools.partial(model_of("quantiles").apply, method="decode"))(variables, maps)
    assert [m.shape[1:] for m in maps] == [(8, 9, 4), (4, 5, 8)] and features.shape == (2, 32, 36, 5)
    again = estimate("quantiles", drawn, features)
    np.testing.assert_allclose(again, outputs["quantiles"], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_fresh_weights_are_those_of_the_model_without_a_spread():
    image = np.zeros((1, 32, 32, 6), np.float32)
    fresh = {
        spread: bundle.flatten(jax.jit(model_of(spread).init)(jax.random.key(3), image))
        for spread in ("none", "quantiles")
    }
    new = fresh["quantiles"].keys() - fresh["none"].keys()
    assert new == {"params/head/spread/kernel", "params/head/spread/bias"}
    assert fresh["quantiles"]["params/head/spread/kernel"].shape == (1, 1, 5, 3)
    for path, value in fresh["none"].items():
        np.testing.assert_array_equal(fresh["quantiles"][path], value, err_msg=path)


def raw(drawn, features, spread):
    """The spread's convolution as a product of NumPy's, float64."""
    layer = variables_of(drawn, spread)["params"]["head"]["spread"]
    return features.astype(np.float64) @ layer["kernel"][0, 0].astype(np.float64) + layer["bias"]


def resized(x):
    rows, cols = bilinear_matrix(32, 30, False), bilinear_matrix(36, 33, False)
    return np.einsum("ih,bhwc,jw->bijc", rows.astype(np.float64), x, cols.astype(np.float64))


@pytest.mark.parametrize("spread", ["gaussian", "laplace"])
def test_the_log_scale_is_its_closed_form(drawn, features, found, spread):
    values = raw(drawn, features, spread)
    assert values.std() > 0.3
    np.testing.assert_allclose(found[spread][..., 1:], resized(np.log(7.0) + 5 * np.tanh(values / 5)), atol=1e-5)


def test_quantiles_are_their_closed_form(drawn, features, found):
    values = raw(drawn, features, "quantiles")
    first = values[..., :1] * 3.0 + 20.0
    steps = 7.0 * np.logaddexp(0, values[..., 1:])
    expected = resized(np.cumsum(np.concatenate([first, steps], axis=-1), axis=-1))
    np.testing.assert_allclose(found["quantiles"][..., 1:], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e4, 1e12])
def test_quantiles_never_cross_however_large_the_weights(drawn, features, size):
    outputs = estimate("quantiles", drawn, features, size=size)
    assert np.isfinite(outputs).all()
    assert (np.diff(outputs[..., 1:], axis=-1) >= 0).all()


def test_a_scale_never_runs_away(drawn, features):
    scale = np.exp(estimate("gaussian", drawn, features, size=1e6)[..., 1])
    assert 7 / 149 < scale.min() < 1 and 100 < scale.max() < 7 * 149


def test_dropout_samples_are_drawn_by_estimate_alone_and_the_mean_draws_what_it_always_did(drawn, features, found):
    samples = [
        estimate("gaussian", drawn, features, train=True, key=key, head_dropout=rate)
        for key, rate in ((0, 0.5), (1, 0.5), (0, 0.0))
    ]
    assert np.abs(samples[0] - samples[1]).max() > 0.1
    np.testing.assert_array_equal(samples[2], found["gaussian"])
    plain = estimate("none", drawn, features, train=True, key=0, head_dropout=0.5)
    np.testing.assert_array_equal(samples[0][..., 0], plain)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"spread": "normal"}, "spread is 'normal'; expected one of none, gaussian, laplace, quantiles"),
        ({"spread": "gaussian", "spread_scale": 0.0}, "spread_scale is 0.0; expected a number above 0"),
        ({"spread": "quantiles", "quantile_levels": (0.9, 0.1)}, r"quantile_levels are \(0.9, 0.1\); expected two or"),
        ({"spread": "quantiles", "quantile_levels": (0.5,)}, "expected two or more that increase between 0 and 1"),
        ({"spread": "quantiles", "quantile_levels": (0.0, 0.9)}, "expected two or more that increase between 0 and 1"),
    ],
)
def test_fields_that_cannot_be_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: BiomassModel(**TINY | fields).init(jax.random.key(0), np.zeros((1, 32, 32, 6))))


SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 8}


@pytest.mark.slow
def test_a_bundle_with_a_spread_opens_and_computes_what_it_did(tmp_path):
    path = random_bundle(tmp_path / "bundle", **SMALL, spread="quantiles", quantile_levels=[0.1, 0.9])
    bundle.verify(path)
    assert bundle.load(path).module().outputs == ("mean", "q0.1", "q0.9")


@pytest.mark.slow
def test_a_bundle_from_before_there_were_spreads_opens(tmp_path):
    path = random_bundle(tmp_path / "bundle", **SMALL)
    described = json.loads((path / "bundle.json").read_text())["architecture"]
    assert not {"spread", "spread_scale", "quantile_levels"} & set(described)  # as they were written then
    assert set(bundle.verify(path).values()) == {0.0}
    assert bundle.load(path).module().outputs == ("mean",)
