"""Adapters by polygon: each pixel of a map by the adapter of its biome, and without a seam where biomes meet."""

import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from biomass_jax import bundle as bundles
from biomass_jax.adapter import check_base
from biomass_jax.bundle import Bundle
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import Reading
from biomass_jax.data.raster.resample import numbered
from biomass_jax.data.vectors import outlines_on, read_zones
from biomass_jax.errors import PredictionError
from biomass_jax.prediction.forward import Forward
from biomass_jax.prediction.pixels import ImageModel, MapOptions, Mapper
from biomass_jax.prediction.tiling import TilePlan
from biomass_jax.runtime.files import sha256_of

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger(__name__)

_STRIP = 1024  # rows that are looked at together
# Of bundle.json: what is mixed has to be the same.
_ALIKE = (("input", "bands"), ("input", "pixel_size"), ("output", "units"), ("output", "nodata"))


def blend_weights_of(regions: np.ndarray, count: int, width: float, margin: int) -> np.ndarray:
    """How much each region counts at each pixel.

    d is the distance of a pixel's centre to the region's border, in pixels, negative outside of it: the region counts
    0.5 + d / width, from 0 to 1. So the weights of two regions along a straight border add up to 1; where more meet
    they are divided by their sum.

    Args:
        regions: int (h + 2 margin, w + 2 margin), the number of each pixel's region.
        count: of regions.
        width: of the ramp from one region to the other, pixels; below 1 there is none.
        margin: pixels on every side that only tell where borders are, width / 2 + 1 or more.

    Returns:
        float64 (count, h, w), which add up to 1.
    """
    inner = (slice(margin, regions.shape[0] - margin), slice(margin, regions.shape[1] - margin))
    weights = np.zeros((count, *regions[inner].shape))
    for number in range(count):
        inside = regions == number
        if inside.all() or width < 1 or not inside.any():
            weights[number] = inside[inner]
            continue
        # From centre to centre of the nearest pixel across the border, which lies half a pixel nearer.
        distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
        signed = (distance - 0.5 * np.sign(distance))[inner]
        weights[number] = np.clip(0.5 + signed / width, 0, 1)
    return weights / weights.sum(axis=0)


class Adapters:
    """Adapters of one base, each for some polygons.

    Args:
        base: the model of all other ground, of which every adapter is one.
        polygons: their file.
        field: the column that names the adapter's folder, itself or from the file's folder on; none = the base.
        width: pixels over which one model passes into the other, half of them on each side of the border.
        **options: of every `Forward`.

    Raises:
        RegionalError: polygons that can't be read.
        PredictionError: no such column, a width below 0, or an adapter with another output than the base's.
        BundleError: what is named is no adapter of this base.
    """

    def __init__(
        self, base: Bundle, polygons: str | os.PathLike[str], *, field: str, width: float, **options: object
    ) -> None:
        if not 0 <= width < math.inf:
            raise PredictionError(f"the width of borders is {width} pixels; expected 0 or more")
        self._frame = read_zones(Path(polygons))
        if field not in self._frame.columns:
            found = ", ".join(self._frame.columns)
            raise PredictionError(f"{polygons}: found columns {found}; expected {field}, which names adapters")
        named = [None if value is None or value != value else str(value).strip() for value in self._frame[field]]
        self._names = sorted({name for name in named if name})
        self._of_row = [self._names.index(name) + 1 if name else 0 for name in named]
        self._base, self._width = base, width
        self._options: dict[str, Any] = options
        self._paths = [Path(polygons).parent / name for name in self._names]
        metas = [bundles.read_meta(path) for path in self._paths]
        for path, meta in zip(self._paths, metas, strict=True):
            check_base(path, meta, base.path, base.weights_sha256)
            _check_alike(path, meta, base)
        weights = {name: meta["weights_sha256"] for name, meta in zip(self._names, metas, strict=True)}
        self.settings = {"polygons": sha256_of(polygons), "field": field, "width": width, "weights": weights}
        self._opened: dict[int, Forward] = {}

    def mapper(self, whole: Mapper, base: Forward, grid: Grid, name: str) -> "MixedMapper":
        """What maps an image: the models whose places it touches, and no other.

        Args:
            whole: the mapper of all images.
            base: the base's model.
            grid: of the image.
            name: of the image, for messages.

        Raises:
            PredictionError: the image has no CRS.
            BundleError: an adapter's arrays are damaged.
        """
        if grid.crs is None:
            raise PredictionError(f"{name}: it has no CRS, so nothing tells which polygons of adapters it lies in")
        places = AdaptersOnGrid(grid, self._outlines(grid, grid.crs.to_wkt()), self._of_row, self._width)
        models = [self._model(number) if number else base for number in places.numbers]
        told = ", ".join(self._names[number - 1] if number else "the base" for number in places.numbers)
        log.info("%s: mapped by %s", name, told)
        return MixedMapper(whole, models, places)

    def _model(self, number: int) -> Forward:
        """An adapter by its number, from 1 on, which shares the base's weights; opened when it is first asked for."""
        if number not in self._opened:
            adapter = bundles.load_adapter(self._paths[number - 1], self._base)
            self._opened[number] = Forward(adapter, **self._options)
        return self._opened[number]

    def _outlines(self, grid: Grid, crs: str) -> list["Geometry"]:
        return outlines_on(self._frame, crs, grid.rows(0, grid.height, _margin(self._width)).bounds())


