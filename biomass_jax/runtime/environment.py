"""What the shell says: what bears on results is left out, the rest recorded; a known error becomes one sentence.

Nothing here starts JAX, GDAL or PROJ. They read the environment when they start, so a command calls `settle` first.
"""

import mmap
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from biomass_jax.errors import BiomassError, UsageError

# Results must not hang on these: JAX's types, draws and precision, and whatever GDAL and PROJ read and place otherwise.
# What GDAL needs to reach files (logins, proxies, certificates, a folder of drivers) and to tell what it does stays.
_LEFT_OUT = re.compile(
    r"JAX_.*(X64|PRECISION|DTYPE|PROMOTION|PRNG|THREEFRY|RANDOM|CUSTOM_[JV][VJ]P|F16_REDUCTIONS|DYNAMIC_RANGE).*"
    r"|NVIDIA_TF32_OVERRIDE"
    r"|(GDAL|GTIFF|OGR|OSR|VRT|VSI|OPJ|TIFF)_(?!HTTP_|DRIVER_PATH$|CURL_CA_BUNDLE$|CONFIG_FILE$).*"
    r"|GDAL_HTTP_(MAX_RETRY|RETRY_.*|.*TIMEOUT|LOW_SPEED_.*|MULTI.*|MERGE_.*)"
    r"|(COMPRESS|INTERLEAVE|PREDICTOR|PHOTOMETRIC|BIGTIFF|SPARSE_OK|JPEG_QUALITY)_OVERVIEW|USE_RRD|TIFF_USE_OVR"
    r"|CPL_VSIL_CURL_(ALLOWED_EXTENSIONS|CHUNK_SIZE|CACHE_SIZE|NON_CACHED)"
    r"|PROJ_(LIB|DATA|NETWORK.*|ONLY_BEST_DEFAULT|AUX_DB|IGNORE_.*)"
    r"|CHECK_WITH_INVERT_PROJ|CENTER_LONG"
)
_FAST_MATH = re.compile(r"--xla_(cpu|gpu)_.*fast_m|--xla_allow_excess_precision")
# What stays and may change the last digits, or what is noticed.
_RECORDED = re.compile(
    r"XLA_FLAGS|LIBTPU_INIT_ARGS|JAX_(PLATFORMS|PLATFORM_NAME|NUM_CPU_DEVICES|DISABLE_.*|DEBUG_(NANS|INFS)|DEFAULT_DEVICE"
    r"|.*OPTIMIZATION.*|ENABLE_CHECKS)|TF_.*DETERMINI.*|NCCL_ALGO|CUBLAS_WORKSPACE_CONFIG|OMP_NUM_THREADS|TZ|LANG|LC_(ALL|NUMERIC)"
)
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GDAL_CURL_CA_BUNDLE")
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy", "GDAL_HTTP_PROXY")


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr)


def settle(say: Callable[[str], None] = _warn, *, jax: bool = True) -> None:
    """Take what bears on results out of this process's environment; to be called before JAX, GDAL or PROJ start.

    Args:
        say: is told which variables were left out, in one line; standard error where nothing is given.
        jax: whether JAX will be started.

    Raises:
        UsageError: flags by which JAX would end the process without a word on what to do.
    """
    left_out = sorted(name for name in os.environ if _LEFT_OUT.fullmatch(name))
    for name in left_out:
        del os.environ[name]
    flags = os.environ.get("XLA_FLAGS", "").split()
    if fast := [flag for flag in flags if _FAST_MATH.match(flag)]:
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if flag not in fast)
        left_out += [f"{' '.join(fast)} of XLA_FLAGS"]
    if left_out:
        say(f"left out of the environment, because results would hang on it: {', '.join(left_out)}")
    if jax:
        _check_xla_flags()


def recorded() -> dict[str, str]:
    """The variables of this process that may bear on results and stay: {name: value}, for provenance."""
    return {name: value for name, value in sorted(os.environ.items()) if _RECORDED.fullmatch(name)}


def _check_xla_flags() -> None:
    """XLA ends the process at a flag that it doesn't know; the names of those it knows stand in its library."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flags and not flags[0].startswith("--"):
        if not Path(flags[0]).is_file():
            raise UsageError(
                f"XLA_FLAGS is {flags[0]!r}, neither flags that begin with -- nor a file of them; correct it"
            )
        return
    place = find_spec("jaxlib")
    libraries = sorted(Path(place.origin).parent.glob("*.so")) if place and place.origin else []
    if not flags or not libraries:
        return
    with (
        open(max(libraries, key=lambda path: path.stat().st_size), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        for flag in flags:
            name = flag.removeprefix("--").partition("=")[0]
            if library.find(name.encode()) < 0:
                raise UsageError(
                    f"XLA_FLAGS holds --{name}, which this version of XLA doesn't know; take it out (flags of TPUs "
                    "belong into LIBTPU_INIT_ARGS)"
                )


def explain(error: BaseException | str) -> str | None:
    """One sentence on what in the environment an error comes from and what to do, None where it comes from elsewhere.

    Args:
        error: of JAX, CUDA, GDAL, PROJ, HDF5 or a connection, also as the cause of another one; or its text.
    """
    text = error if isinstance(error, str) else " ".join(_texts(error))
    for pattern, sentence in _FAULTS:
        if (found := re.search(pattern, text)) and (said := sentence(found)):
            return said
    return _proxy(text)


def told(error: Exception) -> str | None:
    """An error in the words for its user, with what `explain` says; None for a fault of the program."""
    why = explain(error)
    if isinstance(error, BiomassError):
        return str(error) if why is None or why in str(error) else f"{error}; {why}"
    return why


def failed(error: Exception, *known: type[Exception]) -> int:
    """Print an error that is for the user as one line; the exit code 1.

    Args:
        error: what a command ended with.
        known: types whose message is for the user as it is, beside those of `told`.

    Raises:
        Exception: the error itself, a fault of the program.
    """
    line = told(error)
    if line is None and isinstance(error, known):
        line = " ".join(str(error).split())
    if line is None:
        raise error
    print(f"error: {line}", file=sys.stderr)
    return 1


def _texts(error: BaseException | None) -> Iterator[str]:
    """Types and messages of an error and its causes; of JAX's bare assertion, where it was raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = traceback.extract_tb(error.__traceback__)
        inside = "in xla_bridge" if frames and frames[-1].filename.endswith("xla_bridge.py") else ""
        yield f"{type(error).__name__}{inside and f' {inside}'}: {error}"
        error = error.__cause__ or error.__context__


