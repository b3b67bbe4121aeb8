"""Composites: one tile's scenes of a season -> the mean (or median) of clear observations of each band.

Scenes are decoded by threads, each of them opening a scene once and adding its blocks to sums that are kept for the
whole tile, so memory grows with the tile and not with the number of scenes; a median keeps a block of all scenes. Sums
are integers, so neither the order of scenes nor the size of blocks changes a byte of the result.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from biomass_jax.data.bands import BAND_NAMES, FILL
from biomass_jax.data.raster.cog import write_cog
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.image import read_tags
from biomass_jax.data.raster.tiff import verify_blocks
from biomass_jax.errors import PrepError, RasterError, refuse_empty
from biomass_jax.runtime.settings import add_options, options_of
from biomass_jax.runtime.system import cores
from data_prep.commands import add_allow_empty, command, refuse_beside_prepare
from data_prep.hls import composite_sums as sums
from data_prep.hls.granules import Scene, find_scenes, open_scene, parse_granule_name
from data_prep.places import grid_centre
from data_prep.season import DEFAULT_TABLE, Season, resolve_season
from data_prep.settings import CompositeSettings

NAMES = (*BAND_NAMES, "CLEAR_COUNT")
SENSORS = ("L30", "S30")
DUPLICATE_MINUTES = 10  # two granules of one sensor and tile less than this apart show one overpass
DEFAULT = CompositeSettings()
MOST_THREADS = 8  # unless told otherwise: each holds blocks of some scenes
Opener = Callable[..., Scene]  # (folder, encoding=...) -> the scene
_BY_TIME = attrgetter("acquired", "sensor", "name")  # of granules


@dataclass(frozen=True)
class CompositeReport:
    """What a composite was made of."""

    path: Path
    tile: str  # MGRS
    season: str  # `2020-06-01/2020-09-16`
    sensors: str  # of the scenes used, `L30`, `S30` or `L30+S30`
    scenes: tuple[str, ...]  # names of those used, by time
    duplicates: Mapping[str, str]  # older granule of an overpass -> the newest, which goes before it
    out_of_season: tuple[str, ...]  # names of granules left out by date
    other_sensors: tuple[str, ...]  # names of granules left out by sensor
    counts: Mapping[str, Mapping[str, int]]  # scene -> {`observed`: its Fmask is not fill, `clear`: used} pixels
    pixels: int  # of the tile
    covered: int  # those with values
    min_clear: int  # as it was set
    below_min_clear: int  # those without, although some scenes, fewer than `min_clear`, see them clear
    warnings: tuple[str, ...]  # sentences for the user
    used: Mapping[str, int] = field(default_factory=dict)  # of duplicates: pixels that the newest has no data for

    def lines(self) -> list[str]:
        """The report as text."""
        few = self.min_clear > 1
        left_out = f"{len(self.out_of_season)} out of season, {len(self.other_sensors)} of other sensors"
        return [
            f"{self.path}: {len(self.scenes)} scenes of {self.tile}, {self.season}, {self.sensors}",
            f"  left out: {left_out}",
            *(f"  {older}: duplicate of {kept}, {self._use_of(older)}" for older, kept in self.duplicates.items()),
            *(f"  {name}: {n['clear']:,} of {n['observed']:,} pixels clear" for name, n in self.counts.items()),
            f"  {self.covered:,} of {self.pixels:,} pixels have values",
            *[f"  {self.below_min_clear:,} more have fewer clear observations than min_clear, {self.min_clear}"] * few,
            *(f"  warning: {text}" for text in self.warnings),
        ]

    def _use_of(self, older: str) -> str:
        pixels = self.used.get(older, 0)
        return f"used for {pixels:,} pixels where that has no data" if pixels else "not used"


class Selection(NamedTuple):
    """Folders of the granules to use, and the names of the others."""

    folders: list[Path]
    out_of_season: tuple[str, ...]
    other_sensors: tuple[str, ...]


def composite(
    scene_folders: Iterable[str | os.PathLike[str]],
    dst: str | os.PathLike[str],
    *,
    season: Season,
    sensors: Sequence[str] = DEFAULT.sensors,
    statistic: str = DEFAULT.statistic,
    min_clear: int = DEFAULT.min_clear,
    drop_water: bool = False,
    drop_high_aerosol: bool = False,
    encoding: str = DEFAULT.encoding,
    tile: str | None = None,
    threads: int | None = None,
    allow_empty: bool = False,
    opener: Opener = open_scene,
) -> CompositeReport:
    """Make the composite of a tile.

    A pixel of a scene counts where `hls.clear` says so, one mask for all bands. Negative values and those above 10,000
    are averaged as they are. Means are rounded half to even. Fewer than `min_clear` clear scenes, or a mean that is by
    chance the fill value, give -9999 in all bands and a count of 0.

    Args:
        scene_folders: granules of one tile, of any season and sensor, in any order.
        dst: the composite, a COG int16: bands 1-6 by name, band 7 CLEAR_COUNT, on the granules' own grid.
        season: scenes whose name has a date inside are used.
        sensors: `L30`, `S30` or both.
        statistic: `mean` or `median`.
        min_clear: fewest clear scenes of a pixel with values; 1 is the reference's way.
        drop_water: leave out water (Fmask bit 5).
        drop_high_aerosol: leave out high aerosol (bits 7-6).
        encoding: what the granules' numbers are, see `hls.open_scene`.
        tile: the expected tile; that of the granules where None.
        threads: for decoding, 60 MiB each; one for each core, but at most 8, where None.
        allow_empty: write it as well where fewer than 0.1 % of its pixels have values.
        opener: opens a scene by its folder and encoding; another one than `hls.open_scene` may find it elsewhere.

    Raises:
        PrepError: bad settings, no scene of the season, granules of several tiles or on different grids, a granule
            that can't be used (see `hls.open_scene`), holds nothing but fill, or holds reflectance; (nearly) no value.
        RasterError: a granule's file can't be read, holds other numbers than its encoding says, or the composite can't
            be written.
    """
    names = tuple(sensors.split("+") if isinstance(sensors, str) else sensors)
    settings = CompositeSettings(names, statistic, min_clear, drop_water, drop_high_aerosol, encoding)
    _check_settings(settings)
    selection = select(scene_folders, season=season, sensors=settings.sensors, tile=tile)
    threads = threads or min(cores(), MOST_THREADS)
    scenes, duplicates = _opened(selection.folders, threads, partial(opener, encoding=encoding))
    plan = sums.CompositePlan(scenes, settings, threads)
    counts = sums.Counts(scenes)
    tags = _tags(scenes, season, duplicates)
    rows = _rows(plan, counts, tags, str(dst), allow_empty)
    path = write_cog(dst, rows, scenes[0].grid, "int16", NAMES, FILL, tags)
    return _report(path, scenes[0].grid, tags, counts, selection, duplicates, min_clear)


def _report(
    path: Path,
    grid: Grid,
    tags: Mapping[str, str],
    counts: sums.Counts,
    selection: Selection,
    duplicates: Mapping[str, str],
    min_clear: int,
) -> CompositeReport:
    few = counts.covered == 0
    odd = [f"{name}: {n:,} values {what}, taken as no-data" for (name, what), n in sorted(counts.odd.items())]
    return CompositeReport(
        path=path,
        tile=tags["TILE"],
        season=tags["SEASON"],
        sensors=tags["SENSORS"],
        scenes=tuple(counts.by_scene),
        duplicates=duplicates,
        out_of_season=selection.out_of_season,
        other_sensors=selection.other_sensors,
        counts=counts.by_scene,
        pixels=grid.height * grid.width,
        covered=counts.covered,
        min_clear=min_clear,
        below_min_clear=counts.below_min_clear,
        warnings=(*[f"{path}: no pixel has {min_clear} clear observations"] * few, *odd),
        used=counts.used,
    )


def _tags(scenes: Sequence[Scene], season: Season, duplicates: Mapping[str, str]) -> dict[str, str]:
    """The composite's tags, but for the settings and counts."""
    return {
        "TILE": scenes[0].granule.tile,
        "SEASON": season.text,
        "SENSORS": "+".join(sorted({scene.granule.sensor for scene in scenes})),
        "SCENES": ",".join(scene.granule.name for scene in scenes),
        "DUPLICATES": ",".join(f"{dropped}={kept}" for dropped, kept in duplicates.items()),
    }


