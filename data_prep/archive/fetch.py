"""Files over HTTP: what is interrupted resumes where it ended, and a file gets its name once it is whole and checked.

A file arrives as `.{name}.part` beside its place; `.{name}.part.json` says of which version on the server it is a part.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, Protocol

from biomass_jax.data.raster.cog import check_space
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import PrepError, RasterError
from biomass_jax.runtime import content

ATTEMPTS = 5
PAUSE = 2.0  # seconds before the second attempt; doubles with each
LONGEST_PAUSE = 120.0
WORKERS = 4  # files at a time; the archives ask for few
_CHUNK = 2**16  # what a broken connection loses at most
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


CREDENTIALS = """NASA's archives need an Earthdata login:
  1. register at https://urs.earthdata.nasa.gov/users/new (free);
  2. under Applications -> Authorized Apps approve "LP DAAC Data Pool" (HLS) and "ORNL DAAC" (GEDI);
  3. give one of
     - a token made under Generate Token: export EARTHDATA_TOKEN=...
     - name and password: export EARTHDATA_USERNAME=... EARTHDATA_PASSWORD=...
     - a line in ~/.netrc (chmod 600): machine urs.earthdata.nasa.gov login NAME password PASSWORD"""


class AccessError(PrepError):
    """Credentials are missing or not accepted, for this file and so for all; the message gives the steps."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}\n{CREDENTIALS}")


class Response(Protocol):
    """What is used of an answer; `requests.Response` has it."""

    status_code: int
    headers: Any  # a mapping that ignores the case of its keys

    def iter_content(self, chunk_size: int) -> Iterable[bytes]:
        """The body in pieces."""

    def close(self) -> None:
        """Give the connection back."""


OpenUrl = Callable[[str, Mapping[str, str]], Response]  # (url, headers) -> answer whose body is not yet read


@dataclass(frozen=True)
class Wanted:
    """A file to get: where from, where to, and its exact size in bytes where that is known before."""

    url: str
    path: Path
    size: int | None = None


@dataclass
class Result:
    """What became of files.

    Attributes:
        received: those downloaded now.
        present: those that were there, whole.
        failed: file -> what went wrong.
        bytes: received now.
    """

    received: list[Path] = field(default_factory=list)
    present: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    bytes: int = 0


class _Again(Exception):
    """This attempt failed in a way that another may not; `pause` where the server says how long to wait."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


def fetch_all(
    wanted: Sequence[Wanted],
    log_in: Callable[[], OpenUrl],
    *,
    workers: int = WORKERS,
    log: Callable[[str], None] = lambda line: None,
) -> Result:
    """Get files that aren't there yet; one that fails doesn't stop the others.

    Args:
        wanted: the files.
        log_in: gives what asks the server; called where a file is missing alone.
        workers: files at a time.
        log: is called with a line for each file.

    Raises:
        AccessError: there are no credentials, or the server refuses them.
        PrepError: no room, or see `log_in`.
    """
    result = Result()
    missing = [one for one in wanted if not _is_here(one)]
    result.present = [one.path for one in wanted if one not in missing]
    for folder in dict.fromkeys(one.path.parent for one in missing):
        folder.mkdir(parents=True, exist_ok=True)
    if not missing:
        return result
    try:
        check_space(missing[0].path.parent, sum(one.size or 0 for one in missing))
    except RasterError as error:
        raise PrepError(str(error)) from error
    open_url = log_in()
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(fetch, one, open_url): one for one in missing}
        for job in as_completed(jobs):
            path = jobs[job].path
            try:
                size = job.result()
            except AccessError:
                raise
            except PrepError as error:
                result.failed[path] = str(error)
                log(f"failed: {error}")
            else:
                result.received.append(path)
                result.bytes += size
                log(f"{path} ({size / 1e6:.1f} MB)")
    finally:
        pool.shutdown(cancel_futures=True)
    result.received.sort()
    return result


def fetch(wanted: Wanted, open_url: OpenUrl) -> int:
    """Get one file, resuming from what an earlier attempt or run left of it.

    Returns:
        Bytes received now.

    Raises:
        AccessError: the server refuses the credentials.
        PrepError: it isn't there, can't be written, or is not whole after all attempts; only the part is left.
    """
    received = 0

    def count(size: int) -> None:
        nonlocal received
        received += size

    for attempt in itertools.count(1):
        try:
            _attempt(wanted, open_url, count)
            break
        except _Again as error:
            if attempt == ATTEMPTS:
                raise PrepError(f"{wanted.path}: {error} ({ATTEMPTS} attempts); start again to resume") from error
            sleep(min(error.pause if error.pause is not None else PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
    return received


def fault(path: Path, *, like: Path | None = None) -> str | None:
    """What is wrong with a file's content, or None; `like` has its final name."""
    suffix = (like or path).suffix
    if suffix == ".tif":
        try:
            verify_blocks(path, sparse_ok=True)
        except RasterError as error:
            return str(error)
    elif suffix == ".h5":
        import h5py  # only needed for orbits

        meaning = content.mistaken(path, *content.HDF5)
        if meaning is not None:
            return f"{path}: not an HDF5 file, it is {meaning}"
        try:
            with h5py.File(path, "r") as file:
                list(file)
        except OSError as error:
            return f"{path}: not a whole HDF5 file: {error}"
    return None


