"""Files and folders that appear whole or not at all, their checksums, and where they may lie."""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from biomass_jax.errors import UsageError
from biomass_jax.runtime import system

# One slash, too: that is what a Path makes of gs://.
BUCKET = re.compile(r"^(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<bucket>[^/]*)/?(?P<rest>.*)$", re.IGNORECASE | re.DOTALL)

MOUNTS = {
    "gs": "gcsfuse --implicit-dirs --rename-dir-limit=100000 {bucket} {folder}",
    "s3": "mount-s3 --allow-delete --allow-overwrite {bucket} {folder}",
}


def expanded(given: Iterable[str]) -> list[str]:
    """Paths, each pattern (`maps/*.tif`) as the files that it fits, sorted; one that fits none stays as it is."""
    return [path for text in given for path in (sorted(glob.glob(text)) or [text])]


def check_local(path: str | PathLike[str] | None, field: str) -> None:
    """Refuse an object store's address where a path is wanted, and say how to mount the bucket.

    Args:
        path: as given; None and a path are fine.
        field: the flag or the config's field, for the message.

    Raises:
        UsageError: `path` begins with gs://, s3:// or another scheme.
    """
    found = BUCKET.match(str(path)) if path is not None else None
    if not found:
        return
    scheme, bucket, rest = found["scheme"].lower(), found["bucket"] or "BUCKET", found["rest"]
    folder = f"/mnt/{bucket}"
    mount = MOUNTS.get(scheme)
    if mount is None:
        advice = "copy it here, or mount the storage"
    else:
        command = mount.format(bucket=bucket, folder=folder)
        advice = f"mount the bucket: `mkdir -p {folder} && {command}`"
    given = f"{folder}/{rest}".rstrip("/")
    raise UsageError(
        f"{field} is {scheme}://{found['bucket']}/{rest}; expected a path of this machine. First {advice}, then give "
        f"{given} (launch/README.md, 'Buckets')"
    )


@contextmanager
def replacing(path: str | PathLike[str], suffix: str = "") -> Iterator[Path]:
    """A hidden place beside a file to write to; at the block's end it is flushed to the disk and renamed.

    Where the block fails, the place is cleared and the file stays as it was.

    Args:
        path: the file; its folder exists.
        suffix: ending of the hidden name, for libraries that go by it.

    Raises:
        OSError: the folder can't be written, or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial{suffix}")
    try:
        yield partial
        system.flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file whole; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | PathLike[str], value: object, *, indent: int | None = 2) -> None:
    """Write a JSON file whole, with a newline at its end; see `replacing`.

    Raises:
        ValueError: NaN or an infinite number, which JSON doesn't have.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name; one of that name is put aside as `.{name}.old` first and deleted last."""
    aside = target.parent / f".{target.name}.old"
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    source.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_of(path: str | PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
