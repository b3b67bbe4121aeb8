"""The published GeoTIFF folders as a source of chips, without writing shards first.

Decoding GeoTIFFs takes 5 to 10 times as long as reading shards: for more than a few epochs, convert them with
data_prep.geotiff.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands as band_names
from biomass_jax.data import raster
from biomass_jax.data.records import Record
from biomass_jax.data.sources import Chip, DatasetInfo, Source
from biomass_jax.errors import BandError, DataError, RasterError

_SHOWN = 10  # names in a warning
_SENSORS = "L30"  # of the published chips, whose files don't tell


class FolderSource(Source):
    """Images and labels of `{split}_images` and `{split}_labels`; images alone where there are no labels' folders.

    Headers are read at once, so that a file with other bands or of another size is found before training begins.
    """

    def __init__(self, path: str | os.PathLike[str], split: str, *, bands: Any = None) -> None:
        """Find the files and read their headers; DataError as for `open_source`."""
        self._arguments = (os.fspath(path), split, bands)
        root = Path(path)
        splits = {name: len(_paired(root, name)[0]) for name in _splits(root)}
        if split not in splits:
            raise DataError(f"{path}: split {split!r} is not there; found {', '.join(sorted(splits)) or 'none'}")
        paths, alone = _paired(root, split)
        if not paths:
            raise DataError(
                f"{path}: split {split}: found no chip, expected T10SFF_144_tile_img.tif in {split}_images, and "
                f"T10SFF_144_tile_label.tif in {split}_labels unless that folder is not there"
            )
        if alone:
            more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
            shown = ", ".join(f"{file.parent.name}/{file.name}" for file in alone[:_SHOWN])
            warnings.warn(f"{path}: {len(alone)} files without a partner: {shown}{more}", stacklevel=3)
        try:
            self._pairs = raster.describe_pairs(paths, band_list=band_names.parse_band_list(bands))
        except (BandError, RasterError) as error:
            raise DataError(f"{path}: split {split}: {error}") from error
        self._check_sizes()
        self._checked: set[int] = set()  # chips whose units were looked at: once is enough
        first = self._pairs[0]
        dtypes = {pair.dtype for pair in self._pairs}
        self.info = DatasetInfo(
            path=os.fspath(path),
            split=split,
            chips=len(self._pairs),
            splits=splits,
            image_shape=(first.grid.height, first.grid.width, len(band_names.BAND_NAMES)),
            image_dtype=np.dtype("int16" if dtypes == {"int16"} else "float32"),
            fill=float(band_names.FILL),
            sensors=(_SENSORS,),
        )
        self.remember([Chip(pair.chip_id, pair.tile, "unknown") for pair in self._pairs])

    def _check_sizes(self) -> None:
        first = self._pairs[0]
        for pair in self._pairs:
            if (pair.grid.height, pair.grid.width) != (first.grid.height, first.grid.width):
                raise DataError(
                    f"{pair.image}: found {pair.grid.height} x {pair.grid.width} pixels, expected {first.grid.height} "
                    f"x {first.grid.width} as in {first.image.name}"
                )

    def _read(self, index: int) -> Record:
        new = index not in self._checked
        dtype = self.info.image_dtype.name
        record = raster.read_pair(self._pairs[index], dtype=dtype, sensors=_SENSORS, check_units=new)
        self._checked.add(index)
        return record

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, self._arguments


def _open(path: str, split: str, bands: Any) -> FolderSource:
    return FolderSource(path, split, bands=bands)


def _splits(root: Path) -> list[str]:
    return sorted(folder.name.removesuffix("_images") for folder in root.glob("[!.]*_images") if folder.is_dir())


def _paired(root: Path, split: str) -> tuple[list[tuple[Path, Path | None]], list[Path]]:
    """Images with their labels, and the files that have no partner."""
    images, labels, odd = raster.split_files(root, split)
    if not (root / f"{split}_labels").is_dir():
        return [(image, None) for image in images.values()], odd
    alone = odd + [images[stem] for stem in images.keys() - labels] + [labels[stem] for stem in labels.keys() - images]
    return [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())], sorted(alone)
