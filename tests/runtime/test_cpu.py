"""What exists for CPUs alone: off, everything is plain; on, weights' gradients against plain NumPy sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from biomass_jax.models.layers import Dense
from biomass_jax.runtime import cpu


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.fixture(params=[False, True], ids=["plain", "for training on CPU"])
def traced(request):
    """How a function is traced: plainly, or with the switch on."""
    return cpu.for_training if request.param else lambda function: function


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 7)])
def test_dense_layer_and_its_gradients(shape, traced):
    x, kernel, bias = draw(*shape), draw(shape[-1], 6), draw(6)
    g = draw(*shape[:-1], 6, seed=1)
    layer = Dense(6)

    def weighted(params, x):
        return (layer.apply({"params": params}, x) * g.astype(np.float32)).sum()

    params = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    close(layer.apply({"params": params}, jnp.float32(x)), x @ kernel + bias)
    of_params, of_x = jax.jit(traced(jax.grad(weighted, argnums=(0, 1))))(params, jnp.float32(x))
    rows, weights = x.reshape(-1, shape[-1]), g.reshape(-1, 6)
    close(of_params["kernel"], rows.T @ weights)
    close(of_params["bias"], weights.sum(0))
    close(of_x, g @ kernel.T)


def correlate(x, kernel):
    """The convolution of neural networks, in plain loops."""
    k = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            window = padded[:, row : row + k, column : column + k]
            out[:, row, column] = np.einsum("bijc,ijcn->bn", window, kernel)
    return out


def gradients(x, kernel, g):
    """Of sum(correlate(x, kernel) * g), by what it is linear in: one entry after the other."""
    of_kernel, of_x = np.zeros_like(kernel), np.zeros_like(x)
    for place in np.ndindex(kernel.shape):
        one = np.zeros_like(kernel)
        one[place] = 1
        of_kernel[place] = (correlate(x, one) * g).sum()
    for place in np.ndindex(x.shape):
        one = np.zeros_like(x)
        one[place] = 1
        of_x[place] = (correlate(one, kernel) * g).sum()
    return of_x, of_kernel


@pytest.mark.parametrize("k", [1, 3, 5])
def test_convolution_and_its_gradients(k, traced):
    x, kernel, g = draw(2, 4, 3, 2), draw(k, k, 2, 5), draw(2, 4, 3, 5, seed=1)
    layer = nn.Conv(5, (k, k), use_bias=False, conv_general_dilated=cpu.convolution)

    def weighted(x, kernel):
        return (layer.apply({"params": {"kernel": kernel}}, x) * g.astype(np.float32)).sum()

    close(layer.apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x)), correlate(x, kernel))
    found = jax.jit(traced(jax.grad(weighted, argnums=(0, 1))))(jnp.float32(x), jnp.float32(kernel))
    for ours, expected in zip(found, gradients(x, kernel, g), strict=True):
        close(ours, expected)


def test_the_switch_is_on_inside_alone():
    def traced(x):
        layer = Dense(3)
        return layer.apply({"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}, cpu.computed_once(x))

    inside = str(jax.make_jaxpr(cpu.for_training(traced))(jnp.ones((4, 2))))
    outside = str(jax.make_jaxpr(traced)(jnp.ones((4, 2))))
    assert "custom_vjp" in inside and "optimization_barrier" in inside
    assert "custom_vjp" not in outside and "optimization_barrier" not in outside


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"padding": "VALID"},
        {"kernel_size": (2, 2)},
        {"kernel_size": (3, 5)},
        {"kernel_dilation": 2},
        {"feature_group_count": 2},
    ],
)
def test_convolutions_of_another_kind_are_plain(options):
    fields = {"features": 4, "kernel_size": (3, 3), "conv_general_dilated": cpu.convolution, **options}
    layer, x = nn.Conv(**fields), jnp.float32(draw(1, 6, 6, 2))
    params = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(cpu.for_training(layer.apply))(params, x))
    assert "custom_vjp" not in text and "conv_general_dilated" in text


def test_the_precision_of_the_forward_pass_holds_for_the_backward_pass():
    def weighted(kernel):
        with jax.default_matmul_precision("highest"):
            return Dense(3).apply({"params": {"kernel": kernel, "bias": jnp.zeros(3)}}, jnp.ones((4, 2))).sum()

    text = str(jax.make_jaxpr(cpu.for_training(jax.grad(weighted)))(jnp.ones((2, 3))))
    assert text.count("dot_general[") == len(re.findall(r"precision=\((?:Precision\.)?HIGHEST, ", text)) == 3
