"""`biomass-jax mosaic`: many maps, of several UTM zones too, as one on a grid of its own, by area.

Blocks of the mosaic are made one by one from the maps that meet them. What is finished lies in a folder beside the
mosaic until that is whole, so that a killed run goes on where it was; docs/regional.md has the formulae.
"""

import argparse
import datetime
import json
import logging
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biomass_jax.data.fingerprints import digest_of
from biomass_jax.data.raster import stac
from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import read_tags
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.data.raster.warp import MapFile, Part, check_together, crs_of, lattice_of, map_file, place, snapped
from biomass_jax.data.raster.zonal import SIGNIFICANT
from biomass_jax.data.records import is_season
from biomass_jax.errors import STOPPED, RasterError, Stopped, UsageError
from biomass_jax.evaluation.tables import write_csv
from biomass_jax.figures import style_path
from biomass_jax.regional.overlap import BLOCK, INVERSE, MEAN, NEWEST, Member, MosaicPlan, block_values, sd_layer
from biomass_jax.regional.styles import write_style
from biomass_jax.runtime import environment, system
from biomass_jax.runtime.files import check_local, expanded, replacing, write_json
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.progress import Progress
from biomass_jax.runtime.settings import Range, add_options, changed_fields, checked, options_of, setting
from biomass_jax.version import __version__

log = logging.getLogger(__name__)

AUTO = "auto"
OVERLAPS = (AUTO, INVERSE, NEWEST, MEAN)
SAME = "same"
MOST_THREADS = 4  # more would take more memory than is promised
# What maps of one mosaic have in common; of the rest --mixed takes any.
ALWAYS_ALIKE = ("INTERVAL_LEVEL",)
ALIKE = ("MODEL_SHA256", "MODEL", "CALIBRATION", "DI_THRESHOLD")
OF_ONE_SOURCE = ("SOURCE_NAMES", "SOURCE_SIZE", "SOURCE_MTIME_NS", "SOURCE_FILES")
OF_ONE_MAP = (*OF_ONE_SOURCE, "DATA_SOURCES", "SEASON", "AREA_OR_POINT")


@dataclass
class Mosaic:
    """How maps become one: options of `biomass-jax mosaic`."""

    crs: str = setting(
        "EPSG:6933", "of the mosaic (EPSG:6933), as rasterio reads it; `same` for the one that all maps share"
    )
    pixel: float = setting(30.0, "edge of its pixels (30), in units of that CRS", within=Range(0, ends="()"))
    overlap: str = setting(
        AUTO,
        "what counts where maps overlap; auto: inverse_variance where all maps have a standard deviation, else mean",
        choices=OVERLAPS,
    )
    mixed: bool = setting(False, "take maps of different models or calibrations")


