"""Rasters out: rows in, a checked Cloud-Optimized GeoTIFF out, in memory that doesn't grow with the raster's height.

A COG can't be streamed, so rows go to a plain tiled GeoTIFF beside the target first, which GDAL's COG driver copies.
GDAL can report success on a full disk: both files are checked block by block against their size, and their values
against checksums taken while writing, before the raster gets its name. Equal input gives equal bytes.
"""

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import rasterio.shutil
from affine import Affine
from numpy.typing import DTypeLike
from rasterio.enums import Resampling
from rasterio.windows import Window

from biomass_jax.data.raster.grid import Grid, open_quietly, raster_errors
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import RasterError
from biomass_jax.runtime import system

SIDE_CARS = (".aux.xml", ".msk", ".ovr")  # what GDAL would read beside a raster
_READ_BACK = 2**26  # bytes that are read at once to be compared
_FULL = "is the disk full, or a limit on file sizes set (ulimit -f)?"


@dataclass(frozen=True)
class CogLayout:
    """How a COG is compressed and blocked."""

    block: int  # edge of its tiles in pixels, a multiple of 16
    compression: Mapping[str, Any]  # GDAL's options of the COG
    working: Mapping[str, Any]  # GDAL's options of the working copy
    # Whether overviews are made in the working copy (quicker where that isn't compressed) or by the COG driver. Either
    # way they are means of the valid pixels.
    overviews_first: bool = False


# Deflate is read everywhere; level 1 is within a few percent of level 6 on float32 with predictor 3 and much quicker.
# With more threads GDAL says nothing when the disk is full: hours of work would be written to nowhere.
MAP_LAYOUT = CogLayout(
    block=512,
    compression={"compress": "deflate", "level": 1, "predictor": "YES"},
    working={"compress": "deflate", "zlevel": 1, "predictor": 3, "num_threads": 1},
)
# On digital numbers zstd takes a third of deflate's time to write, half of it to read, and is no larger; GDAL has it
# since 2.3. Blocks are HLS's own: a chip of 224 touches at most four.
DATA_LAYOUT = CogLayout(
    block=256,
    compression={"compress": "zstd", "level": 1, "predictor": "YES"},
    working={"interleave": "band"},  # for the COG driver all the same, and quicker to write and to average
    overviews_first=True,
)


def check_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Check that a folder can be written to and has room for `needed` bytes.

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


def space_needed(grid: Grid, pixel_bytes: int = 4, share: float = 1.0) -> int:
    """Bytes that writing takes at its peak: the working copy and the COG, both with overviews, one compressed.

    Args:
        grid: size of the raster.
        pixel_bytes: of all bands.
        share: of its blocks that will hold values; others pack to a hundredth.
    """
    packed = min(share + 0.01, 1.0)
    return int(grid.height * grid.width * pixel_bytes * packed * 4 / 3 * (1 + 0.85)) + 2**20


