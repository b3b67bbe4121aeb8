"""HLS granules and GEDI orbits from NASA's archives, through `earthaccess`.

A search needs no login; files do. HLS is searched by the name of the tile, because a tile's box meets up to eight
neighbours, or by an area; only the files that are used are taken. What is there and whole is not taken again.
"""

import argparse
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from biomass_jax.errors import PrepError
from biomass_jax.runtime.settings import add_options
from data_prep.archive.fetch import WORKERS, AccessError, OpenUrl, Response, Wanted, fetch_all
from data_prep.archive.search import (
    GEDI_COVERAGE,
    Area,
    earthaccess_library,
    read_area,
    search_archive,
    search_gedi,
    search_hls,
)
from data_prep.commands import command, refuse_beside_prepare
from data_prep.hls.granules import needed_layers, parse_granule_name
from data_prep.places import check_box
from data_prep.season import Season, resolve_season
from data_prep.settings import LabelSettings


@dataclass
class DownloadPlan:
    """Files to get.

    Attributes:
        files: all of them, present ones too.
        granules: name -> (number of files, exact bytes or None, bytes of the whole granule or None).
        left_out: granule -> why.
        incomplete: granule -> what its answer lacks.
    """

    files: list[Wanted] = field(default_factory=list)
    granules: dict[str, tuple[int, int | None, int | None]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The plan as text, sums last."""
        lines = []
        exact = most = 0
        for name, (files, size, whole) in self.granules.items():
            known = f"{size / 1e6:,.1f} MB" if size is not None else f"part of {(whole or 0) / 1e6:,.1f} MB"
            lines.append(f"{name}: {files} files, {known if size or whole else 'size unknown'}")
            exact, most = exact + (size or 0), most + (whole or 0 if size is None else size)
        lines += [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        lines += [f"{name}: can't be used, {why}" for name, why in self.incomplete.items()]
        total = f"{exact / 1e6:,.1f} MB" if exact == most else f"at most {most / 1e6:,.1f} MB"
        lines.append(f"{len(self.granules)} granules, {len(self.files)} files, {total}; {len(self.left_out)} left out")
        return lines

    def refuse_empty(self, product: str, season: Season) -> None:
        """PrepError where nothing was found, or all of it was left out; `product` is `hls` or `gedi`."""
        if self.granules or self.incomplete:
            return
        advice = GEDI_COVERAGE if product == "gedi" else "check the place and the dates"
        if self.left_out:
            name, why = min(self.left_out.items())
            advice = f"{len(self.left_out)} were left out, first {name}: {why}"
        raise PrepError(f"no {product} granules found for {season.text}; {advice}")


def plan_hls(
    answers: Sequence[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    season: Season,
    tile: str | None = None,
    max_cloud: float = 100.0,
) -> DownloadPlan:
    """Choose granules and their needed files; they go to `{out}/hls/{granule}/`.

    Args:
        answers: UMM-G granules.
        out: folder of granules.
        season: dates in the names that are wanted.
        tile: this tile alone.
        max_cloud: largest share of cloud in percent as the archive has it; a granule without one is kept.
    """
    plan = DownloadPlan()
    for name, umm in _by_name(answers).items():
        try:
            granule = parse_granule_name(name)
        except PrepError as error:
            plan.left_out[name] = str(error)
            continue
        cloud = _cloud(umm)
        if tile is not None and granule.tile != tile:
            plan.left_out[name] = f"tile {granule.tile}"
        elif not season.contains(granule.acquired):
            plan.left_out[name] = f"not in season {season.text}"
        elif cloud is not None and cloud > max_cloud:
            plan.left_out[name] = f"{cloud:g} % cloud"
        else:
            wanted = [f"{granule.name}.{layer}.tif" for layer in needed_layers(granule.sensor)]
            _add(plan, name, umm, wanted, Path(out, "hls", granule.name))
    return plan


def plan_gedi(answers: Sequence[Mapping[str, Any]], out: str | os.PathLike[str]) -> DownloadPlan:
    """The HDF5 file of each orbit; they go to `{out}/gedi/`."""
    plan = DownloadPlan()
    for name, umm in _by_name(answers).items():
        files = sorted(file for file in _links(umm) if file.endswith(".h5"))
        _add(plan, name, umm, files[:1] or ["*.h5"], Path(out, "gedi"))
    return plan


def log_in() -> OpenUrl:
    """Log in with what the environment or netrc holds.

    Raises:
        AccessError: nothing there, or it is refused; the message gives the steps.
    """
    _authenticated()
    earthaccess = earthaccess_library()
    local = threading.local()  # a session is for one thread

    def open_url(url: str, headers: Mapping[str, str]) -> Response:
        if not hasattr(local, "session"):
            local.session = earthaccess.get_requests_https_session()
        return local.session.get(url, headers=dict(headers), stream=True, timeout=(30, 120))

    return open_url


def token() -> str:
    """Log in as `log_in` does; the token that the archive's servers take in place of a name and a password."""
    return str(_authenticated().token["access_token"])


def _authenticated() -> Any:
    """What `earthaccess` holds of a login."""
    earthaccess = earthaccess_library()
    from earthaccess.exceptions import LoginAttemptFailure, LoginStrategyUnavailable

    reasons = []
    for strategy in ("environment", "netrc"):
        try:
            found = earthaccess.login(strategy=strategy)
            if found.authenticated:
                return found
        except LoginStrategyUnavailable as error:
            reasons.append(str(error))
        except LoginAttemptFailure as error:
            raise AccessError(f"Earthdata login refused what the {strategy} holds: {error}") from error
        except OSError as error:
            raise PrepError(f"Earthdata login can't be reached: {error}") from error
    raise AccessError(f"no Earthdata login found ({'; '.join(reasons)})")


def _by_name(answers: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """{granule: its UMM-G record}, sorted, each once however many searches found it."""
    records = [answer["umm"] for answer in answers]
    return {umm["GranuleUR"]: umm for umm in sorted(records, key=lambda umm: umm["GranuleUR"])}


def _links(umm: Mapping[str, Any]) -> dict[str, str]:
    """{file: its HTTPS address}."""
    links = {}
    for related in umm.get("RelatedUrls", ()):
        url = related.get("URL", "")
        if related.get("Type") == "GET DATA" and url.startswith(("https://", "http://")):
            links[PurePosixPath(urlsplit(url).path).name] = url
    return links


def _sizes(umm: Mapping[str, Any]) -> tuple[dict[str, int], int | None]:
    """({file: exact bytes}, bytes of all files), as far as the record tells."""
    units = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
    exact: dict[str, int] = {}
    total = 0.0
    for entry in umm.get("DataGranule", {}).get("ArchiveAndDistributionInformation", ()):
        if "SizeInBytes" in entry:
            exact[entry.get("Name", "")] = int(entry["SizeInBytes"])
            total += entry["SizeInBytes"]
        else:
            total += entry.get("Size", 0) * units.get(entry.get("SizeUnit", ""), 1)
    return exact, int(total) or None


def _cloud(umm: Mapping[str, Any]) -> float | None:
    """Percent of cloud, None where the record doesn't tell."""
    for attribute in umm.get("AdditionalAttributes", ()):
        if attribute.get("Name") == "CLOUD_COVERAGE" and attribute.get("Values"):
            return float(attribute["Values"][0])
    return float(umm["CloudCover"]) if "CloudCover" in umm else None


def _add(plan: DownloadPlan, name: str, umm: Mapping[str, Any], files: Sequence[str], folder: Path) -> None:
    links, (exact, total) = _links(umm), _sizes(umm)
    missing = [file for file in files if file not in links]
    if missing:
        plan.incomplete[name] = f"the archive's answer has no link to {', '.join(missing)}"
        return
    plan.files += [Wanted(links[file], folder / file, exact.get(file)) for file in files]
    known = sum(exact[file] for file in files) if all(file in exact for file in files) else None
    plan.granules[name] = (len(files), known, total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep download",
        description="Download HLS granules or GEDI L4A or L2A orbits. Needs `earthaccess`.",
    )
    products = parser.add_subparsers(dest="product", required=True)
    for product, text in (
        ("hls", "HLS v2.0 granules, the bands in use and Fmask"),
        ("gedi", "GEDI orbits, L4A v2.1 or L2A"),
    ):
        one = products.add_parser(product, help=text, description=text)
        where = one.add_mutually_exclusive_group(required=True)
        where.add_argument("--tile", help="an MGRS tile, for example 10SFF")
        where.add_argument("--bbox", nargs=4, type=float, metavar=("WEST", "SOUTH", "EAST", "NORTH"), help="degrees")
        where.add_argument("--area", metavar="FILE", help="GeoJSON with polygons")
        one.add_argument("--season", required=True, help="a year (by latitude) or START/STOP, STOP not included")
        one.add_argument(
            "--out", required=True, help="folder of granules; they go to hls/{granule}/ and gedi/ below it"
        )
        one.add_argument("--workers", type=int, default=WORKERS, help=f"files at a time (default {WORKERS})")
        one.add_argument("--dry-run", action="store_true", help="list and sum what would be downloaded; needs no login")
        if product == "hls":
            one.add_argument("--sensors", default="L30", help="L30 (default), S30 or L30+S30")
            one.add_argument("--max-cloud", type=float, default=100.0, help="percent (default 100)")
        else:
            add_options(one, LabelSettings, without=("shot_owner",))
            one.add_argument("--label-years", type=int, default=0, help="years either side whose seasons are taken too")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 1 where something failed."""
    args = _parser().parse_args(argv)
    if args.area is not None:
        area = read_area(args.area)
    else:
        tile = args.tile and args.tile.removeprefix("T")
        area = Area(tile=tile, box=check_box(tuple(args.bbox)) if args.bbox else None)
    season = resolve_season(args.season, area.latitude)
    if args.product == "hls":
        answers = search_hls(area, season, sensors=args.sensors.split("+"), search=search_archive)
        plan = plan_hls(answers, args.out, season=season, tile=area.tile, max_cloud=args.max_cloud)
    else:
        how: dict[str, Any] = {"search": search_archive, "label": args.label}
        plan = plan_gedi(search_gedi(area, season.widened(args.label_years), **how), args.out)
    print("\n".join(plan.lines()))
    plan.refuse_empty(args.product, season)
    if args.dry_run:
        return 0
    refuse_beside_prepare(args.out)
    result = fetch_all(plan.files, log_in, workers=args.workers, log=print)
    print(
        f"{len(result.received)} files downloaded ({result.bytes / 1e6:,.1f} MB), {len(result.present)} were there, "
        f"{len(result.failed)} failed"
    )
    return 1 if result.failed or plan.incomplete else 0
