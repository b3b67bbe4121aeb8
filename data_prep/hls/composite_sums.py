"""The arithmetic of composites: scenes decoded by threads into sums or stacks, and rows of the result from those."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from rasterio.windows import Window

from biomass_jax.data.bands import BAND_NAMES, FILL, UNITS
from biomass_jax.data.raster.cog import DATA_LAYOUT
from biomass_jax.data.raster.encoding import AUTO, check_plausible
from biomass_jax.errors import PrepError
from data_prep.hls.granules import FMASK_FILL, USED, WATER, Buffers, Found, ReadInto, Scene, buffers, clear, observed
from data_prep.settings import CompositeSettings

BLOCK = DATA_LAYOUT.block  # of composites, in pixels
MEMORY = 512 * 2**20  # bytes for sums or stacks; the whole takes about 400 MiB more

# |int16| <= 2^15, so the int32 sum of up to 2^16 - 1 scenes can't overflow; the int16 count holds fewer.
MOST_SCENES = 2**15 - 1
_BANDS = len(BAND_NAMES)
_ABSENT = np.int16(2**15 - 1)  # sorts behind every value; equal values are the same median
_GROUP = 4  # scenes that a thread adds up before it touches the tile's sums
_PIECE = 32  # rows whose sums of one band stay in a core's cache
_REFLECTANCE, _ENOUGH_PIXELS = 2, 1000  # no land is that dark in all bands over so many pixels
_SAMPLE, _MOST_SAMPLED = 2048, 16_384  # pixels of a piece, and of a scene, whose values are looked at


class CompositePlan(NamedTuple):
    """What to do: scenes by time on one grid, how, and with how many threads."""

    scenes: Sequence[Scene]
    settings: CompositeSettings
    threads: int


class _Seen(NamedTuple):
    """What a piece of a scene held."""

    observed: int  # pixels whose Fmask is not fill
    clear: int
    valid: bool  # whether any of them has all bands
    peak: int  # the largest clear value
    sample: np.ndarray  # (pixels, 6) int16 of clear land
    found: Found


class Counts:
    """Pixels counted while a composite is made.

    Attributes:
        by_scene: {scene: {`observed`, `clear`}}.
        covered: pixels of the result with values.
        below_min_clear: pixels without values that some scene saw clear, but fewer than `min_clear`.
        used: {granule: pixels} of older granules of an overpass, where the newer one has no data.
        odd: {(granule, what): pixels and bands} of what was taken for no-data besides no-data.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.by_scene = {scene.granule.name: {"observed": 0, "clear": 0} for scene in scenes}
        self.covered = self.below_min_clear = 0
        self.used = {older.granule.name: 0 for scene in scenes for older in scene.older}
        self.odd: Found = Counter()
        self._valid = dict.fromkeys(self.by_scene, False)
        self._peak = dict.fromkeys(self.by_scene, 0)
        self._samples: dict[str, list[np.ndarray]] = {name: [] for name in self.by_scene}

    def add(self, scene: Scene, seen: _Seen) -> None:
        """Add a piece of a scene."""
        name = scene.granule.name
        self.by_scene[name]["observed"] += seen.observed
        self.by_scene[name]["clear"] += seen.clear
        self._valid[name] |= seen.valid
        self._peak[name] = max(self._peak[name], seen.peak)
        if sum(map(len, self._samples[name])) < _MOST_SAMPLED:
            self._samples[name].append(seen.sample)
        for (granule, what), pixels in seen.found.items():
            if what == USED:
                self.used[granule] += pixels
            else:
                self.odd[granule, what] += pixels

    def check(self, scenes: Sequence[Scene]) -> None:
        """PrepError for a scene without any value; RasterError for values that can't be digital numbers."""
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
            if scene.encoding == AUTO:
                check_plausible(np.concatenate(self._samples[name]), "int16", str(scene.folder))


