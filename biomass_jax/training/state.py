"""What a training step changes: weights, batch statistics, optimiser state, averages, the learning rate."""

import dataclasses
import logging
import re
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from biomass_jax.bundle import Bundle
from biomass_jax.errors import BundleError, name_list
from biomass_jax.models.lora import is_update
from biomass_jax.runtime import mesh as sharding
from biomass_jax.tasks.base import Task
from biomass_jax.trees import flatten

log = logging.getLogger(__name__)

# Of a decoder, which has norms of its own for the encoder's stages: a pretrained encoder has none.
STAGE_NORM = re.compile(r"params/encoder/stages_\d+/norm/\w+")
SPREAD = re.compile(r"params/head/spread/\w+")  # beside a released head: one whose bundle has none begins anew


@flax.struct.dataclass
class TrainState:
    """State of a run, all of it arrays."""

    step: jax.Array  # int32 scalar, optimiser steps taken
    params: Any  # weights, float32
    batch_stats: Any  # running statistics of batch norms, {} where the model has none
    opt_state: Any  # optax's
    ema: Any  # {"params", "batch_stats"}, exponential averages of both, or None where they are off
    learning_rate: Any  # float32 scalar where validation moves it (plateau), None where it follows from the step

    def evaluated(self) -> dict[str, Any]:
        """The variables that are scored and exported: the averages where they are on."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}

    def with_learning_rate(self, rate: float) -> "TrainState":
        """The state at another rate, where validation moves it."""
        placed = jax.device_put(np.float32(rate), self.learning_rate.sharding)
        return dataclasses.replace(self, learning_rate=placed)


@dataclasses.dataclass(frozen=True)
class FreshState:
    """How the state comes about with which a run begins: variables are drawn, all else follows from them.

    Attributes:
        task: whose variables are drawn.
        optimizer: whose state belongs to them.
        seed: of the draws.
        ema: hold averages of the weights.
        learning_rate: the first one, where validation moves it.
    """

    task: Task
    optimizer: optax.GradientTransformation
    seed: int
    ema: bool = False
    learning_rate: float | None = None

    def draw(self) -> dict[str, Any]:
        """{"params", "batch_stats"}."""
        return self.task.init(jax.random.key(self.seed))

    def begin(self, variables: dict[str, Any]) -> TrainState:
        """The state that begins with these variables."""
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=self.optimizer.init(variables["params"]),
            ema=jax.tree.map(jnp.copy, variables) if self.ema else None,
            learning_rate=None if self.learning_rate is None else jnp.asarray(self.learning_rate, jnp.float32),
        )


def plan_train_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: sharding.DeviceMesh,
    *,
    seed: int,
    ema: bool = False,
    learning_rate: float | None = None,
) -> tuple[FreshState, TrainState]:
    """How a fresh state is drawn and where it belongs, from its shapes alone; arguments as for `FreshState`.

    Returns:
        how the state is drawn, and its shapes, dtypes and shardings; nothing is drawn yet.
    """
    fresh = FreshState(task, optimizer, seed, ema, learning_rate)
    return fresh, sharding.place(mesh, jax.eval_shape(lambda: fresh.begin(fresh.draw())))


def create_train_state(fresh: FreshState, planned: TrainState) -> TrainState:
    """Draw a fresh state, as planned: weights on the host, the rest where it belongs.

    No device ever holds more than its part, and none has to compile what is drawn once.
    """
    with jax.default_device(sharding.host_device()):
        drawn = fresh.draw()
    places = jax.tree.map(lambda x: x.sharding, planned)
    wanted = {"params": places.params, "batch_stats": places.batch_stats}
    variables = jax.tree.map(lambda x, place: jax.device_put(np.asarray(x), place), drawn, wanted)
    return jax.jit(fresh.begin, out_shardings=places, donate_argnums=0)(variables)


def check_weights(
    state: TrainState, loaded: Bundle, *, load: str
) -> tuple[dict[str, jax.Array], dict[str, jax.Array | jax.ShapeDtypeStruct]]:
    """What a bundle holds and what of it a state, which may be a planned one, takes; arguments as for `load_weights`.

    Raises:
        BundleError: a weight that was asked for is missing or has another shape.
    """
    found = flatten(loaded.variables)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    own = {path: x for path, x in flatten(variables).items() if not is_update(path)}  # of which no bundle has any
    wanted = {path: x for path, x in own.items() if load == "all" or path.split("/")[1] == "encoder"}
    anew = STAGE_NORM if load == "encoder" else SPREAD
    missing = [path for path in wanted if path not in found and not anew.fullmatch(path)]
    if missing:
        raise BundleError(f"{loaded.path}: no {name_list(missing)}; config.load is {load!r}")
    for path in wanted:
        if path in found and found[path].shape != wanted[path].shape:
            raise BundleError(
                f"{loaded.path}: {path} has shape {found[path].shape}, the model of this config {wanted[path].shape}"
            )
    return found, wanted


def load_weights(state: TrainState, loaded: Bundle, *, load: str) -> TrainState:
    """Put a bundle's weights into a fresh state, and say what was not loaded.

    Args:
        state: fresh, its shardings decided.
        loaded: the bundle; its task may be another one where only the encoder is taken.
        load: `all` (every weight and batch statistic, each of which must be there, but for a spread that the bundle
            doesn't have) or `encoder`. Low-rank updates are new in any case.

    Raises:
        BundleError: a weight that was asked for is missing or has another shape.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found, wanted = check_weights(state, loaded, load=load)

    def take(path: Any, leaf: jax.Array) -> jax.Array:
        name = "/".join(part.key for part in path)
        if name not in wanted or name not in found:
            fresh.append(name)
            return leaf
        return jax.device_put(np.asarray(found[name], leaf.dtype), leaf.sharding)

    fresh: list[str] = []
    variables = jax.tree_util.tree_map_with_path(take, variables)
    unused = sorted(set(found) - set(wanted))
    log.info("%s: %d of %d arrays loaded", loaded.path, len(found) - len(unused), len(found))
    for what, names in (("not loaded, drawn anew", fresh), ("in the bundle, not used", unused)):
        if names:
            log.info("%s: %d arrays, of %s", what, len(names), name_list(_parts(names)))
    ema = jax.tree.map(jnp.copy, variables) if state.ema is not None else None
    return dataclasses.replace(state, params=variables["params"], batch_stats=variables["batch_stats"], ema=ema)


def _parts(paths: Iterable[str]) -> list[str]:
    """The parts of a model that arrays belong to: `params/decoder/bottleneck/conv/kernel` is of decoder/bottleneck."""
    return sorted({"/".join(path.split("/")[1:3]) for path in paths})
