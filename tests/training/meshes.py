"""Tiny runs of a task on several meshes, step by step; a program, since a process's devices are given at its start.

`python -m tests.training.meshes FOLDER KIND MESH,MESH` on the devices of one process, with `HOST:PORT NUMBER` of two;
KIND is a task, or `variants`. The first seed's weights are those that a run draws; the other seeds have other weights,
chips and steps (what is drawn in a step follows from its number), so that one compiled step serves all of them.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from biomass_jax.data import sources
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.pipeline.batches import Feed
from biomass_jax.runtime import mesh as sharding
from biomass_jax.runtime import processes
from biomass_jax.tasks import create
from biomass_jax.training import config as checks
from biomass_jax.training import run as training
from biomass_jax.training import state
from biomass_jax.training.checkpoint import Checkpoints, HostState
from configs import finetune_all_biomes, pretrain_simmim_swin_b_100ep
from tests.compiling import QUICK
from tests.training import world

STEPS, SEEDS, SAVED = 20, 3, 3  # SAVED: after so many steps of the first seed
SMALLEST_SPLIT = 2**8  # numbers; weights as small as these would not be split
COMMON = {
    "model.embed_dim": 8,
    "model.depths": (1, 2),  # the second block of the second stage is shifted
    "model.num_heads": (1, 2),
    "model.mlp_ratio": 2.0,
    "model.drop_path_rate": 0.2,
    "data.threads": 2,
    "batch_size": 8,
    "epochs": 1,
    "optimizer.learning_rate": 1e-3,
}
FIELDS = {
    "finetune": {
        "model.decoder_channels": 8,
        "model.pool_scales": (1, 2),
        "model.head_dropout": 0.1,
        "model.output_scale": 50.0,  # else the loss is that of a constant
        "model.output_offset": 120.0,
    },
    "pretrain": {
        "model.encoder_stride": 8,
        "dtype": "float32",
        "mask_patch_size": 8,
        "augment.size": world.SIDE,
        "optimizer.reference_batch": 4,
        "schedule.warmup_epochs": 2.0,
    },
}
CONFIGS = {"finetune": finetune_all_biomes.get_config, "pretrain": pretrain_simmim_swin_b_100ep.get_config}


def environment(devices):
    """Variables of a process with so many devices, which compiles fast and computes slowly."""
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def config_of(kind, shards, **fields):
    config = CONFIGS[kind]()
    given = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(COMMON | FIELDS[kind] | {"data.path": str(shards)} | given)
    checks.check_fields(config)
    return config


def flat(tree):
    """Arrays of a tree by path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class World:
    """A task on a mesh of the first devices: its plan and the state that a run begins with.

    Attributes:
        drawn: that state, on the host.
        shares: of its bytes, what the most burdened device holds: as planned, and when it had been drawn.
    """

    def __init__(self, config, data, fsdp):
        self.config = config
        self.mesh = sharding.create_mesh(jax.devices()[: data * fsdp], data=data, fsdp=fsdp)
        self.train = sources.open_source(config.data.path, "train")
        self.task, _ = create.choose(config, self.train, None, command="")
        per_epoch = pipeline.steps_per_epoch(self.train, config.batch_size)
        sizes = {"total_steps": SEEDS * STEPS, "steps_per_epoch": per_epoch}
        self.plan = training.plan_steps(config, self.task, self.mesh, **sizes)
        self.planned = self.plan.state
        fresh = state.create_train_state(self.plan.fresh, self.planned)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(fresh))
        self.shares = np.array([sharding.bytes_a_device(self.planned), held(fresh)]) / whole
        self.drawn = processes.to_host(fresh)

    def begin(self, seed, weights):
        """The state with which a seed begins; `weights` of all but the first, which are further on in the schedule."""
        host = dataclasses.replace(self.drawn, step=np.int32(seed * STEPS), **weights) if weights else self.drawn
        return jax.device_put(host, jax.tree.map(lambda x: x.sharding, self.planned))

    def batches(self, seed, start=0):
        options = {"batch_size": self.config.batch_size, "seed": seed, "threads": 2, "cache": "host"}
        return Feed(self.train, self.train, self.mesh, **options).batches(start=start)

    def steps(self, seed, count, *, weights=None, save=None):
        """Some steps: metrics by name, each [count], and the first moments after the first, by path.

        Those are 0.1 x the gradient, which was clipped as a whole. `save`: a folder for a checkpoint.
        """
        now, seen = self.begin(seed, weights), []
        for number, batch in zip(range(count), self.batches(seed), strict=False):
            now, metrics = self.plan.steps.train(now, batch.arrays)
            seen.append({name: float(value) for name, value in metrics.items()})
            if number == 0:
                (adam,) = (part for part in now.opt_state if hasattr(part, "mu"))
                gradients = flat(processes.to_host(adam.mu))
            if number + 1 == SAVED and save is not None:
                checkpoints = Checkpoints(save, keep=1)
                checkpoints.save(now, HostState({}, step=SAVED), loss=None)
                checkpoints.close()
        return {name: np.array([each[name] for each in seen]) for name in seen[0]}, gradients

    def next_loss(self, folder):
        """Loss of the step after a checkpoint; and the share of bytes on a device as in `shares`."""
        checkpoints = Checkpoints(folder, keep=1)
        restored, host = checkpoints.restore(self.planned, step=SAVED)
        checkpoints.close()
        assert host.step == int(restored.step) == SAVED
        share = held(restored) / sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
        _, metrics = self.plan.steps.train(restored, next(self.batches(0, start=SAVED)).arrays)
        return float(metrics["loss"]), share

    def observe(self, weights, folder):
        """All seeds with their weights, and a checkpoint: arrays by name."""
        found = {"shares": self.shares, "split": not_replicated(self.planned.params)}
        for seed, drawn in enumerate([None, *weights]):
            metrics, gradients = self.steps(seed, STEPS, weights=drawn, save=None if seed else folder)
            found |= {f"{name}/{seed}": value for name, value in metrics.items()}
            found |= {f"gradients/{seed}/{path}": value for path, value in gradients.items()}
        return found | {f"drawn/{path}": value for path, value in flat(self.drawn).items()}


