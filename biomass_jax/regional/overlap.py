"""Maps that overlap as one: the values of any part of a mosaic; docs/regional.md has the formulae.

Maps whose pixels fall on each other, as those of one UTM zone do, become one raster first, pixel by pixel, and that is
brought to the mosaic's grid: so there are no seams within a zone, whatever its tiles' edges.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from biomass_jax.data.fingerprints import digest_of
from biomass_jax.data.raster.cog import MAP_LAYOUT
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.warp import MOST_PIXELS, MapFile, Part, PixelLattice, area_means, part_of
from biomass_jax.data.raster.zonal import SD
from biomass_jax.version import __version__

MEAN, NEWEST, INVERSE = "mean", "newest", "inverse_variance"
BLOCK = MAP_LAYOUT.block  # pixels along an edge of what is made, kept and written at once
LEAST_SHARE = 0.5 - 1e-6  # of a pixel's area that has to have data
LEAST_SD = 1e-3  # a smaller one counts as this: no map is right beyond doubt


class Member(NamedTuple):
    """A map in a mosaic: where it lies on the mosaic's grid, in pixels, and when its season ends."""

    map: MapFile
    lattice: PixelLattice
    top: float
    left: float
    bottom: float
    right: float
    day: int  # proleptic Gregorian ordinal, 0 where it doesn't tell


@dataclass(frozen=True)
class MosaicPlan:
    """What a mosaic is made from: its grid, its bands, the rule for overlaps, the maps in order of their paths."""

    grid: Grid
    layers: Mapping[str, str]
    nodata: float
    overlap: str
    members: Sequence[Member]

    def about(self) -> dict[str, object]:
        """All that its values depend on but the maps."""
        grid = {"crs": self.grid.crs.to_wkt() if self.grid.crs else "", "transform": list(self.grid.transform)[:6]}
        grid |= {"height": self.grid.height, "width": self.grid.width}
        return {"grid": grid, "layers": dict(self.layers), "overlap": self.overlap, "software": __version__}

    def meeting(self, top: int, left: int, bottom: int, right: int) -> list[Member]:
        """The maps that meet a part of the grid."""
        tops, lefts, bottoms, rights = self._edges
        met = (tops < bottom) & (bottoms > top) & (lefts < right) & (rights > left)
        return [self.members[number] for number in np.flatnonzero(met).tolist()]

    @cached_property
    def _edges(self) -> np.ndarray:
        """Tops, lefts, bottoms and rights of all maps, for many thousand questions."""
        return np.array([(one.top, one.left, one.bottom, one.right) for one in self.members]).T

    def blocks(self) -> Iterator[Part]:
        """Top, left, bottom and right of its blocks, in reading order."""
        height, width = self.grid.height, self.grid.width
        for top, left in product(range(0, height, BLOCK), range(0, width, BLOCK)):
            yield top, left, min(top + BLOCK, height), min(left + BLOCK, width)

    def digest(self) -> str:
        """Of all that the mosaic is made from."""
        return digest_of((self.about(), [one.map.identity for one in self.members]))


