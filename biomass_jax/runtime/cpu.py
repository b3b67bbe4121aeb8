"""What exists for CPUs alone. Accelerators, predictions and whoever differentiates a model get plain JAX and Flax.

The switch is `for_training`: a function traced through it is a training step on CPU. There the gradients of weights
are products with the input transposed first, and some sums are kept in memory; the results are the same sums in
another order. All else here concerns memory and caches.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from biomass_jax.runtime.system import cores

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_training: ContextVar[bool] = ContextVar("a training step on CPU is traced", default=False)

# XLA takes optimization barriers out on CPU before it fuses; by them `computed_once` and remat work.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

# Of a large batch, what a CPU predicts at a time: with more, what lies between two layers leaves its caches.
IMAGES_A_CORE = 2


def images_at_once() -> int:
    """Images that a CPU predicts at a time, by the cores that this process may use."""
    return IMAGES_A_CORE * cores()


def give_back_memory() -> None:
    """Return to the system what glibc keeps of freed memory: after compiling Swin-B's step, 0.8 GB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def for_training(step: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, traced with what makes training faster on CPU; compile it with `COMPILER_OPTIONS`."""

    @functools.wraps(step)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        before = _training.set(True)
        try:
            return step(*args, **kwargs)
        finally:
            _training.reset(before)

    return run


def computed_once(x: jax.Array) -> jax.Array:
    """The same array, of any shape, which XLA then keeps in memory.

    It would rather compute a sum of two arrays again wherever it is read. Of the gradient of the residual stream, a sum
    with two more arrays at each block, it makes one longer and longer sum a block, a fifth of a training step; and of a
    transposed array that a product reads, the product of transposed gradients.
    """
    return jax.lax.optimization_barrier(x) if _training.get() else x


def dense(
    x: jax.Array, kernel: jax.Array, dimensions: Any, precision: jax.lax.PrecisionLike = None, **options: Any
) -> jax.Array:
    """For `nn.Dense(dot_general=...)`: x [..., K], kernel [K, N] -> [..., N]."""
    if not _training.get():
        return jax.lax.dot_general(x, kernel, dimensions, precision=precision, **options)
    rows = _product(x.reshape(-1, x.shape[-1]), kernel, _precision(precision))
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def _precision(given: object) -> Any:
    """The precision that holds where the forward pass is traced: the backward pass may be traced outside of it."""
    return given or jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """x [M, K], kernel [K, N] -> [M, N]."""
    return jnp.dot(x, kernel, precision=precision)


def _product_forward(x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike) -> tuple[jax.Array, Any]:
    return jnp.dot(x, kernel, precision=precision), (x, kernel)


def _product_backward(precision: jax.lax.PrecisionLike, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return jnp.dot(g, kernel.T, precision=precision), _gradient_of_kernel(x, g, precision)


_product.defvjp(_product_forward, _product_backward)


def _gradient_of_kernel(x: jax.Array, g: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """x [M, K], g [M, N] -> [K, N]; XLA would transpose g, or walk through x column by column."""
    return jnp.dot(jax.lax.optimization_barrier(x.T), g, precision=precision)


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> jax.Array:
    """For `nn.Conv(conv_general_dilated=...)`: x [B, H, W, C], kernel [k, k, C, N] -> [B, H', W', N]."""
    dilated = {*strides, *options["lhs_dilation"], *options["rhs_dilation"], options["feature_group_count"]} != {1}
    square = kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    if not _training.get() or dilated or not square or padding != "SAME":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)
    return _convolution(x, kernel, _precision(precision))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, precision=precision)


def _convolution_forward(x: jax.Array, kernel: jax.Array, precision: object) -> tuple[jax.Array, Any]:
    return _convolution(x, kernel, precision), (x, kernel)


def _convolution_backward(precision: jax.lax.PrecisionLike, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel's gradient offset by offset: k * k products, twice as fast as XLA's convolution of a large map."""
    x, kernel = saved
    of_x = jax.vjp(lambda x: _convolution.fun(x, kernel, precision), x)[1](g)[0]
    k, (h, w) = kernel.shape[0], x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    seen = [padded[:, i : i + h, j : j + w].reshape(-1, x.shape[-1]) for i in range(k) for j in range(k)]
    found = [_gradient_of_kernel(part, g.reshape(-1, g.shape[-1]), precision) for part in seen]
    return of_x, jnp.stack(found).reshape(kernel.shape)


_convolution.defvjp(_convolution_forward, _convolution_backward)
