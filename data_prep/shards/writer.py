"""One shard: records in, an array_record file out, read back and hashed before anything counts on it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biomass_jax.data import records
from biomass_jax.data.records import Record
from biomass_jax.data.statistics import BandSums, chip_sums, combine
from biomass_jax.errors import PrepError
from biomass_jax.runtime.files import sha256_of

# One record a group, so that a chip is read without its neighbours, compressed by zstd's fastest level.
CODING = "group_size:1,zstd:1"
_FULL = "is the disk full, or a limit on file sizes set (ulimit -f)?"

Item = Record | Callable[[], Record]


@dataclass(frozen=True)
class Shard:
    """What a written shard holds.

    Attributes:
        file: its name.
        sha256: of the file.
        num_bytes: of its records before compression.
        chips: for each record, in order: chip_id, tile, season, sensors.
        sums: of its chips, where they were asked for.
    """

    file: str
    sha256: str
    num_bytes: int
    chips: tuple[tuple[str, str, str, str], ...]
    sums: BandSums | None


def load(item: Item) -> Record:
    """The record itself, or the one that the item reads when it is called."""
    return item() if callable(item) else item


def write_shard(
    path: Path, items: Sequence[Item], shape: tuple[int, int, int], dtype: str, reference: bool | None
) -> Shard:
    """Write one shard and compare what lies on the disk with what was to be written.

    Args:
        path: the file; its folder exists.
        items: records, or calls that read one each, in the order of the shard.
        shape: (H, W, 6) of every image.
        dtype: of every image.
        reference: None for no statistics, else as for `stats.chip_sums`.

    Raises:
        RecordError: a record is not valid, or not of that shape and dtype.
        PrepError: the file can't be written, or is not whole.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    written, num_bytes, chips, sums = hashlib.sha256(), 0, [], []
    try:
        writer = ArrayRecordWriter(str(path), CODING)
        for item in items:
            record = load(item)
            records.validate(record, image_shape=shape, image_dtype=dtype)
            data = records.encode(record)
            writer.write(data)
            written.update(hashlib.sha256(data).digest())
            num_bytes += len(data)
            chips.append((record["chip_id"], record["tile"], record["season"], record["sensors"]))
            if reference is not None:
                sums.append(chip_sums(record["image"], reference=reference))
        writer.close()
    except RuntimeError as error:  # array_record's own; it has no type for it
        raise PrepError(f"{path}: not written: {error}; {_FULL}") from error
    if _digest_of_records(path, len(chips)) != written.digest():
        raise PrepError(f"{path}: holds other records than were written; {_FULL}")
    total = combine(sums) if reference is not None else None
    return Shard(path.name, sha256_of(path), num_bytes, tuple(chips), total)


def _digest_of_records(path: Path, count: int) -> bytes | None:
    """SHA-256 over the SHA-256 of each record; None where the file does not hold `count` readable records."""
    from array_record.python.array_record_module import ArrayRecordReader

    digest = hashlib.sha256()
    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")  # one record in memory
        if reader.num_records() != count:
            return None
        for index in range(count):
            (data,) = reader.read([index])
            digest.update(hashlib.sha256(data).digest())
        reader.close()
    except (RuntimeError, ValueError, IndexError):
        return None
    return digest.digest()


def first_shape(items: Sequence[Item]) -> tuple[tuple[int, int, int], Any]:
    """Shape and dtype of the first record's image, which all others have to share."""
    record = load(items[0])
    records.validate(record)
    return record["image"].shape, record["image"].dtype.name
