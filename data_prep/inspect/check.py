"""Do labels lie on the pixels that they belong to? `python -m data_prep check --out OUT` or `--shards DIR`.

Biomass shows in reflectance, so the log of the labels is fitted to the logs of the six bands, with the labels moved by
up to three pixels in both directions: the fit has to be best where they are. Rows or columns that are reversed or
swapped leave nothing of it. For each tile a PNG is written, and the numbers of all in `check.json`.
"""

import argparse
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands
from biomass_jax.data.labels import BIOMASS
from biomass_jax.data.records import Record
from biomass_jax.data.shards import label_of, split_counts
from biomass_jax.data.sources import ShardSource
from biomass_jax.errors import PrepError
from biomass_jax.figures import style
from biomass_jax.runtime.files import write_json
from data_prep.chips import index as chip_index
from data_prep.chips.windows import ChipReader
from data_prep.commands import command

MAX_SHIFT = 3
LEAST_DN = 50  # below it reflectance is noise, and a log of it more so; water and shadow reach 0 and less
FEWEST_LABELS = 30  # for a fit of seven numbers
WEAK_R2 = 0.1  # unrelated labels of one chip reach 0.08 at the best of 49 shifts


def loo_r2(design: np.ndarray, target: np.ndarray) -> float:
    """Leave-one-out R2 of ordinary least squares: 1 - sum of squared errors / sum of squares about the mean.

    The error of a point in the fit without it is its residual / (1 - its leverage), so one decomposition is enough.

    Args:
        design: (n, k) columns; they may depend on each other.
        target: (n,) values.

    Returns:
        at most 1, below 0 where the mean predicts better; NaN where the values are all equal, or where a point alone
        settles a coefficient.
    """
    design, target = np.asarray(design, np.float64), np.asarray(target, np.float64)
    left, sizes, _ = np.linalg.svd(design, full_matrices=False)
    left = left[:, sizes > sizes[0] * max(design.shape) * np.finfo(np.float64).eps]
    free = 1 - np.square(left).sum(axis=1)
    total = np.square(target - target.mean()).sum()
    if total == 0 or free.min() < 1e-9:
        return float("nan")
    errors = (target - left @ (left.T @ target)) / free
    return float(1 - np.square(errors).sum() / total)


def shifted_samples(image: np.ndarray, label: np.ndarray, max_shift: int = MAX_SHIFT) -> tuple[np.ndarray, np.ndarray]:
    """The pixels around each label above 0.

    Args:
        image: (H, W, 6) digital numbers.
        label: (H, W) Mg/ha.
        max_shift: pixels.

    Returns:
        (n, k, k, 6) float32 with k = 2 max_shift + 1: [:, i, j] lies i - max_shift rows below the label and
        j - max_shift columns to its right; NaN for no-data and beyond the image; and the (n,) labels.
    """
    values = image.astype(np.float32)
    values[bands.no_data(image)] = np.nan
    around = ((max_shift, max_shift), (max_shift, max_shift), (0, 0))
    values = np.pad(values, around, constant_values=np.nan)
    rows, cols = np.nonzero(label > 0)
    steps = np.arange(2 * max_shift + 1)
    found = values[rows[:, None, None] + steps[:, None], cols[:, None, None] + steps]
    return found, label[rows, cols]


