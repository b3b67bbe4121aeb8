"""Ensembles: the mixture of their members, whose own predictions are the reference."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from biomass_jax.errors import ArchitectureError
from biomass_jax.models.build import abstract_variables, architecture_of, build_module
from biomass_jax.models.ensemble import join_variables, mixture
from tests.test_bundle import random_variables

# All dimensions different; values of a forest, far from the final ReLU.
ARCHITECTURE = {
    "embed_dim": 6,
    "depths": [1, 1],
    "num_heads": [1, 3],
    "mlp_ratio": 2,
    "in_channels": 5,
    "decoder_channels": 7,
    "output_scale": 15.0,
    "output_offset": 110.0,
}
MEMBERS = 3
IMAGE = np.random.default_rng(5).standard_normal((2, 24, 37, 5), np.float32)
FACTORS = {"none": 0.0, "gaussian": 1.0, "laplace": 2.0}  # of scale squared in a variance


def own_variables(spread="none", members=MEMBERS, *, one_encoder=False):
    found = [random_variables(ARCHITECTURE | {"spread": spread}, seed) for seed in range(members)]
    if one_encoder:
        for one in found[1:]:
            one["params"]["encoder"] = found[0]["params"]["encoder"]
    return found


def ensemble_of(spread="none", *, shared, members=MEMBERS):
    fields = {"spread": spread, "members": members, "shared_encoder": shared}
    return build_module("biomass", ARCHITECTURE | fields)


def predict(module, variables, method=None):
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda v, x: module.apply(v, x, method=method))(variables, IMAGE)
    return jax.tree.map(np.asarray, found)


def by_hand(means, variances):
    """Of an equal mixture, from its first two moments about the origin, in float64."""
    means, variances = np.float64(means), np.float64(variances)
    mean = np.sum(means, 0) / len(means)
    return mean, np.sqrt(np.sum(variances + means**2, 0) / len(means) - mean**2)


@pytest.mark.parametrize("members", [2, 5])
def test_the_variance_is_that_of_the_mixtures_samples_and_formula(members):
    rng = np.random.default_rng(members)
    means, variances = rng.uniform(20, 300, (members, 4, 3)), rng.uniform(1, 900, (members, 4, 3))
    found = [np.asarray(x) for x in mixture(jnp.float32(means), jnp.float32(variances))]
    for value, expected in zip(found, by_hand(means, variances), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    which = rng.integers(members, size=200_000)
    drawn = rng.normal(means[which, 1, 2], np.sqrt(variances[which, 1, 2]))
    np.testing.assert_allclose([found[0][1, 2], found[1][1, 2]], [drawn.mean(), drawn.std()], rtol=0.01)


def test_members_that_agree_give_their_own_mean_and_nothing_else():
    means = np.float32([[0.1, 33.3, 0]] * 7)  # whose sums round
    mean, sd = mixture(jnp.asarray(means), 0.0)
    np.testing.assert_array_equal(mean, means[0])
    np.testing.assert_array_equal(sd, 0)
    one = jax.jacfwd(lambda x: mixture(x * jnp.asarray(means), 0.0)[1])(1.0)
    np.testing.assert_array_equal(one, 0)  # a root at 0 would have none


@pytest.mark.parametrize(
    ("spread", "shared"),
    [
        pytest.param("none", True, marks=pytest.mark.slow),
        ("gaussian", True),
        pytest.param("laplace", False, marks=pytest.mark.slow),
    ],
)
def test_it_predicts_the_mixture_of_what_its_members_predict(spread, shared):
    members = own_variables(spread, one_encoder=shared)
    plain = build_module("biomass", ARCHITECTURE | {"spread": spread})
    alone = np.stack([predict(plain, one) for one in members]).reshape(MEMBERS, *IMAGE.shape[:3], -1)
    assert len({*alone[:, 0, 3, 4, 0].tolist()}) == MEMBERS
    variables, module = join_variables(members, shared_encoder=shared), ensemble_of(spread, shared=shared)
    assert module.outputs == ("mean", "sd")
    found, each = predict(module, variables, lambda self, x: (self(x), self.members_of(x)))
    assert (found.shape, found.dtype) == ((*IMAGE.shape[:3], 2), np.float32)
    variances = FACTORS[spread] * np.exp(2 * np.float64(alone[..., -1])) if spread != "none" else 0 * alone[..., 0]
    mean, sd = by_hand(alone[..., 0], variances)
    np.testing.assert_allclose(found[..., 0], mean, rtol=1e-6)
    np.testing.assert_allclose(found[..., 1], sd, rtol=1e-5)  # of members that are rounded as they are compiled
    np.testing.assert_allclose(each, alone, rtol=1e-6)


def test_a_shared_encoder_gives_what_equal_ones_give_and_runs_once():
    members = own_variables("gaussian", one_encoder=True)
    calls = {}
    results = {}
    for shared in (True, False):
        module, variables = (ensemble_of("gaussian", shared=shared), join_variables(members, shared_encoder=shared))
        calls[shared] = collections.Counter()

        def count(following, arguments, keywords, context, seen=calls[shared]):
            seen[context.module.name, context.method_name] += 1
            return following(*arguments, **keywords)

        with nn.intercept_methods(count):
            results[shared] = predict(module, variables)
    np.testing.assert_array_equal(results[True], results[False])
    assert (calls[True]["encoder", "__call__"], calls[False]["encoder", "__call__"]) == (1, MEMBERS)
    assert calls[True]["decoder", "__call__"] == calls[False]["decoder", "__call__"] == MEMBERS


@pytest.mark.parametrize("shared", [True, False])
def test_variables_lie_as_the_module_draws_them(shared):
    module = ensemble_of("gaussian", shared=shared)
    drawn = jax.eval_shape(module.init, jax.random.key(0), IMAGE)
    told = abstract_variables(module)
    assert list(told["params"]) == ["encoder"] * shared + ["member_0", "member_1", "member_2"]
    assert set(told["params"]["member_1"]) == {"decoder", "head"} | ({"encoder"} if not shared else set())

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(told) == shapes(dict(drawn))
    fields = architecture_of(module)
    assert (fields["members"], fields["shared_encoder"]) == (MEMBERS, shared)
    assert build_module("biomass", fields) == module


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"members": 3, "spread": "quantiles"}, "the mean of quantiles is no quantile of the mixture"),
        ({"members": 0}, "architecture.members is 0; expected 1 or more"),
        ({"members": 2, "widths": 3}, r"unknown fields \['widths'\]; BiomassEnsemble has"),
        ({"shared_encoder": True}, r"unknown fields \['shared_encoder'\]; BiomassModel has"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused(fields, said):
    with pytest.raises(ArchitectureError, match=said):
        build_module("biomass", ARCHITECTURE | fields)


def test_it_is_not_trained():
    module = ensemble_of(shared=True)
    with pytest.raises(ArchitectureError, match="an ensemble isn't trained, .*: train its members and join them"):
        jax.eval_shape(lambda v: module.apply(v, IMAGE, train=True), abstract_variables(module))
