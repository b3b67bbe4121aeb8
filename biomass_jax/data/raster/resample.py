"""Rasters on other grids: means over larger pixels, classes and land-cover masks by nearest neighbour."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from rasterio import features
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from biomass_jax.data import bands
from biomass_jax.data.raster.grid import Grid, grid_of, open_quietly, raster_errors
from biomass_jax.data.raster.identity import identity_of
from biomass_jax.errors import RasterError

if TYPE_CHECKING:
    from shapely import Geometry

FINEST, COARSEST = 25 / 30, 36 / 30  # of the size that the model was trained on: taken as it is
_SNAP = 0.01  # 2.999 times is 3 times


def fits(size: tuple[float, float], wanted: float) -> bool:
    """Whether pixels of so many metres across and down are taken as they are by a model trained on `wanted` metres."""
    return all(FINEST <= one / wanted <= COARSEST for one in size)


def factors(grid: Grid, wanted: float, resample: float | None, name: str) -> tuple[float, float] | None:
    """How many pixels of an image, across and down, make one of the wanted size; None where they are left as they are.

    Args:
        grid: of the image.
        wanted: metres, of the pixels that the model was trained on.
        resample: metres, of the pixels that the image is to be brought to; None to refuse other sizes.
        name: of the image, for messages.

    Raises:
        RasterError: pixels of another size without `resample`, or coarser ones; a `resample` that the model isn't for.
    """
    if resample is not None and not FINEST <= resample / wanted <= COARSEST:
        raise RasterError(f"{name}: resample is {resample:g} m, but the model was trained on pixels of {wanted:g} m")
    size = grid.pixel_size()
    if size is None or fits(size, wanted):
        return None
    found = f"{name}: its pixels are {size[0]:.4g} x {size[1]:.4g} m on the ground"
    trained = f"the model was trained on {wanted:g} m"
    if max(size) > COARSEST * wanted:
        raise RasterError(f"{found}, but {trained}; coarser images can't be made finer, give one of {wanted:g} m")
    if resample is None:
        raise RasterError(
            f"{found}, but {trained}; resample={wanted:g} (config.resample) maps the means over pixels of that size"
        )
    across, down = (max(resample / one, 1.0) for one in size)
    near = [round(factor) if abs(factor / round(factor) - 1) < _SNAP else factor for factor in (across, down)]
    return float(near[0]), float(near[1])


def area_mean(image: np.ndarray, missing: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Means over the areas between edges, of the pixels with data.

    Args:
        image: (H, W, bands).
        missing: bool (H, W), pixels without data.
        rows: (h + 1,) increasing edges in pixels of `image`, 0 to H, fractions of pixels too.
        columns: (w + 1,) likewise, 0 to W.

    Returns:
        float32 (h, w, bands); -9999 where less than half of the area has data.
    """
    data = np.where(missing[..., None], 0, image).astype(np.float64)
    weighted = np.concatenate([data, ~missing[..., None]], axis=-1)
    for axis, edges in ((0, rows), (1, columns)):
        weighted = _between(weighted, axis, edges)
    area = np.diff(rows)[:, None] * np.diff(columns)
    share = weighted[..., -1]
    means = weighted[..., :-1] / np.maximum(share, 1e-9)[..., None]
    return np.where((share < 0.5 * area)[..., None], bands.FILL, means).astype(np.float32)


def _between(values: np.ndarray, axis: int, edges: np.ndarray) -> np.ndarray:
    """Integrals of a step function between edges along one axis."""
    values = np.moveaxis(values, axis, 0)
    integral = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    whole = np.minimum(edges.astype(int), len(values) - 1)
    part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
    return np.moveaxis(np.diff(integral[whole] + part * values[whole], axis=0), 0, axis)


class MaskSource(ExitStack[None]):
    """Which pixels of a map's grid belong to the kept classes of a land-cover raster; it closes as a stack does.

    The raster is warped to the grid by nearest neighbour while it is read; outside its extent nothing is kept.
    Longitudes of a raster in degrees may run from -180 to 180 or from 0 to 360.
    """

    def __init__(self, path: str | os.PathLike[str], grid: Grid, keep: Iterable[float]) -> None:
        """Open it.

        Args:
            path: a single-band raster of classes.
            grid: the map's grid.
            keep: classes to keep.

        Raises:
            RasterError: unreadable, several bands, no class to keep, its no-data value among those to keep, or no CRS
                (of the mask or the map) while the grids differ.
        """
        super().__init__()
        self.name = os.fspath(path)
        self.keep = tuple(sorted(set(keep)))
        self.grid = grid
        if not self.keep:
            raise RasterError(f"{self.name}: no class to keep; give the mask's classes (config.mask_keep)")
        try:
            with raster_errors(self.name):
                self._sources = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> list[Any]:
        """The raster on the map's grid, once for each turn around the globe at which it may meet the map."""
        dataset = self.enter_context(open_quietly(self.name))
        if dataset.count != 1:
            raise RasterError(f"{self.name}: {dataset.count} bands; a mask has one band of classes")
        if dataset.nodata is not None and dataset.nodata in self.keep:
            raise RasterError(f"{self.name}: class {dataset.nodata:g} is to be kept, but marks no-data in this mask")
        own = grid_of(dataset)
        if own.crs is None or self.grid.crs is None:
            if (own.height, own.width) != (self.grid.height, self.grid.width) or not own.transform.almost_equals(
                self.grid.transform, 1e-6
            ):
                raise RasterError(
                    f"{self.name}: {'the mask' if own.crs is None else 'the map'} has no CRS and the grids differ: the "
                    f"mask is {own.describe()}, the map {self.grid.describe()}; give the mask on the map's grid"
                )
            return [dataset]
        outside = next((value for value in range(256) if value not in self.keep and value != dataset.nodata), None)
        if outside is None:
            raise RasterError(f"{self.name}: {len(self.keep)} classes are to be kept, all there can be")
        return [
            self.enter_context(WarpedVRT(dataset, **options, init_dest_nodata=False, INIT_DEST=str(outside)))
            for options in _nearest(own, self.grid)
        ]

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """bool (rows, width), True where rows `start` to `stop` of the map are to be kept."""
        with raster_errors(f"{self.name}: reading rows {start} to {stop}"):
            window = Window(0, start, self.grid.width, stop - start)
            kept = [np.isin(source.read(1, window=window), self.keep) for source in self._sources]
        return np.logical_or.reduce(kept)


