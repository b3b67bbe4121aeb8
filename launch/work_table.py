"""A table of work as a folder: items that any number of workers on any number of machines take from, without a server.

Each item is one empty file. Where it lies and what it is called is all its state, so that a change of state is one
rename, which has one winner and is never half done, on NFS too:

    waiting/0012/001234.0           how often it was tried
    taken/WORKER/001234.1
    done/0012/001234.1.WORKER
    failed/0012/001234.3.WORKER

A worker holds one lock, that of its folder (`runtime.lock`), which doesn't outlive it; what a dead one had taken is
taken again. What an item costs doesn't grow with the table: a worker lists one folder of a hundred at a time.
"""

import json
import os
import random
import re
import shutil
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from biomass_jax.errors import WorkError
from biomass_jax.runtime.files import write_json, write_text
from biomass_jax.runtime.lock import LOCK, is_held, one_writer

SHARD = 100  # items a folder
POLL = 2.0  # seconds between two looks, while others hold what may come back;
PAUSE = 0.05  # or so many for each of them, for a thousand that look are a load for a file server
ABOUT, ITEMS = "work.json", "items.jsonl"
SCHEMA = 1
KILLED = "its worker ended without a word, as it does when it is killed, when memory runs out or its machine is lost"
_NAME = re.compile(r"(\d{6,})\.(\d+)(?:\.(.+))?")


class Mark(NamedTuple):
    """An item's file: its number, how often it was tried, who had it last ("" where it waits or is taken)."""

    number: int
    tries: int
    owner: str = ""

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.number:06d}.{self.tries}" + (f".{self.owner}" if self.owner else "")


@dataclass(frozen=True)
class Row:
    """An item as the table shows it; state: waiting, taken, lost (taken by a worker that is dead), done, failed."""

    number: int
    item: Mapping[str, Any]
    state: str
    owner: str
    tries: int
    error: str


