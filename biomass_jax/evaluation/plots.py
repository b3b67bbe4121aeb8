"""Maps beside field plots: scores, a line, a page.

After the good practices of CEOS's Land Product Validation group for above-ground biomass (Duncanson et al. 2021): the
map is averaged over each plot's own area, plots measured in other years are left out, bias and RMSD are told by bin
and by kind of forest, and the line through map and plots counts the errors of both.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomass_jax import figures
from biomass_jax.data.raster.image import read_tags
from biomass_jax.data.raster.zonal import UNITS, Covered, covered_means
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.tables import write_csv
from biomass_jax.figures import page as pages
from biomass_jax.runtime.files import write_json, write_text

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

BINS = (0.0, 50.0, 100.0, 150.0, 200.0, 300.0, 400.0)  # Mg/ha, from each to the next, the last without an end
FEWEST = 5  # plots of a group that gets an interval
_STEPS = 200  # of the line's fit, at most


@dataclass(frozen=True)
class Line:
    """map = intercept + slope * plot, with the errors of both.

    Attributes:
        slope: with its standard error `slope_se`.
        intercept: Mg/ha, with `intercept_se`.
        chi2: of the residuals over both errors, divided by n - 2.
        map_error: Mg/ha, of the map over a plot, which was given or for which `chi2` is 1.
    """

    slope: float
    slope_se: float
    intercept: float
    intercept_se: float
    chi2: float
    map_error: float


def errors_in_variables(x: np.ndarray, y: np.ndarray, x_error: np.ndarray | float, y_error: np.ndarray | float) -> Line:
    """The line of least squares over independent errors of both coordinates (York et al. 2004, equation 13).

    Args:
        x: (n,).
        y: (n,).
        x_error: standard errors of x, (n,) or one; not below 0.
        y_error: standard errors of y, (n,) or one; above 0 where those of x are 0.

    Returns:
        The line; its `map_error` is the root mean square of `y_error`.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    vx, vy = (np.broadcast_to(np.asarray(error, float) ** 2, x.shape) for error in (x_error, y_error))
    slope = float(np.sign(np.corrcoef(x, y)[0, 1]) * y.std() / x.std())
    for _ in range(_STEPS):
        weight = 1 / (vy + slope**2 * vx)
        mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
        u, v = x - mean_x, y - mean_y
        beta = weight * (u * vy + slope * v * vx)
        before, slope = slope, float((weight * beta * v).sum() / (weight * beta * u).sum())
        if abs(slope - before) <= 1e-12 * abs(slope):
            break
    weight = 1 / (vy + slope**2 * vx)
    adjusted = mean_x + beta
    centre = np.average(adjusted, weights=weight)
    slope_se = 1 / np.sqrt((weight * (adjusted - centre) ** 2).sum())
    intercept_se = np.sqrt(1 / weight.sum() + (centre * slope_se) ** 2)
    intercept = mean_y - slope * mean_x
    chi2 = (weight * (y - intercept - slope * x) ** 2).sum() / max(len(x) - 2, 1)
    return Line(slope, float(slope_se), float(intercept), float(intercept_se), float(chi2), float(np.sqrt(vy.mean())))


