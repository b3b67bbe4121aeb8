"""A map of a GeoTIFF by an ONNX model of `biomass-jax export`, with NumPy, onnxruntime and rasterio alone.

    python3 onnx_map.py granite.onnx scene.tif scene_agbd.tif

Tiles overlap, and of each the middle is kept: what a model says near a tile's edge knows half of its surroundings.
`biomass-jax predict` blends its tiles instead: its map differs where tiles meet.
"""

import json
import sys
from collections.abc import Iterator

import numpy as np
import onnxruntime
import rasterio
from rasterio.windows import Window

MARGIN = 32  # px that aren't used at the edges of tiles, but at those of the image
AT_ONCE = 4  # tiles


def cuts(length: int, tile: int) -> Iterator[tuple[int, int, int]]:
    """Along one side of an image: where tiles start, and from where to where their pixels are used."""
    start = first = 0
    while start + tile < length:
        stop = start + tile - MARGIN
        yield start, first, stop
        start, first = min(stop - MARGIN, length - tile), stop
    yield start, first, length


def read(source: rasterio.DatasetReader, bands: list[str], start: int, rows: int) -> np.ndarray:
    """Rows of the image, float32 [rows, width, band], NaN where the file has no data."""
    indexes = [source.descriptions.index(name) + 1 for name in bands]
    window = Window(0, start, source.width, min(rows, source.height - start))
    values = source.read(indexes, window=window, masked=True).astype(np.float32).filled(np.nan)
    return np.moveaxis(values, 0, -1)


def main(model: str, image: str, out: str) -> None:
    """Write the map."""
    session = onnxruntime.InferenceSession(model)
    told = json.loads(session.get_modelmeta().custom_metadata_map["export.json"])
    (given,) = session.get_inputs()
    _, height, width, _ = given.shape
    with rasterio.open(image) as source:
        if missing := [name for name in told["input"]["bands"] if name not in source.descriptions]:
            sys.exit(f"{image}: no band is described as {', '.join(missing)}; found {source.descriptions}")
        profile = {"driver": "GTiff", "count": 1, "dtype": "float32", "nodata": told["output"]["nodata"]}
        profile |= {"width": source.width, "height": source.height, "crs": source.crs, "transform": source.transform}
        with rasterio.open(out, "w", **profile, tiled=True, compress="deflate", predictor=3) as target:
            target.set_band_description(1, told["output"]["name"])
            target.update_tags(1, units=told["output"]["units"])
            for top, first, stop in cuts(source.height, height):
                rows = read(source, told["input"]["bands"], top, height)
                # An image smaller than a tile is filled up with what has no data.
                short = ((0, height - len(rows)), (0, max(width - source.width, 0)), (0, 0))
                rows = np.pad(rows, short, constant_values=np.nan)
                across = list(cuts(source.width, width))
                tiles = np.stack([rows[:, left : left + width] for left, _, _ in across])
                parts = [tiles[at : at + AT_ONCE] for at in range(0, len(tiles), AT_ONCE)]
                found = np.concatenate([session.run(None, {given.name: part})[0] for part in parts])
                kept = [
                    one[first - top : stop - top, start - left : end - left]
                    for one, (left, start, end) in zip(found, across, strict=True)
                ]
                target.write(np.concatenate(kept, axis=1), 1, window=Window(0, first, source.width, stop - first))


if __name__ == "__main__":
    main(*sys.argv[1:])
