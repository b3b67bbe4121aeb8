"""The arithmetic of composites: scenes decoded by threads into sums or stacks, and rows of the result from those."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from biomass_jax.data.bands import BAND_NAMES, FILL, UNITS
from biomass_jax.data.raster.cog import DATA_LAYOUT
from biomass_jax.errors import PrepError
from data_prep.hls.granules import FMASK_FILL, Buffers, ReadRows, Scene, buffers, clear, observed

BLOCK = DATA_LAYOUT.block  # of composites, in pixels

# |int16| <= 2^15, so the int32 sum of up to 2^16 - 1 scenes can't overflow; the int16 count holds fewer.
MOST_SCENES = 2**15 - 1
_BANDS = len(BAND_NAMES)
_ABSENT = np.int16(2**15 - 1)  # sorts behind every value; equal values are the same median
_GROUP = 4  # scenes that a thread adds up before it touches the tile's sums
_PIECE = 32  # rows whose sums of one band stay in a core's cache
_REFLECTANCE, _ENOUGH_PIXELS = 2, 1000  # no land is that dark in all bands over so many pixels


class Mask(NamedTuple):
    """Settings of `hls.clear`."""

    drop_water: bool = False
    drop_high_aerosol: bool = False


@dataclass(frozen=True)
class CompositePlan:
    """What to do: scenes by time on one grid, `mean` or `median`, and how many threads and bytes to use."""

    scenes: tuple[Scene, ...]
    statistic: str
    min_clear: int
    mask: Mask
    threads: int
    memory: int


class _Seen(NamedTuple):
    """What a piece of a scene held."""

    observed: int = 0  # pixels whose Fmask is not fill
    clear: int = 0
    valid: bool = False  # whether any of them has all bands
    peak: int = 0  # the largest clear value

    def plus(self, other: "_Seen") -> "_Seen":
        """Both pieces together."""
        return _Seen(
            self.observed + other.observed,
            self.clear + other.clear,
            self.valid or other.valid,
            max(self.peak, other.peak),
        )


class _Window(NamedTuple):
    """Rows and columns of the tile, ends not included."""

    top: int
    bottom: int
    left: int
    right: int


class Counts:
    """Pixels counted while a composite is made.

    Attributes:
        by_scene: {scene: {`observed`, `clear`}}.
        covered: pixels of the result with values.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.by_scene = {name: {"observed": 0, "clear": 0} for name in names}
        self.covered = 0
        self._valid = dict.fromkeys(names, False)
        self._peak = dict.fromkeys(names, 0)

    def add(self, scene: Scene, seen: _Seen) -> None:
        """Add a piece of a scene."""
        name = scene.granule.name
        self.by_scene[name]["observed"] += seen.observed
        self.by_scene[name]["clear"] += seen.clear
        self._valid[name] |= seen.valid
        self._peak[name] = max(self._peak[name], seen.peak)

    def check(self, scenes: tuple[Scene, ...]) -> None:
        """PrepError for a scene without any value, or with values that can't be digital numbers."""
        for scene in scenes:
            name = scene.granule.name
            if not self._valid[name]:
                raise PrepError(
                    f"{scene.folder}: all of its pixels are fill (Fmask {FMASK_FILL} or a band {FILL}); "
                    "it is damaged or holds nothing of this tile: download it again, or take it out"
                )
            if self._peak[name] <= _REFLECTANCE and self.by_scene[name]["clear"] >= _ENOUGH_PIXELS:
                raise PrepError(
                    f"{scene.folder}: its {self.by_scene[name]['clear']:,} clear pixels are at most "
                    f"{self._peak[name]} in all bands: reflectance cut to integers, not {UNITS}"
                )


