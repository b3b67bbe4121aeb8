"""The two pictures of docs/performance.md from the suite's JSON: `python -m benchmarks.plots --out FOLDER RESULT...`.

`throughput.png`: chips/s against batch size, with the limit. `step_time.png`: where a training step's time goes; needs
a result of `--only breakdown`. Several results are read as one; of a part that two hold, the last counts.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from biomass_jax.figures import style

JOBS = {"forward": "Forward pass", "step": "Training step"}


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Rows and parts of several results.

    Raises:
        SystemExit: they are of different devices, or a file is no result of the suite.
    """
    rows: dict[tuple[str, str], Any] = {}
    parts: dict[str, Any] = {}
    devices = set()
    for path in paths:
        result = json.loads(path.read_text())
        if "rows" not in result or "settings" not in result:
            raise SystemExit(f"{path}: no result of benchmarks.run")
        devices.add((result["settings"]["kind"], result["settings"]["dtype"]))
        rows |= {(row["part"], row["name"]): row for row in result["rows"]}
        parts |= result["parts"]
    if len(devices) != 1:
        raise SystemExit(f"results of different devices or types: {sorted(devices)}")
    (kind, dtype), machine = devices.pop(), result["machine"]["cpu"]
    return {"rows": list(rows.values()), "parts": parts, "title": f"{machine if kind == 'cpu' else kind}, {dtype}"}


def points(rows: Sequence[dict[str, Any]], job: str, compiled: bool, column: str) -> tuple[list[int], list[float]]:
    """Batch sizes and median chips/s of `column` (`ours`, `rival`, `limit`) in the rows of a job."""
    pattern = re.compile(rf"{job}, batch (\d+){', rival compiled' if compiled else ''}")
    found = {}
    for row in rows:
        if (match := pattern.fullmatch(row["name"])) and row[column]:
            size, value = int(match[1]), row[column]["median"]
            found[size] = size / value if row["unit"] == "s" else value
    return sorted(found), [found[size] for size in sorted(found)]


def throughput(result: dict[str, Any]) -> Any:
    """Chips/s against batch size: ours, the rival eager and compiled, the limit; a panel a job.

    Raises:
        SystemExit: the result holds neither forward passes nor training steps.
    """
    ways = (("ours", False), ("rival", False), ("rival", True), ("limit", False))
    labels = ("biomass_jax", "PyTorch", "PyTorch, torch.compile", "matrix products at the peak")
    jobs = [job for job in JOBS if any(points(result["rows"], job, c, "ours")[0] for c in (False, True))]
    if not jobs:
        raise SystemExit("no forward pass and no training step in these results")
    figure = style.new_figure(4.6 * len(jobs), 3.8)
    for axes, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        for (column, compiled), label, colour in zip(ways, labels, (*style.COLOURS[:3], "black"), strict=True):
            sizes, rates = points(result["rows"], job, compiled, column)
            if not sizes and column in ("ours", "limit"):
                sizes, rates = points(result["rows"], job, True, column)
            if sizes and column == "limit":
                axes.axhline(common.spread(rates)["median"], linestyle="--", color=colour, label=label)
            elif sizes:
                axes.plot(sizes, rates, color=colour, label=label, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.set_ylim(bottom=0)
        axes.set_title(JOBS[job])
        style.plot_axes(axes, "batch size", "chips/s")
        axes.legend(loc="lower left", frameon=False)
    figure.suptitle(result["title"])
    return figure


def step_time(result: dict[str, Any]) -> Any:
    """Two bars of a training step's time: by part, and by kind of operation.

    Raises:
        SystemExit: the results hold no breakdown.
    """
    part = result["parts"].get("breakdown")
    if not part:
        raise SystemExit("no breakdown in these results: python -m benchmarks.run --only breakdown")
    parts = {name: max(common.spread(values)["median"], 0) for name, values in part["parts"].items()}
    total = sum(parts.values())
    bars = {"by part": parts, "by operation": {kind: share * total for kind, share in part["kinds"].items()}}
    figure = style.new_figure(8.2, 3.2)
    axes = figure.subplots()
    for line, lengths in enumerate(bars.values()):
        left = 0.0
        for colour, (label, length) in zip(style.COLOURS, lengths.items(), strict=False):
            axes.barh(line, length, left=left, color=colour, height=0.5)
            if length > 0.04 * total:
                axes.text(left + length / 2, line, f"{length / total:.0%}", ha="center", va="center", color="white")
            axes.text(left + length / 2, line + 0.32, label if length > 0.08 * total else "", ha="center", va="bottom")
            left += length
        axes.text(0, line - 0.3, ", ".join(small(lengths, total)), ha="left", va="top", color=style.GREY, fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(-0.6, len(bars) - 0.3)
    style.plot_axes(axes, "seconds", "")
    figure.suptitle(f"A training step of {part['batch_size']} chips; {result['title']}")
    return figure


def small(lengths: dict[str, float], total: float) -> list[str]:
    """Those pieces of a bar that have no room for their name."""
    return [f"{label} {length / total:.1%}" for label, length in lengths.items() if length <= 0.08 * total]


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of benchmarks.run, of one device")
    parser.add_argument("--out", type=Path, default=common.FOLDER, help="folder")
    options = parser.parse_args()
    result = merged(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("throughput", throughput), ("step_time", step_time)):
        print(style.save(options.out / f"{name}.png", draw(result), f"biomass_jax: {name.replace('_', ' ')}"))


if __name__ == "__main__":
    main()
