"""HLS v2.0 granules: what their names say, which files they consist of, which pixels are clear.

A granule is a folder of single-band GeoTIFFs on one grid. Digital numbers are passed on as stored: no scale is applied.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader
from rasterio.windows import Window

from biomass_jax.data import bands
from biomass_jax.data.raster.encoding import AUTO, conversion, declared
from biomass_jax.data.raster.grid import Grid, grid_of, open_quietly, raster_errors, utm_zone
from biomass_jax.data.raster.image import hidden_pixels, is_masked, open_image
from biomass_jax.data.raster.inputs import InputItem, granule_name
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import BandError, PrepError
from biomass_jax.runtime.content import unfinished

VERSION = "2.0"
FMASK_FILL = 255
# Bits of Fmask; bit 0 (cirrus) is not used by the product.
CLOUD, ADJACENT, SHADOW, SNOW, WATER = (1 << bit for bit in range(1, 6))
HIGH_AEROSOL = 0b11 << 6
_MASKED = CLOUD | ADJACENT | SHADOW | SNOW
_TILE_IN_TAG = re.compile(r"(?<![A-Z0-9])T?(\d{2}[C-X][A-Z]{2})(?![A-Z0-9])")
_TILE_TAGS = ("SENTINEL2_TILEID", "TILE_ID")  # of L30, of S30
_SENSOR_TAGS = ("SENSOR", "SPACECRAFT_NAME")
_REFLECTANCE = 2.0  # digital numbers of land are hundreds, reflectance is below this

_SUFFIXES = (".tif", ".tiff")  # in any case
_BLOCK = 256  # px, of HLS's files

Buffers = tuple[np.ndarray, np.ndarray]  # (6, rows, columns) int16, (rows, columns) uint8
Found = Counter[tuple[str, str]]  # pixels by (granule, what): `USED`, or what was taken for no-data besides no-data
ReadInto = Callable[[Window, Buffers], Found]
USED = "used"  # of an older granule of the same overpass, where the newer one has no data


@dataclass(frozen=True, order=True)
class Granule:
    """What a granule's name tells."""

    sensor: str  # `L30` or `S30`
    tile: str  # MGRS tile without T (`10SFF`)
    acquired: datetime  # the UTC time in the name; in S30 names it is not the SENSING_TIME
    name: str  # `HLS.L30.T10SFF.2020183T184512.v2.0`


def parse_granule_name(name: str) -> Granule:
    """Read a granule's name, or the name of one of its files.

    Raises:
        PrepError: not an HLS name, an impossible date, or another version than 2.0.
    """
    found = granule_name(name) if "/" not in name else None
    if found is None or found.tile[2] not in "CDEFGHJKLMNPQRSTUVWX" or name[len(found.granule) :][:1] not in ("", "."):
        raise PrepError(f"{name}: not an HLS granule's name; expected one like HLS.L30.T10SFF.2020183T184512.v2.0")
    if found.version != VERSION:
        raise PrepError(
            f"{found.granule}: HLS version {found.version}, expected v{VERSION}; other versions have other numbers"
        )
    try:
        acquired = datetime.strptime(f"{found.date}{found.time}+0000", "%Y%j%H%M%S%z").astimezone(UTC)
        if acquired.year != int(found.date[:4]):  # day 366 of other years
            raise ValueError("day of the year")
    except ValueError as error:
        raise PrepError(
            f"{found.granule}: {found.date}T{found.time} is no date; expected year, day of the year, T, time (UTC)"
        ) from error
    if not 1 <= int(found.tile[:2]) <= 60:
        raise PrepError(f"{found.granule}: tile {found.tile} is in no UTM zone; expected 01 to 60")
    return Granule(found.sensor, found.tile, acquired, found.granule)


def needed_layers(sensor: str) -> tuple[str, ...]:
    """The files of a granule that are used: the six bands' numbers in `bands.BANDS` order, and `Fmask`."""
    return (*(band.s30 if sensor == "S30" else band.l30 for band in bands.BANDS), "Fmask")


