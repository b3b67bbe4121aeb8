"""The published data set's GeoTIFF chips into shards.

Folders `{train,val,test}_images` and `..._labels` with `T10SFF_144_tile_img.tif` and `T10SFF_144_tile_label.tif` become
one data set of array_record shards. `--verify` compares the shards with the files, pixel by pixel.
"""

import argparse
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS

from biomass_jax.data import bands, raster, records
from biomass_jax.data.records import Record
from data_prep import ground, shards
from data_prep.commands import command
from data_prep.errors import PrepError
from data_prep.splits import SPLITS

TILE_WIDTH = 3660  # of an HLS tile: 16 chips of 224 px a row
# B01, then B02 to B07, B09, B10, B11 and in some files one more, which is probably Fmask.
PUBLISHED_BANDS = (None, *bands.BAND_NAMES, None, None, None, None)
PUBLISHED_COUNTS = (10, 11)
_STEM = re.compile(r"T?(?P<tile>\d{2}[A-Z]{3})_(?P<cell>\d+)(_tile)?")
_SUFFIXES = {"images": "_img.tif", "labels": "_label.tif"}
_SHOWN = 10  # names in a warning; metadata.json has them all


class _FractionError(PrepError):
    """An image that int16 can't hold exactly."""


@dataclass(frozen=True)
class Pair:
    """An image and its label, and what is known of them before pixels are read.

    Attributes:
        image: path.
        label: path.
        band_list: names of the image's bands, None for an unused one; None where its descriptions tell.
        grid: of the image.
        tile: from the name, "" where it has another form.
        cell: from the name, -1 likewise.
        chip_id: `{tile}_{cell}`, else the name, with the season's start behind it where a season is given.
        row: of the chip in its tile, -1 where unknown.
        col: of the chip in its tile, -1 where unknown.
    """

    image: Path
    label: Path
    band_list: tuple[str | None, ...] | None
    grid: raster.Grid
    tile: str
    cell: int
    chip_id: str
    row: int = records.UNKNOWN_PLACE
    col: int = records.UNKNOWN_PLACE


def find_pairs(folder: str | os.PathLike[str]) -> tuple[dict[str, list[tuple[Path, Path]]], list[str]]:
    """Images and labels of each split, paired by stem, sorted; and the files that have no partner.

    Returns:
        {split: [(image, label)]} for the splits that are there, and paths relative to the folder.

    Raises:
        PrepError: no split has a pair, or a stem occurs in two splits.
    """
    root = Path(folder)
    found: dict[str, list[tuple[Path, Path]]] = {}
    alone: list[str] = []
    for split in SPLITS:
        files = {kind: _by_stem(root / f"{split}_{kind}", kind, alone) for kind in _SUFFIXES}
        images, labels = files["images"], files["labels"]
        alone += [_relative(path, root) for stem, path in images.items() if stem not in labels]
        alone += [_relative(path, root) for stem, path in labels.items() if stem not in images]
        if pairs := [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]:
            found[split] = pairs
    if not found:
        raise PrepError(
            f"{root}: found no pair of images and labels, expected folders like train_images and train_labels with "
            "T10SFF_144_tile_img.tif and T10SFF_144_tile_label.tif"
        )
    home: dict[str, Path] = {}
    for image, _ in (pair for pairs in found.values() for pair in pairs):
        if image.name in home:
            raise PrepError(f"{image}: found in {home[image.name].parent.name} too, expected each chip in one split")
        home[image.name] = image
    return found, sorted(alone)


def _by_stem(folder: Path, kind: str, alone: list[str]) -> dict[str, Path]:
    suffix = _SUFFIXES[kind]
    files = [path for path in sorted(folder.glob("[!.]*.tif")) if path.is_file()]
    alone += [_relative(path, folder.parent) for path in files if not path.name.endswith(suffix)]
    return {path.name.removesuffix(suffix): path for path in files if path.name.endswith(suffix)}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def describe_pairs(
    paths: Sequence[tuple[Path, Path]], *, band_list: tuple[str | None, ...] | None = None, season: str = ""
) -> list[Pair]:
    """Read the headers of images.

    The row and column in the tile follow from the cell in the name. Where the chips of a tile then disagree about where
    the tile begins, a warning says so, and all its rows and columns stay unknown.

    Args:
        paths: images and labels.
        band_list: names of every image's bands; where None, a file's descriptions, else PUBLISHED_BANDS.
        season: `YYYY-MM-DD/YYYY-MM-DD` or "".
    """
    pairs = [_described(image, label, band_list, season.split("/")[0]) for image, label in paths]
    origins: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for pair in pairs:
        if pair.row != records.UNKNOWN_PLACE and pair.grid.crs is not None:
            t = pair.grid.transform
            # in whole pixels: shifts below half of one are roundings
            origins[pair.tile].add((round(t.c / t.a) - pair.col, round(t.f / t.e) - pair.row))
    odd = sorted(tile for tile, found in origins.items() if len(found) > 1)
    if odd:
        warnings.warn(
            f"tiles {', '.join(odd)}: their chips' cells and coordinates contradict each other, expected cell = "
            f"row * {TILE_WIDTH // records.CHIP_SIZE} + column in one grid; row and col are left unknown",
            stacklevel=2,
        )
    unknown = records.UNKNOWN_PLACE
    return [replace(pair, row=unknown, col=unknown) if pair.tile in odd else pair for pair in pairs]