def plan(maps: Sequence[str | os.PathLike[str]], chosen: Mosaic, onto: Grid | None = None) -> MosaicPlan:
    """Look at every map, and lay out the mosaic.

    Args:
        maps: paths.
        chosen: the settings.
        onto: the grid to take, north up, in place of one of that CRS and pixel around the maps; they may reach beyond
            it, or not meet it.

    Raises:
        RasterError: a map can't be read or placed, or differs from the others.
        UsageError: no maps, or a rule that they are not for.
    """
    paths = sorted({os.path.abspath(path): os.fspath(path) for path in maps}.values())
    if not paths:
        raise UsageError("no maps are given; expected some (--maps)")
    files = [map_file(path) for path in paths]
    for one in files:
        if SIGNIFICANT in one.layers:
            raise RasterError(
                f"{one.path}: a raster of change, whose gains and losses have no mean; make mosaics of the maps of "
                "both dates, and the change of these"
            )
        _check_alike(one, files[0], mixed=chosen.mixed)
    overlap, days = _overlap(files, chosen.overlap), [_day(one, chosen.overlap) for one in files]
    lattices = [lattice_of(one.grid) for one in files]
    if onto is not None and onto.crs is not None:
        crs, across, down = onto.crs, onto.transform.a, -onto.transform.e
    else:
        crs = lattices[0].crs if chosen.crs == SAME else crs_of(chosen.crs)
        across = down = chosen.pixel
    if onto is None and chosen.crs == SAME:
        for one, lattice in zip(files, lattices, strict=True):
            if lattice.key != lattices[0].key:
                raise RasterError(
                    f"{one.path}: its CRS is {lattice.crs.to_string()}, but that of {paths[0]} is {crs.to_string()}; "
                    "maps of several CRSs want one named (--crs EPSG:6933)"
                )
    placed = [place(one.grid, crs, (across * down) ** 0.5, one.path) for one in files]
    check_together(crs, placed, paths)
    grid = snapped([one.bounds for one in placed], crs, chosen.pixel) if onto is None else onto
    x, y = grid.transform.c, grid.transform.f
    members = []
    for one, lattice, where, day in zip(files, lattices, placed, days, strict=True):
        left, bottom, right, top = where.bounds
        edges = {"top": (y - top) / down, "left": (left - x) / across}
        edges |= {"bottom": (y - bottom) / down, "right": (right - x) / across}
        members.append(Member(map=one, lattice=lattice, day=day, **edges))
    return MosaicPlan(grid, files[0].layers, files[0].nodata, overlap, members)


def _check_alike(one: MapFile, first: MapFile, *, mixed: bool) -> None:
    """Refuse a map that differs from the first in what a mosaic has one of."""
    for what, found, expected in zip(("bands", "no-data value"), _form(one), _form(first), strict=True):
        if found != expected:
            raise RasterError(f"{one.path}: {what}: found {found}, expected {expected}, as {first.path} has")
    for tag in (*ALWAYS_ALIKE, *(() if mixed else ALIKE)):
        before, now = first.tags.get(tag), one.tags.get(tag)
        if before != now:
            more = "" if tag in ALWAYS_ALIKE else "; --mixed takes maps of several models"
            raise RasterError(f"{one.path}: {tag} differs from that of {first.path}: {_difference(before, now)}{more}")


def _form(one: MapFile) -> tuple[str, float]:
    return ", ".join(f"{name} in {unit or 'no unit'}" for name, unit in sorted(one.layers.items())), one.nodata


def _difference(before: str | None, now: str | None) -> str:
    """The first field in which two texts of JSON differ, or both texts."""
    try:
        one, other = json.loads(before or ""), json.loads(now or "")
    except ValueError:
        one = other = None
    if isinstance(one, dict) and isinstance(other, dict):
        return changed_fields(one, other)[0].replace(": was ", ": there ").replace(", now ", ", here ")
    return f"there {before or 'none'}, here {now or 'none'}"


def _overlap(files: Sequence[MapFile], asked: str) -> str:
    """The rule where maps overlap."""
    sd = sd_layer(files[0].layers)
    if asked == AUTO:
        return MEAN if sd is None else INVERSE
    if asked == INVERSE and sd is None:
        raise UsageError(
            f"overlap is {INVERSE}, but {files[0].path} has no standard deviation; give --overlap {MEAN}, or maps of a "
            "calibrated bundle"
        )
    return asked


def _day(one: MapFile, overlap: str) -> int:
    season = one.tags.get("SEASON", "")
    if is_season(season):
        return datetime.date.fromisoformat(season.split("/")[1]).toordinal()
    if overlap == NEWEST:
        raise RasterError(
            f"{one.path}: its tag SEASON is {season or 'missing'}; to tell the newest map expected one as "
            "2020-06-01/2020-09-01"
        )
    return 0


