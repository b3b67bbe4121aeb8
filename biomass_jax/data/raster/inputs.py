"""Which images a path, folder, pattern or URL stands for; nothing is opened here."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from biomass_jax.errors import RasterError

_GRANULE = re.compile(
    r"(?P<granule>HLS\.(?P<sensor>[LS]30)\.T(?P<tile>\d{2}[A-Z]{3})\.(?P<date>\d{7})T(?P<time>\d{6})\.v(?P<version>\d+\.\d+))"
    r"(?:\.(?P<layer>[A-Za-z0-9]+))?(?:$|[._-])"
)
_SCHEMES = {"http": "/vsicurl/http://", "https": "/vsicurl/https://", "s3": "/vsis3/", "gs": "/vsigs/"}
_SUFFIXES = (".tif", ".tiff", ".vrt")
_OTHER_LAYERS = ("fmask", "saa", "sza", "vaa", "vza")  # quality and angles, beside a granule's bands
MAP_ENDING = "_agbd"  # what a map's stem ends with: never an input of a folder or a pattern


@dataclass(frozen=True)
class InputItem:
    """One image: a file, or the single-band files of one HLS granule.

    Attributes:
        name: what messages call it.
        paths: files as GDAL opens them; several only for a granule.
        relative: sub-folder and stem that the output takes below its own folder.
    """

    name: str
    paths: tuple[str, ...]
    relative: PurePath


@dataclass(frozen=True)
class GranuleName:
    """What the name of an HLS file tells: granule, sensor, MGRS tile, day of the year, time, layer (`B04`, `Fmask`)."""

    granule: str
    sensor: str
    tile: str
    date: str
    time: str
    version: str
    layer: str | None

    @property
    def season(self) -> str:
        """The day as a half-open interval `2020-07-01/2020-07-02`, or "" where the name holds no day of the year."""
        try:
            day = datetime.strptime(self.date, "%Y%j")
        except ValueError:
            return ""
        return f"{day:%Y-%m-%d}/{day + timedelta(days=1):%Y-%m-%d}"


def granule_name(path: str) -> GranuleName | None:
    """What a file's name tells where it is an HLS granule's (`HLS.L30.T10SFF.2020183T184512.v2.0.B04.tif`), or None."""
    match = _GRANULE.match(PurePath(path).name)
    if match is None:
        return None
    layer = None if f".{match['layer']}".casefold() in _SUFFIXES else match["layer"]  # a file's ending is no layer
    return GranuleName(**match.groupdict() | {"layer": layer})


def find_inputs(spec: str | os.PathLike[str]) -> list[InputItem]:
    """The images that a path stands for.

    Args:
        spec: a raster file (VRTs too), a folder (with all below it), a pattern (`*`, `**`), an `http(s)://`, `s3://` or
            `gs://` URL, or a path of GDAL's own (`/vsi...`). The single-band files of one HLS granule are one image.
            Hidden files, maps (`*_agbd.tif`) and, in folders, anything but .tif, .tiff and .vrt are passed over.

    Returns:
        InputItems sorted by output name.

    Raises:
        RasterError: nothing there, or two images with the same output name.
    """
    text = os.fspath(spec)
    if "://" in text or text.startswith("/vsi"):
        return [_remote(text)]
    path = Path(text).expanduser()
    if path.is_dir():
        items = _grouped(_walk(path), path)
        looked = f"{path}: no images in this folder or below it"
    elif path.exists():
        return [InputItem(str(path), (str(path),), PurePath(path.stem))]
    elif glob.has_magic(text):
        items = _matching(os.path.expanduser(text))
        looked = f"{text}: no image matches this pattern"
    else:
        raise RasterError(f"{text}: no such file or folder")
    if not items:
        raise RasterError(
            f"{looked}; looked for {', '.join('*' + s for s in _SUFFIXES)} and HLS granules' band files "
            f"(*.B04.tif ...), leaving out hidden files, Fmask and angle layers and maps (*{MAP_ENDING}.tif)"
        )
    return _without_clashes(items)


def _remote(text: str) -> InputItem:
    if text.startswith("/vsi"):
        path, shown = text, text
    else:
        parts = urlsplit(text)
        if parts.scheme.lower() not in _SCHEMES:
            raise RasterError(
                f"{text}: unknown kind of URL; expected {', '.join(s + '://' for s in _SCHEMES)} or /vsi..."
            )
        path = _SCHEMES[parts.scheme.lower()] + text.split("://", 1)[1]
        host = parts.netloc.rpartition("@")[2]
        shown = f"{parts.scheme}://{host}{parts.path}"  # a signed URL's query and a password stay out of messages
    return InputItem(shown, (path,), PurePath(PurePath(urlsplit(shown).path).stem))


def _walk(folder: Path) -> Iterator[Path]:
    """Image files in a folder and below, through linked folders too but into none twice."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES and _is_source(name):
                yield Path(root, name)


def _is_source(name: str) -> bool:
    return not PurePath(name).stem.endswith(MAP_ENDING)


def _matching(pattern: str) -> list[InputItem]:
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    explicit = bool(Path(pattern).suffix) and not glob.has_magic(Path(pattern).suffix)  # `*.jp2` asks for JPEG 2000
    files: list[Path] = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            # `**` lists every folder below as well as the files in it; only a last part without it means the folder
            files += [] if Path(pattern).name == "**" else _walk(Path(match))
        elif _is_source(match) and (explicit or Path(match).suffix.lower() in _SUFFIXES):
            files.append(Path(match))
    return _grouped(dict.fromkeys(files), base)


def _grouped(paths: Iterable[Path], base: Path) -> list[InputItem]:
    """One item for each file, one for each granule's single-band files."""
    items = []
    granules: dict[Path, list[str]] = {}
    for path in paths:
        name = granule_name(path.name)
        if name is not None and name.layer is not None and re.fullmatch(r"B\d[\dA]", name.layer):
            granules.setdefault(path.parent / name.granule, []).append(str(path))
        elif name is None or (name.layer or "").casefold() not in _OTHER_LAYERS:
            items.append(InputItem(str(path), (str(path),), path.relative_to(base).with_suffix("")))
    for granule, files in granules.items():
        items.append(InputItem(str(granule), tuple(sorted(files)), PurePath(granule.relative_to(base))))
    return items


def _without_clashes(items: list[InputItem]) -> list[InputItem]:
    by_output: dict[PurePath, InputItem] = {}
    for item in items:
        other = by_output.setdefault(item.relative, item)
        if other is not item:
            raise RasterError(
                f"{other.name} and {item.name} would both become {item.relative}{MAP_ENDING}.tif; "
                "rename one, or give them in separate runs"
            )
    return sorted(items, key=lambda item: str(item.relative))
