"""Training curves of one or more runs, from their `metrics.jsonl`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biomass_jax.errors import FigureError
from biomass_jax.figures.style import COLOURS, new_figure, plot_axes

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
