"""Where chips come from: array_record shards, folders of GeoTIFFs, or several of them with weights.

A source gives any record of one split by its number. Nothing here needs JAX.
"""

import os
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomass_jax.data import bands as band_table
from biomass_jax.data import records
from biomass_jax.data.fingerprints import content, digest_of, fingerprint
from biomass_jax.data.labels import BIOMASS, Label, described
from biomass_jax.data.raster import chips as chip_files
from biomass_jax.data.raster.chips import (
    IMAGE_SUFFIX,
    LABEL_MAX,
    Pair,
    describe_pairs,
    label_of_files,
    pair_files,
    read_pair,
)
from biomass_jax.data.raster.encoding import AUTO
from biomass_jax.data.raster.grid import epsg_code
from biomass_jax.data.records import Record
from biomass_jax.data.shards import check_files, read_metadata, shards_of
from biomass_jax.data.shards import verify as verify_shards
from biomass_jax.data.statistics import chip_sums, combine, means_stds
from biomass_jax.errors import BandError, DataError, RasterError

_READERS = 8  # threads, where a whole split is read at once
_SHOWN = 10  # names in a warning
_SENSORS = "L30"  # of the published chips, whose files don't tell


class Place(NamedTuple):
    """Where a chip's centre lies: x and y in the CRS of an EPSG code, 0 where that isn't known."""

    epsg: int = 0
    x: float = 0.0
    y: float = 0.0


class Chip(NamedTuple):
    """What is known of a chip besides its pixels; all empty for padding."""

    chip_id: str
    tile: str
    biome: str
    place: Place = Place()


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a source without reading its chips.

    Attributes:
        path: as it was asked for.
        split: name.
        chips: in this split.
        image_shape: (H, W, 6) of every chip.
        image_dtype: int16 or float32.
        fill: value of no-data besides the rule's own, digital numbers.
        season: `YYYY-MM-DD/YYYY-MM-DD`, several joined by "; ", or "".
        sensors: `L30`, `S30`; () where nothing tells.
        metadata: all that the shards' metadata hold; of folders `label` alone, where it isn't biomass.
    """

    path: str
    split: str
    chips: int
    image_shape: tuple[int, int, int]
    image_dtype: np.dtype
    fill: float
    season: str = ""
    sensors: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> Label:
        """What the labels are; biomass where nothing tells.

        Raises:
            DataError: a unit that isn't the label's own; chips of several data sets with different labels.
        """
        if several := self.metadata.get("labels"):
            raise DataError(f"{self.path}: chips with labels {' and '.join(several)}; a model learns one label")
        return described(self.metadata.get("label", {}), self.path)


class Source(ABC):
    """Chips of one split by number; can be pickled, and read by several threads at once.

    Attributes:
        info: see DatasetInfo.
    """

    info: DatasetInfo
    _chips: list[Chip] | None = None

    @abstractmethod
    def _read(self, index: int) -> Record:
        """The record of a number that is in range."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 over all that the chips of this split are made of, whatever folder they lie in."""

    def __len__(self) -> int:
        return self.info.chips

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.info.path}: split {self.info.split} has {len(self)} chips, no chip {index}")
        try:
            return self._read(index)
        except DataError:  # of a source that this one is made of
            raise
        except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
            where = f"{self.info.path}: split {self.info.split}, chip number {index}"
            raise DataError(f"{where}: can't be read: {error}; check the files, or write the data set anew") from error

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """(chips, chips seen in an epoch) of each part; the parts' chips are numbered one after another."""
        return ((len(self), len(self)),)

    def chips(self) -> list[Chip]:
        """Every chip's name, tile, biome and place; read once."""
        if self._chips is None:
            with ThreadPoolExecutor(_READERS) as pool:
                self.remember(list(pool.map(lambda index: chip_of(self[index]), range(len(self)))))
        return self._chips or []

    def remember(self, chips: list[Chip]) -> None:
        """Keep what `chips` gives, for whoever has read all records already."""
        self._chips = chips


def chip_of(record: Record) -> Chip:
    """Name, tile, biome and place of a record."""
    epsg = int(record["epsg"])
    place = Place(epsg, *records.centre(record["transform"], record["label"].shape)) if epsg else Place()
    return Chip(record["chip_id"], record["tile"], record["biome"], place)