def _rows(
    plan: sums.CompositePlan, counts: sums.Counts, tags: dict[str, str], name: str, allow_empty: bool
) -> Iterator[np.ndarray]:
    """The composite's rows; adds settings and counts to the tags, which the writer reads after the last of them."""
    yield from sums.row_bands(plan, counts)
    grid = plan.scenes[0].grid
    what = f"{name}: pixels with {plan.settings.min_clear} clear observations or more"
    if counts.below_min_clear:
        what += f" (min_clear; {counts.below_min_clear:,} more have fewer, of {len(plan.scenes)} scenes)"
    refuse_empty(PrepError, counts.covered, grid.height * grid.width, what, allowed=allow_empty)
    found: dict[str, object] = {"scenes": len(plan.scenes), "covered": counts.covered, "by_scene": counts.by_scene}
    found["below_min_clear"] = counts.below_min_clear
    if counts.used:
        found["used_of_duplicates"] = counts.used
    if counts.odd:
        found["no_data_besides"] = {f"{name}: {what}": number for (name, what), number in counts.odd.items()}
    tags["COMPOSITE"] = json.dumps({**_recorded(plan.settings), "counts": found}, sort_keys=True)


def _recorded(settings: CompositeSettings) -> dict[str, object]:
    """The settings as a composite's tag has them."""
    masked = ["fill", "cloud", "adjacent", "shadow", "snow"]
    masked += ["water"] * settings.drop_water + ["high aerosol"] * settings.drop_high_aerosol
    return {
        "statistic": settings.statistic,
        "min_clear": settings.min_clear,
        "sensors": sorted(set(settings.sensors)),
        "encoding": settings.encoding,
        "masked": masked,
    }


