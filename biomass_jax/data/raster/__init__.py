"""Rasters in and out: the one module through which images, masks and maps are read and written.

Digital numbers are passed on as stored: no scale factor is ever applied.
"""

from biomass_jax.data.raster.chips import PUBLISHED_BANDS, Pair, describe_pairs, find_pairs, read_pair, split_files
from biomass_jax.data.raster.cog import MapWriter, check_space, space_needed
from biomass_jax.data.raster.grid import Grid, epsg_code, grid_of, open_quietly, raster_errors, utm_zone
from biomass_jax.data.raster.image import ImageSource, open_image, read_preview, read_tags
from biomass_jax.data.raster.inputs import GranuleName, InputItem, find_inputs, granule_name
from biomass_jax.data.raster.mask import MaskSource
from biomass_jax.data.raster.tiff import verify_blocks

__all__ = [
    "PUBLISHED_BANDS",
    "FractionError",
    "GranuleName",
    "Grid",
    "ImageSource",
    "InputItem",
    "MapWriter",
    "MaskSource",
    "Pair",
    "RasterError",
    "check_space",
    "describe_pairs",
    "epsg_code",
    "find_inputs",
    "find_pairs",
    "granule_name",
    "grid_of",
    "open_image",
    "open_quietly",
    "raster_errors",
    "read_pair",
    "read_preview",
    "read_tags",
    "space_needed",
    "split_files",
    "utm_zone",
    "verify_blocks",
]
