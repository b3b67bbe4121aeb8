"""`biomass-jax compare`: maps beside what others publish of the same ground, pixel by pixel of the other map.

The maps are averaged to the other map's pixels by area, as `mosaic` does it; pixels of which half has no data are left
out. Differences are ours less theirs. Intervals are by a jackknife over blocks of ground, since neighbouring pixels err
together. docs/regional.md says what each number means.
"""

import argparse
import html
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biomass_jax import figures
from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid, equal_area_blocks
from biomass_jax.data.raster.warp import Part, part_of, places_of
from biomass_jax.data.vectors import inside_of, outlines, read_zones
from biomass_jax.errors import RegionalError, name_list
from biomass_jax.evaluation.intervals import interval_of
from biomass_jax.evaluation.tables import write_csv
from biomass_jax.figures import page as pages
from biomass_jax.regional.mosaic import Mosaic, plan
from biomass_jax.regional.overlap import MosaicPlan, block_values, sd_layer
from biomass_jax.regional.products import OTHER, PRODUCTS, OtherMap, check_unit, other_map
from biomass_jax.regional.styles import write_style
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local, expanded, write_json, write_text
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.progress import Progress
from biomass_jax.runtime.settings import Range, add_options, checked, options_of, setting
from biomass_jax.version import __version__

if TYPE_CHECKING:
    from shapely import Geometry

BINS = (0.0, 50.0, 100.0, 150.0, 200.0, 300.0, 400.0)  # Mg/ha of theirs, from each to the next, the last without an end
NODATA = -9999.0
_BLOCK = 256  # pixels of theirs, along an edge of what is compared at once
_SHOWN = 200_000  # pixels in the picture, at most
# Sums over pixels: how many; theirs, ours, their squares and product; how many tell both errors, and how many of those
# agree within them; the squares of their errors, where told.
_SUMS = ("n", "x", "y", "xx", "yy", "xy", "both", "within", "ee")
Place = tuple[str, "Geometry"]


@dataclass(frozen=True)
class Compare:
    """The settings of `compare`."""

    product: str = setting(OTHER, "what --with is", choices=(OTHER, *PRODUCTS))
    units: str | None = setting(None, "other: of --with, where its file tells none; Mg/ha is the only one taken")
    error: str | None = setting(None, "other: raster of the standard errors of --with, of the same grid and unit")
    zones: str | None = setting(None, "file of polygons: scores for each of them, too")
    zone_name: str | None = setting(None, "field of the polygons that names them; the first one where not given")
    block_km: float = setting(25.0, "edge of the blocks of ground that intervals leave out", within=Range(0, ends="()"))


class Compared(NamedTuple):
    """What came of it: a row of scores for all pixels, each bin and each zone; what theirs is; the rasters written."""

    rows: list[dict[str, object]]
    about: str
    rasters: list[Path]


