"""Fresh weights: distributions against the closed form, draws that differ and do not depend on devices."""

import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.models import initialisation
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.models.build import architecture_of, build_module, dummy_inputs
from biomass_jax.models.simmim import SimMIM
from biomass_jax.models.swin import SwinEncoder

# Every dimension different, so that no fan-in can be taken for another.
ENCODER = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "mlp_ratio": 3, "in_channels": 5}
# Inputs of some layers, by hand: bands x patch area; C; MLP ratio x C; 4 C; sums of channels x kernel area; ...
FAN_IN = {
    "encoder/patch_embed/projection": 5 * 16,
    "encoder/stages_0/blocks_0/attn/qkv": 12,
    "encoder/stages_1/blocks_0/attn/proj": 24,
    "encoder/stages_2/blocks_1/mlp/fc1": 48,
    "encoder/stages_2/blocks_1/mlp/fc2": 144,
    "encoder/stages_1/downsample/reduction": 96,
    "decoder/psp_modules_3/conv": 96,
    "decoder/bottleneck/conv": (96 + 4 * 7) * 9,
    "decoder/lateral_convs_2/conv": 48,
    "decoder/fpn_bottleneck/conv": 4 * 7 * 9,
    "head/upscale_1/conv": 7 * 9,
    "head/final": 7,
}

pytestmark = pytest.mark.slow  # compiles the drawing of several models


def fresh(module, seed=0):
    variables = jax.jit(lambda key: module.init(key, *dummy_inputs(module)))(jax.random.key(seed))
    return {path: np.asarray(leaf) for path, leaf in bundle.flatten(variables).items()}


@pytest.fixture(scope="module")
def granite():
    return fresh(BiomassModel(**ENCODER, decoder_channels=7))


@pytest.fixture(scope="module")
def simmim():
    return fresh(SimMIM(**ENCODER))


def fan_in(path, variables):
    """Numbers that feed one output, from the kernel's shape: all but its last axis."""
    return math.prod(variables[path.rsplit("/", 1)[0] + "/kernel"].shape[:-1])


def drawn_with_kernels(variables):
    """Kernels, and biases that stand beside one."""
    beside = {path.removesuffix("kernel") + "bias" for path in variables if path.endswith("/kernel")}
    return {path: leaf for path, leaf in variables.items() if path.endswith("/kernel") or path in beside}


def assert_uniform(values, bound):
    """Six standard errors of mean and deviation; the largest of n values misses the bound by about 1 / n of it."""
    n = values.size
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > bound * (1 - 20 / n)
    assert abs(values.mean()) < 6 * bound / math.sqrt(3 * n)
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 6 * math.sqrt(0.2 / n)


def assert_normal(values, std):
    n = values.size
    assert abs(values.mean()) < 6 * std / math.sqrt(n)
    assert abs(values.std() / std - 1) < 6 * math.sqrt(0.5 / n)


def test_fan_in_by_hand(granite):
    assert {path: fan_in(f"params/{path}/kernel", granite) for path in FAN_IN} == FAN_IN


def test_granite_draws_as_torch_does(granite):
    drawn = drawn_with_kernels(granite)
    assert len(drawn) == 1 + 5 * 4 + 3 + 12 + 3 + (1 + 5 * 4 + 3)  # kernels, then biases of all but 3 + 12 of them
    for path, leaf in drawn.items():
        if path.endswith("kernel"):
            assert_uniform(leaf, fan_in(path, granite) ** -0.5)
    biases = {path: leaf * fan_in(path, granite) ** 0.5 for path, leaf in drawn.items() if path.endswith("bias")}
    assert_uniform(np.concatenate([leaf.ravel() for leaf in biases.values()]), 1 + 1e-6)
    assert all(np.abs(leaf).max() <= 1 + 1e-6 for leaf in biases.values())


def test_norms_and_tables_of_granite_start_still(granite):
    rest = {path: leaf for path, leaf in granite.items() if path not in drawn_with_kernels(granite)}
    ones = {path for path in rest if path.endswith(("/scale", "/var"))}
    zeros = {path for path in rest if path.endswith(("/bias", "/mean", "/relative_position_bias_table"))}
    assert ones | zeros == set(rest)
    assert all((rest[path] == 1).all() for path in ones) and all((rest[path] == 0).all() for path in zeros)