def open_source(
    path: str | os.PathLike[str],
    split: str,
    *,
    bands: object = None,
    encoding: str = AUTO,
    label_max: float = LABEL_MAX,
    label: str | None = None,
    verify: bool = False,
) -> Source:
    """Open one split of a data set.

    Args:
        path: folder of shards (`dataset_info.json` in it), or of `{split}_images` and `{split}_labels` with
            `*_img.tif` and `*_label.tif` as published; without `{split}_labels` no chip has a label.
        split: `train`, `val`, `test` ...
        bands: names of the GeoTIFFs' bands where their descriptions don't tell; see `bands.parse_band_list`.
        encoding: what the GeoTIFFs' numbers are, one of `raster.encoding.ENCODINGS`.
        label_max: the highest label that a GeoTIFF may hold, in its unit.
        label: what GeoTIFFs' labels are, as `labels.parse` takes it; None for what their files call it, else biomass.
        verify: compare every shard with its SHA-256, or read every GeoTIFF once.

    Raises:
        DataError: no data set, or no such split, or other bands, or another schema version; files that are missing or
            not of their size; or `bands`, `encoding` or `label_max` for shards, or another `label` than theirs.
    """
    root = Path(path)
    if (root / "dataset_info.json").is_file():
        if bands is not None:
            raise DataError(f"{root}: config.bands is set, but records know their bands; leave it out for shards")
        for name, given, default in (("encoding", encoding, AUTO), ("label_max", label_max, LABEL_MAX)):
            if given != default:
                raise DataError(f"{root}: {name} is {given!r}, but it is for GeoTIFFs; leave it out for shards")
        if verify:
            verify_shards(root, split)
        source: Source = ShardSource(root, split)
        if label is not None and source.info.label.name != label:
            raise DataError(f"{root}: label is {label!r}, but its records hold {source.info.label.name}; leave it out")
        return source
    if any(root.glob("*_images")):
        source = FolderSource(root, split, bands=bands, encoding=encoding, label_max=label_max, label=label)
        if verify:
            with ThreadPoolExecutor(_READERS) as pool:
                deque(pool.map(source.__getitem__, range(len(source))), maxlen=0)
        return source
    hint = f"; did you mean {root / 'shards'}?" if (root / "shards" / "dataset_info.json").is_file() else ""
    found = "no such folder"
    if root.is_dir():
        found = "found " + (", ".join(sorted(item.name for item in root.iterdir())[:8]) or "nothing in it")
    raise DataError(
        f"{root}: split {split}: {found}; expected shards with their dataset_info.json, or folders like "
        f"{split}_images and {split}_labels{hint}"
    )


def _place(pair: Pair) -> Place:
    """Where an image lies, as its record will tell."""
    grid = pair.grid
    if grid.crs is None:
        return Place()
    return Place(
        epsg_code(grid.crs, str(pair.image)),
        *records.centre(np.array(tuple(grid.transform)[:6]), (grid.height, grid.width)),
    )


class ShardSource(Source):
    """array_record shards that `data_prep` wrote, opened by TFDS without TensorFlow."""

    def __init__(self, path: str | os.PathLike[str], split: str) -> None:
        """Open them; DataError as for `open_source`."""
        import tensorflow_datasets as tfds

        metadata = read_metadata(path)
        builder = tfds.builder_from_directory(os.fspath(path))
        splits = {name: info.num_examples for name, info in builder.info.splits.items()}
        if split not in splits:
            raise DataError(f"{path}: split {split!r} is not there; found {', '.join(sorted(splits))}")
        check_files(path, metadata, split)
        told = sum(shard["records"] for shard in shards_of(metadata, split))
        if told != splits[split]:
            raise DataError(
                f"{path}: split {split}: dataset_info.json tells of {splits[split]} chips, metadata.json of {told}; "
                "the files are of two data sets: copy it again, or write it anew"
            )
        self._data = builder.as_data_source(split)
        self.info = DatasetInfo(
            path=os.fspath(path),
            split=split,
            chips=splits[split],
            image_shape=tuple(builder.info.features["image"].shape),
            image_dtype=np.dtype(builder.info.features["image"].np_dtype),
            fill=float(metadata["fill"]),
            season=metadata.get("season", ""),
            sensors=tuple(metadata.get("sensors", ())),
            metadata=metadata,
        )

    def _read(self, index: int) -> Record:
        return records.from_example(self._data[index])

    def digest(self) -> str:
        """See Source; from the digests in the metadata."""
        metadata = self.info.metadata
        shards = [(shard["records"], shard["sha256"]) for shard in shards_of(metadata, self.info.split)]
        return digest_of((shards, metadata["fill"], metadata.get("label")))