def alignment(samples: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """R2 for each shift.

    Args:
        samples: (n, k, k, 6) as `shifted_samples` gives them, of any number of chips.
        labels: (n,) Mg/ha above 0.

    Returns:
        (k, k) leave-one-out R2 of log label on a constant and log(max(DN, 50)) of the bands; NaN where fewer than
        FEWEST_LABELS labels have a pixel with data at that shift.
    """
    out = np.full(samples.shape[1:3], np.nan)
    for i, j in np.ndindex(*out.shape):
        pixels = samples[:, i, j]
        valid = np.isfinite(pixels).all(axis=-1)
        if valid.sum() >= FEWEST_LABELS:
            logs = np.log(np.maximum(pixels[valid].astype(np.float64), LEAST_DN))
            out[i, j] = loo_r2(np.column_stack([np.ones(len(logs)), logs]), np.log(labels[valid].astype(np.float64)))
    return out


@dataclass
class TileCheck:
    """What was found in the chips of a tile.

    Attributes:
        tile: its name, `unknown` where records have none.
        chips: number of chips.
        labels: labels on pixels with data.
        label_min: in the label's unit, NaN without labels, as label_max and label_mean.
        zeros: labels of exactly 0.
        pixels: of all chips.
        nodata: pixels without data.
        counts: {(row, col) of a cell: labels}, in chips from the tile's corner.
        r2: (k, k) of `alignment`.
        unit: of the labels, as texts have it.
    """

    tile: str
    chips: int = 0
    labels: int = 0
    label_min: float = float("nan")
    label_max: float = float("nan")
    label_mean: float = float("nan")
    zeros: int = 0
    pixels: int = 0
    nodata: int = 0
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    r2: np.ndarray = field(default_factory=lambda: np.full((2 * MAX_SHIFT + 1,) * 2, np.nan))
    unit: str = BIOMASS.unit

    @property
    def peak(self) -> tuple[int, int] | None:
        """Shift (rows down, columns to the right) of the best fit; None where nothing could be fitted."""
        if np.isnan(self.r2).all():
            return None
        row, col = np.unravel_index(np.nanargmax(self.r2), self.r2.shape)
        return int(row) - MAX_SHIFT, int(col) - MAX_SHIFT

    @property
    def in_place(self) -> float:
        """R2 without a shift."""
        return float(self.r2[MAX_SHIFT, MAX_SHIFT])

    @property
    def fault(self) -> str:
        """A sentence on what is wrong, or empty."""
        if np.isnan(self.in_place):
            return f"tile {self.tile}: {self.labels} labels are too few to tell whether they lie in place"
        best = float(np.nanmax(self.r2))
        if best < WEAK_R2:
            return (
                f"tile {self.tile}: labels and image have next to no relation, R2 is {best:.3f} at best; are rows or "
                "columns reversed or swapped, or is the image another tile's?"
            )
        if self.peak != (0, 0):
            return (
                f"tile {self.tile}: labels fit the image best {self.peak} rows down and columns right of where they "
                f"are: R2 {best:.3f} there, {self.in_place:.3f} in place"
            )
        return ""

    def summary(self) -> dict[str, Any]:
        """JSON-able numbers."""
        return {
            "tile": self.tile,
            "chips": self.chips,
            "labels": self.labels,
            "label_range": [_number(self.label_min), _number(self.label_max)],
            "label_mean": _number(self.label_mean),
            "zero_labels": self.zeros,
            "nodata_share": self.nodata / self.pixels,
            "peak": self.peak,
            "r2": [[_number(value) for value in row] for row in self.r2.tolist()],
            "fault": self.fault,
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 6)


def check_records(records: Iterable[Record], unit: str = BIOMASS.unit) -> list[TileCheck]:
    """Check chips by tile.

    Args:
        records: in any order; each is used once and let go.
        unit: of their labels.

    Returns:
        one TileCheck a tile, sorted by name.

    Raises:
        PrepError: there are no records.
    """
    by_tile: dict[str, tuple[TileCheck, list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]] = {}
    for record in records:
        name = record["tile"] or "unknown"
        check, samples, labels = by_tile.setdefault(name, (TileCheck(name, unit=unit), [], []))
        image, label = record["image"], record["label"]
        missing = bands.no_data(image)
        label = np.where(missing, -1, label)
        samples.append(shifted_samples(image, label))
        labels.append(label[label >= 0])
        check.chips += 1
        check.pixels += missing.size
        check.nodata += int(missing.sum())
        if record["row"] >= 0:
            cell = (record["row"] // label.shape[0], record["col"] // label.shape[1])
            check.counts[cell] = check.counts.get(cell, 0) + len(labels[-1])
    if not by_tile:
        raise PrepError("nothing to check: found no chips, expected at least one")
    for check, samples, labels in by_tile.values():
        values = np.concatenate(labels)
        check.labels, check.zeros = len(values), int((values == 0).sum())
        if len(values):
            check.label_min, check.label_max = float(values.min()), float(values.max())
            check.label_mean = float(values.astype(np.float64).mean())
        check.r2 = alignment(*(np.concatenate(parts) for parts in zip(*samples, strict=True)))
    return [by_tile[name][0] for name in sorted(by_tile)]


def draw(check: TileCheck, path: str | os.PathLike[str]) -> Path:
    """R2 by shift beside the number of labels of each cell, as PNG."""
    figure = style.new_figure(9.6, 4.6, facecolor="none")
    left, right = figure.subplots(1, 2)
    reach = MAX_SHIFT + 0.5
    top = max(float(np.nanmax(check.r2)), 0.1) if check.peak else 0.1
    shown = left.imshow(check.r2, cmap="viridis", vmin=0, vmax=top, extent=(-reach, reach, reach, -reach))
    for (i, j), value in np.ndenumerate(check.r2):
        if np.isfinite(value):
            ink = "white" if value < 0.6 * top else "black"
            left.text(j - MAX_SHIFT, i - MAX_SHIFT, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    if check.peak:
        row, col = check.peak
        sides = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)]) + (col, row)
        left.plot(*sides.T, color="#f59e0b", linewidth=2)
    left.set_title(f"R2 of labels moved against the image, {_place(check)}", fontsize=9, color=style.GREY)
    left.set_xlabel("columns to the right", fontsize=8, color=style.GREY)
    left.set_ylabel("rows down", fontsize=8, color=style.GREY)
    style.colour_bar(figure, shown, left, "leave-one-out R2", extend="min")
    _draw_counts(figure, right, check)
    for axes in (left, right):
        style.quiet_axes(axes)
    labels = f"{check.labels:,} labels in {check.chips} chip{'s' * (check.chips != 1)}"
    if check.labels:
        labels += f", {check.label_min:.3g} to {check.label_max:.4g} {check.unit}, mean {check.label_mean:.4g}"
    title = f"{check.tile}: {labels}; {check.nodata / check.pixels:.2%} of pixels without data"
    return style.save_titled(path, figure, title)


