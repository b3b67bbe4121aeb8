"""Shards on disk: what their metadata say, and whether they are as they were written."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands, records
from biomass_jax.data.labels import Label, described
from biomass_jax.errors import DataError
from biomass_jax.runtime.files import sha256_of

_READERS = 8  # threads, where all shards are looked at
METADATA_KEY = "biomass_jax"  # in the `metadata.json` that TFDS writes


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `metadata.json` of shards holds under `biomass_jax`.

    Raises:
        DataError: there is none; another schema version; other bands; means or stds that aren't six numbers.
    """
    file = Path(folder) / "metadata.json"
    try:
        metadata = json.loads(json.loads(file.read_text())[METADATA_KEY])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file}: found no {METADATA_KEY} metadata ({error}), expected shards as `python -m data_prep shards` or "
            "`python -m data_prep geotiff` writes them"
        ) from error
    version, names = metadata.get("schema_version"), metadata.get("bands")
    if version not in records.OPENED_VERSIONS:
        known = " or ".join(map(str, records.OPENED_VERSIONS))
        raise DataError(f"{file}: found schema_version {version}, expected {known}; write it anew")
    if names != list(bands.BAND_NAMES):
        raise DataError(f"{file}: found bands {names}, expected {list(bands.BAND_NAMES)}; write the shards anew")
    for name in ("means", "stds"):
        values = metadata.get(name)
        if values is not None and (
            np.shape(values) != (len(names),) or not np.isfinite(np.array(values, np.float64)).all()
        ):
            raise DataError(f"{file}: {name}: found {values}, expected {len(names)} numbers; write the shards anew")
    return metadata


def label_of(folder: str | os.PathLike[str]) -> Label:
    """What the labels of shards are. DataError as for `read_metadata`."""
    return described(read_metadata(folder).get("label", {}), os.fspath(folder))


def split_counts(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Number of records of each split. DataError as for `read_metadata`."""
    return read_metadata(folder)["chips"]["counts"]


def split_of(file: str) -> str:
    """The split that a shard's file name tells: `train` of `biomass-train.array_record-00000-of-00003`."""
    return file.partition("-")[2].partition(".")[0]


def shards_of(metadata: dict[str, Any], split: str | None = None) -> list[dict[str, Any]]:
    """The metadata's entries of a split's shards, or of all."""
    return [shard for shard in metadata["shards"] if split in (None, split_of(shard["file"]))]


def check_files(folder: str | os.PathLike[str], metadata: dict[str, Any], split: str) -> None:
    """Look whether a split's shards are there and of their size, or hold their records where older metadata lack it.

    Raises:
        DataError: which shard isn't.
    """

    def fault(shard: dict[str, Any]) -> str | None:
        path = Path(folder) / shard["file"]
        if not path.is_file():
            return f"{path}: no such file"
        size = path.stat().st_size
        if "bytes" in shard:
            return None if size == shard["bytes"] else f"{path}: found {size:,} bytes, expected {shard['bytes']:,}"
        records = count_records(path)
        return None if records == shard["records"] else f"{path}: found {records}, expected {shard['records']} records"

    shards = shards_of(metadata, split)
    with ThreadPoolExecutor(_READERS) as pool:
        faults = [found for found in pool.map(fault, shards) if found]
    if faults:
        more = f"; {len(faults) - 1} more of {len(shards)} shards are not as they were written" if faults[1:] else ""
        raise DataError(f"{faults[0]}{more}; copy the data set again, or write it anew")


def count_records(path: Path) -> int | str:
    """Records of a shard, as its end tells; what is wrong with it where that can't be read."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        found = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        return f"a damaged or cut file ({str(error).split(';')[0] or 'its end can not be read'})"
    return found


def verify(folder: str | os.PathLike[str], split: str | None = None) -> int:
    """Compare each shard (of a split) with its SHA-256 in the metadata; the number of shards.

    Raises:
        DataError: a shard is missing or changed.
    """
    shards = shards_of(read_metadata(folder), split)

    def digest(shard: dict[str, Any]) -> str:
        path = Path(folder) / shard["file"]
        return sha256_of(path) if path.is_file() else "no file"

    with ThreadPoolExecutor(_READERS) as pool:
        for shard, found in zip(shards, pool.map(digest, shards), strict=True):
            if found != shard["sha256"]:
                path = Path(folder) / shard["file"]
                raise DataError(f"{path}: found {found}, expected a file of sha256 {shard['sha256']}; write it anew")
    return len(shards)