def row_bands(plan: CompositePlan, counts: Counts) -> Iterator[np.ndarray]:
    """Make the composite, from north to south.

    Args:
        plan: what to do.
        counts: is filled on the way, and complete after the last rows.

    Yields:
        (7, rows, width) int16: six bands and the number of clear scenes.

    Raises:
        PrepError: too many scenes, or one that holds only fill or holds reflectance.
        RasterError: a scene can't be read, or its values can't be digital numbers.
    """
    if len(plan.scenes) > MOST_SCENES:
        raise PrepError(f"{len(plan.scenes):,} scenes; expected at most {MOST_SCENES:,}")
    mean = plan.settings.statistic == "mean"
    pixel_bytes = 4 * _BANDS + 2 if mean else 2 * _BANDS * len(plan.scenes)
    grid = plan.scenes[0].grid
    pool = ThreadPoolExecutor(plan.threads)
    try:
        for windows in _slabs(grid.height, grid.width, MEMORY // pixel_bytes):
            parts = [(_mean if mean else _median)(plan, pool, counts, window) for window in windows]
            for beside in zip(*parts, strict=True):
                rows = beside[0] if len(beside) == 1 else np.concatenate(beside, axis=2)
                counts.covered += int(np.count_nonzero(rows[-1]))
                yield rows
    finally:
        pool.shutdown(cancel_futures=True)  # threads begin nothing new once something has gone wrong
    counts.check(plan.scenes)


def _slabs(height: int, width: int, pixels: int) -> Iterator[list[Window]]:
    """Windows of at most `pixels` (but at least a block of files) that lie beside each other, from north to south."""
    rows = min(height, max(BLOCK, pixels // width // BLOCK * BLOCK))
    columns = width if rows * width <= pixels else max(BLOCK, pixels // rows // BLOCK * BLOCK)
    for top in range(0, height, rows):
        down = min(rows, height - top)
        yield [Window(left, top, min(columns, width - left), down) for left in range(0, width, columns)]


def _mean(plan: CompositePlan, pool: ThreadPoolExecutor, counts: Counts, window: Window) -> Iterator[np.ndarray]:
    """Rows of a window as `row_bands` yields them: rounded means."""
    shape = (window.height, window.width)
    sums, number = np.zeros((_BANDS, *shape), np.int32), np.zeros(shape, np.int16)
    blocks = _blocks(window)
    locks = [threading.Lock() for _ in blocks]
    scratch = _Scratch(window)

    def run(job: tuple[Sequence[Scene], range]) -> list[tuple[Scene, _Seen]]:
        """Add some blocks of some scenes."""
        scenes, wanted = job
        seen: list[tuple[Scene, _Seen]] = []
        with ExitStack() as stack:
            readers = [stack.enter_context(scene.reader()) for scene in scenes]
            for index in wanted:
                rows = blocks[index]
                found = [
                    _masked(read, rows, window, plan.settings, scratch.get(place, rows))
                    for place, read in enumerate(readers)
                ]
                seen += zip(scenes, (new for _, _, new in found), strict=True)
                with locks[index]:
                    _add([(planes, keep) for planes, keep, new in found if new.clear], sums[:, rows], number[rows])
        return seen

    groups = [plan.scenes[first : first + _GROUP] for first in range(0, len(plan.scenes), _GROUP)]
    # enough jobs to keep all threads busy to the end; no more, since each opens its scenes' files
    parts = min(len(blocks), max(2, -(-4 * plan.threads // len(groups))))
    edges = [len(blocks) * part // parts for part in range(parts + 1)]
    jobs = [(group, range(edges[part], edges[part + 1])) for group in groups for part in range(parts)]
    for seen in pool.map(run, jobs):
        for scene, one in seen:
            counts.add(scene, one)

    def divide(rows: slice) -> np.ndarray:
        # exact: a float64 quotient of these integers is a half only where the true one is
        means = np.divide(sums[:, rows], np.maximum(number[rows], 1))
        return _finished(np.rint(means, out=means), number[rows], plan.settings.min_clear)

    counts.below_min_clear += _below(number, plan.settings.min_clear)
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


def _median(plan: CompositePlan, pool: ThreadPoolExecutor, counts: Counts, window: Window) -> Iterator[np.ndarray]:
    """Rows of a window as `row_bands` yields them: medians, of two middle values their mean, half to even."""
    shape = (window.height, window.width)
    stack, number = np.empty((len(plan.scenes), _BANDS, *shape), np.int16), np.zeros(shape, np.int16)
    blocks = _blocks(window)
    lock = threading.Lock()
    scratch = _Scratch(window)

    def run(index: int) -> list[_Seen]:
        seen = []
        with plan.scenes[index].reader() as read:
            for rows in blocks:
                planes, keep, new = _masked(read, rows, window, plan.settings, scratch.get(0, rows))
                seen.append(new)
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
        for one in seen:
            counts.add(scene, one)
    counts.below_min_clear += _below(number, plan.settings.min_clear)
    for rows in blocks:
        medians = np.stack(list(pool.map(middle, range(rows.start, rows.stop))), axis=1)
        yield _finished(medians, number[rows], plan.settings.min_clear)


def _blocks(window: Window) -> list[slice]:
    """Rows of a window, counted from its own top, cut where the files' blocks are."""
    return [slice(top, min(top + BLOCK, window.height)) for top in range(0, window.height, BLOCK)]


class _Scratch(threading.local):
    """Memory that a thread reads blocks of a window into, again and again: new memory would cost time and stay."""

    def __init__(self, window: Window) -> None:
        self._shape = (min(BLOCK, window.height), window.width)
        self._held: list[Buffers] = []

    def get(self, place: int, rows: slice) -> Buffers:
        """Buffers for so many rows, others for each place."""
        while len(self._held) <= place:
            self._held.append(buffers(*self._shape))
        planes, fmask = self._held[place]
        count = rows.stop - rows.start
        return planes[:, :count], fmask[:count]


def _masked(
    read: ReadInto, rows: slice, window: Window, settings: CompositeSettings, into: Buffers
) -> tuple[np.ndarray, np.ndarray, _Seen]:
    """Rows of a scene: (6, rows, columns) int16 with 0 where not clear, (rows, columns) clear, and what was seen."""
    found = read(Window(window.col_off, window.row_off + rows.start, window.width, rows.stop - rows.start), into)
    planes, fmask = into
    image = np.moveaxis(planes, 0, -1)
    keep = clear(image, fmask, settings.drop_water, settings.drop_high_aerosol)
    seen = observed(fmask)
    number = int(np.count_nonzero(keep))
    valid = number > 0 or bool((seen & (image != FILL).all(axis=-1)).any())
    step = max(1, int((keep.size / _SAMPLE) ** 0.5))
    thin = np.s_[::step, ::step]
    sample = image[thin][keep[thin] & (fmask[thin] & WATER == 0)]  # over water correct values may be negative
    planes &= -keep.astype(np.int16)  # 0 or all bits: far quicker than adding under a mask
    return planes, keep, _Seen(int(np.count_nonzero(seen)), number, valid, int(planes.max()), sample, found)


def _below(number: np.ndarray, min_clear: int) -> int:
    """How many pixels have clear scenes, but too few, (rows, columns) of them."""
    return int(np.count_nonzero((number > 0) & (number < min_clear)))


def _finished(values: np.ndarray, number: np.ndarray, min_clear: int) -> np.ndarray:
    """(6, rows, columns) whole numbers and (rows, columns) clear scenes -> (7, rows, columns) int16 with fill."""
    out = np.empty((_BANDS + 1, *number.shape), np.int16)
    out[:-1] = values
    out[-1] = number
    missing = (number < min_clear) | (out[:-1] == FILL).any(axis=0)  # a mean may be the fill value by chance
    out[:-1, missing] = FILL
    out[-1, missing] = 0
    return out
