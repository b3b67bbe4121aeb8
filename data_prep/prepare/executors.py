"""Where steps run: in this process, in a pool of processes or on a Dask cluster, through one interface.

All three are `concurrent.futures.Executor`s, so nothing else knows which of them is at work.
"""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from biomass_jax.errors import BiomassError, PrepError
from data_prep.parallel import end_with_parent

CONNECT_SECONDS = 30


class SerialExecutor(Executor):
    """Runs each task in this process when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
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
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        # Not forked: a fork copies the locks of GDAL's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._workers, context, initializer=end_with_parent)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """A future; BrokenExecutor in it if the pool breaks before it is done."""
        try:
            return self._pool.submit(function, *args, **kwargs)
        except BrokenExecutor:
            self._pool.shutdown(wait=False)
            self._pool = self._new()
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
