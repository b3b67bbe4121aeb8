"""Whether a raster is the one that it was: its files with what lies beside them, or what a far one tells of itself."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio.windows import Window

from biomass_jax.data.fingerprints import digest_of, fingerprint

_BLOCK = ("OFFSET", "SIZE")  # what GDAL tells of a TIFF's block
_MOST_BLOCKS = 16  # asked for along each axis


class RasterIdentity(NamedTuple):
    """What an open dataset is known by.

    size: bytes of its files; mtime_ns: when the newest of them was changed, 0 for a far one; files: a digest of each
    one's name, size and time and of what lies beside it, or of what a far file tells.
    """

    size: int
    mtime_ns: int
    files: str


def identity_of(dataset: rasterio.DatasetReader) -> RasterIdentity:
    """The identity of an open dataset; of a VRT, what it refers to counts too.

    Of a far TIFF the size reaches to the end of its last block, and `files` depends on where its blocks lie and on the
    pixels of the one in the middle; GDAL's errors may be raised where that can't be read.
    """
    # Overviews change no pixel of full size; what counts of .aux.xml files `fingerprint` knows.
    local = [Path(f) for f in dataset.files if os.path.isfile(f) and not f.endswith((".aux.xml", ".ovr"))]
    if not local:
        size, digest = _far(dataset)
        return RasterIdentity(size, 0, digest)
    found = [file.stat() for file in local]
    digest = digest_of([(file.name, fingerprint(file)) for file in local])
    return RasterIdentity(sum(one.st_size for one in found), max(one.st_mtime_ns for one in found), digest)


def _far(dataset: rasterio.DatasetReader) -> tuple[int, str]:
    places = []
    for index, (height, width) in zip(dataset.indexes, dataset.block_shapes, strict=True):
        for y in _some(-(-dataset.height // height)):
            for x in _some(-(-dataset.width // width)):
                place = [dataset.get_tag_item(f"BLOCK_{what}_{x}_{y}", "TIFF", bidx=index) for what in _BLOCK]
                places.append(tuple(int(number or 0) for number in place))
    size = max(offset + count for offset, count in places)
    if not size:  # no TIFF: all pixels unpacked
        size = sum(np.dtype(kind).itemsize for kind in dataset.dtypes) * dataset.width * dataset.height
    height, width = dataset.block_shapes[0]
    row, column = dataset.height // 2 // height * height, dataset.width // 2 // width * width
    window = Window(column, row, min(width, dataset.width - column), min(height, dataset.height - row))
    return size, digest_of((places, dataset.read(1, window=window).tobytes()))


def _some(count: int) -> list[int]:
    """The last number below `count`, and others evenly spread."""
    return sorted({int(number) for number in np.linspace(0, count - 1, _MOST_BLOCKS)})
