"""Chips into array_record shards that TFDS opens without TensorFlow, and back.

Record order depends on the seed alone, and equal chips give equal bytes whatever the number of workers. A data set
appears under its name whole, or not at all.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands, records
from biomass_jax.data.labels import BIOMASS, described
from biomass_jax.data.raster.chips import Oddities, tell
from biomass_jax.data.records import Record
from biomass_jax.data.shards import METADATA_KEY, split_of, verify
from biomass_jax.data.statistics import SPLIT as STATISTICS_SPLIT
from biomass_jax.data.statistics import BandSums, chip_sums, combine, describe
from biomass_jax.errors import PrepError, refuse_empty
from biomass_jax.runtime.files import replace_folder, sha256_of
from biomass_jax.runtime.lock import lock_beside, one_writer
from biomass_jax.runtime.settings import add_options, options_of
from data_prep.commands import add_allow_empty, command, refuse_beside_prepare
from data_prep.parallel import run_all
from data_prep.settings import ShardSettings
from data_prep.shards.items import index_metadata, items_of

# One record a group, so that a chip is read without its neighbours, compressed by zstd's fastest level.
CODING = "group_size:1,zstd:1"
_FULL = "is the disk full, or a limit on file sizes set (ulimit -f)?"

Item = Record | Callable[[], Record | tuple[Record, Oddities]]

NAME, VERSION = "biomass", "1.0.0"  # of the TFDS data set; the record's own version is `schema_version`
DEFAULT = ShardSettings()
_DESCRIPTIONS = {
    BIOMASS.name: "HLS chips (digital numbers) with GEDI above-ground biomass density; metadata.json tells the rest."
}


@dataclass(frozen=True)
class Shard:
    """What a written shard holds.

    Attributes:
        file: its name.
        sha256: of the file.
        size: of the file, bytes.
        num_bytes: of its records before compression.
        pixels: of all its images.
        valid: those of them with data.
        labels: pixels with a label.
        chips: for each record, in order: chip_id, tile, season, sensors.
        sums: of its chips, where they were asked for.
        odd: what in its chips' files is odd.
    """

    file: str
    sha256: str
    size: int
    num_bytes: int
    pixels: int
    valid: int
    labels: int
    chips: tuple[tuple[str, str, str, str], ...]
    sums: BandSums | None
    odd: Oddities


def load(item: Item) -> tuple[Record, Oddities]:
    """The record itself, or the one that the item reads when it is called, and what is odd in it."""
    found = item() if callable(item) else item
    return found if isinstance(found, tuple) else (found, Oddities())


def write_shard(
    path: Path, items: Sequence[Item], shape: tuple[int, int, int], dtype: str, reference: bool | None
) -> Shard:
    """Write one shard and compare what lies on the disk with what was to be written.

    Args:
        path: the file; its folder exists.
        items: records, or calls that read one each, in the order of the shard.
        shape: (H, W, 6) of every image.
        dtype: of every image.
        reference: None for no statistics, else as for `statistics.chip_sums`.

    Raises:
        RecordError: a record is not valid, or not of that shape and dtype.
        PrepError: the file can't be written, or is not whole.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    written, num_bytes, chips, sums, odd = hashlib.sha256(), 0, [], [], Oddities()
    pixels = valid = labels = 0
    try:
        writer = ArrayRecordWriter(str(path), CODING)
        for item in items:
            record, odd_here = load(item)
            odd += odd_here
            records.validate(record, image_shape=shape, image_dtype=dtype)
            data = records.encode(record)
            writer.write(data)
            written.update(hashlib.sha256(data).digest())
            num_bytes += len(data)
            pixels += record["label"].size
            valid += int(np.count_nonzero(~bands.no_data(record["image"])))
            labels += int(np.count_nonzero(record["label"] != records.NO_LABEL))
            chips.append((record["chip_id"], record["tile"], record["season"], record["sensors"]))
            if reference is not None:
                sums.append(chip_sums(record["image"], reference=reference))
        writer.close()
    except RuntimeError as error:  # array_record's own; it has no type for it
        raise PrepError(f"{path}: not written: {error}; {_FULL}") from error
    if _digest_of_records(path, len(chips)) != written.digest():
        raise PrepError(f"{path}: holds other records than were written; {_FULL}")
    total = combine(sums) if reference is not None else None
    size = path.stat().st_size
    return Shard(path.name, sha256_of(path), size, num_bytes, pixels, valid, labels, tuple(chips), total, odd)


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
    record, _ = load(items[0])
    records.validate(record)
    return record["image"].shape, record["image"].dtype.name


