"""xarray's arrays as images, with all checks of a file, and maps as such arrays. xarray is imported on first use."""

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.windows import Window

from biomass_jax.data.raster.grid import Grid, raster_errors
from biomass_jax.data.raster.image import ImageSource, Reading
from biomass_jax.data.raster.inputs import InputItem, band_file
from biomass_jax.errors import RasterError

if TYPE_CHECKING:
    import dask.array
    import xarray

INSTALL = "xarray, rioxarray or dask is missing: pip install 'biomass-jax[xarray]'"
_ROWS, _COLUMNS = ("y", "lat", "latitude", "northing"), ("x", "lon", "longitude", "easting")
_DEGREES = {"lat", "latitude", "lon", "longitude"}
_TIMES = ("time", "date", "t")
_FILLS = ("_FillValue", "missing_value", "fill_value", "nodata", "nodatavals")
_IRREGULAR = 0.05  # of a pixel, by which a coordinate may differ from even steps


def is_array(value: object) -> bool:
    """Whether something is xarray's DataArray or Dataset."""
    return type(value).__module__.partition(".")[0] == "xarray" and hasattr(value, "dims")


class ArrayImages:
    """The images of a DataArray or a Dataset: one, or one for each time.

    Attributes:
        name: what messages call it.
        layers: one image's (rows, columns) DataArrays for each of its bands, northern row and western column first.
        lazy: whether Dask holds its pixels.
    """

    def __init__(self, data: "xarray.DataArray | xarray.Dataset") -> None:
        """Look at dimensions, coordinates and attributes; no pixel is read.

        Args:
            data: a DataArray of the dimensions band, y, x in any order, with or without a time, or a Dataset with a
                variable a band.

        Raises:
            RasterError: other dimensions, pixels that are no numbers, or coordinates without even steps.
        """
        try:
            import rioxarray  # noqa: F401  the accessor that reads CRSs
        except ImportError as error:
            raise RasterError(INSTALL) from error
        self.data = data
        self._dataset = not hasattr(data, "dtype")
        self.name = f"the {type(data).__name__}" + (f" {data.name!r}" if getattr(data, "name", None) else "")
        self._y, self._x = self._dimension(_ROWS), self._dimension(_COLUMNS)
        if 0 in data.sizes.values():
            raise RasterError(f"{self.name}: sizes {_listed(data.sizes.values())}; expected pixels")
        self.grid, self._flips = self._place()
        layers = self._dataset_layers() if self._dataset else self._array_layers()
        if odd := [layer for layer in layers if layer.dtype.kind not in "iufc"]:
            raise RasterError(f"{self.name}: its values are {odd[0].dtype}; expected numbers")
        self.layers = [layer.isel(self._flips).transpose(..., self._y, self._x) for layer in layers]
        self.lazy = any(layer.chunks is not None for layer in layers)
        times = {dim for layer in layers for dim in layer.dims} - {self._y, self._x}
        if len(times) > 1:
            raise self._other_dimensions()
        self.time = next(iter(times), None)

    def _dimension(self, names: Sequence[str]) -> Any:
        found = [dim for dim in self.data.dims if str(dim).casefold() in names]
        if len(found) != 1:
            raise RasterError(
                f"{self.name}: dimensions {_listed(self.data.dims)}; expected one of them to be called {names[0]} (or "
                f"{', '.join(names[1:])}): rename it"
            )
        return found[0]

    def _other_dimensions(self) -> RasterError:
        return RasterError(
            f"{self.name}: dimensions {_listed(self.data.dims)}; expected {self._y}, {self._x}, one for the bands and "
            "at most one for the time"
        )

    def _dataset_layers(self) -> list[Any]:
        found = [one for one in self.data.data_vars.values() if {self._y, self._x} <= set(one.dims)]
        layers = [one for one in found if one.dtype.kind in "iufc"]
        self._described = [_text(one.name) for one in layers]
        self._tags = [_texts(one.attrs) for one in layers]
        self._facts = [_facts(one, None, 0) for one in layers]
        return [_squeezed(one, {self._y, self._x}) for one in layers]

    def _array_layers(self) -> list[Any]:
        data = self.data
        others = [dim for dim in data.dims if dim not in (self._y, self._x)]
        times = [dim for dim in others if str(dim).casefold() in _TIMES or _is_time(data, dim)]
        bands = [dim for dim in others if dim not in times]
        longer = [dim for dim in bands if data.sizes[dim] > 1]
        bands = longer or bands[:1]
        if len(bands) != 1:
            raise self._other_dimensions()
        (band,) = bands
        count = data.sizes[band]
        names = data[band].values if band in data.coords else np.arange(count)
        along = {str(key): one.values for key, one in data.coords.items() if one.dims == (band,)}
        long_names = data.attrs.get("long_name")
        listed = long_names if isinstance(long_names, (tuple, list)) and len(long_names) == count else [None] * count
        texts = names.dtype.kind in "UOST" and not any(isinstance(one, (int, float)) for one in names)
        self._described = [_text(one) for one in (names if texts else listed)]
        own = [{key: str(values[index]) for key, values in along.items() if key != band} for index in range(count)]
        self._tags = [tags | ({"long_name": str(text)} if text else {}) for tags, text in zip(own, listed, strict=True)]
        self._facts = [_facts(data, count, index) for index in range(count)]
        keep = {self._y, self._x}
        return [_squeezed(data.isel({band: index}), keep) for index in range(count)]

    def _place(self) -> tuple[Grid, dict[Any, slice]]:
        """The grid with the north up, and which dimensions are turned for that."""
        data = self.data
        try:
            with raster_errors(self.name):
                crs = data.rio.crs
                if crs is None and "epsg" in data.coords and data.coords["epsg"].ndim == 0:
                    crs = CRS.from_epsg(int(data.coords["epsg"]))
                if crs is None and {str(self._y).casefold(), str(self._x).casefold()} <= _DEGREES:
                    crs = CRS.from_epsg(4326)
        except (ValueError, TypeError) as error:
            raise RasterError(f"{self.name}: its CRS can't be read: {error}") from error
        given = _geo_transform(data)
        if given is not None and (given.b or given.d):
            height, width = data.sizes[self._y], data.sizes[self._x]
            return Grid(height, width, crs, given), {}
        starts, steps, flips = [], [], {}
        own_steps = (None, None) if given is None else (given.a, given.e)
        for dim, sign, own in zip((self._x, self._y), (1, -1), own_steps, strict=True):
            start, step = self._steps(dim, own)
            if step * sign < 0 and dim in data.coords:
                flips[dim] = slice(None, None, -1)
                start, step = start + step * (data.sizes[dim] - 1), -step
            starts.append(start - step / 2)
            steps.append(step)
        if self._x not in data.coords or self._y not in data.coords:
            transform = given or Affine.identity()
        else:
            transform = Affine(steps[0], 0, starts[0], 0, steps[1], starts[1])
        return Grid(data.sizes[self._y], data.sizes[self._x], crs, transform), flips

    def _steps(self, dim: Hashable, given: float | None) -> tuple[float, float]:
        """The first centre and the step of a dimension's coordinate; 0.5 and 1 where it has none."""
        if dim not in self.data.coords:
            return 0.5, 1.0
        values = np.asarray(self.data[dim].values, np.float64)
        if len(values) == 1:
            if given is None:
                raise RasterError(f"{self.name}: a single pixel along {dim}, and nothing tells its size")
            return float(values[0]), float(given)
        step = (values[-1] - values[0]) / (len(values) - 1)
        even = values[0] + step * np.arange(len(values))
        if not (step and np.isfinite(values).all() and np.abs(values - even).max() <= _IRREGULAR * abs(step)):
            raise RasterError(f"{self.name}: the coordinate {dim} has no even steps; expected a regular grid of pixels")
        return float(values[0]), float(step)

    def at_times(self) -> list["ArrayImages"]:
        """One for each time, without that dimension; itself where there is none."""
        if self.time is None:
            return [self]
        found = []
        for index in range(self.data.sizes[self.time]):
            one = copy.copy(self)
            one.time = None
            one.name = f"{self.name}, {self.time} {index}"
            one.data = self.data.isel({self.time: index})
            one.layers = [layer.isel({self.time: index}) if self.time in layer.dims else layer for layer in self.layers]
            found.append(one)
        return found

    def source(self, **reading: Unpack[Reading]) -> "ArraySource":
        """The image as a source of rows; arguments and errors are those of `open_image`."""
        return ArraySource(_Dataset(self), self.name, **reading)

    def as_map(
        self, values: "np.ndarray | dask.array.Array", grid: Grid, name: str, attributes: Mapping[str, Any]
    ) -> "xarray.DataArray":
        """A map's values (rows, columns) on the grid, turned as the image lies, on its own coordinates."""
        same = grid.transform == self.grid.transform and (grid.height, grid.width) == (
            self.grid.height,
            self.grid.width,
        )
        result = as_array(values, grid, name, attributes, dims=(self._y, self._x))
        result = result.isel(self._flips)
        if same:
            place = {str(dim): self.data[dim] for dim in (self._y, self._x) if dim in self.data.coords}
            result = result.drop_vars([dim for dim in (self._y, self._x) if dim not in place]).assign_coords(place)
        kept = {key: one for key, one in self.data.coords.items() if one.ndim == 0 and key not in result.coords}
        return result.assign_coords({key: one for key, one in kept.items() if key not in ("band", "epsg")})


