"""Scores of several ways over the number of training chips, with what repetitions differ by."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biomass_jax.figures.style import COLOURS, GREY, new_figure, plot_axes


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
