"""Images in: the wanted bands of a file, URL or granule as row bands of digital numbers."""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import PurePath
from typing import Any, TypedDict

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from biomass_jax.data import band_names, bands
from biomass_jax.data.fingerprints import digest_of
from biomass_jax.data.raster import encoding as encodings
from biomass_jax.data.raster import resample as resampling
from biomass_jax.data.raster.grid import Grid, grid_of, open_quietly, raster_errors
from biomass_jax.data.raster.identity import identity_of
from biomass_jax.data.raster.inputs import BandFile, InputItem, band_file, find_inputs, granule_name, season_of
from biomass_jax.data.raster.tiff import is_tiff, verify_blocks
from biomass_jax.errors import BandError, RasterError

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 512  # flat windows: cheap in strip files too
_SAMPLE_GRIDS = (6, 24)  # windows along each axis, the second where the first met too few valid pixels
_said_unverified: set[str] = set()  # "the sensor cannot be verified" is said once a process for each kind


class Reading(TypedDict, total=False):
    """Keyword arguments of `open_image`."""

    band_list: object
    fill: float | None
    wanted: Sequence[str]
    model_sensors: Sequence[str]
    encoding: str
    pixel_size: float | None
    resample: float | None


class ImageSource(ExitStack[None]):
    """An open image: six (or the wanted) bands on one grid. It closes as a stack does; one thread at a time may read.

    Attributes:
        name: what messages call it.
        grid: size and place; of what is read, where the file is resampled.
        bands: the bands read, in order.
        fill: the value that marks no-data besides those of `bands.no_data`, or None.
        stored: type of each band in its file.
        dtype: int16 where every band is stored as int16 and not converted, else float32.
        tags: the file's tags (of a granule: of its first band).
        sensor: `L30`, `S30`, `L30+S30`, or None where nothing tells.
        season: `YYYY-MM-DD/YYYY-MM-DD` from a SEASON tag or the granule's date, or "".
        sources: names of the files read.
        far: whether any of them is on a server.
        warnings: sentences for the user.
        oddities: {what: (pixels, row, column of the first one)} of what `read_rows` took for no-data besides no-data.
    """

    def __init__(
        self,
        item: InputItem,
        *,
        band_list: object = None,
        fill: float | None = None,
        wanted: Sequence[str] = bands.BAND_NAMES,
        model_sensors: Sequence[str] = ("L30",),
        encoding: str = encodings.AUTO,
        pixel_size: float | None = None,
        resample: float | None = None,
    ) -> None:
        super().__init__()
        self.name = item.name
        self.bands = tuple(wanted)
        self.far = any(path.startswith("/vsi") and not path.startswith("/vsimem/") for path in item.paths)
        self.warnings: list[str] = []
        self.oddities: dict[str, tuple[int, int, int]] = {}
        self._bands: list[tuple[Any, int]] = []  # (dataset, band index) of each wanted band
        self._said: list[tuple[float, float] | None] = []  # scale and offset that a STAC item tells of each of them
        try:
            with raster_errors(self.name):
                self._open(item, bands.parse_band_list(band_list))
            self._set_encoding(encoding)
            self._set_fill(fill)
        except BandError as error:
            self.close()
            message = str(error)
            raise RasterError(message if self.name in message else f"{self.name}: {message}") from error
        except BaseException:
            self.close()
            raise
        first = self._bands[0][0]
        self._native, self._factors = grid_of(first), None
        if pixel_size is not None:
            try:
                self._factors = resampling.factors(self._native, pixel_size, resample, self.name)
            except BaseException:
                self.close()
                raise
        self.grid = self._native.coarser(*self._factors) if self._factors else self._native
        exact = self._conversion is None and self._factors is None and set(self.stored) == {"int16"}
        self.dtype = np.dtype("int16" if exact else "float32")
        self.fill = self._stored_fill if self._factors is None else float(bands.FILL)
        self.tags: dict[str, str] = dict(first.tags())
        self.sources = tuple(dict.fromkeys(_base_name(dataset.name) for dataset, _ in self._bands))
        self.season = _tag(self.tags, "SEASON") or item.season or _season_in_name(_base_name(item.paths[0]))
        if self.grid.crs is None:
            self.warnings.append(f"{self.name}: no CRS; its map has none either")
        trained = set(model_sensors)
        if self.sensor is not None and trained and not set(self.sensor.split("+")) <= trained:
            self.warnings.append(
                f"{self.name}: {self.sensor}, but the model was trained on {'+'.join(sorted(trained))} alone"
            )

    def _open(self, item: InputItem, requested: tuple[str | None, ...] | None) -> None:
        """Open the files and find the wanted bands in them."""
        file = band_file(_base_name(item.paths[0]))
        if item.layers or (file is not None and (file.known or len(item.paths) > 1)):
            chosen, requested = self._choose_files(item, file, requested)
            paths = [item.paths[place] for place in chosen]
            found = [(self._open_file(path), 1) for path in paths]
            self._check_same_grid([dataset for dataset, _ in found])
            descriptions: list[str | None] = [item.layers[i] if item.layers else _layer(item.paths[i]) for i in chosen]
            self._said = [item.scales[i] for i in chosen if item.scales]
            tagged = [band_names.tagged([d.tags(1)], d.tags())[0] or d.descriptions[0] for d, _ in found]
            named = item.sensor if file is None or item.layers else file.sensor
        else:
            dataset = self._open_file(item.paths[0])
            found = [(dataset, index) for index in dataset.indexes]
            descriptions = list(dataset.descriptions)
            tagged = band_names.tagged([dataset.tags(index) for index in dataset.indexes], dataset.tags(), self.name)
            named = band_names.sensor_in(_base_name(item.paths[0]))
        sensor = _claimed_sensor(found[0][0], named, self.name)
        selection = bands.resolve(
            descriptions, requested, sensor=sensor, long_names=tagged, path=self.name, wanted=self.bands
        )
        self._bands = [found[index - 1] for index in selection.indexes]
        self.sensor = selection.sensor
        if selection.unverified not in _said_unverified:
            self.warnings.extend(selection.warnings)
        if selection.unverified is not None:
            _said_unverified.add(selection.unverified)

    def _choose_files(
        self, item: InputItem, file: BandFile | None, requested: tuple[str | None, ...] | None
    ) -> tuple[list[int], tuple[str | None, ...] | None]:
        """Which files hold the wanted bands, so that the others stay closed, and the list that names their bands."""
        if requested is not None and (item.layers or (file is not None and file.known)):
            what = "a STAC item's assets" if item.layers else "a granule's single-band files"
            raise BandError(f"{self.name}: {what} tell their bands by name; leave the band list out")
        layers = item.layers or [_layer(path) for path in item.paths]
        sensor = item.sensor if file is None or item.layers else file.sensor
        selection = bands.resolve(layers, requested, sensor=sensor, path=self.name, wanted=self.bands)
        return [index - 1 for index in selection.indexes], None if requested is None else self.bands

    def _open_file(self, path: str) -> Any:
        far = path.startswith("/vsi")
        # GDAL would list a far folder to look for side files
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR") if far else nullcontext():
            dataset = self.enter_context(open_quietly(path))
        for file in dataset.files:  # of a VRT, those it refers to as well
            if is_tiff(file):
                verify_blocks(file, sparse_ok=True)
        if dataset.count == 0:
            raise RasterError(f"{self.name}: no raster bands in it; name one of its sub-datasets")
        return dataset

    def _check_same_grid(self, datasets: Sequence[Any]) -> None:
        first = grid_of(datasets[0])
        for dataset in datasets[1:]:
            if dataset.count != 1 + (ColorInterp.alpha in dataset.colorinterp):
                raise RasterError(f"{self.name}: {_base_name(dataset.name)} has {dataset.count} bands, expected 1")
            other = grid_of(dataset)
            if not first.same_as(other):
                raise RasterError(
                    f"{self.name}: its files lie on different grids: {_base_name(datasets[0].name)} is "
                    f"{first.describe()}, {_base_name(dataset.name)} is {other.describe()}"
                )

    def _set_encoding(self, encoding: str) -> None:
        self._encoding = encoding
        self.stored = [dataset.dtypes[index - 1] for dataset, index in self._bands]
        if odd := [kind for kind in self.stored if "complex" in kind]:
            raise RasterError(f"{self.name}: its values are {odd[0]}; expected real numbers, {bands.UNITS}")
        said = self._said or [None] * len(self._bands)
        self._declared = [encodings.declared(*band) or other for band, other in zip(self._bands, said, strict=True)]
        told = dict(zip(self.bands, self._declared, strict=True))
        self._conversion = encodings.conversion(encoding, told, self.name)
        self._masked = [MaskFlags.per_dataset in dataset.mask_flag_enums[i - 1] for dataset, i in self._bands]

    def _set_fill(self, fill: float | None) -> None:
        """One fill for all bands: given, else their common tag; -9999 where tags differ or numbers are converted."""
        self._tagged = [dataset.nodatavals[index - 1] for dataset, index in self._bands]
        own = [None if value is None or np.isnan(value) else float(value) for value in self._tagged]
        own = own if fill is None else [float(fill)] * len(own)
        alike = len(set(own)) == 1 and self._conversion is None
        self._own_fills = [None] * len(own) if alike else own
        self._stored_fill = own[0] if alike else float(bands.FILL)

    def reading(self) -> dict[str, Any]:
        """What a map depends on beside the stored numbers, side-cars included: no-data, masks, scales, bands, place."""
        tagged = [None if value is None else str(value) for value in self._tagged]
        alpha = [ColorInterp.alpha in dataset.colorinterp for dataset, _ in self._bands]
        found = {"nodata": tagged, "masked": self._masked, "alpha": alpha, "scale_offset": self._declared}
        found |= {"bands": [index for _, index in self._bands], "sensor": self.sensor, "season": self.season}
        crs = None if self._native.crs is None else self._native.crs.to_string()
        return found | {"crs": crs, "transform": list(self._native.transform)[:6]}

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (not included).

        Returns:
            (rows, width, bands) int16 or float32 digital numbers: as stored, or converted as `encoding` says. -9999
            where a mask or an alpha band of the file hides a pixel, where a value is infinite, or where it is what
            -9999 becomes in an unsigned type.

        Raises:
            RasterError: the file can't be read there (truncated, unreachable).
        """
        window = Window(0, start, self.grid.width, stop - start)
        return self._read(window, (stop - start, self.grid.width), count=True)

    def read_window(self, window: Window, shape: tuple[int, int] | None = None, *, count: bool = False) -> np.ndarray:
        """A window as `read_rows` reads rows, at another size where a `shape` (rows, columns) is given.

        With `count` its oddities are counted.
        """
        return self._read(window, shape or (int(window.height), int(window.width)), count=count)

    def _read(self, window: Window, shape: tuple[int, int], *, count: bool) -> np.ndarray:
        if self._factors is None:
            return self._read_native(window, shape, count=count)
        across, down = self._factors
        if shape != (window.height, window.width):  # a preview needs no exact means
            inside = Window(window.col_off * across, window.row_off * down, window.width * across, window.height * down)
            return self._read_native(inside, shape, count=count)
        rows = (window.row_off + np.arange(window.height + 1)) * down
        columns = (window.col_off + np.arange(window.width + 1)) * across
        top, bottom = self._stored_rows(window.row_off, window.row_off + window.height)
        left, right = int(columns[0]), min(math.ceil(columns[-1]), self._native.width)
        inside = Window(left, top, right - left, bottom - top)
        image = self._read_native(inside, (bottom - top, right - left), count=count)
        edges = np.minimum(rows - top, bottom - top), np.minimum(columns - left, right - left)
        return resampling.area_mean(image, bands.no_data(image, self._stored_fill), *edges)

    def _stored_rows(self, start: float, stop: float) -> tuple[int, int]:
        """The stored rows that rows `start` to `stop` are made from."""
        down = 1 if self._factors is None else self._factors[1]
        return int(start * down), min(math.ceil(stop * down), self._native.height)

    def _read_native(self, window: Window, shape: tuple[int, int], *, count: bool) -> np.ndarray:
        out = np.empty((*shape, len(self._bands)), self.dtype)
        where = f"{self.name}: reading rows {int(window.row_off)} to {int(window.row_off + window.height)}"
        datasets = list(dict.fromkeys(dataset for dataset, _ in self._bands))
        for dataset in datasets:  # one call for all bands of a file: pixel-interleaved blocks are decoded once
            places = [k for k, (owner, _) in enumerate(self._bands) if owner is dataset]
            region = {"window": window, "out_shape": (len(places), *shape)}
            indexes = [self._bands[k][1] for k in places]
            with raster_errors(where):
                values = dataset.read(indexes, **region)
                hidden = hidden_pixels(dataset, indexes, region)
            for number, (k, band) in enumerate(zip(places, values, strict=True)):
                with np.errstate(over="ignore"):  # to infinity, which is no-data
                    out[..., k] = band
                if self._own_fills[k] is not None:
                    out[..., k][band == self._own_fills[k]] = bands.FILL
                if hidden is not None:
                    out[..., k][hidden[number]] = bands.FILL
                if odd := bands.odd_values(band, self.stored[k], self._tagged[k]):
                    out[..., k][odd[0]] = bands.FILL
                    if count:
                        bands.count_odd(self.oddities, *odd, int(window.row_off), int(window.col_off))
        if self._conversion is not None:
            missing = bands.no_data(out, self._stored_fill)
            gain, shift = self._conversion
            out = (out * gain + shift).astype(np.float32)
            out[missing] = bands.FILL
        return out

    def read_preview(self, max_size: int) -> np.ndarray:
        """The image at reduced size, from overviews where it has them.

        Returns:
            (rows, columns, bands) float32 digital numbers, the longer side at most `max_size`, NaN for no-data.
        """
        window = Window(0, 0, self.grid.width, self.grid.height)
        image = self.read_window(window, _preview_shape(self.grid, max_size))
        missing = bands.no_data(image, self.fill)
        preview = image.astype(np.float32)
        preview[missing] = np.nan
        return preview

    def identity(self) -> dict[str, Any]:
        """`{'size', 'mtime_ns', 'files'}` of the files: sum, latest, digest of each one's; a VRT's sources count too.

        What lies beside the files and changes how they are read counts into `files`. For a URL the size is that of the
        blocks its header tells of, the time 0, and `files` a digest of where each block lies and of one block's pixels.
        """
        with raster_errors(self.name):
            parts = [identity_of(dataset) for dataset in dict.fromkeys(dataset for dataset, _ in self._bands)]
        size, latest = sum(part.size for part in parts), max(part.mtime_ns for part in parts)
        return {"size": size, "mtime_ns": latest, "files": digest_of([part.files for part in parts])}

    def check_units(self, values: np.ndarray | None = None, *, one_of_many: bool = False) -> str | None:
        """Look by a sample spread over the image whether its values can be digital numbers; see `check_plausible`.

        Args:
            values: (pixels, bands) with data, another sample.
            one_of_many: see `check_plausible`.

        Returns:
            a warning, which is added to `warnings` too, or None.

        Raises:
            RasterError: they can't.
        """
        if self._encoding != encodings.AUTO:
            return None
        values = self.sample() if values is None else values
        warning = encodings.check_plausible(values, self.stored[0], self.name, one_of_many=one_of_many)
        if warning is not None:
            self.warnings.append(warning)
        return warning

    def sample(self) -> np.ndarray:
        """(pixels, bands) valid values of windows spread evenly over the image."""
        values = np.empty((0, len(self._bands)), self.dtype)
        for count in _SAMPLE_GRIDS:
            parts = []
            for row in _spread(self.grid.height, _SAMPLE_ROWS, count):
                for column in _spread(self.grid.width, _SAMPLE_COLUMNS, count):
                    rows = min(_SAMPLE_ROWS, self.grid.height - row)
                    columns = min(_SAMPLE_COLUMNS, self.grid.width - column)
                    image = self.read_window(Window(column, row, columns, rows))
                    parts.append(image[~bands.no_data(image, self.fill)])
            values = np.concatenate(parts)
            if len(values) >= encodings.ENOUGH_PIXELS:
                break
        return values


def is_masked(dataset: rasterio.DatasetReader, index: int) -> bool:
    """Whether a band (from 1) of an open dataset has a mask, internal or beside it, or an alpha band."""
    return MaskFlags.per_dataset in dataset.mask_flag_enums[index - 1] or ColorInterp.alpha in dataset.colorinterp


def hidden_pixels(dataset: rasterio.DatasetReader, indexes: Sequence[int], region: dict[str, Any]) -> np.ndarray | None:
    """bool (bands, rows, columns) of what a mask or an alpha band hides, or None where the file has neither.

    GDAL takes an alpha band for a mask in files of 2 or 4 bands only.

    Args:
        dataset: an open rasterio dataset.
        indexes: of the bands, from 1.
        region: `window`, and `out_shape` (bands, rows, columns) where another size is wanted.
    """
    masked = any(MaskFlags.per_dataset in dataset.mask_flag_enums[index - 1] for index in indexes)
    hidden = dataset.read_masks(indexes, **region) == 0 if masked else None
    if ColorInterp.alpha in dataset.colorinterp:
        alpha = [dataset.colorinterp.index(ColorInterp.alpha) + 1] * len(indexes)
        unseen = dataset.read(alpha, **region) == 0
        hidden = unseen if hidden is None else hidden | unseen
    return hidden


def open_image(
    item: InputItem | str | os.PathLike[str],
    *,
    band_list: object = None,
    fill: float | None = None,
    wanted: Sequence[str] = bands.BAND_NAMES,
    model_sensors: Sequence[str] = ("L30",),
    encoding: str = encodings.AUTO,
    pixel_size: float | None = None,
    resample: float | None = None,
) -> ImageSource:
    """Open an image.

    Args:
        item: from `find_inputs`, or a path that stands for one image.
        band_list: names of the file's bands where its descriptions don't tell; see `bands.parse_band_list`.
        fill: no-data value of the file; its own tag where None.
        wanted: bands to read, in this order.
        model_sensors: sensors that the model was trained on.
        encoding: what the numbers are, one of `encoding.ENCODINGS`.
        pixel_size: metres, of the images that the model was trained on; None to take any.
        resample: metres, of the pixels that a finer image is brought to; see `resample.factors`.

    Raises:
        RasterError: unreadable or truncated, wrong bands, a scale that isn't that of digital numbers, pixels of another
            size, files of a granule on different grids.
    """
    return ImageSource(
        _one_item(item),
        band_list=band_list,
        fill=fill,
        wanted=wanted,
        model_sensors=model_sensors,
        encoding=encoding,
        pixel_size=pixel_size,
        resample=resample,
    )


def read_tags(path: str | os.PathLike[str]) -> dict[str, str]:
    """The tags of a raster. RasterError where it can't be opened."""
    with raster_errors(os.fspath(path)), open_quietly(os.fspath(path)) as dataset:
        return dict(dataset.tags())