class _Dataset:
    """What `ImageSource` asks of an open file of rasterio's, of arrays in memory or of a backend that reads lazily."""

    colorinterp: tuple[()] = ()
    files: tuple[()] = ()

    def __init__(self, images: ArrayImages) -> None:
        self._layers = images.layers
        self._first_row = 0
        self._tags = _texts(images.data.attrs)
        self._band_tags = images._tags
        origin = str(images.data.encoding.get("source", ""))
        # A name of a single band's file stands for that file alone.
        self.name = origin if origin and band_file(PurePath(origin).name) is None else "array"
        self.descriptions = tuple(images._described)
        self.count = len(self._layers)
        self.indexes = tuple(range(1, self.count + 1))
        self.dtypes = tuple(layer.dtype.newbyteorder("=").name for layer in self._layers)
        self.nodatavals, self.scales, self.offsets = zip(*images._facts, strict=True)
        self.mask_flag_enums = ([MaskFlags.all_valid],) * self.count
        self.height, self.width = images.grid.height, images.grid.width
        self.crs, self.transform = images.grid.crs, images.grid.transform

    def tags(self, index: int | None = None) -> dict[str, str]:
        """Of the file, or of a band from 1."""
        return self._tags if index is None else self._band_tags[index - 1]

    def read(self, indexes: Sequence[int], *, window: Window, out_shape: tuple[int, ...]) -> np.ndarray:
        """(bands, rows, columns) of a window; no other size can be asked for."""
        rows, columns = (slice(int(a), int(b)) for a, b in window.toranges())
        rows = slice(rows.start - self._first_row, rows.stop - self._first_row)
        values = np.stack([np.asarray(self._layers[index - 1][rows, columns]) for index in indexes])
        assert values.shape == tuple(out_shape), (values.shape, out_shape)
        return values

    def lazy_rows(self, indexes: Sequence[int], start: int, stop: int) -> list[Any]:
        """(rows, columns) Dask arrays of some bands."""
        import dask.array

        return [dask.array.asarray(self._layers[index - 1][start:stop].data) for index in indexes]

    def with_rows(self, indexes: Sequence[int], start: int, rows: Sequence[np.ndarray]) -> "_Dataset":
        """The same image of which only those bands' rows from `start` on can be read."""
        held = copy.copy(self)
        held._first_row = start
        held._layers = [None] * self.count
        for index, values in zip(indexes, rows, strict=True):
            held._layers[index - 1] = values
        return held


