"""`biomass-jax report`: maps and all that is known of them on one page that needs no other file.

Rasters are found by their tags: maps of `predict`, mosaics, changes. Pages of `zones`, `compare` and `validate` are
taken as they are, scores of `evaluate` from their `metrics.json`. The words say only what these files tell.
"""

import argparse
import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from biomass_jax import figures
from biomass_jax.data.labels import BIOMASS, Label, named, unit_text
from biomass_jax.data.raster import stac
from biomass_jax.data.raster.image import read_preview, read_tags
from biomass_jax.data.raster.warp import MapFile, map_file
from biomass_jax.data.raster.zonal import SD, SIGNIFICANT
from biomass_jax.data.records import is_season
from biomass_jax.errors import RegionalError
from biomass_jax.figures import page as pages
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local, write_text
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.version import __version__

MOST_SHOWN = 12  # rasters with a picture; all are in the table
_PREVIEW = 700  # pixels along the longer side of a picture
# (what for, reference); the software's own entry names its version.
REFERENCES = {
    "software": f"The biomass_jax authors: biomass_jax, version {__version__}.",
    "model": "Muszynski et al. (2024): Fine-tuning of Geospatial Foundation Models for Aboveground Biomass Estimation. "
    "arXiv, https://doi.org/10.48550/arXiv.2406.19888",
    "L30": "Masek et al. (2021): HLS Landsat Operational Land Imager Surface Reflectance and TOA Brightness Daily "
    "Global 30m v2.0. NASA LP DAAC, https://doi.org/10.5067/HLS/HLSL30.002",
    "S30": "Masek et al. (2021): HLS Sentinel-2 Multi-spectral Instrument Surface Reflectance Daily Global 30m v2.0. "
    "NASA LP DAAC, https://doi.org/10.5067/HLS/HLSS30.002",
    "labels": "The labels, where they are GEDI's: Dubayah et al. (2022): GEDI L4A Footprint Level Aboveground Biomass "
    "Density, Version 2.1. ORNL DAAC, https://doi.org/10.3334/ORNLDAAC/2056",
    "intervals": "Lei et al. (2018): Distribution-free predictive inference for regression. Journal of the American "
    "Statistical Association 113, https://doi.org/10.1080/01621459.2017.1307116",
}


class ReportParts(NamedTuple):
    """What a folder holds: rasters with their kind, scores with their file, pages as (title, body) in HTML."""

    rasters: list[tuple[str, MapFile]]
    scores: list[tuple[Path, dict[str, Any]]]
    pages: list[tuple[str, str]]


def find(folders: Iterable[Path]) -> ReportParts:
    """Look through folders and those below them, in order of their names.

    Raises:
        RegionalError: nothing is found, a folder isn't there, or a file of scores can't be read.
        RasterError: a raster can't be read.
    """
    found = ReportParts([], [], [])
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise RegionalError(f"{folder}: no such folder; expected one with maps, scores or pages")
        for path in sorted(one for one in folder.rglob("*") if one.suffix in (".tif", ".json", ".html")):
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            if path.suffix == ".tif":
                if kind := stac.kind_of(read_tags(path)):
                    found.rasters.append((kind, map_file(path)))
            elif path.name == "metrics.json":
                found.scores.append((path, _scores(path)))
            elif path.suffix == ".html" and (page := _page_of(path)) is not None:
                found.pages.append(page)
    if not (found.rasters or found.scores or found.pages):
        raise RegionalError(
            f"{', '.join(map(str, folders))}: no map, mosaic or change of biomass-jax, no scores (metrics.json) and no "
            "page of zones, compare or validate"
        )
    return found