def compare(
    maps: Sequence[str | os.PathLike[str]],
    theirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    **settings: object,
) -> Compared:
    """Compare, and write `compare.csv`, `compare.json`, a raster of differences a file of theirs, and a page.

    Args:
        maps: paths of maps, or of a mosaic.
        theirs: rasters of the other map; pixels that several have count several times.
        out: the folder.
        **settings: fields of `Compare`.

    Raises:
        RegionalError: no pixel has both, another layout or unit (of the maps, too), or zones that can't be used.
        RasterError: a raster can't be read, or the maps differ among themselves.
        ConfigError: a setting can't be.
    """
    chosen, folder = _checked(settings, len(theirs)), Path(out)
    places = _places(chosen)
    others = [other_map(path, chosen.product, units=chosen.units, error=chosen.error) for path in theirs]
    plans = [plan(maps, Mosaic(mixed=True), one.mean.grid) for one in others]
    if unit := next(iter(plans[0].layers.values())):  # earlier maps tell none
        check_unit(os.fspath(maps[0]), unit)
    tally, sample, rasters = Tally(), np.empty((3, 0)), []
    rng = np.random.default_rng(0)
    for layout, one in zip(plans, others, strict=True):
        if parts := list(_parts(layout)):
            folder.mkdir(parents=True, exist_ok=True)
            rasters.append(folder / f"difference_{Path(one.mean.path).stem}.tif")
            with Progress(rasters[-1].name, len(parts), unit="block") as progress:
                for part, found in _compared(layout, one, parts, rasters[-1]):
                    _tally(tally, layout.grid, part, found, places, chosen)
                    sample = _sampled(sample, found, rng)
                    progress.advance(1)
    rows = tally.rows([name for name, _ in places])
    if not rows:
        for path in rasters:
            path.unlink()
        raise RegionalError(
            f"no pixel of {name_list([os.fspath(path) for path in theirs], 5)} has a value where half of it is covered "
            "by the maps; give a raster of the same ground"
        )
    for path in rasters:
        write_style(path, "difference", next(iter(plans[0].layers.values())), band=3, change=True)
    done = Compared(rows, others[0].about, rasters)
    _write(done, folder, chosen, [os.fspath(path) for path in maps], [one.mean.path for one in others], sample)
    return done


def _checked(settings: dict[str, object], count: int) -> Compare:
    chosen = checked(Compare, settings)
    if chosen.product != OTHER and (chosen.units or chosen.error):
        raise RegionalError(f"units and error are for --product {OTHER}; files of {chosen.product} tell their own")
    if chosen.error is not None and count > 1:
        raise RegionalError(f"error is one raster, but {count} are given to compare with; compare them one by one")
    if chosen.zones is None and chosen.zone_name is not None:
        raise RegionalError("zone_name is given without zones; give their file, too")
    return chosen


def _places(chosen: Compare) -> list[Place]:
    """Name and outline of each zone."""
    if chosen.zones is None:
        return []
    frame = read_zones(chosen.zones)
    fields = [name for name in frame.columns if name != frame.geometry.name]
    field = chosen.zone_name or (fields[0] if fields else None)
    if field is not None and field not in fields:
        raise RegionalError(f"{chosen.zones}: no field {field}; found {', '.join(fields) or 'none'}")
    names = [str(number) for number in range(len(frame))] if field is None else frame[field].astype(str).tolist()
    return list(zip(names, outlines(frame, chosen.zones), strict=True))


def _parts(layout: MosaicPlan) -> Iterator[Part]:
    """Parts of the other map that ours meet, row by row from left to right, over their common rectangle."""
    grid, members = layout.grid, layout.meeting(0, 0, layout.grid.height, layout.grid.width)
    if not members:
        return
    top, left = (max(int(min(ends)) - 1, 0) for ends in zip(*((one.top, one.left) for one in members), strict=True))
    bottom = min(int(max(one.bottom for one in members)) + 2, grid.height)
    right = min(int(max(one.right for one in members)) + 2, grid.width)
    for row, column in product(range(top, bottom, _BLOCK), range(left, right, _BLOCK)):
        yield row, column, min(row + _BLOCK, bottom), min(column + _BLOCK, right)


class SharedPixels(NamedTuple):
    """Pixels of a part that both maps have, (n,) each.

    Attributes:
        rows, columns: of the part.
        ours, theirs: their values.
        our_error, their_error: standard errors, NaN where they aren't told.
        own_error: those of theirs that are each pixel's own, NaN for others.
    """

    rows: np.ndarray
    columns: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray
    our_error: np.ndarray
    their_error: np.ndarray
    own_error: np.ndarray