class ArraySource(ImageSource):
    """An image in memory, or one whose rows are computed when they are wanted, read as a file is."""

    def __init__(self, dataset: _Dataset, name: str, **reading: Unpack[Reading]) -> None:
        """`reading` are the keyword arguments of `ImageSource`."""
        self._array = dataset
        super().__init__(InputItem(name, (dataset.name,), PurePath("array")), **reading)
        if dataset.name == "array":
            self.sources = (name,)

    def _open_file(self, path: str) -> Any:
        return self._array

    def lazy_rows(self, start: int, stop: int) -> tuple[int, list[Any]]:
        """What `with_rows` needs to read rows `start` to `stop`: the first stored row, and the bands' Dask arrays."""
        first, last = self._stored_rows(start, stop)
        return first, self._array.lazy_rows([index for _, index in self._bands], first, last)

    def with_rows(self, first: int, rows: Sequence[np.ndarray]) -> "ArraySource":
        """The same source over rows that have been computed; it reads those alone, in one thread."""
        held = copy.copy(self)
        indexes = [index for _, index in self._bands]
        dataset = self._array.with_rows(indexes, first, rows)
        held._bands = [(dataset, index) for index in indexes]
        held.oddities, held.warnings = {}, []
        return held


def as_array(
    values: "np.ndarray | dask.array.Array",
    grid: Grid,
    name: str,
    attributes: Mapping[str, Any],
    dims: tuple[Hashable, Hashable] = ("y", "x"),
) -> Any:
    """A DataArray of a map.

    Args:
        values: (rows, columns), NumPy's or Dask's.
        grid: its size and place.
        name: of the layer.
        attributes: what `to_raster` writes as tags, beside `_FillValue`.
        dims: names of the dimensions.

    Raises:
        RasterError: xarray or rioxarray is missing.
    """
    try:
        import rioxarray  # noqa: F401
        import xarray
    except ImportError as error:
        raise RasterError(INSTALL) from error
    t = grid.transform
    coords: dict[Hashable, Any] = {"band": name}
    if not (t.b or t.d):
        centres = t.f + t.e * (np.arange(grid.height) + 0.5), t.c + t.a * (np.arange(grid.width) + 0.5)
        coords |= {dim: (dim, places) for dim, places in zip(dims, centres, strict=True)}
    result = xarray.DataArray(values, dims=dims, coords=coords, name=name, attrs=dict(attributes))
    result = result.rio.set_spatial_dims(x_dim=dims[1], y_dim=dims[0])
    if grid.crs is not None:
        result = result.rio.write_crs(grid.crs)
    return result.rio.write_transform(grid.transform) if t.b or t.d else result