def _check_alike(path: Path, meta: dict[str, Any], base: Bundle) -> None:
    for group, field in _ALIKE:
        found, expected = (one[group].get(field) for one in (meta, base.meta))
        if found != expected and not (field == "pixel_size" and None in (found, expected)):
            raise PredictionError(
                f"{path}: its {group}'s {field} is {found}, the base's {expected}; maps of both can't be mixed"
            )


def _margin(width: float) -> int:
    return math.ceil(width / 2) + 1


class AdaptersOnGrid:
    """How much each model counts at each pixel of a map.

    Attributes:
        numbers: of the models that count anywhere: 0 the base, adapters from 1 on.
    """

    def __init__(self, grid: Grid, outlines: Sequence["Geometry"], of_outline: Sequence[int], width: float) -> None:
        self._grid, self._outlines, self._width = grid, outlines, width
        self._of_number = np.asarray([0, *of_outline], np.int16)  # by number of the outline, 0 = outside of all
        starts = range(0, grid.height, _STRIP)
        found = [np.unique(self._regions(start, min(start + _STRIP, grid.height))) for start in starts]
        self.numbers: list[int] = np.unique(np.concatenate(found)).tolist()

    def _regions(self, start: int, stop: int) -> np.ndarray:
        return self._of_number[numbered(self._outlines, self._grid, start, stop, _margin(self._width))]

    def mix(self, values: np.ndarray, start: int) -> np.ndarray:
        """Each pixel by the models of its place: float32 (rows, W, models), from row `start` on -> (rows, W)."""
        regions = np.searchsorted(self.numbers, self._regions(start, start + len(values)))
        weights = blend_weights_of(regions, len(self.numbers), self._width, _margin(self._width))
        return (np.moveaxis(values, -1, 0) * weights).sum(axis=0).astype(np.float32)


class SideBySide:
    """Several models as one, see `pixels.ImageModel`: what each gives of an image, on a last axis."""

    def __init__(self, parts: Sequence[Forward]) -> None:
        self._parts = parts

    def prepare(self, shape: tuple[int, ...], dtype: np.dtype) -> list[Future[jax.stages.Compiled]]:
        """Compile all."""
        return [part.prepare(shape, dtype) for part in self._parts]

    def __call__(self, images: np.ndarray, fill: float | None) -> jax.Array:
        """(B, H, W, bands) digital numbers -> float32 (B, H, W, models), still being computed."""
        return jnp.stack([part(images, fill) for part in self._parts], axis=-1)


class MixedMapper:
    """A `pixels.Mapper` of one image, each of whose pixels several models share."""

    def __init__(self, whole: Mapper, models: Sequence[Forward], places: AdaptersOnGrid) -> None:
        self.bundle, self.tile, self.batch_size = whole.bundle, whole.tile, whole.batch_size
        self.settings, self.one_at_a_time = whole.settings, whole.one_at_a_time
        self._whole, self._places, self._count = whole, places, len(models)
        self.forward: ImageModel = models[0] if len(models) == 1 else SideBySide(models)

    @property
    def layers(self) -> dict[str, str]:
        """See `Mapper`."""
        return self._whole.layers

    @property
    def channels(self) -> tuple[int, ...]:
        """See `Mapper`: the models."""
        return (self._count,) if self._count > 1 else ()

    def on(self, grid: Grid, name: str) -> Mapper:
        """See `Mapper`: this one, made for the whole of the image."""
        del grid, name
        return self

    def tags(self) -> dict[str, str]:
        """See `Mapper`."""
        return self._whole.tags()

    def finish(self, values: np.ndarray, start: int) -> np.ndarray:
        """See `Mapper`."""
        return self._places.mix(values, start) if self._count > 1 else values

    def plan(self, height: int, width: int) -> TilePlan | None:
        """See `Mapper`."""
        return self._whole.plan(height, width)

    def reading(self, options: MapOptions) -> Reading:
        """See `Mapper`."""
        return self._whole.reading(options)
