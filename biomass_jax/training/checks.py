"""What each field of a training config may hold."""

from collections.abc import Iterator
from typing import Any

from biomass_jax.errors import ConfigError
from biomass_jax.tasks.losses import KINDS
from biomass_jax.training.feed import CACHES
from biomass_jax.training.optimizer import DECAYS
from biomass_jax.training.schedules import KINDS as SCHEDULES

_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "matmul_precision": ("default", "high", "highest"),
    "load": ("all", "encoder"),
    "loss": KINDS,
    "data.cache": CACHES,
    "optimizer.decay": DECAYS,
    "schedule.kind": SCHEDULES,
}
_RATES = ("learning_rate", "reference_batch", "weight_decay", "clip_norm")
_EPOCHS = ("warmup_epochs", "warmup_from", "min_lr", "patience", "stop_patience")
# Smallest and largest value, and whether each is allowed itself.
_RANGES: tuple[tuple[float, float, str, tuple[str, ...]], ...] = (
    (1, float("inf"), "[)", ("steps", "epochs", "batch_size", "log_every", "mask_patch_size", "augment.size")),
    (1, float("inf"), "[)", ("data.threads", "checkpoint.keep", "optimizer.gradient_accumulation")),
    (0, float("inf"), "[)", ("seed", "draw_every", "checkpoint.every_steps", "augment.rotate_degrees")),
    (0, float("inf"), "[)", tuple(f"optimizer.{name}" for name in _RATES)),
    (0, float("inf"), "[)", tuple(f"schedule.{name}" for name in _EPOCHS)),
    (0, float("inf"), "()", ("huber_delta", "schedule.gamma", "model.mlp_ratio")),
    (0, 1, "[)", ("optimizer.ema_decay", "schedule.threshold", "model.drop_path_rate", "model.head_dropout")),
    (0, 1, "()", ("schedule.factor",)),
    (0, 1, "(]", ("optimizer.layer_decay", "mask_ratio")),
    (0, 1, "[]", ("augment.rotate_probability",)),
)


def check_values(config: Any) -> None:
    """Refuse values that no run can have; fields that are not given are left to others.

    Raises:
        ConfigError: the field, what it holds, what was expected.
    """
    for name, allowed in _CHOICES.items():
        for value in _given(config, name):
            if value not in allowed:
                raise ConfigError(f"config.{name} is {value!r}; expected one of {', '.join(allowed)}")
    for low, high, ends, names in _RANGES:
        for name in names:
            for value in _given(config, name):
                # NaN is in no range
                above = value >= low if ends[0] == "[" else value > low
                below = value <= high if ends[1] == "]" else value < high
                if not (above and below):
                    raise ConfigError(f"config.{name} is {value}; expected {_in_words(low, high, ends)}")
    betas = tuple(config.optimizer.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"config.optimizer.betas is {betas}; expected two numbers from 0 to below 1")


def _given(config: Any, name: str) -> Iterator[Any]:
    """The value of a dotted name where the config has it."""
    group, _, field = name.rpartition(".")
    holder = config.get(group, {}) if group else config
    value = holder.get(field)
    if value is not None:
        yield value


def _in_words(low: float, high: float, ends: str) -> str:
    start = f"from {low:g}" if ends[0] == "[" else f"above {low:g}"
    if high == float("inf"):
        return f"a number {start} on" if ends[0] == "[" else f"a number {start}"
    return f"a number {start} {'to' if ends[1] == ']' else 'to below'} {high:g}"
