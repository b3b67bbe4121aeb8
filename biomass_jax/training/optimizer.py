"""The learning rate by step, and AdamW by parameter name: what decays, what is frozen, how fast each layer learns.

What validation decides about the rate is in plateau.py. The optimiser gives directions without the learning rate, so
that one compiled step serves every rate: new p = p - lr * u (`apply_updates`).
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from biomass_jax.errors import ConfigError

SCHEDULES = ("constant", "plateau", "cosine", "multistep")

DECAYS = ("weights", "all")
# By the last part of the name: norms, biases, bias tables and the mask token (microsoft/SimMIM, optimizer.py).
_NEVER_DECAYED = ("scale", "bias", "relative_position_bias_table", "mask_token")
Tree = Any  # parameters, or what has their structure


def create_schedule(
    kind: str,
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    warmup_from: float = 0.0,
    total_steps: int = 0,
    min_lr: float = 0.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> Callable[[jax.Array | int], jax.Array]:
    """A function from a step, counted from 0, to its learning rate, a float32 scalar.

    Below `warmup_steps` every kind rises linearly from `warmup_from` towards `learning_rate`. From there on:

    - `constant`, `plateau`: `learning_rate` (the loop scales a plateau's).
    - `cosine`: min_lr + (learning_rate - min_lr) (1 + cos(pi step / total_steps)) / 2, and `min_lr` from `total_steps`
      on. As in timm's CosineLRScheduler without `warmup_prefix`, which SimMIM uses (lr_scheduler.py), the cosine starts
      at step 0 underneath the warm-up, not at its end.
    - `multistep`: `learning_rate` * gamma ** (milestones reached), a milestone's own step included (SimMIM's
      MultiStepLRScheduler).

    Args:
        kind: one of `SCHEDULES`.
        learning_rate: the highest rate.
        warmup_steps: 0 for none.
        warmup_from: rate of step 0 of a warm-up.
        total_steps: length of the cosine; read by it alone.
        min_lr: end of the cosine.
        milestones: increasing steps; read by `multistep` alone, like `gamma`.
        gamma: factor at each milestone.

    Raises:
        ConfigError: a warm-up that outlasts the cosine or a milestone, or milestones that do not increase.
    """
    field = f"config.schedule: {kind} schedule:"
    if kind == "cosine" and not warmup_steps < total_steps:
        raise ConfigError(f"{field} the warm-up of {warmup_steps} steps must be shorter than all {total_steps}")
    if kind == "multistep" and any(low >= high for low, high in itertools.pairwise([warmup_steps - 1, *milestones])):
        raise ConfigError(f"{field} milestones {list(milestones)} must increase from {warmup_steps} on")

    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        if kind == "cosine":
            cosine = jnp.cos(math.pi * jnp.minimum(t / total_steps, 1))
            rate = min_lr + 0.5 * (learning_rate - min_lr) * (1 + cosine)
        elif kind == "multistep":
            reached = jnp.sum(t >= np.asarray(milestones, np.float32))
            rate = learning_rate * jnp.float32(gamma) ** reached
        else:
            rate = jnp.full((), learning_rate, jnp.float32)
        if warmup_steps:
            rising = warmup_from + t * ((learning_rate - warmup_from) / warmup_steps)
            rate = jnp.where(t < warmup_steps, rising, rate)
        return rate.astype(jnp.float32)

    return schedule


def create_optimizer(
    params: Tree,
    *,
    weight_decay: float,
    decay: str = "weights",
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float | None = None,
    layer_decay: float = 1.0,
    freeze: Sequence[str] = (),
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch computes it, without the learning rate.

    u = scale * (mhat / (sqrt(vhat) + 1e-8) + weight_decay * p), the decay where `decay_mask` says so.

    Args:
        params: the model's parameters or their shapes; only names are read.
        weight_decay: per unit of learning rate.
        decay: see `decay_mask`.
        betas: decay of the first and second moments.
        clip_norm: the gradients' global norm, over what is trained, is cut to this first; None for no limit.
        layer_decay: see `layer_scales`.
        freeze: see `trainable_mask`. What is frozen has no moments, and its update is exactly 0.

    Raises:
        ConfigError: see `trainable_mask`.
    """
    steps = [optax.scale_by_adam(*betas), optax.add_decayed_weights(weight_decay, lambda p: decay_mask(p, decay))]
    if clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    if layer_decay != 1.0:
        scales = _flat(layer_scales(params, layer_decay))

        def scale(updates: Tree, _: Tree | None) -> Tree:  # by name: what arrives here lacks what is frozen
            return jax.tree.map_with_path(lambda path, u: scales[_name(path)] * u, updates)

        steps.append(optax.stateless(scale))
    optimizer = optax.chain(*steps)
    if not freeze:
        return optimizer
    groups = jax.tree.map(lambda trained: "trained" if trained else "frozen", trainable_mask(params, freeze))
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, groups)


