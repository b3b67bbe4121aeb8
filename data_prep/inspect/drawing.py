"""What the pictures of data preparation share: quiet axes, stretched colours, a PNG that appears whole."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.data import bands

INK = "#6b7280"  # readable on white and on black: the background is transparent
LABEL_AXIS = "agbd (Mg/ha)"
_STRETCH = (2.0, 98.0)  # percentiles of each colour that become black and full brightness
_RGB = [bands.BAND_NAMES.index(name) for name in ("RED", "GREEN", "BLUE")]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor="none", layout="constrained")


def save(figure: Any, path: str | os.PathLike[str], title: str) -> Path:
    """Write a figure as PNG beside its place and rename it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Matplotlib would name itself and its version: equal input has to give equal bytes.
        FigureCanvasAgg(figure).print_png(str(partial), metadata={"Title": title, "Software": None})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def plain(axes: Any) -> None:
    """No frame and nothing behind the pixels."""
    axes.set_facecolor("none")
    axes.tick_params(labelsize=8, color=INK, labelcolor=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def colour_bar(figure: Any, drawn: Any, axes: Any, label: str, **options: Any) -> None:
    """A colour bar in the same style."""
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03, **options)
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)


def colours(image: np.ndarray) -> np.ndarray:
    """Digital numbers (H, W, 6), NaN or by `bands.no_data` none -> RGBA (H, W, 4) in 0..1, no-data transparent.

    Each colour runs from its own 2nd to its 98th percentile of the pixels with data.
    """
    valid = ~bands.no_data(image)
    out = np.zeros((*valid.shape, 4))
    if valid.any():
        rgb = image[valid][:, _RGB].astype(np.float64)
        low, high = np.percentile(rgb, _STRETCH, axis=0)
        out[valid, :3] = np.clip((rgb - low) / np.where(high > low, high - low, 1), 0, 1)
        out[valid, 3] = 1
    return out