class CogWriter:
    """Writes one raster as a COG; a context manager.

    Leaving the block without an exception finishes the raster (`close`); an exception, or being killed, leaves nothing
    under the target's name. Working files lie beside the target, hidden: `.{stem}.partial.tif`, `.{stem}.cog.tif`.

    Attributes:
        seconds: time spent so far in `write`, `verify` and `copy`.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        grid: Grid,
        *,
        dtype: DTypeLike,
        band_names: Sequence[str],
        nodata: float,
        tags: Mapping[str, str],
        units: Sequence[str] = (),
        layout: CogLayout = DATA_LAYOUT,
        share: float = 1.0,
    ) -> None:
        """Open the working copy.

        Args:
            dst: the raster's path; its folder is made if it isn't there, a raster of this name is replaced.
            grid: size and place.
            dtype: of the file; the rows have to be of it.
            band_names: description of each band.
            nodata: one for all bands, as GeoTIFF has it.
            tags: texts for the file; read after the last rows, so whoever makes those may add counts to it.
            units: unit of each band, or none.
            layout: blocks and compression.
            share: of the blocks that will hold values, for the room that is asked for.

        Raises:
            RasterError: the folder can't be written to, or has too little room.
        """
        self.path = Path(dst)
        self.grid = grid
        self.seconds = {"write": 0.0, "verify": 0.0, "copy": 0.0}
        self._dtype, self._bands, self._layout, self._tags = np.dtype(dtype), len(band_names), layout, tags
        self._next_row = self._next_column = 0  # of the pixel after the last one, in reading order of blocks
        self._checksums: list[int] = []
        self._partial = self.path.with_name(f".{self.path.stem}.partial.tif")
        self._cog = self.path.with_name(f".{self.path.stem}.cog.tif")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RasterError(f"{self.path.parent}: can't make this folder: {error.strerror or error}") from error
        if self.path.is_dir():
            raise RasterError(f"{self.path}: there is a folder of this name; a raster can't be written there")
        self._remove_working_files()  # what a killed run left counts neither as room taken nor as data
        check_space(self.path.parent, space_needed(grid, self._bands * self._dtype.itemsize, share))
        self._buffer: np.ndarray | None = None  # a row of blocks, for those who give rows
        self._dataset: Any = None
        with raster_errors(f"{self.path}: writing {self._partial.name}; {_FULL}"):
            self._dataset = self._create(float(nodata), band_names, units)

    def _create(self, nodata: float, band_names: Sequence[str], units: Sequence[str]) -> Any:
        placed = self.grid.crs is not None or self.grid.transform != Affine.identity()
        dataset = open_quietly(
            str(self._partial),
            "w",
            driver="GTiff",
            height=self.grid.height,
            width=self.grid.width,
            count=self._bands,
            dtype=self._dtype.name,
            nodata=nodata,
            crs=self.grid.crs,
            transform=self.grid.transform if placed else None,
            tiled=True,
            blockxsize=self._layout.block,
            blockysize=self._layout.block,
            bigtiff="IF_SAFER",
            **self._layout.working,
        )
        dataset.descriptions = tuple(band_names)
        if units:
            dataset.units = tuple(units)
        return dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, values: np.ndarray) -> None:
        """Add rows below those already written: (bands, rows, width), of any number of rows.

        Raises:
            RasterError: another dtype or shape, too many rows, or the disk doesn't take them.
        """
        top, block = self._next_row, self._layout.block
        if values.dtype != self._dtype or values.ndim != 3 or values.shape[::2] != (self._bands, self.grid.width):
            raise RasterError(
                f"{self.path}: got {values.dtype} {values.shape} for row {top}, expected {self._dtype} "
                f"({self._bands}, rows, {self.grid.width})"
            )
        if top + values.shape[1] > self.grid.height:
            raise RasterError(f"{self.path}: rows {top} to {top + values.shape[1]} of a raster with {self.grid.height}")
        began = time.perf_counter()
        if self._buffer is None:
            self._buffer = np.empty((self._bands, min(block, self.grid.height), self.grid.width), self._dtype)
        done = 0
        while done < values.shape[1]:
            at = self._next_row % block
            take = min(values.shape[1] - done, block - at)
            self._buffer[:, at : at + take] = values[:, done : done + take]
            self._next_row += take
            done += take
            if self._next_row % block == 0 or self._next_row == self.grid.height:
                self._put(self._next_row - at - take, 0, self._buffer[:, : at + take])
        self.seconds["write"] += time.perf_counter() - began

    def write_block(self, values: np.ndarray) -> None:
        """Add the next block in reading order, in memory that doesn't grow with the raster's width either.

        All of a raster is given by rows or all by blocks.

        Args:
            values: (bands, rows, columns) of a whole block, or of what of it lies in the raster.

        Raises:
            RasterError: another dtype or shape, too many blocks, or the disk doesn't take it.
        """
        top, left, block = self._next_row, self._next_column, self._layout.block
        wanted = (self._bands, min(block, self.grid.height - top), min(block, self.grid.width - left))
        if values.dtype != self._dtype or values.shape != wanted:
            raise RasterError(
                f"{self.path}: got {values.dtype} {values.shape} for the block at row {top}, column {left}, expected "
                f"{self._dtype} {wanted}"
            )
        began = time.perf_counter()
        self._put(top, left, values)
        self._next_column = left + block
        if self._next_column >= self.grid.width:
            self._next_row, self._next_column = top + wanted[1], 0
        self.seconds["write"] += time.perf_counter() - began

    def _put(self, top: int, left: int, values: np.ndarray) -> None:
        """Write one block or a row of them, each of them whole and once, and take their checksums."""
        rows, columns = values.shape[1:]
        with raster_errors(f"{self.path}: writing rows {top} to {top + rows} to {self._partial.name}; {_FULL}"):
            self._dataset.write(values, window=Window(left, top, columns, rows))
        self._checksums += self._block_checksums(values)

    def _block_checksums(self, values: np.ndarray) -> list[int]:
        """Checksums of blocks side by side: (bands, rows, columns) -> one of all bands for each."""
        block = self._layout.block
        return [
            zlib.crc32(np.ascontiguousarray(values[..., left : left + block]).data)
            for left in range(0, values.shape[-1], block)
        ]

    def close(self) -> None:
        """Finish: check the working copy, copy it to a COG, check that, and give it its name.

        Raises:
            RasterError: rows are missing, or a file is not whole (a full disk); no raster, no working files are left.
        """
        if self._dataset is None:
            return
        try:
            if self._next_row != self.grid.height:
                raise RasterError(f"{self.path}: {self._next_row} of {self.grid.height} rows were written")
            self._timed("write", self._finish_dataset)
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

    def _timed(self, what: str, step: Callable[[], None]) -> None:
        began = time.perf_counter()
        step()
        self.seconds[what] += time.perf_counter() - began

    def _finish_dataset(self) -> None:
        with raster_errors(f"{self.path}: writing {self._partial.name}; {_FULL}"):
            self._dataset.update_tags(**{**self._tags, "AREA_OR_POINT": "Area"})
            for number, texts in enumerate(self._band_tags(), 1):
                self._dataset.update_tags(number, **texts)
            if self._layout.overviews_first:
                self._dataset.build_overviews(self._overview_factors(), Resampling.average)
        self._close_dataset()

    def _band_tags(self) -> Sequence[Mapping[str, str]]:
        """Texts for the bands, from the first on."""
        return ()

    def _overview_factors(self) -> list[int]:
        """2, 4, 8 ... until the smallest overview is one tile."""
        blocks = max(self.grid.height, self.grid.width) / self._layout.block
        return [2 ** (level + 1) for level in range(31) if blocks > 2**level]

    def _close_dataset(self) -> None:
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            with raster_errors(f"{self.path}: closing {self._partial.name}; {_FULL}"):
                dataset.close()

    def _copy(self) -> None:
        """GDAL's COG driver: overviews are means of the valid pixels, because the copy carries the no-data value."""
        by_driver = {"overviews": "IGNORE_EXISTING", "overview_resampling": "AVERAGE"}
        with raster_errors(f"{self.path}: making the COG; {_FULL}"):
            rasterio.shutil.copy(
                str(self._partial),
                str(self._cog),
                driver="COG",
                blocksize=self._layout.block,
                statistics="AUTO",  # those that the working copy has: GDAL's own would be of another reading
                bigtiff="IF_SAFER",
                num_threads="ALL_CPUS",
                **({"overviews": "FORCE_USE_EXISTING"} if self._layout.overviews_first else by_driver),
                **self._layout.compression,
            )

    def _verify(self, path: Path) -> None:
        try:
            verify_blocks(path)
        except RasterError as error:
            raise RasterError(f"{self.path}: not written whole; {_FULL} {error}") from error
        block, checksums = self._layout.block, iter(self._checksums)
        pixels = _READ_BACK // (block * self._bands * self._dtype.itemsize) // block * block
        with (
            raster_errors(f"{self.path}: reading back {path.name}"),
            open_quietly(str(path), num_threads="ALL_CPUS") as dataset,
        ):
            if (dataset.height, dataset.width) != (self.grid.height, self.grid.width):
                raise RasterError(f"{self.path}: {path.name} is {dataset.height} x {dataset.width} pixels")
            for top, left in product(range(0, self.grid.height, block), range(0, self.grid.width, pixels or block)):
                rows, columns = min(block, self.grid.height - top), min(pixels or block, self.grid.width - left)
                found = dataset.read(window=Window(left, top, columns, rows))
                for place, checksum in enumerate(self._block_checksums(found)):
                    if checksum != next(checksums):
                        raise RasterError(
                            f"{self.path}: {path.name} holds other values than were written, in the block at row "
                            f"{top}, column {left + place * block}; {_FULL}"
                        )

    def _publish(self) -> None:
        try:
            system.flush(self._cog)
            for ending in SIDE_CARS:  # they were about the raster that this one replaces
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            os.replace(self._cog, self.path)
            system.flush_folder(self.path.parent)
        except OSError as error:
            raise RasterError(f"{self.path}: can't put the raster in its place: {error.strerror or error}") from error

    def _remove_working_files(self) -> None:
        with raster_errors(f"{self.path}: removing working files"):
            for name in (self._partial, self._cog):
                # beside each file the working and side files that GDAL itself may have left when killed
                for extra in ("", ".aux.xml", ".ovr.tmp"):
                    name.with_name(name.name + extra).unlink(missing_ok=True)


