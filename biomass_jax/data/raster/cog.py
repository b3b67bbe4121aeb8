"""Maps on disk: rows in, a checked Cloud-Optimized GeoTIFF out, in memory that doesn't grow with the map's height.

A COG can't be streamed, so rows go to a plain tiled GeoTIFF beside the target first, which GDAL's COG driver copies.
GDAL can report success on a full disk: both files are checked block by block against their size, and their values
against checksums taken while writing, before the map gets its name.
"""

import os
import shutil
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio.shutil
from affine import Affine
from rasterio.windows import Window

from biomass_jax.data.raster.grid import Grid, open_quietly, raster_errors
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import RasterError

# Deflate is read everywhere; level 1 is within a few percent of level 6 on float32 with predictor 3 and much quicker.
_COMPRESSION = {"compress": "deflate", "bigtiff": "IF_SAFER"}
_LEVEL = 1
_FULL = "is the disk full, or a limit on file sizes set (ulimit -f)?"


def check_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Check that a folder can be written to and has room.

    Args:
        folder: an existing folder.
        needed: bytes.

    Raises:
        RasterError: the folder is missing, can't be written to, or has less room than needed.
    """
    folder = os.fspath(folder)
    probe = Path(folder, f".probe-{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RasterError(f"{folder}: can't write to this folder: {error.strerror or error}") from error
    if free < needed:
        raise RasterError(
            f"{folder}: {free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB needed for the map and its working copies; "
            "make room or choose another folder"
        )


def space_needed(grid: Grid) -> int:
    """Bytes that writing a float32 map takes at its peak: working copy, the COG and overviews twice, compressed."""
    raw = grid.height * grid.width * 4
    return int(raw * (1 + 4 / 3 + 1 / 3) * 0.85) + 2**20


class MapWriter:
    """Writes one float32 map as a COG; a context manager.

    Leaving the block without an exception finishes the map (`close`); an exception, or being killed, leaves nothing
    under the target's name. Working files lie beside the target, hidden: `.{stem}.partial.tif`, `.{stem}.cog.tif`.

    Attributes:
        seconds: time spent so far in `write`, `verify` and `copy`.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        grid: Grid,
        *,
        nodata: float,
        description: str,
        unit: str,
        tags: Mapping[str, str],
        block: int = 512,
    ) -> None:
        """Open the working copy.

        Args:
            dst: the map's path; its folder is made if it isn't there.
            grid: size and place of the map.
            nodata: value of pixels without one.
            description: name of the band.
            unit: its unit.
            tags: texts for the file.
            block: edge of its tiles in pixels, a multiple of 16.

        Raises:
            RasterError: the folder can't be written to, or has too little room.
        """
        self.path = Path(dst)
        self.grid = grid
        self.seconds = {"write": 0.0, "verify": 0.0, "copy": 0.0}
        self._block = block
        self._next_row = 0
        self._checksums: list[int] = []
        self._partial = self.path.with_name(f".{self.path.stem}.partial.tif")
        self._cog = self.path.with_name(f".{self.path.stem}.cog.tif")
        self._nodata = float(nodata)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RasterError(f"{self.path.parent}: can't make this folder: {error.strerror or error}") from error
        if self.path.is_dir():
            raise RasterError(f"{self.path}: there is a folder of this name; a map can't be written there")
        self._remove_working_files()  # what a killed run left counts neither as room taken nor as data
        check_space(self.path.parent, space_needed(grid))
        self._buffer = np.empty((min(block, grid.height), grid.width), np.float32)
        self._dataset: Any = None
        with raster_errors(str(self.path)):
            self._dataset = self._create(description, unit, tags)

    def _create(self, description: str, unit: str, tags: Mapping[str, str]) -> Any:
        placed = self.grid.crs is not None or self.grid.transform != Affine.identity()
        dataset = open_quietly(
            str(self._partial),
            "w",
            driver="GTiff",
            height=self.grid.height,
            width=self.grid.width,
            count=1,
            dtype="float32",
            nodata=self._nodata,
            crs=self.grid.crs,
            transform=self.grid.transform if placed else None,
            tiled=True,
            blockxsize=self._block,
            blockysize=self._block,
            predictor=3,
            zlevel=_LEVEL,
            num_threads=1,  # with more, GDAL says nothing when the disk is full: hours of work would go on for nothing
            **_COMPRESSION,
        )
        dataset.set_band_description(1, description)
        dataset.set_band_unit(1, unit)
        dataset.update_tags(**{**{key: str(value) for key, value in tags.items()}, "AREA_OR_POINT": "Area"})
        return dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Add rows below those already written.

        Args:
            start: their first row, which has to be the next one.
            values: (rows, width) Mg/ha or the no-data value.

        Raises:
            RasterError: rows out of order, of another width, not finite, or the disk doesn't take them.
        """
        rows = values.shape[0]
        if start != self._next_row or values.ndim != 2 or values.shape[1] != self.grid.width:
            raise RasterError(
                f"{self.path}: got values {values.shape} for row {start}, expected row {self._next_row} and width "
                f"{self.grid.width}"
            )
        if start + rows > self.grid.height:
            raise RasterError(f"{self.path}: rows {start} to {start + rows} of a map with {self.grid.height}")
        if not np.isfinite(values).all():
            raise RasterError(
                f"{self.path}: the model gave values that are not finite in rows {start} to {start + rows}"
            )
        began = time.perf_counter()
        done = 0
        while done < rows:
            at = self._next_row % self._block
            take = min(rows - done, self._block - at)
            self._buffer[at : at + take] = values[done : done + take]
            self._next_row += take
            done += take
            if self._next_row % self._block == 0 or self._next_row == self.grid.height:
                self._flush(at + take)
        self.seconds["write"] += time.perf_counter() - began

    def _flush(self, rows: int) -> None:
        """Write one row of blocks, each of them whole and once, and take their checksums."""
        top = self._next_row - rows
        with raster_errors(f"{self.path}: writing rows {top} to {self._next_row} to {self._partial.name}; {_FULL}"):
            self._dataset.write(self._buffer[:rows], 1, window=Window(0, top, self.grid.width, rows))
        for left in range(0, self.grid.width, self._block):
            self._checksums.append(_checksum(self._buffer[:rows, left : left + self._block]))

    def close(self) -> None:
        """Finish: check the working copy, copy it to a COG, check that, and give it its name.

        Raises:
            RasterError: rows are missing, or a file is not whole (a full disk); no map and no working files are left.
        """
        if self._dataset is None:
            return
        try:
            if self._next_row != self.grid.height:
                raise RasterError(f"{self.path}: {self._next_row} of {self.grid.height} rows were written")
            self._timed("write", self._close_dataset)
            self._timed("verify", lambda: self._verify(self._partial))
            self._timed("copy", self._copy)
            self._timed("verify", lambda: self._verify(self._cog))
            self._publish()
        except BaseException:
            self.abort()
            raise
        self._remove_working_files()

    def abort(self) -> None:
        """Give up: remove the working files and leave the target as it is."""
        with suppress(RasterError):  # what GDAL has to say about a file that goes anyway
            self._close_dataset()
        self._remove_working_files()

    def _timed(self, what: str, step: Any) -> None:
        began = time.perf_counter()
        step()
        self.seconds[what] += time.perf_counter() - began

    def _close_dataset(self) -> None:
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            with raster_errors(f"{self.path}: closing {self._partial.name}; {_FULL}"):
                dataset.close()

    def _copy(self) -> None:
        """GDAL's COG driver: overviews are means of the valid pixels, because the copy carries the no-data value."""
        with raster_errors(f"{self.path}: making the COG; {_FULL}"):
            rasterio.shutil.copy(
                str(self._partial),
                str(self._cog),
                driver="COG",
                blocksize=self._block,
                level=_LEVEL,
                predictor="YES",
                overviews="IGNORE_EXISTING",
                overview_resampling="AVERAGE",
                statistics="NO",
                num_threads="ALL_CPUS",
                **_COMPRESSION,
            )

    def _verify(self, path: Path) -> None:
        try:
            verify_blocks(path)
        except RasterError as error:
            raise RasterError(f"{self.path}: not written whole; {_FULL} {error}") from error
        checksums = iter(self._checksums)
        with raster_errors(f"{self.path}: reading back {path.name}"), open_quietly(str(path)) as dataset:
            if (dataset.height, dataset.width) != (self.grid.height, self.grid.width):
                raise RasterError(f"{self.path}: {path.name} is {dataset.height} x {dataset.width} pixels")
            for top in range(0, self.grid.height, self._block):
                rows = min(self._block, self.grid.height - top)
                for left in range(0, self.grid.width, self._block):
                    columns = min(self._block, self.grid.width - left)
                    block = dataset.read(1, window=Window(left, top, columns, rows))
                    if _checksum(block) != next(checksums):
                        raise RasterError(
                            f"{self.path}: {path.name} holds other values than were written, in the block at row "
                            f"{top}, column {left}; {_FULL}"
                        )

    def _publish(self) -> None:
        try:
            with open(self._cog, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._cog, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise RasterError(f"{self.path}: can't put the map in its place: {error.strerror or error}") from error

    def _remove_working_files(self) -> None:
        with raster_errors(f"{self.path}: removing working files"):
            for name in (self._partial, self._cog):
                # beside each file the working and side files that GDAL itself may have left when killed
                for extra in ("", ".aux.xml", ".ovr.tmp"):
                    name.with_name(name.name + extra).unlink(missing_ok=True)


def _checksum(block: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(block).data)