class FinishedBlocks:
    """The finished blocks of a mosaic that isn't whole yet: a folder beside it.

    A block's name says what it was made from, so that one whose maps have changed is made again.
    """

    def __init__(self, path: Path, layout: MosaicPlan) -> None:
        """Open the folder, tell what has changed since, and remove what is of no use any more.

        Raises:
            RasterError: the folder can't be written.
        """
        self._folder, self._layout = _blocks_folder(path), layout
        about = layout.about()
        self._names = {}
        for at in layout.blocks():
            met = [one.map.identity for one in layout.meeting(*at)]
            if met:
                self._names[at] = f"{at[0]}_{at[1]}_{digest_of((about, at, met))[:24]}.block"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._compare()
            for name in {one.name for one in self._folder.glob("*.block")} - {*self._names.values()}:
                (self._folder / name).unlink()
            now = {"about": about, "maps": {one.map.path: one.map.identity for one in layout.members}}
            write_json(self._folder / "made_from.json", now)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RasterError:
        return RasterError(f"{self._folder}: can't be written: {error.strerror or error}; make room, or it writable")

    def _compare(self) -> None:
        """Name the maps that have changed since the blocks were made."""
        try:
            before = json.loads((self._folder / "made_from.json").read_text(encoding="utf-8"))["maps"]
        except (OSError, ValueError, KeyError):
            return
        for one in self._layout.members:
            if before.get(one.map.path, one.map.identity) != one.map.identity:
                log.warning("%s: changed since blocks were made of it; they are made again", one.map.path)

    @property
    def share(self) -> float:
        """Share of the mosaic's pixels that lie in blocks which maps meet."""
        met = sum((bottom - top) * (right - left) for top, left, bottom, right in self._names)
        return met / (self._layout.grid.height * self._layout.grid.width)

    def get(self, at: Part) -> np.ndarray:
        """A block, made now where it isn't there.

        Raises:
            RasterError: a map can't be read or has changed, or the folder can't be written.
        """
        shape = (len(self._layout.layers), at[2] - at[0], at[3] - at[1])
        if at not in self._names:
            return np.full(shape, self._layout.nodata, np.float32)
        path = self._folder / self._names[at]
        try:
            return np.frombuffer(zlib.decompress(path.read_bytes()), np.float32).reshape(shape)
        except (OSError, ValueError, zlib.error):  # not made yet, or damaged
            values = block_values(self._layout, *at)
        try:
            with replacing(path) as partial:
                partial.write_bytes(zlib.compress(values.tobytes(), 1))
        except OSError as error:
            raise self._unwritable(error) from error
        return values


def _blocks_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.blocks")


def mosaic(
    maps: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    table: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **settings: object,
) -> MosaicPlan:
    """Make a mosaic of maps, or go on with one; its STAC item and its colours for QGIS lie beside it.

    Args:
        maps: paths.
        out: the mosaic, a Cloud-Optimized GeoTIFF; one that was made of the same is kept.
        table: a CSV of the maps and what is known of each, or none.
        overwrite: replace another file of that name.
        **settings: fields of `Mosaic`.

    Raises:
        RasterError: a map can't be read or placed, differs from the others or changed meanwhile; the mosaic is there
            already, or can't be written.
        ConfigError: a setting that can't be.
        UsageError: no maps, or a rule that they are not for.
    """
    chosen = checked(Mosaic, settings)
    path = Path(out)
    if any(os.path.abspath(one) == os.path.abspath(path) for one in maps):
        raise UsageError(f"{path}: is one of the maps; choose another name for the mosaic (--out)")
    layout = plan(maps, chosen)
    if not _finished(path, layout.digest()):
        if path.exists() and not overwrite:
            raise RasterError(
                f"{path}: already exists, made of other maps or settings; choose another name, or give --overwrite"
            )
        _write(path, layout, FinishedBlocks(path, layout))
    shutil.rmtree(_blocks_folder(path), ignore_errors=True)
    if not style_path(path).is_file():  # one that somebody has changed stays with a mosaic that is kept
        write_style(path, *next(iter(layout.layers.items())))
    if not stac.read_item(path):
        stac.write_item(path, *(one.map.path for one in layout.members))
    if table is not None:
        write_csv(table, *_table(layout))
    return layout