def find_scenes(path: str | os.PathLike[str]) -> list[Path]:
    """Granules' folders: the folder itself where its name is a granule's, else all below it, sorted by name.

    Raises:
        PrepError: no such folder, or no granule in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise PrepError(f"{root}: no such folder; expected a granule's folder or one that holds granules")
    if root.name.startswith("HLS."):
        return [root]
    found: list[Path] = []
    loose: list[str] = []
    for folder, below, files in os.walk(root):
        found += [Path(folder, name) for name in below if name.startswith("HLS.")]
        loose += [name for name in sorted(files) if name.lower().endswith(_SUFFIXES) and not name.startswith(".")][:1]
        below[:] = sorted(name for name in below if not name.startswith((".", "HLS.")))
    if not found:
        raise PrepError(
            f"{root}: no granules below it; expected folders named HLS.L30.T10SFF.2020183T184512.v2.0{_cure(loose)}"
        )
    return sorted(found, key=lambda folder: (folder.name, str(folder)))


def _cure(loose: Sequence[str]) -> str:
    """What to do with files that lie there in no granule's folder."""
    if not loose:
        return ""
    known = granule_name(loose[0])
    if known is not None:
        return f"; found {loose[0]}: put each granule's files into a folder of its name, here {known.granule}"
    return (
        f"; found {loose[0]}, which is no file of a whole granule (AppEEARS and others cut and rename them): "
        "`python -m data_prep download hls --tile 10SFF --season 2020 --out DIR` gets whole ones. For a map of "
        "single-band files join the six, `gdalbuildvrt -separate image.vrt BLUE.tif GREEN.tif ...`, and name them in "
        "that order by config.bands"
    )


