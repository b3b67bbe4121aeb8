"""How fresh weights are drawn. Norms start at scale 1 and bias 0 everywhere.

`torch`: PyTorch's defaults, which granite was trained from: kernels and biases of dense layers and convolutions
U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (torch/nn/modules/linear.py and conv.py, `reset_parameters`), bias tables 0.
`simmim`: the original Swin's and SimMIM's (microsoft/SimMIM, models/swin_transformer.py and simmim.py): dense kernels,
bias tables and the mask token N(0, 0.02), dense biases 0; convolutions as in `torch`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array

KINDS = ("torch", "simmim")
# The original says trunc_normal_(std=0.02), which cuts at -2 and 2, a hundred deviations away; JAX's cuts at two.
NORMAL: Initializer = nn.initializers.normal(0.02)


def uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the same for a kernel and its bias."""
    bound = fan_in**-0.5

    def draw(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


def dense(kind: str, fan_in: int) -> dict[str, Any]:
    """`nn.Dense`'s initialisers for `fan_in` input features.

    Raises:
        ValueError: unknown kind.
    """
    if _check(kind) == "simmim":
        return {"kernel_init": NORMAL, "bias_init": nn.initializers.zeros_init()}
    return {"kernel_init": uniform(fan_in), "bias_init": uniform(fan_in)}


def conv(fan_in: int) -> dict[str, Any]:
    """`nn.Conv`'s initialisers; `fan_in` is input channels times the kernel's area. The same for every kind."""
    return {"kernel_init": uniform(fan_in), "bias_init": uniform(fan_in)}


def bias_table(kind: str) -> Initializer:
    """The initialiser of relative position bias tables."""
    return NORMAL if _check(kind) == "simmim" else nn.initializers.zeros_init()


def _check(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown initialisation {kind!r}; expected one of {', '.join(KINDS)}")
    return kind
