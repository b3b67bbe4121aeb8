"""Pictures of scores: predictions beside labels, their uncertainty, training curves, ways over the number of chips."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.errors import FigureError
from biomass_jax.figures.style import COLOURS, GREY, GRID, new_figure, plot_axes

CELLS = 100  # of the density scatter, along each side
MOST_SHOWN = 99.9  # percentile of labels and predictions that a scatter reaches to

FILE = "metrics.jsonl"
# Panels from left to right: what the axis is called, and the fields drawn thin and thick.
PANELS = (("Loss", "train/loss", "val/loss"), ("Validation RMSE ({unit})", "", "val/rmse"))


def density_scatter(
    prediction: np.ndarray,
    label: np.ndarray,
    scores: Mapping[str, Any],
    *,
    title: str,
    name: str = "AGB",
    unit: str = "Mg/ha",
    sources: tuple[str, str] = ("of the label", "predicted"),
    score_name: str = "RMSE",
) -> Any:
    """Predictions over labels as counts in cells, with the 1:1 line and the mean prediction along the labels.

    Args:
        prediction: (n,).
        label: (n,).
        scores: n, rmse, bias, r2; None where unknown.
        title: what was scored.
        name: what the values are.
        unit: their unit.
        sources: where labels and predictions are from, for the axes.
        score_name: what `rmse` is called.
    """
    from matplotlib.colors import LogNorm

    figure = new_figure(6.6, 6.0)
    axes = figure.subplots()
    plot_axes(axes, *(f"{name} {source} ({unit})" for source in sources))
    top = _round_up(max((float(np.percentile(v, MOST_SHOWN)) for v in (prediction, label) if v.size), default=1.0))
    edges = np.linspace(0, top, CELLS + 1)
    counts, _, _ = np.histogram2d(label, prediction, bins=(edges, edges))
    drawn = axes.pcolormesh(
        edges, edges, np.ma.masked_equal(counts.T, 0), norm=LogNorm(1, max(counts.max(), 2)), cmap="viridis"
    )
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("Pixels in a cell")
    axes.plot([0, top], [0, top], color="black", linewidth=1, linestyle="--", label="1:1")
    middles, means = _running_mean(label, prediction, top)
    axes.plot(middles, means, color=COLOURS[1], linewidth=1.8, label=f"Mean {sources[1]}")
    beyond = len(label) - int(counts.sum())
    if beyond:
        axes.plot([], [], " ", label=f"{beyond:,} beyond the axes")
    axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")
    axes.set(xlim=(0, top), ylim=(0, top))
    axes.set_box_aspect(1)
    axes.set_title(f"{title}\n{summary(scores, unit, score_name)}", fontsize=11, parse_math=False)
    return figure


def plot_scatter(
    plots: np.ndarray,
    maps: np.ndarray,
    errors: np.ndarray,
    small: np.ndarray,
    *,
    title: str,
    line: tuple[float, float] | None = None,
    unit: str = "Mg/ha",
) -> Any:
    """A map's means over field plots against the plots, with the plots' errors, the 1:1 line and the fitted one.

    Args:
        plots: (n,).
        maps: (n,).
        errors: (n,) standard errors of the plots, NaN where unknown.
        small: bool (n,), plots smaller than a pixel, drawn open.
        title: what is compared.
        line: slope and intercept, or None.
        unit: of both.
    """
    figure = new_figure(6.0, 6.0)
    axes = figure.subplots()
    plot_axes(axes, f"Biomass of the plot ({unit})", f"Biomass of the map ({unit})")
    top = _round_up(float(max(plots.max(), maps.max())))
    known = np.isfinite(errors)
    axes.hlines(maps[known], (plots - errors)[known], (plots + errors)[known], color=GRID, linewidth=1)
    for mine, face, name in ((~small, COLOURS[0], "Plots"), (small, "white", "Plots smaller than a pixel")):
        if mine.any():
            look = {"s": 22, "facecolor": face, "edgecolor": COLOURS[0], "zorder": 3}
            axes.scatter(plots[mine], maps[mine], label=name, **look)
    axes.plot([0, top], [0, top], color="black", linewidth=1, linestyle="--", label="1:1")
    if line is not None:
        ends = np.array([0, top])
        axes.plot(ends, line[1] + line[0] * ends, color=COLOURS[1], linewidth=1.8, label="Errors of both counted")
    axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")
    axes.set(xlim=(0, top), ylim=(min(0.0, float(maps.min())), top))
    axes.set_box_aspect(1)
    axes.set_title(title, fontsize=11, parse_math=False)
    return figure


def error_by_bin(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str,
    scores: Mapping[str, Any],
    references: Mapping[str, float | None] | None = None,
    unit: str = "Mg/ha",
    score_name: str = "RMSE",
) -> Any:
    """RMSE and bias of each bin, with intervals where there are any; a panel a table, side by side.

    Args:
        tables: panel title -> rows with group, n, rmse, bias and each one's `_low` and `_high`, None for nothing.
        title: what was scored.
        scores: n and rmse over all.
        references: name -> RMSE of horizontal lines, left out where None.
        unit: of the scores.
        score_name: what RMSE is called where it is none of a model's.
    """
    figure = new_figure(5.2 * len(tables), 4.6)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, tables.items(), strict=True):
        plot_axes(axes, f"{name} ({unit})", f"Error ({unit})" if axes is panels[0] else "")
        axes.grid(axis="x", visible=False)
        places = np.arange(len(rows))
        for score, shift, colour in (("rmse", -0.19, COLOURS[0]), ("bias", 0.19, COLOURS[1])):
            values = np.array([math.nan if row[score] is None else row[score] for row in rows], float)
            axes.bar(places + shift, values, 0.36, color=colour, label={"rmse": score_name, "bias": "Bias"}[score])
            has = [i for i, row in enumerate(rows) if row[f"{score}_low"] is not None]
            if has:
                low, high = ([rows[i][f"{score}{end}"] for i in has] for end in ("_low", "_high"))
                axes.vlines(places[has] + shift, low, high, color="black", linewidth=1.2)
        axes.set_xticks(places, [f"{row['group']}\nn = {row['n']:,}" for row in rows], fontsize=8)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.axhline(0, color="black", linewidth=0.8)
        given = {text: value for text, value in (references or {}).items() if value is not None}
        for (text, value), style in zip(given.items(), ("--", ":", "-.") * len(given), strict=False):
            axes.axhline(value, color=GREY, linewidth=1.2, linestyle=style, label=f"{text} {value:.3g}")
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False, fontsize=9)
    figure.suptitle(f"{title}\n{summary(scores, unit, score_name)}", fontsize=11, parse_math=False)
    return figure


def uncertainty_panels(
    reliability: Mapping[str, Sequence[float]],
    rows: Sequence[Mapping[str, Any]],
    sparsification: Mapping[str, Any],
    *,
    level: float,
    title: str,
    unit: str = "Mg/ha",
) -> Any:
    """Whether sds and intervals are right, by nominal level and by bin of the prediction, and whether they sort errors.

    Args:
        reliability: `nominal` and `observed` shares.
        rows: a bin each: group, n, coverage, coverage_low and coverage_high, None for nothing.
        sparsification: `removed`, `rmse`, `oracle` and `ause`.
        level: share of labels that the intervals are to hold.
        title: what was scored.
        unit: of the errors.
    """
    figure = new_figure(15.6, 4.8)
    shares, bins, curve = figure.subplots(1, 3)
    plot_axes(shares, "Share that the sd's Gaussian is to hold", "Share of labels held")
    shares.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--", label="Right")
    shares.plot(reliability["nominal"], reliability["observed"], color=COLOURS[0], linewidth=1.8, marker=".")
    shares.set(xlim=(0, 1), ylim=(0, 1))
    shares.set_title("Standard deviations: below the line they are too small", fontsize=10)
    shares.legend(loc="upper left", frameon=False, fontsize=9)

    plot_axes(bins, f"Prediction ({unit})", "Share of labels inside the interval")
    bins.grid(axis="x", visible=False)
    for place, row in enumerate(rows):
        if row["coverage"] is not None:
            bins.plot(place, row["coverage"], "o", color=COLOURS[0])
        if row["coverage_low"] is not None:
            bins.vlines(place, row["coverage_low"], row["coverage_high"], color=COLOURS[0], linewidth=1.6)
    bins.set_xticks(range(len(rows)), [f"{row['group']}\nn = {row['n']:,}" for row in rows], fontsize=8)
    ends = [row[end] for row in rows for end in ("coverage", "coverage_low") if row[end] is not None]
    bins.set(xlim=(-0.5, len(rows) - 0.5), ylim=(max(0.0, min([level, *ends]) - 0.05), 1.005))
    bins.axhline(level, color="black", linewidth=1, linestyle="--", label=f"Level {level:g}")
    bins.set_title("Coverage of the intervals, with its own 95 % interval", fontsize=10)
    bins.legend(loc="lower left", frameon=False, fontsize=9)

    plot_axes(curve, "Share of pixels taken out", f"RMSE of the rest ({unit})")
    ause = sparsification["ause"]
    name = "By sd" if ause is None else f"By sd, area between {ause:.2f}"
    curve.plot(sparsification["removed"], sparsification["rmse"], color=COLOURS[0], linewidth=1.8, label=name)
    curve.plot(
        sparsification["removed"], sparsification["oracle"], color=GREY, linewidth=1.2, label="By the error itself"
    )
    curve.set(xlim=(0, 1), ylim=(0, None))
    curve.set_title("The most uncertain pixels taken out", fontsize=10)
    curve.legend(loc="lower left", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def residual_histogram(
    prediction: np.ndarray, label: np.ndarray, scores: Mapping[str, Any], *, title: str, unit: str = "Mg/ha"
) -> Any:
    """How often which error occurs; prediction - label, between the percentiles 0.1 and 99.9.

    Arguments as for `density_scatter`.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    plot_axes(axes, f"Prediction - label ({unit})", "Pixels")
    residual = prediction.astype(np.float64) - label.astype(np.float64)
    if residual.size:
        low, high = np.percentile(residual, (100 - MOST_SHOWN, MOST_SHOWN))
        reach = _round_up(max(abs(low), abs(high)))
        counts, edges = np.histogram(residual, bins=81, range=(-reach, reach))
        axes.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.85)
        axes.set_xlim(-reach, reach)
        axes.axvline(float(residual.mean()), color=COLOURS[1], linewidth=1.8, label=f"Mean {residual.mean():+.3g}")
        median = float(np.median(residual))
        axes.axvline(median, color="black", linewidth=1.2, linestyle="--", label=f"Median {median:+.3g}")
        if beyond := residual.size - int(counts.sum()):
            axes.plot([], [], " ", label=f"{beyond:,} beyond the axis")
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set_title(f"{title}\n{summary(scores, unit)}", fontsize=11, parse_math=False)
    return figure


