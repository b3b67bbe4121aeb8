"""Writes a scene as an HLS v2.0 L30 granule: a folder of single-band Cloud-Optimized GeoTIFFs with HLS's own tags."""

import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.shutil import copy

from biomass_jax.data.bands import BANDS, FILL
from data_prep.synthetic.landscape import PIXEL_M, make_landscape
from data_prep.synthetic.scene import FMASK_FILL, Sun, digital_numbers, fmask

SMALLEST = 32  # pixels; a landscape needs some room


@dataclass(frozen=True)
class Overpass:
    """When and where a granule was sensed; the defaults are a summer day in California."""

    tile: str = "10SFF"  # MGRS tile without T
    time: datetime = datetime(2020, 7, 1, 18, 45, 12)  # UTC
    epsg: int = 32610
    left: float = 600000.0  # easting and northing of the upper-left corner, metres
    top: float = 4100040.0
    sun: Sun = Sun()

    @property
    def granule(self) -> str:
        """The granule's name, for example `HLS.L30.T10SFF.2020183T184512.v2.0`."""
        return f"HLS.L30.T{self.tile}.{self.time:%Y%jT%H%M%S}.v2.0"


def write_scene(out: Path, *, shape: tuple[int, int] = (460, 700), seed: int = 0) -> Path:
    """Make a landscape and write what Landsat sees of it on one clear day.

    Args:
        out: folder that takes the granule's folder; made if need be.
        shape: (H, W) in pixels of 30 m.
        seed: another seed, another land; the same seed gives the same bytes.

    Returns:
        The granule's folder.

    Raises:
        ValueError: the shape is too small.
    """
    if min(shape) < SMALLEST:
        raise ValueError(f"a scene of {shape[0]} x {shape[1]} pixels is too small; at least {SMALLEST} x {SMALLEST}")
    land, overpass = make_landscape(shape, seed), Overpass()
    return write_granule(out, digital_numbers(land, seed=seed, sun=overpass.sun), fmask(land), overpass)


def write_granule(
    out: Path, image: NDArray[np.int16], quality: NDArray[np.uint8], overpass: Overpass | None = None
) -> Path:
    """Write the bands and the Fmask of one granule, replacing a granule of the same name.

    Args:
        out: folder that takes the granule's folder; made if need be.
        image: (H, W, 6) digital numbers in the order of `bands.BANDS`.
        quality: (H, W) Fmask bits.
        overpass: when and where.

    Returns:
        The granule's folder; it appears under this name only when it is whole.
    """
    overpass = overpass or Overpass()
    out.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{overpass.granule}.", dir=out))
    try:
        for index, band in enumerate(BANDS):
            tags = _tags(overpass, image.shape[:2], FILL) | {
                "long_name": band.description,
                "scale_factor": "0.0001",
                "add_offset": "0",
            }
            path = partial / f"{overpass.granule}.{band.l30}.tif"
            _write_cog(path, image[..., index], FILL, overpass, tags, band.description)
        tags = _tags(overpass, image.shape[:2], FMASK_FILL)
        _write_cog(partial / f"{overpass.granule}.Fmask.tif", quality, FMASK_FILL, overpass, tags, None)
        partial.chmod(0o755)  # mkdtemp makes private folders
        final = out / overpass.granule
        if final.exists():
            shutil.rmtree(final)
        return partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_cog(
    path: Path, values: np.ndarray, fill: int, overpass: Overpass, tags: dict[str, str], description: str | None
) -> None:
    height, width = values.shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": 1,
        "dtype": values.dtype.name,
        "crs": CRS.from_epsg(overpass.epsg),
        "transform": rasterio.Affine(PIXEL_M, 0, overpass.left, 0, -PIXEL_M, overpass.top),
        "nodata": fill,
    }
    with MemoryFile() as memory:
        with memory.open(**profile) as dst:
            dst.write(values, 1)
            dst.update_tags(**tags)
            if description is not None:
                dst.set_band_description(1, description)
        # The layout of the real files: 256-pixel blocks, deflate with differences, overviews by nearest neighbour.
        with rasterio.open(memory.name) as src:
            layout = {
                "BLOCKSIZE": 256,
                "COMPRESS": "DEFLATE",
                "PREDICTOR": "STANDARD",
                "OVERVIEW_RESAMPLING": "NEAREST",
            }
            copy(src, path, driver="COG", **layout)


def _tags(overpass: Overpass, shape: tuple[int, ...], fill: int) -> dict[str, str]:
    """Return the file-level tags that real granules carry, with the same spelling of names and values."""
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    zone = overpass.epsg % 100
    processed = overpass.time + timedelta(days=1)
    return {
        "ACCODE": "Lasrc",
        "arop_ave_xshift(meters)": "0",
        "arop_ave_yshift(meters)": "0",
        "cloud_coverage": "0",
        "HLS_PROCESSING_TIME": (processed + timedelta(days=1)).strftime(stamp),
        "HORIZONTAL_CS_NAME": f"UTM, WGS84, UTM ZONE {zone}",
        "L1_PROCESSING_TIME": processed.strftime(stamp),
        "LANDSAT_PRODUCT_ID": f"LC08_L1TP_043034_{overpass.time:%Y%m%d}_{processed:%Y%m%d}_02_T1",
        "LANDSAT_SCENE_ID": f"LC8043034{overpass.time:%Y%j}LGN00",
        "MEAN_SUN_AZIMUTH_ANGLE": f"{overpass.sun.azimuth:.6f}",
        "MEAN_SUN_ZENITH_ANGLE": f"{overpass.sun.zenith:.6f}",
        "MEAN_VIEW_AZIMUTH_ANGLE": "100.000000",
        "MEAN_VIEW_ZENITH_ANGLE": "3.000000",
        "NBAR_SOLAR_ZENITH": f"{overpass.sun.zenith:.6f}",
        "NCOLS": str(shape[1]),
        "NROWS": str(shape[0]),
        "OVR_RESAMPLING_ALG": "NEAREST",
        "PROCESSING_LEVEL": "L1TP",
        "SENSING_TIME": overpass.time.strftime("%Y-%m-%dT%H:%M:%S.0000000Z"),
        "SENSOR": "OLI_TIRS",
        "SENTINEL2_TILEID": overpass.tile,
        "spatial_coverage": "100",
        "SPATIAL_RESOLUTION": "30",
        "ULX": f"{overpass.left:.0f}",
        "ULY": f"{overpass.top:.0f}",
        "USGS_SOFTWARE": "LPGS_15.3.1c",
        "_FillValue": str(fill),
    }
