"""From batches to labelled pixels: what scoring keeps of each chip."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.tables import Scored

RGB = tuple(BAND_NAMES.index(name) for name in ("RED", "GREEN", "BLUE"))


@dataclass
class Picture:
    """A chip for the figure of chips: rgb (H, W, 3) float32, prediction (H, W) float32, both NaN on no-data; label."""

    chip_id: str
    biome: str
    rgb: np.ndarray
    prediction: np.ndarray
    label: np.ndarray


# (images as stored, labels) -> predictions, labels that count, no-data; see `evaluate.chip_forward`.
ChipForward = Callable[[np.ndarray, np.ndarray], tuple[Any, np.ndarray, np.ndarray]]


@dataclass
class ScoredPart:
    """What one process has scored: pixels, and (chip_id, tile, biome) of each chip."""

    prediction: list[np.ndarray] = field(default_factory=list)
    label: list[np.ndarray] = field(default_factory=list)
    chip: list[np.ndarray] = field(default_factory=list)
    chips: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


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
        progress: told the number of chips after each batch.

    Raises:
        EvaluationError: the model gave NaN or infinity where there is a label; it names the chip.
    """
    part = ScoredPart()
    for batch, results in _one_ahead(batches, forward):
        prediction, label, missing = (np.asarray(values) for values in results)
        _take(part, batch, prediction, label, missing, wanted)
        progress(int(batch.arrays["valid"].sum()))
    return part


def _one_ahead(batches: Iterable[Any], forward: ChipForward) -> Iterator[tuple[Any, Sequence[Any]]]:
    before = None
    for batch in batches:
        started = batch, forward(batch.arrays["image"], batch.arrays["label"])
        if before is not None:
            yield before
        before = started
    if before is not None:
        yield before


def _take(
    part: ScoredPart,
    batch: Any,
    prediction: np.ndarray,
    label: np.ndarray,
    missing: np.ndarray,
    wanted: Callable[[str], bool],
) -> None:
    valid = batch.arrays["valid"]
    rows, y, x = np.nonzero((label >= 0) & valid[:, None, None])
    found, truth = prediction[rows, y, x], label[rows, y, x]
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        chip = batch.chips[rows[bad[0]]].chip_id
        raise EvaluationError(f"chip {chip}: the model gave {found[bad[0]]} at a labelled pixel; expected a number")
    numbers = len(part.chips) + np.cumsum(valid) - 1  # padding lies at the end, and has no number
    part.prediction.append(found)
    part.label.append(truth)
    part.chip.append(numbers[rows].astype(np.int32))
    for row in np.flatnonzero(valid):
        chip = batch.chips[row]
        part.chips.append((chip.chip_id, chip.tile, chip.biome))
        if wanted(chip.chip_id):
            gone = missing[row]
            rgb = batch.arrays["image"][row][..., RGB].astype(np.float32)
            part.pictures.append(
                Picture(
                    chip.chip_id,
                    chip.biome,
                    np.where(gone[..., None], np.nan, rgb),
                    np.where(gone, np.nan, prediction[row]),
                    np.array(label[row]),
                )
            )


def join(parts: Sequence[ScoredPart]) -> tuple[Scored, list[Picture]]:
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


def to_bytes(part: ScoredPart) -> bytes:
    """A part as bytes, for another process: every number bit by bit."""
    about = {"chips": part.chips, "pictures": [(picture.chip_id, picture.biome) for picture in part.pictures]}
    arrays: dict[str, Any] = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for name in ("prediction", "label", "chip"):
        arrays[name] = np.concatenate([np.zeros(0, np.float32 if name != "chip" else np.int32), *getattr(part, name)])
    for index, picture in enumerate(part.pictures):
        arrays |= {f"{name}{index}": getattr(picture, name) for name in ("rgb", "prediction", "label")}
    out = io.BytesIO()
    np.savez(out, **{f"_{name}": values for name, values in arrays.items()})
    return out.getvalue()


def from_bytes(data: bytes) -> ScoredPart:
    """What `to_bytes` gave."""
    with np.load(io.BytesIO(data)) as arrays:
        about = json.loads(arrays["_about"].tobytes())
        return ScoredPart(
            [arrays["_prediction"]],
            [arrays["_label"]],
            [arrays["_chip"]],
            [tuple(chip) for chip in about["chips"]],
            [
                Picture(*names, *(arrays[f"_{name}{index}"] for name in ("rgb", "prediction", "label")))
                for index, names in enumerate(about["pictures"])
            ],
        )
