"""Runs jobs in this process, a pool or a Dask cluster: keeps what is done, writes records, tells what happens."""

import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from biomass_jax.errors import BiomassError, PrepError
from data_prep.parallel import new_pool
from data_prep.prepare.state import StepJob, StepRecord, StepRecords

CONNECT_SECONDS = 30

_DIED = "its worker ended twice before it was done, for want of memory perhaps; run again with fewer workers"
Describe = Callable[[dict[str, Any]], str]


class SerialExecutor(Executor):
    """Runs each task in this process when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: object, **kwargs: object) -> Future:
        """A future that is done already."""
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class ProcessExecutor(Executor):
    """A pool of processes of this machine; when one dies, which breaks a pool, the next task gets a new one."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = new_pool(workers)

    def submit(self, function: Callable[..., Any], /, *args: object, **kwargs: object) -> Future:
        """A future; BrokenExecutor in it if the pool breaks before it is done."""
        try:
            return self._pool.submit(function, *args, **kwargs)
        except BrokenExecutor:
            self._pool.shutdown(wait=False)
            self._pool = new_pool(self._workers)
            return self._pool.submit(function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the processes end."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        processes = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


@contextmanager
def open_executor(workers: int = 1, scheduler: str | None = None) -> Iterator[Executor]:
    """The executor that settings ask for; what still runs in own processes is ended if the block fails.

    Args:
        workers: processes of this machine; 1 for none.
        scheduler: address of a Dask scheduler (`tcp://host:8786`), used instead. Its workers have to see the same
            folders under the same paths.

    Raises:
        PrepError: Dask isn't installed, or nothing answers there.
    """
    if scheduler:
        with _dask_executor(scheduler) as executor:
            yield executor
    elif workers <= 1:
        yield SerialExecutor()
    else:
        pool = ProcessExecutor(workers)
        try:
            yield pool
        except BaseException:
            pool.kill()  # every step may be ended at any moment
            raise
        pool.shutdown()


@contextmanager
def _dask_executor(scheduler: str) -> Iterator[Executor]:
    try:
        from distributed import Client  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise PrepError("scheduler: Dask is not installed; pip install 'biomass-jax[dask]'") from error
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise PrepError(f"scheduler {scheduler}: no Dask scheduler answers there: {error}") from error
    with client:
        # Steps write files, so a step that is lost is run again as it is; equal calls aren't merged.
        yield client.get_executor(pure=False, retries=1)


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        result: what it returned, None where it failed.
        error: why it failed, "" where it did not.
        trace: traceback of an error that nobody foresaw.
        warnings: sentences for the user.
    """

    result: dict[str, Any] | None
    error: str = ""
    trace: str = ""
    warnings: list[str] = field(default_factory=list)


def attempt(function: Callable[..., dict[str, Any]], arguments: Mapping[str, Any]) -> Outcome:
    """Call a function; its error, whatever it is, comes back as an Outcome, and so do its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            result, error, trace = function(**arguments), "", ""
        except BiomassError as known:
            result, error, trace = None, str(known), ""
        except Exception as unknown:
            result, error, trace = None, f"{type(unknown).__name__}: {unknown}", traceback.format_exc()
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return Outcome(result, error, trace, list(dict.fromkeys(said)))


class FinishedStep(NamedTuple):
    """A finished job and its record."""

    job: StepJob
    record: StepRecord


class Runner:
    """Jobs and what became of them.

    Attributes:
        done: {step: {name: FinishedStep}}.
        errors: {`step name`: why it failed}.
    """

    def __init__(self, state: StepRecords, executor: Executor, log: Callable[[str], None]) -> None:
        self.state, self.executor, self.log = state, executor, log
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
            self._take(job, inputs, outcome or Outcome(None, _DIED))
            part = self.done[step].get(job.name)
            fate = describe(part.record.result) if part else "failed"
            left = f", {len(waiting)} left" if waiting else ""
            self.log(f"{step:9} {job.name}: {fate} ({time.monotonic() - began:.1f} s{left})")

        for job in jobs:
            with self.failing(step, job.name):
                record, why = self.state.finished(job)
                if why:
                    self.log(f"{step:9} {job.name}: is made again: {why}")
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
            self.log(f"{step:9} {len(kept)} of {len(jobs)} done before, unchanged")
        self.done[step] = dict(sorted(self.done[step].items()))

    @contextmanager
    def failing(self, step: str, name: str) -> Iterator[None]:
        """A known error inside the block is that job's failure."""
        try:
            yield
        except BiomassError as error:
            self.fail(step, name, str(error))

    def fail(self, step: str, name: str, error: str) -> None:
        """Note a failure, and log it at once."""
        self.errors[f"{step} {name}"] = error
        print(f"error: {step} {name}: {error}", file=sys.stderr)

    def _submit(self, job: StepJob, here: bool) -> Future:
        executor = SerialExecutor() if here else self.executor
        return executor.submit(attempt, job.function, dict(job.arguments))

    def _take(self, job: StepJob, inputs: dict[str, str], outcome: Outcome) -> None:
        for text in outcome.warnings:
            print(f"warning: {job.step} {job.name}: {text}", file=sys.stderr)
        if outcome.result is None:
            print(outcome.trace, end="", file=sys.stderr)
            self.fail(job.step, job.name, outcome.error)
            return
        with self.failing(job.step, job.name):
            record = self.state.finish(job, inputs, outcome.result, outcome.warnings)
            self.done[job.step][job.name] = FinishedStep(job, record)


def _outcome(future: Future) -> Outcome | None:
    """What a job returned; None where its worker died."""
    try:
        return future.result()
    except Exception:  # of the executor: jobs return their own
        return None