def _place(check: TileCheck) -> str:
    return "too few labels" if check.peak is None else f"best at {check.peak}"


def _draw_counts(figure: object, axes: Any, check: TileCheck) -> None:
    cells = np.array(list(check.counts), int).reshape(-1, 2)
    grid = np.full(cells.max(axis=0) + 1 if len(cells) else (1, 1), np.nan)
    for (row, col), count in check.counts.items():
        grid[row, col] = count
    most = max(check.counts.values(), default=1)
    shown = axes.imshow(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=max(most, 1))
    known = "Labels of each chip in the tile's grid" if len(cells) else "Places in the tile are not known"
    axes.set_title(known, fontsize=9, color=style.GREY)
    axes.set_xlabel("chip column", fontsize=8, color=style.GREY)
    axes.set_ylabel("chip row", fontsize=8, color=style.GREY)
    for which, length in (("x", grid.shape[1]), ("y", grid.shape[0])):
        axes.set(**{f"{which}ticks": range(0, length, max(1, length // 8))})
    style.colour_bar(figure, shown, axes, "labels")


def records_of_index(out: str | os.PathLike[str], tiles: Sequence[str] = ()) -> Iterator[Record]:
    """The chips of a folder of prepared data, dropped ones too; of these tiles alone where there are any."""
    chips = chip_index.read_index(chip_index.path_in(out))
    with ChipReader(out) as reader:
        for _, row in chips.iterrows():
            if not tiles or row["tile"] in tiles:
                yield reader.read(row)


def records_of_shards(folder: str | os.PathLike[str], tiles: Sequence[str] = ()) -> Iterator[Record]:
    """The chips of all splits of a data set of shards; of these tiles alone where there are any."""
    for split in sorted(split_counts(Path(folder))):
        for record in ShardSource(folder, split):
            if not tiles or record["tile"] in tiles:
                yield record


def run(records: Iterable[Record], figures: Path, unit: str = BIOMASS.unit) -> list[TileCheck]:
    """Check records, write a PNG a tile and `check.json`, print a line a tile, warn of each fault."""
    checks = check_records(records, unit)
    for check in checks:
        draw(check, figures / f"{check.tile}.png")
        print(
            f"{check.tile}: {check.chips} chips, {check.labels} labels of {check.label_min:.3g} to "
            f"{check.label_max:.4g} {check.unit}, {check.nodata / check.pixels:.2%} no data, "
            f"R2 {check.in_place:.3f} in place, {_place(check)}"
        )
        if check.fault:
            warnings.warn(check.fault, stacklevel=2)
    write_json(figures / "check.json", [check.summary() for check in checks], indent=1)
    return checks


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep check", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--out", type=Path, help="folder of prepared data; its chips/chips.parquet is used")
    source.add_argument("--shards", type=Path, help="folder of shards")
    parser.add_argument("--tile", action="append", default=[], help="check only this tile (repeatable)")
    parser.add_argument("--figures", type=Path, help="where to write; check/ in --out, or beside --shards, by default")
    args = parser.parse_args(argv)
    tiles = [tile.removeprefix("T") for tile in args.tile]
    found = records_of_index(args.out, tiles) if args.out else records_of_shards(args.shards, tiles)
    figures = args.figures or (args.out or args.shards.absolute().parent) / "check"
    label = chip_index.label_of(chip_index.path_in(args.out)) if args.out else label_of(args.shards)
    run(found, figures, label.unit)
    print(f"pictures and check.json in {figures}")
    return 0
