"""The published data set's GeoTIFF chips into shards.

Folders `{train,val,test}_images` and `..._labels` with `T10SFF_144_tile_img.tif` and `T10SFF_144_tile_label.tif` become
one data set of array_record shards. `--verify` compares the shards with the files, pixel by pixel.
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands, records
from biomass_jax.data.labels import NAMES
from biomass_jax.data.raster.chips import (
    LABEL_MAX,
    PUBLISHED_BANDS,
    Pair,
    check_units,
    describe_pairs,
    find_pairs,
    label_of_files,
    read_pair,
    record_grid,
)
from biomass_jax.data.raster.encoding import AUTO, ENCODINGS, SCALES, declared
from biomass_jax.data.raster.grid import grid_of, open_quietly, raster_errors
from biomass_jax.data.raster.image import hidden_pixels
from biomass_jax.data.records import Record
from biomass_jax.data.shards import label_of, read_metadata, split_counts
from biomass_jax.data.sources import ShardSource
from biomass_jax.errors import FractionError, PrepError
from data_prep.commands import command
from data_prep.shards import write as shards

_SHOWN = 10  # names in a warning; metadata.json has them all


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    band_list: tuple[str | None, ...] | None = None,
    encoding: str = AUTO,
    label_max: float = LABEL_MAX,
    label: str | None = None,
    season: str = "",
    biome: str = records.UNKNOWN_BIOME,
    sensors: str = "L30",
    **settings: Any,
) -> dict[str, Any]:
    """Write the published folders as shards: int16 where every image is exact in it, else float32.

    Args:
        folder: holds `train_images`, `train_labels` and so on.
        out: folder of the data set to write.
        band_list: see `describe_pairs`.
        encoding: likewise.
        label_max: likewise.
        label: what the labels are; see `label_of_files`.
        season: see `Record`; the published files don't tell, nor the next two.
        biome: see `Record`.
        sensors: see `Record`.
        settings: of `shards.write_shards`.

    Returns:
        the data set's metadata.

    Raises:
        PrepError: see `shards.write_shards`.
        RasterError: see `find_pairs` and `read_pair`.
    """
    shards.check_free(Path(out), settings.get("overwrite", False))
    found, alone = find_pairs(folder)
    _warn_of_files_alone(folder, alone)
    reading = {"encoding": encoding, "label_max": label_max}
    what = label_of_files([pair for chosen in found.values() for pair in chosen], label)
    pairs = _described_splits(found, band_list=band_list, season=season, about=what, **reading)
    check_units([pair for chosen in pairs.values() for pair in chosen], folder)
    fields: dict[str, Any] = {"season": season, "biome": biome, "sensors": sensors}
    about = {"folder": Path(folder).absolute().name, "unpaired": alone, "bands": _band_lists(pairs)} | reading | fields
    split = {"kind": "published", "counts": {name: len(chosen) for name, chosen in pairs.items()}}
    metadata = {"sources": [about], "split": split, "label": what.metadata()}

    def write(dtype: str) -> dict[str, Any]:
        items = {
            split: [partial(read_pair, pair, dtype=dtype, **fields) for pair in chosen]
            for split, chosen in pairs.items()
        }
        return shards.write_shards(items, out, metadata=metadata, labelled=True, **settings)

    try:
        return write("int16")
    except FractionError as error:
        warnings.warn(f"{error}; all images are written as float32, twice as large", stacklevel=2)
        return write("float32")


def _warn_of_files_alone(folder: str | os.PathLike[str], alone: Sequence[str]) -> None:
    more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
    if alone:
        shown = ", ".join(alone[:_SHOWN])
        warnings.warn(f"{folder}: {len(alone)} files without a partner: {shown}{more}", stacklevel=3)


def _described_splits(found: dict[str, list[tuple[Path, Path]]], **settings: Any) -> dict[str, list[Pair]]:
    """`describe_pairs` over all splits at once: a tile's chips lie in several."""
    described = iter(describe_pairs([pair for pairs in found.values() for pair in pairs], **settings))
    return {split: [next(described) for _ in pairs] for split, pairs in found.items()}


def _band_lists(pairs: dict[str, list[Pair]]) -> list[list[str | None] | None]:
    """Each list of bands that was used; None stands for files whose descriptions tell."""
    used = {pair.band_list for chosen in pairs.values() for pair in chosen}
    return [None if names is None else list(names) for names in sorted(used, key=str)]


