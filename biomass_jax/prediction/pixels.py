"""The pixels of a map, from an open image: all of them now, or each when Dask wants it."""

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from biomass_jax.bundle import Bundle
from biomass_jax.data.bands import no_data, parse_band_list
from biomass_jax.data.raster import arrays
from biomass_jax.data.raster.encoding import AUTO
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import ImageSource, Reading
from biomass_jax.data.raster.resample import MaskSource, mask_identity
from biomass_jax.errors import PredictionError, refuse_empty
from biomass_jax.prediction.stream import (
    TileRowPrediction,
    Timings,
    WriteRows,
    blend_band,
    check_finite,
    predict_tile_row,
    stream_map,
)
from biomass_jax.prediction.tiling import TilePlan
from biomass_jax.runtime.progress import Progress

log = logging.getLogger(__name__)

_SAMPLE = 5000  # pixels of a piece of an image whose values are looked at


class ImageModel(Protocol):
    """What maps need of a `Forward`."""

    def prepare(self, shape: tuple[int, ...], dtype: np.dtype) -> object:
        """Compile for batches of this shape and type in a thread."""
        ...

    def __call__(self, images: np.ndarray, fill: float | None) -> jax.Array:
        """(B, H, W, bands) digital numbers -> float32 (B, H, W[, channels]), still being computed."""
        ...


class Mapper(Protocol):
    """What maps need of a `Predictor`."""

    bundle: Bundle
    tile: int
    batch_size: int
    settings: dict[str, Any]
    one_at_a_time: threading.Lock

    @property
    def forward(self) -> ImageModel:
        """The model."""
        ...

    def on(self, grid: Grid, name: str) -> "Mapper":
        """The mapper of an image on a grid; `name` is the image's."""
        ...

    @property
    def layers(self) -> dict[str, str]:
        """Name and unit of each of the map's bands."""
        ...

    @property
    def channels(self) -> tuple[int, ...]:
        """(): `forward` gives one value a pixel; or how many."""
        ...

    def tags(self) -> dict[str, str]:
        """What a map's file says of its layers."""
        ...

    def finish(self, values: np.ndarray, start: int) -> np.ndarray:
        """What `forward` gave as what the map has from row `start` on: (rows, W[, channels]) -> (rows, W[, layers])."""
        ...

    def plan(self, height: int, width: int) -> TilePlan | None:
        """Tiles of a raster of so many pixels; None where it is predicted whole."""
        ...

    def reading(self, options: "MapOptions") -> Reading:
        """How its images are opened."""
        ...


@dataclass
class MapOptions:
    """How maps are made from files, beside the predictor's own settings.

    Attributes:
        bands: names of the files' bands where their descriptions don't say, None for an unused band; see
            `bands.parse_band_list` for how it may be spelled.
        encoding: what the files' numbers are, one of `encoding.ENCODINGS`.
        resample: metres, of the pixels that finer images are brought to; None to refuse them.
        mask: a raster of classes on any grid; pixels of other classes than `mask_keep` become no-data.
        mask_keep: the classes to keep.
        allow_empty: write a map as well where fewer than 0.1 % of its pixels get a value.
        overwrite: make maps again that are finished.
        quicklook: write a PNG beside each map.
        style: write a style of QGIS and a colour ramp of GDAL beside each map.
        stac: write a STAC item beside each map.
        progress: show a bar on a terminal, lines in a log.

    Raises:
        PredictionError: half a mask.
        RasterError: a mask that can't be opened, which no map could be made with.
    """

    bands: Any = None
    encoding: str = AUTO
    resample: float | None = None
    mask: str | os.PathLike[str] | None = None
    mask_keep: Sequence[int] | None = None
    allow_empty: bool = False
    overwrite: bool = False
    quicklook: bool = False
    style: bool = False
    stac: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        self.bands = parse_band_list(self.bands)
        self.mask = None if self.mask is None else os.fspath(self.mask)
        self.mask_keep = tuple(self.mask_keep) if self.mask_keep else None
        if (self.mask is None) != (self.mask_keep is None):
            raise PredictionError(
                f"mask is {self.mask!r} and mask_keep is {self.mask_keep!r}: give both or neither, the raster and "
                "the classes in it to keep"
            )
        self._mask_identity = None if self.mask is None else mask_identity(self.mask)

    def settings(self) -> dict[str, Any]:
        """What a map's values depend on; a mask counts by what it is read from as well."""
        found: dict[str, Any] = {"bands": self.bands, "encoding": self.encoding, "resample": self.resample}
        found |= {"mask": self.mask, "mask_keep": self.mask_keep}
        if self.mask is not None:
            mask = os.path.abspath(self.mask) if os.path.exists(self.mask) else self.mask
            found |= {"mask": mask, "mask_identity": self._mask_identity}
        return found

    def open_mask(self, grid: Grid, stack: ExitStack) -> MaskSource | None:
        """The mask on a map's grid, which the stack closes; None where there is none."""
        if self.mask is None:
            return None
        return stack.enter_context(MaskSource(self.mask, grid, self.mask_keep or ()))


