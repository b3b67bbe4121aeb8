"""`biomass-jax zones`: biomass by zone with its standard error, a row a zone, from maps, footprints or both."""

import argparse
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from biomass_jax.data.gedi import Gradients, read_gradients
from biomass_jax.data.labels import BIOMASS, Label
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
from biomass_jax.figures import zone_style
from biomass_jax.regional import estimators
from biomass_jax.regional.change import told_by
from biomass_jax.regional.estimators import Correlation, Estimate, Lattice, Shared, Sums, together
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


class Shots(NamedTuple):
    """Footprints, what the maps have there, which cluster each is of, and how it hangs on GEDI's models, if told."""

    of: Footprints
    at: At
    cluster: np.ndarray
    models: Gradients | None


class Done(NamedTuple):
    """What came of it: the table, the way of its errors, how errors go together if that was needed; is it of change?"""

    table: "GeoDataFrame"
    method: str
    correlation: Correlation | None
    footprints: int
    of_change: bool
    label: Label


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
        maps: paths of maps, or of rasters of `change`; where they overlap the first one that has data counts. None
            are needed for `hybrid`.
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
    with Maps(maps, chosen.classes) as surface:
        method = _method(chosen, surface, footprints)
        if granules and method != HYBRID:
            raise RegionalError(
                f"--granules tell of GEDI's models, which method {method} doesn't take; only hybrid does"
            )
        for entry in surface.entries:
            if method == MAP and entry.sd is None:
                raise RegionalError(
                    f"{entry.path}: no band {surface.label.name}_sd, the standard deviations that method map is about; "
                    "make the map with a calibrated bundle, or take another --method"
                )
        shots = None
        if footprints:
            boxes = [entry.box for entry in surface.entries] if method == MAP else [one.bounds for one in found]
            shots = _shots(read_footprints(footprints, boxes, surface.label), granules, surface, chosen, method)
        errors = _errors(chosen, surface, shots, method)
        rows: list[dict[str, Any]] = []
        with Progress("zones", len(found), terminal=False, every=15.0) as shown:
            for number, outline in enumerate(found):
                rows += [{"zone": number} | row for row in _rows(surface, outline, shots, errors, method, chosen)]
                shown.advance(1)
    table = frame.iloc[[row.pop("zone") for row in rows]].reset_index(drop=True)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    correlation, count = errors[0].correlation if errors else None, 0 if shots is None else len(shots.cluster)
    return Done(add_columns(table, columns), method, correlation, count, "net" in columns, surface.label)


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
    if (chosen.nugget or 0) + (chosen.common or 0) > 1:
        raise RegionalError(
            f"nugget {chosen.nugget:g} and common {chosen.common:g}: expected shares that add up to 1 at most"
        )
    return chosen


def _method(chosen: Zones, surface: Maps, footprints: Sequence[Any]) -> str:
    if (chosen.scale_to_zone or chosen.carbon_fraction) and not surface.label.adds_up:
        raise RegionalError(
            f"scale_to_zone and carbon_fraction are of totals, and {surface.label.name} has none: metres of height "
            "don't add up over an area, so that zones have means alone; leave them out"
        )
    if surface.of_change:
        for given, flag in ((footprints, "--footprints"), (chosen.scale_to_zone, "--scale-to-zone")):
            if given:
                raise RegionalError(
                    f"{surface.entries[0].path} is a raster of change, and {flag} goes with maps of biomass alone"
                )
        return MAP if chosen.method == AUTO else chosen.method
    if chosen.method == MAP and not footprints and chosen.range_km is None:
        raise RegionalError(
            "method is map: give --footprints that the model wasn't trained on, or --range-km and --nugget"
        )
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


