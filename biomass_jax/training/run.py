"""A training run: set up from its config top to bottom, trained and validated by the loop, its best model exported."""

import dataclasses
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from biomass_jax import bundle
from biomass_jax.data import bands, sources
from biomass_jax.data.blocks import Drawn, draw_blocks
from biomass_jax.errors import CheckpointError, ConfigError, name_list
from biomass_jax.models.lora import is_update
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.pipeline.batches import Feed
from biomass_jax.runtime import mesh as sharding
from biomass_jax.runtime import numerics, processes
from biomass_jax.runtime.files import write_json
from biomass_jax.runtime.settings import changed_fields, known_fields
from biomass_jax.tasks.base import Task
from biomass_jax.tasks.create import choose, chosen_lora
from biomass_jax.training import plateau
from biomass_jax.training.checkpoint import BEST, FIGURES, FOLDER, Checkpoints, HostState
from biomass_jax.training.config import PLATEAU, check_fields
from biomass_jax.training.loop import Run
from biomass_jax.training.monitor import METRICS, Profiler, Writer
from biomass_jax.training.optimizer import all_but, create_optimizer, create_schedule, import_adam, trainable_mask
from biomass_jax.training.state import (
    FreshState,
    TrainState,
    check_weights,
    create_train_state,
    load_weights,
    plan_train_state,
)
from biomass_jax.training.steps import Schedule, Steps, StepSettings, compile_steps
from biomass_jax.trees import flatten

log = logging.getLogger(__name__)

# A run may resume with other values of these without a word.
MAY_CHANGE = (
    "log_every",
    "steps",
    "epochs",
    "profile",
    "overwrite",
    "data.threads",
    "data.cache",
    "data.verify",
    "mesh.",
    "checkpoint.",
)
# It can't with others of these: they decide which chips are learnt from when, or what `val/loss` is.
MUST_STAY = {"mode", "batch_size", "seed", "loss", "huber_delta", "nll_beta", "reference", "spread_only", "lora.alpha"}
MUST_STAY |= {"mask_patch_size", "mask_ratio", "skip_nodata", "normalize_targets"}
MUST_STAY |= {"data.weights", "data.bootstrap", "data.bands", "data.encoding", "data.label_max", "data.label"}
TRAINING_ONLY = ("drop_path_rate", "head_dropout")  # fields of a module that change nothing of what it is


def train_and_evaluate(config: ConfigDict, workdir: Path, *, stop: Callable[[], bool]) -> bool:
    """Train as the config says, from where the workdir stands.

    Args:
        config: of configs/finetune_*.py or configs/pretrain_*.py.
        workdir: of the run: `checkpoints/`, `metrics.jsonl`, TensorBoard events and `best/`, a bundle.
        stop: whether to save and leave; asked after each step.

    Returns:
        whether the run is finished; False = it was stopped, and can be started again.

    Raises:
        ConfigError, DataError, BundleError, CheckpointError: before the first step.
        TrainingError: the loss became NaN or infinite.
    """
    check_fields(config)
    with numerics.fixed(), jax.default_matmul_precision(config.matmul_precision):
        run = set_up(config, workdir, command=shlex.join(["python", "-m", "biomass_jax.main", *sys.argv[1:]]))
        try:
            if jax.process_index() == 0:  # not before: a config that is refused must not take an earlier run's place
                write_json(workdir / "config.json", json.loads(config.to_json()))
            finished = run.fit(stop)
        finally:
            run.close()
    if finished and run.host.best is not None:
        best = run.host.best
        log.info("finished; the best model, of step %d, val/loss %.5g: %s", best["step"], best["loss"], workdir / BEST)
    return finished


