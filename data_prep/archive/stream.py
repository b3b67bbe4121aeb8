"""Composites straight from NASA's archive: no granule is kept, and bands are fetched only where something is clear.

`python -m data_prep stream --tile 10SFF --season 2020 --out DIR`
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from biomass_jax.errors import PrepError, RasterError
from biomass_jax.runtime.settings import add_options, options_of
from data_prep.archive.download import DownloadPlan, plan_hls, token
from data_prep.archive.fetch import AccessError
from data_prep.archive.search import Area, Search, search_archive, search_hls
from data_prep.commands import add_allow_empty, command, refuse_beside_prepare
from data_prep.hls.composite import CompositeReport, composite, composite_path, is_made
from data_prep.hls.granules import Scene, open_far_scene
from data_prep.season import Season, resolve_season
from data_prep.settings import CompositeSettings

THREADS = 8  # scenes that are fetched at a time: most of it is waiting for the server
_LEFT_TO_HLS = ("sensors", "encoding")  # settings that are given otherwise, or that the archive's files don't need
_REFUSED = re.compile(r"HTTP response code: 40[13]|not recognized as")  # a login page comes with code 200


def stream(
    tile: str,
    season: object,
    out: str | os.PathLike[str],
    *,
    sensors: Sequence[str] = ("L30",),
    max_cloud: float = 100.0,
    allow_empty: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int = THREADS,
    search: Search | None = None,
    log_in: Callable[[], str] | None = None,
    log: Callable[[str], None] = print,
    **settings: object,
) -> Path:
    """Make the composite of a tile and a season from the archive's granules, which are read over HTTPS.

    A composite that is there, of the same granules and settings, is kept.

    Args:
        tile: an MGRS tile, `10SFF`.
        season: a year (dates by latitude) or `START/STOP`, STOP not included.
        out: folder for `{tile}/{tile}_{start}_{end}.tif`.
        sensors: `L30`, `S30` or both.
        max_cloud: largest share of cloud in percent as the archive has it.
        allow_empty: see `composite`.
        overwrite: make it again where it is there.
        dry_run: search and say what would be read, without a login.
        threads: scenes fetched at a time.
        search: asks the archive; `search_archive` where None.
        log_in: gives the token for its servers, `download.token` where None; called where something is to be read.
        log: is called with each line of what is found and made.
        **settings: other fields of `CompositeSettings`.

    Returns:
        The composite's path.

    Raises:
        AccessError: no login, or it is refused.
        PrepError: nothing found, a granule without all files, and see `composite`.
        RasterError: a server fails, and see `composite`.
    """
    area = Area(tile=tile.removeprefix("T"))
    when = resolve_season(season, area.latitude)
    answers = search_hls(area, when, sensors=sensors, search=search or search_archive)
    plan = plan_hls(answers, out, season=when, tile=area.tile, max_cloud=max_cloud)
    _say_and_check(plan, when, log)
    path = composite_path(out, str(area.tile), when)
    wanted = CompositeSettings(sensors=tuple(sensors), **settings)  # type: ignore[arg-type]  # which it checks
    kept = not overwrite and not dry_run and is_made(path, list(plan.granules), when, wanted)
    if kept:
        log(f"{path}: made before of the same granules, kept")
    if kept or dry_run:
        return path
    how = {"season": when, "tile": area.tile, "threads": threads, "allow_empty": allow_empty}
    report = _composed(plan, path, (log_in or token)(), **how, **dataclasses.asdict(wanted))
    for line in report.lines():
        log(line)
    return path


def _composed(plan: DownloadPlan, path: Path, secret: str, **how: Any) -> CompositeReport:
    """`composite` of a plan's granules; `secret` is the token for their servers."""
    try:
        return composite(plan.granules, path, opener=_opener(plan, secret), **how)
    except RasterError as error:
        if _REFUSED.search(str(error)):
            raise AccessError(str(error).removeprefix("/vsicurl/")) from error
        raise


def _say_and_check(plan: DownloadPlan, season: Season, log: Callable[[str], None]) -> None:
    """PrepError where there is nothing to read, or not all of it."""
    for line in plan.lines():
        log(line)
    plan.refuse_empty("hls", season)
    if plan.incomplete:
        name, why = min(plan.incomplete.items())
        raise PrepError(f"{len(plan.incomplete)} granules can't be read, first {name}: {why}")


def _opener(plan: DownloadPlan, secret: str) -> Callable[..., Scene]:
    """What opens a scene by its name in place of its folder."""
    access = {"GDAL_HTTP_HEADERS": f"Authorization: Bearer {secret}"}
    urls: dict[str, dict[str, str]] = {}
    for one in plan.files:
        urls.setdefault(one.path.parent.name, {})[one.path.name] = one.url
    return lambda name, encoding: open_far_scene(name.name, urls[name.name], access)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep stream",
        description="A composite straight from NASA's archive, without keeping granules. Needs `earthaccess`.",
    )
    parser.add_argument("--tile", required=True, help="an MGRS tile, for example 10SFF")
    parser.add_argument("--season", required=True, help="a year (by latitude) or START/STOP, STOP not included")
    parser.add_argument("--out", required=True, help="folder for {tile}/{tile}_{start}_{end}.tif")
    parser.add_argument("--sensors", default="L30", help="L30 (default), S30 or L30+S30")
    parser.add_argument("--max-cloud", type=float, default=100.0, help="percent (default 100)")
    add_options(parser, CompositeSettings, without=_LEFT_TO_HLS)
    parser.add_argument("--threads", type=int, default=THREADS, help=f"scenes at a time (default {THREADS})")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read; needs no login")
    parser.add_argument("--overwrite", action="store_true", help="make it again where it is there")
    add_allow_empty(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    refuse_beside_prepare(args.out)
    stream(
        args.tile,
        args.season,
        args.out,
        sensors=args.sensors.replace(",", "+").split("+"),
        max_cloud=args.max_cloud,
        allow_empty=args.allow_empty,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        threads=args.threads,
        **options_of(args, CompositeSettings, without=_LEFT_TO_HLS),
    )
    return 0