def row_bands(plan: CompositePlan, counts: Counts) -> Iterator[np.ndarray]:
    """Make the composite, from north to south.

    Args:
        plan: what to do.
        counts: is filled on the way, and complete after the last rows.

    Yields:
        (7, rows, width) int16: six bands and the number of clear scenes.

    Raises:
        PrepError: too many scenes, or one that can't be read, holds only fill or holds reflectance.
    """
    if len(plan.scenes) > MOST_SCENES:
        raise PrepError(f"{len(plan.scenes):,} scenes; expected at most {MOST_SCENES:,}")
    mean = plan.statistic == "mean"
    pixel_bytes = 4 * _BANDS + 2 if mean else 2 * _BANDS * len(plan.scenes)
    grid = plan.scenes[0].grid
    with _pool(plan.threads) as pool:
        for windows in _slabs(grid.height, grid.width, plan.memory // pixel_bytes):
            parts = [(_mean if mean else _median)(plan, pool, counts, window) for window in windows]
            for beside in zip(*parts, strict=True):
                rows = beside[0] if len(beside) == 1 else np.concatenate(beside, axis=2)
                counts.covered += int(np.count_nonzero(rows[-1]))
                yield rows
    counts.check(plan.scenes)


def _slabs(height: int, width: int, pixels: int) -> Iterator[list[_Window]]:
    """Windows of at most `pixels` (but at least a block of files) that lie beside each other, from north to south."""
    rows = min(height, max(BLOCK, pixels // width // BLOCK * BLOCK))
    columns = width if rows * width <= pixels else max(BLOCK, pixels // rows // BLOCK * BLOCK)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield [_Window(top, bottom, left, min(left + columns, width)) for left in range(0, width, columns)]


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing new once something has gone wrong."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _mean(plan: CompositePlan, pool: ThreadPoolExecutor, counts: Counts, window: _Window) -> Iterator[np.ndarray]:
    """Rows of a window as `row_bands` yields them: rounded means."""
    shape = (window.bottom - window.top, window.right - window.left)
    sums, number = np.zeros((_BANDS, *shape), np.int32), np.zeros(shape, np.int16)
    blocks = _blocks(window)
    locks = [threading.Lock() for _ in blocks]
    scratch = _Scratch(window)

    def run(job: tuple[tuple[Scene, ...], range]) -> list[_Seen]:
        """Add some blocks of some scenes."""
        scenes, wanted = job
        seen = [_Seen() for _ in scenes]
        with ExitStack() as stack:
            readers = [stack.enter_context(scene.reader()) for scene in scenes]
            for index in wanted:
                top, bottom = blocks[index]
                found = [
                    _masked(read, (top, bottom), window, plan.mask, scratch.get(place, bottom - top))
                    for place, read in enumerate(readers)
                ]
                seen = [one.plus(new) for one, (_, _, new) in zip(seen, found, strict=True)]
                rows = slice(top - window.top, bottom - window.top)
                with locks[index]:
                    _add([(planes, keep) for planes, keep, new in found if new.clear], sums[:, rows], number[rows])
        return seen

    groups = [plan.scenes[first : first + _GROUP] for first in range(0, len(plan.scenes), _GROUP)]
    # enough jobs to keep all threads busy to the end; no more, since each opens its scenes' files
    parts = min(len(blocks), max(2, -(-4 * plan.threads // len(groups))))
    edges = [len(blocks) * part // parts for part in range(parts + 1)]
    jobs = [(group, range(edges[part], edges[part + 1])) for group in groups for part in range(parts)]
    for (group, _), seen in zip(jobs, pool.map(run, jobs), strict=True):
        for scene, one in zip(group, seen, strict=True):
            counts.add(scene, one)

    def divide(block: tuple[int, int]) -> np.ndarray:
        rows = slice(block[0] - window.top, block[1] - window.top)
        # exact: a float64 quotient of these integers is a half only where the true one is
        means = np.divide(sums[:, rows], np.maximum(number[rows], 1))
        return _finished(np.rint(means, out=means), number[rows], plan.min_clear)

    for first in range(0, len(blocks), plan.threads):  # few at once: the writer takes them one by one
        yield from pool.map(divide, blocks[first : first + plan.threads])


def _add(found: list[tuple[np.ndarray, np.ndarray]], sums: np.ndarray, number: np.ndarray) -> None:
    """Add masked planes (6, rows, columns) and clear masks (rows, columns) of some scenes to the tile's.

    The sums of a tile lie far from any cache: scenes are added up in small pieces first.
    """
    for row in range(0, number.shape[0], _PIECE):
        rows = slice(row, row + _PIECE)
        for band in range(_BANDS if found else 0):
            total = found[0][0][band, rows].astype(np.int32)
            for planes, _ in found[1:]:
                total += planes[band, rows]
            sums[band, rows] += total
        for _, keep in found:
            number[rows] += keep[rows]


def _median(plan: CompositePlan, pool: ThreadPoolExecutor, counts: Counts, window: _Window) -> Iterator[np.ndarray]:
    """Rows of a window as `row_bands` yields them: medians, of two middle values their mean, half to even."""
    shape = (window.bottom - window.top, window.right - window.left)
    stack, number = np.empty((len(plan.scenes), _BANDS, *shape), np.int16), np.zeros(shape, np.int16)
    blocks = _blocks(window)
    lock = threading.Lock()
    scratch = _Scratch(window)

    def run(index: int) -> _Seen:
        seen = _Seen()
        with plan.scenes[index].reader() as read:
            for top, bottom in blocks:
                planes, keep, new = _masked(read, (top, bottom), window, plan.mask, scratch.get(0, bottom - top))
                seen = seen.plus(new)
                rows = slice(top - window.top, bottom - window.top)
                stack[index, :, rows] = np.where(keep, planes, _ABSENT)
                with lock:
                    number[rows] += keep
        return seen

    def middle(row: int) -> np.ndarray:
        ordered = np.sort(np.moveaxis(stack[:, :, row], 0, -1), axis=-1)  # (6, columns, scenes)
        clear_scenes = np.maximum(number[row].astype(np.intp), 1)[None, :, None]
        low = np.take_along_axis(ordered, (clear_scenes - 1) // 2, axis=-1)[..., 0]
        high = np.take_along_axis(ordered, clear_scenes // 2, axis=-1)[..., 0]
        return np.rint((low.astype(np.int32) + high) / 2)

    for scene, seen in zip(plan.scenes, pool.map(run, range(len(plan.scenes))), strict=True):
        counts.add(scene, seen)
    for top, bottom in blocks:
        rows = range(top - window.top, bottom - window.top)
        medians = np.stack(list(pool.map(middle, rows)), axis=1)
        yield _finished(medians, number[rows.start : rows.stop], plan.min_clear)


def _blocks(window: _Window) -> list[tuple[int, int]]:
    """Rows of a window cut where the files' blocks are."""
    return [(top, min(top + BLOCK, window.bottom)) for top in range(window.top, window.bottom, BLOCK)]


class _Scratch(threading.local):
    """Memory that a thread reads blocks of a window into, again and again: new memory would cost time and stay."""

    def __init__(self, window: _Window) -> None:
        self._shape = (min(BLOCK, window.bottom - window.top), window.right - window.left)
        self._held: list[Buffers] = []

    def get(self, place: int, rows: int) -> Buffers:
        """Buffers of `rows` rows, others for each place."""
        while len(self._held) <= place:
            self._held.append(buffers(*self._shape))
        planes, fmask = self._held[place]
        columns = self._shape[1]
        whole = planes.reshape(-1)[: _BANDS * rows * columns].reshape(_BANDS, rows, columns)
        return whole, fmask[:rows]


def _masked(
    read: ReadRows, rows: tuple[int, int], window: _Window, mask: Mask, into: Buffers
) -> tuple[np.ndarray, np.ndarray, _Seen]:
    """Rows of a scene: (6, rows, columns) int16 with 0 where not clear, (rows, columns) clear, and what was seen."""
    image, fmask = read(*rows, window.left, window.right, into)
    keep = clear(image, fmask, *mask)
    seen = observed(fmask)
    number = int(np.count_nonzero(keep))
    valid = number > 0 or bool((seen & (image != FILL).all(axis=-1)).any())
    planes = np.moveaxis(image, -1, 0)
    planes &= -keep.astype(np.int16)  # 0 or all bits: far quicker than adding under a mask
    return planes, keep, _Seen(int(np.count_nonzero(seen)), number, valid, int(planes.max()))


def _finished(values: np.ndarray, number: np.ndarray, min_clear: int) -> np.ndarray:
    """(6, rows, columns) whole numbers and (rows, columns) clear scenes -> (7, rows, columns) int16 with fill."""
    out = np.empty((_BANDS + 1, *number.shape), np.int16)
    out[:-1] = values
    out[-1] = number
    missing = (number < min_clear) | (out[:-1] == FILL).any(axis=0)  # a mean may be the fill value by chance
    out[:-1, missing] = FILL
    out[-1, missing] = 0
    return out
