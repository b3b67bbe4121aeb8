"""One writer a folder: a lock file that says who holds it, and that doesn't outlive its holder.

Whether a holder still lives is known at once where it is a process of this machine. On another machine, which shares
the file system, it gives a sign of life: a thread of it renews the file's time of change. Nothing but creating,
linking and renaming files is asked of the file system, and hard links may be missing.
"""

import dataclasses
import errno
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

from biomass_jax.errors import BiomassError, FolderError

LOCK = ".biomass_jax.lock"
BEAT = 3.0  # seconds between two signs of life; a folder that was lost twice in a row is lost
STALE = 60.0  # seconds without one after which a holder on another machine is taken for dead
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a write that finds no room
LOOK = 0.5  # seconds between two looks at a lock whose holder may be dead

log = logging.getLogger(__name__)
Ended = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock: what its file says, as JSON.

    Attributes:
        host: name of the machine.
        space: what tells process numbers of one machine, since it was started, from those of another or a container.
        pid: number of the process.
        born: when that process began, as its system counts; a number may be given again.
        since: when the lock was taken.
        command: of the process.
        token: differs from lock to lock.
    """

    host: str = "an unknown machine"
    space: str = ""
    pid: int = 0
    born: str = ""
    since: str = "an unknown time"
    command: str = "unknown"
    token: str = "unreadable"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}), since {self.since}"


class _Found(NamedTuple):
    """A lock file as it was read."""

    text: str
    changed_ns: int

    @property
    def holder(self) -> Holder:
        """Who holds it; unknown where the file is being written, or is none of ours."""
        try:
            return Holder(**json.loads(self.text))
        except (ValueError, TypeError):
            return Holder()


@contextmanager
def one_writer(folder: Path, name: str = LOCK, *, lost: Ended | None = None) -> Iterator[None]:
    """Hold a folder's lock; the folder is made if it isn't there. The lock is gone when the block ends.

    A folder that goes away under the block, can't be written any more or was taken over by another machine ends the
    program within ten seconds, whatever it is doing, with the folder in the message and exit code 1.

    Args:
        folder: that one run at a time may write to.
        name: of the file in it.
        lost: called with the message, in a thread, instead of ending the program.

    Raises:
        FolderError: another run holds it, and nothing was changed; it can't be made or written; or the block failed or
            ended with the folder gone, taken over, read-only or full.
    """
    mine = _myself()
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(path, mine)
    except OSError as error:
        raise FolderError(f"{folder}: can't write to this folder: {error.strerror or error}") from error
    watch = _Watch(path, mine, lost or _end_program)
    try:
        yield
    except BaseException as error:  # SIGTERM's as well: what was to be saved isn't
        if fault := watch.fault() or disk_fault(folder, error):
            raise FolderError(fault) from error
        raise
    else:
        if fault := watch.fault():
            raise FolderError(fault)
    finally:
        watch.release()


def refuse_if_held(folder: Path, name: str = LOCK) -> None:
    """FolderError where a live run holds a folder's lock; for what may go on beside others of its kind."""
    path = folder / name
    found = _read(path)
    if found is not None and _seems_alive(found, time.time()):
        raise FolderError(_refusal(path, found.holder))


def is_held(folder: Path, now: float, name: str = LOCK) -> bool | None:
    """Whether the holder of a folder's lock lives, by its last sign of life; None where there is no lock.

    Args:
        folder: of the lock.
        now: seconds since the epoch by the file server's clock, as the time of change of a lock of one's own tells it.
        name: of the lock.
    """
    found = _read(folder / name)
    return None if found is None else _seems_alive(found, now)


def _seems_alive(found: _Found, now: float) -> bool:
    """Without a wait for a sign of life: the last one counts."""
    lives = _lives(found.holder)
    return now - found.changed_ns / 1e9 < STALE if lives is None else lives


def lock_beside(path: Path) -> tuple[Path, str]:
    """Folder and name of the lock of a file or folder that is written beside its place and renamed."""
    return path.absolute().parent, f".{path.absolute().name}{LOCK}"


def writer_beside(path: Path) -> AbstractContextManager[None]:
    """`one_writer` of a file or folder that is written beside its place; no folder is made for what may yet fail.

    Raises:
        FolderError: another one is at it.
    """
    folder, name = lock_beside(path)
    return one_writer(folder, name) if folder.is_dir() else nullcontext()


def _claim(path: Path, mine: Holder) -> None:
    """Make the lock file, or take over one whose holder is dead.

    Raises:
        FolderError: its holder lives.
    """
    before = _read(path)
    if before is not None and _lives(before.holder):
        raise FolderError(_refusal(path, before.holder))  # before anything is written
    draft = path.with_name(f"{path.name}.{mine.token}.new")
    try:
        draft.write_text(json.dumps(dataclasses.asdict(mine)) + "\n", encoding="utf-8")
        while not _create(draft, path):
            found = _read(path)
            if found is None or not _dead(path, found, draft):
                continue
            log.warning("%s: its holder is gone, %s; taking it over", path, found.holder)
            # Of all who want this one dead lock, the holder of its own lock replaces it. A latecomer sees another text.
            heir = path.with_name(f"{path.name}.{found.holder.token}")
            _claim(heir, mine)
            try:
                if _read(path) == found:
                    os.replace(draft, path)
                    return
            finally:
                heir.unlink(missing_ok=True)
    finally:
        draft.unlink(missing_ok=True)


