"""Labelled pixels and their tables of scores: over all, by biomass of label and of prediction, by biome, by tile.

The reference bins by label alone. A model that regresses to the mean then looks biased in every bin, however good it
is; bins of prediction say what a map's reader wants to know: what 150 Mg/ha on the map means. It also leaves out
everything from 300 Mg/ha on, which is a bin of its own here.
"""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.data.sources import Chip
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.intervals import tile_intervals
from biomass_jax.figures import ChipPanel
from biomass_jax.prediction.stream import one_ahead
from biomass_jax.runtime.files import write_text
from biomass_jax.tasks.scores import SCORES, RegressionSums

RGB = tuple(BAND_NAMES.index(name) for name in ("RED", "GREEN", "BLUE"))

Bin = tuple[float, float]
# Mg/ha, [low, high). The first four are the reference's, in its order.
BINS: tuple[Bin, ...] = ((0, 100), (100, 200), (200, 300), (0, 300), (300, math.inf))
BELOW_ZERO: Bin = (-math.inf, 0)  # only predictions, of a model without a final ReLU
UNKNOWN = "unknown"
COLUMNS = (
    "table",
    "group",
    "n",
    "chips",
    "tiles",
    *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")),
    "best_constant",
    "best_constant_rmse",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """Labelled pixels and what was predicted there.

    Attributes:
        prediction: (n,) float32.
        label: (n,) float32, from 0 on.
        chip: (n,) int32, the chip of each pixel.
        chip_ids: of each chip, also of those without labels.
        tiles: of each chip, "" where unknown.
        biomes: of each chip.
    """

    prediction: np.ndarray
    label: np.ndarray
    chip: np.ndarray
    chip_ids: tuple[str, ...]
    tiles: tuple[str, ...]
    biomes: tuple[str, ...]


# (images as stored, labels) -> predictions, labels that count, no-data; see `evaluate.chip_forward`.
ChipForward = Callable[[np.ndarray, np.ndarray], tuple[Any, np.ndarray, np.ndarray]]


@dataclass
class ScoredPart:
    """What one process has scored: pixels, the chips that were read, and those kept whole for pictures."""

    prediction: list[np.ndarray] = field(default_factory=list)
    label: list[np.ndarray] = field(default_factory=list)
    chip: list[np.ndarray] = field(default_factory=list)
    chips: list[Chip] = field(default_factory=list)
    pictures: list[ChipPanel] = field(default_factory=list)


def score_batches(
    batches: Iterable[Any],
    forward: ChipForward,
    *,
    wanted: Callable[[str], bool] = lambda _: False,
    progress: Callable[[int], Any] = lambda _: None,
) -> ScoredPart:
    """Predict batches and keep their labelled pixels (about 250 a chip), so that memory holds no image for long.

    The device works on a batch while the one before it is taken apart.

    Args:
        batches: `pipeline.Batch` with image, label and valid.
        forward: see `ChipForward`.
        wanted: which chips, by id, are kept whole for pictures.
        progress: called with the number of chips after each batch.

    Raises:
        EvaluationError: the model gave NaN or infinity where there is a label; it names the chip.
    """
    part = ScoredPart()
    started = one_ahead(batches, lambda batch: forward(batch.arrays["image"], batch.arrays["label"]))
    for batch, results in started:
        prediction, label, missing = (np.asarray(values) for values in results)
        valid = batch.arrays["valid"]
        rows, y, x = np.nonzero((label >= 0) & valid[:, None, None])
        found = prediction[rows, y, x]
        bad = np.flatnonzero(~np.isfinite(found))
        if bad.size:
            chip = batch.chips[rows[bad[0]]].chip_id
            raise EvaluationError(f"chip {chip}: the model gave {found[bad[0]]} at a labelled pixel; expected a number")
        numbers = len(part.chips) + np.cumsum(valid) - 1  # padding lies at the end, and has no number
        part.prediction.append(found)
        part.label.append(label[rows, y, x])
        part.chip.append(numbers[rows].astype(np.int32))
        for row in np.flatnonzero(valid):
            chip = batch.chips[row]
            part.chips.append(chip)
            if wanted(chip.chip_id):
                gone = missing[row]
                rgb = np.where(gone[..., None], np.nan, batch.arrays["image"][row][..., RGB].astype(np.float32))
                values = np.where(gone, np.nan, prediction[row])
                part.pictures.append(ChipPanel(rgb, values, np.array(label[row]), f"{chip.chip_id}, {chip.biome}"))
        progress(int(valid.sum()))
    return part


def join(parts: Sequence[ScoredPart]) -> tuple[Scored, list[ChipPanel]]:
    """The pixels of all processes, chips numbered through; and their pictures.

    Raises:
        EvaluationError: a chip was read by two processes.
    """
    chips = [chip for part in parts for chip in part.chips]
    offsets = np.cumsum([0, *(len(part.chips) for part in parts)])
    numbers = [chip + offset for part, offset in zip(parts, offsets, strict=False) for chip in part.chip]
    empty = np.zeros(0, np.float32)
    scored = Scored(
        np.concatenate([empty, *(values for part in parts for values in part.prediction)]),
        np.concatenate([empty, *(values for part in parts for values in part.label)]),
        np.concatenate([np.zeros(0, np.int32), *numbers]).astype(np.int32),
        *(tuple(texts) for texts in (zip(*chips, strict=True) if chips else ((), (), ()))),
    )
    if len(set(scored.chip_ids)) < len(chips):
        again = next(name for name in scored.chip_ids if scored.chip_ids.count(name) > 1)
        raise EvaluationError(f"chip {again} was scored more than once; expected each chip_id once in a split")
    return scored, [picture for part in parts for picture in part.pictures]


def bin_name(limits: Bin) -> str:
    """`0-100` as the reference's columns, `300-inf`, `below 0`."""
    low, high = limits
    return f"below {high:g}" if low == -math.inf else f"{low:g}-{high:g}"


def tables(scored: Scored, *, resamples: int = 1000, seed: int = 0) -> list[Row]:
    """Every table, one row a group, with `COLUMNS` as keys and None where there is nothing to say.

    Groups of the table `biome` and `tile` are those that occur; bins are always there. Intervals draw from the tiles
    that have labels in the group, and need two; chips of unknown tile count as one tile. `resamples` and `seed` are
    those of `tile_intervals`.
    """
    tiles = np.array([tile or UNKNOWN for tile in scored.tiles], dtype=object)
    biomes = np.array([biome or UNKNOWN for biome in scored.biomes], dtype=object)

    def row(table: str, group: str, chosen: np.ndarray) -> Row:
        chips = scored.chip[chosen]
        parts = sums_by(tiles[chips], scored.prediction[chosen], scored.label[chosen])
        whole = RegressionSums()
        for part in parts.values():
            whole.merge(part)
        constant = whole.best_constant()
        made: Row = dict.fromkeys(COLUMNS)
        made |= {"table": table, "group": group, "chips": len(np.unique(chips)), "tiles": len(parts)}
        made |= whole.results() | {"best_constant": constant["value"], "best_constant_rmse": constant["rmse"]}
        intervals = tile_intervals(list(parts.values()), resamples=resamples, seed=seed) or {}
        for score, (low, high) in intervals.items():
            made |= {f"{score}_low": low, f"{score}_high": high}
        return made

    rows = [row("all", "all", np.ones(scored.label.shape, bool))]
    rows += [row("label_bin", bin_name(limits), within(scored.label, limits)) for limits in BINS]
    rows += [
        row("prediction_bin", bin_name(limits), within(scored.prediction, limits)) for limits in (BELOW_ZERO, *BINS)
    ]
    rows += [row("biome", name, (biomes == name)[scored.chip]) for name in sorted(set(biomes))]
    return rows + [row("tile", name, (tiles == name)[scored.chip]) for name in sorted(set(tiles))]


def within(values: np.ndarray, limits: Bin) -> np.ndarray:
    """Bool, where low <= value < high."""
    return (values >= limits[0]) & (values < limits[1])


def sums_by(names: np.ndarray, prediction: np.ndarray, label: np.ndarray) -> dict[str, RegressionSums]:
    """The sums of each name's pixels, by name in order; all arguments (n,)."""
    found, index, counts = np.unique(names.astype(str), return_inverse=True, return_counts=True)
    places = np.split(np.argsort(index, kind="stable"), np.cumsum(counts)[:-1])
    return {
        name: RegressionSums().add(prediction[mine], label[mine])
        for name, mine in zip(found.tolist(), places, strict=False)  # of no names there is one empty part
    }


def write_reference_table(path: str | os.PathLike[str], rows: Sequence[Row], experiment: str) -> Path:
    """RMSE by bin of label as the reference's notebook writes it: one row, `experiment_name`, `0-100`, `100-200` ...

    Our own column `300-inf` comes last. The reference fails on an empty bin; here its cell is empty.
    """
    found = {row["group"]: row["rmse"] for row in rows if row["table"] == "label_bin"}
    names = [bin_name(limits) for limits in BINS]
    row = {"experiment_name": experiment} | {name: found[name] for name in names}
    return write_csv(path, ("experiment_name", *names), [row])


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """A CSV file, written beside its place and renamed; None is an empty cell, floats keep every digit."""
    path = Path(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: "" if row[name] is None else row[name] for name in columns} for row in rows])
    write_text(path, text.getvalue())
    return path