@dataclass(frozen=True)
class Scene:
    """A granule whose files have been checked. Nothing is kept open, so any thread may read."""

    folder: Path  # its name alone where its files are far
    granule: Granule
    grid: Grid  # of all its files
    tags: Mapping[str, str]  # of the first band's file
    paths: tuple[str, ...]  # as GDAL opens them: the six bands in `bands.BANDS` order, then Fmask
    encoding: str = AUTO  # what the bands' numbers are
    plain: bool = True  # all files are as HLS writes them: no mask, nothing to convert
    older: tuple["Scene", ...] = ()  # of the same overpass, the newest first: read where this one has no data
    access: Mapping[str, str] | None = None  # GDAL's settings for files on a server; None where they are here

    @property
    def processing_time(self) -> datetime:
        """When HLS made the granule (UTC). PrepError where no tag tells."""
        text = self.tags.get("HLS_PROCESSING_TIME", "")
        try:
            return datetime.strptime(text.split(";")[0].strip()[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
        except ValueError as error:
            raise PrepError(
                f"{self.folder}: tag HLS_PROCESSING_TIME is {text!r}, expected a time like 2024-05-01T13:24:46Z; "
                "it decides which of two granules of one overpass is used"
            ) from error

    @contextmanager
    def reader(self) -> Iterator[ReadInto]:
        """Open the files once for several reads by one thread.

        Yields:
            read(window, into): fill arrays of `buffers`, because new memory costs time, with digital numbers, -9999
                where there are none, and the Fmask, 255 where it is hidden. Where the granule has no data they are
                those of the older ones. Returns how many pixels these gave, and what else was taken for no-data. Of
                files on a server, bands are fetched only where the Fmask leaves anything clear: elsewhere they are 1
                where the sensor saw something.

        Raises:
            RasterError: a file can't be read there.
        """
        with ExitStack() as stack:
            own = stack.enter_context(self._plain_reader() if self.plain else self._odd_reader())
            others = [stack.enter_context(scene.reader()) for scene in self.older]

            def read(window: Window, into: Buffers) -> Found:
                found = own(window, into)
                for scene, other in zip(self.older, others, strict=True):
                    missing = ~has_data(into)
                    if not missing.any():
                        break
                    beneath = buffers(*missing.shape)
                    found += other(window, beneath)
                    missing &= has_data(beneath)
                    for plane, below in zip((*into[0], into[1]), (*beneath[0], beneath[1]), strict=True):
                        np.copyto(plane, below, where=missing)
                    found[scene.granule.name, USED] += int(np.count_nonzero(missing))
                return found

            yield read

    @contextmanager
    def _plain_reader(self) -> Iterator[ReadInto]:
        with ExitStack() as stack:
            datasets = []
            for path in self.paths:
                with raster_errors(path, self.access):
                    datasets.append(stack.enter_context(open_quietly(path)))

            def fill(which: slice, window: Window, outs: Iterable[np.ndarray]) -> None:
                for path, dataset, out in zip(self.paths[which], datasets[which], outs, strict=True):
                    with raster_errors(path, self.access):
                        dataset.read(1, window=window, out=out)

            def read(window: Window, into: Buffers) -> Found:
                planes, fmask = into
                fill(np.s_[-1:], window, [fmask])
                if self.access is None:
                    fill(np.s_[:-1], window, planes)
                else:
                    planes[:] = np.where(observed(fmask), np.int16(1), np.int16(bands.FILL))
                    part = _clear_part(fmask, window)
                    if part is not None:
                        wanted = [np.empty((part.height, part.width), np.int16) for _ in planes]
                        fill(np.s_[:-1], part, wanted)
                        rows, columns = (
                            slice(int(begin - first), int(end - first))
                            for (begin, end), (first, _) in zip(part.toranges(), window.toranges(), strict=True)
                        )
                        for plane, values in zip(planes, wanted, strict=True):
                            plane[rows, columns] = values
                return Counter()

            yield read

    @contextmanager
    def _odd_reader(self) -> Iterator[ReadInto]:
        """Through `open_image`, which knows masks, no-data values and encodings."""
        item = InputItem(str(self.folder), self.paths[:-1], PurePath(self.folder.name))
        path = self.paths[-1]
        with ExitStack() as stack:
            image = stack.enter_context(open_image(item, model_sensors=(), encoding=self.encoding))
            with raster_errors(path):
                quality = stack.enter_context(open_quietly(path))

            def read(window: Window, into: Buffers) -> Found:
                planes, fmask = into
                image.oddities.clear()
                values = image.read_window(window, count=True)
                found = Counter({(self.granule.name, what): odd[0] for what, odd in image.oddities.items()})
                missing = bands.no_data(values, image.fill)
                values, limits = np.rint(values), np.iinfo(np.int16)
                beyond = ((values < limits.min) | (values > limits.max)).any(axis=-1) & ~missing
                if beyond.any():
                    found[self.granule.name, "beyond what int16 holds"] = int(beyond.sum())
                planes[...] = np.moveaxis(np.where((missing | beyond)[..., None], bands.FILL, values), -1, 0)
                with raster_errors(path):
                    quality.read(1, window=window, out=fmask)
                    hidden = hidden_pixels(quality, [1], {"window": window})
                if hidden is not None:
                    fmask[hidden[0]] = FMASK_FILL
                return found

            yield read


def open_scene(folder: str | os.PathLike[str], encoding: str = AUTO) -> Scene:
    """Check a granule's files and say where they lie.

    Args:
        folder: the granule's.
        encoding: what its numbers are, one of `encoding.ENCODINGS`; `auto` takes what HLS writes and nothing else.

    Raises:
        PrepError: not v2.0, a band or Fmask missing, files of another granule, tile or sensor, different grids, a grid
            that can't belong to the tile, or another type or no-data value than HLS's without an encoding.
        RasterError: a file is no TIFF, or cut short; a scale that isn't that of digital numbers without an encoding.
    """
    folder = Path(folder)
    granule = parse_granule_name(folder.name)
    if granule.name != folder.name:
        raise PrepError(f"{folder}: expected a folder named {granule.name}")
    paths = _layer_paths(folder, granule)
    for path in paths:
        verify_blocks(path, sparse_ok=True)
    return _checked(folder, granule, tuple(map(str, paths)), encoding)


def open_far_scene(name: str, urls: Mapping[str, str], access: Mapping[str, str]) -> Scene:
    """Check the headers of a granule's files on a server; their pixels are fetched when they are read.

    Args:
        name: the granule's.
        urls: file name -> its HTTP(S) address, of all needed layers.
        access: GDAL's settings for the server: its login.

    Raises:
        PrepError: see `open_scene`.
        RasterError: a file can't be reached, or is none that HLS writes.
    """
    granule = parse_granule_name(name)
    paths = tuple(f"/vsicurl/{urls[f'{name}.{layer}.tif']}" for layer in needed_layers(granule.sensor))
    # GDAL would list the server's folders to look for side-cars, which granules have none of.
    scene = _checked(Path(name), granule, paths, AUTO, {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", **access})
    if not scene.plain:
        raise PrepError(f"{name}: its files have masks, which HLS's have not; download it, and look at it")
    return scene


def _checked(
    folder: Path, granule: Granule, paths: tuple[str, ...], encoding: str, access: Mapping[str, str] | None = None
) -> Scene:
    """A scene whose files' headers agree with each other and with its name."""
    tags: list[dict[str, str]] = []
    grids: list[Grid] = []
    long_names: list[str | None] = []
    scales: dict[str, tuple[float, float] | None] = {}
    plain = True
    for path in paths:
        with raster_errors(path, access), open_quietly(path) as dataset:
            plain &= _check_file(path, dataset, encoding, is_fmask=path == paths[-1])
            scales[PurePath(path).name] = declared(dataset, 1)
            tags.append(dict(dataset.tags()))
            grids.append(grid_of(dataset))
            long_names.append(dataset.tags(1).get("long_name") or tags[-1].get("long_name"))
    for path, grid, found in zip(paths, grids, tags, strict=True):
        if not grid.same_as(grids[0]):
            raise PrepError(
                f"{path}: its grid is {grid.describe()}, but {PurePath(paths[0]).name} lies on {grids[0].describe()}; "
                "expected one grid for all files of a granule"
            )
        _check_tags(path, found, granule)
    _check_place(folder, granule, grids[0])
    del scales[PurePath(paths[-1]).name]
    plain &= conversion(encoding, scales, str(folder)) is None
    _resolve(needed_layers(granule.sensor)[:-1], granule, folder, long_names[:-1])
    return Scene(folder, granule, grids[0], tags[0], paths, encoding, plain, access=access)


def buffers(rows: int, columns: int) -> Buffers:
    """Memory for what `Scene.reader` reads: the bands in `bands.BANDS` order, and the Fmask."""
    return np.empty((len(bands.BANDS), rows, columns), np.int16), np.empty((rows, columns), np.uint8)


def clear(
    image: np.ndarray, fmask: np.ndarray, drop_water: bool = False, drop_high_aerosol: bool = False
) -> np.ndarray:
    """Which pixels are clear: one mask for all bands, so that all of them average the same scenes.

    Clear is what is not fill (255, tested before the bits), has none of cloud, adjacent, shadow and snow (bits 1-4),
    and has a value in each band. Water and aerosol don't count unless asked for; bit 0 never does.

    Args:
        image: (..., 6) int16 digital numbers.
        fmask: (...) uint8.
        drop_water: leave out water (bit 5) as well.
        drop_high_aerosol: leave out high aerosol (bits 7-6 both set) as well.

    Returns:
        bool (...).
    """
    keep = observed(fmask)
    keep &= fmask & (_MASKED | (WATER if drop_water else 0)) == 0
    if drop_high_aerosol:
        keep &= fmask & HIGH_AEROSOL != HIGH_AEROSOL
    for index in range(image.shape[-1]):
        keep &= image[..., index] != bands.FILL
    return keep


def has_data(scene: Buffers) -> np.ndarray:
    """Which pixels the sensor saw in all bands, clouds or not: bool (rows, columns)."""
    planes, fmask = scene
    return observed(fmask) & ~bands.no_data(np.moveaxis(planes, 0, -1))


def observed(fmask: np.ndarray) -> np.ndarray:
    """Which pixels the sensor saw: bool of Fmask's shape, False for fill, which has all bits set."""
    return fmask != FMASK_FILL


def _clear_part(fmask: np.ndarray, window: Window) -> Window | None:
    """The part of a window, cut where files' blocks are, outside of which no pixel can be clear; None for no part."""
    possible = observed(fmask) & (fmask & _MASKED == 0)
    if not possible.any():
        return None
    edges = []
    for axis, first, length in ((1, window.row_off, window.height), (0, window.col_off, window.width)):
        places = np.flatnonzero(possible.any(axis=axis)) + first
        edges.append(
            (max(first, places[0] // _BLOCK * _BLOCK), min(first + length, -(-(places[-1] + 1) // _BLOCK) * _BLOCK))
        )
    (top, bottom), (left, right) = edges
    return Window(left, top, right - left, bottom - top)


def tile_grid_key(crs: CRS | None, transform: Affine, name: str = "grid") -> tuple[int, float, float, float, float]:
    """What two rasters of one tile share however their CRS is spelled: UTM zone, place and size of pixels.

    Southern tiles come in their north zone with negative northings, or in the south zone with 10,000,000 added; some
    files name no EPSG code. All of them are the same ground.

    Returns:
        (zone, left, top counted from the equator, pixel width, pixel height), metres.

    Raises:
        PrepError: not a WGS 84 UTM CRS, or rotated.
    """
    zone = utm_zone(crs)
    if zone is None or crs is None:
        raise PrepError(f"{name}: CRS {None if crs is None else crs.to_string()}, expected UTM on WGS 84")
    if transform.b or transform.d:
        raise PrepError(f"{name}: a rotated grid, expected rows along the parallel axis of UTM")
    return zone[0], transform.c, transform.f - zone[1], transform.a, transform.e


def _layer_paths(folder: Path, granule: Granule) -> tuple[Path, ...]:
    """The needed files. PrepError that says which are missing or don't belong here."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise PrepError(f"{folder}: can't be read: {error.strerror or error}") from error
    layers: dict[str, Path] = {}
    for file in entries:
        layer = file.stem.removeprefix(f"{granule.name}.")
        if file.suffix.lower() not in _SUFFIXES:
            continue
        if not file.name.startswith(f"{granule.name}."):
            raise PrepError(f"{file}: doesn't belong into this folder; expected names that begin with {granule.name}")
        if layer in layers:
            raise PrepError(f"{file}: the same layer as {layers[layer].name}; leave one of them there")
        layers[layer] = file
    needed = needed_layers(granule.sensor)
    for file in entries:
        layer = file.name.removeprefix(f"{granule.name}.").split(".")[0]
        if unfinished(file) and layer in needed and layer not in layers:
            raise PrepError(f"{file}: a download that wasn't finished; finish it, or download the granule again")
    if not layers:
        names = ", ".join(entry.name for entry in entries[:3]) or "nothing"
        raise PrepError(
            f"{folder}: no .tif file in it, found {names}; expected {granule.name}.{needed[0]}.tif and so on, a file "
            "for each band and for Fmask"
        )
    _resolve([layer for layer in layers if layer.startswith("B")], granule, folder)
    if "Fmask" not in layers:
        raise PrepError(f"{folder}: no {granule.name}.Fmask.tif; found layers {', '.join(layers)}")
    return tuple(layers[layer] for layer in needed)


def _resolve(layers: Sequence[str], granule: Granule, folder: Path, long_names: Sequence[str | None] = ()) -> None:
    """PrepError, as for whatever else is wrong with a granule's files, where its six bands can't be told."""
    try:
        bands.resolve(layers, sensor=granule.sensor, long_names=long_names, path=str(folder))
    except BandError as error:
        raise PrepError(str(error)) from error


def _check_file(path: str, dataset: DatasetReader, encoding: str, *, is_fmask: bool) -> bool:
    """Whether a file is as HLS writes it and has no mask; PrepError where it can't be read as one of a granule's."""
    dtype, fill = ("uint8", FMASK_FILL) if is_fmask else ("int16", bands.FILL)
    stored, alpha = dataset.dtypes[0], ColorInterp.alpha in dataset.colorinterp
    if dataset.count != 1 + alpha:
        raise PrepError(f"{path}: {dataset.count} bands, expected 1")
    wanted = stored == dtype and dataset.nodata in (None, fill)
    if not wanted and (is_fmask or encoding == AUTO or "complex" in stored):
        hopeless = is_fmask or "complex" in stored  # no encoding makes them right
        told = "" if hopeless else "; --encoding (config.composite.encoding) converts it, naming what its numbers are"
        if stored == dtype:
            raise PrepError(f"{path}: its no-data value is {dataset.nodata:g}, expected {fill}{told}")
        if stored.startswith("float"):
            sample = dataset.read(1, out_shape=(min(dataset.height, 256), min(dataset.width, 256)))
            valid = sample[np.isfinite(sample) & (sample != bands.FILL)]
            if valid.size and np.percentile(valid, 99) <= _REFLECTANCE:
                told = (
                    f": reflectance up to {valid.max():.4g}, not {bands.UNITS}; use the product's files, without its "
                    f"scale applied, or --encoding reflectance (config.composite.encoding)"
                )
        raise PrepError(f"{path}: {stored}, expected {dtype}{told}")
    return wanted and not is_masked(dataset, 1)


def _check_tags(path: str, tags: Mapping[str, str], granule: Granule) -> None:
    for tag in _TILE_TAGS:
        tiles = set(_TILE_IN_TAG.findall(tags.get(tag, "").upper()))
        if tiles - {granule.tile}:
            raise PrepError(f"{path}: wrong tile: its tag {tag} is {tags[tag]!r}, its name says {granule.tile}")
    for tag in _SENSOR_TAGS:
        sensor = bands.sensor_of(tags.get(tag, ""))
        if sensor not in (None, granule.sensor):
            raise PrepError(f"{path}: its tag {tag} is {tags[tag]!r}, its name says {granule.sensor}")


def _check_place(folder: Path, granule: Granule, grid: Grid) -> None:
    """The tile's name and the grid have to agree on UTM zone and hemisphere."""
    zone, _, top, _, height = tile_grid_key(grid.crs, grid.transform, str(folder))
    centre = top + height * grid.height / 2
    found = f"grid {grid.describe()}"
    if zone != int(granule.tile[:2]):
        raise PrepError(f"{folder}: wrong tile: {found} is in UTM zone {zone}, tile {granule.tile} is not")
    if (centre >= 0) != (granule.tile[2] >= "N"):
        side, other = ("north", "south") if centre >= 0 else ("south", "north")
        raise PrepError(
            f"{folder}: wrong tile: the centre of its {found} lies {side} of the equator, tile {granule.tile} {other}"
        )
