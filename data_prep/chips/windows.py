"""Windows of a composite and its label raster: the pixels that the index of chips points to."""

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from biomass_jax.data import bands, labels, records
from biomass_jax.data.raster.chips import Oddities, check_label_type, clean_labels
from biomass_jax.data.raster.encoding import AUTO
from biomass_jax.data.raster.grid import epsg_code, grid_of, open_quietly, raster_errors
from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import PrepError

_TAGS = {"TILE": r"T?(\d{2}[A-Z]{3})", "SEASON": r"(\S+/\S+)", "SENSORS": r"(L30|S30|L30\+S30)"}


class TilePair(ExitStack[None]):
    """An open composite and its label raster on the same grid; it closes as a stack does.

    Attributes:
        grid: the grid of both.
        tile: MGRS tile, from the composite's tags, as `season` and `sensors` are.
        epsg: code of the CRS.
        about: what the labels are, from the label raster's tags; biomass where they tell nothing.
    """

    def __init__(
        self,
        composite: str | os.PathLike[str],
        label: str | os.PathLike[str],
        *,
        encoding: str = "digital_numbers",
        label_max: float = math.inf,
    ) -> None:
        """Open both.

        Args:
            composite: its six bands, with the tags TILE, SEASON and SENSORS.
            label: on the same grid, in the label's unit.
            encoding: `auto` looks whether the composite holds digital numbers, unless its tag says that its making was
                told; the default takes them as they are, as is right once they are in an index.
            label_max: the highest label that can be, in its unit; where it is given, nor is one above the label's own
                limit taken.

        Raises:
            DataError: the label raster's tags tell of a label in a unit that isn't its own.
            PrepError: no int16 composite with the tags TILE, SEASON, SENSORS, or other grids.
            RasterError: a file can't be opened or is truncated, or the six bands aren't found by name, or hold
                something else.
        """
        super().__init__()
        self.composite, self.label_path, self._label_max = Path(composite), Path(label), label_max
        try:
            self._image = self.enter_context(open_image(composite, model_sensors=(), encoding=encoding))
            with raster_errors(os.fspath(label)):
                self._label = self.enter_context(open_quietly(os.fspath(label)))
            verify_blocks(label, sparse_ok=True)
            told = json.loads(self._label.tags().get("LABELS", "{}")).get("label", {})
            self.about = labels.described(told, os.fspath(label))
            if math.isfinite(label_max):
                self._label_max = min(label_max, self.about.top) if told else label_max
            self._check()
            if json.loads(self._image.tags.get("COMPOSITE", "{}")).get("encoding", AUTO) == AUTO:
                self._image.check_units()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        self.tile, self.season, self.sensors = (_tag(self._image.tags, name, self.composite) for name in _TAGS)
        if self._image.dtype != np.int16 or self._image.fill not in (None, bands.FILL):
            raise PrepError(
                f"{self.composite}: found {self._image.dtype} with no-data value {self._image.fill} as read, expected "
                f"int16 {bands.UNITS} with {bands.FILL} as `data_prep composite` writes them"
            )
        self.grid, found = self._image.grid, grid_of(self._label)
        check_label_type(self._label, str(self.label_path), self.about.unit)
        count = self._label.count - (ColorInterp.alpha in self._label.colorinterp)
        self._sigma = count == 2 and self._label.descriptions[1] == "agbd_sigma"
        if count != 1 + self._sigma or not found.same_as(self.grid):
            raise PrepError(
                f"{self.label_path}: found {count} band(s) of {found.describe()}, expected one on the "
                f"composite's grid, or agbd and agbd_sigma: {self.grid.describe()}"
            )
        called = labels.named(self._label.descriptions[0] or "")
        if called is not None and called.name != self.about.name:
            raise PrepError(
                f"{self.label_path}: its band is called {called.name}, its tag LABELS tells of {self.about.name}; make "
                "it by `python -m data_prep labels`"
            )
        self.epsg = epsg_code(self.grid.crs, str(self.composite))

    def read_image(self, window: Window) -> np.ndarray:
        """(rows, columns, 6) int16 digital numbers as stored. RasterError where they can't be read."""
        return self._image.read_window(window)

    def read_label(self, window: Window) -> np.ndarray:
        """(rows, columns) float32 in the label's unit, -1 for none. RasterError where they can't be read."""
        return self.read_labels(window)[0]

    def read_sigma(self, window: Window, label: np.ndarray) -> np.ndarray:
        """(rows, columns) float32, errors of the labels of that window; -1 where there is none of either.

        Raises:
            RasterError: they can't be read.
        """
        if not self._sigma:
            return records.unknown_sigma(label)
        with raster_errors(f"{self.label_path}: can't be read"):
            sigma = self._label.read(2, window=window)
        known = (label >= 0) & (sigma >= 0) & np.isfinite(sigma)
        return np.where(known, sigma, records.NO_LABEL).astype(np.float32)

    def read_labels(self, window: Window) -> tuple[np.ndarray, np.ndarray, Oddities]:
        """Labels, where there is none though the raster doesn't hold -1, and why; see `raster.chips.clean_labels`.

        Raises:
            RasterError: they can't be read, or some are above `label_max`.
        """
        with raster_errors(f"{self.label_path}: can't be read"):
            name, unit = str(self.label_path), self.about.unit
            return clean_labels(self._label, name, window=window, label_max=self._label_max, unit=unit)


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
        PrepError: the rasters are not those that the index was made from.
        RasterError: a raster can't be read or is truncated.
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
        agbd_sigma=pair.read_sigma(window, label),
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
