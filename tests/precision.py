"""The models in float64, which rounds alike on every machine and lets differences be taken."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest


@contextmanager
def float64() -> Iterator[None]:
    """Every float32 that a model asks for by name is a float64."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(jnp, "float32", jnp.float64)
        yield
