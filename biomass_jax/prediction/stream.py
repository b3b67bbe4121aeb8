"""Map a raster in bounded memory: read, predict, blend and write at the same time (NumPy and threads only).

    reader thread -> batches of tiles -> this thread: dispatch, blend -> finished rows -> writer thread

Batches run over row ends, so all but the last are full and one compilation serves the whole raster. Tiles are blended
in the plan's order whatever the batch size.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from biomass_jax.errors import PredictionError
from biomass_jax.prediction.tiling import Blender, SourceRows, Tile, TilePlan

# Reads source rows [start, stop) -> pixels (rows, W, C) and bool (rows, W), True where the map gets a value.
ReadRows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
# Starts the forward pass of a batch (B, h, w, C) -> something that np.asarray turns into (B, h, w), waiting if need be.
StartBatch = Callable[[np.ndarray], object]
WriteRows = Callable[[int, np.ndarray], None]

READ_AHEAD = 2  # batches that wait for the device
IN_FLIGHT = 2  # batches dispatched and not yet fetched: the device is never idle while one is blended
WRITE_BEHIND = 4  # bands of rows that wait for the disk


Item = TypeVar("Item")


class Broken(Exception):
    """The other side stopped without an error of its own."""


class Pipe(Generic[Item]):
    """A bounded hand-over between two threads that passes errors on and can be broken off by either side.

    Items in order, at most `size` waiting. After `fail(error)` both sides raise `error` at their next call, so that the
    first error of a run is the one seen.
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


@dataclass
class TileBatch:
    """Tiles of one forward pass; `skipped` tiles before its end have no pixel to map."""

    images: np.ndarray
    slots: list[tuple[int, Tile]] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Timings:
    """Seconds spent reading, waiting for predictions, blending, and writing; they overlap."""

    read: float = 0.0
    compute: float = 0.0
    blend: float = 0.0
    write: float = 0.0


class _Reader:
    """Source rows in, batches out; the wanted rows go out first, as bool arrays (rows, W)."""

    def __init__(self, plan: TilePlan, read: ReadRows, batch_size: int, timings: Timings) -> None:
        self._plan = plan
        self._read = read
        self._batch_size = batch_size
        self._timings = timings
        self._wanted: deque[tuple[int, np.ndarray]] = deque()  # (first row, wanted) of rows that tiles still need
        self._fresh: list[np.ndarray] = []

    def _read_rows(self, start: int, stop: int) -> np.ndarray:
        began = time.perf_counter()
        pixels, wanted = self._read(start, stop)
        self._wanted.append((start, wanted))
        self._fresh.append(wanted)
        self._timings.read += time.perf_counter() - began
        return pixels

    def _is_wanted(self, rows: slice, columns: slice) -> bool:
        """Whether any pixel of a window gets a value in the map."""
        return any(
            wanted[max(rows.start - start, 0) : max(rows.stop - start, 0), columns].any()
            for start, wanted in self._wanted
        )

    def items(self) -> Iterator[np.ndarray | TileBatch]:
        """Wanted rows and batches in the order in which the blender needs them."""
        plan, source, firsts = self._plan, SourceRows(self._plan, self._read_rows), self._plan.first_rows()
        batch: TileBatch | None = None
        skipped = 0
        for index, row in enumerate(plan.rows):
            source.advance(index)
            yield from self._fresh
            self._fresh.clear()
            while self._wanted[0][0] + len(self._wanted[0][1]) <= firsts[index]:
                self._wanted.popleft()
            for tile in row.tiles:
                if not self._is_wanted(*plan.window(row, tile)[:2]):
                    skipped += 1  # all its pixels are masked in the map: its prediction would be thrown away
                    continue
                image = source.cut(index, tile)
                if batch is None:
                    batch = TileBatch(np.zeros((self._batch_size, *image.shape), image.dtype))
                batch.images[len(batch.slots)] = image
                batch.slots.append((index, tile))
                if len(batch.slots) == self._batch_size:
                    batch.skipped, skipped = skipped, 0
                    yield batch
                    batch = None
        if batch is not None:
            batch.skipped = skipped
            yield batch


