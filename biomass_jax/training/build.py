"""A run from its config: data, task, optimiser, state, compiled steps."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from biomass_jax import bundle
from biomass_jax.errors import ConfigError
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.runtime import mesh as sharding
from biomass_jax.tasks.create import Choice, choose
from biomass_jax.training.checkpoint import FIGURES, FOLDER, Checkpoints, changed_fields
from biomass_jax.training.export import BEST
from biomass_jax.training.feed import Feed
from biomass_jax.training.optimizer import trainable_mask
from biomass_jax.training.profiler import Profiler
from biomass_jax.training.settings import (
    fresh_host,
    make_optimizer,
    make_schedule,
    open_splits,
    resume_host,
    start_from,
)
from biomass_jax.training.state import TrainState, create_train_state, plan_train_state, planned_state
from biomass_jax.training.steps import Steps, StepSettings, compile_steps
from biomass_jax.training.writer import METRICS, Writer

log = logging.getLogger(__name__)

# A run may go on with other values of these without a word.
MAY_CHANGE = (
    "log_every",
    "steps",
    "epochs",
    "profile",
    "overwrite",
    "data.threads",
    "data.cache",
    "mesh.",
    "checkpoint.",
)


@dataclasses.dataclass
class Run:
    """Everything that the loop works with.

    Attributes:
        workdir: where the run writes.
        choice: the task and what an exported bundle says of itself.
        steps: compiled functions.
        state: fresh, loaded or restored.
        host: plain values that are saved with the state: step, epoch, window, plateau, early_stop, best, line, config.
        feed: batches.
        checkpoints: of the run.
        writer: of the run.
        profiler: of the run.
        batch_size: chips a step over all devices and processes.
        steps_per_epoch: whole batches in the training split.
        total_steps: steps of the whole run.
        log_every: steps between lines.
        save_every: steps between checkpoints within an epoch; 0 = at its end only.
        draw_every: epochs between pictures of validation chips; 0 = none.
    """

    workdir: Path
    choice: Choice
    steps: Steps
    state: TrainState
    host: dict[str, Any]
    feed: Feed
    checkpoints: Checkpoints
    writer: Writer
    profiler: Profiler
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    log_every: int
    save_every: int
    draw_every: int

    def draws(self, epoch: int, step: int) -> bool:
        """Whether the validation after so many epochs and steps makes a picture."""
        return self.draw_every > 0 and (epoch % self.draw_every == 0 or step == self.total_steps)

    def close(self) -> None:
        """Finish writing everything."""
        self.profiler.close()
        self.checkpoints.close()
        self.writer.close()


def build_run(config: Any, workdir: Path, *, command: str) -> Run:
    """Build a run, going on from the newest checkpoint where the workdir has one.

    Args:
        config: of configs/finetune_*.py or configs/pretrain_*.py, which `check_fields` has let pass.
        workdir: where the run writes.
        command: that started it, for provenance.

    Raises:
        ConfigError, DataError, MeshError, BundleError, CheckpointError, ProfileError: see there.
    """
    profiler = Profiler(config.profile, workdir / "profile")
    mesh = sharding.create_mesh(jax.devices(), **config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.optimizer.gradient_accumulation)
    train, valid = open_splits(config)
    loaded = bundle.load(config.init_from) if config.init_from else None
    choice = choose(config, train, loaded, command=command)
    steps_per_epoch = pipeline.steps_per_epoch(train, config.batch_size)
    total_steps = config.steps or config.epochs * steps_per_epoch
    plan = plan_steps(config, choice, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if config.overwrite:  # as late as this: a config that can't run must not cost an earlier run
        clear(workdir)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    resumed, planned = checkpoints.latest, planned_state(plan.init, plan.shardings)
    if mesh.size > 1:
        log.info("what lies where on %d devices (%s):\n%s", mesh.size, mesh.shape, sharding.state_table(planned))
    if resumed is None:
        state, host = create_train_state(plan.init, plan.shardings), plan.host
        if loaded is not None:
            state, host = start_from(state, host, loaded, config)
    else:
        state, saved = checkpoints.restore(planned, step=resumed)
        tell_changes(saved["config"], plan.host["config"], workdir)
        host = resume_host(saved, plan.host)
        log.info("%s: going on from step %d of %d", workdir, resumed, total_steps)
    data = {name: config.data[name] for name in ("threads", "cache")}
    return Run(
        workdir=workdir,
        choice=choice,
        steps=plan.steps,
        state=state,
        host=host,
        feed=Feed(train, valid, mesh, batch_size=config.batch_size, seed=config.seed, **data),
        checkpoints=checkpoints,
        writer=Writer(workdir, resumed=resumed, active=jax.process_index() == 0),
        profiler=profiler,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        log_every=config.log_every,
        save_every=config.checkpoint.every_steps or 0,
        draw_every=config.draw_every,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's state and steps as they will be; nothing is computed yet.

    Attributes:
        init: draws the state.
        shardings: of the state.
        steps: to be compiled when they are first called.
        host: see `Run.host`.
    """

    init: Callable[[], TrainState]
    shardings: TrainState
    steps: Steps
    host: dict[str, Any]


def plan_steps(
    config: Any, choice: Choice, mesh: sharding.DeviceMesh, *, total_steps: int, steps_per_epoch: int
) -> Plan:
    """From config and task to the jitted steps.

    Raises:
        ConfigError: fields of the model, the optimiser or the schedule.
    """
    try:
        params = jax.eval_shape(choice.task.init, jax.random.key(0))["params"]
    except ValueError as error:  # heads that don't divide channels, stages that aren't there
        raise ConfigError(f"config.model: {error}") from error
    optimizer = make_optimizer(config, params)
    schedule = make_schedule(config, total_steps, steps_per_epoch)
    host = fresh_host(config)
    ema_decay = config.optimizer.ema_decay
    rate = host["plateau"]["lr"] if host["plateau"] else None
    init, shardings = plan_train_state(
        choice.task, optimizer, mesh, seed=config.seed, ema=ema_decay > 0, learning_rate=rate
    )
    settings = StepSettings(
        seed=config.seed,
        accumulation=config.optimizer.gradient_accumulation,
        ema_decay=ema_decay,
        trainable=trainable_mask(params, tuple(config.optimizer.freeze)),
    )
    return Plan(init, shardings, compile_steps(choice.task, optimizer, schedule, settings, mesh, shardings), host)


def clear(workdir: Path) -> None:
    """Take an earlier run out of a workdir: checkpoints, lines, events, best bundle, trace."""
    if jax.process_index() == 0:
        for name in (FOLDER, BEST, FIGURES, "profile"):
            shutil.rmtree(workdir / name, ignore_errors=True)
        for path in (workdir / METRICS, *workdir.glob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)


def tell_changes(before: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Warn of fields that make this another run than the one that the checkpoint is of."""
    for change in changed_fields(before, now):
        if not change.startswith(MAY_CHANGE):
            log.warning("%s: the run goes on with another config.%s", workdir, change)
