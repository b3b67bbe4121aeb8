"""One training chip as a record: its fields, its encoding in array_record shards, and what makes one valid.

NumPy only at import, because data preparation uses this module too; TFDS is loaded where an encoding is asked for, and
it never needs TensorFlow.
"""

import datetime
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypedDict, cast

import numpy as np

from biomass_jax.data import bands
from biomass_jax.errors import RecordError
from biomass_jax.version import __version__

SCHEMA_VERSION = 2
OPENED_VERSIONS = (1, 2)  # version 1 has no agbd_sigma
CHIP_SIZE = 224  # pixels along each side, and the step of the grid of cells in a tile
NO_LABEL = -1.0
UNKNOWN_PLACE = -1  # `row` and `col` of a chip whose place in its tile is not known
UNKNOWN_BIOME = "unknown"
SOFTWARE_VERSION = __version__  # here for data_prep, which imports nothing above `data`
SENSORS = ("L30", "S30", "L30+S30")

_TILE = re.compile(r"\d{2}[A-Z]{3}|")
_SLUG = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")
_TEXT_FIELDS = ("chip_id", "tile", "biome", "season", "sensors")
_INTEGER_FIELDS = ("row", "col", "epsg", "schema_version")


class Record(TypedDict):
    """One chip.

    Attributes:
        image: (H, W, 6) int16 (float32 only where the source holds fractions), digital numbers, rows north to south.
        label: (H, W) float32, in the unit that the data set's metadata name (Mg/ha, or m), -1 for none.
        agbd_sigma: (H, W) float32, error of the label in its unit, -1 where there is none or it is not known, as of
            heights; it has the name of the first label that there was.
        chip_id: `{tile}_{cell}_{season start}`, unique in a data set.
        tile: MGRS tile without its T (`10SFF`), "" where unknown.
        row: of the upper-left pixel in its tile, -1 where unknown.
        col: of the upper-left pixel in its tile, -1 where unknown.
        epsg: code of the CRS, 0 for none.
        transform: (6,) float64, affine a b c d e f of the upper-left *corner*; zeros where epsg is 0.
        biome: slug, or `unknown`.
        season: `YYYY-MM-DD/YYYY-MM-DD`, half-open, or "".
        sensors: `L30`, `S30` or `L30+S30`.
        schema_version: 2.
    """

    image: np.ndarray
    label: np.ndarray
    agbd_sigma: np.ndarray
    chip_id: str
    tile: str
    row: int
    col: int
    epsg: int
    transform: np.ndarray
    biome: str
    season: str
    sensors: str
    schema_version: int


FIELDS: tuple[str, ...] = tuple(Record.__annotations__)


@lru_cache(maxsize=4)
def features(image_shape: tuple[int, int, int] = (CHIP_SIZE, CHIP_SIZE, 6), image_dtype: object = np.int16) -> Any:
    """The record's fields as TFDS features.

    Args:
        image_shape: (H, W, bands) of every chip.
        image_dtype: int16 or float32.

    Returns:
        tfds.features.FeaturesDict. Arrays are stored as raw bytes: TFDS's default coding writes 13-17 times more
        slowly, and would round `transform` to float32, the only float type of its protocol buffers.
    """
    import tensorflow_datasets as tfds

    def tensor(shape: tuple[int, ...], dtype: Any) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")

    fields: dict[str, Any] = {"image": tensor(image_shape, image_dtype)}
    fields |= {name: tensor(image_shape[:2], np.float32) for name in ("label", "agbd_sigma")}
    fields |= {name: tfds.features.Text() for name in _TEXT_FIELDS}
    fields |= {name: tfds.features.Scalar(np.int32) for name in _INTEGER_FIELDS}
    fields["transform"] = tensor((6,), np.float64)
    return tfds.features.FeaturesDict(fields)


