"""Where a TIFF's blocks lie, read from its directories: GDAL can swallow a full disk, and a cut file opens well."""

import os
from typing import BinaryIO, NamedTuple

import numpy as np

from biomass_jax.errors import RasterError

_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # TIFF field types that can hold places and sizes
_OFFSETS, _COUNTS = (324, 273), (325, 279)  # TileOffsets, StripOffsets; TileByteCounts, StripByteCounts


class _Layout(NamedTuple):
    """Widths of a classic or BigTIFF directory."""

    order: str  # numpy byte order
    number: str  # of entries
    entry: int  # bytes of an entry
    pointer: str


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
            size = os.fstat(file.fileno()).st_size
            layout, directory = _header(file, path)
            seen: set[int] = set()
            while directory:
                if directory in seen:
                    raise RasterError(f"{path}: damaged TIFF, its directories form a loop")
                seen.add(directory)
                entries, directory = _directory(file, directory, layout, size, path)
                _check_image(file, entries, layout, size, sparse_ok, f"{path}: image {len(seen)}")
    except OSError as error:
        raise RasterError(f"{path}: {error.strerror or error}") from error


def is_tiff(path: str) -> bool:
    """Whether a local file begins as a TIFF does."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except OSError:
        return False


def _header(file: BinaryIO, path: str) -> tuple[_Layout, int]:
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise RasterError(f"{path}: not a TIFF, it begins with {head[:4]!r}")
    version = int(np.frombuffer(head[2:4], order + "u2")[0])
    if version == 42:
        return _Layout(order, "u2", 12, "u4"), int(np.frombuffer(head[4:8], order + "u4")[0])
    if version == 43 and len(head) == 16:
        return _Layout(order, "u8", 20, "u8"), int(np.frombuffer(head[8:16], order + "u8")[0])
    raise RasterError(f"{path}: not a TIFF, version {version}")


def _read(file: BinaryIO, offset: int, dtype: str, count: int, size: int, path: str) -> np.ndarray:
    length = count * np.dtype(dtype).itemsize
    if offset <= 0 or offset + length > size:
        raise RasterError(
            f"{path}: truncated TIFF: its directory reaches to byte {offset + length:,}, the file has {size:,}"
        )
    file.seek(offset)
    return np.frombuffer(file.read(length), dtype)


def _directory(
    file: BinaryIO, offset: int, layout: _Layout, size: int, path: str
) -> tuple[dict[int, tuple[int, int, bytes]], int]:
    """({tag: (type, count, value or its offset)}, offset of the next directory)."""
    order = layout.order
    count = int(_read(file, offset, order + layout.number, 1, size, path)[0])
    start = offset + np.dtype(layout.number).itemsize
    raw = _read(file, start, "u1", count * layout.entry, size, path).tobytes()
    entries = {}
    for at in range(0, len(raw), layout.entry):
        tag, kind = (int(n) for n in np.frombuffer(raw[at : at + 4], order + "u2"))
        width = np.dtype(layout.pointer).itemsize
        number = int(np.frombuffer(raw[at + 4 : at + 4 + width], order + layout.pointer)[0])
        entries[tag] = (kind, number, raw[at + 4 + width : at + layout.entry])
    following = _read(file, start + len(raw), order + layout.pointer, 1, size, path)
    return entries, int(following[0])


def _values(file: BinaryIO, entry: tuple[int, int, bytes], layout: _Layout, size: int, path: str) -> np.ndarray:
    kind, count, inline = entry
    if kind not in _TYPES:
        raise RasterError(f"{path}: damaged TIFF, block positions have field type {kind}")
    dtype = layout.order + _TYPES[kind]
    if count * np.dtype(dtype).itemsize <= len(inline):
        return np.frombuffer(inline, dtype, count)
    return _read(file, int(np.frombuffer(inline, layout.order + layout.pointer)[0]), dtype, count, size, path)


def _check_image(
    file: BinaryIO, entries: dict[int, tuple[int, int, bytes]], layout: _Layout, size: int, sparse_ok: bool, name: str
) -> None:
    fields = []
    for tags in (_OFFSETS, _COUNTS):
        present = [tag for tag in tags if tag in entries]
        if not present:
            raise RasterError(f"{name}: damaged TIFF, no block positions in its directory")
        fields.append(_values(file, entries[present[0]], layout, size, name).astype(np.uint64))
    offsets, counts = fields
    if len(offsets) != len(counts) or not len(offsets):
        raise RasterError(f"{name}: damaged TIFF, {len(offsets)} block positions and {len(counts)} block sizes")
    absent = (offsets == 0) | (counts == 0)
    if sparse_ok:
        absent &= (offsets != 0) | (counts != 0)
    beyond = offsets + counts > np.uint64(size)
    bad = np.flatnonzero(absent | beyond)
    if len(bad):
        first = int(bad[0])
        what = "is missing" if absent[first] else f"reaches to byte {int(offsets[first] + counts[first]):,}"
        raise RasterError(
            f"{name}: truncated TIFF: {len(bad)} of {len(offsets)} blocks are not in the file; block {first} {what}, "
            f"the file has {size:,} bytes"
        )
