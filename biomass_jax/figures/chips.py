"""Chips: the image, the prediction, the footprints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomass_jax.figures.style import image_axes, new_figure, stretch

PANEL = 3.1  # inches


@dataclass(frozen=True)
class ChipPanel:
    """What a row of `chip_panels` shows.

    Attributes:
        rgb: (H, W, 3) digital numbers of red, green, blue, NaN for no-data.
        prediction: (H, W), NaN for no-data.
        label: (H, W), below 0 for none.
        title: the chip.
    """

    rgb: np.ndarray
    prediction: np.ndarray
    label: np.ndarray
    title: str


def chip_panels(panels: Sequence[ChipPanel], *, title: str, name: str = "AGB", unit: str = "Mg/ha") -> Any:
    """Image, prediction and footprints of chips, one chip a row; prediction and footprints share a row's colours.

    A footprint is one pixel of 50,000, so it is drawn as a dot over the dimmed image.

    Args:
        panels: the chips.
        title: of the picture.
        name: what the values are.
        unit: their unit.
    """
    figure = new_figure(3 * PANEL + 1.1, PANEL * 1.12 * len(panels) + 0.5)
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes in row:
            image_axes(axes)
        picture = stretch(panel.rgb)
        row[0].imshow(picture, interpolation="nearest")
        row[0].set_title(panel.title, fontsize=9, parse_math=False)
        rows, cols = np.nonzero(panel.label >= 0)
        values = panel.label[rows, cols]
        limits = _limits(panel.prediction, values)
        drawn = row[1].imshow(np.ma.masked_invalid(panel.prediction), cmap="viridis", interpolation="nearest", **limits)
        error = panel.prediction[rows, cols].astype(np.float64) - values
        error = error[np.isfinite(error)]
        rmse = f", RMSE {np.sqrt(np.mean(error**2)):.1f}" if error.size else ""
        row[1].set_title("Prediction", fontsize=9)
        row[2].imshow(np.ones(3) * (0.35 + 0.5 * picture[..., :3].mean(-1, keepdims=True)), interpolation="nearest")
        size = np.clip((72 * PANEL / max(panel.label.shape) * 2.2) ** 2, 2, 80)
        row[2].scatter(cols, rows, c=values, s=size, cmap="viridis", edgecolors="black", linewidths=0.25, **limits)
        row[2].set_title(f"Footprints: n = {len(values):,}{rmse}", fontsize=9)
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.02, pad=0.01, extend="max")
        bar.set_label(f"{name} ({unit})", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _limits(prediction: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """From 0 (or below, for a model that goes there) to the 98th percentile of what either shows."""
    shown = [values[np.isfinite(values)] for values in (prediction.ravel(), labels)]
    tops = [float(np.percentile(values, 98)) for values in shown if values.size]
    bottoms = [min(0.0, float(np.percentile(values, 2))) for values in shown if values.size]
    low, high = min(bottoms, default=0.0), max(tops, default=1.0)
    return {"vmin": low, "vmax": high if high > low else low + 1}
