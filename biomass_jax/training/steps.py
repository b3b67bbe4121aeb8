"""One optimiser step and one evaluation of a batch: pure functions, and the one place that compiles them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from biomass_jax.runtime import cpu
from biomass_jax.runtime import mesh as sharding
from biomass_jax.tasks.base import Task
from biomass_jax.training.optimizer import apply_updates
from biomass_jax.training.state import TrainState

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step needs beside the task and the optimiser.

    The loss of micro-batches and its gradient are those of the whole batch; batch norms use each one's own statistics.
    """

    seed: int  # of everything that is drawn
    accumulation: int = 1  # micro-batches a step
    ema_decay: float = 0.0  # of the averages of weights and batch statistics, where the state holds them
    trainable: Any = None  # tree of bool like the parameters; gradients of the others are not computed


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: state, batch [B, ...] -> state, {"loss", "learning_rate", "grad_norm", "count"}, float32 scalars.

    What is drawn depends on the seed, the step and the row in the global batch alone.
    """
    inputs_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), state.step))
    inputs = task.inputs(batch, inputs_key)
    total, count, grads, batch_stats = accumulated_sums(state, inputs, model_key, task=task, settings=settings)
    loss, slope = jax.value_and_grad(task.finish)(total, count)
    grads = jax.tree.map(lambda g: slope * g, grads)
    learning_rate = schedule(state.step) if state.learning_rate is None else state.learning_rate
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates, learning_rate)
    # Handed on as they are, what is frozen needs no second place in memory.
    params = jax.tree.map(lambda new, old, on: new if on else old, params, state.params, settings.trainable)
    ema = state.ema
    if ema is not None:
        decay, new = settings.ema_decay, {"params": params, "batch_stats": batch_stats}
        ema = jax.tree.map(functools.partial(_average, decay), ema, new)
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.learning_rate)
    norm = optax.tree.norm(grads)
    return state, {"loss": loss, "learning_rate": learning_rate, "grad_norm": norm, "count": count}


def _average(decay: float, old: jax.Array, value: jax.Array) -> jax.Array:
    # The average of two equal numbers is that number, which rounding can miss: what is frozen stays.
    return jnp.where(old == value, old, decay * old + (1 - decay) * value)


def accumulated_sums(
    state: TrainState, inputs: dict[str, jax.Array], key: jax.Array, *, task: Task, settings: StepSettings
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """(total, count, gradient of total, batch statistics) over all micro-batches of a batch."""
    chosen, structure = jax.tree.leaves(settings.trainable), jax.tree.structure(state.params)
    leaves = jax.tree.leaves(state.params)

    def joined(trained: list[jax.Array], rest: Callable[[jax.Array], jax.Array]) -> Any:
        """A tree like the parameters; `rest` makes of what is frozen what stands there."""
        each = iter(trained)
        return jax.tree.unflatten(
            structure, [next(each) if on else rest(leaf) for leaf, on in zip(leaves, chosen, strict=True)]
        )

    def sums(trained: list[jax.Array], batch_stats: Any, rows: Any, number: Any) -> tuple[jax.Array, Any]:
        params = joined(trained, lambda leaf: leaf)
        variables = {"params": params, "batch_stats": batch_stats}
        total, count, batch_stats = task.loss_sums(variables, rows, jax.random.fold_in(key, number))
        return total, (count, batch_stats)

    gradient = jax.value_and_grad(sums, has_aux=True)
    trained = [leaf for leaf, on in zip(leaves, chosen, strict=True) if on]
    parts = settings.accumulation
    if parts == 1:
        (total, (count, batch_stats)), grads = gradient(trained, state.batch_stats, inputs, 0)
        return total, count, joined(grads, jnp.zeros_like), batch_stats
    # Every parts-th row, so that each device has its share of every micro-batch.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), inputs)

    def add(carry: Any, micro: Any) -> tuple[Any, None]:
        total, count, grads, batch_stats = carry
        number, rows = micro
        (new_total, (new_count, batch_stats)), new = gradient(trained, batch_stats, rows, number)
        return (total + new_total, count + new_count, jax.tree.map(jnp.add, grads, new), batch_stats), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, trained), state.batch_stats)
    total, count, grads, batch_stats = jax.lax.scan(add, start, (jnp.arange(parts), split))[0]
    return total, count, joined(grads, jnp.zeros_like), batch_stats


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled functions: `train(state, batch)` (the state is given away) and `evaluate(variables, batch, n)`."""

    train: Any
    evaluate: Any


def compile_steps(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    settings: StepSettings,
    mesh: sharding.DeviceMesh,
    planned: TrainState,
) -> Steps:
    """Jit both steps for a mesh; `planned` is of `plan_train_state`, optimizer and schedule are of optimizer.py."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    places = jax.tree.map(lambda x: x.sharding, planned)
    step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule, settings=settings)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    train = jax.jit(
        sharding.traced_for(rows)(cpu.for_training(step) if on_cpu else step),
        in_shardings=(places, rows),
        out_shardings=(places, whole),
        donate_argnums=0,
        compiler_options=cpu.COMPILER_OPTIONS if on_cpu else None,
    )
    evaluate = jax.jit(
        sharding.traced_for(rows)(task.evaluate),
        in_shardings=(places.evaluated(), rows, whole),
        out_shardings=(rows, whole),
    )
    return Steps(train, evaluate)


def compiled(program: Any, *arguments: Any) -> Any:
    """A jitted function compiled for arguments like these, ahead of its first call."""
    found = program.lower(*arguments).compile()
    cpu.give_back_memory()  # the program would take its own on top of what the compiler has freed
    return found
