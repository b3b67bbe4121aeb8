"""Writes scenes as HLS v2.0 granules: folders of single-band Cloud-Optimized GeoTIFFs with HLS's own tags."""

import shutil
from collections.abc import Mapping
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
from biomass_jax.runtime.files import replace_folder
from data_prep.hls.granules import FMASK_FILL
from data_prep.synthetic.landscape import PIXEL_M, make_landscape
from data_prep.synthetic.scene import SUN, digital_numbers, fmask

STAMP = "%Y-%m-%dT%H:%M:%SZ"
FMASK_BITS = (
    "Bits are listed from the MSB (bit 7) to the LSB (bit 0): \n7-6    aerosol:\n       00 - climatology\n"
    "       01 - low\n       10 - average\n       11 - high\n5      water\n4      snow/ice\n3      cloud shadow\n"
    "2      adjacent to cloud\n1      cloud\n0      cirrus cloud\n"
)
# Some real files name no EPSG code: GDAL made their CRS from bare parameters.
_USER_DEFINED_UTM = (
    'PROJCS["UTM Zone {zone}, {side}ern Hemisphere",GEOGCS["Unknown datum based upon the WGS 84 ellipsoid",'
    'DATUM["Not_specified_based_on_WGS_84_spheroid",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",{meridian}],PARAMETER["scale_factor",0.9996],'
    'PARAMETER["false_easting",500000],PARAMETER["false_northing",{northing}],UNIT["Meter",1]]'
)

SMALLEST = 32  # pixels; a landscape needs some room


@dataclass(frozen=True)
class Overpass:
    """When, where and how a granule was sensed; the defaults are a summer day in California."""

    tile: str = "10SFF"  # MGRS tile without T
    time: datetime = datetime(2020, 7, 1, 18, 45, 12)  # UTC, the time in the name
    epsg: int = 32610
    left: float = 600000.0  # easting and northing of the upper-left corner, metres
    top: float = 4100040.0
    sensor: str = "L30"  # or `S30`
    user_defined: bool = False  # the same CRS without an EPSG code
    scale: str = "file"  # where the scale 0.0001 stands: `file` tags, the `band`'s own scale, or `both`
    joined: bool = False  # two scenes of one pass in one granule: tags hold two values, "a; b"
    processed: datetime | None = None  # HLS_PROCESSING_TIME; two days after the pass where None

    @property
    def granule(self) -> str:
        """The granule's name, for example `HLS.L30.T10SFF.2020183T184512.v2.0`."""
        return f"HLS.{self.sensor}.T{self.tile}.{self.time:%Y%jT%H%M%S}.v2.0"

    @property
    def crs(self) -> CRS:
        """The CRS in the form that the files carry."""
        if not self.user_defined:
            return CRS.from_epsg(self.epsg)
        zone, south = self.epsg % 100, self.epsg // 100 == 327
        fields = {"zone": zone, "side": "South" if south else "North", "meridian": 6 * zone - 183}
        return CRS.from_wkt(_USER_DEFINED_UTM.format(**fields, northing=10000000 if south else 0))

    @property
    def processing_time(self) -> datetime:
        """When HLS made the granule."""
        return self.processed or self.time + timedelta(days=2)


def _file_tags(overpass: Overpass, shape: tuple[int, ...], fill: int) -> dict[str, str]:
    return (_s30_tags if overpass.sensor == "S30" else _l30_tags)(overpass) | {
        "arop_ave_xshift(meters)": "0",
        "arop_ave_yshift(meters)": "0",
        "cloud_coverage": "0",
        "HLS_PROCESSING_TIME": overpass.processing_time.strftime(STAMP),
        "MEAN_SUN_AZIMUTH_ANGLE": f"{SUN.azimuth:.6f}",
        "MEAN_SUN_ZENITH_ANGLE": f"{SUN.zenith:.6f}",
        "MEAN_VIEW_AZIMUTH_ANGLE": "100.000000",
        "MEAN_VIEW_ZENITH_ANGLE": "3.000000",
        "NBAR_SOLAR_ZENITH": f"{SUN.zenith:.6f}",
        "NCOLS": str(shape[1]),
        "NROWS": str(shape[0]),
        "OVR_RESAMPLING_ALG": "NEAREST",
        "spatial_coverage": "100",
        "SPATIAL_RESOLUTION": "30",
        "ULX": f"{overpass.left:.0f}",
        "ULY": f"{overpass.top:.0f}",
        "_FillValue": str(fill),
    }


