"""The moments of an optimiser's state, for tests to look at."""

import jax
import jax.numpy as jnp
import optax


def export_adam(opt_state, params):
    """(count, mu, nu) of a state of `create_optimizer`, both shaped like `params`: zeros for what is frozen."""

    def is_adam(part):
        return isinstance(part, optax.ScaleByAdamState)

    (state,) = filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam))

    def whole(moments):
        found = dict(jax.tree.leaves_with_path(moments))
        return jax.tree.map_with_path(lambda path, p: found.get(path, jnp.zeros(p.shape, p.dtype)), params)

    return state.count, whole(state.mu), whole(state.nu)
