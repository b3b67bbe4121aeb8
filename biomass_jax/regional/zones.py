"""`biomass-jax zones`: biomass by zone with its standard error, a row a zone, from maps, footprints or both."""

import argparse
import html
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from biomass_jax.data.gedi import Gradients, read_gradients
from biomass_jax.data.raster.zonal import At, Maps
from biomass_jax.data.vectors import (
    Footprints,
    add_columns,
    check_table,
    ground_area,
    inside_of,
    outlines,
    read_footprints,
    read_zones,
    write_table,
)
from biomass_jax.errors import RegionalError, name_list
from biomass_jax.figures import page as pages
from biomass_jax.regional import estimators
from biomass_jax.regional.estimators import Correlation, Estimate, Lattice
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local, expanded, write_text
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.progress import Progress
from biomass_jax.runtime.settings import Range, add_options, checked, options_of, setting
from biomass_jax.version import __version__

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely import Geometry

AUTO, MAP, ASSISTED, HYBRID, NONE = "auto", "map", "model_assisted", "hybrid", "none"
METHODS = (AUTO, MAP, ASSISTED, HYBRID, NONE)
CO2_OF_CARBON = 44 / 12  # ratio of molar masses
_SHARE = Range(0, 1, "[]")


@dataclass(frozen=True)
class Zones:
    """The settings of `zones`."""

    method: str = setting(
        AUTO,
        "where the standard error comes from; auto: model_assisted with footprints, map with --range-km, else none",
        choices=METHODS,
    )
    level: float = setting(0.95, "of the intervals", within=Range(0, 1, "()"))
    clusters: str = setting("track", "what counts as one cluster of footprints", choices=("track", "orbit"))
    range_km: float | None = setting(
        None, "map: how far errors go together, instead of a fit", within=Range(0, ends="()")
    )
    nugget: float | None = setting(None, "map: share of an error's variance that is each pixel's own", within=_SHARE)
    common: float | None = setting(
        None, "map: share of an error's variance that all pixels have in common", within=_SHARE
    )
    correlation: str = setting("exponential", "map: how errors go together over distance", choices=estimators.MODELS)
    max_lag_km: float = setting(
        20.0, "map: pairs of footprints that are fitted lie at most so far apart", within=Range(0, ends="()")
    )
    shared_sigma: float = setting(
        1.0, "hybrid: share of footprints' own variance that all have in common, without --granules", within=_SHARE
    )
    classes: str | None = setting(None, "raster of classes: a row for each zone and class")
    keep: tuple[int, ...] = setting((), "of the classes: these alone, together in one row a zone (a forest mask)")
    scale_to_zone: bool = setting(False, "totals of the whole zone, as if the part without data were as the rest")
    carbon_fraction: float | None = setting(
        None, "of biomass, such as 0.47: adds columns of carbon and CO2 equivalents", within=Range(0, 1, "(]")
    )
    layer: str | None = setting(None, "of a file of zones that has several")
    seed: int = setting(0, "of the draw of pairs for the fit", within=Range(0))


class Sums(NamedTuple):
    """Of a zone's pixels of one kind: ha, Mg, how many, and the lattice of their errors."""

    area: float = 0.0
    total: float = 0.0
    pixels: int = 0
    lattice: Lattice | None = None


class Shots(NamedTuple):
    """Footprints, what the maps have there, which cluster each is of, and how it hangs on GEDI's models, if told."""

    of: Footprints
    at: At
    cluster: np.ndarray
    models: Gradients | None


class Done(NamedTuple):
    """What came of it: the table, the way of its errors, how errors go together where that was needed."""

    table: "GeoDataFrame"
    method: str
    correlation: Correlation | None
    footprints: int


