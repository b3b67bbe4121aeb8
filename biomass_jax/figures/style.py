"""What the pictures share: colours of images, paper and ink, writing files."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.runtime.files import replacing

STRETCH = (2.0, 98.0)  # percentiles of each colour that become black and full brightness
GAMMA = 0.6  # lifts the dark end: forest is far darker than fields, and would be black
GREY = "#6b7280"  # readable on white and on black
GRID = "#d9dce1"
# Okabe and Ito's colours, which colour-blind readers can tell apart; black is for reference lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DPI = 130


def stretch(image: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Digital numbers (H, W, 3) with NaN for no-data -> RGBA in 0..1, no-data transparent.

    Each colour runs from its own 2nd to its 98th percentile of the pixels with data, raised to `GAMMA`; the
    percentiles are those of the image `like`, if given, so that two images can be compared by eye.
    """
    valid = np.isfinite(image).all(axis=-1)
    out = np.zeros((*image.shape[:2], 4))
    like = image if like is None else like
    shown = like[np.isfinite(like).all(axis=-1)]
    if not valid.any() or not shown.size:
        return out
    low, high = np.percentile(shown, STRETCH, axis=0)
    span = np.where(high > low, high - low, 1)
    out[..., :3] = np.clip((np.where(valid[..., None], image, low) - low) / span, 0, 1) ** GAMMA
    out[..., 3] = valid
    out[~valid, :3] = 0
    return out


def limits(*arrays: np.ndarray, tail: int) -> dict[str, float]:
    """Colours' `vmin` and `vmax`: from 0 (or below, for a model that goes there) to the top of what any array shows.

    `tail` percent of an array's numbers at either end don't count, so that a few extreme ones don't darken the rest.
    """
    shown = [numbers for array in arrays if (numbers := array[np.isfinite(array)]).size]
    low = min([0.0, *(float(np.percentile(numbers, tail)) for numbers in shown)])
    high = max((float(np.percentile(numbers, 100 - tail)) for numbers in shown), default=1.0)
    return {"vmin": low, "vmax": high if high > low else low + 1}


def new_figure(width: float, height: float, *, facecolor: str = "white") -> Any:
    """An empty figure of so many inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=facecolor, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(path: str | os.PathLike[str], figure: Any, title: str = "") -> Path:
    """Write a figure as PNG, beside its place and renamed.

    Args:
        path: the picture.
        figure: a matplotlib figure.
        title: goes into the file's metadata.

    Raises:
        OSError: the folder isn't there or can't be written.
    """
    path = Path(path)
    with replacing(path) as partial:
        partial.write_bytes(to_png(figure, title))
    return path


def to_png(figure: Any, title: str = "") -> bytes:
    """A figure as the bytes of a PNG; equal input gives equal bytes."""
    figure.draw_without_rendering()  # the layout knows the size of tick labels only after a first drawing
    file = io.BytesIO()
    figure.canvas.print_png(file, metadata={"Title": title, "Software": None})  # it would name itself and its version
    return file.getvalue()


def to_array(figure: Any) -> np.ndarray:
    """A figure as uint8 (H, W, 3), for TensorBoard."""
    figure.draw_without_rendering()  # as in `save`
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def plot_axes(axes: Any, x_label: str, y_label: str) -> None:
    """Labels, a faint grid, no box around."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def image_axes(axes: Any) -> None:
    """No ticks, no frame, nothing behind the pixels: rows and columns of a picture tell nothing."""
    axes.set(facecolor="none", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def quiet_axes(axes: Any) -> None:
    """No frame and nothing behind the pixels; ticks in grey."""
    axes.set_facecolor("none")
    axes.tick_params(labelsize=8, color=GREY, labelcolor=GREY, length=0)
    axes.spines[:].set_visible(False)


def colour_bar(figure: Any, drawn: Any, axes: Any, label: str, *, size: int = 9, **options: Any) -> None:
    """A colour bar in the same style; `size` of its label in points, its ticks' is one less."""
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03, **options)
    bar.set_label(label, fontsize=size, color=GREY)
    bar.ax.tick_params(labelsize=size - 1, color=GREY, labelcolor=GREY)
    bar.outline.set_visible(False)


def save_titled(path: str | os.PathLike[str], figure: Any, title: str) -> Path:
    """Put a title over a figure and write it; see `save`. The folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title, fontsize=12, color=GREY, parse_math=False)
    return save(path, figure, title)
