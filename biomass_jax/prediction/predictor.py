"""Biomass from images: arrays, raster files, folders of them."""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from biomass_jax import bundle as bundles
from biomass_jax.bundle import Bundle
from biomass_jax.data import bands as band_table
from biomass_jax.data.raster import arrays
from biomass_jax.data.raster import encoding as encodings
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import Reading, open_image
from biomass_jax.data.raster.inputs import InputItem, StacItem, find_inputs, is_stac_item, stac_input
from biomass_jax.errors import PredictionError, RasterError
from biomass_jax.prediction import maps
from biomass_jax.prediction.adapters import Adapters
from biomass_jax.prediction.forward import Forward
from biomass_jax.prediction.layers import AUTO, KEEP, Layers
from biomass_jax.prediction.maps import Failure, MapResult
from biomass_jax.prediction.pixels import MapOptions, Mapper, map_lazily, map_now, say_oddities
from biomass_jax.prediction.reference_tiling import reference_0_99_plan, reference_1_2_plan
from biomass_jax.prediction.stream import check_finite
from biomass_jax.prediction.tiling import TilePlan, check_settings, default_plan
from biomass_jax.uncertainty.spread import ModelFunction

if TYPE_CHECKING:
    import dask.array
    import xarray

log = logging.getLogger(__name__)