def zones(
    maps: Sequence[str | Path],
    places: str | Path,
    *,
    footprints: Sequence[str | Path] = (),
    granules: Sequence[str | Path] = (),
    **settings: object,
) -> Done:
    """Biomass by zone.

    Args:
        maps: paths of maps; where they overlap the first one that has data counts. None are needed for `hybrid`.
        places: the file of zones.
        footprints: tables of footprints, or folders of such.
        granules: of GEDI L4A, that the footprints are from, or folders of such; for `hybrid`.
        **settings: fields of `Zones`.

    Returns:
        The zones with the columns that docs/regional.md lists; NaN where something can't be told, and why in `note`.

    Raises:
        RegionalError: settings that contradict each other, zones or footprints that can't be used.
        ConfigError: a setting out of its range.
        RasterError: a map can't be read.
    """
    chosen = _checked(settings, maps, footprints)
    frame = read_zones(places, chosen.layer)
    found = outlines(frame, str(places))
    method = _method(chosen, bool(footprints))
    if granules and method != HYBRID:
        raise RegionalError(f"--granules tell of GEDI's models, which method {method} doesn't take; only hybrid does")
    with Maps(maps, chosen.classes) as surface:
        for entry in surface.entries:
            if method == MAP and entry.sd is None:
                raise RegionalError(
                    f"{entry.path}: no band agbd_sd, the standard deviations that method map is about; make the map "
                    "with a calibrated bundle, or take another --method"
                )
        shots = None
        if footprints:
            boxes = [entry.box for entry in surface.entries] if method == MAP else [one.bounds for one in found]
            shots = _shots(read_footprints(footprints, boxes), granules, surface, chosen, method)
        correlation = _correlation(chosen, shots) if method == MAP else None
        rows: list[dict[str, Any]] = []
        with Progress("zones", len(found), terminal=False, every=15.0) as shown:
            for number, outline in enumerate(found):
                rows += [{"zone": number} | row for row in _rows(surface, outline, shots, correlation, method, chosen)]
                shown.advance(1)
    table = frame.iloc[[row.pop("zone") for row in rows]].reset_index(drop=True)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Done(add_columns(table, columns), method, correlation, 0 if shots is None else len(shots.cluster))


def _checked(settings: dict[str, object], maps: Sequence[Any], footprints: Sequence[Any]) -> Zones:
    chosen = checked(Zones, settings)
    if chosen.keep and chosen.classes is None:
        raise RegionalError("keep (--keep) names classes, but there is no raster of classes; give --classes RASTER")
    if chosen.method == HYBRID and (chosen.classes or chosen.scale_to_zone):
        raise RegionalError("hybrid takes no map: neither classes (--classes) nor --scale-to-zone go with it")
    if chosen.classes and chosen.scale_to_zone:
        raise RegionalError("--scale-to-zone goes without --classes: nothing tells the classes where maps have no data")
    if not maps and chosen.method != HYBRID:
        raise RegionalError(f"method is {chosen.method}, and there is no map; give --maps, or --method hybrid")
    if not footprints and chosen.method in (ASSISTED, HYBRID):
        raise RegionalError(f"method is {chosen.method}, and there are no footprints; give --footprints")
    by_hand = (chosen.range_km, chosen.nugget)
    if (by_hand[0] is None) != (by_hand[1] is None) or (chosen.common is not None and by_hand[0] is None):
        raise RegionalError("--range-km and --nugget go together, and --common only with them")
    if chosen.method == MAP and not footprints and by_hand[0] is None:
        raise RegionalError(
            "method is map: give --footprints that the model wasn't trained on, or --range-km and --nugget"
        )
    if (chosen.nugget or 0) + (chosen.common or 0) > 1:
        raise RegionalError(
            f"nugget {chosen.nugget:g} and common {chosen.common:g}: expected shares that add up to 1 at most"
        )
    return chosen


def _method(chosen: Zones, footprints: bool) -> str:
    if chosen.method != AUTO:
        return chosen.method
    if chosen.range_km is not None:
        return MAP
    return ASSISTED if footprints else NONE


