"""The training step on many devices, compiled and not run: `python -m benchmarks.scaling`.

A process for each case makes fake CPU devices, compiles the step that `biomass_jax.main` would run on them, and reads
operations, memory and collectives from the compiled program. docs/scaling.md says what the figures mean.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.programs.collectives import by_kind, collectives

SIDE = 224  # px
CHIPS_A_DEVICE = 16
GIB, MB = 2**30, 1e6


@dataclass(frozen=True)
class Case:
    """A step: `task` finetune or pretrain, `variant` of the encoder, the mesh."""

    task: str
    variant: str
    data: int
    fsdp: int

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return self.data * self.fsdp


# Few enough for a quarter of an hour on two cores: data and fsdp meshes of both models and tasks, up to 1,024 devices.
MESHES = ((1024, 1), (128, 8))
CASES = (
    *(Case("pretrain", "swin_b", *mesh) for mesh in ((8, 1), (1, 8), (64, 1), (8, 8), *MESHES)),
    *(Case("pretrain", "swin_l", *mesh) for mesh in MESHES),
    *(Case("finetune", variant, *mesh) for variant in ("swin_b", "swin_l") for mesh in MESHES),
)


def run_config(case: Case) -> Any:
    """The config of the released model's training or of the official pretraining, in float32."""
    from configs import finetune_all_biomes, pretrain_simmim_swin_b_100ep

    module = pretrain_simmim_swin_b_100ep if case.task == "pretrain" else finetune_all_biomes
    config = module.get_config()
    config.model.variant = case.variant
    config.dtype = "float32"  # CPU's compiler turns bfloat16 into float32 in places, which would spoil the counts
    config.mesh.data, config.mesh.fsdp = case.data, case.fsdp
    config.batch_size = CHIPS_A_DEVICE * case.devices
    config.data.means, config.data.stds = tuple(common.GRANITE_MEANS), tuple(common.GRANITE_STDS)
    return config


def compile_step(case: Case) -> tuple[Any, Any]:
    """The compiled step, and the state that it takes as shapes with shardings; no array of either is made."""
    import jax
    import numpy as np

    from biomass_jax.data.sources import DatasetInfo
    from biomass_jax.runtime import mesh as sharding
    from biomass_jax.tasks.create import choose
    from biomass_jax.training.run import plan_steps

    config = run_config(case)
    info = DatasetInfo("synthetic", "train", 0, (SIDE, SIDE, 6), np.dtype(np.int16), -9999.0)
    mesh = sharding.create_mesh(jax.devices(), **config.mesh)
    described: Any = _Chips(info)
    task, _ = choose(config, described, None, command="")
    plan = plan_steps(config, task, mesh, total_steps=100_000, steps_per_epoch=1000)
    state, rows = plan.state, sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *info.image_shape), info.image_dtype, sharding=rows),
        "label": jax.ShapeDtypeStruct((config.batch_size, SIDE, SIDE), np.dtype(np.float32), sharding=rows),
    }
    return plan.steps.train.lower(state, batch).compile(), state


@dataclass(frozen=True)
class _Chips:
    """A source of which only the description is asked for."""

    info: Any


def measure(case: Case) -> dict[str, Any]:
    """Compile one case in this process, which has its devices, and read the program."""
    import jax

    from biomass_jax.runtime.mesh import bytes_a_device

    began = time.perf_counter()
    compiled, state = compile_step(case)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    found = collectives(compiled.as_text(), case.devices)
    return asdict(case) | {
        "devices": case.devices,
        "chips_a_device": CHIPS_A_DEVICE,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": bytes_a_device(state),
        "flops": compiled.cost_analysis()["flops"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": by_kind(found),
        "largest": [asdict(one) for one in sorted(found, key=lambda one: -one.sent)[:5]],
        "seconds": seconds,
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the tables, Markdown."""
    header = ["task", "model", "mesh", "GFLOP", "state, GiB", "working, GiB", "collectives, MB (number)", "sent, MB"]
    rows = []
    for result in results:
        kinds = result["collectives"]
        said = ", ".join(f"{kind} {found['bytes'] / MB:,.1f} ({found['count']})" for kind, found in kinds.items())
        rows.append(
            [
                result["task"],
                result["variant"],
                f"{result['data']} x {result['fsdp']}",
                f"{result['flops'] / 1e9:,.0f}",
                f"{result['state_bytes'] / GIB:.2f}",
                f"{result['temporary_bytes'] / GIB:.2f}",
                said,
                f"{sum(found['sent'] for found in kinds.values()) / MB:,.1f}",
            ]
        )
    print(f"Each of the mesh's devices, a step of {CHIPS_A_DEVICE} chips a device, float32\n")
    common.print_table(header, rows)


def main() -> None:
    """Compile all cases one after another; print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="only these, as pretrain:swin_b:8x1,finetune:swin_l:128x8")
    parser.add_argument("--json", type=Path, default=common.FOLDER / "scaling.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(parse(options.worker))))
        return
    cases = [parse(text) for text in options.cases.split(",")] if options.cases else CASES
    results = []
    for case in cases:
        flags = f"--xla_force_host_platform_device_count={case.devices}"
        # The program is read, never run: its machine code needn't be fast.
        env = {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
        name = f"{case.task}:{case.variant}:{case.data}x{case.fsdp}"
        results.append(common.run_worker("benchmarks.scaling", name, env=env))
        print(f"{name}: {results[-1]['seconds']:.0f} s", flush=True)
    print()
    show(results)
    common.write_json(options.json, {"machine": common.machine(), "cases": results})


def parse(text: str) -> Case:
    """A case from its name."""
    task, variant, mesh = text.split(":")
    data, fsdp = mesh.split("x")
    return Case(task, variant, int(data), int(fsdp))


if __name__ == "__main__":
    main()
