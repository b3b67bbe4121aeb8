"""What files are known by: their size and time of change, or their bytes, and what lies beside a raster or a shapefile.

GDAL takes a raster's no-data value, its mask or its place from files beside it, and a shapefile has its names in one:
whoever remembers which file a result was made of has to remember these too.
"""

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from biomass_jax.runtime.files import sha256_of

_PAM = ".aux.xml"
_BESIDE = (_PAM, ".msk")  # behind a raster's whole name; overviews (.ovr) change no pixel of full size
_INSTEAD = {
    ".shp": (".dbf", ".shx", ".prj", ".cpg"),
    ".tif": (".tfw", ".tifw", ".wld", ".tab"),
    ".tiff": (".tfw", ".tifw", ".wld", ".tab"),
}  # in place of its ending
_IN_WITH_NUMBERS = ("Histograms", "GDALRasterAttributeTable")  # what viewers add when they look at a raster


def fingerprint(path: Path, mark: Callable[[Path], str] | None = None) -> str:
    """What a file is known by, with what lies beside it; "" where there is nothing.

    Args:
        path: a file, or a folder of files (those whose names begin with a dot don't count).
        mark: what one file is known by; None = its size and time of change.
    """
    mark = mark or size_and_time
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_file())
        parts = [f"{p.name} {mark(p)}" for p in names if p.suffix != ".xml"]
        parts += [f"{p.name} {text}" for p in names if p.name.endswith(_PAM) and (text := pam_digest(p))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if not path.is_file():
        return ""
    beside = [path.with_name(path.name + ending) for ending in _BESIDE]
    beside += [path.with_suffix(ending) for ending in _INSTEAD.get(path.suffix.lower(), ())]
    found = {file.name: pam_digest(file) if file.name.endswith(_PAM) else mark(file) for file in beside}
    return " ".join([mark(path), *(f"{name}:{text}" for name, text in found.items() if text)])


def size_and_time(path: Path) -> str:
    """`size-nanoseconds` of a file; "" where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def content(path: Path) -> str:
    """SHA-256 of a file; "" where there is none."""
    return sha256_of(path) if path.is_file() else ""


def pam_digest(path: Path) -> str:
    """SHA-256 over what an `.aux.xml` file says of how a raster is to be read; "" where it says nothing of that.

    Statistics and histograms, which a viewer writes when it opens a raster, change nothing.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError:
        return content(path)
    except OSError:
        return ""
    for band in [root, *root.iter("PAMRasterBand")]:
        for part in [part for part in band if part.tag in _IN_WITH_NUMBERS]:
            band.remove(part)
        for metadata in band.findall("Metadata"):
            for item in [item for item in metadata if item.get("key", "").startswith("STATISTICS_")]:
                metadata.remove(item)
            if not len(metadata):
                band.remove(metadata)
    for band in [band for band in root.findall("PAMRasterBand") if not len(band)]:
        root.remove(band)
    if not len(root):
        return ""
    return hashlib.sha256(ElementTree.canonicalize(ElementTree.tostring(root), strip_text=True).encode()).hexdigest()


def digest_of(parts: object) -> str:
    """SHA-256 over the text of nested lists of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