def _shots(found: Footprints, granules: Sequence[str | Path], surface: Maps, chosen: Zones, method: str) -> Shots:
    nothing = np.full(len(found.lon), np.nan)
    at = At(nothing, nothing, np.full(len(found.lon), -1)) if method == HYBRID else surface.at(found.lon, found.lat)
    cluster = found.orbit if chosen.clusters == "orbit" else found.track
    return Shots(found, at, cluster, read_gradients(granules, found.number) if granules else None)


def _correlation(chosen: Zones, shots: Shots | None) -> Correlation:
    """How the map's errors go together: given by hand, or fitted to residuals at footprints."""
    if chosen.range_km is not None:
        nugget, common = chosen.nugget or 0.0, chosen.common or 0.0
        return Correlation(1000 * chosen.range_km, nugget, 1 - nugget - common, common, chosen.correlation)
    assert shots is not None  # `_checked` has seen to it
    used = np.flatnonzero(np.isfinite(shots.at.value) & (shots.at.sd > 0))
    residuals = (shots.at.value - shots.of.agbd)[used] / shots.at.sd[used]
    places = estimators.on_sphere(shots.of.lon[used], shots.of.lat[used])
    reach = 1000 * chosen.max_lag_km
    return estimators.fit_correlation(places, residuals, model=chosen.correlation, reach=reach, seed=chosen.seed)


def _rows(
    surface: Maps, outline: "Geometry", shots: Shots | None, correlation: Correlation | None, method: str, chosen: Zones
) -> list[dict[str, Any]]:
    """The rows of one zone: one, or one a class."""
    area = ground_area(outline)
    sums = {-1: Sums(area)} if method == HYBRID else _sums(surface, outline, correlation, chosen)
    covered = sum(one.area for one in sums.values())
    if chosen.keep:
        sums = {-1: _together([sums[kind] for kind in chosen.keep if kind in sums])}
    inside = np.empty(0, int) if shots is None else inside_of(outline, shots.of.lon, shots.of.lat)
    rows = []
    for kind, one in sorted(sums.items()):
        mine = inside
        if shots is not None and method != HYBRID:
            mine = mine[np.isfinite(shots.at.value[mine])]
            if chosen.classes is not None:
                mine = mine[np.isin(shots.at.kind[mine], chosen.keep or (kind,))]
        found = _estimate(one, shots, mine, correlation, method, chosen)
        whole = area if chosen.scale_to_zone else one.area
        rows.append(
            (
                {}
                if chosen.classes is None
                else {"class": "+".join(map(str, chosen.keep)) or (str(kind) if kind >= 0 else "none")}
            )
            | {"area_ha": area, "covered_ha": one.area, "covered_share": min(covered / area, 1.0)}
            | {"n_pixels": one.pixels, "n_shots": len(mine)}
            | {"n_tracks": 0 if shots is None else len(np.unique(shots.cluster[mine]))}
            | _figures(found, whole, chosen)
            | {"method": method, "note": found.note}
        )
    return rows


def _sums(surface: Maps, outline: "Geometry", correlation: Correlation | None, chosen: Zones) -> dict[int, Sums]:
    """By class; -1 alone where there are none, and where nothing is covered."""
    sums: dict[int, Sums] = defaultdict(Sums)
    plane = surface.plane(outline) if correlation is not None and surface.meeting(outline) else None
    for cells in surface.cells(outline):
        seen = np.isfinite(cells.value)
        if plane is not None and not np.isfinite(cells.sd[seen]).all():
            raise RegionalError(
                f"{surface.entries[cells.entry].path}: pixels with agbd and without agbd_sd; make it anew"
            )
        for kind in np.unique(cells.kind[seen]).tolist():
            mine = seen & (cells.kind == kind)
            before, area = sums[kind], cells.area[mine]
            lattice = before.lattice
            if plane is not None:
                lattice = lattice or Lattice(plane.spacing, plane.shape)
                rows, columns = surface.in_plane(plane, cells)
                lattice.add(rows[mine], columns[mine], area * cells.sd[mine])
            sums[kind] = Sums(
                before.area + float(area.sum()),
                before.total + float((area * cells.value[mine]).sum()),
                before.pixels + int(mine.sum()),
                lattice,
            )
    return dict(sums) or {-1: Sums()}