def is_made(path: Path, granules: Sequence[str], season: Season, settings: CompositeSettings) -> bool:
    """Whether a whole composite of just these granules, made with these settings, lies there."""
    if not path.is_file():
        return False
    try:
        tags = read_tags(path)
        verify_blocks(path)
        made = json.loads(tags.get("COMPOSITE", "{}"))
    except (RasterError, ValueError):
        return False
    older = [pair.partition("=")[0] for pair in tags.get("DUPLICATES", "").split(",") if pair]
    held = {*tags.get("SCENES", "").split(","), *older}
    made.pop("counts", None)
    return tags.get("SEASON") == season.text and held == set(granules) and made == _recorded(settings)


def select(
    scene_folders: Iterable[str | os.PathLike[str]],
    *,
    season: Season,
    sensors: Sequence[str] = ("L30",),
    tile: str | None = None,
) -> Selection:
    """Choose granules by their names.

    Raises:
        PrepError: granules of another tile, or none of the season and sensors.
    """
    granules = {Path(folder): parse_granule_name(Path(folder).name) for folder in scene_folders}
    ordered = sorted(granules, key=lambda folder: (_BY_TIME(granules[folder]), str(folder)))
    if not ordered:
        raise PrepError("no granules given; expected the folders of a tile's scenes")
    tile = (tile or granules[ordered[0]].tile).removeprefix("T")
    for folder in ordered:
        if granules[folder].tile != tile:
            raise PrepError(f"{folder}: wrong tile: {granules[folder].tile}, expected {tile}")
    other = [folder for folder in ordered if granules[folder].sensor not in sensors]
    out = [f for f in ordered if f not in other and not season.contains(granules[f].acquired)]
    folders = [folder for folder in ordered if folder not in other and folder not in out]
    if not folders:
        days = [granules[folder].acquired.date().isoformat() for folder in ordered]
        kinds = sorted({granule.sensor for granule in granules.values()})
        raise PrepError(
            f"tile {tile}: no scene of {'+'.join(sensors)} in season {season.text}; found {len(ordered)} of "
            f"{'+'.join(kinds)} from {min(days)} to {max(days)}"
        )
    return Selection(folders, tuple(f.name for f in out), tuple(f.name for f in other))


def without_duplicates(scenes: Sequence[Scene]) -> tuple[list[Scene], dict[str, str]]:
    """One scene for each overpass of a tile: the granule that HLS made last, and beneath it the older ones.

    Returns:
        scenes by time, and {name of an older granule: name of the one that goes before it}.
    """
    gap = timedelta(minutes=DUPLICATE_MINUTES)

    def rivals(scene: Scene, among: Sequence[Scene]) -> list[str]:
        """Names of the other granules of its overpass."""
        mine = scene.granule
        others = [other.granule for other in among if other is not scene and other.granule.sensor == mine.sensor]
        return [other.name for other in others if abs(mine.acquired - other.acquired) < gap]

    kept = [scene for scene in scenes if not rivals(scene, scenes)]
    dropped: dict[str, str] = {}
    beneath: dict[str, list[Scene]] = {}
    crowded = [scene for scene in scenes if rivals(scene, scenes)]
    # newest first; the name decides between equal times, so that the order of the scenes never does
    crowded.sort(key=lambda scene: (scene.processing_time, scene.granule.name, str(scene.folder)), reverse=True)
    for scene in crowded:
        newer = rivals(scene, kept)
        if newer:
            dropped[scene.granule.name] = newer[0]
            beneath.setdefault(newer[0], []).append(scene)
        else:
            kept.append(scene)
    kept = [replace(scene, older=tuple(beneath.get(scene.granule.name, ()))) for scene in kept]
    return sorted(kept, key=lambda scene: _BY_TIME(scene.granule)), dict(sorted(dropped.items()))


