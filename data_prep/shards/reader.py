"""Shards back into records, opened by TFDS without TensorFlow, and compared with their checksums."""

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from biomass_jax.data import records
from biomass_jax.data.records import Record
from biomass_jax.errors import PrepError
from data_prep.shards.writer import METADATA_KEY, file_sha256


class Split(Sequence[Record]):
    """The records of one split in the order of its shards, each read when it is asked for."""

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        import tensorflow_datasets as tfds

        found = sorted(split_counts(Path(folder)))
        if split not in found:
            raise PrepError(f"{folder}: split {split!r} is not there; found {', '.join(found)}")
        self._source = tfds.builder_from_directory(os.fspath(folder)).as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return records.from_example(self._source[index % len(self)])


def read(folder: str | os.PathLike[str], split: str) -> Split:
    """A split's records.

    Raises:
        PrepError: no data set there, or no such split.
    """
    return Split(folder, split)


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `info.metadata['biomass_jax']` holds. PrepError where there is none, or of another schema version."""
    file = Path(folder) / "metadata.json"
    try:
        info = json.loads(json.loads(file.read_text())[METADATA_KEY])
    except (OSError, ValueError, KeyError) as error:
        raise PrepError(f"{file}: found no {METADATA_KEY} metadata, expected a data set of shards: {error}") from error
    if info.get("schema_version") != records.SCHEMA_VERSION:
        found = info.get("schema_version")
        raise PrepError(f"{file}: found schema_version {found}, expected {records.SCHEMA_VERSION}; write it anew")
    return info


def split_counts(folder: Path) -> dict[str, int]:
    """Number of records of each split. PrepError as for `read_metadata`."""
    return read_metadata(folder)["chips"]["counts"]


def verify(folder: str | os.PathLike[str]) -> int:
    """Compare each shard with its SHA-256 in the metadata; the number of shards.

    Raises:
        PrepError: a shard is missing or changed.
    """
    shards = read_metadata(folder)["shards"]
    for shard in shards:
        path = Path(folder) / shard["file"]
        found = file_sha256(path) if path.is_file() else "no file"
        if found != shard["sha256"]:
            raise PrepError(f"{path}: found {found}, expected a file of sha256 {shard['sha256']}; write it anew")
    return len(shards)


@lru_cache(maxsize=4)
def _open(folder: str, split: str) -> Split:
    return read(folder, split)


def read_one(folder: str, split: str, index: int) -> Record:
    """One record; the data set stays open for the next."""
    return _open(folder, split)[index]
