"""What belongs to a map beside its pixels: its name, its tags, whether it is finished, what failed."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from biomass_jax import figures
from biomass_jax.bundle import Bundle
from biomass_jax.data.bands import no_data, parse_band_list
from biomass_jax.data.raster import stac
from biomass_jax.data.raster.encoding import AUTO
from biomass_jax.data.raster.image import ImageSource, read_preview, read_tags
from biomass_jax.data.raster.resample import MaskSource, mask_identity
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import BiomassError, PredictionError, RasterError, refuse_empty
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import write_text
from biomass_jax.runtime.settings import changed_fields
from biomass_jax.version import __version__

log = logging.getLogger(__name__)

# A finished map is kept only where all of these are what a new one would carry.
IDENTITY = ("MODEL_SHA256", "MODEL", "SETTINGS", "SOURCE_READING", "SOURCE_SIZE", "SOURCE_MTIME_NS", "SOURCE_FILES")
_MODEL_FIELDS = ("task", "architecture", "input", "output")  # of bundle.json, on which values depend
QUICKLOOK_SIZE = 1000  # px of the longer side
LAYER_TITLES = {"agbd": "Above-ground biomass"}
UNIT_TITLES = {"Mg ha-1": "Mg/ha"}
TIFF_SUFFIXES = (".tif", ".tiff")


@dataclass
class MapOptions:
    """How maps are made from files, beside the predictor's own settings.

    Attributes:
        bands: names of the files' bands where their descriptions don't say, None for an unused band; see
            `bands.parse_band_list` for how it may be spelled.
        encoding: what the files' numbers are, one of `encoding.ENCODINGS`.
        resample: metres, of the pixels that finer images are brought to; None to refuse them.
        mask: a raster of classes on any grid; pixels of other classes than `mask_keep` become no-data.
        mask_keep: the classes to keep.
        allow_empty: write a map as well where fewer than 0.1 % of its pixels get a value.
        overwrite: make maps again that are finished.
        quicklook: write a PNG beside each map.
        style: write a style of QGIS and a colour ramp of GDAL beside each map.
        stac: write a STAC item beside each map.
        progress: show a bar on a terminal, lines in a log.

    Raises:
        PredictionError: half a mask.
        RasterError: a mask that can't be opened, which no map could be made with.
    """

    bands: Any = None
    encoding: str = AUTO
    resample: float | None = None
    mask: str | os.PathLike[str] | None = None
    mask_keep: Sequence[int] | None = None
    allow_empty: bool = False
    overwrite: bool = False
    quicklook: bool = False
    style: bool = False
    stac: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        self.bands = parse_band_list(self.bands)
        self.mask = None if self.mask is None else os.fspath(self.mask)
        self.mask_keep = tuple(self.mask_keep) if self.mask_keep else None
        if (self.mask is None) != (self.mask_keep is None):
            raise PredictionError(
                f"mask is {self.mask!r} and mask_keep is {self.mask_keep!r}: give both or neither, the raster and "
                "the classes in it to keep"
            )
        self._mask_identity = None if self.mask is None else mask_identity(self.mask)

    def settings(self) -> dict[str, Any]:
        """What a map's values depend on; a mask counts by what it is read from as well."""
        found: dict[str, Any] = {"bands": self.bands, "encoding": self.encoding, "resample": self.resample}
        found |= {"mask": self.mask, "mask_keep": self.mask_keep}
        if self.mask is not None:
            mask = os.path.abspath(self.mask) if os.path.exists(self.mask) else self.mask
            found |= {"mask": mask, "mask_identity": self._mask_identity}
        return found


@dataclass(frozen=True)
class MapResult:
    """One finished map; `os.fspath` gives its path.

    status: `written` or `skipped` (finished before). seconds: of the whole map. timings: seconds in `read`, `compute`
    (waiting for the device), `blend`, `write`, and `verify` and `copy` (the COG) after the last row; the first four
    overlap. mask_share: share of pixels with data that the mask keeps, None without a mask or where skipped.
    """

    source: str
    path: Path
    status: str
    chips: int = 0
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    mask_share: float | None = None

    def __fspath__(self) -> str:
        return str(self.path)


def map_path(dst: str | os.PathLike[str], relative: PurePath, name: str) -> Path:
    """`DST/<sub-folder>/<stem>_<name>.tif`, or DST itself where it ends in .tif."""
    if is_tiff_path(dst):
        return Path(dst)
    return Path(dst) / relative.parent / f"{relative.name}_{name}.tif"


def is_tiff_path(dst: str | os.PathLike[str]) -> bool:
    """Whether a destination means a file and not a folder."""
    return Path(dst).suffix.lower() in TIFF_SUFFIXES and not Path(dst).is_dir()


def quicklook_path(path: Path) -> Path:
    """`<map's stem>_quicklook.png` beside the map."""
    return path.with_name(f"{path.stem}_quicklook.png")


def colours_path(path: Path) -> Path:
    """`<map's stem>_colours.txt` beside the map."""
    return path.with_name(f"{path.stem}_colours.txt")


def style_path(path: Path) -> Path:
    """`<map's stem>.qml` beside the map, where QGIS looks for it."""
    return path.with_name(f"{path.stem}.qml")