def fit_line(plots: np.ndarray, maps: np.ndarray, errors: np.ndarray) -> Line:
    """`errors_in_variables` where nothing tells the map's error: that for which residuals are as large as both errors.

    Args:
        plots: (n,) Mg/ha.
        maps: (n,) Mg/ha.
        errors: (n,) standard errors of the plots, Mg/ha.
    """
    low, high = 1e-3 * float(maps.std()), 3 * float(np.hypot(maps.std(), plots.std()))
    if errors_in_variables(plots, maps, errors, low).chi2 <= 1:  # the plots' errors alone explain the residuals
        return errors_in_variables(plots, maps, errors, low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if errors_in_variables(plots, maps, errors, middle).chi2 > 1 else (low, middle)
    return errors_in_variables(plots, maps, errors, high)


def compare(plots: "GeoDataFrame", maps: Sequence[str | Path], *, max_years: float, min_cover: float) -> "GeoDataFrame":
    """Each plot with the map's mean over it.

    Args:
        plots: of `read_plots`.
        maps: paths of maps with the tag SEASON.
        max_years: most years between a plot's measurement and the middle of the map's season.
        min_cover: least share of a plot's area that has values in the map.

    Returns:
        The frame with `map` (Mg/ha, NaN where there is none), `cover`, `years` (map - plot), `source` (the map),
        `small` (whether it is smaller than a pixel) and `left_out` (why it isn't counted, "" where it is). Of several
        maps that cover a plot the one nearest in time counts.

    Raises:
        RasterError: a map can't be read, or is of something else than biomass.
    """
    count = len(plots)
    best = Covered(np.full(count, np.nan), np.zeros(count), np.zeros(count))
    years, source = np.full(count, np.nan), np.full(count, "", object)
    for path in maps:
        found = covered_means(path, plots, units=UNITS)
        apart = _middle_of_season(path) - plots["year"].to_numpy(float)
        enough, before = (one.cover >= min_cover for one in (found, best))
        away, nearest = (np.where(np.isnan(one), np.inf, np.abs(one)) for one in (apart, years))
        fuller = found.cover > best.cover
        nearer = (away < nearest) | ((away == nearest) & fuller)
        better = np.where(enough & before, nearer, np.where(enough == before, fuller, enough))
        for kept, new in zip(best, found, strict=True):
            kept[better] = new[better]
        years[better], source[better] = apart[better], str(path)
    reasons = {
        "no value": plots["agb"].isna().to_numpy(),
        "outside of the maps": best.cover == 0,
        "not covered enough": best.cover < min_cover,
        "without a date of plot or map": np.isnan(years) if np.isfinite(max_years) else np.zeros(count, bool),
        "another time": np.abs(years) > max_years,
    }
    left_out = np.select(list(reasons.values()), list(reasons), "")
    return plots.assign(
        map=best.mean, cover=best.cover, years=years, source=source, small=best.pixels < 1, left_out=left_out
    )


def _middle_of_season(path: str | Path) -> float:
    """Years with their fraction, NaN where the map doesn't tell."""
    parts = read_tags(path).get("SEASON", "").split("/")
    try:
        ends = [np.datetime64(part, "D") for part in parts]
        first = ends[0].astype("datetime64[Y]")
        middle = ends[0] + (ends[-1] - ends[0]) / 2
    except ValueError:
        return np.nan
    return float(first.astype(int) + 1970 + (middle - first) / np.timedelta64(1, "D") / 365.25)


def score(plots: "GeoDataFrame", bins: Sequence[float] = BINS) -> list[dict[str, Any]]:
    """Rows of scores over the plots that count: all, by bin of plot and of map, by kind of forest, by size.

    Each has `table`, `group`, `n`, `bias` (map - plot) with the 95 % interval `bias_low` to `bias_high` by Student's t
    where there are 5 plots or more, `rmsd`, `plot_error`, the root mean square of the plots' own errors (None where one
    has none), and `rmsd_beyond`, what is left of the RMSD without it. Mg/ha.
    """
    used = plots[plots["left_out"] == ""]
    agb, mapped, error = (used[name].to_numpy(float) for name in ("agb", "map", "error"))
    groups: list[tuple[str, str, np.ndarray]] = [("all", "all", np.ones(len(used), bool))]
    for name, values in (("plot", agb), ("map", mapped)):
        for low, high in zip(bins, (*bins[1:], np.inf), strict=True):
            label = f"{low:g}-{high:g}" if np.isfinite(high) else f"{low:g} and more"
            groups.append((name, label, (values >= low) & (values < high)))
    kinds = used["kind"].to_numpy(str)
    groups += [("kind", kind or "unknown", kinds == kind) for kind in sorted(set(kinds))]
    small = used["small"].to_numpy(bool)
    groups += [("size", "a pixel or larger", ~small), ("size", "smaller than a pixel", small)]
    return [
        {"table": table, "group": group, **_scores(agb[mine], mapped[mine], error[mine])}
        for table, group, mine in groups
        if mine.any() or table == "all"
    ]


def _scores(agb: np.ndarray, mapped: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    from scipy.special import stdtrit

    n, off = len(agb), mapped - agb
    found: dict[str, Any] = dict.fromkeys(("bias", "bias_low", "bias_high", "rmsd", "plot_error", "rmsd_beyond"))
    if n:
        found |= {"bias": float(off.mean()), "rmsd": float(np.sqrt((off**2).mean()))}
        if n >= FEWEST:
            half = float(stdtrit(n - 1, 0.975) * off.std(ddof=1) / np.sqrt(n))
            found |= {"bias_low": found["bias"] - half, "bias_high": found["bias"] + half}
        if np.isfinite(error).all():
            own = float((error**2).mean())
            found |= {"plot_error": own**0.5, "rmsd_beyond": max(found["rmsd"] ** 2 - own, 0.0) ** 0.5}
    return {"n": n, **found}


def validate(
    plots: "GeoDataFrame",
    maps: Sequence[str | Path],
    out: str | Path,
    *,
    max_years: float = 2.0,
    min_cover: float = 0.9,
    bins: Sequence[float] = BINS,
) -> dict[str, Any]:
    """Compare, and write `plots.csv`, `scores.csv`, `validation.json`, pictures and the page `validation.html`.

    Args:
        plots: of `read_plots`.
        maps: see `compare`.
        out: the folder.
        max_years: see `compare`; infinite to take plots without a date, too.
        min_cover: see `compare`.
        bins: lower ends of the bins, Mg/ha.

    Returns:
        What validation.json holds: counts, scores, the line.

    Raises:
        EvaluationError: no plot is left.
        RasterError: a map can't be read.
    """
    table = compare(plots, maps, max_years=max_years, min_cover=min_cover)
    used = table[table["left_out"] == ""]
    left_out = {str(why): int(n) for why, n in table["left_out"].value_counts().sort_index().items() if why}
    if used.empty:
        told = ", ".join(f"{n} {why}" for why, n in left_out.items())
        raise EvaluationError(
            f"{plots}: none of {len(table)} plots can be compared with the maps: {told or 'no plots'}"
        )
    errors = used["error"].to_numpy(float)
    line = None
    if len(used) >= FEWEST and (errors > 0).all():  # not where one is unknown
        line = fit_line(used["agb"].to_numpy(float), used["map"].to_numpy(float), errors)
    found: dict[str, Any] = {
        "plots": len(table),
        "used": len(used),
        "smaller_than_a_pixel": int(used["small"].sum()),
        "left_out": left_out,
        "max_years": max_years if np.isfinite(max_years) else None,
        "min_cover": min_cover,
        "maps": [str(path) for path in maps],
        "line": None if line is None else vars(line),
        "scores": score(table, bins),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plots.csv", table.drop(columns="geometry").to_csv(index=False))
    write_csv(folder / "scores.csv", list(found["scores"][0]), found["scores"])
    write_json(folder / "validation.json", found)
    names = _draw(folder, used, found, line)
    write_text(folder / "validation.html", _page(found, names))
    return found


def _draw(folder: Path, used: "GeoDataFrame", found: Mapping[str, Any], line: Line | None) -> list[str]:
    """Draw the pictures; their names."""
    rows = [row | {"rmse": row["rmsd"], "rmse_low": None, "rmse_high": None} for row in found["scores"]]
    everything = rows[0]
    agb, mapped, errors = (used[name].to_numpy(float) for name in ("agb", "map", "error"))
    title = f"{found['used']} field plots"
    given = None if line is None else (line.slope, line.intercept)
    scatter = figures.plot_scatter(agb, mapped, errors, used["small"].to_numpy(bool), line=given, title=title)
    figures.save(folder / "plots.png", scatter, title)
    panels = {"Biomass of the plot": "plot", "Biomass of the map": "map"}
    tables = {name: [row for row in rows if row["table"] == kind] for name, kind in panels.items()}
    bars = figures.error_by_bin(
        tables, title=title, scores={"n": everything["n"], "rmse": everything["rmsd"]}, score_name="RMSD"
    )
    figures.save(folder / "error_by_bin.png", bars, title)
    return ["plots.png", "error_by_bin.png"]


_TITLES = {
    "all": "All plots",
    "plot": "By biomass of the plot, Mg/ha",
    "map": "By biomass of the map, Mg/ha",
    "kind": "By kind of forest",
    "size": "By size of the plot",
}
_COLUMNS = ("", "plots", "bias", "95 % interval", "RMSD", "plots' own error", "RMSD beyond it")


def _page(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The page as HTML."""
    left_out = "; ".join(f"{n} {why}" for why, n in found["left_out"].items()) or "none"
    apart = "any time" if found["max_years"] is None else f"at most {found['max_years']:g} years apart"
    parts = [
        f"<p>{found['used']} of {found['plots']} plots, measured {apart} from the map's season and covered by it to "
        f"{found['min_cover']:.0%} or more; the map is its mean over each plot's area, by the share of each pixel that "
        f"lies in it. Left out: {html.escape(left_out)}.</p>",
        f"<p>{found['smaller_than_a_pixel']} of them are smaller than a pixel of the map: their difference from it "
        "holds what varies within the pixel, too.</p>",
        f"<p>{_about_line(found['line'])}</p>",
    ]
    parts += [f"<p><img src='{name}' alt='{name}'></p>" for name in pictures]
    for table, title in _TITLES.items():
        rows = [row for row in found["scores"] if row["table"] == table]
        if rows:
            parts += [f"<h2>{title}</h2>", pages.table(_COLUMNS, [_row(row) for row in rows])]
    parts.append(
        "<p>Mg/ha. Bias is map - plot. By biomass of the plot any map that is right on average looks too high in the "
        "low bins and too low in the high ones; by biomass of the map, bias is what its reader meets. Plots that were "
        "not chosen by chance tell of their places alone.</p>"
    )
    return pages.page("Map and field plots", parts)


def _about_line(line: Mapping[str, float] | None) -> str:
    if line is None:
        return f"No line is fitted: that takes {FEWEST} plots or more, and the error of each."
    return (
        f"Line through both, each with its error: map = {line['intercept']:.1f} (&plusmn; {line['intercept_se']:.1f}) "
        f"+ {line['slope']:.3f} (&plusmn; {line['slope_se']:.3f}) x plot (York et al. 2004; standard errors). "
        f"Residuals are as large as that says with an error of the map over a plot of {line['map_error']:.1f} Mg/ha."
    )


def _row(row: Mapping[str, Any]) -> list[str]:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    ends = "" if row["bias_low"] is None else f"{row['bias_low']:.1f} to {row['bias_high']:.1f}"
    cells = [str(row["group"]), f"{row['n']:,}", text(row["bias"]), ends]
    return cells + [text(row[name]) for name in ("rmsd", "plot_error", "rmsd_beyond")]
