"""Run one function over many tasks: in this process, in a pool of processes, or on an executor that is given."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_all(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    *,
    workers: int = 1,
    executor: Executor | None = None,
) -> Iterator[Result]:
    """`function(*task)` for each task, results in the order of the tasks.

    Args:
        function: importable by name, as its arguments and results are picklable.
        tasks: its arguments, one tuple a call.
        workers: processes to start; 1 runs in this process.
        executor: runs the tasks instead (a Dask client's `get_executor()`); it stays open.

    Raises:
        Exception: the first one that a task raises; tasks not begun are given up.
    """
    if executor is not None:
        yield from executor.map(function, *zip(*tasks, strict=True))
    elif workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield function(*task)
    else:
        with new_pool(min(workers, len(tasks))) as pool:
            yield from pool.map(function, *zip(*tasks, strict=True))


def new_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one."""
    # Not forked: a fork copies the locks of GDAL's and TFDS's threads in whatever state they are.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when its parent is gone: a killed run must not keep writing beside the next."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