def _together(parts: Sequence[Sums]) -> Sums:
    lattices = [part.lattice for part in parts if part.lattice is not None]
    whole = Lattice(lattices[0].spacing, lattices[0].shape) if lattices else None
    for lattice in lattices:
        assert whole is not None
        whole.weights += lattice.weights
        whole.squares += lattice.squares
    return Sums(sum(p.area for p in parts), sum(p.total for p in parts), sum(p.pixels for p in parts), whole)


def _estimate(
    one: Sums, shots: Shots | None, mine: np.ndarray, correlation: Correlation | None, method: str, chosen: Zones
) -> Estimate:
    if method == HYBRID:
        assert shots is not None
        return _hybrid(shots, mine, chosen)
    if not one.area:
        return Estimate(np.nan, np.nan, np.nan, "no data of the maps here")
    mean = one.total / one.area
    if method == MAP:
        assert one.lattice is not None and correlation is not None
        return estimators.by_map(mean, one.area, one.lattice, correlation)
    if method == ASSISTED:
        assert shots is not None
        return estimators.model_assisted(mean, (shots.of.agbd - shots.at.value)[mine], shots.cluster[mine])
    return Estimate(mean, np.nan, np.nan)


def _hybrid(shots: Shots, mine: np.ndarray, chosen: Zones) -> Estimate:
    """With the covariance of GEDI's models where granules tell it, else with each footprint's own error."""
    variance, note, models = 0.0, "", shots.models
    if models is not None:
        variance = estimators.parameter_variance(models.slope[mine], models.stratum[mine], models.covariances)
    elif len(mine):
        sigma = shots.of.sigma[mine]
        if not np.isfinite(sigma).any():
            raise RegionalError(
                "hybrid: the footprints have no agbd_sigma, so nothing tells how sure GEDI's models are; give the "
                "granules that they are from (--granules)"
            )
        variance = estimators.sigma_variance(sigma[np.isfinite(sigma)], chosen.shared_sigma)
        note = f"model's error from agbd_sigma, {chosen.shared_sigma:.0%} of it shared"
    found = estimators.hybrid(shots.of.agbd[mine], shots.cluster[mine], variance)
    return found if found.note else found._replace(note=note)


def _figures(found: Estimate, area: float, chosen: Zones) -> dict[str, float]:
    """Mean, total and its interval, and what follows from them."""
    reach = estimators.quantile(chosen.level, found.freedom) * found.se if np.isfinite(found.se) else np.nan
    total = found.mean * area
    row = {
        "mean": found.mean,
        "mean_se": found.se,
        "total": total,
        "total_se": found.se * area,
        "total_lo": total - reach * area,
        "total_hi": total + reach * area,
    }
    if chosen.carbon_fraction is not None:
        names = {"carbon": chosen.carbon_fraction, "co2e": chosen.carbon_fraction * CO2_OF_CARBON}
        ends = {"": total, "_se": found.se * area, "_lo": row["total_lo"], "_hi": row["total_hi"]}
        row |= {f"{name}{end}": factor * value for name, factor in names.items() for end, value in ends.items()}
    return row


_ABOUT = {
    MAP: "Standard errors are those of the map: each pixel has its own, and errors of pixels go together over "
    "distance; all pairs of pixels count. They hold as far as what tells how errors go together does: the footprints, "
    "or the numbers given.",
    ASSISTED: "Mean of the map plus mean difference of GEDI's footprints from it (difference estimator; S&auml;rndal "
    "et al. 1992), with the footprints as a sample of clusters, tracks of the satellite (St&aring;hl et al. 2016). A "
    "bias of the map is corrected; GEDI's own is not, nor counted.",
    HYBRID: "Mean of GEDI's footprints as a sample of clusters, tracks of the satellite, with the error of the models "
    "that made biomass of waveforms (hybrid inference; Patterson et al. 2019, St&aring;hl et al. 2016). No map is "
    "used.",
    NONE: "No standard errors: they take footprints of GEDI, or maps with standard deviations and how far their "
    "errors go together.",
}


