"""Which images a path, folder, pattern or URL stands for: by names, hardly anything is opened."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path, PurePath
from typing import Any, Protocol
from urllib.parse import urlsplit

from rasterio.enums import ColorInterp
from rasterio.errors import RasterioIOError

from biomass_jax.data import band_names, bands
from biomass_jax.data.labels import BIOMASS, is_map
from biomass_jax.data.raster.grid import open_quietly
from biomass_jax.errors import RasterError

_GRANULE = re.compile(
    r"(?P<granule>HLS\.(?P<sensor>[LS]30)\.T(?P<tile>\d{2}[A-Z]{3})\.(?P<date>\d{7})T(?P<time>\d{6})\.v(?P<version>\d+\.\d+))"
    r"(?:\.(?P<layer>[A-Za-z0-9]+))?(?:$|[._-])"
)
# NASA's AppEEARS: `HLSL30.020_B02_doy2020183_aid0001_10N.tif`
_APPEEARS = re.compile(r"HLS[LS]30\.\d{3}_(?P<layer>[A-Za-z0-9]+)_doy(?P<date>\d{7})(?:\d{6})?_aid\d+", re.IGNORECASE)
_SCHEMES = {"http": "/vsicurl/http://", "https": "/vsicurl/https://", "s3": "/vsis3/", "gs": "/vsigs/"}
_SUFFIXES = (".tif", ".tiff", ".vrt")
_OTHER_LAYERS = ("fmask", "saa", "sza", "vaa", "vza")  # quality and angles, beside a granule's bands
# What begins the names of layers beside the bands in archives' folders: `SR_QA_AEROSOL`, `ST_B10`, `SCL`
_OTHER_WORDS = (
    *_OTHER_LAYERS,
    "qa",
    "sr",
    "st",
    "scl",
    "aot",
    "wvp",
    "tci",
    "cld",
    "snw",
    "mask",
    "cloud",
    "cloudmask",
)
MAP_ENDING = f"_{BIOMASS.name}"  # that a map's stem ends with, or another label's name: such are no inputs


@dataclass(frozen=True)
class InputItem:
    """One image: a file, or the single-band files of one HLS granule or of another scene.

    Attributes:
        name: what messages call it.
        paths: files as GDAL opens them; several where each holds one band.
        relative: sub-folder and stem that the output takes below its own folder.
        layers: what a STAC item calls the band of each file; empty where the names of the files tell.
        scales: (scale, offset) that the item tells of each file, or None.
        sensor: that the item tells, as in `BandFile`; so its `season`.
    """

    name: str
    paths: tuple[str, ...]
    relative: PurePath
    layers: tuple[str, ...] = ()
    scales: tuple[tuple[float, float] | None, ...] = ()
    sensor: str | None = None
    season: str = ""


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


@dataclass(frozen=True)
class BandFile:
    """What the name of a file that holds one band of an image tells.

    Attributes:
        scene: the name without the band, the same for all files of an image.
        layer: what the name calls the band, as `bands.resolve` takes it (`B04`, `swir_1`; `Fmask`).
        sensor: `L30`, `S30`, `TM` or None where the name doesn't tell.
        season: the day as a half-open interval `2020-07-01/2020-07-02`, or "" where the name doesn't tell.
        known: whether it is a name of HLS's archives, where no file holds another file's bands.
    """

    scene: str
    layer: str
    sensor: str | None
    season: str
    known: bool


def granule_name(path: str) -> GranuleName | None:
    """What a file's name tells where it is an HLS granule's (`HLS.L30.T10SFF.2020183T184512.v2.0.B04.tif`), or None."""
    match = _GRANULE.match(PurePath(path).name)
    if match is None:
        return None
    layer = None if f".{match['layer']}".casefold() in _SUFFIXES else match["layer"]  # a file's ending is no layer
    return GranuleName(**match.groupdict() | {"layer": layer})


def band_file(path: str) -> BandFile | None:
    """What a file's name tells where it names a band: HLS's own, AppEEARS's, or any with one band in it; else None."""
    granule = granule_name(path)
    if granule is not None:
        layer = granule.layer or ""
        known = band_names.called(layer).number or layer.casefold() in _OTHER_LAYERS
        return BandFile(granule.granule, layer, granule.sensor, season_of(granule.date), True) if known else None
    stem = PurePath(path).stem
    match = _APPEEARS.match(stem)
    if match is not None:
        scene = stem[: match.start("layer")] + stem[match.end("layer") + 1 :]
        return BandFile(scene, match["layer"], band_names.sensor_in(stem), season_of(match["date"]), True)
    scene, found = band_names.split(stem)
    told = [one for one in found if one.number] or found
    if len(told) != 1 or told[0].text is None:
        return None
    return BandFile(scene, told[0].text, band_names.sensor_in(scene), "", False)


