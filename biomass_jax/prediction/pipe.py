"""A bounded hand-over between two threads that passes errors on and can be broken off by either side."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Broken(Exception):
    """The other side stopped without an error of its own."""


class Pipe(Generic[Item]):
    """Items in order, at most `size` waiting.

    After `fail(error)` both sides raise `error` at their next call, so that the first error of a run is the one seen.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Item] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: Item) -> None:
        """Hand an item over, waiting for room."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._items) < self._size)
            if self._error is not None:
                raise self._error
            self._items.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """No more items: the other side ends after those that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Break off; the first error counts, and items that wait are dropped."""
        with self._changed:
            self._error = self._error or error
            self._items.clear()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what the other side failed with, if it did."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def __iter__(self) -> Iterator[Item]:
        """Items until the other side closes; raises what it failed with."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or self._closed or self._items)
                if self._error is not None:
                    raise self._error
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


class Feeder(Generic[Item]):
    """Runs an iterable in a thread of its own and yields its items here; use as a context manager."""

    def __init__(self, items: Iterable[Item], size: int, name: str) -> None:
        self._pipe: Pipe[Item] = Pipe(size)
        self._items = items
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            for item in self._items:
                self._pipe.put(item)
            self._pipe.close()
        except BaseException as error:  # raised again in the thread that waits for the items
            self._pipe.fail(error)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return iter(self._pipe)

    def __exit__(self, *_: object) -> None:
        self._pipe.fail(Broken())
        self._thread.join()


class Sink(Generic[Item]):
    """Hands items to a function that runs in a thread of its own; use as a context manager, which waits for the end."""

    def __init__(self, consume: Callable[[Item], None], size: int, name: str) -> None:
        self._pipe: Pipe[Item] = Pipe(size)
        self._consume = consume
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.put = self._pipe.put

    def _run(self) -> None:
        try:
            for item in self._pipe:
                self._consume(item)
        except BaseException as error:  # raised again in the thread that puts items
            self._pipe.fail(error)

    def __enter__(self) -> "Sink[Item]":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._pipe.fail(Broken())
            self._thread.join()
            return
        self._pipe.close()
        self._thread.join()
        self._pipe.check()