def map_tags(source: ImageSource, bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a map: where it comes from and all that its values depend on."""
    identity = source.identity()
    shell = environment.recorded()
    return {
        "AREA_OR_POINT": "Area",
        "DATA_SOURCES": _data_sources(source),
        "SEASON": source.season or "unknown",
        "SENSORS": source.sensor or "unknown",
        "MODEL_SHA256": bundle.weights_sha256,
        "MODEL": json.dumps({name: bundle.meta.get(name) for name in _MODEL_FIELDS}, sort_keys=True),
        "SOFTWARE": f"biomass_jax {__version__}",
        "SETTINGS": json.dumps(settings, sort_keys=True),
        "SOURCE_SIZE": str(identity["size"]),
        "SOURCE_MTIME_NS": str(identity["mtime_ns"]),
        "SOURCE_FILES": identity["files"],
        "SOURCE_READING": json.dumps(source.reading(), sort_keys=True),
        **({"ENVIRONMENT": json.dumps(shell)} if shell else {}),
    }


def _data_sources(source: ImageSource) -> str:
    """What the image says that it was made from (SCENES is our composites' tag), else the names of its files."""
    scenes = source.tags.get("SCENES", "").replace(",", "; ")
    return source.tags.get("DATA_SOURCES") or scenes or "; ".join(source.sources)


def is_finished(path: Path, tags: Mapping[str, str]) -> bool:
    """Whether a whole map with these tags lies there; what has changed is logged where another one does."""
    if not path.is_file():
        return False
    try:
        found = read_tags(path)
        verify_blocks(path)
    except RasterError as error:
        log.info("%s: is made again: %s", path, error)
        return False
    changes = [change for key in IDENTITY if found.get(key) != tags[key] for change in _changes(key, found, tags)]
    if changes:
        more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
        log.info("%s: is made again: %s%s", path, changes[0], more)
    return not changes


def _changes(key: str, found: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A sentence for each difference within one tag."""
    if key not in found:
        return [f"it has no tag {key}, being an older version's, so nothing tells whether that is the same"]
    try:
        before, after = json.loads(found[key]), json.loads(now[key])
    except ValueError:
        before = after = None
    if isinstance(before, dict) and isinstance(after, dict):
        return changed_fields(before, after, f"{key}.")
    return [f"{key}: was {found[key]}, now {now[key]}"]


class MapReader:
    """Rows of an image with the pixels that get a value, and the mask's share of those with data."""

    def __init__(self, source: ImageSource, mask: MaskSource | None) -> None:
        self._source, self._mask = source, mask
        self._data = self._kept = 0  # pixels with data, and those of them that the mask keeps

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (rows, W, bands) and bool (rows, W), True where the map gets a value."""
        pixels = self._source.read_rows(start, stop)
        wanted = ~no_data(pixels, self._source.fill)
        self._data += int(np.count_nonzero(wanted))
        if self._mask is not None:
            wanted &= self._mask.read_rows(start, stop)
        self._kept += int(np.count_nonzero(wanted))
        return pixels, wanted

    def refuse_empty(self, allowed: bool) -> None:
        """PredictionError where (nearly) no pixel of all that were read gets a value, unless that is allowed."""
        grid = self._source.grid
        what = "pixels with data"
        if self._mask is not None and self._data:
            what = f"pixels of the {self._data:,} with data that the mask {self._mask.name} keeps"
        refuse_empty(
            PredictionError, self._kept, grid.height * grid.width, f"{self._source.name}: {what}", allowed=allowed
        )

    @property
    def share(self) -> float | None:
        """Share of the pixels with data that the mask keeps; None without a mask."""
        return None if self._mask is None else self._kept / max(self._data, 1)


def write_beside(
    source: ImageSource, path: Path, options: MapOptions, layer: str, unit: str, *, missing_only: bool
) -> None:
    """Write what is wanted beside a finished map: its picture, its colours, its STAC item.

    Args:
        source: the map's image, open.
        path: the map.
        options: what is wanted.
        layer: name of the map's band.
        unit: its unit.
        missing_only: leave what lies there, the map being the same as before.

    Raises:
        RasterError: the image or the map can't be read.
        OSError: a file can't be written.
    """

    def due(wanted: bool, *places: Path) -> bool:
        return wanted and not (missing_only and all(place.is_file() for place in places))

    named = {"name": LAYER_TITLES.get(layer, layer), "unit": UNIT_TITLES.get(unit, unit)}
    if due(options.quicklook, quicklook_path(path)):
        _write_quicklook(source, path, **named)
    if due(options.style, style_path(path), colours_path(path)):
        style, ramp = figures.map_style(read_preview(path, QUICKLOOK_SIZE), **named)
        write_text(style_path(path), style)
        write_text(colours_path(path), ramp)
    if due(options.stac, stac.item_path(path)):
        stac.write_item(path, source.name)


def _write_quicklook(source: ImageSource, path: Path, *, name: str, unit: str) -> None:
    """Draw a finished map beside its image, both at reduced size."""
    image = source.read_preview(QUICKLOOK_SIZE)
    colours = [source.bands.index(name) for name in ("RED", "GREEN", "BLUE")]
    values = read_preview(path, QUICKLOOK_SIZE)
    figures.quicklook(
        quicklook_path(path), image[..., colours], values, title=PurePath(source.name).name, name=name, unit=unit
    )


def reason(name: str, error: Exception) -> str:
    """What went wrong with an input, without its name, which messages begin with."""
    text = (str(error).strip() or "no message").removeprefix(f"{name}: ")
    return text if isinstance(error, BiomassError) else f"{type(error).__name__}: {text}"


def failure_table(failures: Sequence[tuple[str, Exception]], total: int) -> str:
    """A table of inputs and what went wrong with each."""
    width = min(max(len(name) for name, _ in failures), 60)
    lines = [f"{len(failures)} of {total} inputs failed:"]
    lines += [f"  {name:<{width}}  {reason(name, error)}" for name, error in failures]
    return "\n".join(lines)