def _set(*names: str) -> tuple[str, str] | None:
    """The first of the variables that is set, and its value."""
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), None)


def _platforms(found: re.Match[str]) -> str | None:
    given = _set("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    return given and (
        f"{given[0]} is {given[1]!r}, but this machine, or this installation of JAX, has no such devices: unset it to "
        "take what there is, or install JAX for them (pip install 'biomass-jax[cuda]' or '[tpu]')"
    )


def _flag(found: re.Match[str]) -> str:
    name = next(filter(None, found.groups())).upper()
    return f"{name} is {os.environ.get(name)!r}, which JAX can't read; correct or unset it"


def _cuda(found: re.Match[str]) -> str:
    libraries = _set("LD_LIBRARY_PATH")
    other = f"; LD_LIBRARY_PATH, {libraries[1]}, may name those of another version" if libraries else ""
    return (
        f"CUDA can't be used ({found[0]}): bring NVIDIA's driver and JAX's CUDA libraries to versions that fit each "
        f"other{other}; JAX_PLATFORMS=cpu does without"
    )


def _proj(found: re.Match[str]) -> str:
    given = _set("PROJ_DATA", "PROJ_LIB")
    if given is None:
        return "PROJ doesn't find its own data: install rasterio and pyproj anew"
    return f"{given[0]} is {given[1]}, which doesn't hold the data of this program's PROJ; unset it"


def _gdal(found: re.Match[str]) -> str | None:
    given = [(name, os.environ[name]) for name in ("GDAL_DATA", "GDAL_DRIVER_PATH") if os.environ.get(name)]
    return (
        given[0] and f"{given[0][0]} is {given[0][1]}, which doesn't fit this program's GDAL; unset it"
        if given
        else None
    )


def _locking(found: re.Match[str]) -> str:
    given = os.environ.get("HDF5_USE_FILE_LOCKING", "not set")
    return (
        f"HDF5_USE_FILE_LOCKING is {given}: another program writes to the file, or its file system knows no locks; set "
        "HDF5_USE_FILE_LOCKING=FALSE for the latter"
    )


def _plugins(found: re.Match[str]) -> str:
    given = os.environ.get("HDF5_PLUGIN_PATH", "not set")
    return f"HDF5_PLUGIN_PATH is {given}: HDF5 finds no usable filter there; correct or unset it"


def _certificates(found: re.Match[str]) -> str:
    given = [(name, os.environ[name]) for name in _CERTIFICATES if os.environ.get(name)]
    for name, value in given:
        if not os.path.exists(value):
            return f"{name} is {value}, and there is nothing; correct or unset it"
    if given:
        return f"{given[0][0]} is {given[0][1]}, which doesn't vouch for the server; correct or unset it"
    return "nothing vouches for the server; set SSL_CERT_FILE to a file with your network's certificates"


def _proxy(text: str) -> str | None:
    """Of a proxy that is set, where an error is about proxies, names its host, or can't read an address."""
    for name in _PROXIES:
        value = os.environ.get(name, "")
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            host = parts.hostname if parts.port != 0 else None
        except ValueError:
            host = None
        about = r"\bprox(y|ies)\b|ProxyError"
        about += r"|IPv6 URL|nonnumeric port|invalid.* port|malformed" if host is None else ""
        meets = host is not None and host in text and re.search(r"(?i)connect|resolve|refused", text)
        if value and (meets or re.search(about, text, re.IGNORECASE)):
            shown = re.sub(r"[^/@]*@", "", value)
            return f"{name} is {shown}, a proxy that can't be used; correct or unset it (NO_PROXY names hosts without)"
    return None


# What an error's text holds, and who says what to do about it; the first that fits.
_FAULTS: tuple[tuple[str, Callable[[re.Match[str]], str | None]], ...] = (
    (r"CUDA driver version is insufficient[^.;\n]*|CUDA_ERROR_\w+|no supported devices found for platform CUDA", _cuda),
    (r"lib(cu|nv)\w+\.so[.\d]*: cannot open shared object file|Unable to load (cu\w+|CUDA)|PTX was compiled", _cuda),
    (r"AssertionError in xla_bridge|Unable to initialize backend|Unknown backend", _platforms),
    (r"for JAX flag (jax_\w+)|for environment '?(JAX_\w+)", _flag),
    (r"DATABASE\.LAYOUT\.VERSION|proj\.db", _proj),
    (r"unable to lock file|[Ff]ile locking", _locking),
    (r"required filter|filter plugin|plugin.*(HDF5|filter)|can't open.* plugin", _plugins),
    (r"(?i)certificate|CA bundle|CAfile|\bSSL: ", _certificates),
    (r"Drivers not registered|GDAL_DATA|GDAL_DRIVER_PATH|gdal_\w+\.so|undefined symbol", _gdal),
)
