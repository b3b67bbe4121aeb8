"""Colours for QGIS beside the rasters that `regional` writes."""

from pathlib import Path

from biomass_jax import figures
from biomass_jax.data.labels import unit_text
from biomass_jax.data.raster.image import read_preview
from biomass_jax.runtime.files import write_text

_PREVIEW = 1024  # pixels of a raster's longer side that tell its colours


def write_style(path: Path, name: str, unit: str, *, band: int = 1, change: bool = False) -> None:
    """Write `<stem>.qml` beside a raster.

    Args:
        path: of the raster.
        name: what its values are.
        unit: of them.
        band: the one to show, from 1.
        change: they are differences.

    Raises:
        RasterError: it can't be read.
        OSError: the place can't be written.
    """
    values = read_preview(path, _PREVIEW, number=band)
    style, _ = figures.map_style(values, name=name, unit=unit_text(unit), band=band, change=change)
    write_text(figures.style_path(path), style)
