"""Shards on disk: what their metadata say, and whether they are as they were written."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands, records
from biomass_jax.errors import DataError
from biomass_jax.runtime.files import sha256_of

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
    if version != records.SCHEMA_VERSION:
        raise DataError(f"{file}: found schema_version {version}, expected {records.SCHEMA_VERSION}; write it anew")
    if names != list(bands.BAND_NAMES):
        raise DataError(f"{file}: found bands {names}, expected {list(bands.BAND_NAMES)}; write the shards anew")
    for name in ("means", "stds"):
        values = metadata.get(name)
        if values is not None and (
            np.shape(values) != (len(names),) or not np.isfinite(np.array(values, np.float64)).all()
        ):
            raise DataError(f"{file}: {name}: found {values}, expected {len(names)} numbers; write the shards anew")
    return metadata


def split_counts(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Number of records of each split. DataError as for `read_metadata`."""
    return read_metadata(folder)["chips"]["counts"]


def verify(folder: str | os.PathLike[str]) -> int:
    """Compare each shard with its SHA-256 in the metadata; the number of shards.

    Raises:
        DataError: a shard is missing or changed.
    """
    shards = read_metadata(folder)["shards"]
    for shard in shards:
        path = Path(folder) / shard["file"]
        found = sha256_of(path) if path.is_file() else "no file"
        if found != shard["sha256"]:
            raise DataError(f"{path}: found {found}, expected a file of sha256 {shard['sha256']}; write it anew")
    return len(shards)
