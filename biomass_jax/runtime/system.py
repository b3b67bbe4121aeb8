"""What operating systems do each in their own way: cores, locks, signals, groups of processes, flushed folders."""

import importlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from biomass_jax.errors import Stopped

fcntl: Any = None
msvcrt: Any = None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows has locks of its own
    msvcrt = importlib.import_module("msvcrt")

_LOCKED_BYTE = 2**30  # on Windows, far behind all content: nobody else can read a byte that is locked
_PAUSE = 0.05  # seconds between two looks whether a lock is free


def cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lock(handle: int, *, wait: bool = False) -> bool:
    """Take the lock of an open file; it goes when the file is closed, or its process ends, however it ends.

    Args:
        handle: file descriptor, open for writing.
        wait: until it is free.

    Returns:
        Whether it was taken; without `wait` it may not be free.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            _lock_on_windows(handle, wait)
    except (BlockingIOError, PermissionError):  # of POSIX, of Windows
        return False
    return True


def _lock_on_windows(handle: int, wait: bool) -> None:
    before = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
    try:
        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                return
            except PermissionError:
                if not wait:
                    raise
                time.sleep(_PAUSE)
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def end_group(process: subprocess.Popen[Any], *, at_once: bool = False) -> None:
    """SIGTERM (SIGKILL `at_once`) to a process and what it started; to it alone where a system has no groups.

    Args:
        process: started with `start_new_session`.
        at_once: without asking.
    """
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)
    elif at_once:
        process.kill()
    else:
        process.terminate()


def flush(path: Path) -> None:
    """Have the disk take a written file.

    Raises:
        OSError: the disk doesn't.
    """
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the disk take the names in a folder; Windows can't be asked.

    Raises:
        OSError: the disk doesn't.
    """
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM ends the block with `Stopped`, once; to be called in the main thread."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the end
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
