"""Every picture (NumPy and matplotlib only; matplotlib is imported when a picture is drawn).

`quicklook` writes a file, `map_style` and `zone_style` give texts for other programs; the others give a matplotlib
figure, for `save`, `to_png` or `to_array`.
"""

from biomass_jax.figures.examples import ChipPanel, ReconstructionPanel, chip_panels, reconstructions
from biomass_jax.figures.legend import map_style, style_path, zone_style
from biomass_jax.figures.maps import chips_by_split, layer_panels, maps_side_by_side, quicklook
from biomass_jax.figures.scores import (
    by_training_size,
    density_scatter,
    error_by_bin,
    plot_scatter,
    residual_histogram,
    training_curves,
    uncertainty_panels,
)
from biomass_jax.figures.style import save, to_array, to_png

__all__ = [
    "ChipPanel",
    "ReconstructionPanel",
    "by_training_size",
    "chip_panels",
    "chips_by_split",
    "density_scatter",
    "error_by_bin",
    "layer_panels",
    "map_style",
    "maps_side_by_side",
    "plot_scatter",
    "quicklook",
    "reconstructions",
    "residual_histogram",
    "save",
    "style_path",
    "to_array",
    "to_png",
    "training_curves",
    "uncertainty_panels",
    "zone_style",
]