def block_values(layout: MosaicPlan, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """One part of a mosaic.

    Args:
        layout: the mosaic.
        top: its first row.
        left: its first column.
        bottom: the row behind its last.
        right: the column behind its last.

    Returns:
        float32 (bands, rows, columns).

    Raises:
        RasterError: a map can't be read, or has changed.
    """
    values = np.full((len(layout.layers), bottom - top, right - left), layout.nodata, np.float32)
    members = layout.meeting(top, left, bottom, right)
    if members:
        # Maps may reach a bit beyond the points of their outlines.
        edge_top = max(top, int(min(one.top for one in members)) - 1)
        edge_left = max(left, int(min(one.left for one in members)) - 1)
        edge_bottom = min(bottom, int(max(one.bottom for one in members)) + 2)
        edge_right = min(right, int(max(one.right for one in members)) + 2)
        inside = values[:, edge_top - top : edge_bottom - top, edge_left - left : edge_right - left]
        _fill(layout, edge_top, edge_left, inside)
    return values


def _fill(layout: MosaicPlan, top: int, left: int, values: np.ndarray) -> None:
    """Fill a part of a mosaic in, by halves where that takes too many pixels of the maps."""
    height, width = values.shape[1:]
    grid = part_of(layout.grid, top, left, top + height, left + width)
    by_lattice: dict[PixelLattice, list[Member]] = {}
    for one in layout.meeting(top, left, top + height, left + width):
        by_lattice.setdefault(one.lattice, []).append(one)
    windows = {lattice: window for lattice in by_lattice if (window := lattice.cover(grid)) is not None}
    most = max(((low - high) * (east - west) for high, west, low, east in windows.values()), default=0)
    if most > MOST_PIXELS and values[0].size > 1:
        if height >= width:
            half = height // 2
            _fill(layout, top, left, values[:, :half])
            _fill(layout, top + half, left, values[:, half:])
        else:
            half = width // 2
            _fill(layout, top, left, values[..., :half])
            _fill(layout, top, left + half, values[..., half:])
        return
    parts = []
    for lattice, window in windows.items():
        stacked, valid = _stacked(layout, lattice, window, by_lattice[lattice])
        if valid.any():
            parts.append(area_means(stacked, valid, lattice.grid(*window), grid))
    if parts:
        found, share = _joined(layout.overlap, parts)
        values[:] = np.where(share >= LEAST_SHARE, found, layout.nodata)


def _stacked(
    layout: MosaicPlan, lattice: PixelLattice, window: Part, members: Sequence[Member]
) -> tuple[np.ndarray, np.ndarray]:
    """Maps whose pixels fall on each other as one, pixel by pixel.

    Returns:
        float64 (bands + 1, rows, columns), of which the last tells how much the pixel counts beside those of other
        lattices: by NEWEST the day, else the standard deviation whose inverse square is the sum of the weights; and
        bool (rows, columns).
    """
    top, left, bottom, right = window
    names, sd = list(layout.layers), sd_layer(layout.layers)
    total = np.zeros((len(names) + 1, bottom - top, right - left))
    weight = np.zeros(total.shape[1:])
    for one in sorted(members, key=lambda one: -one.day) if layout.overlap == NEWEST else members:
        row, column = lattice.place(one.map.grid)
        first, last = max(row, top), min(row + one.map.grid.height, bottom)
        west, east = max(column, left), min(column + one.map.grid.width, right)
        if first >= last or west >= east:
            continue
        values, valid = one.map.read(names, (first - row, west - column, last - row, east - column))
        at = (slice(first - top, last - top), slice(west - left, east - left))
        counts = valid.astype(np.float64)
        if layout.overlap == NEWEST:
            counts *= weight[at] == 0
        elif layout.overlap == INVERSE and sd is not None:
            counts /= np.maximum(values[sd].astype(np.float64), LEAST_SD) ** 2
        total[(slice(-1), *at)] += counts * values
        total[(-1, *at)] += counts * one.day
        weight[at] += counts
    valid = weight > 0
    divisor = np.where(valid, weight, 1)
    total /= divisor
    if layout.overlap != NEWEST:
        total[-1] = divisor**-0.5
    return total, valid


def _joined(overlap: str, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Means of several lattices, each with its share of the pixels, as one: values and share."""
    if len(parts) == 1:
        means, share = parts[0]
        return means[:-1], share
    means, shares = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    if overlap == NEWEST:  # older ones count for what newer ones leave free
        order = np.argsort(np.where(shares > 0, -means[:, -1], np.inf), axis=0, kind="stable")
        ordered = np.take_along_axis(shares, order, axis=0)
        free = np.clip(1 - (np.cumsum(ordered, axis=0) - ordered), 0, 1)
        weights = np.zeros_like(shares)
        np.put_along_axis(weights, order, np.minimum(ordered, free), axis=0)
    else:
        weights = np.divide(shares, means[:, -1] ** 2, out=np.zeros_like(shares), where=shares > 0)
    total = weights.sum(axis=0)
    values = (weights[:, None] * means[:, :-1]).sum(axis=0) / np.where(total > 0, total, 1)
    return values, shares.sum(axis=0)


def sd_layer(layers: Mapping[str, str]) -> int | None:
    """Which of the bands is the standard deviation of the first one."""
    names = list(layers)
    return names.index(sd) if (sd := f"{names[0]}{SD}") in names else None