def _finished(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    try:
        same = read_tags(path).get("MOSAIC_SHA256") == digest
        verify_blocks(path)
    except RasterError:
        return False
    return same


def _write(path: Path, layout: MosaicPlan, blocks: FinishedBlocks) -> None:
    """Write the blocks in order; some are made ahead."""
    every = list(layout.blocks())
    threads = min(MOST_THREADS, system.cores())
    tags, share = _tags(layout), blocks.share
    writer = MapWriter(
        path, layout.grid, nodata=layout.nodata, layers=layout.layers, tags=tags, block=BLOCK, share=share
    )
    with writer, Progress(path.name, len(every), unit="block") as shown, ThreadPoolExecutor(threads) as pool:
        for values in _in_order(pool, blocks.get, every, 2 * threads):
            writer.write_block(values)
            shown.advance(1)
        stac.remove_item(path)  # of the mosaic that this one replaces
        style_path(path).unlink(missing_ok=True)


def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[Part], np.ndarray], every: Sequence[Part], ahead: int
) -> Iterator[np.ndarray]:
    waiting: deque[Future[np.ndarray]] = deque()
    try:
        for at in every:
            waiting.append(pool.submit(make, at))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()


def _tags(layout: MosaicPlan) -> dict[str, str]:
    """What the maps have in common, and what the mosaic is."""
    files = [one.map for one in layout.members]
    common = {
        key: text
        for key, text in files[0].tags.items()
        if key not in OF_ONE_MAP and all(one.tags.get(key) == text for one in files)
    }
    seasons = sorted({one.tags.get("SEASON", "") for one in files})
    told = all(is_season(season) for season in seasons)
    days = sorted(day for season in seasons for day in season.split("/"))
    models = sorted({one.tags["MODEL_SHA256"] for one in files if one.tags.get("MODEL_SHA256")})
    return {
        **common,
        "SEASON": f"{days[0]}/{days[-1]}" if told else "unknown",
        "SOFTWARE": f"biomass_jax {__version__}",
        "MAPS": str(len(files)),
        "OVERLAP": layout.overlap,
        **({"MODEL_SHA256": "; ".join(models)} if models else {}),
        "MOSAIC_SHA256": layout.digest(),
    }


def _table(layout: MosaicPlan) -> tuple[Sequence[str], list[dict[str, object]]]:
    """Columns, and a row a map."""
    columns = ("map", "season", "model_sha256", "crs", "height", "width", "identity")
    rows = []
    for one, *_ in layout.members:
        crs = one.grid.crs.to_string() if one.grid.crs else ""
        cells = [one.path, one.tags.get("SEASON", ""), one.tags.get("MODEL_SHA256", ""), crs]
        cells += [one.grid.height, one.grid.width, one.identity]
        rows.append(dict(zip(columns, cells, strict=True)))
    return columns, rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.mosaic",
        description="Many maps as one on a grid of its own, by area. A killed run goes on when it is given again.",
        allow_abbrev=False,
    )
    parser.add_argument("--maps", required=True, nargs="+", metavar="MAP", help="maps, or patterns of such")
    parser.add_argument("--out", required=True, metavar="FILE", help="the mosaic, a GeoTIFF to make")
    add_options(parser, Mosaic)
    parser.add_argument("--table", metavar="FILE", help="a CSV of the maps to make beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        environment.settle(jax=False)
        for value, flag in ((args.out, "--out"), (args.table, "--table")):
            check_local(value, flag)
        maps = expanded(args.maps)
        with system.sigterm_stops(), writer_beside(Path(args.out)):
            made = mosaic(maps, args.out, table=args.table, overwrite=args.overwrite, **options_of(args, Mosaic))
    except Stopped:
        print("stopped by SIGTERM; give the same command again to go on", file=sys.stderr)
        return STOPPED
    except Exception as error:
        return environment.failed(error)
    many = "" if len(made.members) == 1 else "s"
    print(f"{args.out}: {len(made.members)} map{many}, overlaps by {made.overlap}; {made.grid.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
