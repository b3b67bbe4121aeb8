"""How fresh weights are drawn. Norms start at scale 1 and bias 0 everywhere.

`torch`: PyTorch's defaults, which granite was trained from: kernels and biases of dense layers and convolutions
U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (torch/nn/modules/linear.py and conv.py, `reset_parameters`), bias tables 0.
`simmim`: the original Swin's and SimMIM's (microsoft/SimMIM, models/swin_transformer.py and simmim.py): dense kernels,
bias tables and the mask token N(0, 0.02), dense biases 0; convolutions as in `torch`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array

KINDS = ("torch", "simmim")
FEWEST_DRAWN = 2**12  # numbers at a time
# The original says trunc_normal_(std=0.02), which cuts at -2 and 2, a hundred deviations away; JAX's cuts at two.
_NORMAL: Initializer = nn.initializers.normal(0.02)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """N(0, 0.02)."""
    return _drawn(_NORMAL, key, shape, dtype)


def uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the same for a kernel and its bias."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return _drawn(_symmetric, key, shape, dtype, fan_in**-0.5)

    return draw


def _symmetric(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, bound: float | jax.Array) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _drawn(draw: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, *more: float) -> jax.Array:
    """`draw(key, shape, dtype, ...)`, a scale given as `more`.

    What is drawn at a place follows from the key and the place alone: where it isn't part of a larger program, a few
    lengths, a program each, do for all arrays.
    """
    if isinstance(key, jax.core.Tracer):
        return draw(key, shape, dtype, *more)
    count = math.prod(shape)
    length = max(FEWEST_DRAWN, 1 << (count - 1).bit_length())
    return _compiled(draw, length, jnp.dtype(dtype))(key, *more)[:count].reshape(shape)


@functools.cache
def _compiled(draw: Initializer, length: int, dtype: np.dtype) -> Callable[..., jax.Array]:
    return jax.jit(lambda key, *more: draw(key, (length,), dtype, *more))


def draw_variables(module: nn.Module, key: jax.Array, *inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Fresh variables, `module.init`'s to the bit, one array after the other: nothing is compiled for all at once.

    That took half a minute and more for a Swin-B, on CPU and on GPU alike.

    Args:
        module: with a field `dtype`; weights are float32 whatever it is.
        key: of the draws.
        inputs: what the module's `__call__` takes.

    Returns:
        the module's variables, on JAX's default device.
    """
    return dict(module.clone(dtype=jnp.float32).lazy_init(key, *inputs))


def dense(kind: str, fan_in: int) -> dict[str, Any]:
    """`nn.Dense`'s initialisers for `fan_in` input features.

    Raises:
        ValueError: unknown kind.
    """
    if _check(kind) == "simmim":
        return {"kernel_init": normal, "bias_init": nn.initializers.zeros_init()}
    return {"kernel_init": uniform(fan_in), "bias_init": uniform(fan_in)}


def conv(fan_in: int) -> dict[str, Any]:
    """`nn.Conv`'s initialisers; `fan_in` is input channels times the kernel's area. The same for every kind."""
    return {"kernel_init": uniform(fan_in), "bias_init": uniform(fan_in)}


def bias_table(kind: str) -> Initializer:
    """The initialiser of relative position bias tables."""
    return normal if _check(kind) == "simmim" else nn.initializers.zeros_init()


def _check(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown initialisation {kind!r}; expected one of {', '.join(KINDS)}")
    return kind
