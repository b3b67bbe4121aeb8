"""Finished maps in: their bands by name, their tags, rows of values."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from rasterio.windows import Window

from biomass_jax.data.raster.grid import grid_of, open_quietly, raster_errors
from biomass_jax.errors import RasterError


class MapFile(ExitStack[None]):
    """A map of `biomass-jax predict`, or another raster whose bands have names; it closes as a stack does.

    Attributes:
        path: of the file.
        grid: size and place.
        tags: texts of the file.
        bands: names of its bands, in order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it.

        Raises:
            RasterError: it can't be read, has no CRS, or a band without a name.
        """
        super().__init__()
        self.path = os.fspath(path)
        with raster_errors(self.path):
            self._dataset = self.enter_context(open_quietly(self.path))
            self.grid, self.tags = grid_of(self._dataset), dict(self._dataset.tags())
            self.bands = tuple(name or "" for name in self._dataset.descriptions)
        try:
            if self.grid.crs is None:
                raise RasterError(f"{self.path}: it has no CRS, so nothing tells where it lies")
            if "" in self.bands:
                raise RasterError(
                    f"{self.path}: its band {self.bands.index('') + 1} has no name; expected a map, whose bands are "
                    "named agbd, agbd_sd and so on"
                )
        except RasterError:
            self.close()
            raise

    def units(self) -> tuple[str, ...]:
        """Unit of each band, "" where none is given."""
        return tuple(unit or "" for unit in self._dataset.units)

    def rows(self, start: int, stop: int, names: Sequence[str]) -> np.ndarray:
        """Values of some bands, float64 (bands, rows, W); NaN in all of them where one has none.

        Raises:
            RasterError: it can't be read, or lacks one of the bands.
        """
        if lost := [name for name in names if name not in self.bands]:
            raise RasterError(f"{self.path}: it has no band {lost[0]}; found {', '.join(self.bands)}")
        numbers = [self.bands.index(name) + 1 for name in names]
        with raster_errors(self.path):
            found = self._dataset.read(numbers, window=Window(0, start, self.grid.width, stop - start), masked=True)
        values: np.ndarray = found.astype(np.float64).filled(np.nan)
        values[:, ~np.isfinite(values).all(0)] = np.nan
        return values
