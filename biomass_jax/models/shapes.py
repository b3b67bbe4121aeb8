"""Sizes of arrays: numbers, or unknown while a program is traced that is to run with any.

A portable program is traced once for all sizes (jax.export's shape polymorphism), so what follows from a size has to be
computed when it runs. For sizes that are numbers the same formulas are NumPy's, and their results constants.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Size = Any  # int, or jax.export's symbolic dimension, which has no public type


def is_known(*sizes: Size) -> bool:
    """Whether all sizes are numbers."""
    return all(isinstance(size, int | np.integer) for size in sizes)


def arrays_of(*sizes: Size) -> ModuleType:
    """What computes with these sizes: NumPy where all are numbers, else `jax.numpy`."""
    return np if is_known(*sizes) else jnp


def rounded_up(size: Size, unit: int) -> Size:
    """The least multiple of `unit` that is no smaller than `size`."""
    return -(-size // unit) * unit


def is_zero(number: Size) -> bool:
    """Whether a number that may be computed is known to be 0."""
    return is_known(number) and number == 0


def where(sizes: tuple[Size, ...], all_are: int, then: int, otherwise: int) -> Size:
    """`then` where all sizes are `all_are`, else `otherwise`; an int32 array where that isn't known."""
    if is_known(*sizes):
        return then if all(size == all_are for size in sizes) else otherwise
    alike = jnp.stack([jnp.asarray(size, jnp.int32) == all_are for size in sizes])
    return jnp.where(jnp.all(alike), jnp.int32(then), jnp.int32(otherwise))


def kept(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keep the last `count` results of a function of sizes and settings; those of unknown sizes belong to one trace."""

    def of(compute: Callable[..., Any]) -> Callable[..., Any]:
        known = functools.lru_cache(maxsize=count)(compute)

        @functools.wraps(compute)
        def run(*sizes: Size) -> np.ndarray | jax.Array:
            return known(*sizes) if is_known(*sizes) else compute(*sizes)

        return run

    return of
