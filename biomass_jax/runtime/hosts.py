"""Numbers between the processes of a run: what each holds of an array, and everybody's sums."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from biomass_jax.runtime import processes


def local_rows(array: Any) -> np.ndarray:
    """This process's rows of an array that is split by rows over the devices, in order."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def exchange(vector: np.ndarray) -> list[np.ndarray]:
    """The float64 vectors of all processes, in their order; all must have the same length.

    They travel as bytes: as float64 JAX would round them to float32.
    """
    return [np.frombuffer(data, np.float64) for data in processes.gather(np.asarray(vector, np.float64).tobytes())]


def to_host(tree: Any) -> Any:
    """A tree of device arrays as NumPy, array by array, so that no device holds more than one of them whole."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