def _errors(chosen: Zones, surface: Maps, shots: Shots | None, method: str) -> list[Shared]:
    """Of each map; the correlation is that of all together: by hand, of rasters of change, or fitted to residuals."""
    told = [told_by(entry.path, entry.tags) if surface.of_change else Shared() for entry in surface.entries]
    if method != MAP or chosen.range_km is not None:
        found = None
        if method == MAP and chosen.range_km is not None:
            nugget, common = chosen.nugget or 0.0, chosen.common or 0.0
            found = Correlation(1000 * chosen.range_km, nugget, 1 - nugget - common, common, chosen.correlation)
        return [Shared(found, threshold=one.threshold) for one in told]
    if surface.of_change:
        fits = [one.correlation for one in told if one.correlation is not None]
        for entry, one in zip(surface.entries, told, strict=True):
            if one.correlation is None:
                raise RegionalError(
                    f"{entry.path}: no tag ERROR_RANGE_M tells how its errors go together; make it anew with "
                    "biomass-jax change, or give --range-km and --nugget"
                )
        mean = np.mean([(fit.range_m, fit.nugget, fit.sill) for fit in fits], axis=0)
        return [one._replace(correlation=Correlation(*mean.tolist())) for one in told]
    assert shots is not None  # `_method` has seen to it
    used = np.flatnonzero(np.isfinite(shots.at.value) & (shots.at.sd > 0))
    residuals = (shots.at.value - shots.of.value)[used] / shots.at.sd[used]
    places = estimators.on_sphere(shots.of.lon[used], shots.of.lat[used])
    reach = 1000 * chosen.max_lag_km
    fit = estimators.fit_correlation(places, residuals, model=chosen.correlation, reach=reach, seed=chosen.seed)
    return [Shared(fit)] * len(told)


def _rows(
    surface: Maps, outline: "Geometry", shots: Shots | None, errors: Sequence[Shared], method: str, chosen: Zones
) -> list[dict[str, Any]]:
    """The rows of one zone: one, or one a class."""
    area = ground_area(outline)
    sums = {(-1, 0): Sums(area)} if method == HYBRID else _sums(surface, outline, errors, chosen)
    covered = sum(one.area for one in sums.values())
    inside = np.empty(0, int) if shots is None else inside_of(outline, shots.of.lon, shots.of.lat)
    correlation = errors[0].correlation if errors else None
    rows = []
    for kinds in [chosen.keep] if chosen.keep else [(kind,) for kind in sorted({kind for kind, _ in sums})]:
        mine = inside
        if shots is not None and method != HYBRID:
            mine = mine[np.isfinite(shots.at.value[mine])]
            if chosen.classes is not None:
                mine = mine[np.isin(shots.at.kind[mine], kinds)]
        signs = {
            sign: together([one for (kind, its), one in sums.items() if kind in kinds and its == sign])
            for sign in (-1, 0, 1)
        }
        one = together(list(signs.values()))
        row: dict[str, Any] = {"area_ha": area, "covered_ha": one.area, "covered_share": min(covered / area, 1.0)}
        row |= {"n_pixels": one.pixels}
        if chosen.classes is not None:
            row = {"class": "+".join(str(kind) if kind >= 0 else "none" for kind in kinds)} | row
        if surface.of_change:
            figures, note = _changes(signs, correlation, chosen)
        else:
            found = _estimate(one, shots, mine, correlation, method, chosen)
            row |= {"n_shots": len(mine), "n_tracks": 0 if shots is None else len(np.unique(shots.cluster[mine]))}
            whole = area if chosen.scale_to_zone else one.area
            name, whole = ("total", whole) if surface.label.adds_up else ("mean", 1.0)
            figures = _figures(name, found, whole, chosen)
            note = found.note
        rows.append(row | figures | {"method": method, "note": note})
    return rows


