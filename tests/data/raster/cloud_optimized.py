"""Whether a raster is a Cloud-Optimized GeoTIFF: what `rio cogeo validate` and GDAL's own script look at."""

import importlib.util
from pathlib import Path

import rasterio


def faults(path):
    """Sentences on what is wrong; those of rio-cogeo too, where it is installed."""
    found = []
    head = Path(path).read_bytes()[:400]
    with rasterio.open(path) as image:
        sizes = [(image.height, image.width)]
        factors = image.overviews(1)
        levels = [None, *range(len(factors))]
        directories = [int(image.get_tag_item("IFD_OFFSET", "TIFF", bidx=1, ovr=level)) for level in levels]
        if image.driver != "GTiff" or len(image.files) != 1:
            found.append(f"{image.driver}, made of {image.files}")
    if b"LAYOUT=IFDS_BEFORE_DATA" not in head or b"KNOWN_INCOMPATIBLE_EDITION=YES" in head:
        found.append("not as GDAL's COG driver left it")
    if directories[0] > len(head) or directories != sorted(directories):
        found.append(f"directories at {directories}, expected the full image's first and early")
    blocks = []
    for level in levels:
        with rasterio.open(path, **({} if level is None else {"overview_level": level})) as image:
            sizes.append((image.height, image.width))
            height, width = image.block_shapes[0]
            height, width = image.block_shapes[0]
            if max(image.shape) > 512 and width == image.width:
                found.append(f"{image.shape} is not tiled")
            places = [(x, y) for y in range(-(-image.height // height)) for x in range(-(-image.width // width))]
        with rasterio.open(path) as image:
            told = [image.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=1, ovr=level) for x, y in places]
        blocks.append([int(offset) for offset in told if offset is not None])
    if max(sizes[0]) > 512 and (not factors or max(sizes[-1]) > 512):
        found.append(f"overviews {factors}, expected some down to 512 pixels")
    if factors != sorted(factors):
        found.append(f"overviews {factors}, expected them from fine to coarse")
    for finer, coarser in zip(blocks, blocks[1:], strict=False):
        if min(finer) < max(coarser):
            found.append("blocks of a finer image lie before those of a coarser one")
    if min(map(min, blocks)) < max(directories):
        found.append("blocks lie before a directory")
    if importlib.util.find_spec("rio_cogeo"):
        from rio_cogeo import cog_validate

        valid, errors, warnings = cog_validate(path, strict=True)
        found += [*errors, *warnings, *([] if valid else ["rio-cogeo says no"])]
    return found