def apply_updates(params: Tree, updates: Tree, learning_rate: jax.Array | float) -> Tree:
    """One step down the directions that the optimiser gives: p - lr * u."""
    return jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), params, updates)


def decay_mask(params: Tree, decay: str) -> Tree:
    """Which parameters decay, as a tree of bools.

    Args:
        params: the model's parameters or their shapes.
        decay: `weights` leaves out norms, biases, bias tables and the mask token; `all` (the reference) nothing.
    """
    return _by_name(lambda path: decay == "all" or path.split("/")[-1] not in _NEVER_DECAYED, params)


def trainable_mask(params: Tree, freeze: Sequence[str]) -> Tree:
    """Which parameters are trained, as a tree of bools.

    Args:
        params: the model's parameters or their shapes.
        freeze: paths that are frozen with all below them: `encoder`, `encoder/stages_0`.

    Raises:
        ConfigError: a name that matches nothing, or names that leave nothing to train.
    """
    paths = list(_flat(params))
    for name in freeze:
        if not any(_under(path, name) for path in paths):
            level = name.count("/") + 1
            there = sorted({"/".join(path.split("/")[:level]) for path in paths})
            raise ConfigError(
                f"config.optimizer: freeze: no parameter is called {name!r}; at that level there are {', '.join(there)}"
            )
    mask = _by_name(lambda path: not any(_under(path, name) for name in freeze), params)
    if not any(jax.tree.leaves(mask)):
        raise ConfigError(f"config.optimizer: freeze: {', '.join(freeze)} leave no parameter to train")
    return mask


def all_but(params: Tree, name: str) -> tuple[str, ...]:
    """The paths that `freeze` takes to leave the parameters under one path alone."""
    return tuple(path for path in _flat(params) if not _under(path, name))


def layer_scales(params: Tree, layer_decay: float) -> Tree:
    """Factor of each parameter's learning rate, as a tree of floats: `layer_decay` ** (layers above it).

    Layers from below: patch embedding and mask token; each block of each stage in order, a stage's downsampling with
    its last block; on top, with factor 1, decoder, head and the norms of the encoder's outputs. BEiT's rule (Bao et
    al., arXiv 2106.08254) as microsoft/SimMIM applies it to Swin (optimizer.py, `get_swin_layer`).
    """
    depths: dict[int, int] = {}
    for path in _flat(params):
        if found := re.match(r"encoder/stages_(\d+)/blocks_(\d+)/", path):
            stage, block = int(found[1]), int(found[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    last = {stage: sum(depth for other, depth in depths.items() if other <= stage) for stage in depths}
    top = max(last.values(), default=0) + 1

    def layer(path: str) -> int:
        if path == "mask_token" or path.startswith("encoder/patch_embed/"):
            return 0
        if found := re.match(r"encoder/stages_(\d+)/(?:blocks_(\d+)|downsample)/", path):
            stage = int(found[1])
            return last[stage] if found[2] is None else last[stage] - depths[stage] + int(found[2]) + 1
        return top

    return _by_name(lambda path: layer_decay ** (top - layer(path)), params)


def import_adam(opt_state: object, count: object, mu: Tree, nu: Tree) -> Any:
    """Put moments from elsewhere into a state of `create_optimizer`.

    Args:
        opt_state: a concrete state; where its arrays lie is kept.
        count: how many updates the moments have seen.
        mu: first moments by parameter; those of parameters that are frozen here are left out.
        nu: second moments.
    """

    def moments(name: str, tree: Tree) -> Tree:
        found = _flat(tree)
        return jax.tree.map_with_path(
            lambda path, leaf: _like(leaf, found[_name(path)]), optax.tree.get(opt_state, name)
        )

    count = _like(optax.tree.get(opt_state, "count"), count)
    return optax.tree.set(opt_state, count=count, mu=moments("mu", mu), nu=moments("nu", nu))


def _like(old: jax.Array, value: object) -> jax.Array:
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    # Never the caller's own memory: the step donates its state.
    return jax.device_put(value.astype(old.dtype), old.sharding, may_alias=False)


def _under(path: str, name: str) -> bool:
    return path == name or path.startswith(name + "/")


def _by_name(function: Callable[[str], Any], tree: Tree) -> Tree:
    return jax.tree.map_with_path(lambda path, _: function(_name(path)), tree)


def _flat(tree: Tree) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