def _scores(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegionalError(f"{path}: can't be read as scores of biomass-jax evaluate: {error}") from error
    if not isinstance(found, dict) or not {"n", "rmse", "bias", "bundle", "data"} <= set(found):
        raise RegionalError(
            f"{path}: not the scores that biomass-jax evaluate writes; move it elsewhere, or score anew"
        )
    return found


def _page_of(path: Path) -> tuple[str, str] | None:
    try:
        return pages.read_page(path)
    except OSError as error:
        raise RegionalError(f"{path}: it, or a picture of it, can't be read: {error}; make the page anew") from error


def report(folders: Sequence[str | Path], out: str | Path, *, title: str = "Above-ground biomass") -> ReportParts:
    """Write the page.

    Args:
        folders: with maps, scores and pages.
        out: the page.
        title: its heading.

    Raises:
        RegionalError: nothing to report, or a file that can't be read.
        RasterError: a raster can't be read.
    """
    found = find(map(Path, folders))
    maps = [(kind, one) for kind, one in found.rasters if kind != "change"]
    changes = [(kind, one) for kind, one in found.rasters if kind == "change"]
    parts = [*_section("Maps", maps), *_section("Change", changes)]
    for name, body in found.pages:
        parts += [f"<h2>{name}</h2>", body.replace("<h2>", "<h3>").replace("</h2>", "</h3>")]
    if found.scores:
        parts += ["<h2>Scores on held-out footprints</h2>", _table_of_scores(found), *_pictures_of_scores(found)]
    words = methods(found)
    parts += ["<h2>Methods</h2>", *(f"<p>{html.escape(text)}</p>" for text in words)]
    parts += ["<h2>How to cite</h2><ul>", *(f"<li>{html.escape(text)}</li>" for text in references(found)), "</ul>"]
    parts += ["<h2>Inputs</h2>", *_inputs(found), f"<p>Made by biomass_jax {__version__}.</p>"]
    write_text(out, pages.page(title, parts, maker=pages.REPORT))
    return found


def _section(title: str, rasters: Sequence[tuple[str, MapFile]]) -> list[str]:
    """Pictures and the table of some rasters; nothing where there are none."""
    if not rasters:
        return []
    unit = next(iter(rasters[0][1].layers.values()))
    head = ["", "what", "time", "sensors", "with data, ha", f"mean, {unit}", f"mean standard deviation, {unit}"]
    parts = [f"<h2>{title}</h2>", pages.table(head, [_row(kind, one) for kind, one in rasters])]
    for _, one in rasters[:MOST_SHOWN]:
        parts.append(f"<figure>{_picture(one)}<figcaption>{html.escape(Path(one.path).stem)}</figcaption></figure>")
    if len(rasters) > MOST_SHOWN:
        parts.append(f"<p>Pictures of the first {MOST_SHOWN} of {len(rasters):,}; the table has all.</p>")
    return parts


def _picture(one: MapFile) -> str:
    """A raster's quicklook where it has one, else a drawing of its first layers."""
    path = Path(one.path)
    quicklook = stac.quicklook_path(path)
    if quicklook.is_file():
        return pages.picture(quicklook.read_bytes(), f"{path.stem} beside its image")
    names = list(one.layers)
    shown = [name for name in names if name in (names[0], f"{names[0]}{SD}", SIGNIFICANT)]
    layers = {name: read_preview(one.path, _PREVIEW, number=names.index(name) + 1) for name in shown}
    drawn = figures.layer_panels(layers, unit=one.layers[names[0]])
    return pages.picture(figures.to_png(drawn), ", ".join(shown))


def _row(kind: str, one: MapFile) -> list[str]:
    statistics = dict(zip(one.layers, stac.statistics_of(one.path), strict=True))
    first = next(iter(one.layers))
    sizes, share = one.grid.pixel_size(), statistics[first].get("valid_percent")
    area = "" if share is None or sizes is None else _hectares(one, share, *sizes)
    means = [statistics.get(name, {}).get("mean") for name in (first, f"{first}{SD}")]
    sensors = ", ".join(sorted({one.tags[tag] for tag in one.tags if tag.startswith("SENSORS") and one.tags[tag]}))
    cells = [Path(one.path).name, kind, _when(one), sensors, area]
    return cells + ["" if mean is None else f"{mean:.1f}" for mean in means]


def _hectares(one: MapFile, percent: float, across: float, down: float) -> str:
    return f"{one.grid.height * one.grid.width * percent / 100 * across * down / 1e4:,.0f}"


def _when(one: MapFile) -> str:
    """The days that a raster tells of, or the seasons of a change."""
    seasons = [one.tags.get(tag, "") for tag in ("SEASON", "SEASON_BEFORE", "SEASON_AFTER")]
    return " and ".join(_days(season) for season in seasons if season and season != "unknown")


def _days(season: str) -> str:
    if not is_season(season):
        return season
    first, stop = season.split("/")
    return f"{first} to {date.fromisoformat(stop) - timedelta(days=1)}"


def _table_of_scores(found: ReportParts) -> str:
    rows, alike = [], len({_unit(one) for _, one in found.scores}) == 1
    for path, one in found.scores:
        sure = one.get("uncertainty") or {}
        level = f" of {sure['level']:.0%}" if "level" in sure else ""
        rows.append(
            [
                path.parent.name + ("" if alike else f", {_unit(one)}"),
                f"{one['n']:,}",
                str((one.get("interval") or {}).get("blocks", "")),
            ]
            + [_between(one, "rmse", ".1f"), _between(one, "bias", "+.1f"), _between(one, "r2", ".2f")]
            + [f"{_between(sure, 'coverage', '.1%')}{level}" if "coverage" in sure else ""]
        )
    units = {_unit(one) for _, one in found.scores}
    of = f", {units.pop()}" if len(units) == 1 else ""
    head = ["", "labelled pixels", "blocks of ground", f"RMSE{of}", f"bias{of}", "R2", "intervals hold"]
    return pages.table(head, rows)


def _unit(scores: Mapping[str, Any]) -> str:
    """The unit of scores, as texts have it; earlier ones, of biomass, don't all tell it."""
    return unit_text(scores.get("label", {}).get("units", BIOMASS.units))


def _between(one: Mapping[str, Any], name: str, form: str) -> str:
    """A score and its interval, as far as there are."""
    value, low, high = (one.get(field) for field in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    return format(value, form) + ("" if low is None else f" ({format(low, form)} to {format(high, form)})")


def _pictures_of_scores(found: ReportParts) -> list[str]:
    paths = [path.with_name(name) for path, _ in found.scores for name in ("density_scatter.png", "uncertainty.png")]
    return [pages.picture(path.read_bytes(), f"Scores: {path.stem}") for path in paths if path.is_file()]


def methods(found: ReportParts) -> list[str]:
    """Paragraphs of plain words; each says only what the files tell."""
    maps = [one for kind, one in found.rasters if kind != "change"]
    words = []
    if maps:
        words.append(_about_maps(maps))
        words += [text for text in [_about_intervals(maps)] if text]
    words += [_about_scores(one) for _, one in found.scores]
    words += [_about_change(one) for kind, one in found.rasters if kind == "change"]
    if any(kind == "mosaic" for kind, _ in found.rasters):
        words.append(
            "Maps were brought to one grid by area: each new pixel is the mean of the maps' pixels in it, weighted by "
            "the area that each has there, and where maps overlap by the rule that the mosaic's file names "
            f"({', '.join(sorted({one.tags.get('OVERLAP', '') for one in maps} - {''}))})."
        )
    if {BIOMASS.name} & {label.name for label in _labels(maps)} or not maps:
        words.append(_OF_BIOMASS)
    return words


_TITLES = {BIOMASS.name: "Above-ground biomass density"}  # of what was mapped, in a sentence
_OF_BIOMASS = (
    "Biomass is the dry mass of living plants above the ground. A model that learnt from lidar footprints takes "
    "over their errors: scores against footprints tell nothing of those, which takes field plots. Images show "
    "surfaces, and in dense forest they hardly differ, so high biomass tends to be mapped too low, and low biomass "
    "too high."
)


def _labels(maps: Sequence[MapFile]) -> list[Label]:
    """What maps are of, each label once, in the order of the maps."""
    found = [named(next(iter(one.layers))) or BIOMASS for one in maps]
    return list(dict.fromkeys(found))


def _about_maps(maps: Sequence[MapFile]) -> str:
    size = sorted({f"{max(one.grid.pixel_size() or (0.0,)):.0f}" for one in maps})
    times = sorted({text for one in maps if (text := _when(one))})
    images = "HLS (Harmonized Landsat and Sentinel-2) images" if _granules(maps) else "satellite images"
    models = _models(maps)
    what = " and ".join(_TITLES.get(label.name, label.title) for label in _labels(maps))
    return (
        f"{what} was mapped in pixels of {' and '.join(size)} m from {images}"
        + (f" of {'; '.join(times[:6])}{' and more' if len(times) > 6 else ''}" if times else "")
        + " by a Swin Transformer with a UPerNet decoder, the architecture of granite-geospatial-biomass (Muszynski et "
        f"al. 2024), {'model' if len(models) == 1 else 'models'} {', '.join(model[:12] for model in models)}, with "
        f"{' and '.join(sorted({one.tags.get('SOFTWARE', 'biomass_jax') for one in maps}))}."
    )


def _about_intervals(maps: Sequence[MapFile]) -> str:
    told = [one for one in maps if "CALIBRATION" in one.tags and "INTERVAL_LEVEL" in one.tags]
    if not told:
        return ""
    level = float(told[0].tags["INTERVAL_LEVEL"])
    try:
        whole = json.loads(told[0].tags["CALIBRATION"])["groups"][0]
        on = f" on {whole['pixels']:,} labelled pixels in {whole['blocks']} blocks of ground apart from training's"
    except (ValueError, LookupError, TypeError):
        on = ""
    return (
        f"Each pixel has a standard deviation and a {level:.0%} interval. The intervals were calibrated{on}, by split "
        f"conformal prediction (Lei et al. 2018): of labels on ground like that, {level:.0%} are to lie in them. They "
        "are about single pixels; errors of neighbouring pixels go together, so the error of a sum over an area isn't "
        "found by adding up those of its pixels as if independent."
    )


def _about_scores(one: Mapping[str, Any]) -> str:
    text = f"On {one['n']:,} labelled pixels that were set aside the root mean square error was "
    text += f"{_between(one, 'rmse', '.1f')} {_unit(one)} and the bias {_between(one, 'bias', '+.1f')} {_unit(one)}"
    if one.get("interval"):
        text += f" (95 % intervals by a jackknife over {one['interval']['blocks']} blocks of ground)"
    sure = one.get("uncertainty") or {}
    if "coverage" in sure:
        text += f"; intervals of {sure['level']:.0%} held {_between(sure, 'coverage', '.1%')} of the labels"
    return f"{text}."


def _about_change(one: MapFile) -> str:
    tags = one.tags
    where = "on stable ground" if tags.get("STABLE", "None") != "None" else "where most of the ground is unchanged"
    return (
        f"Change between {_when(one) or 'the two maps'}: the errors of the two maps have the correlation "
        f"{float(tags.get('ERROR_CORRELATION', 'nan')):.2f}, found {where}, which the standard deviation of "
        f"the difference counts. Changes are called significant so that at most {float(tags.get('FDR', 'nan')):.0%} of "
        "those that are called so are chance (false discovery rate, Benjamini and Hochberg 1995), and in patches of at "
        f"least {float(tags.get('MIN_AREA_HA', 'nan')):g} ha."
    )


def references(found: ReportParts) -> list[str]:
    """What to cite for what was found."""
    files = [one for _, one in found.rasters]
    granules = _granules(files)
    wanted = ["software"]
    wanted += ["model"] if files or found.scores else []
    wanted += [name for name in ("L30", "S30") if any(f"HLS.{name}." in one for one in granules)]
    wanted += ["labels"] if found.scores else []
    wanted += ["intervals"] if any("CALIBRATION" in one.tags for one in files) else []
    return [REFERENCES[name] for name in wanted]


def _granules(files: Iterable[MapFile]) -> list[str]:
    """Names of the HLS granules that maps tell they were made from."""
    names = {name.strip() for one in files for name in one.tags.get("DATA_SOURCES", "").split(";")}
    return sorted(name for name in names if name.startswith("HLS."))


def _models(files: Iterable[MapFile]) -> list[str]:
    return sorted({model for one in files for model in stac.models_of(one.tags)})


def _inputs(found: ReportParts) -> list[str]:
    """Every input's name or digest, as lists that open."""
    files = [one for _, one in found.rasters]
    models = {*_models(files), *(str(one["bundle"].get("weights_sha256", "")) for _, one in found.scores)}
    lists = {
        "Satellite images": _granules(files),
        "Images and composites (digest of their files)": sorted({one.tags.get("SOURCE_FILES", "") for one in files}),
        "Models (SHA-256 of their weights)": sorted(models),
        "Chips that were scored (SHA-256 of the data set)": sorted(
            {str(one["data"].get("sha256", "")) for _, one in found.scores}
        ),
        "Rasters (digest of each file)": [f"{Path(one.path).name}: {one.identity}" for one in files],
    }
    parts = []
    for title, names in lists.items():
        if names := [name for name in names if name]:
            items = "".join(f"<li>{html.escape(name)}</li>" for name in names)
            parts.append(f"<details><summary>{title}: {len(names):,}</summary><ul>{items}</ul></details>")
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.report",
        description="Maps and all that is known of them on one page that needs no other file.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders with maps, scores and pages")
    parser.add_argument("--out", metavar="FILE", help="the page to write (report.html in the first folder)")
    parser.add_argument("--title", default="Above-ground biomass", metavar="TEXT", help="its heading")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        environment.settle(jax=False)
        for folder in args.folders:
            check_local(folder, "DIR")
        check_local(args.out, "--out")
        out = Path(args.out or Path(args.folders[0]) / "report.html")
        with writer_beside(out):
            found = report(args.folders, out, title=args.title)
    except Exception as error:
        return environment.failed(error)
    print(f"{out}: {len(found.rasters):,} rasters, {len(found.scores)} scores, {len(found.pages)} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
