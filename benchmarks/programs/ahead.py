"""Our programs compiled for a GPU or TPU that isn't there: kernels, bytes, memory and the compiler's time.

    pip install jax-cuda12-plugin jax-cuda12-pjrt            # or libtpu; of jax's own version
    python -m benchmarks.programs.ahead --platform cuda --program step --batch 64 --attention fused

A GPU's program is compiled for an H100's description, without autotuning, for which the card itself is needed: of
products there is the compiler's own first choice. Bytes are those of the arrays that each kernel reads and writes, each
once: caches may save some, and what a library adds isn't seen.
"""

import argparse
import functools
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.gpu import jobs
from benchmarks.programs import trace
from benchmarks.programs.collectives import array_bytes

# What XLA asks of a card, in its own words (xla/stream_executor/device_description.proto); an H100's or H200's numbers.
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85899345920
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPU = "v5e:2x2"  # the smallest that its compiler knows

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
# They compute nothing and move nothing; of what is asynchronous, the start counts.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "async-done"}


@dataclass(frozen=True)
class Kernel:
    """One operation of a compiled program that runs by itself.

    Attributes:
        name: in the program's text.
        kind: of `trace.KINDS`, or `triton` for a kernel of our own.
        size: bytes of the arrays that it reads and writes.
    """

    name: str
    kind: str
    size: int


def kernels(program: str) -> list[Kernel]:
    """The operations of a compiled program's entry, from its text."""
    kinds = trace.kinds_of(program)
    lines = program[program.index("\nENTRY ") :].splitlines()[1:]
    sizes: dict[str, int] = {}
    found = []
    for line in lines[: lines.index("}")]:
        if not (parts := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = parts.groups()
        sizes[name] = sum(array_bytes(shape)) if "[" in shape else 0
        if opcode in _FREE:
            continue
        read = _NAME.findall(rest.partition("), ")[0])
        kind = "triton" if "gpu.triton" in rest else kinds.get(name, "other")
        found.append(Kernel(name, kind, sizes[name] + sum(sizes.get(one, 0) for one in read)))
    return found


def devices(platform: str, count: int) -> list[jax.Device]:
    """Devices that aren't there, to compile for: `cuda` or `tpu`."""
    from jax.experimental import topologies

    if platform == "cuda":
        found = topologies.get_topology_desc("hopper", "cuda", target_config=HOPPER, topology=f"1x1x{count}")
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would look for a cloud's machine
        found = topologies.get_topology_desc(TPU, "tpu")
    return list(np.ravel(found.devices)[:count])


def lowered(options: argparse.Namespace) -> jax.stages.Lowered:
    """The program that was asked for, traced for its devices."""
    from biomass_jax.models.build import abstract_variables, build_module, in_compute_dtype
    from biomass_jax.runtime import mesh as sharding

    mesh = sharding.create_mesh(devices(options.platform, options.devices))
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    module = build_module("biomass", {}, "bfloat16", attention=options.attention, remat=options.remat)
    sizes = options.batch, jobs.SIDE, jobs.SIDE
    chips = jax.ShapeDtypeStruct((*sizes, 6), jnp.int16, sharding=rows)
    if options.program == "step":
        _, planned, train = jobs.planned_training(module, mesh)
        return train.lower(planned, {"image": chips, "label": jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=rows)})

    weights = jax.eval_shape(lambda known: in_compute_dtype(known, "bfloat16"), abstract_variables(module))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), weights)
    run = sharding.traced_for(rows)(functools.partial(jobs.predict, module))
    return jax.jit(run, out_shardings=rows).lower(weights, chips)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # what is compiled for isn't what it runs on
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    program = lowered(options)
    began = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - began
    found = kernels(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    print(f"{options.program}, batch {options.batch}, {options.attention}, for {options.devices} {options.platform}")
    if memory is not None:
        sizes = [size / 2**30 for size in (memory.temp_size_in_bytes, memory.argument_size_in_bytes)]
        print(f"{sizes[0]:.2f} GiB beside its arguments of {sizes[1]:.2f} GiB; ", end="")
    print(f"compiled in {seconds:.1f} s")
    table = [[kind, *_total(found, kind)] for kind in sorted({one.kind for one in found})]
    common.print_table(("kind", "kernels", "GB"), [*table, ["all", *_total(found)]])


def _total(found: list[Kernel], kind: str | None = None) -> list[str]:
    these = [one for one in found if kind in (None, one.kind)]
    return [str(len(these)), f"{sum(one.size for one in these) / 1e9:.1f}"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--platform", choices=("cuda", "tpu"), default="cuda")
    found.add_argument("--program", choices=("forward", "step"), default="forward")
    found.add_argument("--batch", type=int, default=128, help="of all devices")
    found.add_argument("--devices", type=int, default=1)
    found.add_argument("--attention", choices=("einsum", "fused"), default="einsum")
    found.add_argument("--remat", type=int, nargs="*", default=(), help="stages that are computed twice")
    return found


if __name__ == "__main__":
    main()
