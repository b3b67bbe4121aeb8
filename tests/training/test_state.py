"""What a state holds after a bundle's weights were put into it, and which of its weights are scored."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from biomass_jax.errors import BundleError
from biomass_jax.runtime import mesh as sharding
from biomass_jax.training.state import create_train_state, load_weights, plan_train_state


class Task:
    """Two arrays of an encoder and a head, and one batch statistic; fresh ones are all 1."""

    def init(self, key):
        ones = jnp.ones
        params = {"encoder": {"kernel": ones((2, 3))}, "head": {"kernel": ones((3, 5))}}
        return {"params": params, "batch_stats": {"encoder": {"mean": ones((3,))}}}


def fresh(*, ema):
    mesh = sharding.create_mesh(jax.devices()[:1])
    return create_train_state(*plan_train_state(Task(), optax.identity(), mesh, seed=0, ema=ema))


def bundle(**head):
    params = {"encoder": {"kernel": np.full((2, 3), 7.0)}, "head": {"kernel": np.full((3, 5), 8.0)} | head}
    return SimpleNamespace(
        path="bundle", variables={"params": params, "batch_stats": {"encoder": {"mean": np.full(3, 9.0)}}}
    )


def values(tree):
    return [float(np.unique(leaf).item()) for leaf in jax.tree.leaves(tree)]


def test_averages_start_from_the_loaded_weights():
    state = load_weights(fresh(ema=True), bundle(), load="all")
    assert values({"params": state.params, "batch_stats": state.batch_stats}) == [9, 7, 8]
    assert values(state.ema) == [9, 7, 8]


def test_of_an_encoder_alone_the_averages_are_too():
    state = load_weights(fresh(ema=True), bundle(), load="encoder")
    assert values(state.params) == [7, 1]
    assert values(state.ema["params"]) == [7, 1]


def test_without_averages_there_are_none():
    assert load_weights(fresh(ema=False), bundle(), load="all").ema is None


def test_averages_are_what_is_scored():
    state = fresh(ema=True)
    state = state.replace(ema=jax.tree.map(lambda x: x + 3, state.ema))
    assert values(state.evaluated()["params"]) == [4, 4]
    assert values(fresh(ema=False).evaluated()["params"]) == [1, 1]


def test_a_spread_begins_anew_where_the_bundle_has_none_and_nothing_else_may_be_missing():
    class WithSpread(Task):
        def init(self, key):
            found = super().init(key)
            found["params"]["head"]["spread"] = {"kernel": jnp.ones((3, 2))}
            return found

    mesh = sharding.create_mesh(jax.devices()[:1])
    empty = create_train_state(*plan_train_state(WithSpread(), optax.identity(), mesh, seed=0))
    state = load_weights(empty, bundle(), load="all")
    assert values(state.params) == [7, 8, 1]
    state = load_weights(empty, bundle(spread={"kernel": np.full((3, 2), 5.0)}), load="all")
    assert values(state.params) == [7, 8, 5]
    lacking = bundle()
    del lacking.variables["params"]["head"]["kernel"]
    with pytest.raises(BundleError, match="bundle: no params/head/kernel; config.load is 'all'"):
        load_weights(empty, lacking, load="all")


def test_another_shape_is_refused():
    with pytest.raises(BundleError, match=r"head/kernel has shape \(4,\)"):
        load_weights(fresh(ema=False), bundle(kernel=np.ones(4)), load="all")