def _create(draft: Path, path: Path) -> bool:
    """Give a draft the lock's name too; whether there was no lock."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return draft.stat().st_nlink == 2  # NFS may ask twice, and be told that its own link exists
    except OSError:  # a file system without hard links, a mounted bucket
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(draft.read_text(encoding="utf-8"))
            return True
        except FileExistsError:
            return False


def _read(path: Path) -> _Found | None:
    """A lock file, opened: a shared file system shows what others did to a file when it is opened. None without one."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return _Found(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _dead(path: Path, found: _Found, draft: Path) -> bool:
    """Whether a lock's holder is dead; False where the lock changed hands or went away meanwhile.

    Raises:
        FolderError: it lives.
    """
    lives = _lives(found.holder)
    if lives is None:
        # Both times are the file server's, whose clock needn't be ours.
        silent = (draft.stat().st_mtime_ns - found.changed_ns) / 1e9
        left = min(STALE - silent, STALE)
        if left > 0:
            log.info("%s: held by %s; waiting up to %.0f s for a sign of life", path, found.holder, left)
        until = time.monotonic() + left
        while time.monotonic() < until:
            time.sleep(LOOK)
            now = _read(path)
            if now is None or now.text != found.text:
                return False
            if now != found:
                lives = True
                break
    if lives:
        raise FolderError(_refusal(path, found.holder))
    return True


def _lives(holder: Holder) -> bool | None:
    """Whether a holder is a process that runs here; None where that can't be known."""
    if holder.space != _space():
        return None
    found = _born(holder.pid)
    return None if found is None or not holder.born else found == holder.born


def _refusal(path: Path, holder: Holder) -> str:
    return (
        f"{path.parent}: another run is at work there: {holder}; wait for it, stop it or give another folder. Nothing "
        f"was changed. ({path} says so, and is ignored once that process has ended)"
    )


def _myself() -> Holder:
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        space=_space(),
        pid=pid,
        born=_born(pid) or "",
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        command=shlex.join(sys.argv)[:200],
        token=uuid.uuid4().hex[:12],
    )


def _space() -> str:
    """Equal for two processes that see each other's numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux has them
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process of this machine began; "" where there is none, None where that can't be known."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5), from the third on
        except OSError:
            return "" if _absent(pid) else None
        return "" if fields[0] in "XZ" else fields[19]
    try:
        command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
        environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return "" if not said or said[0].startswith("Z") else " ".join(said[1:])


def _absent(pid: int) -> bool:
    """Whether there is no such process; one of another user may be hidden."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


class _Watch:
    """The thread that shows that a holder lives, and sees whether it still has its folder."""

    def __init__(self, path: Path, mine: Holder, lost: Ended) -> None:
        self._path, self._mine, self._lost = path, mine, lost
        self._pid, self._over = os.getpid(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Take the lock away, if it is still ours."""
        self._over.set()
        if os.getpid() != self._pid:  # a fork of the holder holds nothing
            return
        try:
            found = _read(self._path)
            if found is not None and found.holder.token == self._mine.token:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: can't be removed: %s; it is ignored from now on", self._path, error.strerror or error)

    def _run(self) -> None:
        before = ""
        while not self._over.wait(BEAT):
            fault = self.fault()
            if fault and before and not self._over.is_set():
                self._lost(fault)
                return
            before = fault  # once may be a hiccup of the file server

    def fault(self) -> str:
        """Give a sign of life; what is wrong with the lock, or nothing."""
        folder = self._path.parent
        try:
            found = _read(self._path)
            if found is None:
                return (
                    f"{folder}: the folder, or {self._path.name} in it, was deleted under this run, which ends here; "
                    "what it had written there is gone"
                )
            if found.holder.token != self._mine.token:
                return (
                    f"{folder}: this run gave no sign of life for {STALE:.0f} s, and another took the folder over: "
                    f"{found.holder}; this one ends here"
                )
            try:
                os.utime(self._path)
            except OSError:  # a mount that doesn't let times be set
                self._path.write_text(found.text, encoding="utf-8")
        except OSError as error:
            return (
                f"{folder}: can't be written any more: {error.strerror or error}; this run ends here. Make the folder "
                "writable, then give the same command again"
            )
        return ""


def disk_fault(folder: Path, error: BaseException | None) -> str:
    """What to say of an error that came of a disk which takes no more; nothing of any other error, or a known one."""
    while error is not None and not isinstance(error, BiomassError):
        text = str(error)
        # Orbax tells what its threads met in words alone.
        for number in FULL:
            if getattr(error, "errno", None) == number or os.strerror(number) in text:
                where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
                return (
                    f"{folder}: can't be written any more: {os.strerror(number)}{where}; this run ends here. Make room "
                    "for it, then give the same command again"
                )
        error = error.__cause__ or error.__context__
    return ""


def _end_program(message: str) -> NoReturn:
    """Give the message and leave: the main thread may be waiting for what can't be written any more."""
    log.error("%s", message)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
