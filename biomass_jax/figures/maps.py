"""Maps: one beside the image it was made from, several beside each other, chips by their split."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.figures.legend import CHANGE_COLOURS, MAP_COLOURS, SPREAD_COLOURS
from biomass_jax.figures.style import (
    COLOURS,
    GREY,
    GRID,
    colour_bar,
    image_axes,
    limits,
    new_figure,
    plot_axes,
    save,
    stretch,
)

_SPLIT_COLOURS = {"": GRID, "dropped": "#9ca3af", "train": COLOURS[0], "val": COLOURS[4], "test": COLOURS[1]}
_BINS = 25  # of the distances
_MOST_SHOWN = 99  # percentile of the distances that the axis reaches to, for each kind of chips


def quicklook(
    path: str | os.PathLike[str],
    rgb: np.ndarray,
    values: np.ndarray,
    sd: np.ndarray | None = None,
    *,
    title: str,
    name: str,
    unit: str,
) -> Path:
    """An image beside the map made from it, and beside the map's standard deviation where it has one, as PNG.

    Args:
        path: the picture; written beside its place and renamed.
        rgb: (h, w, 3) digital numbers of red, green, blue, NaN for no-data.
        values: (h, w) of the map, NaN for no-data.
        sd: (h, w), its standard deviation, NaN for no-data; None where the map tells none.
        title: what the image is called.
        name: what the values are.
        unit: their unit.

    Returns:
        The picture's path.
    """
    height, width = values.shape
    # Panels of equal scale; very long or wide rasters stay readable.
    side = float(np.clip(4.6 * height / width, 1.6, 9.0))
    panels = 2 if sd is None else 3
    figure = new_figure(5.3 * panels, side + 1.0, facecolor="none")  # grey ink on no paper suits white and black pages
    left, right, *more = figure.subplots(1, panels)
    left.imshow(stretch(rgb), interpolation="nearest")
    colours = limits(values, tail=1)
    drawn = right.imshow(np.ma.masked_invalid(values), cmap=MAP_COLOURS, interpolation="nearest", **colours)
    left.set_title("Red, green, blue", fontsize=10, color=GREY)
    right.set_title(_summary(values, unit), fontsize=10, color=GREY)
    for axes in (left, right, *more):
        image_axes(axes)
    colour_bar(figure, drawn, right, f"{name} ({unit})", size=10, extend="max")
    if sd is not None:
        (third,) = more
        drawn = third.imshow(
            np.ma.masked_invalid(sd), cmap=SPREAD_COLOURS, interpolation="nearest", **limits(sd, tail=1)
        )
        third.set_title("How sure the map is", fontsize=10, color=GREY)
        colour_bar(figure, drawn, third, f"Standard deviation ({unit})", size=10, extend="max")
    figure.suptitle(title, fontsize=12, color=GREY, parse_math=False)
    return save(path, figure, title)


def layer_panels(layers: Mapping[str, np.ndarray], *, unit: str) -> Any:
    """Layers of one raster beside each other: the first, its standard deviation, or a change and where it is none.

    Args:
        layers: name and (h, w) values, NaN for no-data, all of one shape. `..._sd` gets the colours of spreads, a name
            that ends in `change` or is `significant` those of more and less.
        unit: of all but `significant`.
    """
    height, width = next(iter(layers.values())).shape
    side = float(np.clip(4.6 * height / width, 1.6, 9.0))
    figure = new_figure(5.3 * len(layers), side + 0.8)
    for axes, (name, values) in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers.items(), strict=True):
        colours = {"cmap": MAP_COLOURS, **limits(values, tail=1)}
        if name.endswith("_sd"):
            colours["cmap"] = SPREAD_COLOURS
        elif name.endswith("change") or name == "significant":
            most = limits(np.abs(values), tail=1)["vmax"]
            colours = {"cmap": CHANGE_COLOURS, "vmin": -most, "vmax": most}
        image_axes(axes)
        drawn = axes.imshow(np.ma.masked_invalid(values), interpolation="nearest", **colours)
        colour_bar(figure, drawn, axes, name if name == "significant" else f"{name} ({unit})", extend="neither")
    return figure


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


def chips_by_split(
    outlines: Mapping[str, Sequence[np.ndarray]],
    distances: Mapping[str, np.ndarray],
    *,
    title: str,
    buffer_km: float = 0.0,
) -> Any:
    """Chips on a map, coloured by split, beside a histogram of how far chips lie from the nearest train chip.

    Args:
        outlines: `train`, `val`, `test`, `dropped`, or "" for cells that are no chips -> outlines (points, 2) in
            longitude and latitude.
        distances: what these chips are called -> (n,) km; compared with each other as shares of their numbers (the
            nearest-neighbour distances of Milà et al. 2022, doi:10.1111/2041-210X.13851).
        title: of the picture.
        buffer_km: the distance that splits keep, drawn as a line; 0 for none.
    """
    figure = new_figure(12.0, 5.4)
    left, right = figure.subplots(1, 2)
    _draw_chips(left, outlines)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    plot_axes(right, "Distance to the nearest train chip, edge to edge (km)", "Chips (%)")
    drawn = {name: values for name, values in distances.items() if len(values)}
    top = (
        max([buffer_km, *(float(np.percentile(values, _MOST_SHOWN)) for values in drawn.values())], default=0.0) or 1.0
    )
    edges = np.linspace(0, top, _BINS + 1)
    for (name, values), colour in zip(drawn.items(), (COLOURS[1], GREY), strict=False):
        counts, _ = np.histogram(values, edges)
        shares = counts / len(values) * 100
        right.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
        right.stairs(shares, edges, color=colour, linewidth=1.6, label=f"{name}, n = {len(values):,}")
        median = float(np.median(values))
        right.axvline(median, color=colour, linestyle="--", linewidth=1.4, label=f"their median, {median:.1f} km")
    if buffer_km:
        right.axvline(buffer_km, color="black", linestyle=":", linewidth=1.4, label=f"buffer, {buffer_km:g} km")
    right.set_xlim(0, top)
    if drawn:
        right.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
    else:
        right.set_title("No test chips, or no train chips", fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _draw_chips(axes: Any, outlines: Mapping[str, Sequence[np.ndarray]]) -> None:
    from matplotlib.collections import PolyCollection

    points = np.concatenate([np.empty((0, 2)), *(ring for rings in outlines.values() for ring in rings)])
    plot_axes(axes, "Longitude", "Latitude")
    if not len(points):
        return
    turn = np.ptp(points[:, 0]) > 180 > np.ptp(points[:, 0] % 360)  # across the antimeridian
    for name, colour in _SPLIT_COLOURS.items():
        rings = outlines.get(name, ())
        if not len(rings):
            continue
        shown = [np.column_stack([ring[:, 0] % 360, ring[:, 1]]) for ring in rings] if turn else rings
        # An edge as well: on a map of the world a chip is smaller than a pixel.
        axes.add_collection(
            PolyCollection(
                shown, facecolor=colour, edgecolor="white" if len(points) < 20_000 else colour, linewidth=0.4
            )
        )
        axes.plot([], [], "s", color=colour, label=name or "no chip")
    axes.autoscale_view()
    axes.set_aspect(1 / max(np.cos(np.radians(points[:, 1].mean())), 0.05))