def as_dataset(layers: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    """A map's layers, DataArrays of `as_array` or `as_map`, as one Dataset."""
    import xarray

    return xarray.Dataset({name: one.drop_vars("band") for name, one in layers.items()}, attrs=dict(attributes))


def stacked(maps: Sequence[Any], images: ArrayImages) -> Any:
    """The maps of all times as one DataArray or Dataset, or the only one."""
    if images.time is None:
        return maps[0]
    import xarray

    along = images.data[images.time] if images.time in images.data.coords else images.time
    return xarray.concat(maps, dim=along, coords="minimal", compat="override", join="override")


def lazy_bands(parts: Sequence[tuple[Any, int]], row: tuple[int, ...]) -> Any:
    """One Dask array (rows, *row) float32 of row bands.

    Args:
        parts: (Dask's delayed values (rows, *row), number of rows), from north to south.
        row: (columns,) or (columns, layers).
    """
    import dask.array

    arrays = [dask.array.from_delayed(part, (rows, *row), np.float32) for part, rows in parts]
    return dask.array.concatenate(arrays, axis=0)


def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose calls are tasks of Dask: computed once each, when what they give is wanted."""
    import dask

    return dask.delayed(function, pure=False)


def _squeezed(layer: "xarray.DataArray", keep: set[Hashable]) -> "xarray.DataArray":
    return layer.squeeze([dim for dim in layer.dims if dim not in keep and layer.sizes[dim] == 1])


def _is_time(data: "xarray.DataArray", dim: Hashable) -> bool:
    return dim in data.coords and data[dim].dtype.kind == "M"


def _text(value: object) -> str | None:
    return str(value) if value is not None and str(value).strip() else None


def _texts(attributes: Mapping[Any, Any]) -> dict[str, str]:
    """Attributes as a file's tags: texts and numbers; a list of names as one text."""
    plain = {str(key): value for key, value in attributes.items() if isinstance(value, (str, int, float, np.number))}
    lists = {str(key): value for key, value in attributes.items() if isinstance(value, (tuple, list))}
    texts = {key: ", ".join(value) for key, value in lists.items() if all(isinstance(one, str) for one in value)}
    return {key: str(value) for key, value in plain.items()} | texts


def _facts(data: "xarray.DataArray", count: int | None, index: int) -> tuple[float | None, float, float]:
    """No-data value, scale and offset of a band of an array, whose attributes may hold one each."""

    def number(names: Sequence[str], default: float | None) -> float | None:
        for name in names:
            value = data.attrs.get(name)
            if isinstance(value, (tuple, list, np.ndarray)) and np.ndim(value) == 1 and len(value) in (1, count):
                value = value[index if len(value) == count else 0]
            try:
                return default if value is None else float(value)
            except (TypeError, ValueError):
                raise RasterError(
                    f"array {data.name!r}: its attribute {name} is {value!r}; expected a number"
                ) from None
        return default

    nodata = next((found for name in _FILLS if (found := number([name], None)) is not None), None)
    scale = next((found for name in ("scale_factor", "scales") if (found := number([name], None)) is not None), 1.0)
    offset = next((found for name in ("add_offset", "offsets") if (found := number([name], None)) is not None), 0.0)
    return nodata, scale, offset


def _geo_transform(data: "xarray.DataArray | xarray.Dataset") -> Affine | None:
    """The transform that rioxarray or GDAL noted in the coordinate of the CRS."""
    for one in data.coords.values():
        if one.ndim == 0 and "GeoTransform" in one.attrs:
            numbers = [float(part) for part in str(one.attrs["GeoTransform"]).split()]
            if len(numbers) == 6:
                return Affine.from_gdal(*numbers)
    return None


def _listed(dims: Iterable[object]) -> str:
    return f"({', '.join(map(str, dims))})"