def test_simmim_draws_as_the_official_code_does(simmim):
    kernels = {path: leaf for path, leaf in drawn_with_kernels(simmim).items() if leaf.ndim == 2}
    tables = {path: leaf for path, leaf in simmim.items() if path.endswith("relative_position_bias_table")}
    assert (len(kernels), len(tables)) == (5 * 4 + 3, 5)
    for leaf in [*kernels.values(), *tables.values()]:
        assert_normal(leaf, 0.02)
    # Not cut at two deviations: of 100,000 normal values 4,550 lie beyond.
    everything = np.concatenate([leaf.ravel() for leaf in kernels.values()])
    assert (np.abs(everything) > 0.04).mean() == pytest.approx(0.0455, rel=0.1)
    assert_normal(simmim["params/mask_token"], 0.02)
    assert np.ptp(simmim["params/mask_token"]) > 0
    for path in kernels:
        bias = simmim.get(path.removesuffix("kernel") + "bias")
        assert bias is None or (bias == 0).all()
    for path in ("params/encoder/patch_embed/projection/kernel", "params/decoder/kernel", "params/decoder/bias"):
        assert_uniform(simmim[path], fan_in(path, simmim) ** -0.5)
    assert fan_in("params/decoder/kernel", simmim) == 96


@pytest.mark.parametrize("name", ["granite", "simmim"])
def test_each_layer_draws_its_own(name, request):
    variables = request.getfixturevalue(name)
    random = {path: leaf for path, leaf in drawn_with_kernels(variables).items() if leaf.size > 4 and leaf.any()}
    starts = {tuple((leaf.ravel()[:4] / np.abs(leaf.ravel()[0])).round(4)) for leaf in random.values()}
    assert len(starts) == len(random) > 20


def test_the_key_decides():
    draw = jax.jit(lambda key: small("torch").init(key, small_input()))
    first, again, other = (bundle.flatten(draw(jax.random.key(seed))) for seed in (0, 0, 1))
    for path, leaf in first.items():
        np.testing.assert_array_equal(again[path], leaf)
    for path, leaf in drawn_with_kernels(first).items():
        assert not np.array_equal(other[path], leaf), path


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from biomass_jax import bundle
from tests.models.test_initialisation import small, small_input

mesh = Mesh(np.asarray(jax.devices()), ("x",))
def place(leaf):
    axis = next((i for i, n in enumerate(leaf.shape) if n % 8 == 0), None)
    return NamedSharding(mesh, PartitionSpec(*([None] * axis + ["x"] if axis is not None else [])))
for kind in ("torch", "simmim"):
    init = lambda key: small(kind).init(key, small_input())
    shardings = jax.tree.map(place, jax.eval_shape(init, jax.random.key(0)))
    variables = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    assert sum(x.addressable_shards[0].data.size == x.size // 8 for x in jax.tree.leaves(variables)) > 10
    np.savez(f"{sys.argv[1]}/{kind}.npz", **bundle.flatten(jax.tree.map(np.asarray, variables)))
"""


def small(kind):
    return SwinEncoder(embed_dim=8, depths=(1,), num_heads=(2,), in_channels=1, initializer=kind)


def small_input():
    return np.zeros((1, 8, 8, 1), np.float32)


def test_draws_do_not_depend_on_where_they_lie(tmp_path, root):
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", SHARDED, tmp_path], cwd=root, env=env, check=True)
    tables = []
    for kind in ("torch", "simmim"):
        module = small(kind)
        whole = bundle.flatten(jax.jit(lambda m=module: m.init(jax.random.key(0), small_input()))())
        sharded = np.load(tmp_path / f"{kind}.npz")
        assert set(sharded.files) == set(whole)
        for path, leaf in whole.items():
            np.testing.assert_array_equal(sharded[path], leaf, err_msg=path)
        tables.append(np.asarray(whole["params/encoder/stages_0/blocks_0/attn/relative_position_bias_table"]))
    assert not tables[0].any() and tables[1].all()


def test_how_weights_are_drawn_is_no_part_of_the_architecture():
    module = BiomassModel(**ENCODER, initializer="simmim", remat=(0,))
    fields = architecture_of(module)
    assert not {"initializer", "remat", "dtype"} & set(fields)
    assert build_module("biomass", fields, remat=[1, 2]) == BiomassModel(**ENCODER, remat=(1, 2))


@pytest.mark.parametrize("kind", ["torch", "simmim"])
@pytest.mark.parametrize("task", ["biomass", "simmim"])
def test_one_array_after_the_other_draws_what_flax_does(task, kind):
    """Of some lengths between powers of two, and in a module that computes in bfloat16."""
    fields = ENCODER | ({"decoder_channels": 7} if task == "biomass" else {})
    module = build_module(task, fields, "bfloat16").clone(initializer=kind)
    inputs = dummy_inputs(module)
    expected = bundle.flatten(jax.jit(lambda key: module.init(key, *inputs))(jax.random.key(5)))
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in inputs]
    found = bundle.flatten(initialisation.draw_variables(module, jax.random.key(5), *shapes))
    assert {path: leaf.dtype for path, leaf in found.items()} == {path: leaf.dtype for path, leaf in expected.items()}
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match="unknown initialisation 'xavier'; expected one of torch, simmim"):
        jax.eval_shape(lambda: small("xavier").init(jax.random.key(0), small_input()))
