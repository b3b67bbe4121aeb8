"""Labelled pixels and their tables of scores: over all, by biomass of label and of prediction, by biome, by tile.

The reference bins by label alone. A model that regresses to the mean then looks biased in every bin, however good it
is; bins of prediction say what a map's reader wants to know: what 150 Mg/ha on the map means. It also leaves out
everything from 300 Mg/ha on, which is a bin of its own here.
"""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.data.blocks import BLOCK_KM, UNKNOWN, ground_blocks
from biomass_jax.data.labels import BIOMASS, Bin
from biomass_jax.data.sources import Chip, Place
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.intervals import block_intervals
from biomass_jax.evaluation.nugget import error_pairs, no_pairs
from biomass_jax.figures import ChipPanel
from biomass_jax.prediction.stream import one_ahead
from biomass_jax.runtime.files import write_text
from biomass_jax.tasks.scores import SCORES, RegressionSums

RGB = tuple(BAND_NAMES.index(name) for name in ("RED", "GREEN", "BLUE"))

BINS = BIOMASS.bins  # unless the label has others
BELOW_ZERO: Bin = (-math.inf, 0)  # only predictions, of a model without a final ReLU
DIFFERENCE_COLUMNS = (
    "table",
    "group",
    "n",
    "chips",
    "tiles",
    "blocks",
    *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")),
    "no_interval",
)
COLUMNS = (*DIFFERENCE_COLUMNS, "best_constant", "best_constant_rmse")
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
        places: of each chip.
        pairs: sums over pairs of errors, see `nugget.error_pairs`.
        more: (n, channels - 1) float32, what the model gave beside its mean.
        bins: of the label.
    """

    prediction: np.ndarray
    label: np.ndarray
    chip: np.ndarray
    chip_ids: tuple[str, ...]
    tiles: tuple[str, ...]
    biomes: tuple[str, ...]
    places: tuple[Place, ...]
    pairs: np.ndarray = field(default_factory=no_pairs)
    more: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    bins: tuple[Bin, ...] = BINS

    def pixel_biomes(self) -> np.ndarray:
        """(n,) text, the biome of each pixel."""
        return np.array(self.biomes, dtype=object)[self.chip]


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
    pairs: np.ndarray = field(default_factory=no_pairs)
    more: list[np.ndarray] = field(default_factory=list)


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
        answer, label, missing = (np.asarray(values) for values in results)
        answer = answer if answer.ndim > label.ndim else answer[..., None]
        prediction = answer[..., 0]
        valid = batch.arrays["valid"]
        rows, y, x = np.nonzero((label >= 0) & valid[:, None, None])
        every = answer[rows, y, x]
        bad = np.argwhere(~np.isfinite(every))
        if bad.size:
            chip, gave = batch.chips[rows[bad[0][0]]].chip_id, every[tuple(bad[0])]
            raise EvaluationError(f"chip {chip}: the model gave {gave} at a labelled pixel; expected a number")
        found = every[:, 0]
        part.more.append(every[:, 1:])
        numbers = len(part.chips) + np.cumsum(valid) - 1  # padding lies at the end, and has no number
        part.prediction.append(found)
        part.label.append(label[rows, y, x])
        part.chip.append(numbers[rows].astype(np.int32))
        for row in np.flatnonzero(valid):
            chip, mine = batch.chips[row], rows == row
            part.chips.append(chip)
            errors = found[mine].astype(np.float64) - label[row, y[mine], x[mine]]
            part.pairs = part.pairs + error_pairs(y[mine], x[mine], errors)
            if wanted(chip.chip_id):
                gone = missing[row]
                rgb = np.where(gone[..., None], np.nan, batch.arrays["image"][row][..., RGB].astype(np.float32))
                values = np.where(gone, np.nan, prediction[row])
                part.pictures.append(ChipPanel(rgb, values, np.array(label[row]), f"{chip.chip_id}, {chip.biome}"))
        progress(int(valid.sum()))
    return part


def join(parts: Sequence[ScoredPart], bins: tuple[Bin, ...] = BINS) -> tuple[Scored, list[ChipPanel]]:
    """The pixels of all processes, chips numbered through, of a label with these bins; and their pictures.

    Raises:
        EvaluationError: a chip was read by two processes.
    """
    chips = [chip for part in parts for chip in part.chips]
    offsets = np.cumsum([0, *(len(part.chips) for part in parts)])
    numbers = [chip + offset for part, offset in zip(parts, offsets, strict=False) for chip in part.chip]
    empty, pairs = np.zeros(0, np.float32), sum((part.pairs for part in parts), no_pairs())
    ids, tiles, biomes, places = zip(*chips, strict=True) if chips else ((), (), (), ())
    scored = Scored(
        np.concatenate([empty, *(values for part in parts for values in part.prediction)]),
        np.concatenate([empty, *(values for part in parts for values in part.label)]),
        np.concatenate([np.zeros(0, np.int32), *numbers]).astype(np.int32),
        ids,
        tiles,
        biomes,
        places,
        pairs,
        np.concatenate([more for part in parts for more in part.more] or [np.zeros((0, 0), np.float32)]),
        bins,
    )
    if len(set(scored.chip_ids)) < len(chips):
        again = next(name for name in scored.chip_ids if scored.chip_ids.count(name) > 1)
        raise EvaluationError(f"chip {again} was scored more than once; expected each chip_id once in a split")
    return scored, [picture for part in parts for picture in part.pictures]


def bin_name(limits: Bin) -> str:
    """`0-100` as the reference's columns, `300-inf`, `below 0`."""
    low, high = limits
    return f"below {high:g}" if low == -math.inf else f"{low:g}-{high:g}"


