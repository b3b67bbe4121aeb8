"""The training loop, for any task: steps, lines, validation, checkpoints, the best model as a bundle."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from biomass_jax import figures
from biomass_jax.errors import TrainingError
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.pipeline.batches import Feed
from biomass_jax.runtime.processes import exchange, local_rows
from biomass_jax.runtime.progress import duration
from biomass_jax.tasks.base import Task
from biomass_jax.training import plateau
from biomass_jax.training.checkpoint import FIGURES, LOSS, Checkpoints, HostState, export_best
from biomass_jax.training.monitor import Clock, Profiler, TrainMetrics, Writer
from biomass_jax.training.state import TrainState
from biomass_jax.training.steps import Steps, compiled

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """One run from where it stands to its end.

    At an epoch's end: validate, move the counters (plateau, early stopping, best), save, write the line, export the
    best. A run that was killed between two of these does the rest when it is started again.
    """

    workdir: Path  # where the run writes
    task: Task
    about: dict[str, Any]  # arguments of `bundle.save` that are known before training
    steps: Steps
    state: TrainState  # fresh, loaded or restored; then the newest
    host: HostState
    feed: Feed
    checkpoints: Checkpoints
    writer: Writer
    profiler: Profiler
    batch_size: int  # chips a step over all devices and processes
    steps_per_epoch: int  # whole batches in the training split
    total_steps: int
    log_every: int  # steps between lines
    save_every: int  # steps between checkpoints within an epoch; 0 = at its end only
    draw_every: int  # epochs between pictures of validation chips; 0 = none

    def __post_init__(self) -> None:
        self.metrics, self.clock = TrainMetrics(self.host.window), Clock()
        self._compiled: Any = None

    def close(self) -> None:
        """Finish writing everything."""
        self.profiler.close()
        self.checkpoints.close()
        self.writer.close()

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.host.step

    def fit(self, stop: Callable[[], bool]) -> bool:
        """Train to the end.

        Args:
            stop: whether to save and leave; asked after each step.

        Returns:
            whether the run is finished; False = it was stopped, and can be started again.

        Raises:
            TrainingError: the loss isn't finite any more.
        """
        self._finish_epoch()
        batches = self.feed.batches(start=self.step)
        self.clock.restart()
        while not self._done():
            batch = self.clock.next(batches)
            try:
                self._train(batch)
            except TrainingError as error:
                last = self.checkpoints.latest
                good = f"{self.checkpoints.folder}/step_{last}" if last is not None else "none"
                raise TrainingError(f"{error}. The last good checkpoint: {good}") from error
            if stop() and not self._done():
                log.info("stopping at step %d: saving", self.step)
                self._flush()
                self._save(None)
                self.checkpoints.wait()
                return False
        self.checkpoints.wait()
        return True

    def _train(self, batch: pipeline.Batch) -> None:
        """One step and whatever is due after it, in this order."""
        if self._compiled is None:
            self._compiled = compiled(self.steps.train, self.state, batch.arrays)
            self.clock.restart()  # compiling says nothing of how long the rest takes
        with jax.transfer_guard("disallow"):  # everything is where the step wants it, or was put there on purpose
            self.state, metrics = self._compiled(self.state, batch.arrays)
        self.host.step += 1
        self.metrics.add(self.step, metrics, batch.chips)
        self.clock.step(self.batch_size)
        self.profiler.after_step(self.step)
        self.checkpoints.check()  # a disk that is full ends the run now, not at the next save hours later
        last = self.step == self.total_steps
        if self.step % self.log_every == 0 or last:
            self._flush()
            self._log()
        if self.step % self.steps_per_epoch == 0 or last:
            self._flush()
            self._end_epoch()
        elif self.save_every and self.step % self.save_every == 0:
            self._flush()
            self._save(None)

    def _flush(self) -> None:
        self.metrics.flush()
        self.host.window = self.metrics.losses

    def _log(self) -> None:
        """The line of the window that ends here."""
        mean, last = self.metrics.mean(), self.metrics.last
        self.host.window = []
        perf = self.clock.read(self.total_steps - self.step)
        values = {"train/loss": mean} | {f"train/{name}": last[name] for name in last if name != "loss"}
        self.writer.write(self.step, values | perf)
        log.info(
            "step %d of %d: loss %.4g, %.1f chips/s, %.1f %% waiting for data, %s left",
            self.step,
            self.total_steps,
            mean,
            perf["perf/chips_per_s"],
            100 * perf["perf/waiting"],
            duration(perf["perf/eta_s"]),
        )

    def _end_epoch(self) -> None:
        """Validate, counters, save; the rest is `_finish_epoch`."""
        host = self.host
        draws = self.draw_every > 0 and ((host.epoch + 1) % self.draw_every == 0 or self.step == self.total_steps)
        results = self.validate(picture=draws)
        loss = results[LOSS]
        if host.plateau is not None:
            host.plateau = plateau.plateau_step(host.plateau, loss)
            self.state = self.state.with_learning_rate(host.plateau["lr"])
        if host.early_stop is not None:
            host.early_stop = plateau.early_stop_step(host.early_stop, loss)
        if host.best is None or loss < host.best["loss"]:
            host.best = {"step": self.step, "loss": loss, "scores": results}
        host.epoch += 1
        host.line = {"epoch": host.epoch} | results
        self._save(loss)
        self._finish_epoch()
        self.clock.restart()

    def _finish_epoch(self) -> None:
        """Write the line of the epoch that ended at this step, and export the state if it is the best so far."""
        host = self.host
        if host.line is None:
            return
        line, host.line = host.line, None
        self.writer.write(self.step, line)
        best = host.best if host.best is not None and host.best["step"] == self.step else None
        log.info(
            "epoch %d, step %d: %s%s",
            line["epoch"],
            self.step,
            ", ".join(f"{k} {v:.5g}" for k, v in line.items() if isinstance(v, float)),
            ", the best so far" if best else "",
        )
        if best:
            self.checkpoints.wait()
            export_best(self.workdir, self.about, self.state, best)

    def validate(self, *, picture: bool = False) -> dict[str, Any]:
        """Scores of the validation split, each chip counting once; and a picture of its first chips."""
        scorer = self.task.scorer()
        variables = self.state.evaluated()
        for number, batch in enumerate(self.feed.validation()):
            outputs, shown = self.steps.evaluate(variables, batch.arrays, np.int32(number))
            if number == 0 and picture:
                self._draw(jax.device_get(shown), batch.chips)
            scorer.add(jax.tree.map(local_rows, outputs), local_rows(batch.arrays["valid"]))
        return scorer.results(exchange(scorer.vector()))

    def _draw(self, shown: dict[str, np.ndarray], chips: list[Any]) -> None:
        """A picture in TensorBoard and in `figures/`, the newest in place of the one before."""
        if jax.process_index() == 0:
            titles = [chip.chip_id for chip in chips if chip.chip_id][: len(next(iter(shown.values())))]
            figure = self.task.figure(shown, titles)
            self.writer.figure(self.step, "validation", figures.to_array(figure))
            folder = self.workdir / FIGURES
            folder.mkdir(exist_ok=True)
            figures.save(folder / "validation.png", figure)

    def _save(self, loss: float | None) -> None:
        if self.step != self.checkpoints.latest:
            self.checkpoints.save(self.state, self.host, loss=loss)

    def _done(self) -> bool:
        early = self.host.early_stop
        return self.step >= self.total_steps or (early is not None and early["stop"])
