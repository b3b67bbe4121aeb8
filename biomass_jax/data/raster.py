"""Rasters in and out: the one module through which images, masks and maps are read and written.

Digital numbers are passed on as stored: no scale factor is ever applied.
"""

from biomass_jax.data.raster_blocks import verify_blocks
from biomass_jax.data.raster_common import Grid, RasterError, grid_of, open_quietly, raster_errors, utm_zone
from biomass_jax.data.raster_inputs import GranuleName, InputItem, find_inputs, granule_name
from biomass_jax.data.raster_mask import MaskSource
from biomass_jax.data.raster_read import ImageSource, open_image, read_preview, read_tags
from biomass_jax.data.raster_write import MapWriter, check_space, space_needed

__all__ = [
    "GranuleName",
    "Grid",
    "ImageSource",
    "InputItem",
    "MapWriter",
    "MaskSource",
    "RasterError",
    "check_space",
    "find_inputs",
    "granule_name",
    "grid_of",
    "open_image",
    "open_quietly",
    "raster_errors",
    "read_preview",
    "read_tags",
    "space_needed",
    "utm_zone",
    "verify_blocks",
]
