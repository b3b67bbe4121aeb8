"""The device mesh: the one place that names its axes and says what lies where.

Batches are split over both axes; parameters and optimiser state are replicated over `data` and may be split over
`fsdp`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
DeviceMesh = Mesh  # so that others can name the type without naming axes
SMALLEST_SPLIT = 2**14  # numbers; a smaller array costs more to gather than to keep


class MeshError(ValueError):
    """The devices can't be arranged, or a batch can't be split, as asked."""


def create_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh.

    Args:
        devices: all local devices unless given; of every process for a run that spans several.
        data: size of the axis over which only batches are split; -1 = what `fsdp` leaves.
        fsdp: size of the axis over which state is split too; -1 = what `data` leaves.

    Raises:
        MeshError: the sizes don't multiply to the number of devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)
    known = data if fsdp == -1 else fsdp
    if data == fsdp == -1 or min(data, fsdp) < -1 or 0 in (data, fsdp) or (-1 in (data, fsdp) and count % known):
        raise MeshError(f"config.mesh: data {data} and fsdp {fsdp} don't fit {count} devices; one of them may be -1")
    shape = (count // fsdp if data == -1 else data, count // data if fsdp == -1 else fsdp)
    if shape[0] * shape[1] != count:
        raise MeshError(f"config.mesh: data {shape[0]} x fsdp {shape[1]} is not the number of devices, {count}")
    # Auto axes: the compiler propagates shardings; Explicit ones break the reshapes of window attention.
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Where each array of a state lies: large ones split over `fsdp` along their largest divisible dimension.

    Args:
        mesh: of `create_mesh`.
        abstract: tree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
        tree of `NamedSharding`, of the same structure.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not divisible or np.prod(leaf.shape) < SMALLEST_SPLIT:
            return replicated(mesh)
        axis = max(divisible, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(place, abstract)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
    """Refuse a global batch that doesn't split evenly over devices and micro-batches.

    Raises:
        MeshError: what was found and what would fit.
    """
    parts = mesh.size * accumulation
    if batch_size % parts:
        raise MeshError(
            f"config.batch_size is {batch_size}; expected a multiple of {parts} "
            f"({mesh.size} devices x {accumulation} micro-batches)"
        )