def write_shards(
    split_records: Mapping[str, Iterable[Item]],
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    records_per_shard: int = DEFAULT.records_per_shard,
    workers: int = 1,
    executor: Executor | None = None,
    seed: int = 0,
    reference_statistics: bool = False,
    overwrite: bool = False,
    labelled: bool = False,
    allow_empty: bool = False,
) -> dict[str, Any]:
    """Write the splits of a data set as shards with TFDS's metadata beside them.

    Args:
        split_records: for each split its records, or (picklable) calls that read one each, in a fixed order. A split
            without any is left out with a warning, since TFDS can't open one.
        out: folder of the data set.
        metadata: what is known besides (composite, gedi, split ...), JSON-able; `label` as `labels.Label.metadata`.
        records_per_shard: most records of a shard; a split's shards differ by at most one record.
        workers: writing processes.
        executor: writes instead of own processes, on machines that share the folder.
        seed: of the record order.
        reference_statistics: see `statistics.chip_sums`.
        overwrite: replace a data set that is already there.
        labelled: whether all would be in vain without a label; sets for pretraining have none.
        allow_empty: write them as well where fewer than 0.1 % of the pixels have data, or no chip of 1,000 a label.

    Returns:
        What `read_metadata` gives.

    Raises:
        PrepError: something is there already; no record at all, (nearly) no data or no label; two chips of one
            chip_id; a shard can't be written.
        RecordError: a record is not valid, or of another shape or dtype than the first.
        FolderError: another process writes this data set; see `lock.one_writer`.
    """
    out = Path(out)
    check_free(out, overwrite)
    if records_per_shard < 1 or workers < 1:
        raise PrepError(f"records_per_shard {records_per_shard} and workers {workers}: expected 1 or more")
    splits = {split: items for split, given in split_records.items() if (items := _known(split, list(given)))}
    if not splits:
        raise PrepError(f"{out}: no records in any split of {', '.join(split_records) or 'none'}; nothing to write")
    temporary = out.parent / f".{out.name}.partial"
    with one_writer(*lock_beside(out)), _emptied(temporary):
        shape, dtype = first_shape(next(iter(splits.values())))
        tasks = _tasks(temporary, splits, records_per_shard, seed, reference_statistics, shape, dtype)
        done = list(run_all(write_shard, tasks, workers=workers, executor=executor))
        _check_unique(done)
        _refuse_empty(done, out, labelled=labelled, allowed=allow_empty)
        info = _metadata(done, shape, dtype, reference_statistics, dict(metadata or {}))
        info["shard_settings"] = {"seed": seed, "records_per_shard": records_per_shard, "coding": CODING}
        _write_tfds_metadata(temporary, done, shape, dtype, info)
        replace_folder(temporary, out)
    tell(sum((shard.odd for shard in done), Oddities()), out)
    return info


def _refuse_empty(done: Sequence[Shard], out: Path, *, labelled: bool, allowed: bool) -> None:
    """Refuse a data set with (nearly) no data, or without labels where it is to have some."""
    pixels, valid, labels = (sum(getattr(shard, name) for shard in done) for name in ("pixels", "valid", "labels"))
    refuse_empty(PrepError, valid, pixels, f"{out}: pixels of its chips with data", allowed=allowed)
    if labelled:
        count = sum(len(shard.chips) for shard in done)
        refuse_empty(PrepError, labels, count, f"{out}: labels of its chips", allowed=allowed)


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """A folder for the time of the block; what a killed run left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tasks(
    folder: Path,
    splits: Mapping[str, Sequence[Item]],
    records_per_shard: int,
    seed: int,
    reference: bool,
    shape: tuple[int, int, int],
    dtype: str,
) -> list[tuple[Any, ...]]:
    """The arguments of `write_shard` for each shard of each split."""
    tasks: list[tuple[Any, ...]] = []
    for split, items in splits.items():
        names = shard_names(split, len(items), records_per_shard)
        order = shard_order(len(items), split, seed)
        statistics = reference if split == STATISTICS_SPLIT else None
        for name, chosen in zip(names, _parts(order, len(names)), strict=True):
            tasks.append((folder / name, [items[i] for i in chosen], shape, dtype, statistics))
    return tasks


def _known(split: str, items: list[Item]) -> list[Item]:
    if not split.isidentifier():
        raise PrepError(f"split {split!r}: expected a name of letters, digits and underscores")
    if not items:
        warnings.warn(f"split {split}: no chips, so it is left out (TFDS can't open an empty one)", stacklevel=3)
    return items


def check_free(out: Path, overwrite: bool) -> None:
    """PrepError where something is in the way of a new data set: anything, or with `overwrite` what is none."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise PrepError(f"{out}: is there already; remove it, name another folder, or pass --overwrite")
    if not (out / "dataset_info.json").is_file():
        raise PrepError(f"{out}: found no dataset_info.json in it, so it is no data set, and is not overwritten")


