"""A land-cover raster as a mask on a map's grid."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from biomass_jax.data.raster.grid import Grid, grid_of, open_quietly, raster_errors
from biomass_jax.errors import RasterError


class MaskSource:
    """Which pixels of a map's grid belong to the kept classes of a land-cover raster; a context manager.

    The raster is warped to the grid by nearest neighbour while it is read; outside its extent nothing is kept.
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
        self.name = os.fspath(path)
        self.keep = tuple(sorted(set(keep)))
        self.grid = grid
        if not self.keep:
            raise RasterError(f"{self.name}: no class to keep; give the mask's classes (config.mask_keep)")
        self._stack = ExitStack()
        try:
            with raster_errors(self.name):
                self._source = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        dataset = self._stack.enter_context(open_quietly(self.name))
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
            return dataset
        outside = next((value for value in range(256) if value not in self.keep and value != dataset.nodata), None)
        if outside is None:
            raise RasterError(f"{self.name}: {len(self.keep)} classes are to be kept, all there can be")
        return self._stack.enter_context(
            WarpedVRT(
                dataset,
                crs=self.grid.crs,
                transform=self.grid.transform,
                width=self.grid.width,
                height=self.grid.height,
                resampling=Resampling.nearest,
                init_dest_nodata=False,
                INIT_DEST=str(outside),
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """bool (rows, width), True where rows `start` to `stop` of the map are to be kept."""
        with raster_errors(f"{self.name}: reading rows {start} to {stop}"):
            classes = self._source.read(1, window=Window(0, start, self.grid.width, stop - start))
        return np.isin(classes, self.keep)
