"""Biomass from images: arrays, raster files, folders of them."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from typing import Any

import jax
import numpy as np

from biomass_jax import bundle as bundles
from biomass_jax.bundle import Bundle
from biomass_jax.data import bands as band_table
from biomass_jax.data.raster import encoding as encodings
from biomass_jax.data.raster import stac
from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.inputs import InputItem, find_inputs
from biomass_jax.data.raster.resample import MaskSource
from biomass_jax.errors import BiomassError, BundleError, PredictionError, RasterError
from biomass_jax.prediction import maps
from biomass_jax.prediction.forward import Forward, ModelFunction
from biomass_jax.prediction.maps import MapOptions, MapResult
from biomass_jax.prediction.reference_tiling import reference_0_99_plan, reference_1_2_plan
from biomass_jax.prediction.stream import Timings, check_finite, stream_map
from biomass_jax.prediction.tiling import TilePlan, check_settings, default_plan
from biomass_jax.runtime.progress import Progress, duration

log = logging.getLogger(__name__)

Failure = tuple[str, Exception]  # the input's name, what went wrong


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
        batch_sharding: where batches go; None is the default device.
        replicated: where the variables go; None is the default device.
        model_fn: another model: (variables, z-scored (B, H, W, bands)) -> (B, H, W). Maps made with one aren't told
            from those made with another: `overwrite` them.

    Raises:
        TilingError: contradicting tile settings.
        PredictionError: another setting is wrong, or the bundle holds no biomass model.
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
        batch_sharding: jax.sharding.Sharding | None = None,
        replicated: jax.sharding.Sharding | None = None,
        model_fn: ModelFunction | None = None,
    ) -> None:
        check_settings(tile, stride, margin, blend, tiling)
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise PredictionError(f"batch_size is {batch_size!r}; expected a whole number, 1 or more, or None")
        self.bundle = bundle
        self.tile = tile
        self.tiling = tiling
        self._geometry: dict[str, Any] = {"tile": tile, "stride": stride, "margin": margin, "blend": blend}
        self.settings = {**self._geometry, "tiling": tiling, "dtype": dtype, "matmul_precision": matmul_precision}
        self.forward = Forward(
            bundle,
            dtype=dtype,
            matmul_precision=matmul_precision,
            batch_sharding=batch_sharding,
            replicated=replicated,
            model_fn=model_fn,
        )
        self.batch_size = self.forward.batch_size(batch_size)

    @classmethod
    def open(cls, path: str | os.PathLike[str], **settings: Any) -> "Predictor":
        """A predictor from a bundle's folder that is ready at once: weights are read while the first image is opened.

        Args:
            path: the bundle.
            **settings: the constructor's.

        Raises:
            BundleError: no bundle there, or of another schema version; damaged weights show with the first image.
        """
        return cls(bundles.load(path, settings.get("replicated"), background=True), **settings)

    def warm_up(self) -> None:
        """Compile for batches of int16 tiles now, so that the first map takes no longer."""
        tiles = (self.batch_size, self.tile, self.tile, len(self.bundle.bands))
        self.forward(np.zeros(tiles, np.int16), None).block_until_ready()

    def predict_array(
        self, image: np.ndarray, mask_nodata: bool = True, *, encoding: str = encodings.AUTO
    ) -> np.ndarray:
        """Biomass of images in memory: one plain forward pass at their own size, never tiled.

        Args:
            image: (H, W, bands) or (B, H, W, bands) digital numbers in the order of `bundle.bands`.
            mask_nodata: put the bundle's no-data value (-1) where the image has none; else the model's raw values.
            encoding: what the numbers are, one of `encoding.ENCODINGS` but `from_file`.

        Returns:
            float32 (H, W) or (B, H, W), Mg/ha.

        Raises:
            PredictionError: another shape or kind of number, or numbers that can't be digital numbers.
        """
        image = np.asarray(image)
        count = len(self.bundle.bands)
        if image.ndim not in (3, 4) or image.shape[-1] != count or 0 in image.shape:
            raise PredictionError(
                f"image has shape {image.shape}; expected (H, W, {count}) or (B, H, W, {count}), bands last, in the "
                f"order {', '.join(self.bundle.bands)}"
            )
        batch = _as_digital_numbers(image if image.ndim == 4 else image[None], encoding, self.bundle)
        result = np.array(self.forward(batch, self.bundle.fill))
        if mask_nodata:
            result[band_table.no_data(batch, self.bundle.fill)] = self.bundle.nodata
        return result if image.ndim == 4 else result[0]

    def predict_file(self, src: str | os.PathLike[str], dst: str | os.PathLike[str] = ".", **options: Any) -> MapResult:
        """Map one raster file (or a folder of one HLS granule's files, a VRT, a URL).

        Args:
            src: the image.
            dst: the map's path if it ends in .tif, else the folder for `<stem>_agbd.tif`.
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
        return _OneMap(self, items[0], dst, MapOptions(**options)).finish()

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
        return make_maps(items, lambda item: _OneMap(self, item, dst, chosen).finish)

    @property
    def layer(self) -> str:
        """Name of the map's band."""
        return self.bundle.meta["output"]["bands"][0]

    @property
    def unit(self) -> str:
        """Its unit."""
        return self.bundle.meta["output"]["units"]

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


class _OneMap:
    """A map on its way: begun in one thread, finished in the same or another one.

    Beginning opens the image and starts its prediction, or finds that the map is finished. Small images are only
    handed to the device then; of large ones all tiles are predicted and written.
    """

    def __init__(self, predictor: Predictor, item: InputItem, dst: str | os.PathLike[str], options: MapOptions) -> None:
        """Begin; arguments and errors as for `Predictor.predict_file`."""
        self._began = time.perf_counter()
        self._predictor, self._item, self._options = predictor, item, options
        self._path = maps.map_path(dst, item.relative, predictor.layer)
        bundle = predictor.bundle
        sensors = tuple(bundle.meta["input"].get("sensors", ()))
        with ExitStack() as stack:
            self._source = stack.enter_context(
                open_image(
                    item,
                    band_list=options.bands,
                    wanted=bundle.bands,
                    model_sensors=sensors,
                    encoding=options.encoding,
                    pixel_size=bundle.pixel_size,
                    resample=options.resample,
                )
            )
            settings = {**predictor.settings, **options.settings()}
            tags = maps.map_tags(self._source, bundle, settings)
            self._kept = not options.overwrite and maps.is_finished(self._path, tags)
            if self._kept:
                log.info("%s: finished before, %s is kept", item.name, self._path)
            else:
                self._source.check_units()
                for warning in self._source.warnings:
                    log.warning("%s", warning)
                self._start(tags, stack)
            self._held = stack.pop_all()

    def _start(self, tags: dict[str, str], stack: ExitStack) -> None:
        """Predict; the stack closes what is opened."""
        predictor, grid = self._predictor, self._source.grid
        plan = predictor.plan(grid.height, grid.width)
        shape = (1, grid.height, grid.width) if plan is None else (predictor.batch_size, *(predictor.tile,) * 2)
        predictor.forward.prepare((*shape, len(predictor.bundle.bands)), self._source.dtype)
        mask = None
        if self._options.mask is not None:
            mask = stack.enter_context(MaskSource(self._options.mask, grid, self._options.mask_keep or ()))
        self._reader = maps.MapReader(self._source, mask)
        self._writer = stack.enter_context(
            MapWriter(
                self._path,
                grid,
                nodata=predictor.bundle.nodata,
                description=predictor.layer,
                unit=predictor.unit,
                tags=tags,
            )
        )
        self._chips = 1 if plan is None else plan.count
        self._timings = Timings() if plan is None else self._predict_tiles(plan)
        self._whole: jax.Array | None = None
        if plan is None:
            began = time.perf_counter()
            pixels, self._wanted = self._reader.read(0, grid.height)
            self._timings.read = time.perf_counter() - began
            self._whole = predictor.forward(pixels[None], self._source.fill)

    def _predict_tiles(self, plan: TilePlan) -> Timings:
        """Predict all tiles and write their rows."""
        with Progress(self._path.name, plan.count) if self._options.progress else nullcontext() as shown:
            return stream_map(
                plan,
                self._reader.read,
                lambda images: self._predictor.forward(images, self._source.fill),
                self._writer.write_rows,
                batch_size=self._predictor.batch_size,
                nodata=self._predictor.bundle.nodata,
                advance=shown.advance if shown else lambda chips: None,
            )

    def finish(self) -> MapResult:
        """Wait for the device where need be, write the file and what belongs beside it; to be called once."""
        with self._held:
            result = MapResult(self._item.name, self._path, "skipped") if self._kept else self._write()
            layer, unit = self._predictor.layer, self._predictor.unit
            maps.write_beside(self._source, self._path, self._options, layer, unit, missing_only=self._kept)
        return result

    def _write(self) -> MapResult:
        """Write what is left to write: of a whole image all rows, once the device is done."""
        # No progress is shown of a whole image: it is done before a bar could be read, and folders hold thousands.
        if self._whole is not None:
            began = time.perf_counter()
            values = np.array(self._whole)[0]
            self._timings.compute = time.perf_counter() - began
            check_finite(values, self._wanted)
            values[~self._wanted] = self._predictor.bundle.nodata
            self._writer.write_rows(0, values)
        self._reader.refuse_empty(self._options.allow_empty)
        stac.remove_item(self._path)  # of the map that this one replaces
        self._writer.close()
        for what, (count, row, column) in self._source.oddities.items():
            values = "value is" if count == 1 else "values are"
            log.warning(
                "%s: %d %s %s, the first in row %d, column %d; taken as no-data",
                self._item.name,
                count,
                values,
                what,
                row,
                column,
            )
        parts = {**vars(self._timings), **self._writer.seconds}
        seconds, share = time.perf_counter() - self._began, self._reader.share
        kept = "" if share is None else f", the mask keeps {share:.1%} of its data pixels"
        many = "" if self._chips == 1 else "s"
        log.info("%s: %d chip%s in %s%s", self._path, self._chips, many, duration(seconds), kept)
        return MapResult(self._source.name, self._path, "written", self._chips, seconds, parts, share)


def make_maps(
    items: Sequence[InputItem], begin: Callable[[InputItem], Callable[[], MapResult]]
) -> tuple[list[MapResult], list[Failure]]:
    """Make a map of each input.

    Args:
        items: the inputs.
        begin: starts a map in this thread; what it returns is called once, in another one, so that reading the next
            image and computing its map need not wait for the file of this one. At most two are on their way.

    Returns:
        The maps, and what failed; both in the order of the inputs.

    Raises:
        BundleError: damaged weights; no other image would fare better.
    """
    results: list[MapResult] = []
    failures: list[Failure] = []

    def finish(item: InputItem, begun: Future[Callable[[], MapResult]]) -> None:
        try:
            results.append(begun.result()())
        except BundleError:
            raise
        except Exception as error:
            why = maps.reason(item.name, error)
            log.error("%s: failed: %s", item.name, why, exc_info=not isinstance(error, BiomassError))
            failures.append((item.name, error))

    finishing: list[Future[None]] = []
    with ThreadPoolExecutor(1, "map finisher") as finisher:
        for item in items:
            begun: Future[Callable[[], MapResult]] = Future()
            try:
                begun.set_result(begin(item))
            except BundleError:
                raise
            except Exception as error:  # given back in its turn, so that failures keep the order of the inputs
                begun.set_exception(error)
            finishing.append(finisher.submit(finish, item, begun))
            wait(finishing[-2:-1])
    for finished in finishing:
        finished.result()
    return results, failures


def _as_digital_numbers(image: np.ndarray, encoding: str, bundle: Bundle) -> np.ndarray:
    """(B, H, W, bands) of any real type to int16 where that holds the kind of integer, else float32.

    One program serves each of the two types.
    """
    if image.dtype.kind not in "iuf":
        raise PredictionError(f"image has dtype {image.dtype}; expected digital numbers as integers or floats")
    missing = band_table.no_data(image, bundle.fill)
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
        image = np.where(missing[..., None], band_table.FILL, image * gain + shift)
    if image.dtype == np.int16 or (image.dtype.kind in "iu" and image.dtype.itemsize == 1):
        return image.astype(np.int16, copy=False)
    return image.astype(np.float32, copy=False)
