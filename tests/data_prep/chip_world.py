"""Small folders of prepared data for tests: composites, labels and shots, written with rasterio alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from affine import Affine

BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2", "CLEAR_COUNT")
SEASON = "2020-06-01/2020-09-16"
SIZE = 16  # pixels along a chip's side in these tests


def ramp(height: int, width: int) -> np.ndarray:
    """(7, height, width) int16 in which band, row and column can be read off each value."""
    rows, cols = np.mgrid[:height, :width]
    return np.stack([(band + 1) * 1500 + 20 * rows + cols for band in range(7)]).astype(np.int16)


def write_tif(path: Path, values: np.ndarray, crs, transform: Affine, *, nodata, names=None, tags=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    options = {"crs": crs, "transform": transform, "nodata": nodata, "dtype": values.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **options) as dst:
        dst.write(values)
        if names:
            dst.descriptions = names
        dst.update_tags(**(tags or {}))
    return path


def write_tile(
    root: Path,
    tile: str,
    *,
    crs="EPSG:32610",
    origin=(600000.0, 4200000.0),
    image: np.ndarray,
    shots: list[tuple[int, int, int, float]],
    season: str = SEASON,
    tags=None,
    with_sigma: bool = False,
) -> tuple[Path, Path, Path]:
    """A composite, its labels and their shots (number, row, col, agbd) -> the three paths."""
    transform = Affine(30, 0, origin[0], 0, -30, origin[1])
    stem = f"{tile}_{season.replace('/', '_')}"
    tags = {"TILE": tile, "SEASON": season, "SENSORS": "L30"} if tags is None else tags
    composite = write_tif(
        root / "composites" / tile / f"{stem}.tif", image, crs, transform, nodata=-9999, names=BANDS, tags=tags
    )
    label = np.full(image.shape[1:], -1, np.float32)
    for row, col in {(row, col) for _, row, col, _ in shots}:
        label[row, col] = np.mean([agbd for _, r, c, agbd in shots if (r, c) == (row, col)])
    layers, names = np.stack([label, sigma_of(label)]), ("agbd", "agbd_sigma")
    if not with_sigma:
        layers, names = layers[:1], names[:1]
    labels = write_tif(root / "labels" / tile / f"{stem}_agbd.tif", layers, crs, transform, nodata=-1, names=names)
    columns = zip(*shots, strict=True) if shots else ((),) * 4
    types = (pa.uint64(), pa.int32(), pa.int32(), pa.float32())
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    table = labels.with_suffix(".parquet")
    pq.write_table(pa.table(arrays, names=["shot_number", "row", "col", "agbd"]), table)
    return composite, labels, table


def sigma_of(label):
    """The errors of a made-up label raster: an eighth of each label, none of labels below 8."""
    return np.where(label >= 8, label / 8, -1).astype(np.float32)


def scattered(
    height: int, width: int, count: int, *, seed: int, first: int = 2**63
) -> list[tuple[int, int, int, float]]:
    """Shots at `count` different pixels, numbers too large for float64."""
    rng = np.random.default_rng(seed)
    places = rng.choice(height * width, count, replace=False)
    agbd = rng.uniform(0, 400, count).astype(np.float32)
    return [
        (first + i, int(p // width), int(p % width), float(a))
        for i, (p, a) in enumerate(zip(places, agbd, strict=True))
    ]