def _compared(
    layout: MosaicPlan, one: OtherMap, parts: Sequence[Part], path: Path
) -> Iterator[tuple[Part, SharedPixels]]:
    """Each part's pixels; writes the raster of differences meanwhile."""
    (top, left, _, _), (_, _, bottom, right) = parts[0], parts[-1]
    grid, sd = part_of(layout.grid, top, left, bottom, right), sd_layer(layout.layers)
    layers = dict.fromkeys(("ours", "theirs", "difference"), next(iter(layout.layers.values())))
    tags = {
        "MAPS": str(len(layout.members)),
        "THEIRS": Path(one.mean.path).name,
        "SOFTWARE": f"biomass_jax {__version__}",
    }
    with MapWriter(path, grid, nodata=NODATA, layers=layers, tags=tags) as writer:
        lines = np.empty(0)
        for part in parts:
            if part[1] == left:
                lines = np.full((part[2] - part[0], grid.width, len(layers)), NODATA, np.float32)
            values = block_values(layout, *part).astype(np.float64)
            theirs, errors, valid = one.read(part)
            rows, columns = np.nonzero(valid & (values[0] != layout.nodata))
            ours, theirs, errors = values[0][rows, columns], theirs[rows, columns], errors[rows, columns]
            lines[rows, columns + part[1] - left] = np.stack([ours, theirs, ours - theirs], axis=-1)
            if part[3] == right:
                writer.write_rows(part[0] - top, lines)
            our_error = np.full(len(rows), np.nan) if sd is None else values[sd][rows, columns]
            own = errors if one.independent else np.full(len(rows), np.nan)
            yield part, SharedPixels(rows, columns, ours, theirs, our_error, errors, own)


def _tally(
    tally: "Tally", grid: Grid, part: Part, found: SharedPixels, places: Sequence[Place], chosen: Compare
) -> None:
    """Put the pixels of a part in: into all, into their bin, into their zones."""
    if not len(found.rows):
        return
    lon, lat = places_of(grid, found.rows + part[0], found.columns + part[1])
    block = np.array(equal_area_blocks(4326, lon, lat, chosen.block_km))
    edges = np.searchsorted(BINS, found.theirs, side="right")
    groups = [("all", "all", np.arange(len(lon)))]
    groups += [("bin", label, np.flatnonzero(edges == number)) for number, label in enumerate(_bin_names())]
    groups += [("zone", name, inside_of(outline, lon, lat)) for name, outline in places]
    for table, group, mine in groups:
        if len(mine):
            tally.add((table, group), block[mine], SharedPixels(*(values[mine] for values in found)))


def _bin_names() -> list[str]:
    """Of the bins, that below 0 first."""
    ends = [f"{low:g}-{high:g}" for low, high in zip(BINS[:-1], BINS[1:], strict=True)]
    return ["below 0", *ends, f"{BINS[-1]:g} and more"]


def _sampled(kept: np.ndarray, found: SharedPixels, rng: np.random.Generator) -> np.ndarray:
    """Some of all pixels, each as likely as any other: those of the lowest random numbers stay, (3, n)."""
    kept = np.concatenate([kept, [rng.random(len(found.ours)), found.ours, found.theirs]], axis=1)
    return kept if kept.shape[1] <= _SHOWN else kept[:, np.argpartition(kept[0], _SHOWN)[:_SHOWN]]


