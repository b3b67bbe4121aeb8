"""Writes scenes as HLS v2.0 granules: folders of single-band Cloud-Optimized GeoTIFFs with HLS's own tags."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.shutil import copy

from biomass_jax.data.bands import BANDS, FILL
from data_prep.synthetic.hls_tags import FMASK_BITS, Overpass, file_tags
from data_prep.synthetic.landscape import PIXEL_M, make_landscape
from data_prep.synthetic.scene import FMASK_FILL, digital_numbers, fmask

SMALLEST = 32  # pixels; a landscape needs some room

__all__ = ["SMALLEST", "Overpass", "write_granule", "write_scene"]


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
    out: Path,
    image: NDArray[np.int16],
    quality: NDArray[np.uint8],
    overpass: Overpass | None = None,
    others: Mapping[str, NDArray[np.int16]] | None = None,
) -> Path:
    """Write the bands and the Fmask of one granule, replacing a granule of the same name.

    Args:
        out: folder that takes the granule's folder; made if need be.
        image: (H, W, 6) digital numbers in the order of `bands.BANDS`.
        quality: (H, W) Fmask bits.
        overpass: when, where and how.
        others: (H, W) of bands that nobody uses, by band number (`B09`).

    Returns:
        The granule's folder; it appears under this name only when it is whole.
    """
    overpass = overpass or Overpass()
    out.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{overpass.granule}.", dir=out))
    try:
        for index, band in enumerate(BANDS):
            number = band.s30 if overpass.sensor == "S30" else band.l30
            _write_band(partial, number, image[..., index], overpass, band.description)
        for number, values in (others or {}).items():
            _write_band(partial, number, values, overpass, number)
        tags = file_tags(overpass, image.shape[:2], FMASK_FILL) | {"Fmask bit description": FMASK_BITS}
        _write_cog(partial / f"{overpass.granule}.Fmask.tif", quality, FMASK_FILL, overpass, tags)
        partial.chmod(0o755)  # mkdtemp makes private folders
        final = out / overpass.granule
        if final.exists():
            shutil.rmtree(final)
        return partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_band(folder: Path, number: str, values: NDArray[np.int16], overpass: Overpass, long_name: str) -> None:
    tags = file_tags(overpass, values.shape, FILL) | {"long_name": long_name}
    scale = None if overpass.scale == "file" else 0.0001
    if overpass.scale != "band":
        tags |= {"scale_factor": "0.0001", "add_offset": "0"}
    _write_cog(folder / f"{overpass.granule}.{number}.tif", values, FILL, overpass, tags, long_name, scale)


def _write_cog(
    path: Path,
    values: np.ndarray,
    fill: int,
    overpass: Overpass,
    tags: dict[str, str],
    description: str | None = None,
    scale: float | None = None,
) -> None:
    height, width = values.shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": 1,
        "dtype": values.dtype.name,
        "crs": overpass.crs,
        "transform": rasterio.Affine(PIXEL_M, 0, overpass.left, 0, -PIXEL_M, overpass.top),
        "nodata": fill,
    }
    with MemoryFile() as memory:
        with memory.open(**profile) as dst:
            dst.write(values, 1)
            dst.update_tags(**tags)
            if description is not None:
                dst.set_band_description(1, description)
            if scale is not None:
                dst.scales = (scale,)
        # The layout of the real files: 256-pixel blocks, deflate with differences, overviews by nearest neighbour.
        with rasterio.open(memory.name) as src:
            layout = {
                "BLOCKSIZE": 256,
                "COMPRESS": "DEFLATE",
                "PREDICTOR": "STANDARD",
                "OVERVIEW_RESAMPLING": "NEAREST",
            }
            copy(src, path, driver="COG", **layout)
