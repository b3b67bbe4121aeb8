"""A model's weights in fewer bytes, which a program expands before it multiplies by them.

Computing stays float32; only kernels of products are stored in fewer bits. What norms and biases hold, and the head's
last products, keeps every bit: it is a thousandth of a model and bears on every pixel.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from biomass_jax.models.build import FLOAT32_PRODUCTS
from biomass_jax.trees import flatten

PRECISIONS = ("float32", "bfloat16", "int8")
_LARGEST = 127  # of int8 that is symmetric about 0: -128 has no opposite


def compress(variables: Mapping[str, Any], precision: str) -> dict[str, dict[str, np.ndarray]]:
    """Weights as a program stores them.

    Args:
        variables: of a module, nested, float32.
        precision: of kernels: `float32`; `bfloat16`, rounded to nearest; or `int8`, whole multiples of a scale for each
            output channel, the largest weight of a channel being 127 times its scale.

    Returns:
        {path: {"values", and with int8 "scale"}}; kernels are [..., inputs, outputs], scales float32 [outputs].
    """
    stored = {}
    for path, leaf in flatten(dict(variables)).items():
        values = np.asarray(leaf, np.float32)
        module, name = ["", *path.split("/")][-2:]
        if name != "kernel" or module in FLOAT32_PRODUCTS or precision == "float32":
            stored[path] = {"values": values}
        elif precision == "bfloat16":
            stored[path] = {"values": values.astype(jnp.bfloat16)}
        else:
            largest = np.abs(values).max(axis=tuple(range(values.ndim - 1)))
            scale = np.where(largest > 0, largest / np.float32(_LARGEST), np.float32(1))
            stored[path] = {"values": np.rint(values / scale).astype(np.int8), "scale": scale}
    return stored


def expand(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The nested float32 variables that `compress` was given, as near as its precision has them; to be traced."""

    def expanded(leaf: Mapping[str, Any]) -> jax.Array:
        values = jnp.asarray(leaf["values"]).astype(jnp.float32)
        return values * leaf["scale"] if "scale" in leaf else values

    return traverse_util.unflatten_dict({path: expanded(leaf) for path, leaf in stored.items()}, sep="/")
