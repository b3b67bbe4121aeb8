"""Chips as the published data set has them: a GeoTIFF of bands and one of labels each, in a folder for each split.

Folders `{train,val,test}_images` and `..._labels` hold `T10SFF_144_tile_img.tif` and `T10SFF_144_tile_label.tif`.
"""

import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from biomass_jax.data import bands, records
from biomass_jax.data.labels import BIOMASS, Label, named, parse
from biomass_jax.data.raster.encoding import AUTO, check_plausible
from biomass_jax.data.raster.grid import Grid, epsg_code, grid_of, open_quietly, raster_errors
from biomass_jax.data.raster.image import hidden_pixels, open_image
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.data.records import Record
from biomass_jax.errors import FractionError, RasterError

Oddities = Counter[tuple[str, str]]  # what was done with pixels or chips, and why: how many
SPLITS = ("train", "val", "test")
LABEL_MAX = BIOMASS.top  # the highest label of GeoTIFFs, unless another limit is given
TILE_WIDTH = 3660  # of an HLS tile: 16 chips of 224 px a row
# B01, then B02 to B07, B09, B10, B11 and in some files one more, which is probably Fmask.
PUBLISHED_BANDS = (None, *bands.BAND_NAMES, None, None, None, None)
PUBLISHED_COUNTS = (10, 11)
_STEM = re.compile(r"T?(?P<tile>\d{2}[A-Z]{3})_(?P<cell>\d+)(_tile)?")
IMAGE_SUFFIX = "_img.tif"
_SAMPLED = 32  # chips of a folder whose values are looked at together
_MISTAKEN = {"Mg/ha": "kg", "m": "centimetres"}  # what is taken for a label's unit
_SUFFIXES = {"images": IMAGE_SUFFIX, "labels": "_label.tif"}


@dataclass(frozen=True)
class Pair:
    """An image and its label, and what is known of them before pixels are read.

    Attributes:
        image: path.
        label: path, or None for an image alone.
        band_list: names of the image's bands, None for an unused one; None where its descriptions tell.
        encoding: what the image's numbers are, one of `encoding.ENCODINGS`.
        label_max: the highest label that can be, in its unit.
        grid: of the image.
        dtype: int16 where all bands are stored so and taken as they are, else float32.
        tile: from the name, "" where it has another form.
        chip_id: `{tile}_{cell}`, else the name, with the season's start behind it where a season is given.
        row: of the chip in its tile, -1 where unknown.
        col: of the chip in its tile, -1 where unknown.
        about: what its labels are.
    """

    image: Path
    label: Path | None
    band_list: tuple[str | None, ...] | None
    encoding: str
    label_max: float
    grid: Grid
    dtype: str
    tile: str
    chip_id: str
    row: int
    col: int
    about: Label = BIOMASS


def find_pairs(folder: str | os.PathLike[str]) -> tuple[dict[str, list[tuple[Path, Path]]], list[str]]:
    """Images and labels of each split, paired by stem, sorted; and the files that have no partner.

    Returns:
        {split: [(image, label)]} for the splits that are there, and paths relative to the folder.

    Raises:
        RasterError: no split has a pair, or a stem occurs in two splits.
    """
    root = Path(folder)
    found: dict[str, list[tuple[Path, Path]]] = {}
    alone: list[str] = []
    home: dict[str, str] = {}  # folder of each image
    for split in SPLITS:
        pairs, odd = pair_files(root, split)
        alone += odd
        for image, _ in pairs:
            if image.name in home:
                raise RasterError(f"{image}: found in {home[image.name]} too, expected each chip in one split")
            home[image.name] = image.parent.name
        if pairs:
            found[split] = pairs
    if not found:
        raise RasterError(
            f"{root}: found no pair of images and labels, expected folders like train_images and train_labels with "
            "T10SFF_144_tile_img.tif and T10SFF_144_tile_label.tif"
        )
    return found, sorted(alone)


