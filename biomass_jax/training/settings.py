"""From fields of a config to the parts of a run that need nothing else."""

import dataclasses
import logging
from typing import Any

import jax
import optax

from biomass_jax import bundle
from biomass_jax.data import bands, sources
from biomass_jax.errors import CheckpointError, ConfigError
from biomass_jax.training import plateau, schedules
from biomass_jax.training.checks import check_values
from biomass_jax.training.optimizer import create_optimizer, import_adam
from biomass_jax.training.state import TrainState, load_weights
from biomass_jax.training.steps import Schedule

log = logging.getLogger(__name__)

PLATEAU = "plateau"


def check_fields(config: Any) -> None:
    """Refuse values that can't be, and fields that contradict each other.

    Raises:
        ConfigError: which, and what was expected.
    """
    if config.steps is None and config.epochs is None:
        raise ConfigError("neither config.steps nor config.epochs is given; add --config.epochs=N")
    check_values(config)
    if config.schedule.kind == PLATEAU and config.schedule.warmup_epochs:
        raise ConfigError(f"config.schedule.warmup_epochs with config.schedule.kind={PLATEAU}: it has no warm-up")
    if config.resume_optimizer and (config.init_from is None or config.load != "all"):
        raise ConfigError(
            "config.resume_optimizer goes with config.init_from and load='all': moments belong to weights"
        )
    if config.resume_optimizer and config.optimizer.freeze:
        raise ConfigError("config.resume_optimizer with config.optimizer.freeze: frozen weights have no moments")


def open_splits(config: Any) -> tuple[sources.Source, sources.Source]:
    """Training and validation chips.

    Raises:
        ConfigError: no path, or too few training chips for a batch.
        DataError: see `sources.open_source`.
    """
    if not config.data.path:
        raise ConfigError("config.data.path is not given; add --config.data.path=FOLDER, shards or GeoTIFF folders")
    train, valid = (_open(config, split) for split in ("train", "val"))
    for split, source in (("train", train), ("val", valid)):
        least = config.batch_size if split == "train" else 1
        if len(source) < least:
            raise ConfigError(
                f"{config.data.path}: split {split} has {len(source)} chips; expected at least {least} "
                f"(config.batch_size is {config.batch_size})"
            )
    return train, valid


def _open(config: Any, split: str) -> sources.Source:
    """A data set, or several with weights, their folders separated by commas."""
    paths, weights = config.data.path.split(","), tuple(config.data.get("weights", ()))
    names = bands.parse_band_list(config.data.bands)
    if weights or len(paths) > 1:
        if len(weights) != len(paths):
            raise ConfigError(f"config.data.weights has {len(weights)} numbers, config.data.path {len(paths)} folders")
        return sources.open_mixture(list(zip(paths, weights, strict=True)), split, bands=names)
    return sources.open_source(config.data.path, split, bands=names)


def make_optimizer(config: Any, params: Any) -> optax.GradientTransformation:
    """AdamW as the config has it; `reference` decays every parameter."""
    group = config.optimizer
    try:
        return create_optimizer(
            params,
            weight_decay=group.weight_decay,
            decay="all" if config.get("reference") else group.decay,
            betas=tuple(group.betas),
            clip_norm=group.clip_norm or None,
            layer_decay=group.layer_decay,
            freeze=tuple(group.freeze),
        )
    except ValueError as error:
        raise ConfigError(f"config.optimizer: {error}") from error


def learning_rate(config: Any) -> float:
    """The peak rate: scaled by the global batch where the config names the batch that its rate belongs to."""
    group = config.optimizer
    scale = config.batch_size / group.reference_batch if group.reference_batch else 1.0
    return group.learning_rate * scale


def make_schedule(config: Any, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Learning rate by step; under `plateau` the state's own is used instead.

    Raises:
        ConfigError: a warm-up or milestones that don't fit the run's length.
    """
    group = config.schedule
    peak = learning_rate(config)
    scale = peak / config.optimizer.learning_rate if config.optimizer.learning_rate else 1.0
    try:
        return schedules.create_schedule(
            "constant" if group.kind == PLATEAU else group.kind,
            learning_rate=peak,
            warmup_steps=round(group.warmup_epochs * steps_per_epoch),
            warmup_from=group.warmup_from * scale,
            total_steps=total_steps,
            min_lr=group.min_lr * scale,
            milestones=tuple(round(epoch * steps_per_epoch) for epoch in group.milestones),
            gamma=group.gamma,
        )
    except ValueError as error:
        raise ConfigError(f"config.schedule: {error}") from error


def fresh_host(config: Any) -> dict[str, Any]:
    """What the host knows of a run that has not begun; see `Run.host`."""
    group = config.schedule
    moved = group.kind == PLATEAU
    rule = {"factor": group.factor, "patience": group.patience, "threshold": group.threshold, "min_lr": group.min_lr}
    return {
        "step": 0,
        "epoch": 0,
        "window": [],
        "plateau": plateau.plateau_init(learning_rate(config), **rule) if moved else None,
        "early_stop": plateau.early_stop_init(group.stop_patience) if group.stop_patience else None,
        "best": None,
        "line": None,
        "config": config.to_dict(),
    }


def resume_host(saved: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """What the host knows of a run that goes on: as saved, with the config and the patience of now.

    Raises:
        CheckpointError: one of the two has a plateau and the other has none.
    """
    if (saved["plateau"] is None) != (fresh["plateau"] is None):
        raise CheckpointError(
            f"config.schedule.kind: a run can't change to {PLATEAU} or from it; go on with the config that the "
            "checkpoint was written with, or start in another workdir"
        )
    before, early = saved["early_stop"], fresh["early_stop"]
    if before is not None and early is not None:
        early = before | {"patience": early["patience"], "stop": before["wait_count"] >= early["patience"]}
    return saved | {"config": fresh["config"], "early_stop": early}


def start_from(
    state: TrainState, host: dict[str, Any], loaded: bundle.Bundle, config: Any
) -> tuple[TrainState, dict[str, Any]]:
    """Weights of a bundle, and its optimiser's state where `resume_optimizer` asks for it.

    Raises:
        ConfigError: the bundle has no optimiser state.
        BundleError: weights or moments that don't fit.
    """
    found = bundle.load_optimizer(loaded) if config.resume_optimizer else None
    if config.resume_optimizer and found is None:
        raise ConfigError(
            f"config.resume_optimizer: {loaded.path} holds no optimizer/; convert the full Lightning file "
            "(biomass_jax.convert --with-optimizer), or leave resume_optimizer off"
        )
    state = load_weights(state, loaded, load=config.load)
    if found is None:
        return state, host
    adam = import_adam(state.opt_state, found["count"], found["mu"], found["nu"])
    adam = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), adam, state.opt_state)
    state = dataclasses.replace(state, opt_state=adam)
    log.info("%s: optimiser's state after %d steps, learning rate %g", loaded.path, found["count"], found["lr"])
    if host["plateau"] is not None and "plateau" in found:
        host = host | {"plateau": plateau.plateau_from_bundle(found)}
        rate = jax.numpy.asarray(host["plateau"]["lr"], jax.numpy.float32)
        placed = jax.device_put(rate, state.learning_rate.sharding)
        state = dataclasses.replace(state, learning_rate=placed)
    return state, host