def make_table(folder: Path, items: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], tries: int) -> None:
    """Make a table in which all items wait; it is there whole or not at all.

    Args:
        folder: to be made.
        items: JSON-able, with `name` among their fields.
        settings: JSON-able, what workers need to know.
        tries: after which an item that fails, or whose worker is lost, is not tried again.

    Raises:
        WorkError: the folder is there already.
    """
    if folder.exists():
        raise WorkError(f"{folder}: it is there already; give another folder, or work on that table")
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    for shard in range(-(-len(items) // SHARD)):
        for state in ("waiting", "done", "failed", "errors"):
            (draft / state / f"{shard:04d}").mkdir(parents=True)
    (draft / "taken").mkdir()
    for number in range(len(items)):
        (draft / "waiting" / f"{number // SHARD:04d}" / Mark(number, 0).file).touch()
    write_text(draft / ITEMS, "".join(json.dumps(item) + "\n" for item in items))
    about = {"schema": SCHEMA, "id": uuid.uuid4().hex[:12], "items": len(items), "tries": tries}
    write_json(draft / ABOUT, {**about, "settings": settings})
    draft.rename(folder)


class Table:
    """A table that `make_table` has made.

    Raises:
        WorkError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            lines = (folder / ITEMS).read_text(encoding="utf-8").splitlines()
            self.items: list[dict[str, Any]] = [json.loads(line) for line in lines]
        except FileNotFoundError as error:
            raise WorkError(f"{folder}: no table of work there; `biomass-jax work make` makes one") from error
        except ValueError as error:
            raise WorkError(f"{folder}: {ABOUT} or {ITEMS} in it can't be read: {error}; make it anew") from error
        if about.get("schema") != SCHEMA or about.get("items") != len(self.items):
            raise WorkError(
                f"{folder / ABOUT}: schema {about.get('schema')} and {about.get('items')} items; expected schema "
                f"{SCHEMA} and {len(self.items)} items, as {ITEMS} has; make it anew, or take the version that made it"
            )
        self.id: str = about["id"]
        self.tries: int = about["tries"]
        self.settings: dict[str, Any] = about["settings"]

    @property
    def shards(self) -> int:
        """Folders of a state."""
        return -(-len(self.items) // SHARD)

    def place(self, state: str, mark: Mark) -> Path:
        """Where an item's file lies in a state that isn't `taken`."""
        return self.folder / state / f"{mark.number // SHARD:04d}" / mark.file

    def marks(self, state: str) -> Iterator[Mark]:
        """The items in a state that isn't `taken`."""
        for shard in range(self.shards):
            yield from listed(self.folder / state / f"{shard:04d}")

    def workers(self) -> list[Path]:
        """The folders of workers, of dead ones too as long as nobody has cleared them away."""
        return sorted(path for path in (self.folder / "taken").iterdir() if path.is_dir())

    def error_file(self, number: int) -> Path:
        """Where an item's last error stands."""
        return self.folder / "errors" / f"{number // SHARD:04d}" / f"{number:06d}"

    def end(self, source: Path, mark: Mark, owner: str, why: str) -> str:
        """Note a failure of an item that one has: it waits again, or has failed for good; the state that it has now."""
        if not source.exists():
            return "gone"
        write_text(self.error_file(mark.number), f"{why}\n")
        state = "waiting" if mark.tries < self.tries else "failed"
        moved(source, self.place(state, mark if state == "waiting" else mark._replace(owner=owner)))
        return state

    def again(self) -> int:
        """Have all items that failed wait again, untried; how many."""
        found = list(self.marks("failed"))
        return sum(moved(self.place("failed", m), self.place("waiting", Mark(m.number, 0))) for m in found)

    def rows(self) -> list[Row]:
        """All items by number. Those that change hands meanwhile are told as one of both states."""
        states: dict[int, tuple[str, Mark]] = {}
        for state in ("waiting", "failed", "done"):
            states |= {mark.number: (state, mark) for mark in self.marks(state)}
        for folder in self.workers():
            state = "taken" if is_held(folder, time.time()) else "lost"
            states |= {mark.number: (state, mark._replace(owner=folder.name)) for mark in listed(folder)}
        rows = []
        for number, item in enumerate(self.items):
            state, mark = states.get(number, ("taken", Mark(number, 0)))  # it moved on while it was looked for
            error = ""
            if mark.tries > (state in ("taken", "lost", "done")):
                with suppress(FileNotFoundError):
                    error = self.error_file(number).read_text(encoding="utf-8").strip()
            rows.append(Row(number, item, state, mark.owner, mark.tries, error))
        return rows


class TableWorker:
    """One that takes items; of `at_work`. Its methods may be called in several threads."""

    def __init__(self, table: Table, share: tuple[int, int] | None, stop: Callable[[], bool]) -> None:
        self.table = table
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.folder = table.folder / "taken" / self.name
        number, count = share or (random.randrange(len(table.items)), len(table.items))
        self._first = number * len(table.items) // count
        self._shard, self._stop, self._stopping = self._first // SHARD - 1, stop, False
        self._names: deque[Mark] = deque()
        self._tried: set[Mark] = set()
        self._one_at_a_time = threading.Lock()

    def claims(self) -> Iterator[Mark]:
        """Items, each this worker's own from now on, until none is left that it could be given.

        At the end it waits while others hold items, which come back if those workers are lost or fail.
        """
        while not (self._stopping or self._stop()):
            claim = self._take()
            if claim is None:
                if self._take_from_the_dead():
                    continue
                workers = self.table.workers()
                if any(map(listed, workers)):
                    time.sleep(max(POLL, PAUSE * len(workers)))
                    continue
                claim = self._take()  # what was given back between the two looks
            if claim is None:
                return
            yield claim

    def done(self, claim: Mark) -> bool:
        """An item is finished; False where it was taken away, this worker having been silent for too long."""
        return moved(self.folder / claim.file, self.table.place("done", claim._replace(owner=self.name)))

    def holds(self, claim: Mark) -> bool:
        """Whether an item is still this worker's."""
        return (self.folder / claim.file).exists()

    def failed(self, claim: Mark, why: str) -> str:
        """An item failed; its state now: `waiting` for another try, `failed`, or `gone` where it was taken away."""
        return self.table.end(self.folder / claim.file, claim, self.name, why)

    def give_back(self) -> int:
        """Have what is held wait again as if it had not been tried, and take no more; how many."""
        with self._one_at_a_time:
            self._stopping = True
        waiting = [(one, self.table.place("waiting", Mark(one.number, one.tries - 1))) for one in listed(self.folder)]
        return sum(moved(self.folder / one.file, place) for one, place in waiting)

    def _take(self) -> Mark | None:
        """The next item that waits, once around from where this worker is; None where none is seen."""
        for _ in range(self.table.shards + 1):
            while self._names:
                if claim := self._claim(self._names.popleft()):
                    return claim
                self._look()  # another one was faster, and may have taken more of what was seen
            self._shard = (self._shard + 1) % self.table.shards
            self._tried.clear()
            self._look()
        return None

    def _look(self) -> None:
        """List the present folder, from this worker's own place on; no name twice, for NFS may tell an old list."""
        found = set(listed(self.table.folder / "waiting" / f"{self._shard:04d}")) - self._tried
        self._names = deque(sorted(found, key=lambda mark: (mark.number < self._first, mark)))

    def _claim(self, mark: Mark) -> Mark | None:
        self._tried.add(mark)
        claim = Mark(mark.number, mark.tries + 1)
        with self._one_at_a_time:
            if self._stopping or not moved(self.table.place("waiting", mark), self.folder / claim.file):
                return None
        return claim

    def _take_from_the_dead(self) -> bool:
        """Have the items of dead workers wait again; whether there were any."""
        found, now = False, (self.folder / LOCK).stat().st_mtime  # by the file server's clock
        for folder in self.table.workers():
            held = is_held(folder, now)
            if held:
                continue
            if held is False:  # None: it has no lock yet. One that was only silent finds its lock gone, and ends
                for path in folder.glob(f"{LOCK}*"):
                    path.unlink(missing_ok=True)
            for mark in listed(folder):
                found = True
                if moved(folder / mark.file, self.folder / mark.file):  # or another one was faster
                    self.table.end(self.folder / mark.file, mark, folder.name, f"{KILLED} ({folder.name})")
            if held is False:
                with suppress(OSError):  # never with what is in it: what was silent may have taken an item just now
                    folder.rmdir()
        return found


@contextmanager
def at_work(
    table: Table, share: tuple[int, int] | None = None, stop: Callable[[], bool] = lambda: False
) -> Iterator[TableWorker]:
    """A worker of a table; what it holds when the block ends is given back.

    Args:
        table: to take from.
        share: (i, n) begins with the i-th of n parts of the table, and helps with the others then; not given, it
            begins anywhere.
        stop: asked before each item, whether to take no more.

    Raises:
        FolderError: the table can't be written, or was deleted under it.
    """
    worker = TableWorker(table, share, stop)
    try:
        with one_writer(worker.folder):
            try:
                yield worker
            finally:
                worker.give_back()
    finally:
        with suppress(OSError):
            worker.folder.rmdir()


def listed(folder: Path) -> list[Mark]:
    """The items whose files lie in a folder, none where it is gone."""
    try:
        found = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return [Mark(int(one[1]), int(one[2]), one[3] or "") for one in found if one]


def moved(source: Path, target: Path) -> bool:
    """Give an item's file another place; False where it isn't there any more."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        return target.exists()  # NFS may ask twice, and be told that what it has moved isn't there
    return True
