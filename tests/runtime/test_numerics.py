"""Numbers of a program that has set JAX otherwise."""

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax.runtime import numerics


def draws():
    key = jax.random.fold_in(jax.random.key(3), 5)
    noise = jax.random.normal(key, (8, 8)) * jnp.arange(8)
    return np.asarray(noise), np.asarray(jnp.zeros(3) + np.arange(3))


def test_draws_and_types_are_the_same_whatever_a_program_has_set():
    plain = draws()
    with (
        jax.enable_x64(True),
        jax.default_prng_impl("rbg"),
        jax.threefry_partitionable(False),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        numerics.fixed(),
    ):
        found = draws()
    for one, other in zip(plain, found, strict=True):
        assert one.dtype == other.dtype == np.float32
        assert np.array_equal(one, other)
