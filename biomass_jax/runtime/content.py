"""What a file is by its first bytes, whatever its name says: login pages and archives are saved as .h5 or .tif too."""

import os
import re
from pathlib import PurePath

HDF5 = (b"\x89HDF\r\n\x1a\n",)
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Endings that programs give to downloads until they are whole.
UNFINISHED = frozenset((".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".aria2", ".filepart"))

HEAD = 2**15  # bytes that tell enough

_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`, or download the file"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"PK\x05\x06", "an empty zip archive; download it again"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x0e\x03\x13\x01", "an HDF4 file"),
    (b"CDF", "a NetCDF 3 file"),
    *((magic, "a TIFF file") for magic in TIFF),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a Parquet table"),
    (b"SQLite format 3", "an SQLite database (a GeoPackage?)"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
)
_BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark too
_PAGE = re.compile(rb"<!doctype\s+html|<html\b|<head\b|<body\b", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_LOGIN = re.compile(rb"log ?-?in|sign ?-?in|single sign|authenticat|authoriz", re.IGNORECASE)
_LOGIN_FORM = re.compile(rb"type=[\"']?password|urs\.earthdata\.nasa\.gov", re.IGNORECASE)
_XML_SAYS = re.compile(rb"<(?:code|message|\w*exception\w*)[^>]*>\s*([^<>]+?)\s*<", re.IGNORECASE)
_JSON = re.compile(rb"[\[{]\s*[\"\[\]{}]")
_JSON_SAYS = re.compile(
    rb'"(?:error_?(?:description|message)?|errors|message|detail|title|msg)"\s*:\s*\[?\s*"((?:[^"\\]|\\.)+)"',
    re.IGNORECASE,
)
_AGAIN = "download the file itself (a login may be needed)"
_ANSWER = f"a server's answer in place of the file; {_AGAIN}"


def mistaken(path: str | os.PathLike[str], *right: bytes) -> str | None:
    """What a file is that should begin in another way, and what to do about it.

    Args:
        path: a local file.
        right: first bytes that it may have.

    Returns:
        What fits behind "it is"; None where the file begins as it should, or can't be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if head.startswith(right):
        return None
    if not head:
        return "an empty file (0 bytes), as a failed download leaves; download it again"
    if not head.strip(b"\0"):
        return "zeros at its beginning, as an unfinished download leaves; download it again"
    return what_is(head) or _unknown(head)


def what_is(head: bytes) -> str | None:
    """What begins with these bytes and what to do about it; None for what isn't known."""
    text = head.lstrip(_BLANK)
    if text.startswith(b"<"):
        return _markup(text)
    if _JSON.match(text):
        said = _quoted(_JSON_SAYS.findall(text)[:2])
        return (
            f"JSON text that says {said}, {_ANSWER}" if said else f"JSON text that begins {_shown(text, 60)}; {_AGAIN}"
        )
    for magic, meaning in _KINDS:
        if text.startswith(magic):
            return meaning
    return "a tar archive; unpack it first" if head[257:262] == b"ustar" else None


def is_page(head: bytes) -> bool:
    """Whether bytes begin as a web page does."""
    return head.lstrip(_BLANK).startswith(b"<") and _PAGE.search(head) is not None


def is_text(head: bytes) -> bool:
    """Whether bytes begin as HTML, XML or JSON does, in which servers say what is wrong."""
    text = head.lstrip(_BLANK)
    return text.startswith(b"<") or _JSON.match(text) is not None


def unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a download that has not ended."""
    return PurePath(path).suffix.lower() in UNFINISHED


def _markup(text: bytes) -> str:
    if not is_page(text):
        said = _quoted(_XML_SAYS.findall(text)[:2])
        return f"XML text that says {said}, {_ANSWER}" if said else f"XML text that begins {_shown(text, 60)}; {_AGAIN}"
    title = _TITLE.search(text)
    page = f"an HTML page titled {_shown(title[1], 80)}" if title else "an HTML page"
    if _LOGIN.search(title[1] if title else b"") or _LOGIN_FORM.search(text):
        advice = "log in (at NASA's archives with Earthdata) and download it again"
        return f"{page}, a login page in place of the file; {advice}"
    return f"{page}, {_ANSWER}"


def _unknown(head: bytes) -> str:
    text = head[:64].decode("latin-1")
    if all(letter.isprintable() or letter in "\t\r\n" for letter in text) and head[:64].isascii():
        return f"text that begins {_shown(head, 60)}; {_AGAIN}"
    return f"no known kind of file, it begins with {head[:8]!r}; download it again"


def _quoted(said: list[bytes]) -> str:
    return _shown(b": ".join(said), 160) if said else ""


def _shown(text: bytes, most: int) -> str:
    """One line in quotes."""
    return repr(" ".join(text.decode("utf-8", "replace").split())[:most])
