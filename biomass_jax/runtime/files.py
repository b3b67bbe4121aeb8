"""Where data and runs may lie: paths of this machine, mounted buckets among them."""

import re
from os import PathLike

from biomass_jax.errors import StorageError

# One slash, too: that is what a Path makes of gs://.
BUCKET = re.compile(r"^(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<bucket>[^/]*)/?(?P<rest>.*)$", re.IGNORECASE | re.DOTALL)

MOUNTS = {
    "gs": "gcsfuse --implicit-dirs --rename-dir-limit=100000 {bucket} {folder}",
    "s3": "mount-s3 --allow-delete --allow-overwrite {bucket} {folder}",
}


def check_local(path: str | PathLike[str] | None, field: str) -> None:
    """Refuse an object store's address where a path is wanted, and say how to mount the bucket.

    Args:
        path: as given; None and a path are fine.
        field: the flag or the config's field, for the message.

    Raises:
        StorageError: `path` begins with gs://, s3:// or another scheme.
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
    raise StorageError(
        f"{field} is {scheme}://{found['bucket']}/{rest}; expected a path of this machine. First {advice}, then give "
        f"{given} (launch/README.md, 'Buckets')"
    )
