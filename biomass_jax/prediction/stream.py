"""Map a raster in bounded memory: read, predict, blend and write at the same time (NumPy and threads only).

    reader thread -> batches of tiles -> this thread: dispatch, blend -> finished rows -> writer thread

Batches run over row ends, so all but the last are full and one compilation serves the whole raster. Tiles are blended
in the plan's order whatever the batch size.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from biomass_jax.errors import PredictionError
from biomass_jax.prediction.tiling import Blender, SourceRows, Tile, TilePlan

# Reads source rows [start, stop) -> pixels (rows, W, C) and bool (rows, W), True where the map gets a value.
ReadRows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
# Starts the forward pass of a batch (B, h, w, C) -> something that np.asarray turns into (B, h, w) or, of several
# channels, (B, h, w, channels), waiting if need be.
StartBatch = Callable[[np.ndarray], object]
WriteRows = Callable[[int, np.ndarray], None]
# What the model gives of a pixel -> what the map has of it: (rows, W[, channels]), first row -> (rows, W[, layers]).
Finish = Callable[[np.ndarray, int], np.ndarray]

READ_AHEAD = 3  # batches: one that is being read, and two that wait for the device
WRITE_BEHIND = 5  # bands of rows: one that is being written, and four that wait for the disk

Item = TypeVar("Item")
Started = TypeVar("Started")


def read_ahead(items: Iterator[Item], size: int) -> Generator[Item, None, None]:
    """Items in order, made in a thread of their own, up to `size` before they are taken; to be closed in the end."""
    thread = ThreadPoolExecutor(1, "map reader")
    try:
        ahead = deque(thread.submit(next, items, None) for _ in range(size))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


@contextmanager
def write_behind(write: WriteRows, size: int) -> Iterator[WriteRows]:
    """Calls of `write` in a thread of its own, up to `size` not yet done; leaving waits for the end.

    The first error of a call is raised by the next one, or on leaving.
    """
    thread = ThreadPoolExecutor(1, "map writer")
    calls: deque[Future[None]] = deque()

    def put(start: int, values: np.ndarray) -> None:
        while calls and (len(calls) == size or calls[0].done()):
            calls.popleft().result()
        calls.append(thread.submit(write, start, values))

    try:
        yield put
        for call in calls:
            call.result()
    finally:
        thread.shutdown(cancel_futures=True)


def one_ahead(items: Iterable[Item], start: Callable[[Item], Started]) -> Iterator[tuple[Item, Started]]:
    """Each item with what `start` gave for it, once the next one is started: the device is never idle meanwhile."""
    before = None
    for item in items:
        started = item, start(item)
        if before is not None:
            yield before
        before = started
    if before is not None:
        yield before


@dataclass
class TileBatch:
    """Tiles of one forward pass, and what was learnt on the way to them.

    Attributes:
        images: (B, h, w, C), zeros behind the last tile; None where the raster ends without another tile to predict.
        slots: the tiles, each with the number of its row of tiles.
        wanted: bool (rows, W), which pixels get a value; source rows in order, each in one batch.
        skipped: tiles without a pixel to map.
    """

    images: np.ndarray | None = None
    slots: list[tuple[int, Tile]] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Timings:
    """Seconds spent reading, waiting for predictions, and blending; they overlap."""

    read: float = 0.0
    compute: float = 0.0
    blend: float = 0.0


def _tile_batches(
    plan: TilePlan, read: ReadRows, batch_size: int, timings: Timings, *, all_rows: bool = True
) -> Iterator[TileBatch]:
    """The tiles in the plan's order; `all_rows` as for `SourceRows`."""
    held: deque[tuple[int, np.ndarray]] = deque()  # (first row, wanted) of rows that tiles still need
    batch = TileBatch()

    def read_rows(start: int, stop: int) -> np.ndarray:
        began = time.perf_counter()
        pixels, wanted = read(start, stop)
        held.append((start, wanted))
        batch.wanted.append(wanted)
        timings.read += time.perf_counter() - began
        return pixels

    def is_wanted(rows: slice, columns: slice) -> bool:
        """Whether any pixel of a window gets a value in the map."""
        return any(
            wanted[max(rows.start - start, 0) : max(rows.stop - start, 0), columns].any() for start, wanted in held
        )

    source, firsts = SourceRows(plan, read_rows, all_rows=all_rows), plan.first_rows()
    for index, row in enumerate(plan.rows):
        source.advance(index)
        while held[0][0] + len(held[0][1]) <= firsts[index]:
            held.popleft()
        for tile in row.tiles:
            if not is_wanted(*plan.window(row, tile)[:2]):
                batch.skipped += 1  # all its pixels are masked in the map: its prediction would be thrown away
                continue
            image = source.cut(index, tile)
            if batch.images is None:
                batch.images = np.zeros((batch_size, *image.shape), image.dtype)
            batch.images[len(batch.slots)] = image
            batch.slots.append((index, tile))
            if len(batch.slots) == batch_size:
                yield batch
                batch = TileBatch()
    yield batch


