"""Training curves of one or more runs, from their `metrics.jsonl`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.errors import FigureError
from biomass_jax.figures.style import COLOURS, GREY, new_figure, plot_axes

FILE = "metrics.jsonl"
# Panels from left to right: what the axis is called, and the fields drawn thin and thick.
PANELS = (("Loss", "train/loss", "val/loss"), ("Validation RMSE (Mg/ha)", "", "val/rmse"))


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
    read = [read_metrics(path) for path in paths]
    panels = [panel for panel in PANELS if any(_points(run, field)[0] for run in read for field in panel[1:])]
    figure = new_figure(6.2 * len(panels), 4.2)
    for axes, (label, thin, thick) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        plot_axes(axes, "Step", label)
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
