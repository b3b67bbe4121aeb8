"""Weights in fewer bytes against plain loops, and which of them stay as they are."""

import jax
import numpy as np
import pytest

from biomass_jax.bundle import flatten
from biomass_jax.portable.weights import compress, expand


@pytest.fixture
def variables():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    conv = draw(3, 3, 4, 5)
    conv[..., 2] = 0  # a channel that is nothing
    return {
        "params": {
            "encoder": {"fc1": {"kernel": draw(6, 7), "bias": draw(7)}, "attn": {"table": draw(9, 2)}},
            "head": {"conv": {"kernel": conv}, "final": {"kernel": draw(1, 1, 4, 1)}, "spread": {"kernel": draw(4, 2)}},
        },
        "batch_stats": {"norm": {"mean": draw(5)}},
    }


KERNELS = ("params/encoder/fc1/kernel", "params/head/conv/kernel")


def test_int8_is_the_nearest_multiple_of_a_scale_for_each_output_channel(variables):
    stored = compress(variables, "int8")
    for path in KERNELS:
        weights, leaf = flatten(variables)[path], stored[path]
        assert leaf["values"].dtype == np.int8
        assert leaf["scale"].shape == weights.shape[-1:]
        for place in np.ndindex(weights.shape):
            largest = max(abs(float(w)) for w in weights[..., place[-1]].ravel())
            steps = round(float(weights[place]) / (largest / 127)) if largest else 0
            assert abs(int(leaf["values"][place]) - steps) <= (1 if largest else 0)
        back = flatten(expand(stored))[path]
        half = np.abs(weights).max(axis=tuple(range(weights.ndim - 1))) / 127 / 2
        assert (np.abs(back - weights) <= half * 1.0001).all()
        assert (np.abs(leaf["values"]).max(axis=tuple(range(weights.ndim - 1)))[half > 0] == 127).all()


def test_bfloat16_keeps_eight_bits_rounded_to_even(variables):
    back = flatten(expand(compress(variables, "bfloat16")))
    for path in KERNELS:
        bits = flatten(variables)[path].view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        np.testing.assert_array_equal(np.asarray(back[path]).view(np.uint32), rounded.astype(np.uint32))
        assert compress(variables, "bfloat16")[path]["values"].dtype.itemsize == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_all_but_kernels_of_products_is_kept_to_the_bit(variables, precision):
    back = expand(compress(variables, precision))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for path, leaf in flatten(variables).items():
        same = np.array_equal(flatten(back)[path], leaf)
        assert same == (precision == "float32" or path not in KERNELS), path