def _described(image: Path, label: Path, band_list: tuple[str | None, ...] | None, start: str) -> Pair:
    with raster.raster_errors(str(image)), raster.open_quietly(str(image)) as dataset:
        grid = raster.grid_of(dataset)
        names = [name for name in dataset.descriptions if name in bands.BAND_NAMES]
        count = dataset.count
    if band_list is None and set(names) != set(bands.BAND_NAMES):
        if count not in PUBLISHED_COUNTS:
            raise PrepError(
                f"{image}: found {count} bands, not all six named, expected names, or "
                f"{' or '.join(map(str, PUBLISHED_COUNTS))} bands in the published order; name them with --bands"
            )
        band_list = PUBLISHED_BANDS[:count]
    stem = image.name.removesuffix(_SUFFIXES["images"])
    match = _STEM.fullmatch(stem)
    name = f"{match['tile']}_{int(match['cell'])}" if match else stem
    pair = Pair(image, label, band_list, grid, "", -1, "_".join(part for part in (name, start) if part))
    if match is None:
        return pair
    size = grid.height
    row, col = (index * size for index in divmod(int(match["cell"]), max(TILE_WIDTH // size, 1)))
    pair = replace(pair, tile=match["tile"], cell=int(match["cell"]))
    return pair if max(row, col) + size > TILE_WIDTH else replace(pair, row=row, col=col)


def read_pair(
    pair: Pair, *, dtype: str = "int16", season: str = "", biome: str = "unknown", sensors: str = "L30"
) -> Record:
    """The record of an image and its label.

    Args:
        pair: from `describe_pairs`.
        dtype: of the record's image.
        season: see `Record`.
        biome: see `Record`.
        sensors: where the file itself doesn't tell.

    Raises:
        PrepError: int16 can't hold the image, another no-data value, or the label has another grid or odd values.
        RasterError: a file can't be read, its bands are others, or it holds reflectance.
    """
    with raster.open_image(pair.image, band_list=pair.band_list, model_sensors=()) as source:
        if source.fill not in (None, bands.FILL):
            raise PrepError(f"{pair.image}: no-data value: found {source.fill:g}, expected {bands.FILL} or none")
        source.check_units()
        image = source.read_rows(0, source.grid.height)
        sensors = source.sensor or sensors
    crs = pair.grid.crs
    return Record(
        image=_as_int16(image, pair.image) if dtype == "int16" else image.astype(np.float32, copy=False),
        label=_read_label(pair),
        chip_id=pair.chip_id,
        tile=pair.tile,
        row=pair.row,
        col=pair.col,
        epsg=0 if crs is None else ground.epsg_code(crs, str(pair.image)),
        transform=np.zeros(6) if crs is None else np.array(tuple(pair.grid.transform)[:6]),
        biome=biome,
        season=season,
        sensors=sensors,
        schema_version=records.SCHEMA_VERSION,
    )


def _as_int16(image: np.ndarray, path: Path) -> np.ndarray:
    if image.dtype == np.int16:
        return image
    limits = np.iinfo(np.int16)
    exact = (image == np.rint(image)) & (image >= limits.min) & (image <= limits.max)  # False for NaN
    if not exact.all():
        raise _FractionError(f"{path}: found {image[~exact][0]:g}, which int16 can't hold exactly")
    return image.astype(np.int16)


def _read_label(pair: Pair) -> np.ndarray:
    """(H, W) float32; -1 where the file holds -1, or what its tag calls no-data."""
    with raster.raster_errors(str(pair.label)), raster.open_quietly(str(pair.label)) as dataset:
        raster.verify_blocks(pair.label, sparse_ok=True)
        grid, count = raster.grid_of(dataset), dataset.count
        label = dataset.read(1).astype(np.float32, copy=False)
    if count != 1 or not grid.same_as(pair.grid):
        raise PrepError(
            f"{pair.label}: found {count} band(s) of {grid.describe()}, expected one on the grid of {pair.image.name}: "
            f"{pair.grid.describe()}"
        )
    return np.where(np.isnan(label) | (label == bands.FILL), np.float32(records.NO_LABEL), label)


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    band_list: tuple[str | None, ...] | None = None,
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
        season: see `Record`; the published files don't tell.
        biome: see `Record`, likewise.
        sensors: see `Record`, likewise.
        settings: of `shards.write_shards`.

    Returns:
        the data set's metadata.

    Raises:
        PrepError: see `find_pairs`, `read_pair` and `shards.write_shards`.
        RasterError: a file can't be read.
    """
    shards.check_free(Path(out), settings.get("overwrite", False))
    found, alone = find_pairs(folder)
    if alone:
        more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
        warnings.warn(
            f"{folder}: {len(alone)} files without a partner: {', '.join(alone[:_SHOWN])}{more}", stacklevel=2
        )
    pairs = _described_splits(found, band_list, season)
    fields = {"season": season, "biome": biome, "sensors": sensors}
    counts = {split: len(chosen) for split, chosen in pairs.items()}
    metadata = {
        "sources": [{"folder": Path(folder).absolute().name, "unpaired": alone, "bands": _band_lists(pairs), **fields}],
        "split": {"kind": "published", "counts": counts},
    }

    def write(dtype: str) -> dict[str, Any]:
        items = {
            split: [partial(read_pair, pair, dtype=dtype, **fields) for pair in chosen]
            for split, chosen in pairs.items()
        }
        return shards.write_shards(items, out, metadata=metadata, **settings)

    try:
        return write("int16")
    except _FractionError as error:
        warnings.warn(f"{error}; all images are written as float32, twice as large", stacklevel=2)
        return write("float32")


def _described_splits(
    found: dict[str, list[tuple[Path, Path]]], band_list: tuple[str | None, ...] | None, season: str
) -> dict[str, list[Pair]]:
    """`describe_pairs` over all splits at once: a tile's chips lie in several."""
    described = iter(
        describe_pairs([pair for pairs in found.values() for pair in pairs], band_list=band_list, season=season)
    )
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
    (source,) = shards.read_metadata(out)["sources"]
    pairs = _described_splits(found, band_list, source["season"])
    counts = shards.split_counts(Path(out))
    expected = {split: len(chosen) for split, chosen in pairs.items()}
    if counts != expected:
        raise PrepError(f"{out}: found {counts} chips, expected those of {folder}: {expected}")
    for split, chosen in pairs.items():
        by_id = {pair.chip_id: pair for pair in chosen}
        for record in shards.read(out, split):
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
    with raster.raster_errors(str(pair.image)), raster.open_quietly(str(pair.image)) as dataset:
        names = dataset.descriptions if names is None else names
        image = np.moveaxis(dataset.read([names.index(name) + 1 for name in bands.BAND_NAMES]), 0, -1)
        grid = raster.grid_of(dataset)
    with raster.raster_errors(str(pair.label)), raster.open_quietly(str(pair.label)) as dataset:
        label = dataset.read(1)
        label[~(label >= 0)] = records.NO_LABEL
    crs = CRS.from_epsg(record["epsg"]) if record["epsg"] else None
    height, width = record["label"].shape
    place = raster.Grid(height, width, crs, Affine(*record["transform"]))
    if grid.crs is None and crs is not None or grid.crs is not None and not place.same_as(grid, tolerance=0):
        raise PrepError(
            f"{pair.image}: chip {record['chip_id']}: found {place.describe()}, expected {grid.describe()}: write the "
            "shards anew"
        )
    for path, values, expected in ((pair.image, record["image"], image), (pair.label, record["label"], label)):
        differs = (values != expected) & ~(np.isnan(values) & np.isnan(expected))
        if values.shape != expected.shape or differs.any():
            first = np.argwhere(differs)[:1].tolist()
            raise PrepError(
                f"{path}: chip {record['chip_id']}: {int(differs.sum())} values differ, first at {first}; "
                "expected none: write the shards anew"
            )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.geotiff", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds train_images, train_labels and so on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set of shards")
    published = ",".join(map(str, PUBLISHED_BANDS))
    parser.add_argument(
        "--bands",
        help=f"names of the files' bands, None for unused ones; by default their descriptions, else {published}",
    )
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
        info = convert(args.folder, args.out, band_list=band_list, **fields, **shards.settings_of(args))
        print(shards.summary(args.out, info))
    if args.verify or args.verify_only:
        print(
            f"{args.out}: {verify(args.folder, args.out, band_list=band_list)} chips equal their files, pixel by pixel"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
