"""Cut a raster of any size into overlapping tiles and blend their predictions row band by row band (NumPy only).

A plan lists the rows of tiles from north to south. Whoever streams a raster reads the source rows of one row of tiles
after the other (`SourceRows`), predicts them in batches that run over row ends, and adds them to a `Blender`, which
hands over every row of the map as soon as no later tile can touch it. Memory grows with tile height x raster width,
never with the raster's height. Tiles are added in the plan's order whatever the batch size, so that a pixel's sum is
always taken in one order.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from biomass_jax.errors import TilingError

ALGORITHMS = ("default", "reference_0_99", "reference_1_2")
BLENDS = ("cosine", "none")
# Smallest weight of a used pixel: far below any ramp's first step, so it only guards against division by zero.
SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Tile:
    """One tile of a row: its first column in the padded raster and the part of its prediction that is used.

    `crop` rows and columns on each side are left out; `kind` picks the plan's weights, whose shape is the shape of the
    used part.
    """

    column: int
    crop: int
    kind: int = 0


@dataclass(frozen=True)
class TileRow:
    """The tiles that begin in one row of the padded raster, in the order in which they are summed."""

    row: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class TilePlan:
    """Where tiles lie and how they are weighted, for one raster size.

    The padded raster has `pad` reflected rows above row 0 and as many columns left of column 0; below and to the right
    it is reflected as far as the tiles reach. Rows of tiles come in ascending order.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    pad: int
    rows: tuple[TileRow, ...]
    weights: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return sum(len(row.tiles) for row in self.rows)

    def window(self, row: TileRow, tile: Tile) -> tuple[slice, slice, slice, slice]:
        """Rows and columns of the raster that a tile's used part covers, then the same pixels inside the used part."""
        used_height, used_width = self.weights[tile.kind].shape
        first_row = row.row + tile.crop - self.pad
        first_column = tile.column + tile.crop - self.pad
        rows = slice(max(first_row, 0), min(first_row + used_height, self.height))
        columns = slice(max(first_column, 0), min(first_column + used_width, self.width))
        inside_rows = slice(rows.start - first_row, rows.stop - first_row)
        return rows, columns, inside_rows, slice(columns.start - first_column, columns.stop - first_column)

    def source_rows(self, index: int) -> tuple[int, int]:
        """(start, stop) of the raster's rows that the row of tiles number `index` is cut from."""
        rows = self.reflected_rows(index)
        return int(rows.min()), int(rows.max()) + 1

    def reflected_rows(self, index: int) -> np.ndarray:
        """(tile height,) the raster's row behind each row of the tiles of the row number `index`."""
        return reflect_index(np.arange(self.tile_height) - self.pad + self.rows[index].row, self.height)

    def of_row(self, index: int) -> "TilePlan":
        """The plan of one row of tiles alone, number `index`."""
        return replace(self, rows=(self.rows[index],))

    def bands(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """(start, stop, rows of tiles) of row bands of the raster that are blended from few rows of tiles each."""
        edges = [*self.first_rows(), self.height]
        covered = [[self.window(row, tile)[0] for tile in row.tiles] for row in self.rows]
        return [
            (
                start,
                stop,
                tuple(i for i, rows in enumerate(covered) if any(r.start < stop and r.stop > start for r in rows)),
            )
            for start, stop in itertools.pairwise(edges)
            if start < stop
        ]

    def first_rows(self) -> list[int]:
        """For each row of tiles the first raster row that it or any later row of tiles touches."""
        firsts = [min(row.row + tile.crop for tile in row.tiles) - self.pad for row in self.rows]
        return [max(int(first), 0) for first in np.minimum.accumulate(firsts[::-1])[::-1]]


def check_settings(tile: int, stride: int, margin: int, blend: str, tiling: str) -> None:
    """Raise TilingError where tile settings (pixels) make no sense; every message says what would."""
    for name, value, smallest in (("tile", tile, 1), ("stride", stride, 1), ("margin", margin, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise TilingError(f"{name} is {value!r}; expected a whole number of pixels, {smallest} or more")
    if blend not in BLENDS:
        raise TilingError(f"blend is {blend!r}; expected one of {', '.join(BLENDS)}")
    if tiling not in ALGORITHMS:
        raise TilingError(f"tiling is {tiling!r}; expected one of {', '.join(ALGORITHMS)}")
    if tiling == "reference_0_99" and blend != "cosine":
        raise TilingError("tiling 'reference_0_99' never blends, so blend='none' has no meaning there: leave it alone")
    if stride > tile:
        raise TilingError(f"stride {stride} is larger than the tile ({tile}): pixels between tiles would be left out")
    if tiling == "default" and stride > tile - 2 * margin:
        raise TilingError(
            f"stride {stride} leaves gaps: a tile of {tile} px without its margin of {margin} px on each side covers "
            f"{tile - 2 * margin} px; take a stride of at most {max(tile - 2 * margin, 1)}, or a smaller margin"
        )


def reflect_index(positions: np.ndarray, size: int) -> np.ndarray:
    """Map positions outside [0, size) back inside by mirroring at the outer pixels' centres, as often as needed.

    One pixel has nothing to mirror and is repeated.
    """
    if size == 1:
        return np.zeros_like(positions)
    period = 2 * (size - 1)
    folded = np.mod(positions, period)
    return np.where(folded < size, folded, period - folded)


def origins(padded: int, tile: int, stride: int) -> list[int]:
    """First pixels of the tiles along one side: every `stride` px, the last tile moved back to end with the side."""
    starts = list(range(0, padded - tile + 1, stride))
    if starts[-1] != padded - tile:
        starts.append(padded - tile)
    return starts


def ramp_window(size: int, ramp: int) -> np.ndarray:
    """Ones of length `size` with a raised-cosine ramp of `ramp` px at both ends; the ramps of two tiles sum to 1."""
    window = np.ones(size)
    if ramp:
        rise = 0.5 - 0.5 * np.cos(np.pi * np.arange(1, ramp + 1) / (ramp + 1))
        window[:ramp] = rise
        window[size - ramp :] = rise[::-1]
    return window


def blend_weights(tile: int, stride: int, margin: int, blend: str) -> np.ndarray:
    """Weights (tile - 2 margin, tile - 2 margin) of a tile's used part, float32 and positive everywhere."""
    used = tile - 2 * margin
    ramp = min(used - stride, used // 2) if blend == "cosine" else 0
    window = ramp_window(used, ramp)
    return np.maximum(np.outer(window, window), SMALLEST_WEIGHT).astype(np.float32)


def default_plan(height: int, width: int, *, tile: int, stride: int, margin: int, blend: str) -> TilePlan:
    """The project's own tiling: every pixel of the raster lies at least `margin` px inside each tile that maps it.

    The raster is reflected by `margin` on every side, and further where that is still smaller than a tile. The outer
    `margin` px of each tile are dropped; what is left is weighted by raised-cosine ramps over the overlap
    (tile - stride - 2 margin), or with blend 'none' by 1, so that overlaps are plain means of the tiles: unlike taking
    the last tile, that favours no direction.
    """
    tiles = tuple(Tile(column, margin) for column in origins(max(width + 2 * margin, tile), tile, stride))
    return TilePlan(
        height=height,
        width=width,
        tile_height=tile,
        tile_width=tile,
        pad=margin,
        rows=tuple(TileRow(row, tiles) for row in origins(max(height + 2 * margin, tile), tile, stride)),
        weights=(blend_weights(tile, stride, margin, blend),),
    )


def _span(index: np.ndarray) -> slice | np.ndarray:
    """A slice where indexes follow one another (nothing is copied), else the indexes."""
    consecutive = index[-1] - index[0] + 1 == len(index) and bool(np.all(np.diff(index) == 1))
    return slice(int(index[0]), int(index[-1]) + 1) if consecutive else index


class SourceRows:
    """The source rows that the current row of tiles needs, each read once and dropped when no later tile needs it."""

    def __init__(self, plan: TilePlan, read_rows: Callable[[int, int], np.ndarray], *, all_rows: bool = True) -> None:
        """`read_rows(start, stop)` returns source rows (stop - start, width, channels).

        Rows that no tile needs are read as well, for the reader's other uses, unless `all_rows` says otherwise.
        """
        self._plan = plan
        self._read_rows = read_rows
        self._rows = [plan.reflected_rows(index) for index in range(len(plan.rows))]
        self._columns = reflect_index(
            np.arange(max(t.column for r in plan.rows for t in r.tiles) + plan.tile_width) - plan.pad, plan.width
        )
        self._stops = [int(stop) for stop in np.maximum.accumulate([rows.max() + 1 for rows in self._rows])]
        self._starts = [int(start) for start in np.minimum.accumulate([rows.min() for rows in self._rows][::-1])[::-1]]
        self._buffer: np.ndarray | None = None
        self._start = self._stop = 0 if all_rows else self._starts[0]
        if all_rows:
            self._stops[-1] = plan.height

    def advance(self, index: int) -> None:
        """Read what the row of tiles number `index` needs beyond what is held; call with 0, 1, 2 ... in turn."""
        start, stop = self._starts[index], self._stops[index]
        fresh = self._read_rows(self._stop, stop) if stop > self._stop else None
        if self._buffer is None:
            assert fresh is not None
            rows = max(last - first for first, last in zip(self._starts, self._stops, strict=True))
            self._buffer = np.empty((rows, *fresh.shape[1:]), fresh.dtype)
        held = self._stop - start
        self._buffer[:held] = self._buffer[start - self._start : self._stop - self._start]
        if fresh is not None:
            self._buffer[held : stop - start] = fresh
        self._start, self._stop = start, stop

    def cut(self, index: int, tile: Tile) -> np.ndarray:
        """One tile (tile height, tile width, channels) of the row of tiles that `advance` was called with."""
        assert self._buffer is not None
        rows = _span(self._rows[index] - self._start)
        columns = _span(self._columns[tile.column : tile.column + self._plan.tile_width])
        return self._buffer[rows][:, columns]


class Blender:
    """Weighted mean of overlapping predictions in a band of accumulators as high as a tile.

    For each row of tiles write what `finished_before(index)` yields, then `add` its tiles; in the end write what
    `finished_before` of the number of rows of tiles yields. Rows come out in order, each once.
    """

    def __init__(self, plan: TilePlan, start: int = 0, channels: tuple[int, ...] = ()) -> None:
        """`start` is the first row that any tile touches; `channels` () or (C,) values a pixel, each blended alike."""
        self._plan = plan
        self._shape = (plan.width, *channels)
        self._firsts = [*plan.first_rows(), plan.height]
        self._start = start
        rows = min(plan.tile_height, plan.height)
        self._sum = np.zeros((rows, *self._shape), np.float32)
        self._weight = np.zeros((rows, plan.width, *(1 for _ in channels)), np.float32)

    def add(self, index: int, tile: Tile, prediction: np.ndarray) -> None:
        """Add the prediction (tile height, tile width[, C]) of one tile of the row of tiles number `index`."""
        rows, columns, inside_rows, inside_columns = self._plan.window(self._plan.rows[index], tile)
        weights = self._plan.weights[tile.kind]
        used = prediction[tile.crop : tile.crop + weights.shape[0], tile.crop : tile.crop + weights.shape[1]]
        weights = weights[inside_rows, inside_columns].reshape(
            -1, columns.stop - columns.start, *self._weight.shape[2:]
        )
        band = slice(rows.start - self._start, rows.stop - self._start)
        self._sum[band, columns] += weights * used[inside_rows, inside_columns]
        self._weight[band, columns] += weights

    def finished_before(self, index: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, values) of the rows that no tile of row of tiles number `index` or later can touch.

        Values are float32, NaN where no tile was added.
        """
        stop = self._firsts[index]
        while self._start < stop:
            count = min(stop - self._start, len(self._sum))
            values = np.full((count, *self._shape), np.nan, np.float32)
            np.divide(self._sum[:count], self._weight[:count], out=values, where=self._weight[:count] > 0)
            for accumulator in (self._sum, self._weight):
                accumulator[: len(accumulator) - count] = accumulator[count:].copy()
                accumulator[len(accumulator) - count :] = 0
            start = self._start
            self._start += count
            yield start, values
