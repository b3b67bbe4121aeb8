"""The device mesh: the one place that names its axes.

Batches are split over both axes; `fsdp` is there for parameters too.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh with every device on `data`; all local devices unless `devices` says otherwise."""
    devices = jax.local_devices() if devices is None else list(devices)
    # Auto axes: the compiler propagates shardings; Explicit ones break the reshapes of window attention.
    return Mesh(np.asarray(devices).reshape(-1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())