def held(tree):
    """Bytes that the most burdened device of this process holds."""
    held = dict.fromkeys(jax.local_devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def not_replicated(tree):
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))


def other_weights(task):
    """Variables of all seeds but the first."""
    draw = jax.jit(task.init)
    return [jax.device_get(draw(jax.random.key(seed))) for seed in range(1, SEEDS)]


def next_losses(world, mesh, folder):
    """The loss after each checkpoint that is there: all are restored on one device, the one device's on all others."""
    found = {}
    for name in sorted(path.name for path in folder.glob("*x*") if path.is_dir() and path.name != mesh):
        if "1x1" in (name, mesh):
            found[f"next/{name}"], found[f"share/{name}"] = world.next_loss(folder / name)
    return found


def variants(shards):
    """First steps of pretraining, nothing dropped (it would be drawn for each micro-batch), in several ways."""
    found = {}
    plain = {"model__drop_path_rate": 0.0}
    for name, mesh, fields in (
        ("eight", (8, 1), {}),
        ("accumulated", (1, 1), {"optimizer__gradient_accumulation": 8}),
        ("remat", (1, 1), {"model__remat": (0, 1)}),
    ):
        each = World(config_of("pretrain", shards, **plain, **fields), *mesh)
        metrics, gradients = each.steps(0, 3)
        found |= {f"{name}/{key}": value for key, value in (metrics | gradients).items()}
        traced = each.plan.steps.train.trace(each.planned, next(each.batches(0)).arrays)
        found[f"{name}/remat"] = str(traced.jaxpr).count("remat2")
    return found


def main(folder, kind, meshes, address=None, number=0):
    """Write what is found on each mesh as `MESH.npz`, its checkpoint as the folder `MESH`."""
    if address:
        processes.start(address, 2, int(number))
    sharding.SMALLEST_SPLIT = SMALLEST_SPLIT
    if kind == "variants":
        np.savez(folder / "variants.npz", **variants(folder / "shards"))
        return
    names = meshes.split(",")
    worlds = {mesh: World(config_of(kind, folder / "shards"), *map(int, mesh.split("x"))) for mesh in names}
    weights = other_weights(worlds[names[0]].task)
    found = {mesh: each.observe(weights, folder / mesh) for mesh, each in worlds.items()}
    for mesh, each in worlds.items():
        found[mesh] |= next_losses(each, mesh, folder)
        if jax.process_index() == 0:
            np.savez(folder / f"{mesh}.npz", **found[mesh])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