def summary(scores: Mapping[str, Any], unit: str, score_name: str = "RMSE") -> str:
    """`n = 12,345, RMSE 50.8 Mg/ha, bias -3.1, R2 0.61`, without what is None or not given."""
    if not scores["n"]:
        return "n = 0: no labelled pixel"
    parts = [f"n = {scores['n']:,}", f"{score_name} {scores['rmse']:.1f} {unit}"]
    if scores.get("bias") is not None:
        parts.append(f"bias {scores['bias']:+.1f}")
    if scores.get("r2") is not None:
        parts.append(f"R² {scores['r2']:.2f}")
    return ", ".join(parts)


def _running_mean(label: np.ndarray, prediction: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean prediction in 20 steps of label; steps of fewer than 10 pixels are left out."""
    edges = np.linspace(0, top, 21)
    counts, _ = np.histogram(label, edges)
    totals, _ = np.histogram(label, edges, weights=prediction.astype(np.float64))
    enough = counts >= 10
    return ((edges[:-1] + edges[1:]) / 2)[enough], totals[enough] / counts[enough]


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8, 10 times a power of ten; 1 for 0 and less."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 3, 4, 5, 6, 8) if value <= step * power), 10 * power)


def training_curves(
    runs: Sequence[str | os.PathLike[str]],
    *,
    names: Sequence[str] = (),
    title: str = "",
    levels: Mapping[str, float] | None = None,
) -> Any:
    """Losses over steps, training thin and dashed, validation thick; beside them validation RMSE where there is any.

    Args:
        runs: workdirs, or their `metrics.jsonl`.
        names: of the runs; their folders' where not given.
        title: of the picture.
        levels: RMSEs to compare with, drawn across the last panel.

    Raises:
        FigureError: a file is missing, isn't one of metrics, or holds no loss.
    """
    paths = [Path(run) / FILE if Path(run).is_dir() else Path(run) for run in runs]
    names = list(names) or [path.absolute().parent.name for path in paths]
    if not paths or len(names) != len(paths):
        raise FigureError(f"{len(paths)} runs and {len(names)} names; expected at least a run, and a name for each")
    read, unit = [read_metrics(path) for path in paths], _unit_of(paths[0].parent)
    panels = [panel for panel in PANELS if any(_points(run, field)[0] for run in read for field in panel[1:])]
    figure = new_figure(6.2 * len(panels), 4.2)
    for axes, (label, thin, thick) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        plot_axes(axes, "Step", label.format(unit=unit))
        for index, (run, name) in enumerate(zip(read, names, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            steps, values = _points(run, thin)
            axes.plot(steps, values, color=colour, linewidth=0.9, linestyle="--", alpha=0.8)
            steps, values = _points(run, thick)
            best = f", best {min(values):.4g}" if values else ""
            axes.plot(steps, values, color=colour, linewidth=1.9, marker=".", label=f"{name}{best}")
        if thick == PANELS[-1][-1]:
            for index, (name, value) in enumerate((levels or {}).items()):
                line = ("-", "--", "-.", ":")[index % 4]
                axes.axhline(value, color="black", linewidth=0.9, linestyle=line, label=f"{name}, {value:.4g}")
        if thin:
            axes.plot([], [], color="black", linewidth=0.9, linestyle="--", label="training")
        for text in axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8).get_texts():
            text.set_parse_math(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _unit_of(workdir: Path) -> str:
    """The unit of what a run learns, from its best model; that of biomass where there is none yet."""
    try:
        units = json.loads((workdir / "best" / "bundle.json").read_text())["output"]["units"]
    except (OSError, ValueError, KeyError):
        return "Mg/ha"
    return str(units).replace(" ha-1", "/ha")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that is still being written is left out.

    Raises:
        FigureError: see `training_curves`.
    """
    if not path.is_file():
        raise FigureError(f"{path}: no such file; expected a run's workdir, or its {FILE}")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or "step" not in value:
            raise FigureError(f"{path}: line {number}: found {line.strip()[:80]!r}, expected an object with a step")
        found.append(value)
    if not any(_points(found, field)[0] for field in ("train/loss", "val/loss")):
        raise FigureError(f"{path}: no line with train/loss or val/loss yet")
    return found


def _points(lines: Sequence[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have a number there (a loss that isn't finite is null)."""
    chosen = [line for line in lines if line.get(field) is not None]
    return [line["step"] for line in chosen], [line[field] for line in chosen]


def by_training_size(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    *,
    title: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    score: str = "Validation RMSE (Mg/ha)",
) -> Any:
    """Each repetition as a dot, their mean as a line, from the lowest to the highest as a bar; panels side by side.

    Args:
        panels: panel title -> way -> number of training chips -> a score of each repetition.
        title: of the picture.
        levels: panel title -> name -> score that holds for any number of chips, a horizontal line.
        score: what the scores are.

    Raises:
        ValueError: a number of chips without a score.
    """
    figure = new_figure(5.4 * len(panels), 4.4)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (heading, ways) in zip(grid, panels.items(), strict=True):
        plot_axes(axes, "Labelled training chips", score if axes is grid[0] else "")
        axes.set_xscale("log")
        sizes = sorted({size for scores in ways.values() for size in scores})
        for index, (way, scores) in enumerate(ways.items()):
            if empty := [size for size, values in scores.items() if not len(values)]:
                raise ValueError(f"{heading}, {way}: no score for {empty} chips")
            # Ways beside each other, lest their bars hide one another.
            shift = 1.04 ** (index - (len(ways) - 1) / 2)
            chips = sorted(scores)
            places = np.array(chips) * shift
            colour = COLOURS[index % len(COLOURS)]
            means = [float(np.mean(scores[size])) for size in chips]
            axes.plot(places, means, color=colour, linewidth=1.6, label=way)
            for place, size in zip(places, chips, strict=True):
                axes.vlines(place, min(scores[size]), max(scores[size]), color=colour, linewidth=1.2)
                axes.plot([place] * len(scores[size]), scores[size], ".", color=colour, markersize=7)
        for (name, value), style in zip((levels or {}).get(heading, {}).items(), ("--", ":", "-."), strict=False):
            axes.axhline(value, color=GREY, linewidth=1.2, linestyle=style, label=f"{name} {value:.3g}")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_title(heading, fontsize=10, parse_math=False)
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure
