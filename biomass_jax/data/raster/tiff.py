"""Where a TIFF's blocks lie, read from its directories: GDAL can swallow a full disk, and a cut file opens well."""

import os
from typing import BinaryIO

import numpy as np

from biomass_jax.errors import RasterError
from biomass_jax.runtime.content import TIFF, mistaken

_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # TIFF field types that can hold places and sizes
_OFFSETS, _COUNTS = (324, 273), (325, 279)  # TileOffsets, StripOffsets; TileByteCounts, StripByteCounts


def verify_blocks(path: str | os.PathLike[str], *, sparse_ok: bool = False) -> None:
    """Check that every block of every image (overviews and masks too) of a TIFF lies wholly inside the file.

    Args:
        path: a local classic or BigTIFF file.
        sparse_ok: whether blocks may be absent (offset and size 0, which readers take as no-data).

    Raises:
        RasterError: no TIFF, a damaged directory, or a block that is missing or reaches behind the end of the file.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            tiff = _Tiff(file, path)
            directory = tiff.first
            seen: set[int] = set()
            while directory:
                if directory in seen:
                    raise RasterError(f"{path}: damaged TIFF, its directories form a loop")
                seen.add(directory)
                entries, directory = tiff.directory(directory)
                _check_image(tiff, entries, sparse_ok, f"{path}: image {len(seen)}")
    except OSError as error:
        raise RasterError(f"{path}: {error.strerror or error}") from error


def is_tiff(path: str) -> bool:
    """Whether a local file begins as a TIFF does."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in TIFF
    except OSError:
        return False


class _Tiff:
    """An open classic or BigTIFF file: its size, the offset of its first directory, what its directories hold."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path, self.size = file, path, os.fstat(file.fileno()).st_size
        head = file.read(16)
        self.order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        if not self.order or len(head) < 8:
            raise RasterError(f"{path}: not a TIFF, it is {mistaken(path, *TIFF) or 'cut off after its first bytes'}")
        version = int(np.frombuffer(head[2:4], self.order + "u2")[0])
        if version not in (42, 43) or (version == 43 and len(head) < 16):
            raise RasterError(f"{path}: not a TIFF, version {version}")
        number, pointer, place = ("u2", "u4", head[4:8]) if version == 42 else ("u8", "u8", head[8:16])
        self.number, self.pointer = np.dtype(self.order + number), np.dtype(self.order + pointer)
        self.first = int(np.frombuffer(place, self.pointer)[0])

    def read(self, offset: int, dtype: np.dtype, count: int, name: str) -> np.ndarray:
        """Numbers from an offset on; `name` begins the message of the RasterError where the file ends before."""
        length = count * dtype.itemsize
        if offset <= 0 or offset + length > self.size:
            raise RasterError(
                f"{name}: truncated TIFF: its directory reaches to byte {offset + length:,}, the file has {self.size:,}"
            )
        self.file.seek(offset)
        return np.frombuffer(self.file.read(length), dtype)

    def directory(self, offset: int) -> tuple[dict[int, np.void], int]:
        """({tag: type, count, and value or its offset}, offset of the next directory)."""
        short, pointer = self.order + "u2", self.pointer
        entry = np.dtype([("tag", short), ("type", short), ("count", pointer), ("value", f"V{pointer.itemsize}")])
        count = int(self.read(offset, self.number, 1, self.path)[0])
        start = offset + self.number.itemsize
        entries = self.read(start, entry, count, self.path)
        following = self.read(start + entries.nbytes, pointer, 1, self.path)
        return {int(one["tag"]): one for one in entries}, int(following[0])

    def values(self, entry: np.void, name: str) -> np.ndarray:
        """The numbers of an entry, wherever they lie."""
        kind, count, inline = int(entry["type"]), int(entry["count"]), bytes(entry["value"])
        if kind not in _TYPES:
            raise RasterError(f"{name}: damaged TIFF, block positions have field type {kind}")
        dtype = np.dtype(self.order + _TYPES[kind])
        if count * dtype.itemsize <= len(inline):
            return np.frombuffer(inline, dtype, count)
        return self.read(int(np.frombuffer(inline, self.pointer)[0]), dtype, count, name)


def _check_image(tiff: _Tiff, entries: dict[int, np.void], sparse_ok: bool, name: str) -> None:
    fields = []
    for tags in (_OFFSETS, _COUNTS):
        present = [tag for tag in tags if tag in entries]
        if not present:
            raise RasterError(f"{name}: damaged TIFF, no block positions in its directory")
        fields.append(tiff.values(entries[present[0]], name).astype(np.uint64))
    offsets, counts = fields
    if len(offsets) != len(counts) or not len(offsets):
        raise RasterError(f"{name}: damaged TIFF, {len(offsets)} block positions and {len(counts)} block sizes")
    absent = (offsets == 0) != (counts == 0) if sparse_ok else (offsets == 0) | (counts == 0)
    beyond = offsets + counts > np.uint64(tiff.size)
    bad = np.flatnonzero(absent | beyond)
    if len(bad):
        first = int(bad[0])
        what = "is missing" if absent[first] else f"reaches to byte {int(offsets[first] + counts[first]):,}"
        raise RasterError(
            f"{name}: truncated TIFF: {len(bad)} of {len(offsets)} blocks are not in the file; block {first} {what}, "
            f"the file has {tiff.size:,} bytes"
        )
