"""What a run learns: the model, its inputs from a batch, its loss as sums, its scores. The loop knows nothing else.

A loss is `finish(total, count)` of sums over the batch, so that micro-batches, devices and hosts add up to exactly the
loss of the global batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

Arrays = dict[str, Any]
SHOWN = 3  # chips in the pictures of a run


class Scorer(Protocol):
    """Adds up what `evaluate` gave, batch by batch, in float64 on the host."""

    def add(self, outputs: dict[str, np.ndarray], valid: np.ndarray) -> None:
        """Add a batch's outputs (this process's rows) and which of its rows are chips, not padding."""

    def vector(self) -> np.ndarray:
        """Everything added so far as float64 numbers, for exchange between processes."""

    def results(self, vectors: list[np.ndarray]) -> dict[str, Any]:
        """Scores, `val/loss` among them, from the vectors of all processes."""


class Task(Protocol):
    """What differs between fine-tuning and pretraining."""

    @property
    def module(self) -> Any:
        """The Flax module."""

    def init(self, key: jax.Array) -> Arrays:
        """Fresh variables: {"params", "batch_stats"}."""

    def inputs(self, batch: Arrays, key: jax.Array) -> Arrays:
        """A training batch as the model takes it: cleaned, augmented, z-scored; leading dimension B in every leaf."""

    def loss_sums(self, variables: Arrays, inputs: Arrays, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """(total, count, new batch statistics) of a batch or micro-batch, the model in training mode."""

    def finish(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """The loss of added-up sums."""

    def evaluate(self, variables: Arrays, batch: Arrays, number: jax.Array) -> tuple[Arrays, Arrays]:
        """Outputs for the scorer, leading dimension B, and of the first chips what `figure` shows.

        `number` counts the batches of a validation.
        """

    def figure(self, shown: dict[str, np.ndarray], titles: Sequence[str]) -> Any:
        """A picture of what `evaluate` showed, a chip for each title; a matplotlib figure."""

    def scorer(self) -> Scorer:
        """An empty scorer."""


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """How digital numbers become inputs: fill of the source, means and stds of the bands, float64 (6,)."""

    fill: float | None
    means: np.ndarray
    stds: np.ndarray


def first_chips(arrays: Arrays) -> Arrays:
    """The first few rows of each array, for a picture."""
    return {name: values[:SHOWN] for name, values in arrays.items()}


def model_keys(key: jax.Array) -> dict[str, jax.Array]:
    """The streams that a model in training draws from."""
    drop_path, dropout = jax.random.split(key)
    return {"drop_path": drop_path, "dropout": dropout}