def read_preview(
    source: InputItem | str | os.PathLike[str],
    max_size: int,
    *,
    band_list: object = None,
    fill: float | None = None,
    wanted: Sequence[str] | None = None,
    number: int = 1,
) -> np.ndarray:
    """A raster at reduced size for a picture, NaN for no-data.

    Args:
        source: a map's path, or an image as for `open_image`.
        max_size: most pixels along the longer side.
        band_list: as for `open_image`.
        fill: as for `open_image`.
        wanted: None for a map: one band; else the bands of an image.
        number: of a map's band, from 1.

    Returns:
        float32, (rows, columns) of a map or (rows, columns, bands) of an image.
    """
    if wanted is not None:
        with open_image(source, band_list=band_list, fill=fill) as image:  # all six: the no-data rule needs them
            return image.read_preview(max_size)[..., [bands.BAND_NAMES.index(name) for name in wanted]]
    path = source.paths[0] if isinstance(source, InputItem) else os.fspath(source)
    with raster_errors(path), open_quietly(path) as dataset:
        values = dataset.read(number, out_shape=_preview_shape(grid_of(dataset), max_size)).astype(np.float32)
        if dataset.nodata is not None:
            values[values == np.float32(dataset.nodata)] = np.nan
        return values


def _one_item(item: InputItem | str | os.PathLike[str]) -> InputItem:
    if isinstance(item, InputItem):
        return item
    items = find_inputs(item)
    if len(items) != 1:
        raise RasterError(f"{os.fspath(item)}: stands for {len(items)} images, expected one")
    return items[0]


