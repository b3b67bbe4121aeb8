"""Maps as files: their names and tags, whether they are finished, what failed, and how they are written."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeVar

from biomass_jax import figures
from biomass_jax.bundle import Bundle
from biomass_jax.data.labels import title_of, unit_text
from biomass_jax.data.raster import stac
from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.image import ImageSource, open_image, read_preview, read_tags
from biomass_jax.data.raster.inputs import InputItem
from biomass_jax.data.raster.stac import quicklook_path
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import BiomassError, BundleError, RasterError
from biomass_jax.prediction.layers import DI
from biomass_jax.prediction.pixels import MapOptions, Mapper, MapPixels, check_source
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import write_text
from biomass_jax.runtime.progress import duration
from biomass_jax.runtime.settings import changed_fields
from biomass_jax.version import __version__

log = logging.getLogger(__name__)

# A finished map is kept only where all of these are what a new one would carry.
IDENTITY = ("MODEL_SHA256", "MODEL", "SETTINGS", "SOURCE_READING", "SOURCE_SIZE", "SOURCE_MTIME_NS", "SOURCE_FILES")
_MODEL_FIELDS = ("task", "architecture", "input", "output")  # of bundle.json, on which values depend
QUICKLOOK_SIZE = 1000  # px of the longer side
TIFF_SUFFIXES = (".tif", ".tiff")
Failure = tuple[str, Exception]  # the input's name, what went wrong


class Named(Protocol):
    """What `make_maps` asks of an input."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...


Item = TypeVar("Item", bound=Named)


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


def layer_title(layer: str) -> str:
    """What a layer of a map is, as pictures and arrays say it."""
    return "Dissimilarity to the training chips" if layer == DI else title_of(layer)


def map_path(dst: str | os.PathLike[str], relative: PurePath, name: str) -> Path:
    """`DST/<sub-folder>/<stem>_<name>.tif`, or DST itself where it ends in .tif."""
    if is_tiff_path(dst):
        return Path(dst)
    return Path(dst) / relative.parent / f"{relative.name}_{name}.tif"


def is_tiff_path(dst: str | os.PathLike[str]) -> bool:
    """Whether a destination means a file and not a folder."""
    return Path(dst).suffix.lower() in TIFF_SUFFIXES and not Path(dst).is_dir()


def colours_path(path: Path) -> Path:
    """`<map's stem>_colours.txt` beside the map."""
    return path.with_name(f"{path.stem}_colours.txt")


