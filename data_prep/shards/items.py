"""The chips that go into shards: calls that read one each, and what is known of how they were made."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from biomass_jax.data.raster.image import read_tags
from biomass_jax.data.records import Record
from biomass_jax.data.shards import split_counts
from biomass_jax.data.sources import ShardSource
from biomass_jax.errors import PrepError
from data_prep.chips import index as chip_index
from data_prep.chips.windows import read_record
from data_prep.settings import SPLITS


def items_of(source: Path, root: Path | None = None) -> dict[str, list[Callable[[], Record]]]:
    """For each split the calls that read its records, from a folder of shards or from chips.parquet.

    Args:
        source: folder of shards, or the index that `data_prep chips` writes and `data_prep splits` fills in.
        root: folder that the index's paths start from; the one above `chips/` where None.

    Raises:
        PrepError: neither is there, or no splits are drawn yet.
    """
    if source.suffix != ".parquet":
        folder = os.fspath(source.absolute())
        return {
            split: [partial(_read_one, folder, split, i) for i in range(n)] for split, n in split_counts(source).items()
        }
    rows = _rows(source)
    root = source.absolute().parent.parent if root is None else root.absolute()
    found: dict[str, list[Callable[[], Record]]] = {
        split: [partial(read_record, r, root) for r in rows if r["split"] == split] for split in SPLITS
    }
    if not any(found.values()):
        raise PrepError(f"{source}: none of its {len(rows)} chips has a split; run python -m data_prep splits first")
    return found


_open_split = lru_cache(maxsize=4)(ShardSource)


def _read_one(folder: str, split: str, index: int) -> Record:
    """One record of a data set that stays open for the next."""
    return _open_split(folder, split)[index]


def _rows(index: Path) -> list[dict[str, Any]]:
    """The rows of an index without the columns that reading a chip does without."""
    chip_index.read_metadata(index)  # says what is wrong with a file that is no index
    columns = [name for name in chip_index.COLUMNS.names if name not in ("geometry", "shot_numbers", "label_counts")]
    return pq.read_table(index, columns=columns).to_pylist()


def index_metadata(index: Path) -> dict[str, Any]:
    """How the chips of an index were made, as it and the tags of its rasters tell.

    Args:
        index: chips.parquet in its folder of prepared data.

    Returns:
        {chips, split, composite, gedi, sources}: `composite` and `gedi` are settings that all rasters share (a list,
        with a warning, where they don't), `gedi` with the counts of all label rasters added up; `sources` has what
        differs: scenes and counts of each composite, orbits and counts of each label raster.

    Raises:
        PrepError: no index there.
        RasterError: one of its rasters can't be opened.
    """
    root = index.absolute().parent.parent
    rows = [row for row in _rows(index) if row["split"] in SPLITS]
    composites = {path: _tags(root / path, "COMPOSITE") for path in sorted({row["composite"] for row in rows})}
    labels = {path: _tags(root / path, "LABELS") for path in sorted({row["label"] for row in rows})}
    gedi = {path: _gedi(made) for path, (_, made) in labels.items()}
    counts: Counter[str] = Counter()
    sources: dict[str, dict[str, Any]] = {}
    for path, (tags, made) in composites.items():
        scenes = {
            name.lower(): [part for part in tags.get(name, "").split(",") if part] for name in ("SCENES", "DUPLICATES")
        }
        sources[path] = scenes | {"counts": made.get("counts", {})}
    for path, (_, made) in labels.items():
        counts.update(made.get("counts", {}))
        sources[path] = {"granules": made.get("gedi", {}).get("granules", []), "counts": made.get("counts", {})}
    shared = _shared(gedi, "labels")
    if isinstance(shared, dict):
        shared |= {"counts": dict(counts)}
    return chip_index.read_metadata(index) | {
        "composite": _shared({path: _without(made, "counts") for path, (_, made) in composites.items()}, "composites"),
        "gedi": shared,
        "sources": sources,
    }


def _tags(path: Path, settings: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A raster's tags, and what the JSON in one of them holds ({} where it has none)."""
    tags = read_tags(path)
    return tags, json.loads(tags.get(settings, "{}"))


def _gedi(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of a label raster's settings those that don't belong to its tile alone."""
    own = ("counts", "gedi", "tiles", "seasons", "step", "label")
    return _without(made, *own) | _without(made.get("gedi", {}), "granules")


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _shared(settings: Mapping[str, dict[str, Any]], what: str) -> dict[str, Any] | list[dict[str, Any]]:
    """The settings that all share, else each once, with a warning that names two files."""
    first: dict[str, str] = {}
    for path, made in settings.items():
        first.setdefault(json.dumps(made, sort_keys=True), path)
    distinct = [json.loads(text) for text in first]
    if len(first) > 1:
        one, other = list(first.values())[:2]
        warnings.warn(f"{what} were made with different settings, among them {one} and {other}", stacklevel=3)
        return distinct
    return distinct[0] if distinct else {}