class Blocks(NamedTuple):
    """What intervals leave out one at a time.

    Attributes:
        of_chip: (chips,) text, the block of each chip.
        are: what they are, in words.
    """

    of_chip: np.ndarray
    are: str


def blocks_of(scored: Scored, block_km: float = BLOCK_KM) -> Blocks:
    """Blocks of ground, `block_km` on a side; tiles where some labelled chip's place isn't known.

    Raises:
        RasterError: a chip's EPSG code or place can't be.
    """
    labelled = np.unique(scored.chip)
    lost = [number for number in labelled.tolist() if not scored.places[number].epsg]
    if lost:
        tiles = np.array([tile or UNKNOWN for tile in scored.tiles], dtype=object)
        unknown = "; chips of unknown tile are one block" if UNKNOWN in tiles[labelled] else ""
        return Blocks(
            tiles,
            f"MGRS tiles, since {len(lost)} of {len(labelled)} chips have no coordinates (chip "
            f"{scored.chip_ids[lost[0]]}); tiles that lie side by side overlap and err together{unknown}",
        )
    names = np.full(len(scored.places), UNKNOWN, dtype=object)
    names[labelled] = ground_blocks([scored.places[number] for number in labelled], block_km)
    return Blocks(names, f"blocks of ground, {block_km:g} km on a side")


def tables(scored: Scored, *, blocks: Blocks | None = None) -> list[Row]:
    """Every table, one row a group, with `COLUMNS` as keys and None where there is nothing to say.

    Groups of the table `biome` and `tile` are those that occur; bins are always there. Intervals are of the blocks that
    have labels in the group; see `block_intervals`.

    Args:
        scored: labelled pixels.
        blocks: see `blocks_of`; those of the default size where none are given.
    """
    blocks = blocks or blocks_of(scored)
    rows = []
    for table, group, chosen in groups(scored, prediction_bins(scored)):
        made, (parts,) = _row(COLUMNS, table, group, chosen, blocks, scored)
        whole = _whole(parts)
        constant = whole.best_constant()
        made |= whole.results() | {"best_constant": constant["value"], "best_constant_rmse": constant["rmse"]}
        rows.append(made)
    return rows