def composite_path(out: str | os.PathLike[str], tile: str, season: Season) -> Path:
    """Where prepared folders hold a tile's composite: `{out}/{tile}/{tile}_{start}_{end}.tif`."""
    return Path(out, tile, f"{tile}_{season.text.replace('/', '_')}.tif")


def find_composites(out: str | os.PathLike[str]) -> list[Path]:
    """The composites of a folder of prepared data, sorted."""
    found = sorted(Path(out).glob("composites/*/[!.]*"))
    return [path for path in found if path.suffix.lower() in (".tif", ".tiff") and path.is_file()]


def _check_settings(settings: CompositeSettings) -> None:
    if not settings.sensors or not set(settings.sensors) <= set(SENSORS):
        raise PrepError(f"sensors {settings.sensors}: expected L30, S30 or both")
    if settings.statistic not in ("mean", "median"):
        raise PrepError(f"statistic {settings.statistic!r}: expected mean or median")
    if settings.min_clear < 1:
        raise PrepError(f"min_clear {settings.min_clear}: expected 1 or more clear scenes")


def _opened(
    folders: Sequence[Path], threads: int, opener: Callable[[Path], Scene]
) -> tuple[list[Scene], dict[str, str]]:
    """`without_duplicates` of the folders' scenes. PrepError where they don't lie on one grid."""
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(opener, folders))
    scenes, duplicates = without_duplicates(found)
    first = scenes[0]
    for scene in found:
        if not scene.grid.same_as(first.grid):
            raise PrepError(
                f"{scene.folder}: its grid is {scene.grid.describe()}, but {first.granule.name} lies on "
                f"{first.grid.describe()}; expected one grid for all scenes of a tile"
            )
    return scenes, duplicates


def _read_table(path: str) -> Sequence:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrepError(f"{path}: can't read the table of seasons: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep composite", description="Composites of clear observations, one for each tile."
    )
    parser.add_argument("granules", nargs="+", help="granules' folders, or folders that hold such")
    parser.add_argument("--out", required=True, help="folder for {tile}/{tile}_{start}_{end}.tif")
    parser.add_argument("--season", required=True, help="a year (dates by latitude) or START/STOP, STOP not included")
    parser.add_argument(
        "--season-table", help="JSON list of [southernmost latitude, MM-DD, MM-DD, years added, years added]"
    )
    parser.add_argument("--tile", help="this tile alone, for example 10SFF")
    parser.add_argument("--sensors", default="L30", help="L30 (default), S30 or L30+S30")
    add_options(parser, CompositeSettings, without=("sensors",))
    parser.add_argument("--threads", type=int, help="threads for decoding (default: one for each core)")
    add_allow_empty(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    refuse_beside_prepare(args.out)
    table = _read_table(args.season_table) if args.season_table else DEFAULT_TABLE
    tiles: dict[str, list[Path]] = {}
    for folder in dict.fromkeys(folder for path in args.granules for folder in find_scenes(path)):
        tiles.setdefault(parse_granule_name(folder.name).tile, []).append(folder)
    if args.tile is not None:
        tile = args.tile.removeprefix("T")
        if tile not in tiles:
            raise PrepError(f"tile {tile}: no granules of it; found tiles {', '.join(sorted(tiles))}")
        tiles = {tile: tiles[tile]}
    for tile, folders in sorted(tiles.items()):
        latitude = grid_centre(open_scene(folders[0], args.encoding).grid)[1] if args.season.strip().isdigit() else None
        season = resolve_season(args.season, latitude, table)
        report = composite(
            folders,
            composite_path(args.out, tile, season),
            season=season,
            sensors=args.sensors.replace(",", "+"),
            threads=args.threads,
            allow_empty=args.allow_empty,
            **options_of(args, CompositeSettings, without=("sensors",)),
        )
        print("\n".join(report.lines()))
    return 0
