"""Forward-mode derivatives and vmap through the models, as users take them, against central differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.models.build import build_module
from biomass_jax.runtime import cpu
from tests.precision import float64

SMALL = {"embed_dim": 4, "depths": (1, 2), "num_heads": (1, 2), "window_size": 3, "mlp_ratio": 2.0}
TASKS = {"biomass": SMALL | {"decoder_channels": 4, "final_relu": False}, "simmim": SMALL}
pytestmark = pytest.mark.slow  # each derivative is a program of its own to compile

STEP = 1e-8  # so small that hardly a ReLU switches on the way; float64 still has eight digits then


@pytest.fixture(scope="module", params=TASKS)
def made(request):
    """Inside float64: (parameters, a scalar function of them, a random direction)."""
    with float64():
        module = build_module(request.param, TASKS[request.param])
        module = module.clone(dtype=jnp.float64)
        rng = np.random.default_rng(0)
        inputs = [rng.standard_normal((2, 32, 32, 6))]
        if request.param == "simmim":
            inputs.append((rng.random((2, 8, 8)) < 0.5).astype(np.float64))
        variables = jax.jit(module.init)(jax.random.key(0), *inputs)
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        # Fresh weights leave much at 0, where a wrong derivative may hide.
        params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
        weights = rng.standard_normal(jax.eval_shape(module.apply, variables, *inputs).shape)

        def scalar(params):
            return (module.apply({"params": params, **rest}, *inputs) * weights).mean()

        yield params, scalar, jax.tree.map(lambda p: rng.standard_normal(p.shape), params)


def moved(params, direction, amount):
    return jax.tree.map(lambda p, d: p + amount * d, params, direction)


def difference(scalar, params, direction):
    function = jax.jit(scalar)
    forth, back = (float(function(moved(params, direction, sign * STEP))) for sign in (1, -1))
    return (forth - back) / (2 * STEP)


def test_jvp(made):
    params, scalar, direction = made
    _, slope = jax.jit(lambda p, d: jax.jvp(scalar, (p,), (d,)))(params, direction)
    assert slope.dtype == np.float64
    assert abs(float(slope)) > 1e-3
    np.testing.assert_allclose(slope, difference(scalar, params, direction), rtol=1e-4)


def test_jacfwd(made):
    params, scalar, direction = made
    along = jax.jit(jax.jacfwd(lambda amounts: scalar(moved(params, direction, amounts.sum()))))
    np.testing.assert_allclose(along(jnp.zeros(2)), [difference(scalar, params, direction)] * 2, rtol=1e-4)


def test_vmap_over_parameters(made):
    params, scalar, direction = made
    stacked = jax.tree.map(lambda p, d: jnp.stack([p, p + d, p - d]), params, direction)
    one_by_one = [jax.jit(scalar)(jax.tree.map(lambda p, i=i: p[i], stacked)) for i in range(3)]
    np.testing.assert_allclose(jax.jit(jax.vmap(scalar))(stacked), one_by_one, rtol=1e-10)


def test_training_on_cpu_takes_the_same_gradients(made):
    params, scalar, _ = made
    plain = jax.jit(jax.grad(scalar))(params)
    special = jax.jit(cpu.for_training(jax.grad(scalar)), compiler_options=cpu.COMPILER_OPTIONS)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), plain, special)
