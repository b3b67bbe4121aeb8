"""Biomass from images: arrays, raster files, folders of them."""

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands as band_table
from biomass_jax.data import raster
from biomass_jax.errors import PredictionError
from biomass_jax.prediction import maps
from biomass_jax.prediction.forward import Forward, ModelFunction
from biomass_jax.prediction.maps import MapOptions, MapResult
from biomass_jax.prediction.opening import OpeningBundle
from biomass_jax.prediction.reference_tiling import reference_0_99_plan, reference_1_2_plan
from biomass_jax.prediction.several import Failure, Finish, make_maps
from biomass_jax.prediction.stream import Timings, check_finite, stream_map
from biomass_jax.prediction.tiling import Plan, check_settings, default_plan
from biomass_jax.runtime.progress import Progress, duration

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
        batch_sharding: where batches go; None is the default device.
        replicated: where the variables go; None is the default device.
        model_fn: another model: (variables, z-scored (B, H, W, bands)) -> (B, H, W).

    Raises:
        TilingError: contradicting tile settings.
        PredictionError: another setting is wrong, or the bundle holds no biomass model.
    """

    def __init__(
        self,
        bundle: Any,
        *,
        batch_size: int | None = None,
        tile: int = 224,
        stride: int = 192,
        margin: int = 8,
        blend: str = "cosine",
        tiling: str = "default",
        dtype: str = "float32",
        matmul_precision: str = "highest",
        batch_sharding: Any = None,
        replicated: Any = None,
        model_fn: ModelFunction | None = None,
    ) -> None:
        check_settings(tile, stride, margin, blend, tiling)
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise PredictionError(f"batch_size is {batch_size!r}; expected a whole number, 1 or more, or None")
        if model_fn is None and bundle.task != "biomass":
            raise PredictionError(f"{bundle.path}: a bundle of task {bundle.task!r}; maps need one of task 'biomass'")
        self.bundle = bundle
        self.tile = tile
        self.tiling = tiling
        self._geometry: dict[str, Any] = {"tile": tile, "stride": stride, "margin": margin, "blend": blend}
        self.settings = {**self._geometry, "tiling": tiling, "dtype": dtype, "matmul_precision": matmul_precision}
        self._forward = Forward(
            bundle,
            dtype=dtype,
            matmul_precision=matmul_precision,
            batch_sharding=batch_sharding,
            replicated=replicated,
            model_fn=model_fn,
        )
        if batch_size is None:
            batch_size = (4 if self._forward.platform == "cpu" else 32) * self._forward.devices
        self.batch_size = -(-batch_size // self._forward.devices) * self._forward.devices
        if self.batch_size != batch_size:
            log.info("batch_size %d becomes %d: %d devices", batch_size, self.batch_size, self._forward.devices)

    @classmethod
    def open(cls, path: str | os.PathLike[str], **settings: Any) -> "Predictor":
        """A predictor from a bundle's folder that is ready at once: weights are read while the first image is opened.

        Args:
            path: the bundle.
            **settings: the constructor's.

        Raises:
            BundleError: no bundle there, or of another schema version; damaged weights show with the first image.
        """
        return cls(OpeningBundle(path, settings.get("replicated")), **settings)

    def warm_up(self) -> None:
        """Read the weights and compile for batches of int16 tiles now, so that the first map takes no longer.

        Raises:
            BundleError: damaged weights.
        """
        self._forward.wait((self.batch_size, self.tile, self.tile, len(self.bundle.bands)), np.dtype(np.int16))

    def predict_array(self, image: np.ndarray, mask_nodata: bool = True) -> np.ndarray:
        """Biomass of images in memory: one plain forward pass at their own size, never tiled.

        Args:
            image: (H, W, bands) or (B, H, W, bands) digital numbers in the order of `bundle.bands`.
            mask_nodata: put the bundle's no-data value (-1) where the image has none; else the model's raw values.

        Returns:
            float32 (H, W) or (B, H, W), Mg/ha.

        Raises:
            PredictionError: another shape or kind of number.
        """
        image = np.asarray(image)
        count = len(self.bundle.bands)
        if image.ndim not in (3, 4) or image.shape[-1] != count or 0 in image.shape:
            raise PredictionError(
                f"image has shape {image.shape}; expected (H, W, {count}) or (B, H, W, {count}), bands last, in the "
                f"order {', '.join(self.bundle.bands)}"
            )
        batch = _as_digital_numbers(image if image.ndim == 4 else image[None])
        result = np.array(self._forward(batch, self.bundle.fill))
        if mask_nodata:
            result[band_table.no_data(batch, self.bundle.fill)] = self.bundle.nodata
        return result if image.ndim == 4 else result[0]

    def predict_file(self, src: str | os.PathLike[str], dst: str | os.PathLike[str] = ".", **options: Any) -> MapResult:
        """Map one raster file (or a folder of one HLS granule's files, a VRT, a URL).

        Args:
            src: the image.
            dst: the map's path if it ends in .tif, else the folder for `<stem>_agbd.tif`.
            **options: fields of `MapOptions`: bands, mask, mask_keep, overwrite, quicklook, progress.

        Raises:
            RasterError: the image, the mask or the output can't be read or written.
            TilingError: a published algorithm can't map a raster of this size.
            PredictionError: contradicting options, or the model gave no number where there is data.
        """
        items = raster.find_inputs(src)
        if len(items) != 1:
            raise PredictionError(f"{os.fspath(src)}: {len(items)} images; predict_file maps one, predict_dir many")
        return self._begin(items[0], maps.map_path(dst, items[0].relative, self._layer), MapOptions(**options))()

    def predict_dir(
        self, src: str | os.PathLike[str], dst: str | os.PathLike[str] = ".", **options: Any
    ) -> list[MapResult]:
        """Map every image of a folder, pattern or path; sub-folders are mirrored below `dst`.

        Arguments are those of `predict_file`. An image that fails doesn't stop the others.

        Raises:
            RasterError: no image there, or two that would get the same map.
            BundleError: damaged weights.
            PredictionError: some failed; the message is a table of which and why, `failures` lists them.
        """
        items = raster.find_inputs(src)
        results, failures = self.predict_items(items, dst, **options)
        if failures:
            raise PredictionError(maps.failure_table(failures, len(items)), failures=failures)
        return results

    def predict_items(
        self, items: Sequence[raster.InputItem], dst: str | os.PathLike[str], **options: Any
    ) -> tuple[list[MapResult], list[Failure]]:
        """Map some of the images that `raster.find_inputs` has found; an image that fails doesn't stop the others.

        Args:
            items: the images.
            dst: the folder for the maps, in which each has its item's relative path; a file's path for one image.
            **options: fields of `MapOptions`.

        Returns:
            The maps, and (input's name, error) of those that failed.

        Raises:
            BundleError: damaged weights.
            PredictionError: contradicting options, or one file for several maps.
        """
        chosen = MapOptions(**options)
        if len(items) > 1 and maps.is_tiff_path(dst):
            raise PredictionError(f"{os.fspath(dst)}: one file for {len(items)} maps; give a folder")
        return make_maps(items, lambda item: self._begin(item, maps.map_path(dst, item.relative, self._layer), chosen))

    @property
    def _layer(self) -> str:
        return self.bundle.meta["output"]["bands"][0]

    @property
    def _unit(self) -> str:
        return self.bundle.meta["output"]["units"]

    def _is_small(self, height: int, width: int) -> bool:
        return height <= self.tile and width <= self.tile

    def _begin(self, item: raster.InputItem, path: Path, options: MapOptions) -> Finish:
        """Start one map, or find that it is finished; what is left to do is in what is returned."""
        began = time.perf_counter()
        sensors = tuple(self.bundle.meta["input"].get("sensors", ()))
        with ExitStack() as stack:
            source = stack.enter_context(
                raster.open_image(item, band_list=options.bands, wanted=self.bundle.bands, model_sensors=sensors)
            )
            tags = maps.map_tags(source, self.bundle.weights_sha256, {**self.settings, **options.settings()})
            kept = not options.overwrite and maps.is_finished(path, tags)
            if kept:
                log.info("%s: finished before, %s is kept", item.name, path)
                make: Finish = functools.partial(MapResult, item.name, path, "skipped")
            else:
                source.check_units()
                for warning in source.warnings:
                    log.warning("%s", warning)
                make = self._begin_rows(source, path, tags, options, began, stack)
            held = stack.pop_all()

        def finish() -> MapResult:
            with held:
                result = make()
                picture = maps.quicklook_path(path)
                if options.quicklook and not (kept and picture.is_file()):
                    maps.write_quicklook(source, path, picture, self._layer, self._unit)
            return result

        return finish

    def _begin_rows(
        self,
        source: raster.ImageSource,
        path: Path,
        tags: dict[str, str],
        options: MapOptions,
        began: float,
        stack: ExitStack,
    ) -> Finish:
        """Start to predict an open image into a file; the stack closes what is opened."""
        grid = source.grid
        plan = None if self._is_small(grid.height, grid.width) else self._plan(grid.height, grid.width)
        chips = 1 if plan is None else plan.count
        batch = (1, grid.height, grid.width) if plan is None else (self.batch_size, self.tile, self.tile)
        self._forward.prepare((*batch, len(self.bundle.bands)), source.dtype)  # while the first rows are read
        reader = stack.enter_context(maps.MapReader(source, options))
        layer, unit = self._layer, self._unit
        writer = stack.enter_context(
            raster.MapWriter(path, grid, nodata=self.bundle.nodata, description=layer, unit=unit, tags=tags)
        )
        if plan is None:
            rows = self._predict_whole(source, reader, writer)
        else:
            rows = self._predict_tiles(source, plan, reader, writer, options.progress)

        def finish() -> MapResult:
            timings = rows()
            writer.close()
            parts = {**vars(timings), **{key: writer.seconds[key] for key in ("verify", "copy")}}
            result = MapResult(source.name, path, "written", chips, time.perf_counter() - began, parts, reader.share)
            share = "" if result.mask_share is None else f", the mask keeps {result.mask_share:.1%} of its data pixels"
            log.info("%s: %d chip%s in %s%s", path, chips, "" if chips == 1 else "s", duration(result.seconds), share)
            return result

        return finish

    def _predict_tiles(
        self, source: raster.ImageSource, plan: Plan, reader: maps.MapReader, writer: raster.MapWriter, progress: bool
    ) -> Callable[[], Timings]:
        """Predict all tiles and write their rows, here and now."""
        with Progress(writer.path.name, plan.count) if progress else nullcontext() as shown:
            timings = stream_map(
                plan,
                reader.read,
                lambda images: self._forward(images, source.fill),
                writer.write_rows,
                batch_size=self.batch_size,
                nodata=self.bundle.nodata,
                advance=shown.advance if shown else lambda chips: None,
            )
        return lambda: timings

    def _predict_whole(
        self, source: raster.ImageSource, reader: maps.MapReader, writer: raster.MapWriter
    ) -> Callable[[], Timings]:
        """Start to predict a small image; what is returned waits for the device and writes the rows.

        It shows no progress: it is done before a bar could be read, and folders hold thousands of them.
        """
        timings = Timings()
        marks = [time.perf_counter()]
        pixels, wanted = reader.read(0, source.grid.height)
        marks.append(time.perf_counter())
        future = self._forward(pixels[None], source.fill)

        def rows() -> Timings:
            values = np.array(future)[0]
            marks.append(time.perf_counter())
            check_finite(values, wanted)
            values[~wanted] = self.bundle.nodata
            writer.write_rows(0, values)
            marks.append(time.perf_counter())
            timings.read, timings.compute, timings.write = (float(s) for s in np.diff(marks))
            return timings

        return rows

    def _plan(self, height: int, width: int) -> Plan:
        if self.tiling == "default":
            return default_plan(height, width, **self._geometry)
        tile, stride = ((self._geometry[key],) * 2 for key in ("tile", "stride"))
        if self.tiling == "reference_0_99":
            return reference_0_99_plan(height, width, tile=tile, stride=stride)
        margin, blend = self._geometry["margin"], self._geometry["blend"]
        return reference_1_2_plan(height, width, tile=tile, stride=stride, margin=margin, blend=blend)


def _as_digital_numbers(image: np.ndarray) -> np.ndarray:
    """int16 where the kind of integer fits in it, else float32: one program serves each."""
    if image.dtype == np.int16:
        return image
    if np.issubdtype(image.dtype, np.integer):
        return image.astype(np.int16 if image.dtype.itemsize == 1 else np.float32)
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float32, copy=False)
    raise PredictionError(f"image has dtype {image.dtype}; expected digital numbers as integers or floats")
