"""Pictures of how predictions compare with labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biomass_jax.figures.style import COLOURS, GREY, new_figure, plot_axes

CELLS = 100  # of the density scatter, along each side
MOST_SHOWN = 99.9  # percentile of labels and predictions that a scatter reaches to


def density_scatter(
    prediction: np.ndarray,
    label: np.ndarray,
    scores: Mapping[str, Any],
    *,
    title: str,
    name: str = "AGB",
    unit: str = "Mg/ha",
) -> Any:
    """Predictions over labels as counts in cells, with the 1:1 line and the mean prediction along the labels.

    Args:
        prediction: (n,).
        label: (n,).
        scores: n, rmse, bias, r2; None where unknown.
        title: what was scored.
        name: what the values are.
        unit: their unit.
    """
    from matplotlib.colors import LogNorm

    figure = new_figure(6.6, 6.0)
    axes = figure.subplots()
    plot_axes(axes, f"{name} of the label ({unit})", f"{name} predicted ({unit})")
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
    axes.plot(middles, means, color=COLOURS[1], linewidth=1.8, label="Mean prediction")
    beyond = len(label) - int(counts.sum())
    if beyond:
        axes.plot([], [], " ", label=f"{beyond:,} beyond the axes")
    axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")
    axes.set(xlim=(0, top), ylim=(0, top))
    axes.set_box_aspect(1)
    axes.set_title(f"{title}\n{summary(scores, unit)}", fontsize=11, parse_math=False)
    return figure


def error_by_bin(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str,
    scores: Mapping[str, Any],
    references: Mapping[str, float | None] | None = None,
    unit: str = "Mg/ha",
) -> Any:
    """RMSE and bias of each bin, with intervals where there are any; a panel a table, side by side.

    Args:
        tables: panel title -> rows with group, n, rmse, bias and each one's `_low` and `_high`, None for nothing.
        title: what was scored.
        scores: n and rmse over all.
        references: name -> RMSE of horizontal lines, left out where None.
        unit: of the scores.
    """
    figure = new_figure(5.2 * len(tables), 4.6)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, tables.items(), strict=True):
        plot_axes(axes, f"{name} ({unit})", f"Error ({unit})" if axes is panels[0] else "")
        axes.grid(axis="x", visible=False)
        places = np.arange(len(rows))
        for score, shift, colour in (("rmse", -0.19, COLOURS[0]), ("bias", 0.19, COLOURS[1])):
            values = np.array([math.nan if row[score] is None else row[score] for row in rows], float)
            axes.bar(places + shift, values, 0.36, color=colour, label={"rmse": "RMSE", "bias": "Bias"}[score])
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
    figure.suptitle(f"{title}\n{summary(scores, unit)}", fontsize=11, parse_math=False)
    return figure


def residual_histogram(
    prediction: np.ndarray, label: np.ndarray, scores: Mapping[str, Any], *, title: str, unit: str = "Mg/ha"
) -> Any:
    """How often which error occurs; prediction - label, between the percentiles 0.1 and 99.9.

    Args:
        prediction: (n,).
        label: (n,).
        scores: n, rmse, bias, r2; None where unknown.
        title: what was scored.
        unit: of the values.
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


def summary(scores: Mapping[str, Any], unit: str) -> str:
    """`n = 12,345, RMSE 50.8 Mg/ha, bias -3.1, R2 0.61`, without what is None or not given."""
    if not scores["n"]:
        return "n = 0: no labelled pixel"
    parts = [f"n = {scores['n']:,}", f"RMSE {scores['rmse']:.1f} {unit}"]
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