class Tally:
    """Sums over pixels by group and block of ground; their memory grows with blocks, not with pixels."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], dict[str, np.ndarray]] = defaultdict(dict)

    def add(self, group: tuple[str, str], block: np.ndarray, found: SharedPixels) -> None:
        """Put pixels in; `block` (n,) names the ground of each."""
        names, index = np.unique(block, return_inverse=True)
        x, y = found.theirs, found.ours
        both = np.hypot(found.our_error, found.their_error)
        within = np.abs(y - x) <= 2 * both  # no where an error isn't told
        told = np.nan_to_num(found.own_error)
        columns = [np.ones_like(x), x, y, x**2, y**2, x * y, np.isfinite(both), within, told**2]
        sums = np.stack([np.bincount(index, column, len(names)) for column in columns], axis=-1)
        kept = self._sums[group]
        for name, row in zip(names.tolist(), sums, strict=True):
            kept[name] = kept.get(name, 0) + row

    def rows(self, zones: Sequence[str]) -> list[dict[str, object]]:
        """Rows of scores: all, by bin, by zone; [] without a pixel."""
        order = [("all", "all"), *(("bin", name) for name in _bin_names()), *(("zone", name) for name in zones)]
        return [_row(group, np.stack([*self._sums[group].values()])) for group in order if group in self._sums]


def _row(group: tuple[str, str], sums: np.ndarray) -> dict[str, object]:
    """Scores of sums by block, (blocks, `_SUMS`)."""
    row: dict[str, object] = {"table": group[0], "group": group[1], "n": int(sums[:, 0].sum()), "blocks": len(sums)}
    why = ""
    for name, (statistic, positive) in _STATISTICS.items():
        value, ends, why = interval_of(sums, statistic, positive=positive)
        if group[0] == "bin" and name in _LINES:
            value = ends = None  # a line through a slice of what it is drawn over tells nothing
        row[name] = value
        if name in _WITH_INTERVALS:
            row[f"{name}_low"], row[f"{name}_high"] = ends or (None, None)
    return row | {"no_interval": why}


def _moments(sums: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean of theirs, of ours; variances and covariance, of sums (..., `_SUMS`)."""
    n, x, y, xx, yy, xy, *_ = np.moveaxis(sums, -1, 0)
    x, y = x / n, y / n
    return x, y, xx / n - x**2, yy / n - y**2, xy / n - x * y


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under > 1e-9)


def _slope(sums: np.ndarray) -> np.ndarray:
    _, _, xx, _, xy = _moments(sums)
    return _ratio(xy, xx)


def _true_slope(sums: np.ndarray) -> np.ndarray:
    """Least squares, with the variance of theirs less what their errors put into it (Fuller, 1987, section 1.2)."""
    _, _, xx, _, xy = _moments(sums)
    errors = sums[..., _SUMS.index("ee")] / sums[..., 0]
    return np.where(errors > 0, _ratio(xy, xx - errors), np.nan)


def _intercept(sums: np.ndarray) -> np.ndarray:
    x, y, *_ = _moments(sums)
    return y - _slope(sums) * x


def _rmsd(sums: np.ndarray) -> np.ndarray:
    n, _, _, xx, yy, xy, *_ = np.moveaxis(sums, -1, 0)
    return np.sqrt(np.maximum(xx + yy - 2 * xy, 0) / n)


def _correlation(sums: np.ndarray) -> np.ndarray:
    _, _, xx, yy, xy = _moments(sums)
    return _ratio(xy, np.sqrt(np.maximum(xx * yy, 0)))


# Of sums (..., `_SUMS`), and whether a statistic is positive and skew.
_STATISTICS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "theirs": (lambda sums: sums[..., 1] / sums[..., 0], False),
    "ours": (lambda sums: sums[..., 2] / sums[..., 0], False),
    "bias": (lambda sums: (sums[..., 2] - sums[..., 1]) / sums[..., 0], False),
    "rmsd": (_rmsd, True),
    "slope": (_slope, False),
    "intercept": (_intercept, False),
    "slope_without_errors": (_true_slope, False),
    "correlation": (_correlation, False),
    "within_2_sd": (lambda sums: _ratio(sums[..., 7], sums[..., 6]), False),
}
_LINES = ("slope", "intercept", "slope_without_errors")
_WITH_INTERVALS = ("bias", "rmsd", *_LINES)