def verify(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, band_list: tuple[str | None, ...] | None = None
) -> int:
    """Compare every chip of a data set with its files, pixel by pixel; the number of chips.

    Args:
        folder: as for `convert`.
        out: the data set.
        band_list: as for `convert`.

    Raises:
        PrepError: a chip is missing, not in the files, or differs; it names the chip, the file, the first pixel.
        RasterError: a file can't be read.
    """
    found, _ = find_pairs(folder)
    (source,) = read_metadata(out)["sources"]
    pairs = _described_splits(
        found,
        band_list=band_list,
        season=source["season"],
        **{name: source[name] for name in ("encoding", "label_max") if name in source},
        about=label_of(out),
    )
    counts = split_counts(out)
    expected = {split: len(chosen) for split, chosen in pairs.items()}
    if counts != expected:
        raise PrepError(f"{out}: found {counts} chips, expected those of {folder}: {expected}")
    for split, chosen in pairs.items():
        by_id = {pair.chip_id: pair for pair in chosen}
        for record in ShardSource(out, split):
            pair = by_id.pop(record["chip_id"], None)
            if pair is None:
                raise PrepError(
                    f"{out}: split {split} holds chip {record['chip_id']}, which {folder} has not (or once)"
                )
            _compare(record, pair)
    return sum(counts.values())


def _compare(record: Record, pair: Pair) -> None:
    """PrepError where a record isn't what the files hold, read by position and not through `read_pair`."""
    names = pair.band_list
    with raster_errors(str(pair.image)), open_quietly(str(pair.image)) as dataset:
        names = dataset.descriptions if names is None else names
        indexes = [names.index(name) + 1 for name in bands.BAND_NAMES]
        image = np.moveaxis(dataset.read(indexes), 0, -1)
        grid, missing = grid_of(dataset), bands.no_data(image, dataset.nodata)
        if (hidden := hidden_pixels(dataset, indexes, {})) is not None:
            missing |= hidden.any(axis=0)
        told = [SCALES.get(pair.encoding) or declared(dataset, index) for index in indexes]
    tolerance = 0.0
    if pair.encoding != AUTO:
        scale, offset = np.array(told, np.float64).T
        image, tolerance = (image * scale + offset) * 1e4, 1e-2
    if not bands.no_data(record["image"])[missing].all():
        raise PrepError(f"{pair.image}: chip {record['chip_id']}: has no data where the shards have; write them anew")
    image = np.where(missing[..., None], record["image"], image)
    with raster_errors(str(pair.label)), open_quietly(str(pair.label)) as dataset:
        label = dataset.read(1).astype(np.float32)
        if (hidden := hidden_pixels(dataset, [1], {})) is not None:
            label[hidden[0]] = records.NO_LABEL
        for none in (dataset.nodata, bands.CAST_FILLS.get(dataset.dtypes[0])):
            label[label == (records.NO_LABEL if none is None else np.float32(none))] = records.NO_LABEL
        label[~(label >= 0)] = records.NO_LABEL
    place = record_grid(record)
    if grid.crs is None and place.crs is not None or grid.crs is not None and not place.same_as(grid, tolerance=0):
        raise PrepError(
            f"{pair.image}: chip {record['chip_id']}: found {place.describe()}, expected {grid.describe()}: write the "
            "shards anew"
        )
    for path, values, expected in ((pair.image, record["image"], image), (pair.label, record["label"], label)):
        differs = ~(np.abs(values - expected.astype(np.float64)) <= tolerance) & ~(
            np.isnan(values) & np.isnan(expected)
        )
        if values.shape != expected.shape or differs.any():
            first = np.argwhere(differs)[:1].tolist()
            raise PrepError(
                f"{path}: chip {record['chip_id']}: {int(differs.sum())} values differ, first at {first}; "
                "expected none: write the shards anew"
            )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep geotiff", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds train_images, train_labels and so on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set of shards")
    published = ",".join(map(str, PUBLISHED_BANDS))
    parser.add_argument(
        "--bands",
        help=f"names of the files' bands, None for unused ones; by default their descriptions, else {published}",
    )
    parser.add_argument("--encoding", choices=ENCODINGS, default=AUTO, help="what the images' numbers are (auto)")
    parser.add_argument(
        "--label-max", type=float, default=LABEL_MAX, help="the highest label there may be, in its unit (2000)"
    )
    parser.add_argument("--label", help=f"what the labels are: {NAMES}; by default what the files call them, else agbd")
    parser.add_argument("--season", default="", help="YYYY-MM-DD/YYYY-MM-DD, which the files don't tell")
    parser.add_argument("--biome", default=records.UNKNOWN_BIOME, help="slug of all chips' biome")
    parser.add_argument("--sensors", choices=records.SENSORS, default="L30", help="where the files don't tell")
    parser.add_argument("--verify", action="store_true", help="compare shards and files afterwards, pixel by pixel")
    parser.add_argument("--verify-only", action="store_true", help="write nothing; compare shards that are there")
    shards.add_settings(parser)
    args = parser.parse_args(argv)
    band_list = bands.parse_band_list(args.bands)
    if not args.verify_only:
        fields = {"season": args.season, "biome": args.biome, "sensors": args.sensors}
        info = convert(
            args.folder,
            args.out,
            band_list=band_list,
            encoding=args.encoding,
            label_max=args.label_max,
            label=args.label,
            **fields,
            **shards.settings_of(args),
        )
        print(shards.summary(args.out, info))
    if args.verify or args.verify_only:
        print(
            f"{args.out}: {verify(args.folder, args.out, band_list=band_list)} chips equal their files, pixel by pixel"
        )
    return 0
