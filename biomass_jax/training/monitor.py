"""What a run says of itself: metrics on their way from the device, lines and events, where the time goes, a trace."""

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from biomass_jax.data.sources import Chip
from biomass_jax.errors import ConfigError, TrainingError
from biomass_jax.pipeline.batches import Batch
from biomass_jax.runtime.files import write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
AHEAD = 2  # steps that may be under way: more would hold more batches in memory, fewer would leave the device waiting


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
            TrainingError: an earlier step's loss became NaN or infinite; names the step and the batch's chips.
        """
        self._under_way.append((step, metrics, chips))
        while len(self._under_way) > AHEAD:
            self._read()

    def flush(self) -> None:
        """Wait for all steps that are under way; raises `TrainingError`."""
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
            raise TrainingError(f"the loss became {values['loss']} at step {step}; the batch's chips: {names}")
        self.losses.append(values["loss"])
        self.last = values


class Clock:
    """Where the time goes: chips a second, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a window."""
        self._began, self._waited, self._chips, self._steps = time.perf_counter(), 0.0, 0, 0

    def next(self, batches: Iterator[Batch]) -> Batch:
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


def tensorboard() -> tuple[Any, Any, Any]:
    """tensorboardX's modules, without torch, which it would import where it finds it: 1.6 s, 200 MB, no use."""
    barred = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    finally:
        if barred:
            del sys.modules["torch"]
    return event_file_writer, summary, event_pb2


class Events:
    """TensorBoard's file of one run.

    Written by whoever calls: the thread of tensorboardX's own writer dies of a full disk without a word, and the next
    ten events are waited for until the end of time.
    """

    def __init__(self, workdir: Path, *, purge_step: int | None) -> None:
        """Begin a file; TensorBoard hides what earlier ones hold from `purge_step` on."""
        event_file_writer, self._summary, self._proto = tensorboard()
        self._file = event_file_writer.EventsWriter(str(workdir / "events"))
        if purge_step is not None:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._write(step=purge_step, file_version="brain.Event:2")
            self._write(step=purge_step, session_log=start)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(step=step, summary=self._summary.scalar(name, value))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add a picture: uint8 (H, W, 3)."""
        self._write(step=step, summary=self._summary.image(name, image, dataformats="HWC"))

    def _write(self, **fields: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), **fields))

    def flush(self) -> None:
        """Have everything on disk."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Writer:
    """Writes scalars and figures of one run; on processes other than the first, nothing."""

    def __init__(self, workdir: Path, *, resumed: int | None, active: bool = True) -> None:
        """Open the files, cut back to where the run resumes.

        Args:
            workdir: of the run.
            resumed: step of the checkpoint that the run resumes from; None = a new run.
            active: whether this process writes at all.
        """
        self._active = active
        if not active:
            return
        path = workdir / METRICS
        cut_back(path, -1 if resumed is None else resumed)
        self._file = path.open("a", encoding="utf-8")
        self._board = Events(workdir, purge_step=None if resumed is None else resumed + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl`, and each number as a scalar in TensorBoard.

        Numbers that aren't finite are null in the file: JSON has no word for them.
        """
        if not self._active:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._board.scalar(name, value, step)
        self._board.flush()

    def figure(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture in TensorBoard: uint8 (H, W, 3)."""
        if self._active:
            self._board.image(name, image, step)
            self._board.flush()

    def close(self) -> None:
        """Close both files."""
        if self._active:
            self._file.close()
            self._board.close()


def cut_back(path: Path, step: int) -> None:
    """Take lines after `step`, validations at it and half a last line out of a `metrics.jsonl`; rewrite and rename.

    The validation at the checkpoint's step is written again by the run, from the checkpoint: a kill may have come
    before or after its line.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if line["step"] < step or (line["step"] == step and "val/loss" not in line):
            kept.append(text + "\n")
    write_text(path, "".join(kept))


def _finite(value: object) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Profiler:
    """Traces the steps START to STOP (not included) of `config.profile = 'START:STOP'` into `profile/`."""

    def __init__(self, steps: str | None, folder: Path) -> None:
        """Read the range; None = no trace.

        Raises:
            ConfigError: not `START:STOP` with 0 <= START < STOP.
        """
        self._folder, self._running = folder, False
        self._start = self._stop = -1
        if steps:
            first, colon, last = steps.partition(":")
            if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
                raise ConfigError(f"config.profile is {steps!r}; expected START:STOP, two numbers of steps, as 10:20")
            self._start, self._stop = int(first), int(last)

    def after_step(self, step: int) -> None:
        """Begin or end the trace where `step` steps have been taken."""
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step >= self._stop and self._running:
            self.close()

    def close(self) -> None:
        """End a trace that is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("trace of steps %d to %d: %s", self._start, self._stop, self._folder)
