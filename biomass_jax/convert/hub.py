"""Files of the Hugging Face hub, named `hf://OWNER/REPO/FILE` or `hf://OWNER/REPO@REVISION/FILE`."""

import re
from pathlib import Path

from biomass_jax.errors import ConvertError

PREFIX = "hf://"
_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?/(?P<file>[^/].*)")


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the hub's."""
    return name.startswith(PREFIX)


def hint(url: str) -> str:
    """The hub's name of a file whose page or download is at this address, as the end of a sentence; '' of others."""
    found = re.fullmatch(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/(?:blob|resolve|raw)/([^/]+)/([^?#]+).*", url)
    if found is None:
        return ""
    revision = "" if found[2] == "main" else f"@{found[2]}"
    return f", or give {PREFIX}{found[1]}{revision}/{found[3]}"


def fetch(name: str) -> Path:
    """Download a file of the hub, or find it in the local cache.

    Args:
        name: `hf://OWNER/REPO/FILE`, FILE with sub-folders where there are any; `REPO@REVISION` picks a branch, tag or
            commit (a slash in its name written %2F).

    Returns:
        The local file.

    Raises:
        ConvertError: the name has another form, huggingface_hub is not installed, or the download failed.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConvertError(f"{name}: expected hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE")
    try:
        import huggingface_hub
    except ImportError:
        raise ConvertError(
            f"{name}: reading from the hub needs huggingface_hub: pip install 'biomass-jax[hub]' "
            "(or download the file yourself and give its path)"
        ) from None
    revision = found["revision"]
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo_id=found["repo"],
                filename=found["file"],
                revision=revision.replace("%2F", "/") if revision else None,
            )
        )
    except Exception as error:  # the library's own errors, its HTTP client's and the system's: all mean "not fetched"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConvertError(f"{name}: could not be fetched ({type(error).__name__}: {reason})") from error


def commit_of(path: Path) -> str | None:
    """The commit a file in the hub's cache belongs to (`.../snapshots/COMMIT/FILE`), None where the path has none."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