class FolderSource(Source):
    """Images and labels of `{split}_images` and `{split}_labels`; images alone where there are no labels' folders.

    Decoding GeoTIFFs takes 5 to 10 times as long as reading shards: for more than a few epochs, convert them by
    `python -m data_prep geotiff`. Headers are read at once, so that a file that is cut, has other bands or is
    of another size is found before training begins.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str,
        *,
        bands: object = None,
        encoding: str = AUTO,
        label_max: float = LABEL_MAX,
        label: str | None = None,
    ) -> None:
        """Find the files and read their headers; DataError as for `open_source`."""
        root = Path(path)
        splits = sorted(folder.name.removesuffix("_images") for folder in root.glob("[!.]*_images") if folder.is_dir())
        if split not in splits:
            raise DataError(f"{path}: split {split!r} is not there; found {', '.join(splits) or 'none'}")
        pairs, alone = pair_files(root, split)
        paths: list[tuple[Path, Path | None]] = [*pairs]
        if not (root / f"{split}_labels").is_dir():
            paths = [(root / name, None) for name in alone if name.endswith(IMAGE_SUFFIX)]
            alone = [name for name in alone if not name.endswith(IMAGE_SUFFIX)]
        if not paths:
            raise DataError(
                f"{path}: split {split}: found no chip, expected T10SFF_144_tile_img.tif in {split}_images, and "
                f"T10SFF_144_tile_label.tif in {split}_labels unless that folder is not there"
            )
        if alone:
            more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
            warnings.warn(
                f"{path}: {len(alone)} files without a partner: {', '.join(alone[:_SHOWN])}{more}", stacklevel=3
            )
        try:
            about, names = label_of_files(paths, label), band_table.parse_band_list(bands)
            self._pairs = describe_pairs(paths, band_list=names, encoding=encoding, label_max=label_max, about=about)
            with ThreadPoolExecutor(_READERS) as pool:
                deque(pool.map(chip_files.check_files, self._pairs), maxlen=0)
            chip_files.check_units(self._pairs, root / f"{split}_images")
        except (BandError, RasterError) as error:
            raise DataError(f"{path}: split {split}: {error}") from error
        first = self._pairs[0]
        for pair in self._pairs:
            if (pair.grid.height, pair.grid.width) != (first.grid.height, first.grid.width):
                raise DataError(
                    f"{pair.image}: found {pair.grid.height} x {pair.grid.width} pixels, expected {first.grid.height} "
                    f"x {first.grid.width} as in {first.image.name}"
                )
        self._odd: dict[int, chip_files.Oddities] = {}  # of chips that were read; their units are looked at once
        self._untold = [f"{path}: split {split}"]
        self.info = DatasetInfo(
            path=os.fspath(path),
            split=split,
            chips=len(self._pairs),
            image_shape=(first.grid.height, first.grid.width, len(band_table.BAND_NAMES)),
            image_dtype=np.result_type(*{pair.dtype for pair in self._pairs}),
            fill=float(band_table.FILL),
            sensors=(_SENSORS,),
            metadata={} if about == BIOMASS else {"label": about.metadata()},
        )

    def chips(self) -> list[Chip]:
        """See Source; from names and headers, without reading pixels."""
        if self._chips is None:
            self.remember([Chip(pair.chip_id, pair.tile, records.UNKNOWN_BIOME, _place(pair)) for pair in self._pairs])
        return super().chips()

    def _read(self, index: int) -> Record:
        new = index not in self._odd
        dtype = self.info.image_dtype.name
        record, odd = read_pair(self._pairs[index], dtype=dtype, sensors=_SENSORS, check_units=new)
        self._odd.setdefault(index, odd)
        if self._untold and len(self._odd) == len(self._pairs):
            with suppress(IndexError):  # another thread has told it
                chip_files.tell(sum(self._odd.values(), chip_files.Oddities()), self._untold.pop())
        return record

    def digest(self) -> str:
        """See Source; every file is read."""

        def of_pair(pair: Pair) -> list[tuple[str, str]]:
            return [(path.name, fingerprint(path, content)) for path in (pair.image, pair.label) if path is not None]

        with ThreadPoolExecutor(_READERS) as pool:
            return digest_of(list(pool.map(of_pair, self._pairs)))


class Mixture(Source):
    """Several sources one after another, each seen in an epoch as often as its weight says.

    An epoch is as long as it can be without a chip twice: the source that runs out first is seen whole, of the others
    another random choice in every epoch.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]) -> None:
        """Join them; DataError as for `open_mixture`."""
        infos = [part.info for part, _ in parts]
        weights = [float(weight) for _, weight in parts]
        where = " + ".join(info.path for info in infos)
        if not parts or not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"{where or 'no path'}: found weights {weights}, expected one or more, each above 0")
        for info in infos[1:]:
            if (info.image_shape, info.fill) != (infos[0].image_shape, infos[0].fill):
                raise DataError(
                    f"{info.path}: found chips {info.image_shape} with fill {info.fill:g}, expected "
                    f"{infos[0].image_shape} with fill {infos[0].fill:g} as in {infos[0].path}"
                )
        self._parts = [part for part, _ in parts]
        self._starts = np.cumsum([0, *(info.chips for info in infos)])
        unit = min(info.chips / weight for info, weight in zip(infos, weights, strict=True))
        # Rounding errors of the division must not take a chip from the source that sets the length.
        self._seen = [int(unit * weight + 1e-9) for weight in weights]
        self.info = replace(
            infos[0],
            path=where,
            chips=int(self._starts[-1]),
            image_dtype=np.result_type(*(info.image_dtype for info in infos)),
            season="; ".join(sorted({season for info in infos for season in info.season.split("; ") if season})),
            sensors=tuple(sorted({sensor for info in infos for sensor in info.sensors})),
            metadata=infos[0].metadata if len(infos) == 1 else _shared_label(infos),
        )

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """See Source."""
        return tuple((len(part), seen) for part, seen in zip(self._parts, self._seen, strict=True))

    def _read(self, index: int) -> Record:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = self._parts[part][index - int(self._starts[part])]
        return {**record, "image": record["image"].astype(self.info.image_dtype, copy=False)}

    def digest(self) -> str:
        """See Source."""
        return digest_of([(part.digest(), seen) for part, seen in zip(self._parts, self._seen, strict=True)])