class MapReader:
    """Rows of an image with the pixels that get a value, and the mask's share of those with data."""

    def __init__(self, source: ImageSource, mask: MaskSource | None) -> None:
        self._source, self._mask = source, mask
        self._data = self._kept = 0  # pixels with data, and those of them that the mask keeps
        self._samples: list[np.ndarray] = []  # of a far image, whose values are looked at as they come

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (rows, W, bands) and bool (rows, W), True where the map gets a value."""
        pixels = self._source.read_rows(start, stop)
        wanted = ~no_data(pixels, self._source.fill)
        self._data += int(np.count_nonzero(wanted))
        if self._source.far:
            present = pixels[wanted]
            self._samples.append(present[:: max(len(present) // _SAMPLE, 1)])
            self._source.check_units(self._samples[-1], one_of_many=True)
        if self._mask is not None:
            wanted &= self._mask.read_rows(start, stop)
        self._kept += int(np.count_nonzero(wanted))
        return pixels, wanted

    def check(self, allow_empty: bool) -> None:
        """PredictionError where (nearly) no pixel of all that were read gets a value, unless that is allowed.

        RasterError where the values of a far image can't be digital numbers.
        """
        if self._samples:
            warned = len(self._source.warnings)
            self._source.check_units(np.concatenate(self._samples))
            _say(dict.fromkeys(self._source.warnings[warned:]))
        grid = self._source.grid
        what = "pixels with data"
        if self._mask is not None and self._data:
            what = f"pixels of the {self._data:,} with data that the mask {self._mask.name} keeps"
        refuse_empty(
            PredictionError, self._kept, grid.height * grid.width, f"{self._source.name}: {what}", allowed=allow_empty
        )

    @property
    def share(self) -> float | None:
        """Share of the pixels with data that the mask keeps; None without a mask."""
        return None if self._mask is None else self._kept / max(self._data, 1)


def check_source(source: ImageSource) -> None:
    """Look at an image's values and say what it warns of; RasterError where they can't be digital numbers.

    Of a far image nothing is read for that: its map begins with its first rows, and they are looked at as they come.
    """
    if not source.far:
        source.check_units()
    _say(source.warnings)


class MapPixels(ExitStack[None]):
    """The pixels of a map on their way, begun in one thread and finished in the same or another one.

    Of large images all rows are written when it is made; small ones are only handed to the device then.
    """

    def __init__(
        self, predictor: Mapper, source: ImageSource, options: MapOptions, write: WriteRows, name: str
    ) -> None:
        """`write` takes the rows, `name` is that of the progress bar; errors as for `Predictor.predict_file`."""
        super().__init__()
        grid = source.grid
        predictor = predictor.on(grid, source.name)
        self._predictor, self._source, self._options, self._write = predictor, source, options, write
        plan = predictor.plan(grid.height, grid.width)
        shape = (1, grid.height, grid.width) if plan is None else (predictor.batch_size, *(predictor.tile,) * 2)
        predictor.forward.prepare((*shape, len(predictor.bundle.bands)), source.dtype)
        self._whole: jax.Array | None = None
        with ExitStack() as stack:
            self._reader = MapReader(source, options.open_mask(grid, stack))
            self.chips = 1 if plan is None else plan.count
            self.timings = Timings() if plan is None else self._predict_tiles(plan, name)
            if plan is None:
                began = time.perf_counter()
                pixels, self._wanted = self._reader.read(0, grid.height)
                self.timings.read = time.perf_counter() - began
                self._whole = predictor.forward(pixels[None], source.fill)
            self.push(stack.pop_all())

    def _predict_tiles(self, plan: TilePlan, name: str) -> Timings:
        """Predict all tiles and write their rows."""
        with Progress(name, plan.count) if self._options.progress else nullcontext() as shown:
            return stream_map(
                plan,
                self._reader.read,
                lambda images: self._predictor.forward(images, self._source.fill),
                self._write,
                batch_size=self._predictor.batch_size,
                nodata=self._predictor.bundle.nodata,
                advance=shown.advance if shown else lambda chips: None,
                channels=self._predictor.channels,
                finish=self._predictor.finish,
            )

    def finish(self) -> None:
        """Write what is left, and say what was odd; an image without a value is refused."""
        # No progress is shown of a whole image: it is done before a bar could be read, and folders hold thousands.
        if self._whole is not None:
            began = time.perf_counter()
            values = np.array(self._whole)[0]
            self.timings.compute = time.perf_counter() - began
            check_finite(values, self._wanted)
            values = self._predictor.finish(values, 0)
            values[~self._wanted] = self._predictor.bundle.nodata
            self._write(0, values)
        self._reader.check(self._options.allow_empty)
        say_oddities(self._source.name, self._source.oddities)

    @property
    def share(self) -> float | None:
        """Share of the pixels with data that the mask keeps; None without a mask."""
        return self._reader.share


def _say(warnings: Iterable[str]) -> None:
    for warning in warnings:
        log.warning("%s", warning)


def say_oddities(name: str, oddities: Mapping[str, tuple[int, int, int]]) -> None:
    """Warn of what an image has that was taken as no-data; see `ImageSource.oddities`."""
    for what, (count, row, column) in oddities.items():
        values = "value is" if count == 1 else "values are"
        log.warning(
            "%s: %d %s %s, the first in row %d, column %d; taken as no-data", name, count, values, what, row, column
        )


def map_now(predictor: Mapper, source: ImageSource, options: MapOptions) -> np.ndarray:
    """float32 (H, W) of an open image, (H, W, layers) where there are several."""
    check_source(source)
    several = (len(predictor.layers),) if len(predictor.layers) > 1 else ()
    values = np.empty((source.grid.height, source.grid.width, *several), np.float32)

    def write(start: int, rows: np.ndarray) -> None:
        values[start : start + len(rows)] = rows

    with MapPixels(predictor, source, options, write, source.name) as pixels:
        pixels.finish()
    return values


def map_lazily(predictor: Mapper, source: arrays.ArraySource, options: MapOptions) -> Any:
    """A Dask array (H, W[, layers]): a task for each row of tiles, and one that blends neighbours for each row band."""
    _say(source.warnings)
    grid = source.grid
    predictor = predictor.on(grid, source.name)
    plan = predictor.plan(grid.height, grid.width)
    several = (len(predictor.layers),) if len(predictor.layers) > 1 else ()
    if plan is None:
        options = replace(options, allow_empty=True)

        def whole(first: int, rows: list[np.ndarray]) -> np.ndarray:
            with predictor.one_at_a_time:
                return map_now(predictor, source.with_rows(first, rows), options)

        only = arrays.delayed(whole)(*source.lazy_rows(0, grid.height))
        return arrays.lazy_bands([(only, grid.height)], (grid.width, *several))

    def predict_row(index: int, first: int, rows: list[np.ndarray]) -> TileRowPrediction:
        return _predict_row(predictor, plan, index, source.with_rows(first, rows), options)

    def blend(start: int, stop: int, indexes: Sequence[int], rows: Sequence[TileRowPrediction]) -> np.ndarray:
        predictions = dict(zip(indexes, rows, strict=True))
        how: Any = {"channels": predictor.channels, "finish": predictor.finish}
        return blend_band(plan, start, stop, predictions, nodata=predictor.bundle.nodata, **how)

    rows = [
        arrays.delayed(predict_row)(index, *source.lazy_rows(*plan.source_rows(index)))
        for index in range(len(plan.rows))
    ]
    parts = [
        (arrays.delayed(blend)(start, stop, indexes, [rows[index] for index in indexes]), stop - start)
        for start, stop, indexes in plan.bands()
    ]
    return arrays.lazy_bands(parts, (grid.width, *several))


def _predict_row(
    predictor: Mapper, plan: TilePlan, index: int, source: arrays.ArraySource, options: MapOptions
) -> TileRowPrediction:
    """One row of tiles of a lazy image, whose values are looked at here since no sample of the whole was."""

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, wanted = reader.read(start, stop)
        present = pixels[~no_data(pixels, source.fill)]
        source.check_units(present[:: max(len(present) // _SAMPLE, 1)], one_of_many=True)
        return pixels, wanted

    def forward(images: np.ndarray) -> np.ndarray:
        with predictor.one_at_a_time:
            return np.asarray(predictor.forward(images, source.fill))

    with ExitStack() as stack:
        reader = MapReader(source, options.open_mask(source.grid, stack))
        found = predict_tile_row(plan, index, read, forward, batch_size=predictor.batch_size)
    _say(source.warnings)
    say_oddities(source.name, source.oddities)
    return found