class _Statistics:
    """Sums over a map's values, row by row, so that they don't depend on how rows come; all are float64.

    Values count by their distance from the first one, which keeps the digits of a deviation that is far below the mean.
    """

    def __init__(self, nodata: float) -> None:
        self._nodata = np.float32(nodata)
        self._pixels = self._count = 0
        self._first = self._sum = self._squares = 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Count further rows of finite values, float32 (rows, width)."""
        self._pixels += values.size
        for row in values:
            found = row[row != self._nodata].astype(np.float64)
            if not found.size:
                continue
            if not self._count:
                self._first = float(found[0])
            self._low, self._high = min(self._low, float(found.min())), max(self._high, float(found.max()))
            found -= self._first
            self._count += found.size
            self._sum += float(found.sum())
            self._squares += float(np.square(found).sum())

    def tags(self) -> dict[str, str]:
        """GDAL's names and texts; of a map without a value only how many have one."""
        found = {"VALID_PERCENT": 100 * self._count / self._pixels}
        if self._count:
            shift = self._sum / self._count
            variance = max(self._squares / self._count - shift**2, 0.0)
            found |= {"MINIMUM": self._low, "MAXIMUM": self._high, "MEAN": self._first + shift, "STDDEV": variance**0.5}
        return {f"STATISTICS_{name}": repr(value) for name, value in found.items()}