def _l30_tags(overpass: Overpass) -> dict[str, str]:
    processed = overpass.time + timedelta(days=1)
    twice = [0, 24] if overpass.joined else [0]  # Landsat needs 24 s from one scene to the next

    def each(text: str) -> str:
        return "; ".join([text] * len(twice))

    times = [overpass.time + timedelta(seconds=seconds) for seconds in twice]
    return {
        "ACCODE": each("Lasrc"),
        "HORIZONTAL_CS_NAME": each(f"UTM, WGS84, UTM ZONE {overpass.epsg % 100}"),
        "L1_PROCESSING_TIME": each(processed.strftime(STAMP)),
        "LANDSAT_PRODUCT_ID": "; ".join(
            f"LC08_L1TP_0430{34 + i:02d}_{overpass.time:%Y%m%d}_{processed:%Y%m%d}_02_T1" for i in range(len(twice))
        ),
        "LANDSAT_SCENE_ID": "; ".join(f"LC80430{34 + i:02d}{overpass.time:%Y%j}LGN00" for i in range(len(twice))),
        "PROCESSING_LEVEL": each("L1TP"),
        "SENSING_TIME": "; ".join(time.strftime("%Y-%m-%dT%H:%M:%S.0000000Z") for time in times),
        "SENSOR": each("OLI_TIRS"),
        "SENTINEL2_TILEID": overpass.tile,
        "USGS_SOFTWARE": "LPGS_15.3.1c",
    }


def _s30_tags(overpass: Overpass) -> dict[str, str]:
    zone, south = overpass.epsg % 100, overpass.epsg // 100 == 327
    sensed = overpass.time + timedelta(seconds=923.25)  # the name holds the start of the data take, not this
    start = f"{overpass.time:%Y%m%dT%H%M%S}"
    return {
        "ACCODE": "LaSRC",
        "HORIZONTAL_CS_CODE": f"EPSG:{overpass.epsg}",
        "HORIZONTAL_CS_NAME": f"WGS84 / UTM zone {zone}{'S' if south else 'N'}",
        "L1_PROCESSING_TIME": (overpass.time + timedelta(hours=4)).strftime(STAMP),
        "PRODUCT_URI": f"S2A_MSIL1C_{start}_N0209_R070_T{overpass.tile}_{start}.SAFE",
        "PROCESSING_BASELINE": "02.09",
        "SENSING_TIME": f"{sensed:%Y-%m-%dT%H:%M:%S.%f}Z",
        "SPACECRAFT_NAME": "Sentinel-2A",
        "TILE_ID": f"S2A_OPER_MSI_L1C_TL_EPAE_{start}_A026000_T{overpass.tile}_N02.09",
    }


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
    land = make_landscape(shape, seed)
    return write_granule(out, digital_numbers(land, seed=seed), fmask(land), Overpass())


def write_granule(
    out: Path,
    image: NDArray[np.int16],
    quality: NDArray[np.uint8],
    overpass: Overpass,
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
    final = out / overpass.granule
    partial = out / f".{overpass.granule}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for index, band in enumerate(BANDS):
            number = band.s30 if overpass.sensor == "S30" else band.l30
            _write_band(partial, number, image[..., index], overpass, band.description)
        for number, values in (others or {}).items():
            _write_band(partial, number, values, overpass, number)
        tags = {"Fmask bit description": FMASK_BITS}
        _write_cog(partial / f"{overpass.granule}.Fmask.tif", quality, FMASK_FILL, overpass, tags)
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_band(folder: Path, number: str, values: NDArray[np.int16], overpass: Overpass, long_name: str) -> None:
    tags = {"long_name": long_name}
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
    """Write one band as HLS does: `data/raster/cog.py` writes other options, overviews and tags, thus other bytes."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            height=values.shape[0],
            width=values.shape[1],
            count=1,
            dtype=values.dtype.name,
            crs=overpass.crs,
            transform=rasterio.Affine(PIXEL_M, 0, overpass.left, 0, -PIXEL_M, overpass.top),
            nodata=fill,
        ) as dst:
            dst.write(values, 1)
            dst.update_tags(**_file_tags(overpass, values.shape, fill), **tags)
            if description is not None:
                dst.set_band_description(1, description)
            if scale is not None:
                dst.scales = (scale,)
        # The layout of the real files: 256-pixel blocks, deflate with differences, overviews by nearest neighbour.
        layout = {"blocksize": 256, "compress": "DEFLATE", "predictor": "STANDARD", "overview_resampling": "NEAREST"}
        copy(memory.name, path, driver="COG", **layout)