def encode(record: Record) -> bytes:
    """The bytes in a shard of a record that passed `validate`; equal records give equal bytes in every process."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = features(record["image"].shape, record["image"].dtype).serialize_example(record)
    # TFDS leaves the fields as the process's hash table has them.
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def from_example(example: Mapping[str, Any]) -> Record:
    """A record as TFDS decodes it, text as str instead of bytes; one of an earlier version as this one has it."""
    text = {name: example[name].decode("utf-8") for name in _TEXT_FIELDS if isinstance(example[name], bytes)}
    record = cast(Record, {**example, **text})
    if "agbd_sigma" not in example:
        record["agbd_sigma"], record["schema_version"] = unknown_sigma(record["label"]), SCHEMA_VERSION
    return record


def centre(transform: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """x and y of a chip's centre in its CRS, from the affine a b c d e f (6,) of its corner and its size (H, W)."""
    a, b, c, d, e, f = (float(value) for value in transform)
    row, column = shape[0] / 2, shape[1] / 2
    return a * column + b * row + c, d * column + e * row + f


def unknown_sigma(label: np.ndarray) -> np.ndarray:
    """`agbd_sigma` of labels (H, W) whose errors nothing tells."""
    return np.full(label.shape, NO_LABEL, np.float32)


def chip_id(tile: str, row: int, col: int, width: int, season_start: str, size: int = CHIP_SIZE) -> str:
    """`{tile}_{cell}_{season start}` with cell = (row // size) * (width // size) + col // size.

    Args:
        tile: MGRS tile without its T.
        row: of the chip's upper-left pixel in its tile.
        col: of the chip's upper-left pixel in its tile.
        width: columns of the tile (3660 for HLS, which makes 16 cells a row).
        season_start: `YYYY-MM-DD`; "" leaves the last part out.
        size: pixels along a chip's side.

    Raises:
        RecordError: the chip doesn't lie whole in the tile's columns, or not at an offset from 0 on.
    """
    if row < 0 or col < 0 or col + size > width:
        raise RecordError(
            f"tile {tile}: a chip of {size} px at row {row}, col {col} does not lie in a tile {width} px wide; "
            "a chip of unknown place needs another chip_id"
        )
    cell = (row // size) * (width // size) + col // size
    return "_".join(part for part in (tile, str(cell), season_start) if part)


def validate(
    record: Mapping[str, Any], *, image_shape: tuple[int, ...] | None = None, image_dtype: object = None
) -> None:
    """Check a record before it is written.

    Args:
        record: as `Record`.
        image_shape: (H, W, 6) that all chips of a data set share, if it is settled.
        image_dtype: int16 or float32, if it is settled.

    Raises:
        RecordError: a field is missing, unknown, or not what `Record` says; the message names the chip.
    """
    name = f"chip {record.get('chip_id')!r}"
    odd = {"missing": set(FIELDS) - set(record), "unknown": set(record) - set(FIELDS)}
    if any(odd.values()):
        found = "; ".join(f"{kind} {', '.join(sorted(names))}" for kind, names in odd.items() if names)
        raise RecordError(f"{name}: fields {found}; expected {', '.join(FIELDS)}")
    for field, fault in _faults(record, image_shape, image_dtype):
        raise RecordError(f"{name}: field {field}: {fault}")


def _faults(record: Mapping[str, Any], shape: tuple[int, ...] | None, dtype: object) -> Any:
    """(field, what was found and what was expected), one after another."""
    for field in _TEXT_FIELDS:
        if not isinstance(record[field], str):
            yield field, f"found {type(record[field]).__name__} {record[field]!r}, expected text"
    for field in _INTEGER_FIELDS:
        value = record[field]
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
            yield field, f"found {type(value).__name__} {value!r}, expected an integer of 32 bits"
    if record["schema_version"] != SCHEMA_VERSION:
        yield "schema_version", f"found {record['schema_version']}, expected {SCHEMA_VERSION}"
    yield from _image_faults(record["image"], shape, dtype)
    for field in ("label", "agbd_sigma"):
        yield from _label_faults(field, record[field], record["image"].shape[:2])
    without = np.count_nonzero((record["agbd_sigma"] != NO_LABEL) & (record["label"] == NO_LABEL))
    if without:
        yield "agbd_sigma", f"found {without} errors where there is no label, expected -1 there"
    yield from _place_faults(record)
    yield from _text_faults(record)


def _image_faults(image: Any, shape: tuple[int, ...] | None, dtype: Any) -> Any:
    if not isinstance(image, np.ndarray) or image.dtype not in (np.int16, np.float32):
        yield "image", f"found {_kind(image)}, expected an array of int16 or float32"
    if image.ndim != 3 or image.shape[2] != len(bands.BAND_NAMES) or 0 in image.shape:
        yield "image", f"found shape {image.shape}, expected (H, W, {len(bands.BAND_NAMES)})"
    if shape is not None and image.shape != tuple(shape):
        yield "image", f"found shape {image.shape}, expected {tuple(shape)} as in the data set's other chips"
    if dtype is not None and image.dtype != np.dtype(dtype):
        yield "image", f"found {image.dtype}, expected {np.dtype(dtype)} as in the data set's other chips"
    if image.dtype == np.float32 and np.isinf(image).any():
        yield "image", "found infinite values, expected digital numbers, and NaN or the fill where there are none"


def _label_faults(field: str, label: Any, shape: tuple[int, ...]) -> Any:
    if not isinstance(label, np.ndarray) or label.dtype != np.float32:
        yield field, f"found {_kind(label)}, expected an array of float32"
    if label.shape != shape:
        yield field, f"found shape {label.shape}, expected {shape} as the image's"
    wrong = label[~(((label >= 0) & np.isfinite(label)) | (label == NO_LABEL))]
    if wrong.size:
        yield field, f"found {wrong.size} values like {wrong[0]:g}, expected labels from 0 on, and -1 for none"


def _place_faults(record: Mapping[str, Any]) -> Any:
    row, col = record["row"], record["col"]
    if not (row == col == UNKNOWN_PLACE or (row >= 0 and col >= 0)):
        yield "row", f"found row {row} and col {col}, expected offsets from 0 on, or -1 for both where unknown"
    transform = record["transform"]
    if not isinstance(transform, np.ndarray) or transform.dtype != np.float64 or transform.shape != (6,):
        yield "transform", f"found {_kind(transform)}, expected an array of 6 float64"
    if record["epsg"] < 0:
        yield "epsg", f"found {record['epsg']}, expected a code, or 0 for none"
    a, b, _, d, e, _ = (float(value) for value in transform)
    if record["epsg"] == 0 and transform.any():
        yield "transform", f"found {transform.tolist()} with epsg 0, expected zeros: both are known or neither is"
    if record["epsg"] != 0 and not (all(map(math.isfinite, transform)) and a > 0 > e and b == d == 0):
        yield "transform", f"found {transform.tolist()}, expected a b c d e f of a north-up grid: a > 0 > e, b = d = 0"


def _text_faults(record: Mapping[str, Any]) -> Any:
    if not record["chip_id"] or record["chip_id"] != record["chip_id"].strip():
        yield "chip_id", "found empty text or blanks around it, expected {tile}_{cell}_{season start}"
    if not _TILE.fullmatch(record["tile"]):
        yield "tile", f"found {record['tile']!r}, expected an MGRS tile without its T (10SFF), or empty text"
    if not _SLUG.fullmatch(record["biome"]):
        yield "biome", f"found {record['biome']!r}, expected a slug (boreal-forests), or {UNKNOWN_BIOME}"
    if record["season"] and not is_season(record["season"]):
        yield "season", f"found {record['season']!r}, expected YYYY-MM-DD/YYYY-MM-DD, the first earlier, or empty text"
    if record["sensors"] not in SENSORS:
        yield "sensors", f"found {record['sensors']!r}, expected one of {', '.join(SENSORS)}"


def is_season(text: str) -> bool:
    """Whether a text is `YYYY-MM-DD/YYYY-MM-DD` with the first day earlier."""
    try:
        start, stop = (datetime.date.fromisoformat(part) for part in text.split("/"))
    except ValueError:
        return False
    return start < stop and text == f"{start}/{stop}"  # `fromisoformat` reads 20200601 and weeks too


def _kind(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