def differences(scored: Scored, against: Scored, *, blocks: Blocks | None = None) -> list[Row]:
    """Scores of one model less those of another on the same pixels, a row a group, with `DIFFERENCE_COLUMNS` as keys.

    Groups are those of `tables` without bins of the prediction, in which two models have other pixels.

    Args:
        scored: of one model.
        against: of the other.
        blocks: as for `tables`.

    Raises:
        EvaluationError: they are not of the same pixels.
    """
    if scored.chip_ids != against.chip_ids or not (
        np.array_equal(scored.chip, against.chip) and np.array_equal(scored.label, against.label)
    ):
        raise EvaluationError(
            f"two models were scored on {len(scored.label)} and {len(against.label)} labelled pixels that are not the "
            "same; scores can only be compared pixel by pixel"
        )
    blocks = blocks or blocks_of(scored)
    rows = []
    for table, group, chosen in groups(scored, []):
        made, parts = _row(DIFFERENCE_COLUMNS, table, group, chosen, blocks, scored, against)
        mine, theirs = (_whole(part).results() for part in parts)
        made["n"] = mine["n"]
        for score in SCORES:
            one, other = mine[score], theirs[score]
            made[score] = None if one is None or other is None else one - other
        rows.append(made)
    return rows


def prediction_bins(scored: Scored) -> list[tuple[str, str, np.ndarray]]:
    """Table, group and bool (n,) of its pixels, by bin of the prediction."""
    bins = (BELOW_ZERO, *scored.bins)
    return [("prediction_bin", bin_name(limits), within(scored.prediction, limits)) for limits in bins]


def groups(scored: Scored, between: Iterable[tuple[str, str, np.ndarray]]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Table, group and bool (n,) of its pixels, `between` after the bins of labels."""
    yield "all", "all", np.ones(scored.label.shape, bool)
    for limits in scored.bins:
        yield "label_bin", bin_name(limits), within(scored.label, limits)
    yield from between
    for table, given in (("biome", scored.biomes), ("tile", scored.tiles)):
        names = np.array([name or UNKNOWN for name in given], dtype=object)
        for name in sorted(set(names)):
            yield table, name, (names == name)[scored.chip]


def _row(
    columns: Sequence[str], table: str, group: str, chosen: np.ndarray, blocks: Blocks, *models: Scored
) -> tuple[Row, list[list[RegressionSums]]]:
    """What rows of one model and of two share, intervals among it; and each model's sums by block."""
    made = counted(columns, table, group, chosen, blocks, models[0])
    names = blocks.of_chip[models[0].chip[chosen]]
    parts = [list(sums_by(names, one.prediction[chosen], one.label[chosen]).values()) for one in models]
    intervals, why = block_intervals(*parts)
    for score, (low, high) in intervals.items():
        made |= {f"{score}_low": low, f"{score}_high": high}
    return made | {"no_interval": why or None}, parts


def counted(columns: Sequence[str], table: str, group: str, chosen: np.ndarray, blocks: Blocks, scored: Scored) -> Row:
    """A row with what it is of: labelled pixels, their chips, tiles and blocks; None in all other columns."""
    read = np.unique(scored.chip[chosen])
    made: Row = dict.fromkeys(columns)
    return made | {
        "table": table,
        "group": group,
        "n": int(chosen.sum()),
        "chips": len(read),
        "tiles": len({scored.tiles[chip] for chip in read.tolist()}),
        "blocks": len(set(blocks.of_chip[read].tolist())),
    }


def _whole(parts: Sequence[RegressionSums]) -> RegressionSums:
    whole = RegressionSums()
    for part in parts:
        whole.merge(part)
    return whole


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
    return write_csv(path, ("experiment_name", *found), [{"experiment_name": experiment} | found])


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """A CSV file, written beside its place and renamed; None is an empty cell, floats keep every digit."""
    path = Path(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: "" if row[name] is None else row[name] for name in columns} for row in rows])
    write_text(path, text.getvalue())
    return path
