"""A map beside the image it was made from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.figures.legend import MAP_COLOURS
from biomass_jax.figures.style import GREY, colour_bar, image_axes, limits, new_figure, save, stretch


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
    height, width = values.shape
    # Two panels of equal scale; very long or wide rasters stay readable.
    side = float(np.clip(4.6 * height / width, 1.6, 9.0))
    figure = new_figure(10.6, side + 1.0, facecolor="none")  # grey ink on no paper suits white and black pages
    left, right = figure.subplots(1, 2)
    left.imshow(stretch(rgb), interpolation="nearest")
    colours = limits(values, tail=1)
    drawn = right.imshow(np.ma.masked_invalid(values), cmap=MAP_COLOURS, interpolation="nearest", **colours)
    left.set_title("Red, green, blue", fontsize=10, color=GREY)
    right.set_title(_summary(values, unit), fontsize=10, color=GREY)
    for axes in (left, right):
        image_axes(axes)
    colour_bar(figure, drawn, right, f"{name} ({unit})", size=10, extend="max")
    figure.suptitle(title, fontsize=12, color=GREY, parse_math=False)
    return save(path, figure, title)


def maps_side_by_side(panels: Mapping[str, np.ndarray], *, name: str, unit: str, zoom: int) -> Any:
    """Maps of one place in one scale of colours, each whole and below it a square of its middle, enlarged.

    Args:
        panels: title and (h, w) values, NaN for no-data, all of one shape.
        name: what the values are.
        unit: their unit.
        zoom: side of the enlarged square in pixels.
    """
    arrays = list(panels.values())
    height, width = arrays[0].shape
    top, left = (max(0, (side - zoom) // 2) for side in (height, width))
    valid = np.concatenate([values[np.isfinite(values)] for values in arrays])
    colours = {"vmin": 0.0, "vmax": float(np.percentile(valid, 99)) if valid.size else 1.0}
    figure = new_figure(4.4 * len(arrays) + 1.0, 4.4 * (height / width + 1) + 0.6)
    grid = figure.subplots(2, len(arrays), squeeze=False)
    for column, (title, values) in enumerate(panels.items()):
        for row, shown in enumerate((values, values[top : top + zoom, left : left + zoom])):
            axes = grid[row, column]
            image_axes(axes)
            drawn = axes.imshow(np.ma.masked_invalid(shown), cmap=MAP_COLOURS, interpolation="nearest", **colours)
        grid[0, column].set_title(title, fontsize=10)
        grid[1, column].set_title(f"its middle, {zoom} x {zoom} pixels", fontsize=9)
    figure.colorbar(drawn, ax=grid, fraction=0.03, pad=0.02, extend="max").set_label(f"{name} ({unit})")
    return figure


def _summary(values: np.ndarray, unit: str) -> str:
    valid = values[np.isfinite(values)]
    if not valid.size:
        return "No pixel with data"
    return f"Mean {valid.mean():.3g} {unit}, {valid.size / values.size:.0%} of pixels mapped"