def about(correlation: Correlation) -> str:
    """How errors go together, in a line."""
    return (
        f"errors go together up to {correlation.range_m / 1000:.3g} km ({correlation.model}); of the variance that "
        f"maps state, {correlation.nugget:.0%} is each pixel's own, {correlation.sill:.0%} near pixels share, "
        f"{correlation.common:.1%} all pixels share"
    )


def _page(done: Done, places: str, maps: Sequence[str], footprints: Sequence[str], level: float) -> str:
    """The page as HTML."""
    table = done.table.drop(columns=done.table.geometry.name)
    own = list(table.columns[: list(table.columns).index("area_ha")])
    shown = [*own[:2], *(["class"] if "class" in own[2:] else [])]
    rows = []
    for row in table.to_dict("records"):
        ends = "" if np.isnan(row["total_lo"]) else f"{row['total_lo']:,.0f} to {row['total_hi']:,.0f}"
        numbers = [(row["mean"], ".1f"), (row["mean_se"], ".1f"), (row["total"], ",.0f")]
        rows.append(
            [str(row[name]) for name in shown]
            + [f"{row['area_ha']:,.0f}", f"{row['covered_share']:.1%}"]
            + ["" if np.isnan(value) else format(value, form) for value, form in numbers]
            + [ends, f"{row['n_shots']:,} / {row['n_tracks']:,}", row["note"]]
        )
    head = [*map(str, shown), "area, ha", "covered", "mean, Mg/ha", "its standard error", "total, Mg"]
    head += [f"{level:.0%} interval, Mg", "footprints / clusters", "note"]
    used = "" if done.correlation is None else f"<p>{html.escape(about(done.correlation).capitalize())}.</p>"
    return pages.page(
        "Biomass by zone",
        [
            f"<p>{html.escape(places)}. Maps: {len(maps):,}; footprints: {done.footprints:,}. Made by biomass_jax "
            f"{__version__}.</p>",
            pages.table(head, rows),
            f"<h2>How sure</h2><p>{_ABOUT[done.method]}</p>{used}",
            "<p>Areas are those on the ground (WGS 84). Means and totals are of the area that is covered, unless the "
            "table was made for whole zones (--scale-to-zone). Each piece of ground counts once, though several maps "
            "have it: the first one that has data. Footprints that the model was trained on make errors look too "
            "small.</p>",
            f"<p>Maps: {html.escape(name_list(maps, 20))}. Footprints: {html.escape(name_list(footprints, 20))}.</p>",
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.zones",
        description="Area, mean and total biomass of each zone, how sure they are, and a page about it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--maps", nargs="+", default=[], metavar="MAP", help="maps, or patterns of such; the first counts"
    )
    parser.add_argument(
        "--zones", required=True, metavar="FILE", help="polygons: GeoPackage, GeoParquet, shapefile ..."
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the table to write: .gpkg, .csv or .parquet")
    parser.add_argument("--footprints", nargs="+", default=[], metavar="PATH", help="tables of footprints, or folders")
    parser.add_argument("--granules", nargs="+", default=[], metavar="PATH", help="hybrid: GEDI L4A files, or folders")
    add_options(parser, Zones)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        environment.settle(jax=False)
        for value, flag in ((args.zones, "--zones"), (args.out, "--out")):
            check_local(value, flag)
        check_table(args.out)
        out, chosen = Path(args.out), options_of(args, Zones)
        maps = expanded(args.maps)
        with writer_beside(out):
            done = zones(maps, args.zones, footprints=args.footprints, granules=args.granules, **chosen)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_table(done.table, out, "zones")
            write_text(out.with_suffix(".html"), _page(done, args.zones, maps, args.footprints, args.level))
    except Exception as error:
        return environment.failed(error)
    if done.correlation is not None:
        print(about(done.correlation))
    print(f"{len(done.table)} rows, method {done.method}; {out}, {out.with_suffix('.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
