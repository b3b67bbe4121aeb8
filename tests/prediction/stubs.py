"""A bundle without a model, and rasters whose pixels are known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import rasterio
from affine import Affine

from biomass_jax.data.bands import BAND_NAMES

NIR = BAND_NAMES.index("NIR_NARROW")


def stub_bundle(means=0.0, stds=1.0, sha="f" * 64, nodata=-1.0):
    """What the predictor needs of a bundle; the default statistics leave digital numbers as they are."""
    statistics = {"means": np.full(6, means, np.float32), "stds": np.full(6, stds, np.float32)}
    return SimpleNamespace(
        path=Path("stub"),
        task="biomass",
        meta={
            "input": {"sensors": ["L30"]},
            "output": {"bands": ["agbd"], "units": "Mg ha-1", "nodata": nodata},
        },
        bands=BAND_NAMES,
        fill=-9999,
        nodata=nodata,
        weights_sha256=sha,
        variables={"scale": np.float32(1)},
        **statistics,
    )


def nir(variables, x):
    """The model that returns NIR_NARROW unchanged."""
    return x[..., NIR] * variables["scale"]


def write_raster(path: Path, image: np.ndarray, *, nodata=-9999, crs="EPSG:32610", named=True) -> Path:
    """A tiled GeoTIFF of (H, W, bands), bands described by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = image.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=count,
        dtype=image.dtype,
        nodata=nodata,
        crs=crs,
        transform=Affine(30, 0, 600000, 0, -30, 4100000),
    ) as file:
        file.write(np.moveaxis(image, -1, 0))
        if named:
            for index, name in enumerate(BAND_NAMES, 1):
                file.set_band_description(index, name)
    return path


def coded_image(height: int, width: int, dtype=np.int16) -> np.ndarray:
    """Digital numbers whose NIR tells each pixel's place (neighbours differ) and whose other bands are not 0."""
    image = np.full((height, width, 6), 500, dtype)
    image[..., NIR] = (np.arange(height)[:, None] * 131 + np.arange(width)[None] * 17) % 20011 + 1
    return image


def read_map(path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)
