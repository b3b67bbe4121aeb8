"""Runs jobs: keeps what is done, hands the rest to an executor, writes records, tells what happens."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

from biomass_jax.errors import BiomassError
from data_prep.prepare.executors import Outcome, attempt
from data_prep.prepare.state import StepJob, StepRecord, StepRecords

_DIED = "its worker ended twice before it was done, for want of memory perhaps; run again with fewer workers"
Describe = Callable[[dict[str, Any]], str]


class FinishedStep(NamedTuple):
    """A finished job and its record."""

    job: StepJob
    record: StepRecord


class Runner:
    """Jobs and what became of them.

    Attributes:
        done: {step: {name: Part}} of finished jobs.
        errors: {`step name`: why it failed}.
    """

    def __init__(self, state: StepRecords, executor: Executor, say: Callable[[str], None]) -> None:
        self.state, self.executor, self.say = state, executor, say
        self.done: dict[str, dict[str, FinishedStep]] = {}
        self.errors: dict[str, str] = {}

    def run(self, step: str, jobs: Sequence[StepJob], describe: Describe, *, here: bool = False) -> None:
        """Run the jobs of a step that aren't done yet.

        Args:
            step: its name.
            jobs: with different names.
            describe: a job's result in a few words.
            here: in this process, for jobs that use the executor themselves.
        """
        self.done[step] = {}
        waiting: dict[Future, tuple[StepJob, dict[str, str]]] = {}
        kept: list[str] = []
        began = time.monotonic()

        alone: list[tuple[StepJob, dict[str, str]]] = []

        def take(future: Future, last: bool = False) -> None:
            job, inputs = waiting.pop(future)
            outcome = _outcome(future)
            if outcome is None and not last:
                alone.append((job, inputs))
                return
            self._take(job, inputs, outcome or Outcome(None, _DIED), describe)
            left = f", {len(waiting)} left" if waiting else ""
            self.say(f"{step:9} {job.name}: {self._fate(job, describe)} ({time.monotonic() - began:.1f} s{left})")

        for job in jobs:
            with self.failing(step, job.name):
                record = self.state.finished(job)
                if record is not None:
                    self.done[step][job.name] = FinishedStep(job, record)
                    kept.append(job.name)
                    continue
                inputs = self.state.begin(job)
                waiting[self._submit(job, here)] = job, inputs
                for future in [future for future in waiting if future.done()]:
                    take(future)
        for future in as_completed(list(waiting)):
            take(future)
        for job, inputs in alone:  # a worker died: of whose job, shows when each has the workers to itself
            future = self._submit(job, here)
            waiting[future] = job, inputs
            wait([future])
            take(future, last=True)
        if kept:
            self.say(f"{step:9} {len(kept)} of {len(jobs)} done before, unchanged")
        self.done[step] = dict(sorted(self.done[step].items()))

    @contextmanager
    def failing(self, step: str, name: str) -> Iterator[None]:
        """A known error inside the block is that job's failure."""
        try:
            yield
        except BiomassError as error:
            self.fail(step, name, str(error))

    def fail(self, step: str, name: str, error: str) -> None:
        """Note a failure, and say it at once."""
        self.errors[f"{step} {name}"] = error
        print(f"error: {step} {name}: {error}", file=sys.stderr)

    def _submit(self, job: StepJob, here: bool) -> Future:
        if not here:
            return self.executor.submit(attempt, job.function, dict(job.arguments))
        future: Future = Future()
        future.set_result(attempt(job.function, job.arguments))
        return future

    def _take(self, job: StepJob, inputs: dict[str, str], outcome: Outcome, describe: Describe) -> None:
        for text in outcome.warnings:
            print(f"warning: {job.step} {job.name}: {text}", file=sys.stderr)
        if outcome.result is None:
            print(outcome.trace, end="", file=sys.stderr)
            self.fail(job.step, job.name, outcome.error)
            return
        with self.failing(job.step, job.name):
            record = self.state.finish(job, inputs, outcome.result, outcome.warnings)
            self.done[job.step][job.name] = FinishedStep(job, record)

    def _fate(self, job: StepJob, describe: Describe) -> str:
        part = self.done[job.step].get(job.name)
        return describe(part.record.result) if part else "failed"


def _outcome(future: Future) -> Outcome | None:
    """What a job returned; None where its worker died."""
    try:
        return future.result()
    except Exception:  # of the executor: jobs return their own
        return None