def check_finite(values: np.ndarray, wanted: np.ndarray, first_row: int = 0) -> None:
    """Raise PredictionError where a pixel with data, `wanted` (rows, W), has no finite prediction (rows, W[, C])."""
    finite = np.isfinite(values)
    bad = np.argwhere(~(finite.all(axis=-1) if values.ndim > wanted.ndim else finite) & wanted)
    if len(bad):
        row, column = bad[0]
        raise PredictionError(
            f"the model returned {values[row, column]} for {len(bad)} pixels with data, the first at row "
            f"{first_row + row}, column {column}; check the model's weights and the image for extreme values"
        )


def _finished_rows(
    plan: TilePlan,
    predicted: Iterable[tuple[TileBatch, object]],
    timings: Timings,
    *,
    nodata: float,
    advance: Callable[[int], None],
    channels: tuple[int, ...],
    finish: Finish,
) -> Iterator[tuple[int, np.ndarray]]:
    """Blend batches: (first row, values (rows, W[, layers])), no-data where none is wanted.

    A wanted pixel must have a number.
    """
    blender = Blender(plan, channels=channels)
    wanted = np.zeros((0, plan.width), bool)  # of rows that are not finished

    def masked(bands: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        nonlocal wanted
        for start, values in bands:
            mine, wanted = wanted[: len(values)], wanted[len(values) :]
            check_finite(values, mine, start)
            values = finish(values, start)
            values[~mine] = nodata
            yield start, values

    for batch, prediction in predicted:
        began = time.perf_counter()
        tiles = np.asarray(prediction)
        fetched = time.perf_counter()
        wanted = np.concatenate([wanted, *batch.wanted])
        for (index, tile), values in zip(batch.slots, tiles, strict=False):  # the last batch is padded
            yield from masked(blender.finished_before(index))
            blender.add(index, tile, values)
        timings.compute += fetched - began
        timings.blend += time.perf_counter() - fetched
        advance(len(batch.slots) + batch.skipped)
    yield from masked(blender.finished_before(len(plan.rows)))


def stream_map(
    plan: TilePlan,
    read: ReadRows,
    forward: StartBatch,
    write: WriteRows,
    *,
    batch_size: int,
    nodata: float,
    advance: Callable[[int], None] = lambda tiles: None,
    channels: tuple[int, ...] = (),
    finish: Finish = lambda values, start: values,
) -> Timings:
    """Predict a raster tile by tile and hand its rows to `write` in order, each once.

    Args:
        plan: from `default_plan` or a reference plan.
        read: see ReadRows; called from a thread of its own, rows in order, each once.
        forward: see `StartBatch`; called from this thread with batches of `batch_size`, the last padded with zeros.
        write: called from a thread of its own with (first row, float32 values (rows, W[, layers])).
        batch_size: tiles a forward pass.
        nodata: value of pixels that are not wanted.
        advance: called with the number of tiles that were finished.
        channels: () or (C,), what `forward` gives of a pixel.
        finish: makes of it what is written; pixels that are not wanted may be NaN.

    Raises:
        PredictionError: a wanted pixel has no finite prediction.
        Exception: whatever `read`, `forward` or `write` raised first.
    """
    timings = Timings()

    def start(batch: TileBatch) -> object:
        return () if batch.images is None else forward(batch.images)

    with (
        write_behind(write, WRITE_BEHIND) as put,
        closing(read_ahead(_tile_batches(plan, read, batch_size, timings), READ_AHEAD)) as batches,
    ):
        predicted = one_ahead(batches, start)
        how: Any = {"nodata": nodata, "advance": advance, "channels": channels, "finish": finish}
        for first_row, values in _finished_rows(plan, predicted, timings, **how):
            put(first_row, values)
    return timings


@dataclass
class TileRowPrediction:
    """What the tiles of one row predict, to be blended with its neighbours.

    Attributes:
        tiles: those with a pixel to map, in order.
        values: float32 (tiles, h, w[, C]).
        start: the first source row that was read for them.
        wanted: bool (rows, W), which pixels of the rows from `start` on get a value.
    """

    tiles: list[Tile]
    values: list[np.ndarray]
    start: int
    wanted: np.ndarray


def predict_tile_row(
    plan: TilePlan, index: int, read: ReadRows, forward: StartBatch, *, batch_size: int
) -> TileRowPrediction:
    """Predict the tiles of one row, number `index`; arguments are those of `stream_map`."""
    starts: list[int] = []

    def noted(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        starts.append(start)
        return read(start, stop)

    tiles: list[Tile] = []
    values: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    for batch in _tile_batches(plan.of_row(index), noted, batch_size, Timings(), all_rows=False):
        wanted += batch.wanted
        if batch.images is not None:
            tiles += [tile for _, tile in batch.slots]
            values += list(np.asarray(forward(batch.images))[: len(batch.slots)])
    return TileRowPrediction(tiles, values, starts[0], np.concatenate(wanted))


def blend_band(
    plan: TilePlan,
    start: int,
    stop: int,
    predictions: Mapping[int, TileRowPrediction],
    *,
    nodata: float,
    channels: tuple[int, ...] = (),
    finish: Finish = lambda values, start: values,
) -> np.ndarray:
    """Rows of a map, blended as `stream_map` does.

    Args:
        plan: of the whole raster.
        start: the first of the rows.
        stop: the row behind the last.
        predictions: of all rows of tiles that touch these rows, by number.
        nodata: value of pixels that are not wanted.
        channels: as for `stream_map`.
        finish: as for `stream_map`.

    Returns:
        float32 (rows, W[, layers]).

    Raises:
        PredictionError: a wanted pixel has no finite prediction.
    """
    part = replace(plan, rows=tuple(plan.rows[index] for index in sorted(predictions)))
    blender = Blender(part, part.first_rows()[0], channels)
    blended = np.full((stop - start, plan.width, *channels), np.nan, np.float32)
    wanted = np.ones(blended.shape[:2], bool)

    def take(number: int) -> None:
        for first, values in blender.finished_before(number):
            low, high = max(first, start), min(first + len(values), stop)
            if low < high:
                blended[low - start : high - start] = values[low - first : high - first]
            if first + len(values) >= stop:
                return

    for number, index in enumerate(sorted(predictions)):
        take(number)
        one = predictions[index]
        for tile, values in zip(one.tiles, one.values, strict=True):
            blender.add(number, tile, values)
        low, high = max(one.start, start), min(one.start + len(one.wanted), stop)
        if low < high:
            wanted[low - start : high - start] = one.wanted[low - one.start : high - one.start]
    take(len(predictions))
    check_finite(blended, wanted, start)
    blended = finish(blended, start)
    blended[~wanted] = nodata
    return blended