def season_of(date: str) -> str:
    """A year and day of the year (`2020183`) as a half-open interval `2020-07-01/2020-07-02`; "" where it is none."""
    try:
        day = datetime.strptime(date, "%Y%j")
    except ValueError:
        return ""
    return f"{day:%Y-%m-%d}/{day + timedelta(days=1):%Y-%m-%d}"


def find_inputs(spec: str | os.PathLike[str]) -> list[InputItem]:
    """The images that a path stands for.

    Args:
        spec: a raster file (VRTs too), a folder (with all below it), a pattern (`*`, `**`), an `http(s)://`, `s3://` or
            `gs://` URL, or a path of GDAL's own (`/vsi...`). The single-band files of one HLS granule are one image,
            and so are other files of one folder whose names differ by the band alone and name all six; layers beside
            them (Fmask, QA ...) are passed over, and so are hidden files, maps (`*_agbd.tif`) and, in folders, anything
            but .tif, .tiff and .vrt.

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
    return not is_map(PurePath(name).stem)


class StacItem(Protocol):
    """What is asked of pystac's items."""

    def to_dict(self) -> dict[str, Any]:
        """The item as STAC writes it."""
        ...


def is_stac_item(value: object) -> bool:
    """Whether something is a STAC item: pystac's, or its dictionary."""
    return isinstance(value, Mapping) or (hasattr(value, "assets") and hasattr(value, "to_dict"))


def stac_input(item: Mapping[str, Any] | StacItem) -> InputItem:
    """The image of a STAC item's assets that hold one band each, known by their keys or the names of their bands.

    Args:
        item: of pystac, or its dictionary (STAC 1.0 and 1.1).

    Raises:
        RasterError: no STAC item, no asset with a known band, or an asset whose file can't be told.
    """
    fields = item if isinstance(item, Mapping) else item.to_dict()
    name = f"STAC item {fields.get('id', '')}"
    if not isinstance(fields.get("assets"), Mapping):
        raise RasterError(
            f"{name}: no STAC item: found fields {', '.join(map(str, fields))}; expected assets among them"
        )
    links = [link for link in fields.get("links", ()) if link.get("rel") == "self"]
    base = str(links[0]["href"]).rpartition("/")[0] if links else ""
    found: dict[tuple[str | None, str | None], tuple[bool, str, str, tuple[float, float] | None]] = {}
    for key, asset in fields["assets"].items():
        layer = _asset_layer(key, asset)
        if layer is None:
            continue
        called = band_names.called(layer)
        tiff = "tiff" in str(asset.get("type", "tiff"))
        one = tiff, layer, _asset_path(str(asset.get("href", "")), base, f"{name}: asset {key}"), _asset_scale(asset)
        if (called.name, called.number) not in found or tiff > found[called.name, called.number][0]:
            found[called.name, called.number] = one  # `red` and `red-jp2` are the same band
    if not found:
        raise RasterError(
            f"{name}: none of its assets is called as a band is; it has {', '.join(map(str, fields['assets']))}"
        )
    _, layers, paths, scales = zip(*found.values(), strict=True)
    properties = fields.get("properties", {})
    told = [properties.get(key, "") for key in ("platform", "constellation", "instruments")]
    granule = granule_name(str(fields.get("id", "")))
    sensor = granule.sensor if granule else bands.sensor_of(" ".join(map(str, told)).replace("etm+", "etm"))
    day = str(properties.get("datetime") or properties.get("start_datetime") or "")[:10]
    try:
        season = f"{day}/{date.fromisoformat(day) + timedelta(days=1)}"
    except ValueError:
        season = ""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", str(fields.get("id", ""))) or "item"
    return InputItem(name, paths, PurePath(stem), layers, scales, sensor, season)


