"""The device mesh: the one place that names its axes and says what lies where.

Batches are split over both axes; parameters and optimiser state are replicated over `data` and may be split over
`fsdp`.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from biomass_jax.errors import ConfigError, UsageError
from biomass_jax.runtime import environment

AXES = ("data", "fsdp")
DeviceMesh = Mesh  # so that others can name the type without naming axes
Whole = TypeVar("Whole")
SMALLEST_SPLIT = 2**14  # numbers; a smaller array costs more to gather than to keep

# (pattern in an array's path, axis that is split over `fsdp`; None = whole on each device). The first that fits counts,
# for the moments and averages of a parameter as for itself.
RULES: tuple[tuple[str, int | None], ...] = (
    # Used whole in every norm; batch statistics are the same on all devices anyway.
    (r"(^|/)batch_stats/", None),
    (r"/(scale|bias)$", None),
    # Its rows are picked by index, for which a device needs all of them.
    (r"/relative_position_bias_table$", None),
    # Low-rank updates are small, and what lies between their two products is smaller still.
    (r"/lora_[ab]$", None),
    # By its inputs or not at all: split by its outputs it draws the compiler into gathering feature maps (measured on
    # 8 devices, batch 128, a model of 8 MB: 59 MB gathered a step instead of 9 MB).
    (r"/downsample/reduction/kernel$", 0),
)


def all_devices(*, local: bool = False) -> list[jax.Device]:
    """JAX's devices, of every process or of this one.

    Raises:
        UsageError: JAX finds none of the kind that the environment asks for.
    """
    try:
        return jax.local_devices() if local else jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(environment.explain(error) or f"JAX finds no devices: {error}") from error


def host_device() -> jax.Device | None:
    """This process's CPU as a device; None, JAX's default, where the environment leaves JAX without it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def create_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh.

    Args:
        devices: all local devices unless given; of every process for a run that spans several.
        data: size of the axis over which only batches are split; -1 = what `fsdp` leaves.
        fsdp: size of the axis over which state is split too; -1 = what `data` leaves.

    Raises:
        ConfigError: the sizes don't multiply to the number of devices.
    """
    devices = all_devices(local=True) if devices is None else list(devices)
    try:
        grid = np.asarray(devices).reshape(data, fsdp)
    except ValueError as error:
        raise ConfigError(
            f"config.mesh: data {data} x fsdp {fsdp} is not the number of devices, {len(devices)}; one may be -1"
        ) from error
    # Auto axes: the compiler propagates shardings; Explicit ones break the reshapes of window attention.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def local_placement() -> dict[str, Any]:
    """`batch_sharding` and `replicated` over this process's devices, as predictors and scores take them."""
    mesh = create_mesh()
    return {"batch_sharding": batch_sharding(mesh), "replicated": replicated(mesh)}


@contextlib.contextmanager
def traced_for(sharding: jax.sharding.Sharding | None) -> Iterator[None]:
    """In which a program is traced, or a function decorated, whose batches lie so: of `batch_sharding`, or None."""
    if isinstance(sharding, NamedSharding):
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            yield
    else:
        yield


def mesh_is_known() -> bool:
    """Whether this is traced within `traced_for` a mesh's sharding."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def on_each_device(function: Callable[..., jax.Array], rows: jax.Array, whole: Whole) -> jax.Array:
    """`function(rows, whole)` where a compiler can't split the function over devices by itself, a kernel.

    Within `traced_for` each device computes its own rows, or all where their number isn't a multiple of the
    devices.

    Args:
        function: of `rows` and `whole`, whose result's rows each depend on the same row of `rows` alone.
        rows: [B, ...].
        whole: a tree of arrays that every device has.

    Returns:
        [B, ...].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh_is_known() or mesh.size == 1:
        return function(rows, whole)
    split = PartitionSpec() if len(rows) % mesh.size else PartitionSpec(AXES)
    # Unchecked: JAX doesn't know how what kernels return varies over devices.
    placed = jax.shard_map(function, in_specs=(split, PartitionSpec()), out_specs=split, check_vma=False)
    return placed(rows, whole)


def place(mesh: Mesh, abstract: object) -> Any:
    """Where each array of a state belongs: by the first of `RULES` that fits its path, else by its size.

    Without a rule an array of `SMALLEST_SPLIT` numbers or more is split over `fsdp` along its largest divisible
    dimension, a smaller one replicated. An axis that a rule names is split where it is divisible.

    Args:
        mesh: of `create_mesh`.
        abstract: tree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
        tree of `jax.ShapeDtypeStruct` with shardings, of the same structure.
    """
    parts = mesh.shape["fsdp"]

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        largest = max(divisible, key=lambda a: leaf.shape[a], default=None)
        axis = next((axis for pattern, axis in RULES if re.search(pattern, name)), largest)
        spec = PartitionSpec()
        if parts > 1 and axis is not None and axis in divisible and math.prod(leaf.shape) >= SMALLEST_SPLIT:
            spec = PartitionSpec(*(None,) * axis, "fsdp")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map_with_path(placed, abstract)


def bytes_a_device(tree: object) -> int:
    """Bytes of a tree's arrays, or of their shapes with shardings, that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_table(state: Any) -> str:
    """What lies where, for people: `path, shape, sharding, bytes a device`.

    Parameters one by one; the state's other fields, whose arrays lie as their parameters do, in a line each.

    Args:
        state: a flax.struct dataclass with `params`, of arrays or of `jax.ShapeDtypeStruct` with shardings.
    """
    rows = [("path", "shape", "sharding", "bytes a device")]
    for path, leaf in jax.tree.leaves_with_path({"params": state.params}):
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        axes = [axis or "-" for axis in leaf.sharding.spec]
        where = ", ".join(axes + ["-"] * (leaf.ndim - len(axes))) if axes else "replicated"
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, shape, where, f"{bytes_a_device(leaf):,}"))
    everything = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)} | {"all": state}
    for name, tree in everything.items():
        leaves = jax.tree.leaves(tree)
        if leaves:
            split = sum(not leaf.sharding.is_fully_replicated for leaf in leaves)
            rows.append((name, f"{len(leaves)} arrays", f"{split} split", f"{bytes_a_device(tree):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = (f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)
    return "\n".join(lines)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
    """Refuse a global batch that doesn't split evenly over devices and micro-batches.

    Raises:
        ConfigError: what was found and what would fit.
    """
    parts = mesh.size * accumulation
    if batch_size % parts:
        raise ConfigError(
            f"config.batch_size is {batch_size}; expected a multiple of {parts} "
            f"({mesh.size} devices x {accumulation} micro-batches)"
        )