def _write(
    done: Compared, folder: Path, chosen: Compare, maps: Sequence[str], theirs: Sequence[str], sample: np.ndarray
) -> None:
    """The table, twice, the picture and the page."""
    write_csv(folder / "compare.csv", list(done.rows[0]), done.rows)
    files = {"maps": list(maps), "theirs": list(theirs)}
    write_json(folder / "compare.json", {"settings": asdict(chosen), "about": done.about, **files, "scores": done.rows})
    scores = {"n": done.rows[0]["n"], "rmse": done.rows[0]["rmsd"], "bias": done.rows[0]["bias"], "r2": None}
    title = f"Beside {done.about}"
    drawn = figures.density_scatter(
        sample[1], sample[2], scores, title=title, sources=("of theirs", "of ours"), score_name="RMSD"
    )
    figures.save(folder / "scatter.png", drawn)
    write_text(folder / "compare.html", _page(done, chosen, files))


_TITLES = {"all": "All pixels", "bin": "By biomass of the other map, Mg/ha", "zone": "By zone"}
_FORMS = {"bias": "+.1f", "rmsd": ".1f", "slope": ".2f", "slope_without_errors": ".2f", "correlation": ".2f"}
_FORMS |= {"within_2_sd": ".0%"}


def _page(done: Compared, chosen: Compare, files: dict[str, list[str]]) -> str:
    """The page as HTML."""
    head = ["", "pixels", "blocks", "theirs", "ours", "bias", "RMSD", "slope", "slope without their errors"]
    head += ["correlation", "within 2 sd"]
    parts = [
        f"<p>{done.rows[0]['n']:,} pixels of {html.escape(done.about)}, in Mg/ha; differences are ours less theirs, "
        "with 95 % intervals in brackets.</p>",
        "<img src='scatter.png' alt='Biomass of our maps over that of the other one'>",
    ]
    for table, title in _TITLES.items():
        rows = [row for row in done.rows if row["table"] == table]
        if rows:
            parts += [f"<h2>{title}</h2>", pages.table(head, [_cells(row) for row in rows])]
    parts.append(
        f"<p>Intervals leave out one block of {chosen.block_km:g} km after another. The slope is that of ours over "
        "theirs by least squares; errors of theirs make it flatter, and the next column takes off what those do that "
        "are told and each pixel's own. Within 2 sd: share of the pixels whose difference is at most two combined "
        "standard deviations, where both maps tell theirs; 95 % where both are right and err independently.</p>"
    )
    parts += [f"<p>{what.capitalize()}: {html.escape(name_list(paths, 20))}.</p>" for what, paths in files.items()]
    return pages.page("Beside another map", [*parts, f"<p>Made by biomass_jax {__version__}.</p>"])


def _cells(row: dict[str, object]) -> list[str]:
    def told(name: str, form: str) -> str:
        value, low, high = (row.get(one) for one in (name, f"{name}_low", f"{name}_high"))
        ends = "" if low is None else f" ({format(low, form)} to {format(high, form)})"
        return "" if value is None else format(value, form) + ends

    first = [str(row["group"]), f"{row['n']:,}", f"{row['blocks']:,}", told("theirs", ".1f"), told("ours", ".1f")]
    return first + [told(name, form) for name, form in _FORMS.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.compare",
        description="Maps beside those that others publish: bias, scatter and correlation, on the other map's grid.",
        allow_abbrev=False,
    )
    parser.add_argument("--maps", required=True, nargs="+", metavar="MAP", help="maps, or patterns of such")
    parser.add_argument(
        "--with",
        required=True,
        nargs="+",
        dest="theirs",
        metavar="RASTER",
        help="rasters of the other map, or patterns",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the table, the page and the differences")
    add_options(parser, Compare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        environment.settle(jax=False)
        check_local(args.out, "--out")
        out = Path(args.out)
        with writer_beside(out):
            done = compare(expanded(args.maps), expanded(args.theirs), out, **options_of(args, Compare))
    except Exception as error:
        return environment.failed(error)
    first = done.rows[0]
    print(
        f"{first['n']:,} pixels: bias {first['bias']:+.1f}, RMSD {first['rmsd']:.1f} Mg/ha; {out / 'compare.html'}, "
        f"{name_list([str(path) for path in done.rasters], 5)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