def _asset_layer(key: str, asset: Mapping[str, Any]) -> str | None:
    """What an asset of one band calls it: its key, else the band's name or common name; None where it isn't known."""
    described = asset.get("bands") or asset.get("eo:bands") or [{}]
    roles = asset.get("roles") or ["data"]
    if len(described) != 1 or not {"data", "reflectance"} & set(roles):
        return None
    texts = (key, described[0].get("name"), described[0].get("eo:common_name") or described[0].get("common_name"))
    known = [str(text) for text in texts if text and (band_names.called(text).name or band_names.called(text).number)]
    return known[0] if known else None


def _asset_scale(asset: Mapping[str, Any]) -> tuple[float, float] | None:
    parts = [asset, *(asset.get("raster:bands") or asset.get("bands") or ())[:1]]
    for part in reversed(parts):
        scale, offset = (part.get(f"raster:{name}", part.get(name)) for name in ("scale", "offset"))
        if scale is not None or offset is not None:
            return float(1.0 if scale is None else scale), float(offset or 0.0)
    return None


def _asset_path(href: str, base: str, name: str) -> str:
    """A file as GDAL opens it; a relative one lies beside the item."""
    if not href:
        raise RasterError(f"{name}: it has no href")
    href = href.removeprefix("file://")
    if not urlsplit(href).scheme and not os.path.isabs(href):
        if not base:
            raise RasterError(f"{name}: its href {href} is relative, but the item has no link to itself; make it whole")
        href = f"{base.removeprefix('file://')}/{href.removeprefix('./')}"
    return _remote(href).paths[0] if "://" in href else href


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
    """One item for each file, one for the single-band files of an image."""
    single: list[Path] = []
    scenes: dict[tuple[Path, str], dict[Path, BandFile]] = {}
    for path in paths:
        file = band_file(path.name)
        if file is None:
            single.append(path)
        elif not (file.known and file.layer.casefold() in _OTHER_LAYERS):
            # AppEEARS's users sort its files into a folder a band
            of_band = file.known and path.parent.name.casefold() == file.layer.casefold()
            folder = path.parent.parent if of_band else path.parent
            scenes.setdefault((folder, file.scene), {})[path] = file
    items = []
    whole = {}
    for key, files in scenes.items():
        if _one_image(files):
            whole[key] = files
        else:
            single += files
    for (folder, scene), files in whole.items():
        relative = Path(folder, scene).relative_to(base) if scene or folder != base else PurePath(folder.name)
        items.append(InputItem(str(Path(folder, scene)), tuple(sorted(map(str, files))), PurePath(relative)))
    for path in single:
        if not any(path.parent == folder and _is_beside(path.stem, scene) for folder, scene in whole):
            items.append(InputItem(str(path), (str(path),), path.relative_to(base).with_suffix("")))
    return items


def _one_image(files: dict[Path, BandFile]) -> bool:
    """Whether files whose names differ by the band are the bands of one image."""
    if any(file.known for file in files.values()):
        return True
    if not bands.tells_all([file.layer for file in files.values()]):
        return False
    try:
        with open_quietly(str(next(iter(files)))) as dataset:  # `site_B2.tif` may be an image of six bands
            return dataset.count - (ColorInterp.alpha in dataset.colorinterp) == 1
    except RasterioIOError:
        return True  # whoever opens the image says what is wrong with it


def _is_beside(stem: str, scene: str) -> bool:
    """Whether a name is that of a layer beside the bands of a scene, as `SCENE_QA_PIXEL` is."""
    words, of_scene = re.findall(r"[A-Za-z0-9]+", stem), re.findall(r"[A-Za-z0-9]+", scene)
    others = [word for word in words if word not in of_scene]
    return set(of_scene) <= set(words) and bool(others) and others[0].casefold() in _OTHER_WORDS


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
