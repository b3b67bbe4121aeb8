"""Chips as pictures: image, prediction and footprints; what a masked image model saw and what it painted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomass_jax.figures.style import image_axes, limits, new_figure, stretch

CHIP_PANEL = 3.1  # inches

PANEL = 2.2  # inches
MASKED = 0.5  # grey of a cell that the model did not see
# Red, green and blue of the picture, by band. Forest, clouds and burnt ground differ most in the second.
COMPOSITES = {"RGB": ("RED", "GREEN", "BLUE"), "SWIR": ("SWIR_2", "NIR_NARROW", "RED")}
STEPS = ("input", "masked", "reconstruction")


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
    figure = new_figure(3 * CHIP_PANEL + 1.1, CHIP_PANEL * 1.12 * len(panels) + 0.5)
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes in row:
            image_axes(axes)
        picture = stretch(panel.rgb)
        row[0].imshow(picture, interpolation="nearest")
        row[0].set_title(panel.title, fontsize=9, parse_math=False)
        rows, cols = np.nonzero(panel.label >= 0)
        values = panel.label[rows, cols]
        colours = limits(panel.prediction, values, tail=2)
        drawn = row[1].imshow(
            np.ma.masked_invalid(panel.prediction), cmap="viridis", interpolation="nearest", **colours
        )
        error = panel.prediction[rows, cols].astype(np.float64) - values
        error = error[np.isfinite(error)]
        rmse = f", RMSE {np.sqrt(np.mean(error**2)):.1f}" if error.size else ""
        row[1].set_title("Prediction", fontsize=9)
        row[2].imshow(np.ones(3) * (0.35 + 0.5 * picture[..., :3].mean(-1, keepdims=True)), interpolation="nearest")
        size = np.clip((72 * CHIP_PANEL / max(panel.label.shape) * 2.2) ** 2, 2, 80)
        row[2].scatter(cols, rows, c=values, s=size, cmap="viridis", edgecolors="black", linewidths=0.25, **colours)
        row[2].set_title(f"Footprints: n = {len(values):,}{rmse}", fontsize=9)
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.02, pad=0.01, extend="max")
        bar.set_label(f"{name} ({unit})", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


@dataclass(frozen=True)
class ReconstructionPanel:
    """What a row of `reconstructions` shows.

    Attributes:
        image: (H, W, bands), the input, in z-scores or digital numbers.
        reconstruction: (H, W, bands), in the input's units; of normalised targets, first brought back to them.
        mask: (H/p, W/p), 1 where a token is masked.
        nodata: bool (H, W); such pixels stay blank.
        title: the chip.
    """

    image: np.ndarray
    reconstruction: np.ndarray
    mask: np.ndarray
    nodata: np.ndarray
    title: str


def reconstruction_pictures(panel: ReconstructionPanel, bands: Sequence[str], colours: Sequence[str]) -> np.ndarray:
    """The input, the input with masked cells grey, and the input with the reconstruction in the masked cells.

    All three run from the input's 2nd to its 98th percentile of each colour.

    Args:
        panel: the chip.
        bands: names of the image's bands, in order.
        colours: the bands shown as red, green and blue.

    Returns:
        RGBA (3, H, W, 4) in 0..1, no-data transparent.

    Raises:
        ValueError: a band that the image does not have, or a mask that does not cover it.
    """
    if missing := [name for name in colours if name not in bands]:
        raise ValueError(f"no band {', '.join(missing)} to show among {', '.join(bands)}")
    height, width = panel.nodata.shape
    patch = height // panel.mask.shape[0]
    masked = np.asarray(panel.mask, bool).repeat(patch, axis=0).repeat(patch, axis=1)
    if masked.shape != (height, width):
        raise ValueError(f"mask {panel.mask.shape} in tokens of {patch} px does not cover {height} x {width} px")
    index = [list(bands).index(name) for name in colours]
    image, painted = (np.asarray(a, np.float64)[..., index] for a in (panel.image, panel.reconstruction))
    image = np.where(panel.nodata[..., None], np.nan, image)
    seen = stretch(image)
    filled = stretch(np.where((masked & ~panel.nodata)[..., None], painted, image), like=image)
    hidden = seen.copy()
    hidden[masked, :3] = MASKED
    hidden[masked, 3] = 1
    return np.stack([seen, hidden, filled])


def reconstructions(panels: Sequence[ReconstructionPanel], *, bands: Sequence[str], title: str) -> Any:
    """Chips, one a row: input, masked input and reconstruction as RGB, and again as SWIR composite.

    Args:
        panels: the chips.
        bands: names of the images' bands, in order; those of `COMPOSITES` must be among them.
        title: of the picture.

    Raises:
        ValueError: see `reconstruction_pictures`.
    """
    columns = len(COMPOSITES) * len(STEPS)
    figure = new_figure(columns * PANEL + 0.4, len(panels) * PANEL * 1.05 + 0.7)
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        pictures = [reconstruction_pictures(panel, bands, colours) for colours in COMPOSITES.values()]
        for axes, picture in zip(row, np.concatenate(pictures), strict=True):
            image_axes(axes)
            axes.imshow(picture, interpolation="nearest")
        row[0].set_ylabel(panel.title, fontsize=9, parse_math=False)
    headings = [f"{name} {step}" for name in COMPOSITES for step in STEPS]
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure
