"""What a sweep found: a table, the best config, and a page with Optuna's plots."""

import base64
import html
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; max-width: 75em; }}
table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid #bbb; padding: 0.2em 0.6em; text-align: right; }}
img {{ max-width: 100%; display: block; }}
</style></head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Importance</h2>
{importance}
<h2>History</h2>
{history}
<h2>Trials</h2>
{table}
</body>
</html>
"""


def ordered(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Finished trials, best first; then pruned, running and failed ones."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL)
    return sorted(trials, key=lambda t: (states.index(t.state), _value(t), t.number))


def _value(trial: FrozenTrial) -> float:
    return math.inf if trial.value is None else trial.value


def rows(trials: list[FrozenTrial]) -> list[list[str]]:
    """Table of trials, best first: a header, then a row a trial.

    The loss of a pruned trial is that of its last epoch; of a finished one, the lowest.
    """
    fields = list(dict.fromkeys(field for trial in trials for field in trial.params))
    table = [["trial", "state", "val/loss", "epochs", *fields]]
    names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    for trial in ordered(trials):
        loss = "" if trial.value is None else f"{trial.value:.5g}"
        epochs = str(max(trial.intermediate_values, default=0))
        values = [short(trial.params.get(field, "")) for field in fields]
        table.append([str(trial.number), names.get(trial.state, "running"), loss, epochs, *values])
    return table


def short(value: Any) -> str:
    """A field's value for people to read."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_text(table: list[list[str]]) -> str:
    """The table with aligned columns."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def page(study: optuna.Study, title: str, summary: str) -> str:
    """One HTML page with Optuna's plots of importance and history, and the table; it loads nothing from elsewhere.

    The plots are Optuna's Matplotlib ones: Plotly's would bring another dependency, and several MB of script that
    names servers, into each page.
    """
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    header, *body = rows(trials)
    lines = [_line("th", header), *(_line("td", row) for row in body)]
    importance = "<p>Importances need at least two finished trials.</p>"
    history = "<p>No trial has finished.</p>"
    if finished:
        history = _picture("History", lambda plots: plots.plot_optimization_history(study, target_name="val/loss"))
    if len(finished) > 1:
        evaluator = PedAnovaImportanceEvaluator()  # fANOVA, the default of Optuna 4, would need scikit-learn
        importance = _picture(
            "Importance", lambda plots: plots.plot_param_importances(study, evaluator, target_name="val/loss")
        )
        importance += (
            "<p>By PED-ANOVA over finished trials: what the best tenth has in common. Rough below 50 trials.</p>"
        )
    return PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary),
        importance=importance,
        history=history,
        table="\n".join(["<table>", *lines, "</table>"]),
    )


def _line(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _picture(name: str, draw: Callable[[Any], Any]) -> str:
    """One of Optuna's plots as an image inside the page."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    written = io.BytesIO()
    # Optuna sets a style for all later plots, calls these functions experimental each time, and warns of importances
    # from a few trials, which the page says too.
    with warnings.catch_warnings(), plt.rc_context():
        for category in (ExperimentalWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        figure = draw(plots).figure
        figure.set_size_inches(10, 5)
        figure.savefig(written, format="png", dpi=110, bbox_inches="tight")
        plt.close(figure)
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}">'
