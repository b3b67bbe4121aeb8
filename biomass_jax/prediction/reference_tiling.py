"""The tilings of the two published versions of the reference, for comparing maps with maps made by it.

Sources: `terratorch/tasks/tiled_inference.py` of terratorch 0.99.2 (the release that the biomass model was trained
with) and 1.2.11. Both are kept with their faults; where they leave pixels without a prediction or can't run at all,
the plan raises and names the default tiling. They stream like the default one: tiles are summed from north to south
instead of borders first, which changes a mean by float32 rounding only.
"""

import itertools
from collections.abc import Iterable

import numpy as np

from biomass_jax.errors import TilingError
from biomass_jax.prediction.tiling import Tile, TilePlan, TileRow, ramp_window

Pair = tuple[int, int]  # (along rows, along columns)
# One tile as the reference lists it: first row and column, and whether it is used whole or cropped by delta.
Placed = tuple[int, int, bool]
INNER, BORDER = 0, 1  # the two kinds of weights


def reference_1_2_tiles(padded: Pair, tile: Pair, stride: Pair) -> list[Placed]:
    """Tiles of 1.2.11 in its order: right border, bottom border, corner, interior; all of them are cropped."""
    last_row, last_column = padded[0] - tile[0], padded[1] - tile[1]
    rows, columns = range(0, last_row - 1, stride[0]), range(0, last_column - 1, stride[1])
    places = [(row, last_column) for row in rows] + [(last_row, column) for column in columns]
    places += [(last_row, last_column), *itertools.product(rows, columns)]
    return [(row, column, False) for row, column in places]


def reference_0_99_tiles(size: Pair, tile: Pair, stride: Pair) -> list[Placed]:
    """Tiles of 0.99.2 in its order; border tiles step by the whole tile and interior ones may repeat the border."""
    last_row, last_column = size[0] - tile[0], size[1] - tile[1]
    return [
        *((row, last_column, True) for row in range(0, last_row + 1, tile[0])),
        *((last_row, column, True) for column in range(0, last_column + 1, tile[1])),
        (last_row, last_column, True),
        *(
            (row, column, row == 0 or column == 0)
            for row in range(0, last_row + 1, stride[0])
            for column in range(0, last_column + 1, stride[1])
        ),
    ]


def reference_1_2_plan(height: int, width: int, *, tile: Pair, stride: Pair, margin: int, blend: str) -> TilePlan:
    """TilePlan of terratorch 1.2.11 with its padding, so that every tile is cropped.

    Raises:
        TilingError: the raster is smaller than the tile even when padded, or a pixel stays without a prediction.
    """
    delta = min(margin, (tile[0] - stride[0]) // 2, (tile[1] - stride[1]) // 2)
    name = "reference_1_2"
    if delta >= min(height, width):
        raise _failure(name, height, width, f"it reflects {delta} px, which needs a side of at least {delta + 1} px")
    size = (height + 2 * delta, width + 2 * delta)
    if size[0] < tile[0] or size[1] < tile[1]:
        raise _failure(name, height, width, f"with its {delta} px of padding that is smaller than the tile {tile}")
    placed = reference_1_2_tiles(size, tile, stride)
    return _plan(name, (height, width), tile, delta, delta, placed, (_weights_1_2(tile, stride, delta, blend),))


def reference_0_99_plan(height: int, width: int, *, tile: Pair, stride: Pair) -> TilePlan:
    """TilePlan of terratorch 0.99.2: plain mean, crop min(16, (tile - stride) // 2), no padding.

    Raises:
        TilingError: the raster is smaller than the tile, or a pixel stays without a prediction.
    """
    name = "reference_0_99"
    if height < tile[0] or width < tile[1]:
        raise _failure(name, height, width, f"it takes no raster smaller than the tile {tile}")
    delta = min(16, (tile[0] - stride[0]) // 2, (tile[1] - stride[1]) // 2)
    inner = np.ones((tile[0] - 2 * delta, tile[1] - 2 * delta), np.float32)
    placed = reference_0_99_tiles((height, width), tile, stride)
    return _plan(name, (height, width), tile, 0, delta, placed, (inner, np.ones(tile, np.float32)))


def _weights_1_2(tile: Pair, stride: Pair, delta: int, blend: str) -> np.ndarray:
    """Blend mask of 1.2.11: its ramps are longer than the overlap of the cropped tiles by delta."""
    sizes = [side - 2 * delta for side in tile]
    if blend == "none":
        return np.ones(sizes, np.float32)
    ramps = [min(side // 2, side - step) - delta for side, step in zip(tile, stride, strict=True)]
    rows, columns = (ramp_window(size, ramp) for size, ramp in zip(sizes, ramps, strict=True))
    return np.asarray(np.outer(rows, columns) + 1e-6, np.float32)


def _plan(
    name: str, size: Pair, tile: Pair, pad: int, delta: int, placed: Iterable[Placed], weights: tuple[np.ndarray, ...]
) -> TilePlan:
    """Sort tiles into rows from north to south and check that they cover the raster."""
    rows: dict[int, list[Tile]] = {}
    for row, column, whole in placed:
        rows.setdefault(row, []).append(Tile(column, 0, BORDER) if whole else Tile(column, delta, INNER))
    plan = TilePlan(
        height=size[0],
        width=size[1],
        tile_height=tile[0],
        tile_width=tile[1],
        pad=pad,
        rows=tuple(TileRow(row, tuple(rows[row])) for row in sorted(rows)),
        weights=weights,
    )
    gap = first_gap(plan)
    if gap is not None:
        raise _failure(name, *size, f"it leaves pixel (row {gap[0]}, column {gap[1]}) without a prediction")
    return plan


def first_gap(plan: TilePlan) -> Pair | None:
    """The first pixel (row, column) that no tile of a plan covers, None where all are covered."""
    windows = [plan.window(row, tile)[:2] for row in plan.rows for tile in row.tiles]
    starts = sorted({0, *(rows.start for rows, _ in windows), *(rows.stop for rows, _ in windows)})
    for start in starts:  # coverage changes at these rows only
        if start >= plan.height:
            break
        reached = 0
        active = sorted((c.start, c.stop) for rows, c in windows if rows.start <= start < rows.stop)
        for first, stop in active:
            if first > reached:
                break
            reached = max(reached, stop)
        if reached < plan.width:
            return start, reached
    return None


def _failure(name: str, height: int, width: int, why: str) -> TilingError:
    """An error that names the algorithm, the raster and the way out."""
    return TilingError(f"tiling {name!r} can't map a raster of {height} x {width} px: {why}; use tiling='default'")
