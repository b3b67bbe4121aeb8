"""Rasters out: rows in, a checked Cloud-Optimized GeoTIFF out; equal input gives equal bytes.

As for maps, rows go to a plain tiled GeoTIFF beside the target first, because a COG can't be streamed, and GDAL's COG
driver copies that. GDAL can report success on a full disk: both files' blocks are checked against their size, and the
copy's values against checksums taken from what was to be written, before the raster gets its name.
"""

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio.shutil
from numpy.typing import DTypeLike
from rasterio.enums import Resampling
from rasterio.windows import Window

from biomass_jax.data.raster import Grid, check_space, open_quietly, raster_errors, verify_blocks
from biomass_jax.errors import PrepError, RasterError

BLOCK = 256  # edge of a tile in pixels, as in HLS: a chip of 224 touches at most four
# On digital numbers a third of deflate's time to write, half of it to read, and no larger; GDAL has it since 2.3.
_COMPRESSION = {"compress": "zstd", "level": 1, "predictor": "YES"}
_FULL = "is the disk full, or a limit on file sizes set (ulimit -f)?"


def write_cog(
    dst: str | os.PathLike[str],
    arrays_by_row_band: Iterable[np.ndarray],
    grid: Grid,
    dtype: DTypeLike,
    band_names: Sequence[str],
    nodata: float,
    tags: Mapping[str, str],
    *,
    units: Sequence[str] | None = None,
) -> Path:
    """Write a raster as a COG; it appears under its name whole and checked, or not at all.

    Overviews are means of the valid pixels. Working files lie beside the target, hidden, and go in any case.

    Args:
        dst: the raster's path; its folder is made if it isn't there, a raster of this name is replaced.
        arrays_by_row_band: (bands, rows, width) arrays from north to south, of any numbers of rows.
        grid: size and place.
        dtype: of the file; the arrays have to be of it.
        band_names: description of each band.
        nodata: one for all bands, as GeoTIFF has it.
        tags: texts for the file; read after the last rows, so whoever makes those may add counts to it.
        units: unit of each band.

    Returns:
        `dst`.

    Raises:
        PrepError: arrays of another dtype or shape, too many or too few rows, no room, or a file that is not whole.
    """
    path = Path(dst)
    partial, copy = (path.with_name(f".{path.stem}.{kind}.tif") for kind in ("partial", "cog"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepError(f"{path.parent}: can't make this folder: {error.strerror or error}") from error
    if path.is_dir():
        raise PrepError(f"{path}: there is a folder of this name; a raster can't be written there")
    try:
        _remove(partial, copy)  # what a killed run left
        check_space(path.parent, _space_needed(grid, len(band_names) * np.dtype(dtype).itemsize))
        rows = _in_blocks(arrays_by_row_band, path, grid, np.dtype(dtype), len(band_names))
        checksums = _write_partial(partial, rows, path, grid, np.dtype(dtype), band_names, nodata, tags, units)
        verify_blocks(partial)
        _copy(partial, copy, path)
        verify_blocks(copy)
        _compare(copy, checksums, path)
        _publish(copy, path)
    except RasterError as error:
        message = str(error) if str(path) in str(error) else f"{path}: not written: {error}; {_FULL}"
        raise PrepError(message) from error
    except OSError as error:
        raise PrepError(f"{path}: not written: {error.strerror or error}") from error
    finally:
        _remove(partial, copy)
    return path


def _space_needed(grid: Grid, pixel_bytes: int) -> int:
    """The working copy and the COG, both with overviews, one as it is and one compressed."""
    return int(grid.height * grid.width * pixel_bytes * 4 / 3 * (1 + 0.85)) + 2**20


def _in_blocks(
    arrays: Iterable[np.ndarray], path: Path, grid: Grid, dtype: np.dtype, bands: int
) -> Iterator[np.ndarray]:
    """The same rows in pieces of BLOCK rows (the last may be lower), so that each block is written once and whole."""
    buffer = np.empty((bands, min(BLOCK, grid.height), grid.width), dtype)
    row = 0
    for array in arrays:
        if array.dtype != dtype or array.ndim != 3 or (array.shape[0], array.shape[2]) != (bands, grid.width):
            raise PrepError(
                f"{path}: got {array.dtype} {array.shape} for row {row}, expected {dtype} ({bands}, rows, {grid.width})"
            )
        if row + array.shape[1] > grid.height:
            raise PrepError(f"{path}: rows {row} to {row + array.shape[1]} of a raster with {grid.height}")
        done = 0
        while done < array.shape[1]:
            at = row % BLOCK
            take = min(array.shape[1] - done, BLOCK - at)
            buffer[:, at : at + take] = array[:, done : done + take]
            row, done = row + take, done + take
            if row % BLOCK == 0 or row == grid.height:
                yield buffer[:, : at + take]
    if row != grid.height:
        raise PrepError(f"{path}: {row} of {grid.height} rows were given")


def _write_partial(
    partial: Path,
    pieces: Iterable[np.ndarray],
    path: Path,
    grid: Grid,
    dtype: np.dtype,
    band_names: Sequence[str],
    nodata: float,
    tags: Mapping[str, str],
    units: Sequence[str] | None,
) -> list[int]:
    """Write the working copy, uncompressed; returns a checksum of each piece of BLOCK rows."""
    profile = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "count": len(band_names),
        "dtype": dtype.name,
        "nodata": nodata,
        "crs": grid.crs,
        "transform": grid.transform,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "interleave": "band",  # for the COG driver all the same, and quicker to write and to average
        "bigtiff": "IF_SAFER",
    }
    checksums: list[int] = []
    name = f"{path}: writing {partial.name}; {_FULL}"
    with raster_errors(name):
        dataset = open_quietly(str(partial), "w", **profile)
    try:
        dataset.descriptions = tuple(band_names)
        if units is not None:
            dataset.units = tuple(units)
        row = 0
        for piece in pieces:  # outside raster_errors: errors of whoever makes the rows are not errors of writing
            with raster_errors(name):
                dataset.write(piece, window=Window(0, row, grid.width, piece.shape[1]))
            checksums.append(_checksum(piece))
            row += piece.shape[1]
        dataset.update_tags(**{**{key: str(value) for key, value in tags.items()}, "AREA_OR_POINT": "Area"})
        with raster_errors(name):
            # here, where nothing is compressed: the COG driver would compress them twice
            dataset.build_overviews(_overview_factors(grid), Resampling.average)
    finally:
        with raster_errors(name):
            dataset.close()
    return checksums


def _overview_factors(grid: Grid) -> list[int]:
    """2, 4, 8 ... until the smallest overview is one tile."""
    factors: list[int] = []
    while max(grid.height, grid.width) > BLOCK * 2 ** len(factors):
        factors.append(2 ** (len(factors) + 1))
    return factors


def _copy(partial: Path, copy: Path, path: Path) -> None:
    with raster_errors(f"{path}: making the COG; {_FULL}"):
        rasterio.shutil.copy(
            str(partial),
            str(copy),
            driver="COG",
            blocksize=BLOCK,
            overviews="FORCE_USE_EXISTING",
            statistics="NO",
            bigtiff="IF_SAFER",
            num_threads="ALL_CPUS",
            **_COMPRESSION,
        )


def _compare(copy: Path, checksums: Sequence[int], path: Path) -> None:
    """Compare what the file holds with what was to be written."""
    with raster_errors(f"{path}: reading back {copy.name}"), open_quietly(str(copy), num_threads="ALL_CPUS") as dataset:
        for index, expected in enumerate(checksums):
            top = index * BLOCK
            window = Window(0, top, dataset.width, min(BLOCK, dataset.height - top))
            if _checksum(dataset.read(window=window)) != expected:
                raise PrepError(f"{path}: {copy.name} holds other values than were written, from row {top}; {_FULL}")


def _publish(copy: Path, path: Path) -> None:
    with open(copy, "rb") as file:
        os.fsync(file.fileno())
    os.replace(copy, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(*paths: Path) -> None:
    for path in paths:
        # beside each file the working and side files that GDAL itself may have left when killed
        for extra in ("", ".aux.xml", ".ovr.tmp"):
            path.with_name(path.name + extra).unlink(missing_ok=True)


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data)