def pair_files(root: Path, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Images and labels of one split, sorted by stem; and the GeoTIFFs without a partner, relative to `root`."""
    odd, found = [], []
    for kind, suffix in _SUFFIXES.items():
        files = [path for path in (root / f"{split}_{kind}").glob("[!.]*.tif") if path.is_file()]
        odd += [path for path in files if not path.name.endswith(suffix)]
        found.append({path.name.removesuffix(suffix): path for path in files if path.name.endswith(suffix)})
    images, labels = found
    pairs = [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    odd += [(images | labels)[stem] for stem in images.keys() ^ labels.keys()]
    return pairs, sorted(path.relative_to(root).as_posix() for path in odd)


def describe_pairs(
    paths: Sequence[tuple[Path, Path | None]],
    *,
    band_list: tuple[str | None, ...] | None = None,
    encoding: str = AUTO,
    label_max: float = LABEL_MAX,
    season: str = "",
    about: Label = BIOMASS,
) -> list[Pair]:
    """Read the headers of images.

    The row and column in the tile follow from the cell in the name. Where the chips of a tile then disagree about where
    the tile begins, a warning says so, and all its rows and columns stay unknown.

    Args:
        paths: images and labels, None for an image alone.
        band_list: names of every image's bands; where None, a file's descriptions, else PUBLISHED_BANDS.
        encoding: see `Pair`.
        label_max: likewise; of another label than biomass its own limit holds too.
        season: `YYYY-MM-DD/YYYY-MM-DD` or "".
        about: what the labels are.
    """
    label_max = label_max if about == BIOMASS else min(label_max, about.top)
    start = season.split("/")[0]
    pairs = [_described(image, label, start, band_list, encoding, label_max, about) for image, label in paths]
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


def _described(
    image: Path,
    label: Path | None,
    start: str,
    band_list: tuple[str | None, ...] | None,
    encoding: str,
    label_max: float,
    about: Label,
) -> Pair:
    with raster_errors(str(image)), open_quietly(str(image)) as dataset:
        grid = grid_of(dataset)
        names = [name for name in dataset.descriptions if name in bands.BAND_NAMES]
        count = dataset.count
        as_stored = set(dataset.dtypes) == {"int16"} and encoding in (AUTO, "digital_numbers")
        dtype = "int16" if as_stored else "float32"
    if band_list is None and set(names) != set(bands.BAND_NAMES):
        if count not in PUBLISHED_COUNTS:
            raise RasterError(
                f"{image}: found {count} bands, not all six named, expected names, or "
                f"{' or '.join(map(str, PUBLISHED_COUNTS))} bands in the published order; name them with --bands, or "
                "config.bands of a run"
            )
        band_list = PUBLISHED_BANDS[:count]
    name = image.name.removesuffix(IMAGE_SUFFIX)
    tile, row, col = "", records.UNKNOWN_PLACE, records.UNKNOWN_PLACE
    if match := _STEM.fullmatch(name):
        tile, cell, size = match["tile"], int(match["cell"]), grid.height
        name = f"{tile}_{cell}"
        down, right = (index * size for index in divmod(cell, max(TILE_WIDTH // size, 1)))
        if max(down, right) + size <= TILE_WIDTH:
            row, col = down, right
    chip_id = "_".join(part for part in (name, start) if part)
    return Pair(image, label, band_list, encoding, label_max, grid, dtype, tile, chip_id, row, col, about)


def read_pair(
    pair: Pair,
    *,
    dtype: str = "int16",
    season: str = "",
    biome: str = "unknown",
    sensors: str = "L30",
    check_units: bool = True,
) -> tuple[Record, Oddities]:
    """The record of an image and its label, and what in them is odd, for `tell`.

    Args:
        pair: from `describe_pairs`.
        dtype: of the record's image.
        season: see `Record`.
        biome: see `Record`.
        sensors: where the file itself doesn't tell.
        check_units: whether to look if these can be digital numbers, which takes a third of the time.

    Raises:
        RasterError: int16 can't hold the image, another no-data value, or the label has another grid or odd values.
        RasterError: a file can't be read, its bands are others, or it holds reflectance.
    """
    with open_image(pair.image, band_list=pair.band_list, model_sensors=(), encoding=pair.encoding) as source:
        if source.fill not in (None, bands.FILL):
            raise RasterError(f"{pair.image}: no-data value: found {source.fill:g}, expected {bands.FILL} or none")
        low = None
        if check_units:
            low = source.check_units(one_of_many=True)
        image = source.read_rows(0, source.grid.height)
        sensors = source.sensor or sensors
    crs, (label, odd) = pair.grid.crs, _read_label(pair)
    odd.update({("values taken as no-data", what): number for what, (number, *_) in source.oddities.items()})
    odd["chips whose units to check", f"of very low values for {bands.UNITS}"] += low is not None
    record = Record(
        image=_as_int16(image, pair.image) if dtype == "int16" else image.astype(np.float32, copy=False),
        label=label,
        agbd_sigma=records.unknown_sigma(label),
        chip_id=pair.chip_id,
        tile=pair.tile,
        row=pair.row,
        col=pair.col,
        epsg=0 if crs is None else epsg_code(crs, str(pair.image)),
        transform=np.zeros(6) if crs is None else np.array(tuple(pair.grid.transform)[:6]),
        biome=biome,
        season=season,
        sensors=sensors,
        schema_version=records.SCHEMA_VERSION,
    )
    return record, +odd


def tell(odd: Oddities, where: object) -> None:
    """Warn of what is odd in a raster or in all chips of a folder, in one sentence; of nothing, say nothing."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for (kind, what), number in sorted(odd.items()):
        kinds[kind].append(f"{number:,} {what}")
    if kinds:
        told = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in kinds.items())
        warnings.warn(f"{where}: {told}", stacklevel=2)