class NearestSource(ExitStack[None]):
    """A raster's band on a map's grid, by nearest neighbour, window by window; it closes as a stack does."""

    def __init__(self, path: str | os.PathLike[str], grid: Grid, band: int = 1) -> None:
        """Open it.

        Args:
            path: the raster.
            grid: the map's grid, with a CRS.
            band: which band of the raster, from 1.

        Raises:
            RasterError: unreadable, or without a CRS.
        """
        super().__init__()
        self.name, self._band = os.fspath(path), band
        try:
            with raster_errors(self.name):
                dataset = self.enter_context(open_quietly(self.name))
                own = grid_of(dataset)
                if own.crs is None:
                    raise RasterError(f"{self.name}: it has no CRS, so nothing tells where it lies")
                self._alpha = dataset.nodata is None
                self._sources = [
                    self.enter_context(WarpedVRT(dataset, **options, add_alpha=self._alpha))
                    for options in _nearest(own, grid)
                ]
        except BaseException:
            self.close()
            raise

    def read(self, row: int, column: int, height: int, width: int) -> np.ma.MaskedArray:
        """(height, width) of the map's pixels from a row and a column on, masked where the raster has no data."""
        with raster_errors(f"{self.name}: reading rows {row} to {row + height}"):
            found, *others = (self._read(one, Window(column, row, width, height)) for one in self._sources)
            for other in others:
                found = np.ma.where(np.ma.getmaskarray(found), other, found)
        return np.ma.masked_invalid(found, copy=False)

    def _read(self, source: WarpedVRT, window: Window) -> np.ma.MaskedArray:
        if not self._alpha:
            return source.read(self._band, window=window, masked=True)
        values, alpha = source.read([self._band, source.count], window=window)  # rasterio knows no alpha of floats
        return np.ma.array(values, mask=alpha == 0)


def mask_identity(path: str | os.PathLike[str]) -> str:
    """A digest of what a mask is read from; RasterError where it can't be opened."""
    name = os.fspath(path)
    with raster_errors(name), open_quietly(name) as dataset:
        return identity_of(dataset).files


def _nearest(own: Grid, grid: Grid) -> list[dict[str, Any]]:
    """How a raster is warped to a grid, once for each turn around the globe at which both may meet."""
    return [
        {
            "crs": grid.crs,
            "src_transform": _moved(own.transform, turn),
            "transform": grid.transform,
            "width": grid.width,
            "height": grid.height,
            "resampling": Resampling.nearest,
        }
        for turn in _turns(own, grid)
    ]


def _moved(t: Affine, east: float) -> Affine:
    return Affine(t.a, t.b, t.c + east, t.d, t.e, t.f)


def _turns(own: Grid, grid: Grid) -> list[float]:
    """By which longitudes a raster in degrees is moved so that it meets a map; [0] for one in metres."""
    if own.crs is None or not own.crs.is_geographic:
        return [0.0]
    west, east = sorted((own.transform.c, own.transform.c + own.transform.a * own.width))
    most = 360.0 if grid.crs is not None and grid.crs.is_geographic else 180.0  # PROJ gives -180 to 180
    return [turn for turn in (0.0, -360.0, 360.0) if west + turn < most and east + turn > -180] or [0.0]


def numbered(outlines: Sequence["Geometry"], grid: Grid, start: int, stop: int, margin: int) -> np.ndarray:
    """Which outline each pixel's centre lies in.

    Args:
        outlines: in the grid's CRS; of those that overlap the first counts.
        grid: of the pixels.
        start: the first row.
        stop: the row behind the last.
        margin: pixels more on every side, which may lie outside the grid.

    Returns:
        int16 (stop - start + 2 margin, W + 2 margin): number of the outline, counted from 1; 0 outside of all.
    """
    part = grid.rows(start, stop, margin)
    given = [(outline, number) for number, outline in enumerate(outlines, 1) if not outline.is_empty]
    if not given:
        return np.zeros((part.height, part.width), np.int16)
    size = part.height, part.width
    return features.rasterize(given[::-1], out_shape=size, transform=part.transform, dtype=np.int16)
