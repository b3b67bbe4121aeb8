"""Training metrics on their way from the device: means over a window of steps, and the watch for numbers gone wrong."""

import math
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from biomass_jax.data.sources import Chip

AHEAD = 2  # steps that may be under way: more would hold more batches in memory, fewer would leave the device waiting


class NotFinite(ArithmeticError):
    """The loss became NaN or infinite; the message names the step and the batch's chips."""


class TrainMetrics:
    """Losses of the steps since the last line, without making the device wait for the host.

    Each step's numbers are read when the step after the next is given to the device.
    """

    def __init__(self, losses: list[float]) -> None:
        """Begin with the losses of an unfinished window, from a checkpoint."""
        self.losses = list(losses)
        self.last: dict[str, float] = {}
        self._under_way: deque[tuple[int, dict[str, jax.Array], list[Chip]]] = deque()

    def add(self, step: int, metrics: dict[str, jax.Array], chips: list[Chip]) -> None:
        """Take the numbers of a step that was just dispatched.

        Args:
            step: number of steps with this one.
            metrics: scalars on the device.
            chips: of this process's part of the batch.

        Raises:
            NotFinite: an earlier step's loss.
        """
        self._under_way.append((step, metrics, chips))
        while len(self._under_way) > AHEAD:
            self._read()

    def flush(self) -> None:
        """Wait for all steps that are under way; raises `NotFinite`."""
        while self._under_way:
            self._read()

    def mean(self) -> float:
        """Mean loss of the window, which then begins anew. Call `flush` before."""
        mean = float(np.mean(self.losses))
        self.losses = []
        return mean

    def _read(self) -> None:
        step, metrics, chips = self._under_way.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            names = ", ".join(chip.chip_id for chip in chips)
            raise NotFinite(f"the loss became {values['loss']} at step {step}; the batch's chips: {names}")
        self.losses.append(values["loss"])
        self.last = values


class Clock:
    """Where the time goes: chips a second, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a window."""
        self._began, self._waited, self._chips, self._steps = time.perf_counter(), 0.0, 0, 0

    def next(self, batches: Any) -> Any:
        """The next batch of an iterator, the time it took counted as waiting."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def step(self, chips: int) -> None:
        """Count a step of `chips` chips over all processes."""
        self._chips += chips
        self._steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        """`perf/*` of the window, which then begins anew."""
        seconds = time.perf_counter() - self._began
        values = {
            "perf/chips_per_s": self._chips / seconds,
            "perf/step_s": seconds / self._steps,
            "perf/waiting": self._waited / seconds,
            "perf/eta_s": seconds / self._steps * steps_left,
        }
        self.restart()
        return values
