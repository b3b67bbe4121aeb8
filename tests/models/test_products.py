"""Products whose weights' gradients are computed another way on CPU, against plain NumPy sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from biomass_jax.models import products
from biomass_jax.models.layers import Dense


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 7)])
def test_dense_layer_and_its_gradients(shape):
    x, kernel, bias = draw(*shape), draw(shape[-1], 6), draw(6)
    g = draw(*shape[:-1], 6, seed=1)
    layer = Dense(6)

    def weighted(params, x):
        return (layer.apply({"params": params}, x) * g.astype(np.float32)).sum()

    params = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    close(layer.apply({"params": params}, jnp.float32(x)), x @ kernel + bias)
    of_params, of_x = jax.jit(jax.grad(weighted, argnums=(0, 1)))(params, jnp.float32(x))
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
def test_convolution_and_its_gradients(k):
    x, kernel, g = draw(2, 4, 3, 2), draw(k, k, 2, 5), draw(2, 4, 3, 5, seed=1)
    layer = nn.Conv(5, (k, k), use_bias=False, conv_general_dilated=products.convolution)

    def weighted(x, kernel):
        return (layer.apply({"params": {"kernel": kernel}}, x) * g.astype(np.float32)).sum()

    close(layer.apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x)), correlate(x, kernel))
    found = jax.jit(jax.grad(weighted, argnums=(0, 1)))(jnp.float32(x), jnp.float32(kernel))
    for ours, expected in zip(found, gradients(x, kernel, g), strict=True):
        close(ours, expected)


def test_the_way_for_other_devices_gives_the_same(monkeypatch):
    """On CPU it is not taken; it is the one that a GPU gets."""
    x, kernel, g = jnp.float32(draw(2, 6, 5, 3)), jnp.float32(draw(3, 3, 3, 4)), jnp.float32(draw(2, 6, 5, 4))
    here = products._convolution_backward("highest", (x, kernel), g)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **_: default(*arrays))
    elsewhere = products._convolution_backward("highest", (x, kernel), g)
    for ours, theirs in zip(here, elsewhere, strict=True):
        close(ours, np.asarray(theirs))


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"padding": "VALID"},
        {"kernel_size": (2, 2)},
        {"kernel_size": (3, 5)},
        {"kernel_dilation": 2},
        {"input_dilation": 2},
        {"feature_group_count": 2},
    ],
)
def test_convolutions_of_another_kind_are_refused(options):
    fields = {"features": 4, "kernel_size": (3, 3), "conv_general_dilated": products.convolution, **options}
    with pytest.raises(ValueError, match="expected a square kernel of odd size and 'SAME', all else 1"):
        nn.Conv(**fields).init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))


def test_the_precision_of_the_forward_pass_holds_for_the_backward_pass():
    def weighted(kernel):
        with jax.default_matmul_precision("highest"):
            return Dense(3).apply({"params": {"kernel": kernel, "bias": jnp.zeros(3)}}, jnp.ones((4, 2))).sum()

    text = str(jax.make_jaxpr(jax.grad(weighted))(jnp.ones((2, 3))))
    assert text.count("dot_general[") == len(re.findall(r"precision=\((?:Precision\.)?HIGHEST, ", text)) == 3