def shard_names(split: str, count: int, records_per_shard: int) -> list[str]:
    """File names of a split's shards, as TFDS expects them."""
    shards = -(-count // records_per_shard)
    return [f"{NAME}-{split}.array_record-{index:05d}-of-{shards:05d}" for index in range(shards)]


def shard_order(count: int, split: str, seed: int) -> list[int]:
    """A permutation of `count` records that is the same on every machine, and with every version of NumPy."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest())


def _parts(order: Sequence[int], count: int) -> list[Sequence[int]]:
    """`count` pieces in order whose lengths differ by at most one."""
    ends = [len(order) * index // count for index in range(count + 1)]
    return [order[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]


def _check_unique(shards: Iterable[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        split = split_of(shard.file)
        for chip_id, *_ in shard.chips:
            if chip_id in seen:
                raise PrepError(f"chip_id {chip_id!r}: found in split {seen[chip_id]} and again in {split}")
            seen[chip_id] = split


def _metadata(
    shards: Sequence[Shard], shape: tuple[int, int, int], dtype: str, reference: bool, given: dict[str, Any]
) -> dict[str, Any]:
    """DESIGN's fields; what was `given` is kept beside them, and inside `chips`."""
    chips = [chip for shard in shards for chip in shard.chips]
    counts: dict[str, int] = {}
    for shard in shards:
        counts[split_of(shard.file)] = counts.get(split_of(shard.file), 0) + len(shard.chips)
    sums = [shard.sums for shard in shards if shard.sums is not None]
    statistics = describe(combine(sums), reference=reference) if sums else {}
    if not sums:
        warnings.warn(f"no split {STATISTICS_SPLIT}, so there are no means and stds", stacklevel=3)
    about_chips = {"size": list(shape[:2]), "dtype": dtype, "tiles": sorted({tile for _, tile, *_ in chips if tile})}
    return given | {
        "schema_version": records.SCHEMA_VERSION,
        "bands": list(bands.BAND_NAMES),
        "units": bands.UNITS,
        "fill": bands.FILL,
        "means": statistics.get("means"),
        "stds": statistics.get("stds"),
        "stat_pixels": statistics.get("stat_pixels", 0),
        "stat_settings": statistics.get("stat_settings"),
        "label": described(given.get("label", {})).metadata() | {"none": records.NO_LABEL},
        "season": "; ".join(sorted({season for *_, season, _ in chips if season})),
        "sensors": sorted({sensor for *_, sensors in chips for sensor in sensors.split("+")}),
        "chips": given.get("chips", {}) | about_chips | {"counts": counts},
        "shards": [{"file": s.file, "records": len(s.chips), "bytes": s.size, "sha256": s.sha256} for s in shards],
        "software": {
            "biomass_jax": records.SOFTWARE_VERSION,
            "array_record": importlib.metadata.version("array_record"),
        },
    }


def _write_tfds_metadata(
    folder: Path, shards: Sequence[Shard], shape: tuple[int, int, int], dtype: str, info: dict[str, Any]
) -> None:
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, filetype_suffix="array_record")
    splits = []
    for split in dict.fromkeys(split_of(shard.file) for shard in shards):
        mine = [shard for shard in shards if split_of(shard.file) == split]
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.chips) for shard in mine],
                num_bytes=sum(shard.num_bytes for shard in mine),
                filename_template=template.replace(split=split),
            )
        )
    text, name = json.dumps(info, sort_keys=True, allow_nan=False), info["label"]["name"]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=records.features(shape, dtype),
        split_infos=splits,
        version=VERSION,
        check_data=False,  # that check needs TensorFlow; shards are checked as they are written
        description=_DESCRIPTIONS.get(
            name, f"HLS chips (digital numbers) with labels {name}; metadata.json tells more."
        ),
        metadata=tfds.core.MetadataDict({METADATA_KEY: text}),
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep shards", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of prepared data: chips/chips.parquet, shards/")
    add_settings(parser)
    parser.add_argument("--verify", action="store_true", help="write nothing; compare shards with their checksums")
    args = parser.parse_args(argv)
    folder = args.out / "shards"
    if args.verify:
        print(f"{folder}: {verify(folder)} shards are as they were written")
        return 0
    refuse_beside_prepare(args.out)
    index = args.out / "chips" / "chips.parquet"
    info = write_shards(items_of(index), folder, metadata=index_metadata(index), **settings_of(args))
    print(summary(folder, info))
    return 0


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of `write_shards`, for each command that writes shards."""
    add_options(parser, ShardSettings)
    parser.add_argument(
        "--workers", type=int, default=1, help="writing processes; the bytes are the same for any number"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there already")
    add_allow_empty(parser)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_settings` read, as keywords of `write_shards`."""
    given = {name: getattr(args, name) for name in ("workers", "overwrite", "allow_empty")}
    return options_of(args, ShardSettings) | given


def summary(folder: Path, info: Mapping[str, Any]) -> str:
    """One line on what was written."""
    counts = ", ".join(f"{count} {split}" for split, count in info["chips"]["counts"].items())
    return f"{folder}: {counts} chips in {len(info['shards'])} shards"