def check_finite(values: np.ndarray, wanted: np.ndarray, first_row: int = 0) -> None:
    """Raise PredictionError where a pixel with data has no finite prediction (rows, W)."""
    bad = np.argwhere(~np.isfinite(values) & wanted)
    if len(bad):
        row, column = bad[0]
        raise PredictionError(
            f"the model returned {values[row, column]} for {len(bad)} pixels with data, the first at row "
            f"{first_row + row}, column {column}; check the model's weights and the image for extreme values"
        )


class _Blending:
    """Batches in flight, the blender, and finished rows on their way to the writer."""

    def __init__(
        self,
        plan: TilePlan,
        nodata: float,
        timings: Timings,
        put: Callable[[tuple[int, np.ndarray]], None],
        advance: Callable[[int], None],
    ) -> None:
        self._nodata = nodata
        self._timings = timings
        self._put = put
        self._advance = advance
        self._blender = Blender(plan)
        self._wanted = np.zeros((0, plan.width), bool)  # of rows that are not finished
        self._in_flight: deque[tuple[object, TileBatch]] = deque()
        self._left = plan.count

    def expect(self, wanted: np.ndarray) -> None:
        """Which pixels of the next rows get a value."""
        self._wanted = np.concatenate([self._wanted, wanted])

    def dispatched(self, future: object, batch: TileBatch) -> None:
        """Note a batch that was sent to the device; blend the oldest one where enough are on their way."""
        self._in_flight.append((future, batch))
        if len(self._in_flight) >= IN_FLIGHT:
            self._blend_oldest()

    def finish(self) -> None:
        """Blend what is on its way and pass the last rows on."""
        while self._in_flight:
            self._blend_oldest()
        self._emit(self._blender.finish())
        self._advance(self._left)  # tiles that were skipped after the last batch

    def _blend_oldest(self) -> None:
        future, batch = self._in_flight.popleft()
        began = time.perf_counter()
        predictions = np.asarray(future)
        fetched = time.perf_counter()
        for (index, tile), prediction in zip(batch.slots, predictions, strict=False):  # the last batch is padded
            self._emit(self._blender.finished_before(index))
            self._blender.add(index, tile, prediction)
        self._timings.compute += fetched - began
        self._timings.blend += time.perf_counter() - fetched
        self._left -= len(batch.slots) + batch.skipped
        self._advance(len(batch.slots) + batch.skipped)

    def _emit(self, bands: Iterator[tuple[int, np.ndarray]]) -> None:
        """Pass rows on, no-data where no value is wanted; a wanted pixel must have a number."""
        for start, values in bands:
            wanted, self._wanted = self._wanted[: len(values)], self._wanted[len(values) :]
            check_finite(values, wanted, start)
            values[~wanted] = self._nodata
            self._put((start, values))


def stream_map(
    plan: TilePlan,
    read: ReadRows,
    forward: StartBatch,
    write: WriteRows,
    *,
    batch_size: int,
    nodata: float,
    advance: Callable[[int], None] = lambda tiles: None,
) -> Timings:
    """Predict a raster tile by tile and hand its rows to `write` in order, each once.

    Args:
        plan: from `default_plan` or a reference plan.
        read: see ReadRows; called from a thread of its own, rows in order, each once.
        forward: see `StartBatch`; called from this thread with batches of `batch_size`, the last padded with zeros.
        write: called from a thread of its own with (first row, float32 values (rows, W)).
        batch_size: tiles a forward pass.
        nodata: value of pixels that are not wanted.
        advance: told how many tiles were finished.

    Raises:
        PredictionError: a wanted pixel has no finite prediction.
        Exception: whatever `read`, `forward` or `write` raised first.
    """
    timings = Timings()

    def timed_write(band: tuple[int, np.ndarray]) -> None:
        began = time.perf_counter()
        write(*band)
        timings.write += time.perf_counter() - began

    reader = _Reader(plan, read, batch_size, timings)
    with (
        Sink(timed_write, WRITE_BEHIND, "map writer") as sink,
        Feeder(reader.items(), READ_AHEAD, "map reader") as items,
    ):
        blending = _Blending(plan, nodata, timings, sink.put, advance)
        for item in items:
            if isinstance(item, TileBatch):
                blending.dispatched(forward(item.images), item)
            else:
                blending.expect(item)
        blending.finish()
    return timings
