"""Whole models: exact parameter counts, settings that must change the result, any input size, bfloat16."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from biomass_jax import bundle
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.models.build import abstract_variables, dummy_inputs, in_compute_dtype
from biomass_jax.models.simmim import SimMIM
from biomass_jax.models.swin import VARIANTS, SwinEncoder, SwinTransformer

TINY = {"embed_dim": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "decoder_channels": 4}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def expected_encoder(embed_dim, depths, num_heads):
    """Parameters of a Swin encoder with four stage norms, window 7, MLP ratio 4, six bands, in plain arithmetic."""
    total = 4 * 4 * 6 * embed_dim + embed_dim + 2 * embed_dim
    for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        c = embed_dim * 2**i
        attention = 13 * 13 * heads + c * 3 * c + 3 * c + c * c + c
        mlp = c * 4 * c + 4 * c + 4 * c * c + c
        total += depth * (attention + mlp + 4 * c) + 2 * c
        if i < 3:
            total += 2 * 4 * c + 4 * c * 2 * c
    return total


def expected_decoder(embed_dim, channels):
    dims = [embed_dim * 2**i for i in range(4)]
    convs = 4 * dims[3] * channels + 9 * (dims[3] + 4 * channels) * channels
    convs += sum(dims[:3]) * channels + 3 * 9 * channels**2 + 9 * 4 * channels * channels
    return convs + 2 * channels * (4 + 1 + 3 + 3 + 1)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameter_count_of_every_variant(name):
    params = abstract_variables(BiomassModel(**VARIANTS[name]))["params"]
    assert count(params["encoder"]) == expected_encoder(**VARIANTS[name])
    assert count(params["decoder"]) == expected_decoder(VARIANTS[name]["embed_dim"], 32)
    assert count(params["head"]) == 74145


@pytest.mark.parametrize("module", [BiomassModel(**TINY | {"depths": (1, 3, 2, 1)}), SimMIM(), SwinEncoder()])
def test_abstract_variables_are_those_of_the_initialisation(module):
    whole = jax.eval_shape(lambda: module.init(jax.random.key(0), *dummy_inputs(module)))
    found = abstract_variables(module)
    assert bundle.flatten(found) == bundle.flatten({"batch_stats": {}, **whole})


def test_granite_has_exactly_the_released_parameters(golden):
    lines = (golden / "granite_swin_b_keys.txt").read_text().splitlines()
    shapes = {line.split()[0]: re.search(r"\((.*)\)", line)[1] for line in lines}
    buffers = ("relative_position_index", "running_mean", "running_var", "num_batches_tracked")
    trainable = {
        k: tuple(int(n) for n in s.split(",") if n.strip()) for k, s in shapes.items() if not k.endswith(buffers)
    }
    params = abstract_variables(BiomassModel())["params"]
    assert len(jax.tree.leaves(params)) == len(trainable) == 379
    assert count(params) == sum(math.prod(shape) for shape in trainable.values()) == 87_382_105
    assert count(params["encoder"]) == 86_751_160


@pytest.fixture(scope="module")
def tiny():
    model = BiomassModel(**TINY)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, 52, 6)).astype(np.float32)
    flat = bundle.flatten(abstract_variables(model))
    drawn = {path: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in flat.items()}
    positive = {path: np.exp(leaf) for path, leaf in drawn.items() if path.endswith(("scale", "var"))}
    variables = traverse_util.unflatten_dict(drawn | positive, sep="/")
    model = model.clone(final_relu=False)
    variables["params"]["head"]["final"]["bias"] = -np.median(run(model, variables, x), keepdims=True).reshape(1)
    return model, variables, x


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def run(model, variables, x):
    return np.asarray(compiled(model)(variables, x))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (30, 33)])
def test_any_size_gives_a_value_for_each_pixel(tiny, size):
    model, variables, x = tiny
    out = run(model, variables, x[:, : size[0], : size[1]])
    assert out.shape == (2, *size) and out.dtype == np.float32 and np.isfinite(out).all()


def test_samples_do_not_see_each_other(tiny):
    model, variables, x = tiny
    alone = run(model, variables, x[1:])
    np.testing.assert_allclose(run(model, variables, x)[1:], alone, atol=1e-5 * np.abs(alone).max())


def test_shift_of_a_single_window_is_a_setting():
    x = jax.random.normal(jax.random.key(1), (1, 28, 28, 6))  # 7 x 7 tokens: one window
    model = SwinTransformer(embed_dim=4, depths=(2,), num_heads=(2,))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    shifted, unshifted = compiled(model), compiled(model.clone(shift_single_window=False))
    assert np.abs(shifted(variables, x)[0] - unshifted(variables, x)[0]).max() > 1e-3
    wide = jnp.tile(x, (1, 2, 1, 1))  # two windows: the setting makes no difference
    np.testing.assert_array_equal(shifted(variables, wide)[0], unshifted(variables, wide)[0])


def test_output_scale_and_offset_are_applied_before_the_relu(tiny):
    model, variables, x = tiny
    raw = run(model, variables, x)
    offset = float(np.median(raw))
    scaled = run(model.clone(final_relu=True, output_scale=3.0, output_offset=offset), variables, x)
    np.testing.assert_allclose(scaled, np.maximum(3 * raw + offset, 0), rtol=1e-5, atol=1e-5)


def test_final_relu_is_a_setting(tiny):
    model, variables, x = tiny
    raw = run(model, variables, x)
    np.testing.assert_allclose(run(model.clone(final_relu=True), variables, x), np.maximum(raw, 0), rtol=1e-5)
    assert 0.2 < (raw < 0).mean() < 0.8


def test_training_draws_drop_path_and_dropout(tiny):
    model, variables, x = tiny

    @jax.jit
    def train(seed):
        drop_path, dropout = jax.random.split(jax.random.key(seed))
        rngs = {"drop_path": drop_path, "dropout": dropout}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(train(0), train(0))
    assert np.abs(train(0) - train(1)).max() > 1e-3


def test_bfloat16_is_close_and_keeps_float32_parameters(tiny):
    model, variables, x = tiny
    narrow = model.clone(dtype=jnp.bfloat16)
    exact, rough = run(model, variables, x), run(narrow, variables, x)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.1
    shapes = jax.eval_shape(lambda: narrow.init(jax.random.key(0), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def float32_leaves(variables):
    """Names of the float32 ones, and of the last two places on the way to each."""
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    return {(path[-2].key, path[-1].key) for path, leaf in flat if leaf.dtype == np.float32}


@pytest.mark.parametrize("spread", ["none", "gaussian"])
def test_weights_cast_once_give_the_numbers_of_weights_cast_in_each_call(tiny, spread):
    _, _, x = tiny
    model = BiomassModel(**TINY | {"spread": spread}, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: leaf + rng.uniform(0, 0.3, leaf.shape).astype(np.float32), model.init(jax.random.key(0), x)
    )
    cast = in_compute_dtype(variables, "bfloat16")
    run = jax.jit(model.apply)
    for once, each in zip(jax.tree.leaves(run(cast, x)), jax.tree.leaves(run(variables, x)), strict=True):
        np.testing.assert_array_equal(once, each)
    heads = {("final", "kernel"), ("final", "bias")}
    heads |= {("spread", "kernel"), ("spread", "bias")} if spread != "none" else set()
    kept = float32_leaves(cast)
    assert heads <= kept
    assert {name for place, name in kept - heads} == {"scale", "bias", "relative_position_bias_table"}
    assert not {place for place, _ in kept} & {"qkv", "proj", "fc1", "fc2", "conv", "reduction"}
    assert float32_leaves(in_compute_dtype(variables, "float32")) == float32_leaves(variables)


def test_bad_fields_and_images_are_named():
    with pytest.raises(ValueError, match="one entry a stage"):
        SwinTransformer(depths=(2, 2), num_heads=(1,)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 6)))
    with pytest.raises(ValueError, match="stage 1 has 8 channels, not divisible by 3 heads"):
        SwinTransformer(embed_dim=4, depths=(1, 1), num_heads=(1, 3)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 6)))
    with pytest.raises(ValueError, match=r"takes \[B, H, W, 6\], found an image of shape \(1, 8, 8, 5\)"):
        BiomassModel(**TINY).init(jax.random.key(0), jnp.zeros((1, 8, 8, 5)))
    with pytest.raises(ValueError, match="multiples of 32 px"):
        SimMIM(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).init(
            jax.random.key(0), jnp.zeros((1, 40, 64, 6)), jnp.zeros((1, 10, 16))
        )
