"""The second half of a block by the kernel, interpreted, against float64 loops and plain JAX; derivatives; blocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.models.fused import mlp
from biomass_jax.models.swin import SwinBlock
from tests.models.fused.test_attention import CUDA, lowered_for_cuda, relative_error

# Shape of the map and hidden channels: rows that aren't whole programs, channels that are no power of two.
CASES = {
    "128 channels": ((3, 5, 7, 128), 192),
    "96 channels": ((2, 7, 9, 96), 64),
    "192 channels": ((1, 6, 11, 192), 128),
}


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def drawn(case, dtype=np.float32):
    """Of a case: the map, and weights whose parts differ in scale, so that none can stand for another."""
    (*_, c), hidden = shape, _ = CASES[case]
    rng = np.random.default_rng(0)
    sizes = {"scale": (c,), "shift": (c,), "kernel_in": (c, hidden), "bias_in": (hidden,)}
    sizes |= {"kernel_out": (hidden, c), "bias_out": (c,)}
    scales = {"kernel_in": 2 * c**-0.5, "kernel_out": hidden**-0.5, "bias_in": 0.5, "bias_out": 0.3}
    weights = {name: rng.standard_normal(size) * scales.get(name, 1) for name, size in sizes.items()}
    narrow = {name: jnp.asarray(value, dtype if "kernel" in name else np.float32) for name, value in weights.items()}
    return jnp.asarray(3 + 2 * rng.standard_normal(shape), dtype), mlp.MlpWeights(**narrow)


def by_numpy(x, weights):
    """x + fc2(gelu(fc1(norm(x)))) in float64, from the definitions, row by row."""
    w = {name: np.asarray(getattr(weights, name), np.float64) for name in mlp.MlpWeights.__dataclass_fields__}
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    out = np.zeros_like(rows)
    for number, row in enumerate(rows):
        normed = (row - row.mean()) / math.sqrt(row.var() + 1e-5) * w["scale"] + w["shift"]
        hidden = normed @ w["kernel_in"] + w["bias_in"]
        hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
        out[number] = row + hidden @ w["kernel_out"] + w["bias_out"]
    return out.reshape(x.shape)


@pytest.mark.parametrize("way", ["add_mlp", "plain_add_mlp"])
@pytest.mark.parametrize("case", CASES)
def test_both_ways_against_numpy(case, way):
    x, weights = drawn(case)
    expected = by_numpy(x, weights)
    assert relative_error(jax.jit(getattr(mlp, way))(x, weights), expected) < 1e-6
    assert np.abs(expected - np.asarray(x)).max() > 1  # of which the input is but a part


def test_erf_against_the_c_library():
    x = np.concatenate([np.linspace(-5, 5, 2001), 10.0 ** np.arange(-8, 8)]).astype(np.float32)
    expected = np.array([math.erf(value) for value in x.astype(float)])
    np.testing.assert_allclose(jax.jit(mlp._erf)(x), expected, rtol=4e-7, atol=0)


def test_bfloat16_is_no_further_from_the_truth_than_plain_jax():
    x, weights = drawn("96 channels", jnp.bfloat16)
    truth = by_numpy(x, weights)
    fused, plain = (jax.jit(way)(x, weights) for way in (mlp.add_mlp, mlp.plain_add_mlp))
    assert fused.dtype == jnp.bfloat16
    assert 0 < relative_error(fused, truth) <= relative_error(plain, truth)


def test_derivatives_both_ways_are_plain_jax():
    x, weights = drawn("96 channels")
    direction = jax.tree.map(
        lambda a: jnp.asarray(np.random.default_rng(1).standard_normal(a.shape, np.float32)), weights
    )
    found = []
    for way in (mlp.add_mlp, mlp.plain_add_mlp):
        slope = jax.jit(lambda w, way=way: jax.jvp(lambda w: way(x, w), (w,), (direction,))[1])(weights)
        grads = jax.jit(jax.grad(lambda x, w, way=way: (way(x, w) ** 2).sum(), (0, 1)))(x, weights)
        found.append([slope, *jax.tree.leaves(grads)])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shape": (1, 7, 7, 257)}, "the map has 257 channels, and the kernel takes up to 256"),
        ({"hidden": 96}, "the hidden layer has 96 channels, and the kernel takes multiples of 64"),
        ({"dtype": "float32"}, "the dtype is float32, and the kernel takes bfloat16"),
        ({"shape": (2**17, 14, 14, 128)}, "is 3,288,334,336 numbers, and the kernel takes 1 to 2,147,483,647"),
        ({"shape": (0, 14, 14, 128)}, "is 0 numbers"),
    ],
)
def test_what_the_kernel_does_not_take(changed, words):
    given = {"shape": (1, 14, 14, 128), "hidden": 512, "dtype": "bfloat16"}
    assert mlp.why_not(**given) == ""
    assert words in mlp.why_not(**given | changed)


def block(attention, **fields):
    return SwinBlock(2, 4, 4.0, 0.5, True, True, attention=attention, dtype=jnp.bfloat16, **fields)


def test_a_block_takes_it_in_predictions_alone():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 32)), jnp.bfloat16)
    variables = jax.jit(block("einsum").init, static_argnums=2)(jax.random.key(0), x, False)

    def text(attention, train):
        def run(variables, x):
            return block(attention).apply(variables, x, train, rngs={"drop_path": jax.random.key(1)})

        return str(jax.make_jaxpr(run)(variables, x))

    texts = {(attention, train): text(attention, train) for attention in ("einsum", "fused") for train in (False, True)}
    assert {key: "swin_mlp" in text for key, text in texts.items()} == {
        ("einsum", False): False,
        ("einsum", True): False,
        ("fused", False): True,
        ("fused", True): False,
    }
    exact = SwinBlock(2, 4, 4.0, 0.5, True, True, attention="einsum").apply(variables, x.astype(jnp.float32), False)
    errors = [relative_error(block(way).apply(variables, x, False), exact) for way in ("fused", "einsum")]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.03


def test_lowering_for_cuda_keeps_the_hidden_layer_on_the_chip():
    x, weights = jax.eval_shape(lambda: drawn("128 channels", jnp.bfloat16))
    texts = [lowered_for_cuda(way, x, weights) for way in (mlp.add_mlp, mlp.plain_add_mlp)]
    assert [text.count(CUDA) for text in texts] == [1, 0]
    assert ["3x5x7x192" in text or "105x192" in text for text in texts] == [False, True]
