"""Every picture (NumPy and matplotlib only; matplotlib is imported when a picture is drawn)."""

import os
from pathlib import Path
from typing import Any

import numpy as np

STRETCH = (2.0, 98.0)  # percentiles of each colour that become black and full brightness
GAMMA = 0.6  # lifts the dark end: forest is far darker than fields, and would be black
INK = "#6b7280"  # readable on white and on black: the picture's background is transparent


def stretch(image: np.ndarray) -> np.ndarray:
    """Digital numbers (H, W, 3) with NaN for no-data -> RGBA in 0..1, no-data transparent.

    Each colour runs from its own 2nd to its 98th percentile of the pixels with data, raised to `GAMMA`.
    """
    valid = np.isfinite(image).all(axis=-1)
    out = np.zeros((*image.shape[:2], 4))
    if not valid.any():
        return out
    low, high = np.percentile(image[valid], STRETCH, axis=0)
    span = np.where(high > low, high - low, 1)
    out[..., :3] = np.clip((np.where(valid[..., None], image, low) - low) / span, 0, 1) ** GAMMA
    out[..., 3] = valid
    out[~valid, :3] = 0
    return out


def quicklook(
    path: str | os.PathLike[str], rgb: np.ndarray, values: np.ndarray, *, title: str, name: str, unit: str
) -> Path:
    """An image beside the map made from it, as PNG.

    Args:
        path: the picture; written beside its place and renamed.
        rgb: (h, w, 3) digital numbers of red, green, blue, NaN for no-data.
        values: (h, w) of the map, NaN for no-data.
        title: what the image is called.
        name: what the values are.
        unit: their unit.

    Returns:
        The picture's path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = values.shape
    # Two panels of equal scale; very long or wide rasters stay readable.
    side = float(np.clip(4.6 * height / width, 1.6, 9.0))
    figure = Figure(figsize=(10.6, side + 1.0), dpi=130, facecolor="none", layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(stretch(rgb), interpolation="nearest")
    drawn = _draw_values(right, values)
    left.set_title("Red, green, blue", fontsize=10, color=INK)
    right.set_title(_summary(values, unit), fontsize=10, color=INK)
    for axes in (left, right):
        _plain(axes)
    bar = figure.colorbar(drawn, ax=right, fraction=0.046, pad=0.03, extend="max")
    bar.set_label(f"{name} ({unit})", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        FigureCanvasAgg(figure).print_png(str(partial), metadata={"Title": title})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _draw_values(axes: Any, values: np.ndarray) -> Any:
    """Values from 0 to their 99th percentile, so that a few extreme pixels don't darken the rest."""
    valid = values[np.isfinite(values)]
    top = float(np.percentile(valid, 99)) if valid.size else 0.0
    bottom = min(0.0, float(np.percentile(valid, 1))) if valid.size else 0.0
    return axes.imshow(
        np.ma.masked_invalid(values),
        cmap="viridis",
        vmin=bottom,
        vmax=top if top > bottom else bottom + 1,
        interpolation="nearest",
    )


def _summary(values: np.ndarray, unit: str) -> str:
    valid = values[np.isfinite(values)]
    if not valid.size:
        return "No pixel with data"
    return f"Mean {valid.mean():.3g} {unit}, {valid.size / values.size:.0%} of pixels mapped"


def _plain(axes: Any) -> None:
    """No ticks, no frame, nothing behind the pixels: rows and columns of a preview tell nothing."""
    axes.set_facecolor("none")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
