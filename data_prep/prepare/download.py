"""`prepare`'s first step where granules are not given: each tile's scenes and orbits from NASA's archives."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from biomass_jax.errors import PrepError
from data_prep.archive.download import log_in, plan_gedi, plan_hls
from data_prep.archive.fetch import OpenUrl, fetch_all
from data_prep.archive.search import Area, Search, search_archive, search_gedi, search_hls
from data_prep.gedi.names import product_of
from data_prep.prepare.runner import Runner
from data_prep.prepare.state import StepJob
from data_prep.season import DEFAULT_TABLE, resolve_season


def download_tiles(
    config: Mapping[str, Any], runner: Runner, *, search: Search | None = None, open_url: OpenUrl | None = None
) -> None:
    """Get what the config's tiles need into `granules/`; tiles that have been searched with these settings are left.

    Args:
        config: the fields of configs/prepare.py.
        runner: takes records and errors; jobs run in this process.
        search: asks the archive; earthaccess where None.
        open_url: asks for a file; None logs in with the environment's or netrc's credentials.

    Raises:
        PrepError: no tiles are named, or granules are said to be elsewhere.
    """
    given = config["granules"]
    if given["hls"] or given["gedi"]:
        raise PrepError("granules.download fills OUT/granules; leave granules.hls and granules.gedi empty with it")
    if not config["tiles"]:
        raise PrepError("granules.download needs tiles, as --config.tiles=\"('10SFF', '10SGF')\"")
    names = ("season", "season_table", "label_years")
    settings = {name: config[name] for name in names} | {"max_cloud": given["max_cloud"]}
    settings |= {"sensors": sorted(set(config["composite"]["sensors"]))}
    jobs = []
    for tile in sorted({tile.removeprefix("T") for tile in config["tiles"]}):
        arguments = {
            "tile": tile,
            "settings": settings,
            "runner": runner,
            "search": search or search_archive,
            "open_url": open_url,
        }
        jobs.append(StepJob("download", tile, download_tile, arguments, settings, (), ()))
    runner.run("download", jobs, lambda r: f"{len(r['scenes'])} scenes, {len(r['orbits'])} orbits", here=True)


def download_tile(
    tile: str, settings: Mapping[str, Any], runner: Runner, search: Search, open_url: OpenUrl | None
) -> dict[str, Any]:
    """One tile's granules; names of its scenes and orbits.

    Raises:
        PrepError: nothing is found, or a file can't be had.
    """
    area, granules = Area(tile=tile), runner.state.out / "granules"
    season = resolve_season(settings["season"], area.latitude, settings["season_table"] or DEFAULT_TABLE)
    scenes = plan_hls(
        search_hls(area, season, sensors=settings["sensors"], search=search),
        granules,
        season=season,
        tile=tile,
        max_cloud=settings["max_cloud"],
    )
    orbits = plan_gedi(search_gedi(area, season.widened(settings["label_years"]), search=search), granules)
    for what, plan in (("scenes", scenes), ("orbits", orbits)):
        if plan.incomplete:
            name, why = min(plan.incomplete.items())
            raise PrepError(f"{len(plan.incomplete)} {what} can't be had, first {name}: {why}")
        if not plan.granules:
            raise PrepError(f"the archive has no {what} of tile {tile} in {season.text} within these settings")
    wanted = [*scenes.files, *(file for file in orbits.files if not _discarded(runner, file.path))]
    found = fetch_all(wanted, _when_needed(open_url), say=runner.say)
    if found.failed:
        path, why = min(found.failed.items())
        raise PrepError(f"{len(found.failed)} of {len(wanted)} files were not downloaded, first {path.name}: {why}")
    return {"scenes": sorted(scenes.granules), "orbits": sorted(orbits.granules)}


def _discarded(runner: Runner, path: Path) -> bool:
    """Whether an orbit has been used for another tile, and then deleted."""
    product = product_of(path.name)
    record = runner.state.read("gedi", product.granule) if product else None
    return record is not None and bool(record.discarded)


def _when_needed(open_url: OpenUrl | None) -> OpenUrl:
    """Log in with the first file, so that a folder that has all of them needs no credentials."""
    made: list[Callable[..., Any]] = [] if open_url is None else [open_url]

    def opened(url: str, headers: Mapping[str, str]) -> Any:
        if not made:
            made.append(log_in())
        return made[0](url, headers)

    return opened
