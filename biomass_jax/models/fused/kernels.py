"""What the kernels share: types, precision, calls. Elsewhere than on GPUs they are interpreted, which is for tests."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.ref import AbstractRef
from jax.typing import DTypeLike

DTYPES = ("float32", "bfloat16")
MOST_NUMBERS = 2**31 - 1  # that the kernels' int32 offsets reach

_PRECISIONS = {
    "highest": lax.Precision.HIGHEST,
    "float32": lax.Precision.HIGHEST,
    "high": lax.Precision.HIGH,
    "tensorfloat32": lax.Precision.HIGH,
}


def precision_here(dtype: DTypeLike) -> lax.Precision:
    """The precision of products where this is traced, to be kept: a backward pass may be traced where another holds."""
    name = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _PRECISIONS.get(name, lax.Precision.DEFAULT) if dtype == jnp.float32 else lax.Precision.DEFAULT


def call(
    kernel: Callable[..., None],
    name: str,
    programs: int,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    inputs: tuple[jax.Array, ...],
    *,
    warps: int,
    stages: int,
) -> tuple[jax.Array, ...]:
    """Run a kernel; what it runs on is known when the program is compiled, not yet when it is traced."""

    def run(*inputs: jax.Array, interpret: bool) -> tuple[jax.Array, ...]:
        params = triton.CompilerParams(num_warps=warps, num_stages=stages)
        called = pl.pallas_call(
            kernel, outputs, grid=(programs,), name=name, interpret=interpret, compiler_params=params
        )
        return called(*inputs)

    compiled, interpreted = functools.partial(run, interpret=False), functools.partial(run, interpret=True)
    return lax.platform_dependent(*inputs, cuda=compiled, default=interpreted)


def spot(ref: AbstractRef, rows: jax.Array, first: jax.Array, count: int) -> AbstractRef:
    """`count` columns of a ref's rows, from the `first` on."""
    return at(ref, rows[:, None], (first + lax.iota(jnp.int32, count))[None, :])


def at(ref: AbstractRef, *places: jax.Array) -> AbstractRef:
    """The numbers of a ref at these indices, an array for each axis."""
    return ref.at[places]  # type: ignore[call-overload]


def dot(
    a: jax.Array, b: jax.Array, contracted: tuple[int, int], precision: lax.Precision = lax.Precision.DEFAULT
) -> jax.Array:
    """The product of two matrices over one axis of each, float32."""
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
