"""JAX's types and draws as this package's numbers need them, whatever a shell or a host program has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax


@contextmanager
def fixed() -> Iterator[None]:
    """Trace and draw with JAX's own defaults in this thread: 32 bits, standard promotion, its one kind of keys.

    Commands need it less than Python programs: `environment.settle` has dropped what the shell says.
    """
    with ExitStack() as stack:
        for setting in (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.threefry_partitionable(True),
            jax.default_prng_impl("threefry2x32"),
        ):
            stack.enter_context(setting)
        yield