def _is_here(wanted: Wanted) -> bool:
    """Whether a file is in its place, has the expected size where one is known, and is whole."""
    if not wanted.path.is_file():
        return False
    return wanted.size in (None, wanted.path.stat().st_size) and fault(wanted.path) is None


def _attempt(wanted: Wanted, open_url: OpenUrl, count: Callable[[int], None]) -> None:
    part = wanted.path.with_name(f".{wanted.path.name}.part")
    known = part.with_name(f"{part.name}.json")
    have, version = _left_over(part, known)
    if have and have == version.get("size"):  # stopped between the last byte and the new name
        _finish(part, known, wanted, have)
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = open_url(wanted.url, headers)
    except OSError as error:  # what requests raises is an OSError too
        raise _Again(f"no answer: {error}") from error
    try:
        total = _begin(response, wanted, part, known, have, version)
        _receive(response, part, count)
    finally:
        response.close()
    _finish(part, known, wanted, total if total is not None else wanted.size)


def _finish(part: Path, known: Path, wanted: Wanted, expected: int | None) -> None:
    """Check a part that should be the whole file, and give it its name."""
    got = part.stat().st_size
    if expected is not None and got < expected:
        raise _Again(f"the connection ended after {got:,} of {expected:,} bytes")
    with part.open("rb") as file:
        begins = file.read(content.HEAD)
    if content.is_page(begins):
        _drop(part, known)
        raise AccessError(f"{wanted.url}: {content.what_is(begins)}")
    problem = f"wrong size: {got:,} bytes, expected {expected:,}" if expected not in (None, got) else None
    problem = problem or fault(part, like=wanted.path)
    if problem:
        _drop(part, known)
        raise _Again(problem)
    try:
        os.replace(part, wanted.path)
        known.unlink(missing_ok=True)
    except OSError as error:
        raise PrepError(f"{wanted.path}: can't be put in its place: {error.strerror or error}") from error


def _begin(
    response: Response, wanted: Wanted, part: Path, known: Path, have: int, version: dict[str, Any]
) -> int | None:
    """Judge the head of an answer; returns the file's whole size where it tells."""
    status, headers = response.status_code, response.headers
    if status in (401, 403):
        raise AccessError(f"{wanted.url}: refused ({status})")
    if status in _TRY_AGAIN:
        wait = str(headers.get("Retry-After", ""))
        raise _Again(f"the server answers {status}", float(wait) if wait.isdigit() else None)
    if status == 416:
        _drop(part, known)
        raise _Again("the part that was there is no part of the file")
    if status not in (200, 206):
        raise PrepError(f"{wanted.path}: the server answers {status} for {wanted.url}")
    if "html" in str(headers.get("Content-Type", "")).lower():
        raise AccessError(f"{wanted.url}: a web page came instead of the file")
    length = str(headers.get("Content-Length", ""))
    total = int(length) if length.isdigit() else None
    if status == 206:
        match = _RANGE.fullmatch(str(headers.get("Content-Range", "")))
        if match is None or int(match[1]) != have:
            _drop(part, known)
            raise _Again(f"asked for bytes from {have:,}, got {headers.get('Content-Range')!r}")
        total = int(match[3])
    now = {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified"), "size": total}
    if status == 206 and now != version:
        _drop(part, known)
        raise _Again("the file has changed on the server since its first part came")
    if wanted.size is not None and total not in (None, wanted.size):
        raise _other_answer(response, wanted, f"wrong size: {total:,} bytes on the server, expected {wanted.size:,}")
    if status == 200:
        _drop(part, known)
        known.write_text(json.dumps(now), encoding="utf-8")
    return total


def _other_answer(response: Response, wanted: Wanted, found: str) -> Exception:
    """What to raise for an answer that isn't the file: its text tells more than its size."""
    try:
        begins = next(iter(response.iter_content(content.HEAD)), b"")
    except OSError:  # the connection broke
        begins = b""
    meaning = content.what_is(begins)
    if content.is_page(begins):
        return AccessError(f"{wanted.url}: {meaning}")
    return _Again(f"{found}; it is {meaning}" if meaning and content.is_text(begins) else found)


def _receive(response: Response, part: Path, count: Callable[[int], None]) -> None:
    """Add the body to what is there; an error of the network asks for another attempt, one of the disk ends it."""
    pieces = iter(response.iter_content(_CHUNK))
    try:
        with part.open("ab") as file:
            while True:
                try:
                    piece = next(pieces, None)
                except OSError as error:
                    raise _Again(f"the connection broke: {error}") from error
                if piece is None:
                    break
                file.write(piece)
                count(len(piece))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PrepError(f"{part}: can't be written: {error.strerror or error}") from error


def _left_over(part: Path, known: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of an earlier attempt, and of which version of the file they are."""
    try:
        version = json.loads(known.read_text(encoding="utf-8"))
        return part.stat().st_size, version
    except (OSError, ValueError):
        _drop(part, known)
        return 0, {}


def _drop(part: Path, known: Path) -> None:
    part.unlink(missing_ok=True)
    known.unlink(missing_ok=True)
