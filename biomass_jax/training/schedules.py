"""Learning rate by step. What validation decides (plateau) is in plateau.py."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("constant", "plateau", "cosine", "multistep")


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
        kind: one of `KINDS`.
        learning_rate: the highest rate.
        warmup_steps: 0 for none.
        warmup_from: rate of step 0 of a warm-up.
        total_steps: length of the cosine; read by it alone.
        min_lr: end of the cosine.
        milestones: increasing steps; read by `multistep` alone, like `gamma`.
        gamma: factor at each milestone.

    Raises:
        ValueError: unknown kind, a warm-up that outlasts the cosine or a milestone, or milestones that do not increase.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "cosine" and not warmup_steps < total_steps:
        raise ValueError(f"cosine schedule: the warm-up of {warmup_steps} steps must be shorter than all {total_steps}")
    if kind == "multistep" and not _increasing([warmup_steps - 1, *milestones]):
        raise ValueError(f"multistep schedule: milestones {list(milestones)} must increase from {warmup_steps} on")

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


def _increasing(values: Sequence[int]) -> bool:
    return all(low < high for low, high in zip(values, values[1:], strict=False))