def _layer(path: str) -> str | None:
    """What the name of a single-band file calls its band."""
    return getattr(band_file(_base_name(path)), "layer", None)


def _season_in_name(name: str) -> str:
    granule, file = granule_name(name), band_file(name)
    return season_of(granule.date) if granule else file.season if file else ""


def _claimed_sensor(dataset: rasterio.DatasetReader, named: str | None, name: str) -> str | None:
    """The sensor that the file's name or a tag tells; RasterError where they disagree."""
    tags = dataset.tags()
    tagged = [bands.sensor_of(_tag(tags, key)) for key in ("SENSORS", "SENSOR", "SPACECRAFT_NAME", "SPACECRAFT_ID")]
    by_tag = next(filter(None, tagged), None)
    if named is not None and by_tag not in (None, named):
        raise RasterError(f"{name}: its name says {named}, its sensor tag {by_tag}; correct the one that is wrong")
    return named or by_tag


def _tag(tags: dict[str, str], key: str) -> str:
    return next((str(value) for name, value in tags.items() if name.casefold() == key.casefold()), "")


def _base_name(path: str) -> str:
    return PurePath(path.split("?", 1)[0] if path.startswith("/vsicurl") else path).name


def _preview_shape(grid: Grid, max_size: int) -> tuple[int, int]:
    factor = min(1.0, max_size / max(grid.height, grid.width))
    return max(1, round(grid.height * factor)), max(1, round(grid.width * factor))


def _spread(length: int, window: int, count: int) -> list[int]:
    """Starts of at most `count` windows spread evenly over a length, overlapping nowhere; all of it where short."""
    if length <= window * count:
        return list(range(0, length, window))
    return [int(start) for start in np.linspace(0, length - window, count)]