class Predictor:
    """Predicts with one model on all devices it was given.

    Args:
        bundle: a model (`biomass_jax.bundle.load`).
        batch_size: tiles a forward pass, over all devices; rounded up to a multiple of their number. None: 4 a device
            on CPU, where larger batches gain nothing and pad the last one with more; 32 a device elsewhere.
        tile: side of a tile in pixels; rasters no larger are predicted whole.
        stride: pixels from one tile to the next.
        margin: outer pixels of each tile that are not used (`reference_0_99` has its own).
        blend: `cosine` ramps over the overlap of tiles, or `none`: their plain mean.
        tiling: `default`, or `reference_0_99`, `reference_1_2`: the published algorithms.
        dtype: `float32` or `bfloat16` inside the model.
        matmul_precision: `default`, `high` or `highest`, for float32.
        attention: `auto`, `einsum` or `fused`, see models/fused/choice.py.
        batch_sharding: where batches go; None is the default device.
        replicated: where the variables go; None is the default device.
        model_fn: another model: (variables, z-scored (B, H, W, bands)) -> (B, H, W). Maps made with one aren't told
            from those made with another: `overwrite` them.
        uncertainty: how the map says how sure it is: `auto`, as the bundle was calibrated, else as its model does by
            itself, else not at all; or one of `uncertainty.spread.WAYS`.
        samples: for `dropout` and `drop_path`; None for those of the calibration, else 10.
        di: give the dissimilarity to the training chips; None where the bundle has an area of applicability.
        biome: of all pixels, for the calibration's intervals of that biome; "" for those of all.
        outside: the area of applicability, where `di` is above its threshold: `keep` what is there, or `nodata`.
        adapters: a file of polygons that name adapters of the bundle: each pixel by the adapter of its polygon, by the
            bundle itself outside of all. Such maps are of the estimate alone.
        adapter_field: their column that does so, as folders from the file's own on.
        adapter_blend: pixels over which one model passes into the other at a border.

    Raises:
        TilingError: contradicting tile settings.
        PredictionError: another setting is wrong, or the bundle holds no biomass model.
        ConfigError: `attention` is `fused` where it can't be.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        batch_size: int | None = None,
        tile: int = 224,
        stride: int = 192,
        margin: int = 8,
        blend: str = "cosine",
        tiling: str = "default",
        dtype: str = "float32",
        matmul_precision: str = "highest",
        attention: str = "auto",
        batch_sharding: jax.sharding.Sharding | None = None,
        replicated: jax.sharding.Sharding | None = None,
        model_fn: ModelFunction | None = None,
        uncertainty: str = AUTO,
        samples: int | None = None,
        di: bool | None = None,
        biome: str = "",
        outside: str = KEEP,
        adapters: str | os.PathLike[str] | None = None,
        adapter_field: str = "adapter",
        adapter_blend: float = 16.0,
    ) -> None:
        check_settings(tile, stride, margin, blend, tiling)
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise PredictionError(f"batch_size is {batch_size!r}; expected a whole number, 1 or more, or None")
        self.bundle = bundle
        self.tile = tile
        self.tiling = tiling
        self._geometry: dict[str, Any] = {"tile": tile, "stride": stride, "margin": margin, "blend": blend}
        if model_fn is not None and uncertainty == AUTO:
            uncertainty = "none"
        self._layers = Layers(bundle, uncertainty=uncertainty, samples=samples, di=di, biome=biome, outside=outside)
        self.settings = {**self._geometry, "tiling": tiling, "dtype": dtype, "matmul_precision": matmul_precision}
        self.settings |= self._layers.settings()
        how: dict[str, Any] = {
            "dtype": dtype,
            "matmul_precision": matmul_precision,
            "attention": attention,
            "batch_sharding": batch_sharding,
            "replicated": replicated,
        }
        given: dict[str, Any] = {"model_fn": model_fn, "spread": self._layers.spread, "di": self._layers.di}
        self.forward = Forward(bundle, **how, **given)
        self._adapters: Adapters | None = None
        if adapters:
            _check_estimate_alone(bundle, self.forward)
            self._adapters = Adapters(bundle, adapters, field=adapter_field, width=adapter_blend, **how)
            self.settings["adapters"] = self._adapters.settings
        self.batch_size = self.forward.batch_size(batch_size)
        self.one_at_a_time = threading.Lock()  # of Dask's threads, which would each hold a batch on the device

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, **settings: Any
    ) -> "Predictor":
        """A predictor from a bundle's folder that is ready at once: weights are read while the first image is opened.

        Args:
            path: the bundle.
            base: folder of its base, where it is an adapter and its base doesn't lie where it did.
            **settings: the constructor's.

        Raises:
            BundleError: no bundle there, of another schema version, or without its base; damaged weights show with the
                first image.
        """
        return cls(bundles.load(path, settings.get("replicated"), background=True, base=base), **settings)

    def _repr_html_(self) -> str:
        """What notebooks show: the bundle, and how images are tiled."""
        told = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"{self.bundle._repr_html_()}<p>{escape(told)}, batch_size {self.batch_size}</p>"

    def __reduce__(self) -> tuple[object, ...]:
        raise PredictionError("a predictor stays in its process: compute lazy maps with scheduler='threads'")

    def warm_up(self) -> None:
        """Compile for batches of int16 tiles now, so that the first map takes no longer."""
        tiles = (self.batch_size, self.tile, self.tile, len(self.bundle.bands))
        self.forward(np.zeros(tiles, np.int16), None).block_until_ready()

    def predict_array(
        self, image: np.ndarray, mask_nodata: bool = True, *, encoding: str = encodings.AUTO
    ) -> np.ndarray:
        """Biomass of images in memory: one plain forward pass at their own size, never tiled.

        Args:
            image: (H, W, bands) or (B, H, W, bands) digital numbers in the order of `bundle.bands`. Infinite values,
                and what -9999 becomes in an unsigned type, are no-data as in a file; a warning counts them.
            mask_nodata: put the bundle's no-data value (-1) where the image has none; else the model's raw values.
            encoding: what the numbers are, one of `encoding.ENCODINGS` but `from_file`.

        Returns:
            float32 (H, W) or (B, H, W) in the label's unit; a last axis has the layers where there are several (see
            `layers`).

        Raises:
            PredictionError: another shape or kind of number, numbers that can't be digital numbers, or the model gave
                no number where there is data.
        """
        if self._adapters is not None:
            raise PredictionError("an array has no place, so nothing tells which polygons of adapters it lies in")
        image = np.asarray(image)
        count = len(self.bundle.bands)
        if image.ndim not in (3, 4) or image.shape[-1] != count or 0 in image.shape:
            raise PredictionError(
                f"image has shape {image.shape}; expected (H, W, {count}) or (B, H, W, {count}), bands last, in the "
                f"order {', '.join(self.bundle.bands)}"
            )
        batch = _as_digital_numbers(image.reshape(-1, *image.shape[-3:]), encoding, self.bundle)
        result = np.array(self.forward(batch, self.bundle.fill))
        missing = band_table.no_data(batch, self.bundle.fill)
        for values, gone in zip(result, missing, strict=True):
            check_finite(values, ~gone)
        result = self.finish(result, 0)
        if mask_nodata:
            result[missing] = self.bundle.nodata
        return result if image.ndim == 4 else result[0]

    def predict_file(self, src: str | os.PathLike[str], dst: str | os.PathLike[str] = ".", **options: Any) -> MapResult:
        """Map one raster file (or a folder of one HLS granule's files, a VRT, a URL).

        Args:
            src: the image.
            dst: the map's path if it ends in .tif, else the folder for `<stem>_agbd.tif` (the label's name).
            **options: fields of `MapOptions`: bands, encoding, resample, mask, mask_keep, allow_empty, overwrite,
                quicklook, style, stac, progress.

        Raises:
            RasterError: the image, the mask or the output can't be read or written.
            TilingError: a published algorithm can't map a raster of this size.
            PredictionError: contradicting options, the model gave no number where there is data, or (nearly) no pixel
                gets a value.
        """
        items = find_inputs(src)
        if len(items) != 1:
            raise PredictionError(f"{os.fspath(src)}: {len(items)} images; predict_file maps one, predict_dir many")
        return maps.OneMap(self, items[0], dst, MapOptions(**options)).finish()

    def predict_dir(
        self, src: str | os.PathLike[str], dst: str | os.PathLike[str] = ".", **options: object
    ) -> list[MapResult]:
        """Map every image of a folder, pattern or path; sub-folders are mirrored below `dst`.

        Arguments are those of `predict_file`. An image that fails doesn't stop the others.

        Raises:
            RasterError: no image there, or two that would get the same map.
            PredictionError: some failed; the message is a table of which and why, `failures` lists them.
        """
        items = find_inputs(src)
        results, failures = self.predict_items(items, dst, **options)
        if failures:
            raise PredictionError(maps.failure_table(failures, len(items)), failures=failures)
        return results

    def predict_items(
        self, items: Sequence[InputItem], dst: str | os.PathLike[str], **options: Any
    ) -> tuple[list[MapResult], list[Failure]]:
        """Map some of the images that `find_inputs` has found; an image that fails doesn't stop the others.

        Args:
            items: the images.
            dst: the folder for the maps, in which each has its item's relative path; a file's path for one image.
            **options: fields of `MapOptions`.

        Returns:
            The maps, and (input's name, error) of those that failed.

        Raises:
            PredictionError: contradicting options, or one file for several maps.
        """
        chosen = MapOptions(**options)
        if len(items) > 1 and maps.is_tiff_path(dst):
            raise PredictionError(f"{os.fspath(dst)}: one file for {len(items)} maps; give a folder")
        return maps.make_maps(items, lambda item: maps.OneMap(self, item, dst, chosen).finish)

    def predict(
        self,
        image: "xarray.DataArray | xarray.Dataset | str | os.PathLike[str] | Mapping[str, object] | StacItem",
        *,
        bands: object = None,
        encoding: str = encodings.AUTO,
        resample: float | None = None,
        mask: str | os.PathLike[str] | None = None,
        mask_keep: Sequence[int] | None = None,
        allow_empty: bool = False,
        progress: bool = False,
    ) -> "xarray.DataArray | xarray.Dataset":
        """Map an image of any size as an xarray DataArray, with the pixels that `predict_file` writes.

        A map of several layers is a Dataset with a variable each.

        Args:
            image: a DataArray of the dimensions band, y, x in any order, with or without a time; a Dataset with a
                variable a band; a path or URL; a STAC item of pystac, or its dictionary. What Dask holds is mapped
                when it is computed, and only as much of it as is computed.
            bands: as in `MapOptions`, and so the arguments below; of a lazy image `allow_empty` has no meaning.
            encoding: what the numbers are.
            resample: metres, of the pixels that finer images are brought to.
            mask: a raster of classes on any grid.
            mask_keep: the classes to keep.
            allow_empty: give maps (nearly) without a value.
            progress: show a bar on a terminal or in a notebook; a lazy image has Dask's own.

        Returns:
            DataArray of float32 (y, x), or (time, y, x), in the label's unit, with the image's CRS and coordinates; no
            data is the attribute `_FillValue`. Other attributes are the tags of a map's file. Of a Dataset they are its
            own.

        Raises:
            RasterError: as `predict_file`, an array that doesn't tell where its pixels or bands are, or xarray missing.
            PredictionError: as `predict_file`, or another kind of image.
        """
        options = MapOptions(bands, encoding, resample, mask, mask_keep, allow_empty, progress=progress)
        if arrays.is_array(image):
            images = arrays.ArrayImages(image)
            return arrays.stacked([self._map_array(one, options) for one in images.at_times()], images)
        if isinstance(image, (str, os.PathLike)):
            items = find_inputs(image)
            if len(items) != 1:
                raise PredictionError(f"{os.fspath(image)}: {len(items)} images; predict maps one, predict_dir many")
        elif is_stac_item(image):
            items = [stac_input(image)]
        else:
            raise PredictionError(
                f"the image is a {type(image).__name__}; expected a DataArray, a Dataset, a path or a STAC item "
                "(predict_array takes NumPy's arrays)"
            )
        with open_image(items[0], **self.reading(options)) as source:
            tags = maps.map_tags(source, self.bundle, {**self.settings, **options.settings()}) | self.tags()
            values = map_now(self, source, options)
            return self._as_xarray(values, tags, lambda *named: arrays.as_array(named[0], source.grid, *named[1:]))

    def reading(self, options: MapOptions) -> Reading:
        """Keyword arguments of `open_image` for this model's images."""
        return {
            "band_list": options.bands,
            "wanted": self.bundle.bands,
            "model_sensors": tuple(self.bundle.meta["input"].get("sensors", ())),
            "encoding": options.encoding,
            "pixel_size": self.bundle.pixel_size,
            "resample": options.resample,
        }

    def _as_xarray(
        self, values: "np.ndarray | dask.array.Array", tags: Mapping[str, str], make: Callable[..., Any]
    ) -> Any:
        """A map's values (H, W[, layers]); `make` takes those of one layer, its name and its attributes."""
        fill = float(self.bundle.nodata)
        about = {
            name: {"long_name": maps.layer_title(name), "units": unit, "_FillValue": fill}
            for name, unit in self.layers.items()
        }
        if len(about) == 1:
            ((name, attributes),) = about.items()
            return make(values, name, {**attributes, **tags})
        parts = {name: make(values[..., number], name, one) for number, (name, one) in enumerate(about.items())}
        return arrays.as_dataset(parts, tags)

    def _map_array(self, images: arrays.ArrayImages, options: MapOptions) -> Any:
        source = images.source(**self.reading(options))
        tags = maps.origin_tags(source, self.bundle, {**self.settings, **options.settings()}) | self.tags()
        values = (map_lazily if images.lazy else map_now)(self, source, options)
        return self._as_xarray(values, tags, lambda *named: images.as_map(named[0], source.grid, *named[1:]))

    @property
    def layers(self) -> dict[str, str]:
        """Name and unit of each of the map's bands, in order."""
        return self._layers.named(self.forward.channels)

    @property
    def layer(self) -> str:
        """Name of the map's first band, the estimate."""
        return next(iter(self.layers))

    @property
    def unit(self) -> str:
        """Its unit."""
        return self.layers[self.layer]

    @property
    def channels(self) -> tuple[int, ...]:
        """(): the model gives one value a pixel; or how many."""
        return (len(self.forward.channels),) if len(self.forward.channels) > 1 else ()

    def on(self, grid: Grid, name: str) -> Mapper:
        """What maps an image on a grid: this, or what mixes the adapters of its places; `name` is the image's.

        Raises:
            PredictionError, BundleError: see `Adapters`.
        """
        return self if self._adapters is None else self._adapters.mapper(self, self.forward, grid, name)

    def finish(self, values: np.ndarray, start: int) -> np.ndarray:
        """What the model gave as what the map has: float32 (..., W[, channels]) -> (..., W[, layers])."""
        del start  # all rows alike
        return self._layers.finish(values, self.forward.channels)

    def tags(self) -> dict[str, str]:
        """What a map's file says of its layers, beside where it comes from."""
        return self._layers.tags()

    def plan(self, height: int, width: int) -> TilePlan | None:
        """Tiles of a raster of so many pixels, in order; None where it is predicted whole."""
        if height <= self.tile and width <= self.tile:
            return None
        if self.tiling == "default":
            return default_plan(height, width, **self._geometry)
        tile, stride = ((self._geometry[key],) * 2 for key in ("tile", "stride"))
        if self.tiling == "reference_0_99":
            return reference_0_99_plan(height, width, tile=tile, stride=stride)
        margin, blend = self._geometry["margin"], self._geometry["blend"]
        return reference_1_2_plan(height, width, tile=tile, stride=stride, margin=margin, blend=blend)


def _check_estimate_alone(bundle: Bundle, forward: Forward) -> None:
    """PredictionError where a map would say how sure it is: intervals of one model are no other's."""
    if len(forward.channels) > 1:
        raise PredictionError(
            f"{bundle.path}: adapters by polygon give the estimate alone, and its maps have "
            f"{', '.join(forward.channels)}: intervals and dissimilarities of one model are no other's; add "
            "uncertainty='none' and di=False"
        )


def _as_digital_numbers(image: np.ndarray, encoding: str, bundle: Bundle) -> np.ndarray:
    """(B, H, W, bands) of any real type to int16 where that holds the kind of integer, else float32.

    One program serves each of the two types.
    """
    if image.dtype.kind not in "iuf":
        raise PredictionError(f"image has dtype {image.dtype}; expected digital numbers as integers or floats")
    if image.dtype.kind == "f":
        with np.errstate(over="ignore"):  # to infinity, which is no-data
            image = image.astype(np.float32, copy=False)
    missing = band_table.no_data(image, bundle.fill)
    for index, one in enumerate(image):
        oddities: dict[str, tuple[int, int, int]] = {}
        for band in np.moveaxis(one, -1, 0):
            if odd := band_table.odd_values(band, image.dtype.name):
                band_table.count_odd(oddities, *odd)
        say_oddities("image" if len(image) == 1 else f"image {index} of {len(image)}", oddities)
    try:
        converted = encodings.conversion(encoding, dict.fromkeys(bundle.bands), "image")
        if encoding == encodings.AUTO:
            # A few thousand pixels tell; the step shares no factor with common widths.
            sample = image[~missing]
            encodings.check_plausible(sample[:: max(len(sample) // 5000, 1)], image.dtype.name, "image")
    except RasterError as error:
        raise PredictionError(str(error)) from error
    if converted is not None:
        gain, shift = converted
        image = image * gain + shift
    elif image.dtype == np.int16 or (image.dtype.kind in "iu" and image.dtype.itemsize == 1):
        return image.astype(np.int16, copy=False)
    return np.where(missing[..., None], np.float32(band_table.FILL), image.astype(np.float32, copy=False))