def _sums(surface: Maps, outline: "Geometry", errors: Sequence[Shared], chosen: Zones) -> dict[tuple[int, int], Sums]:
    """By class and sign of change; (-1, 0) alone where nothing is covered."""
    sums: dict[tuple[int, int], Sums] = {}
    with_errors = errors[0].correlation is not None
    plane = surface.plane(outline) if with_errors and surface.meeting(outline) else None
    for cells in surface.cells(outline):
        seen, its = np.isfinite(cells.value), errors[cells.entry]
        if plane is not None and not np.isfinite(cells.sd[seen]).all():
            raise RegionalError(
                f"{surface.entries[cells.entry].path}: pixels with {surface.label.name} and without "
                f"{surface.label.name}_sd; make it anew"
            )
        codes = 3 * cells.kind + cells.sign
        rows, columns = (codes, codes) if plane is None else surface.in_plane(plane, cells)
        for code in np.unique(codes[seen]).tolist():
            mine = seen & (codes == code)
            key, area = ((code + 1) // 3, (code + 1) % 3 - 1), cells.area[mine]
            before, whole = sums.get(key, Sums()), float(area.sum())
            lattice = before.lattice
            if plane is not None:
                lattice = lattice or Lattice(plane.spacing, plane.shape)
                lattice.add(rows[mine], columns[mine], area * cells.sd[mine])
            sums[key] = Sums(
                before.area + whole,
                before.total + float((area * cells.value[mine]).sum()),
                before.pixels + int(mine.sum()),
                lattice,
                before.shift + its.offset_se * whole,
                before.chance + its.chance * whole,
            )
    return sums or {(-1, 0): Sums()}


def _estimate(
    one: Sums, shots: Shots | None, mine: np.ndarray, correlation: Correlation | None, method: str, chosen: Zones
) -> Estimate:
    if method == HYBRID:
        assert shots is not None
        return _hybrid(shots, mine, chosen)
    found = estimators.by_map(one, correlation)
    if method == ASSISTED and one.area:
        assert shots is not None
        return estimators.model_assisted(found.mean, (shots.of.value - shots.at.value)[mine], shots.cluster[mine])
    return found


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
    found = estimators.hybrid(shots.of.value[mine], shots.cluster[mine], variance)
    return found if found.note else found._replace(note=note)


def _changes(signs: dict[int, Sums], correlation: Correlation | None, chosen: Zones) -> tuple[dict[str, float], str]:
    """Net change of all pixels, losses and gains of the significant ones, and what there is to say about them."""
    one = together(list(signs.values()))
    net = estimators.by_map(one, correlation)
    figures = _figures("net", net, one.area, chosen)
    # Of no pixel: 0 where the net can be told, NaN where it can't.
    none = net._replace(mean=net.mean - net.mean, se=net.se - net.se)
    for name, sign in (("loss", -1), ("gain", 1)):
        part = signs[sign]
        found = estimators.by_map(part, correlation) if part.area else none
        figures |= {f"{name}_ha": part.area if one.area else np.nan} | _figures(name, found, part.area, chosen)
    note = net.note
    if not note and not signs[-1].area + signs[1].area:
        note = "no significant change; a small one can't be told from chance"
    return figures | {"chance_ha": one.chance if one.area else np.nan}, note


def _figures(name: str, found: Estimate, area: float, chosen: Zones) -> dict[str, float]:
    """A mean and the amount of an area, with intervals, and what follows from them."""
    reach = estimators.quantile(chosen.level, found.freedom) * found.se if np.isfinite(found.se) else np.nan
    amount = found.mean * area
    ends = {"": amount, "_se": found.se * area, "_lo": amount - reach * area, "_hi": amount + reach * area}
    before = "" if name == "total" else f"{name}_"
    row = {} if name in ("loss", "gain") else {"mean": found.mean, "mean_se": found.se}
    factors = {name: 1.0}
    if chosen.carbon_fraction is not None:
        factors |= {f"{before}carbon": chosen.carbon_fraction, f"{before}co2e": chosen.carbon_fraction * CO2_OF_CARBON}
    return row | {f"{one}{end}": factor * value for one, factor in factors.items() for end, value in ends.items()}


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
_OF_CHANGE = (
    "Net change is the sum over all pixels, losses (negative) and gains those over significant pixels alone. Standard "
    "errors are those of the maps: errors of pixels go together over distance, and all pairs of pixels count. Sums of "
    "pixels that were picked because their change is large lie too far from 0, which their intervals don't tell; the "
    "net change picks none. By chance so many hectares would be called a loss, and as many a gain, if nothing had "
    "changed, before small patches are left out."
)
_HELD_OUT = " Footprints that the model was trained on make errors look too small."


def _cells(table: "GeoDataFrame", level: float, of_change: bool, label: Label) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the page's table, after what names the zone."""
    interval = f"{level:.0%} interval, {'Mg' if label.adds_up else label.unit}"
    form = ",.0f" if label.adds_up else ".1f"
    amounts = ("net", "loss", "gain") if of_change else ("total",) if label.adds_up else ("mean",)
    head = ["area, ha", "covered", *([] if of_change else [f"mean, {label.unit}", "its standard error"])]
    for name in amounts:
        head += [f"{name}, ha"] if name in ("loss", "gain") else []
        head += [interval] if name == "mean" else [f"{name}, Mg", interval]
    head += ["by chance, ha" if of_change else "footprints / clusters", "note"]
    rows = []
    for row in table.to_dict("records"):
        cells = [f"{row['area_ha']:,.0f}", f"{row['covered_share']:.1%}"]
        cells += [] if of_change else [_told(row["mean"], ".1f"), _told(row["mean_se"], ".1f")]
        for name in amounts:
            cells += [_told(row[f"{name}_ha"], ",.1f")] if name in ("loss", "gain") else []
            low, high = (_told(row[f"{name}_{end}"], form) for end in ("lo", "hi"))
            cells += [*([] if name == "mean" else [_told(row[name], form)]), f"{low} to {high}" if low else ""]
        cells += [_told(row["chance_ha"], ",.1f") if of_change else f"{row['n_shots']:,} / {row['n_tracks']:,}"]
        rows.append([*cells, row["note"]])
    return head, rows


def _told(value: float, form: str) -> str:
    return "" if np.isnan(value) else format(value, form)


def _page(done: Done, places: str, maps: Sequence[str], footprints: Sequence[str], level: float) -> str:
    """The page as HTML."""
    table = done.table.drop(columns=done.table.geometry.name)
    own = list(table.columns[: list(table.columns).index("area_ha")])
    shown = [*own[:2], *(["class"] if "class" in own[2:] else [])]
    head, cells = _cells(table, level, done.of_change, done.label)
    title = "Biomass" if done.label == BIOMASS else done.label.title
    what = "Means and totals are" if done.label.adds_up else "There are no totals, since metres don't add up. Means are"
    names = table[shown].astype(str).to_numpy().tolist()
    used = "" if done.correlation is None else f"<p>{html.escape(estimators.about(done.correlation).capitalize())}.</p>"
    return pages.page(
        "Change of biomass by zone" if done.of_change else f"{title} by zone",
        [
            f"<p>{html.escape(places)}. Maps: {len(maps):,}; footprints: {done.footprints:,}. Made by biomass_jax "
            f"{__version__}.</p>",
            pages.table([*map(str, shown), *head], [[*name, *row] for name, row in zip(names, cells, strict=True)]),
            f"<h2>How sure</h2><p>{_OF_CHANGE if done.of_change else _ABOUT[done.method]}</p>{used}",
            f"<p>Areas are those on the ground (WGS 84). {what} of the area that is covered, unless the "
            "table was made for whole zones (--scale-to-zone). Each piece of ground counts once, though several maps "
            f"have it: the first one that has data.{'' if done.of_change else _HELD_OUT}</p>",
            f"<p>Maps: {html.escape(name_list(maps, 20))}. Footprints: {html.escape(name_list(footprints, 20))}.</p>",
        ],
    )


def _style(done: Done) -> str:
    """Colours by the mean, or by the change of biomass a hectare."""
    field = "net / covered_ha" if done.of_change else "mean"
    values = done.table["net"] / done.table["covered_ha"] if done.of_change else done.table["mean"]
    return zone_style(values.to_numpy(float), field=field, unit=done.label.unit, change=done.of_change)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.zones",
        description="Area, mean and total biomass of each zone, or its change, how sure that is, and a page about it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--maps", nargs="+", default=[], metavar="MAP", help="maps, or rasters of change; the first counts"
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
            write_table(done.table, out, "zones", _style(done))
            write_text(out.with_suffix(".html"), _page(done, args.zones, maps, args.footprints, args.level))
    except Exception as error:
        return environment.failed(error)
    if done.correlation is not None:
        print(estimators.about(done.correlation))
    print(f"{len(done.table)} rows, method {done.method}; {out}, {out.with_suffix('.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