def map_tags(source: ImageSource, bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a map: where it comes from and all that its values depend on."""
    identity = source.identity()
    return {
        "AREA_OR_POINT": "Area",
        **origin_tags(source, bundle, settings),
        "SOURCE_NAMES": "; ".join(source.sources),
        "SOURCE_SIZE": str(identity["size"]),
        "SOURCE_MTIME_NS": str(identity["mtime_ns"]),
        "SOURCE_FILES": identity["files"],
    }


def origin_tags(source: ImageSource, bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of them that any image has, in a file or in memory."""
    shell = environment.recorded()
    return {
        "DATA_SOURCES": _data_sources(source),
        "SEASON": source.season or "unknown",
        "SENSORS": source.sensor or "unknown",
        "MODEL_SHA256": bundle.weights_sha256,
        "MODEL": json.dumps(_model(bundle), sort_keys=True),
        "SOFTWARE": f"biomass_jax {__version__}",
        "SETTINGS": json.dumps(settings, sort_keys=True),
        "SOURCE_READING": json.dumps(source.reading(), sort_keys=True),
        **({"ENVIRONMENT": json.dumps(shell)} if shell else {}),
    }


def _model(bundle: Bundle) -> dict[str, Any]:
    known = {name: bundle.meta.get(name) for name in _MODEL_FIELDS}
    section = bundle.meta.get("uncertainty")
    return known if section is None else {**known, "uncertainty": section}


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


def write_beside(
    source: ImageSource, path: Path, options: MapOptions, layers: Mapping[str, str], *, missing_only: bool
) -> None:
    """Write what is wanted beside a finished map: its picture, its colours, its STAC item.

    Args:
        source: the map's image, open.
        path: the map.
        options: what is wanted.
        layers: name and unit of each of the map's bands.
        missing_only: leave what lies there, the map being the same as before.

    Raises:
        RasterError: the image or the map can't be read.
        OSError: a file can't be written.
    """

    def due(wanted: bool, *places: Path) -> bool:
        return wanted and not (missing_only and all(place.is_file() for place in places))

    layer, unit = next(iter(layers.items()))
    named = {"name": layer_title(layer), "unit": unit_text(unit)}
    if due(options.quicklook, quicklook_path(path)):
        _write_quicklook(source, path, list(layers), **named)
    if due(options.style, figures.style_path(path), colours_path(path)):
        style, ramp = figures.map_style(read_preview(path, QUICKLOOK_SIZE), name=named["name"], unit=named["unit"])
        write_text(figures.style_path(path), style)
        write_text(colours_path(path), ramp)
    if due(options.stac, stac.item_path(path)):
        stac.write_item(path, source.name)


def _write_quicklook(source: ImageSource, path: Path, layers: Sequence[str], *, name: str, unit: str) -> None:
    """Draw a finished map beside its image, and how sure it is where it says so, all at reduced size."""
    image = source.read_preview(QUICKLOOK_SIZE)
    colours = [source.bands.index(name) for name in ("RED", "GREEN", "BLUE")]
    values = read_preview(path, QUICKLOOK_SIZE)
    spread = [number for number, layer in enumerate(layers, 1) if layer.endswith("_sd")]
    sd = read_preview(path, QUICKLOOK_SIZE, number=spread[0]) if spread else None
    named = {"title": PurePath(source.name).name, "name": name, "unit": unit}
    figures.quicklook(quicklook_path(path), image[..., colours], values, sd, **named)


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


class OneMap:
    """A map on its way: begun in one thread, finished in the same or another one.

    Beginning opens the image and starts its prediction, or finds that the map is finished. Small images are only
    handed to the device then; of large ones all tiles are predicted and written.
    """

    def __init__(self, predictor: Mapper, item: InputItem, dst: str | os.PathLike[str], options: MapOptions) -> None:
        """Begin; arguments and errors as for `Predictor.predict_file`."""
        self._began = time.perf_counter()
        self._predictor, self._item, self._options = predictor, item, options
        self._path = map_path(dst, item.relative, next(iter(predictor.layers)))
        with ExitStack() as stack:
            self._source = stack.enter_context(open_image(item, **predictor.reading(options)))
            settings = {**predictor.settings, **options.settings()}
            tags = map_tags(self._source, predictor.bundle, settings) | predictor.tags()
            self._kept = not options.overwrite and is_finished(self._path, tags)
            if self._kept:
                log.info("%s: finished before, %s is kept", item.name, self._path)
            else:
                self._start(tags, stack)
            self._held = stack.pop_all()

    def _start(self, tags: dict[str, str], stack: ExitStack) -> None:
        """Predict; the stack closes what is opened."""
        check_source(self._source)
        predictor = self._predictor
        writer = self._writer = stack.enter_context(
            MapWriter(self._path, self._source.grid, nodata=predictor.bundle.nodata, layers=predictor.layers, tags=tags)
        )
        name = self._path.name
        self._pixels = stack.enter_context(MapPixels(predictor, self._source, self._options, writer.write_rows, name))

    def finish(self) -> MapResult:
        """Wait for the device where need be, write the file and what belongs beside it; to be called once."""
        with self._held:
            result = MapResult(self._item.name, self._path, "skipped") if self._kept else self._write()
            write_beside(self._source, self._path, self._options, self._predictor.layers, missing_only=self._kept)
        return result

    def _write(self) -> MapResult:
        """Write what is left to write: of a whole image all rows, once the device is done."""
        pixels = self._pixels
        pixels.finish()
        stac.remove_item(self._path)  # of the map that this one replaces
        self._writer.close()
        parts = {**vars(pixels.timings), **self._writer.seconds}
        seconds, share = time.perf_counter() - self._began, pixels.share
        kept = "" if share is None else f", the mask keeps {share:.1%} of its data pixels"
        many = "" if pixels.chips == 1 else "s"
        log.info("%s: %d chip%s in %s%s", self._path, pixels.chips, many, duration(seconds), kept)
        return MapResult(self._source.name, self._path, "written", pixels.chips, seconds, parts, share)


def make_maps(
    items: Iterable[Item],
    begin: Callable[[Item], Callable[[], MapResult]],
    ended: Callable[[Item, MapResult | Exception], None] = lambda item, result: None,
) -> tuple[list[MapResult], list[Failure]]:
    """Make a map of each input.

    Args:
        items: the inputs; each is asked for when the one before it is begun.
        begin: starts a map in this thread; what it returns is called once, in another one, so that reading the next
            image and computing its map need not wait for the file of this one. At most two are on their way.
        ended: called in that thread with each input and what became of it.

    Returns:
        The maps, and what failed; both in the order of the inputs.

    Raises:
        BundleError: damaged weights; no other image would fare better.
    """
    results: list[MapResult] = []
    failures: list[Failure] = []

    def finish(item: Item, begun: Future[Callable[[], MapResult]]) -> None:
        result: MapResult | Exception
        try:
            result = begun.result()()
            results.append(result)
        except BundleError:
            raise
        except Exception as error:
            why = reason(item.name, error)
            log.error("%s: failed: %s", item.name, why, exc_info=not isinstance(error, BiomassError))
            failures.append((item.name, error))
            result = error
        ended(item, result)

    finishing: list[Future[None]] = []
    with ThreadPoolExecutor(1, "map finisher") as finisher:
        for item in items:
            begun: Future[Callable[[], MapResult]] = Future()
            try:
                begun.set_result(begin(item))
            except BundleError:
                raise
            except Exception as error:  # given back in its turn, so that failures keep the order of the inputs
                begun.set_exception(error)
            finishing.append(finisher.submit(finish, item, begun))
            for before in finishing[-2:-1]:
                before.result()
    for finished in finishing:
        finished.result()
    return results, failures