class MapWriter(CogWriter):
    """Writes a float32 map of one layer or several as a COG, with the statistics of each; see `CogWriter`."""

    def __init__(
        self,
        dst: str | os.PathLike[str],
        grid: Grid,
        *,
        nodata: float,
        layers: Mapping[str, str],
        tags: Mapping[str, str],
        block: int = MAP_LAYOUT.block,
        share: float = 1.0,
    ) -> None:
        """Open the working copy, as `CogWriter` does.

        Args:
            dst: the map's path.
            grid: size and place of the map.
            nodata: value of pixels without one.
            layers: name and unit of each band, in order.
            tags: texts for the file.
            block: edge of its tiles in pixels, a multiple of 16.
            share: of the blocks that will hold values, as for `CogWriter`.
        """
        layout = CogLayout(block, MAP_LAYOUT.compression, MAP_LAYOUT.working)
        named: dict[str, Any] = {"band_names": list(layers), "units": list(layers.values())}
        super().__init__(dst, grid, dtype=np.float32, nodata=nodata, tags=tags, layout=layout, share=share, **named)
        self._statistics = [_Statistics(nodata) for _ in layers]

    def write_rows(self, start: int, values: np.ndarray) -> None:
        """Add rows below those already written.

        Args:
            start: their first row, which has to be the next one.
            values: (rows, width) of a single layer, else (rows, width, layers); the no-data value where there is none.

        Raises:
            RasterError: rows out of order, of another width, not finite, or the disk doesn't take them.
        """
        layers = len(self._statistics)
        wanted = (self.grid.width,) if layers == 1 else (self.grid.width, layers)
        if start != self._next_row or values.shape[1:] != wanted:
            raise RasterError(
                f"{self.path}: got values {values.shape} for row {start}, expected row {self._next_row} and "
                f"{' x '.join(map(str, wanted))} values a row"
            )
        if not np.isfinite(values).all():
            stop = start + values.shape[0]
            raise RasterError(f"{self.path}: the model gave values that are not finite in rows {start} to {stop}")
        values = np.moveaxis(values.astype(np.float32, copy=False).reshape(-1, self.grid.width, layers), -1, 0)
        self.write(values)
        self._count(values)

    def write_block(self, values: np.ndarray) -> None:
        """Add the next block, see `CogWriter`; finite values, the no-data value where there is none."""
        if not np.isfinite(values).all():
            raise RasterError(f"{self.path}: values that are not finite in the block at row {self._next_row}")
        super().write_block(values)
        self._count(values)

    def _count(self, values: np.ndarray) -> None:
        for statistics, rows in zip(self._statistics, values, strict=True):
            statistics.add(rows)

    def _band_tags(self) -> Sequence[Mapping[str, str]]:
        return [statistics.tags() for statistics in self._statistics]


def write_cog(
    dst: str | os.PathLike[str],
    arrays_by_row_band: Iterable[np.ndarray],
    grid: Grid,
    dtype: DTypeLike,
    band_names: Sequence[str],
    nodata: float,
    tags: Mapping[str, str],
    *,
    units: Sequence[str] = (),
) -> Path:
    """Write (bands, rows, width) arrays of any numbers of rows, from north to south, as a COG in `DATA_LAYOUT`.

    The other arguments and the errors are those of `CogWriter`. Returns `dst`.
    """
    with CogWriter(dst, grid, dtype=dtype, band_names=band_names, nodata=nodata, tags=tags, units=units) as writer:
        for array in arrays_by_row_band:
            writer.write(array)
    return writer.path
