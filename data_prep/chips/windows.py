"""Windows of a composite and its label raster: the pixels that the index of chips points to."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import rasterio
from affine import Affine
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from biomass_jax.data import bands, records
from biomass_jax.data.raster.grid import Grid, epsg_code
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import PrepError

_TAGS = {"TILE": r"T?(\d{2}[A-Z]{3})", "SEASON": r"(\S+/\S+)", "SENSORS": r"(L30|S30|L30\+S30)"}


class TilePair:
    """An open composite and its label raster on the same grid; a context manager.

    Attributes:
        grid: the grid of both.
        tile: MGRS tile, from the composite's tags, as `season` and `sensors` are.
        epsg: code of the CRS.
    """

    def __init__(self, composite: str | os.PathLike[str], label: str | os.PathLike[str]) -> None:
        """Open both.

        Raises:
            PrepError: no int16 composite with six named bands and the tags TILE, SEASON, SENSORS, or other grids.
            RasterError: a file is truncated.
            BandError: the six bands aren't found by name.
        """
        self.composite, self.label_path = Path(composite), Path(label)
        self._image = _open(self.composite)
        try:
            self._label = _open(self.label_path)
        except BaseException:
            self._image.close()
            raise
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        tags = self._image.tags()
        self.tile, self.season, self.sensors = (_tag(tags, name, self.composite) for name in _TAGS)
        self._indexes = bands.resolve(
            self._image.descriptions, sensor=bands.sensor_of(self.sensors), path=str(self.composite)
        ).indexes
        kinds = {self._image.dtypes[index - 1] for index in self._indexes}
        if kinds != {"int16"} or self._image.nodata not in (None, bands.FILL):
            raise PrepError(
                f"{self.composite}: found {', '.join(sorted(kinds))} with no-data value {self._image.nodata}, expected "
                f"int16 {bands.UNITS} with {bands.FILL} as `data_prep composite` writes them"
            )
        self.grid, found = (
            Grid(src.height, src.width, src.crs or None, src.transform) for src in (self._image, self._label)
        )
        if self._label.count != 1 or not found.same_as(self.grid):
            raise PrepError(
                f"{self.label_path}: found {self._label.count} band(s) of {found.describe()}, expected one on the "
                f"composite's grid: {self.grid.describe()}"
            )
        self.epsg = epsg_code(self.grid.crs, str(self.composite))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both files."""
        self._image.close()
        self._label.close()

    def read_image(self, window: Window) -> np.ndarray:
        """(rows, columns, 6) int16 digital numbers as stored. PrepError where they can't be read."""
        return np.ascontiguousarray(np.moveaxis(_read(self._image, list(self._indexes), window, self.composite), 0, -1))

    def read_label(self, window: Window) -> np.ndarray:
        """(rows, columns) float32 Mg/ha, -1 for none. PrepError where a value is neither, or can't be read."""
        label = _read(self._label, 1, window, self.label_path).astype(np.float32, copy=False)
        wrong = label[~((np.isfinite(label) & (label >= 0)) | (label == records.NO_LABEL))]
        if wrong.size:
            raise PrepError(
                f"{self.label_path}: found {wrong.size} values like {wrong[0]:g}, expected Mg/ha from 0 on, or -1"
            )
        return label


def _open(path: Path) -> Any:
    if not path.is_file():
        raise PrepError(f"{path}: no such file, expected a composite or label raster")
    verify_blocks(path, sparse_ok=True)
    try:
        return rasterio.open(path)
    except RasterioError as error:
        raise PrepError(f"{path}: can't be opened: {error}") from error


def _read(dataset: DatasetReader, indexes: Any, window: Window, path: Path) -> np.ndarray:
    try:
        return dataset.read(indexes, window=window)
    except RasterioError as error:
        raise PrepError(f"{path}: can't be read: {error.__cause__ or error}") from error


def _tag(tags: Mapping[str, str], name: str, path: Path) -> str:
    found = re.fullmatch(_TAGS[name], tags.get(name, ""))
    if found is None or (name == "SEASON" and not records.is_season(found[1])):
        raise PrepError(
            f"{path}: tag {name}: found {tags.get(name)!r}, expected what `data_prep composite` writes there"
        )
    return found[1]


def moved(transform: Affine, row: int, col: int) -> list[float]:
    """The six numbers a b c d e f of the transform of a window whose upper-left pixel is at (row, col)."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return [a, b, a * col + b * row + c, d, e, d * col + e * row + f]


class ChipReader:
    """Reads chips of an index, keeping the last few tiles open; a context manager, for one thread."""

    MOST_OPEN = 8

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """`root`: the folder to which the index's paths are relative."""
        self._root = Path(root)
        self._open: dict[tuple[str, str], TilePair] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def read(self, row: Mapping[str, Any]) -> records.Record:
        """The record of a row of the index; see `read_record`."""
        key = (str(row["composite"]), str(row["label"]))
        pair = self._open.pop(key, None) or TilePair(self._root / key[0], self._root / key[1])
        self._open[key] = pair  # last again
        if len(self._open) > self.MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return _window_record(pair, row)


def read_record(row: Mapping[str, Any], root: str | os.PathLike[str]) -> records.Record:
    """Read one chip's window.

    Args:
        row: a row of the index, as mapping or pandas Series.
        root: folder to which its paths are relative.

    Returns:
        the record; image (size, size, 6) int16 with the composite's own values, label (size, size) float32.

    Raises:
        PrepError: the rasters can't be read, or are not those that the index was made from.
        RasterError: a raster is truncated.
    """
    with ChipReader(root) as reader:
        return reader.read(row)


def _window_record(pair: TilePair, row: Mapping[str, Any]) -> records.Record:
    size, top, left = int(row["size"]), int(row["row"]), int(row["col"])
    window = Window(left, top, size, size)
    image, label = pair.read_image(window), pair.read_label(window)
    transform = moved(pair.grid.transform, top, left)
    labels = int(((label >= 0) & ~bands.no_data(image)).sum())
    fields = ("tile", "season", "sensors", "epsg", "n_labels")
    found = [pair.tile, pair.season, pair.sensors, pair.epsg, labels, transform]
    expected = [*(row[name] for name in fields), [float(value) for value in row["transform"]]]
    if found != expected:
        raise PrepError(
            f"{pair.composite}: chip {row['chip_id']}: found {found} for {', '.join(fields)}, transform, expected "
            f"{expected}: a raster was changed after the index was made; run `python -m data_prep chips` again"
        )
    return records.Record(
        image=image,
        label=label,
        chip_id=str(row["chip_id"]),
        tile=pair.tile,
        row=top,
        col=left,
        epsg=pair.epsg,
        transform=np.array(transform),
        biome=str(row["biome"]),
        season=pair.season,
        sensors=pair.sensors,
        schema_version=records.SCHEMA_VERSION,
    )