def check_units(pairs: Sequence[Pair], where: object) -> None:
    """Refuse a folder whose images can't hold digital numbers, by a sample of its chips taken together.

    One chip may be all dark water, and a small one tells nothing; see `encoding.check_plausible`.

    Raises:
        RasterError: they can't, or a file can't be read.
    """
    stored, values = set[str](), []
    for pair in pairs[:: -(-len(pairs) // _SAMPLED)]:
        if pair.encoding == AUTO:
            with open_image(pair.image, band_list=pair.band_list, model_sensors=()) as source:
                stored.update(source.stored)
                values.append(source.sample())
    if values:
        name = f"{where} ({len(values)} of {len(pairs)} chips)"
        check_plausible(np.concatenate(values), ", ".join(sorted(stored)), name)


def check_files(pair: Pair) -> None:
    """Look whether both files are whole and lie on one grid, without reading pixels. RasterError where not."""
    verify_blocks(pair.image, sparse_ok=True)
    if pair.label is not None:
        verify_blocks(pair.label, sparse_ok=True)
        with raster_errors(str(pair.label)), open_quietly(str(pair.label)) as dataset:
            _check_label(dataset, pair)


def record_grid(record: Record) -> Grid:
    """Size and place of a record's chip."""
    height, width = record["image"].shape[:2]
    crs = CRS.from_epsg(record["epsg"]) if record["epsg"] else None
    return Grid(height, width, crs, Affine(*record["transform"]))


def _as_int16(image: np.ndarray, path: Path) -> np.ndarray:
    if image.dtype == np.int16:
        return image
    limits = np.iinfo(np.int16)
    exact = (image == np.rint(image)) & (image >= limits.min) & (image <= limits.max)  # False for NaN
    if not exact.all():
        raise FractionError(f"{path}: found {image[~exact][0]:g}, which int16 can't hold exactly")
    return image.astype(np.int16)


def label_of_files(paths: Sequence[tuple[Path, Path | None]], name: str | None = None) -> Label:
    """What the labels of GeoTIFFs are.

    Args:
        paths: images and labels, None for an image alone.
        name: of the label, as `labels.parse` takes it; where None, what the first label file calls its band, if that is
            the name of one, else biomass.

    Raises:
        DataError: an unknown name.
        RasterError: the file can't be read.
    """
    if name is not None:
        return parse(name)
    first = next((label for _, label in paths if label is not None), None)
    if first is None:
        return BIOMASS
    with raster_errors(str(first)), open_quietly(str(first)) as dataset:
        called = dataset.descriptions[0] or ""
    return named(called) or BIOMASS


def check_label_type(dataset: rasterio.DatasetReader, name: str, unit: str = BIOMASS.unit) -> None:
    """RasterError where the labels of an open raster are complex numbers; `name` is that of the file."""
    if "complex" in dataset.dtypes[0]:
        raise RasterError(f"{name}: its labels are {dataset.dtypes[0]}; expected real numbers, {unit}")


def clean_labels(
    dataset: rasterio.DatasetReader,
    name: str,
    *,
    window: Window | None = None,
    label_max: float = LABEL_MAX,
    unit: str = BIOMASS.unit,
) -> tuple[np.ndarray, np.ndarray, Oddities]:
    """The labels of an open raster.

    There is none where it holds NaN, what its tag calls no-data, -9999, also as it becomes in an unsigned type, or
    anything below 0, and where a mask or an alpha band hides a pixel.

    Args:
        dataset: an open rasterio dataset of one band.
        name: of the file, for messages.
        window: what to read; all of it where None.
        label_max: the highest label that can be, in its unit.
        unit: of the labels, for the message.

    Returns:
        (H, W) float32, -1 for none; bool (H, W), where there is none though the file doesn't hold -1; and how
        many of these each reason gives.

    Raises:
        RasterError: labels that are no real numbers, infinite, or above `label_max`.
    """
    check_label_type(dataset, name, unit)
    stored = dataset.read(1, window=window)
    label = stored.astype(np.float32)
    hidden = hidden_pixels(dataset, [1], {"window": window})
    cast = bands.CAST_FILLS.get(stored.dtype.name)
    reasons: dict[str, np.ndarray] = {} if hidden is None else {"hidden by a mask": hidden[0]}
    if dataset.nodata is not None and not np.isnan(dataset.nodata):
        reasons[f"its no-data value {dataset.nodata:g}"] = label == np.float32(dataset.nodata)
    if cast is not None:
        reasons[f"{cast}, which is -9999 cast to {stored.dtype.name}"] = stored == cast
    reasons["NaN"] = np.isnan(label)
    reasons[f"{bands.FILL}"] = label == bands.FILL
    reasons["below 0"] = label < 0
    none, counts = label == records.NO_LABEL, Oddities()
    besides = np.zeros(none.shape, bool)
    for what, found in reasons.items():
        found &= ~none & ~besides
        counts["labels taken as none", what] = int(np.count_nonzero(found))
        besides |= found
    label[besides] = records.NO_LABEL
    high = (label > label_max) | np.isinf(label)
    if high.any():
        raise RasterError(
            f"{name}: labels up to {label.max():g}, {int(high.sum())} of them above {label_max:g} {unit}; "
            f"probably {_MISTAKEN.get(unit, 'another unit')}, or a no-data value that no tag names. Where they are "
            "right, allow them with label_max (config.data.label_max)"
        )
    return label, besides, +counts


def _read_label(pair: Pair) -> tuple[np.ndarray, Oddities]:
    """(H, W) float32, -1 where there is none, and why; see `clean_labels`. Without a file there is none at all."""
    if pair.label is None:
        return np.full((pair.grid.height, pair.grid.width), records.NO_LABEL, np.float32), Oddities()
    with raster_errors(str(pair.label)), open_quietly(str(pair.label)) as dataset:
        verify_blocks(pair.label, sparse_ok=True)
        _check_label(dataset, pair)
        name, unit = str(pair.label), pair.about.unit
        label, _, counts = clean_labels(dataset, name, label_max=pair.label_max, unit=unit)
    return label, counts


def _check_label(dataset: rasterio.DatasetReader, pair: Pair) -> None:
    check_label_type(dataset, str(pair.label))
    grid, count = grid_of(dataset), dataset.count - (ColorInterp.alpha in dataset.colorinterp)
    if count != 1 or not grid.same_as(pair.grid):
        raise RasterError(
            f"{pair.label}: found {count} band(s) of {grid.describe()}, expected one on the grid of {pair.image.name}: "
            f"{pair.grid.describe()}"
        )
