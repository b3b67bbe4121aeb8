"""Blocks computed a second time in the backward pass: same names, same gradients, and it does happen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.models.swin import SwinTransformer

FIELDS = {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "mlp_ratio": 2, "drop_path_rate": 0.3}

pytestmark = pytest.mark.slow  # compiles two models


@pytest.fixture(scope="module")
def results():
    """Without and with: variables, gradients (drop path on), count of rematerialised blocks."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 32, 32, 6), (2, 8, 8, 8)))
    found = []
    for remat in ((), (0,)):
        model = SwinTransformer(**FIELDS, remat=remat)
        variables = jax.jit(lambda model=model: model.init(jax.random.key(0), x))()

        def loss(variables, model=model):
            fine, coarse = model.apply(variables, x, train=True, rngs={"drop_path": jax.random.key(1)})
            return (fine * weight).sum() + (coarse * weight[:, :4, :4].repeat(2, -1)).sum()

        with jax.default_matmul_precision("highest"):
            gradients = jax.jit(jax.grad(loss))(variables)
        names = [equation.primitive.name for equation in jax.make_jaxpr(loss)(variables).eqns]
        found.append((bundle.flatten(variables), bundle.flatten(gradients), names.count("remat2")))
    return found


def test_blocks_of_the_named_stage_are_rematerialised(results):
    assert [count for *_, count in results] == [0, FIELDS["depths"][0]]


def test_names_and_draws_stay(results):
    (plain, *_), (remat, *_) = results
    assert list(plain) == list(remat)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(remat[path], leaf, err_msg=path)


def test_gradients_are_equal(results):
    (_, plain, _), (_, remat, _) = results
    for path, leaf in plain.items():
        ours, leaf = np.asarray(remat[path]), np.asarray(leaf)
        if path.endswith("qkv/bias"):  # the keys' third is truly zero
            ours, leaf = ours.reshape(3, -1)[[0, 2]], leaf.reshape(3, -1)[[0, 2]]
        assert np.abs(ours - leaf).max() <= 1e-6 * np.abs(leaf).max() > 0, path


def test_a_stage_that_is_not_there_is_refused():
    model = SwinTransformer(depths=(1, 1), num_heads=(1, 1), remat=(0, 4, 2))
    with pytest.raises(ValueError, match=r"remat names stages \[2, 4\]; there are 2, counted from 0"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 6))))