def set_up(config: ConfigDict, workdir: Path, *, command: str) -> Run:
    """Build a run from its config, resumed from the newest checkpoint where the workdir has one.

    Args:
        config: of configs/finetune_*.py or configs/pretrain_*.py, which `check_fields` has let pass.
        workdir: where the run writes.
        command: that started it, for provenance.

    Raises:
        ConfigError, DataError, BundleError, CheckpointError: see there.
    """
    profiler = Profiler(config.profile, workdir / "profile")
    mesh = sharding.create_mesh(sharding.all_devices(), **config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.optimizer.gradient_accumulation)
    train, valid = open_splits(config)
    loaded = bundle.load(config.init_from) if config.init_from else None
    task, about = choose(config, train, loaded, command=command)
    train = drawn_anew(config, train)  # after the statistics, which all members of an ensemble share
    steps_per_epoch = pipeline.steps_per_epoch(train, config.batch_size)
    total_steps = config.steps or config.epochs * steps_per_epoch
    plan = plan_steps(config, task, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    plan.host.inputs = inputs_of(train, valid, about, loaded)
    if config.overwrite:  # as late as this: a config that can't run must not cost an earlier run
        clear(workdir)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    resumed = checkpoints.latest
    if mesh.size > 1:
        log.info("what lies where on %d devices (%s):\n%s", mesh.size, mesh.shape, sharding.state_table(plan.state))
    if resumed is None:
        if loaded is not None:
            check_start(plan.state, loaded, config)
        state, host = create_train_state(plan.fresh, plan.state), plan.host
        if loaded is not None:
            state, host = start_from(state, host, loaded, config)
    else:
        state, saved = checkpoints.restore(plan.state, step=resumed)
        check_same(saved, plan.host, workdir)
        tell_changes(saved.config, plan.host.config, workdir)
        host = resume_host(saved, plan.host)
        log.info("%s: resuming from step %d of %d", workdir, resumed, total_steps)
    data = {name: config.data[name] for name in ("threads", "cache")}
    return Run(
        workdir=workdir,
        task=task,
        about=about,
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
class PlannedRun:
    """A run's state and steps as they will be; nothing is computed yet."""

    fresh: FreshState  # how its state is drawn
    state: TrainState  # that state's shapes, dtypes and shardings
    steps: Steps  # to be compiled when they are first called
    host: HostState  # of a run that has not begun


def plan_steps(
    config: ConfigDict, task: Task, mesh: sharding.DeviceMesh, *, total_steps: int, steps_per_epoch: int
) -> PlannedRun:
    """From config and task to the jitted steps.

    Raises:
        ConfigError: fields of the model, the optimiser or the schedule.
    """
    try:
        params = jax.eval_shape(task.init, jax.random.key(0))["params"]
    except ValueError as error:  # heads that don't divide channels, stages that aren't there
        raise ConfigError(f"config.model: {error}") from error
    optimizer = make_optimizer(config, params)
    schedule = make_schedule(config, total_steps, steps_per_epoch)
    host = fresh_host(config)
    ema_decay = config.optimizer.ema_decay
    rate = host.plateau["lr"] if host.plateau else None
    fresh, state = plan_train_state(task, optimizer, mesh, seed=config.seed, ema=ema_decay > 0, learning_rate=rate)
    settings = StepSettings(
        seed=config.seed,
        accumulation=config.optimizer.gradient_accumulation,
        ema_decay=ema_decay,
        trainable=trainable_mask(params, frozen(config, params)),
    )
    return PlannedRun(fresh, state, compile_steps(task, optimizer, schedule, settings, mesh, state), host)


def open_splits(config: ConfigDict) -> tuple[sources.Source, sources.Source]:
    """Training and validation chips.

    Raises:
        ConfigError: no path, or too few training chips for a batch.
        DataError: see `sources.open_source`.
    """
    if not config.data.path:
        raise ConfigError("config.data.path is not given; add --config.data.path=FOLDER, shards or GeoTIFF folders")
    train, valid = (open_split(config, split) for split in ("train", "val"))
    for split, source in (("train", train), ("val", valid)):
        least = config.batch_size if split == "train" else 1
        if len(source) < least:
            raise ConfigError(
                f"{config.data.path}: split {split} has {len(source)} chips; expected at least {least} "
                f"(config.batch_size is {config.batch_size})"
            )
    return train, valid


def open_split(config: ConfigDict, split: str) -> sources.Source:
    """A data set, or several with weights, their folders separated by commas; errors as for `open_splits`."""
    paths, weights = config.data.path.split(","), tuple(config.data.get("weights", ()))
    chosen = {name: config.data[name] for name in ("encoding", "label_max", "label", "verify")}
    chosen["bands"] = bands.parse_band_list(config.data.bands)
    if weights or len(paths) > 1:
        if len(weights) != len(paths):
            raise ConfigError(f"config.data.weights has {len(weights)} numbers, config.data.path {len(paths)} folders")
        return sources.open_mixture(list(zip(paths, weights, strict=True)), split, **chosen)
    return sources.open_source(config.data.path, split, **chosen)


def drawn_anew(config: ConfigDict, train: sources.Source) -> sources.Source:
    """The training chips, or a draw of their blocks where `data.bootstrap` asks for one; all processes get the same.

    Raises:
        DataError: see `draw_blocks`.
    """
    seed = config.data.get("bootstrap")
    if seed is None:
        return train
    numbers = draw_blocks(train, seed) if jax.process_index() == 0 else None  # which looks at every chip
    return Drawn(train, json.loads(processes.gather(json.dumps(numbers).encode())[0]))


def make_optimizer(config: ConfigDict, params: dict[str, Any]) -> optax.GradientTransformation:
    """AdamW as the config has it; `reference` decays every parameter."""
    group = config.optimizer
    return create_optimizer(
        params,
        weight_decay=group.weight_decay,
        decay="all" if config.get("reference") else group.decay,
        betas=tuple(group.betas),
        clip_norm=group.clip_norm or None,
        layer_decay=group.layer_decay,
        freeze=frozen(config, params),
    )


def frozen(config: ConfigDict, params: dict[str, Any]) -> tuple[str, ...]:
    """Names of the parameters that stay.

    Those of `freeze`; with `spread_only` all but the spread's; with `lora` the encoder's, but for the updates.
    """
    rest = all_but(params, "head/spread") if config.get("spread_only") else ()
    if chosen_lora(config) is not None:
        rest = tuple(path for path in flatten(params) if path.startswith("encoder/") and not is_update(path))
    return (*config.optimizer.freeze, *rest)


def learning_rate(config: ConfigDict) -> float:
    """The peak rate: scaled by the global batch where the config names the batch that its rate belongs to."""
    group = config.optimizer
    scale = config.batch_size / group.reference_batch if group.reference_batch else 1.0
    return group.learning_rate * scale


def make_schedule(config: ConfigDict, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Learning rate by step; under `plateau` the state's own is used instead.

    Raises:
        ConfigError: a warm-up or milestones that don't fit the run's length.
    """
    group = config.schedule
    peak = learning_rate(config)
    scale = peak / config.optimizer.learning_rate if config.optimizer.learning_rate else 1.0
    return create_schedule(
        group.kind,
        learning_rate=peak,
        warmup_steps=round(group.warmup_epochs * steps_per_epoch),
        warmup_from=group.warmup_from * scale,
        total_steps=total_steps,
        min_lr=group.min_lr * scale,
        milestones=tuple(round(epoch * steps_per_epoch) for epoch in group.milestones),
        gamma=group.gamma,
    )


def fresh_host(config: ConfigDict) -> HostState:
    """What the host knows of a run that has not begun."""
    group = config.schedule
    rule = {"factor": group.factor, "patience": group.patience, "threshold": group.threshold, "min_lr": group.min_lr}
    return HostState(
        config=config.to_dict(),
        plateau=plateau.plateau_init(learning_rate(config), **rule) if group.kind == PLATEAU else None,
        early_stop=plateau.early_stop_init(group.stop_patience) if group.stop_patience else None,
    )


def resume_host(saved: HostState, fresh: HostState) -> HostState:
    """What the host knows of a resumed run: as saved, with the config and the patience of now.

    Raises:
        CheckpointError: one of the two has a plateau and the other has none.
    """
    if (saved.plateau is None) != (fresh.plateau is None):
        raise CheckpointError(
            f"config.schedule.kind: a run can't change to {PLATEAU} or from it; resume with the config that the "
            "checkpoint was written with, or start in another workdir"
        )
    before, early = saved.early_stop, fresh.early_stop
    if before is not None and early is not None:
        early = before | {"patience": early["patience"], "stop": before["wait_count"] >= early["patience"]}
    return dataclasses.replace(saved, config=fresh.config, early_stop=early, inputs=fresh.inputs)


def inputs_of(
    train: sources.Source, valid: sources.Source, about: dict[str, Any], loaded: bundle.Bundle | None
) -> dict[str, Any]:
    """What a run learns from, beside its config; a run resumes with the same alone.

    Args:
        train: chips, which the first process looks at for all.
        valid: likewise.
        about: what `tasks.create.choose` gives: statistics and architecture.
        loaded: the bundle of `config.init_from`.
    """
    found = {**taken_from(about), "init_from": loaded and {"weights_sha256": loaded.weights_sha256}}
    data = {}
    if jax.process_index() == 0:
        data = {source.info.split: {"chips": len(source), "sha256": source.digest()} for source in (train, valid)}
    found["data"] = json.loads(processes.gather(json.dumps(data).encode())[0])
    return json.loads(json.dumps(found))


def taken_from(about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The statistics and the architecture that values depend on, of `about` or of what a bundle's file says."""
    model = {name: value for name, value in about["architecture"].items() if name not in TRAINING_ONLY}
    return {"statistics": {name: about["input"].get(name) for name in ("means", "stds")}, "model": model}


def check_start(state: TrainState, loaded: bundle.Bundle, config: ConfigDict) -> None:
    """Refuse a bundle that the run can't begin with, before anything is compiled.

    Raises:
        ConfigError: the bundle has no optimiser state, which `resume_optimizer` asks for.
        BundleError: weights that don't fit.
    """
    if config.resume_optimizer and not (loaded.path / "optimizer").is_dir():
        raise ConfigError(
            f"config.resume_optimizer: {loaded.path} holds no optimizer/; convert the full Lightning file "
            "(biomass_jax.convert --with-optimizer), or leave resume_optimizer off"
        )
    found, wanted = check_weights(state, loaded, load=config.load)
    if config.resume_optimizer and (new := [path for path in wanted if path not in found]):
        raise ConfigError(
            f"config.resume_optimizer: {loaded.path} has no {name_list(new)}, nor moments of them; leave "
            "resume_optimizer off, or train its spread first (--config.spread_only=True)"
        )


def start_from(
    state: TrainState, host: HostState, loaded: bundle.Bundle, config: ConfigDict
) -> tuple[TrainState, HostState]:
    """Weights of a bundle, and its optimiser's state where `resume_optimizer` asks for it.

    Raises:
        BundleError: weights or moments that don't fit (see `bundle.load_optimizer`).
    """
    found = bundle.load_optimizer(loaded) if config.resume_optimizer else None
    state = load_weights(state, loaded, load=config.load)
    if found is None:
        return state, host
    adam = import_adam(state.opt_state, found["count"], found["mu"], found["nu"])
    state = dataclasses.replace(state, opt_state=adam)
    log.info("%s: optimiser's state after %d steps, learning rate %g", loaded.path, found["count"], found["lr"])
    resumed = plateau.plateau_from_bundle(found) if host.plateau is not None else None
    if resumed is not None:
        host = dataclasses.replace(host, plateau=resumed)
        state = state.with_learning_rate(resumed["lr"])
    return state, host


def clear(workdir: Path) -> None:
    """Take an earlier run out of a workdir: checkpoints, lines, events, best bundle, trace."""
    if jax.process_index() == 0:
        for name in (FOLDER, BEST, FIGURES, "profile"):
            shutil.rmtree(workdir / name, ignore_errors=True)
        for path in (workdir / METRICS, *workdir.glob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)


def check_same(saved: HostState, now: HostState, workdir: Path) -> None:
    """Refuse to resume where chips, statistics, the bundle begun from or what `val/loss` means have changed.

    Raises:
        CheckpointError: what was, and what is now.
    """
    changes = [
        f"config.{change}"
        for change in changed_fields(saved.config, known_fields(saved.config, now.config))
        if change.partition(":")[0] in MUST_STAY
    ]
    if saved.inputs is None:
        log.warning(
            "%s: its checkpoint, an older version's, doesn't tell which data it is of; resumed as it is", workdir
        )
    else:
        changes += changed_fields(saved.inputs, now.inputs or {})
    if changes:
        more = f", and {len(changes) - 1} more changes" if changes[1:] else ""
        raise CheckpointError(
            f"{workdir}: can't resume at step {saved.step}, since losses before and after it could not be compared: "
            f"{changes[0]}{more}; put back what was changed, start in another workdir, or begin anew here with "
            "--config.overwrite=True"
        )


def tell_changes(before: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Warn of fields that make this another run than the one that the checkpoint is of."""
    for change in changed_fields(before, known_fields(before, now)):
        if not change.startswith(MAY_CHANGE):
            log.warning("%s: the run resumes with another config.%s", workdir, change)