def _shared_label(infos: Sequence[DatasetInfo]) -> dict[str, Any]:
    """The label of several data sets, where it isn't biomass; the names of all where they have different ones."""
    found = [info.label for info in infos]
    if any(label != found[0] for label in found):
        return {"labels": sorted({label.name for label in found})}
    return {} if found[0] == BIOMASS else {"label": found[0].metadata()}


def open_mixture(parts: Sequence[tuple[str | os.PathLike[str], float]], split: str, **settings: Any) -> Mixture:
    """Open several data sets as one, for pretraining.

    Args:
        parts: (path, weight) of each: an epoch holds chips of them in the proportion of the weights.
        split: of each.
        settings: those of `open_source`.

    Raises:
        DataError: see `open_source`; weights that are not above 0; chips of different shapes.
    """
    return Mixture([(open_source(path, split, **settings), weight) for path, weight in parts])


def statistics_of(source: Source, *, reference: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the bands over training chips, as `data_prep stats` has them, to the last bit.

    Args:
        source: of the training split. Where its metadata hold statistics made with the same `reference`, they are
            taken; else every chip is read.
        reference: count as granite-geospatial-biomass did: all values but -9999 and NaN, pixels of zeros among them.

    Returns:
        (6,) float64 each, in digital numbers; the population's standard deviation.

    Raises:
        DataError: chips of another split would be read, or a band has no pixel with data.
    """
    info = source.info
    made = info.metadata.get("stat_settings") or {}
    means, stds = info.metadata.get("means"), info.metadata.get("stds")
    if means is None or stds is None or made.get("reference", False) != reference:
        if info.split != "train":
            raise DataError(f"{info.path}: statistics come from split train, found {info.split}; open that one")
        with ThreadPoolExecutor(_READERS) as pool:
            parts = pool.map(lambda index: chip_sums(source[index]["image"], reference=reference), range(len(source)))
            means, stds = means_stds(combine(parts), where=f"{info.path}: ")
    return np.array(means, np.float64), np.array(stds, np.float64)
