"""Any file that holds an image gives the map of that image, or a refusal that names the cause and a cure that works.

Files are drawn over type, encoding, no-data, mask, pixel size, band names, order, CRS, layout and blocks. The expected
map is computed here from the image. `python -m tests.prediction.test_maps_of_any_file 1000 2000` tries those seeds.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.enums import ColorInterp

from biomass_jax.data.bands import BAND_NAMES, BANDS
from biomass_jax.data.raster.encoding import SCALES
from biomass_jax.errors import RasterError
from biomass_jax.prediction.predictor import Predictor
from tests.prediction.stubs import stub_bundle

HEIGHT, WIDTH = 61, 83
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)  # every band counts, and no two alike
NAMES = {
    "ours": BAND_NAMES,
    "common": ("blue", "green", "red", "nir08", "swir16", "swir22"),
    "HLS": tuple(band.description for band in BANDS),
    "L30": tuple(band.l30 for band in BANDS),
    "S30": tuple(band.s30 for band in BANDS),
    "Landsat": tuple(f"SR_B{number}" for number in range(2, 8)),
    "nir": ("Blue", "Green", "Red", "NIR", "SWIR1", "SWIR2"),  # asks
    "none": (None,) * 6,  # asks
}
PLACES = {  # CRS and pixels of 30 m on the ground, as rows and columns
    "north": ("EPSG:32610", Affine(30, 0, 600000, 0, -30, 4100000)),
    "south": ("EPSG:32733", Affine(30, 0, 600000, 0, -30, 7200000)),
    "feet": ("EPSG:2227", Affine(98.425, 0, 6000000, 0, -98.425, 2100000)),
    "degrees": ("EPSG:4326", Affine(0.00034, 0, -120, 0, -0.00027, 37)),
    "nowhere": (None, Affine(30, 0, 0, 0, -30, 0)),
}
TYPES = {"reflectance": ["float32", "float64"], "percent": ["float32", "float64"]}
WHOLE = ["int32", "uint16", "uint32", "float32", "float64"]


def weighted(variables, x):
    """A model that is a weighted sum of the bands."""
    return (x * WEIGHTS).sum(-1) * variables["scale"]


@dataclass
class Drawn:
    """A file, the map of what it holds, and how it has to be asked for."""

    path: Path
    expected: np.ndarray
    tolerance: float
    options: dict[str, Any] = field(default_factory=dict)
    refusals: list[tuple[str, str]] = field(default_factory=list)  # (option left out, what the refusal says)


def draw(rng: np.random.Generator, folder: Path) -> Drawn:
    """A file in a folder."""

    def one(choices):
        return choices[int(rng.integers(len(choices)))]

    encoding = one([*SCALES, "digital_numbers"])
    whole = ["int16", *WHOLE] if encoding == "digital_numbers" else WHOLE
    dtype = np.dtype(one(TYPES.get(encoding, whole)))
    layout = one(["file", "file", "file", "vrt", "folder"])
    names, place = one(list(NAMES)), one(list(PLACES))
    drawn = Drawn(folder / "image.tif", np.empty(0), 0.0)
    image = rng.integers(150, 6000, (HEIGHT, WIDTH, 6)).astype(np.float64)
    missing = np.zeros((HEIGHT, WIDTH), bool)
    missing[5:9, 20:31] = True
    stored, tags = _stored(rng, image, missing, encoding, dtype, layout)
    scale = SCALES[encoding][0]
    drawn.tolerance = float(WEIGHTS.sum()) * ((0 if encoding in TYPES else scale / 1e-4 / 2) + 0.02)

    hidden = one([np.zeros((HEIGHT, WIDTH), bool), rng.random((HEIGHT, WIDTH)) < 0.2])
    sums = (image * WEIGHTS).sum(-1).astype(np.float32)
    drawn.expected = np.where(missing | hidden, np.float32(-1), sums)

    crs, transform = PLACES[place]
    finer = one([1, 1, 1, 3]) if place == "north" else 1
    if finer > 1:
        stored, hidden = (np.repeat(np.repeat(a, finer, 0), finer, 1) for a in (stored, hidden))
        transform = Affine(30 / finer, 0, transform.c, 0, -30 / finer, transform.f)
        drawn.options["resample"] = 30
        drawn.refusals.append(("resample", "pixels are 10 x 10 m .* resample=30"))

    told = one(["header", "tags", "asked"]) if encoding != "digital_numbers" else one(["header", "tags", "no"])
    if told == "asked" or encoding == "reflectance":  # scale 1 and offset 0 are what files without any have
        told = "no"
        drawn.options["encoding"] = encoding
        if encoding != "sentinel2_offset":  # nobody can tell
            drawn.refusals.append(("encoding", f"probably .* encoding='{encoding}'"))
    elif encoding != "digital_numbers":
        drawn.options["encoding"] = "from_file"
        drawn.refusals.append(("encoding", "has scale .* encoding='from_file'"))

    told_pair = SCALES[encoding] if told != "no" else None
    where = {"crs": crs, "transform": transform, "dtype": dtype.name}
    return _lay_out(
        rng, drawn, stored, tags, hidden, where, {"told": told_pair, "in_tags": told == "tags"}, layout, names
    )


def _lay_out(rng, drawn, stored, tags, hidden, where, how, layout, names) -> Drawn:
    """Write the file in an order and layout, its bands called as `names` says."""
    folder = drawn.path.parent

    def one(choices):
        return choices[int(rng.integers(len(choices)))]

    order = [int(i) for i in rng.permutation(6)]
    labels: list[str | None] = [NAMES[names][i] for i in order]
    listed: list[str | None] = [BAND_NAMES[i] for i in order]
    if layout == "folder" and names == "none":
        labels = [NAMES["common"][i] for i in order]
    elif names in ("nir", "none"):
        drawn.options["bands"] = tuple(listed)
        asks = "may be the broad near infrared" if names == "nir" else "no band description"
        drawn.refusals.append(("bands", asks))
    profile = {
        "driver": "GTiff",
        "height": stored.shape[0],
        "width": stored.shape[1],
        "interleave": one(["pixel", "band"]),
        "compress": one([None, "deflate", "lzw"]),
        **one([{}, {"tiled": True, "blockxsize": 32, "blockysize": 16}]),
        **where,
    }
    how |= {
        "name_in": one(["description", "description", "band", "file", "around"]),
        "mask": one(["internal", "side-car", "alpha"]) if hidden.any() else None,
        "sensor": {"S30": "S30", "L30": "OLI_TIRS"}.get(names) if rng.random() < 0.5 else None,
    }
    bands = [stored[..., i] for i in order]
    if layout == "folder":
        drawn.path = folder / "scene"
        drawn.path.mkdir()
        for k, (label, band) in enumerate(zip(labels, bands, strict=True)):
            mask = hidden if k == 2 or how["mask"] != "alpha" else np.zeros_like(hidden)
            each = how | {"name_in": None, "mask": "side-car" if how["mask"] == "alpha" else how["mask"]}
            _write(drawn.path / f"a_{label}.tif", [band], [None], [tags[order[k]]], mask, profile, each)
        if "bands" in drawn.options:  # of files in the order of their names
            drawn.options["bands"] = tuple(name for _, name in sorted(zip(labels, listed, strict=True)))
        return drawn
    if rng.random() < 0.5:  # a band that isn't wanted
        at = int(rng.integers(7))
        bands.insert(at, np.full_like(bands[0], 7))
        labels.insert(at, None if names == "none" else "Fmask")
        if "bands" in drawn.options:
            drawn.options["bands"] = (*drawn.options["bands"][:at], None, *drawn.options["bands"][at:])
    if how["mask"] == "alpha" and "bands" in drawn.options:
        drawn.options["bands"] = (*drawn.options["bands"], None)
    _write(drawn.path, bands, labels, [tags[0]], hidden, profile, how)
    if layout == "vrt":
        rasterio.shutil.copy(drawn.path, folder / "image.vrt", driver="VRT")
        drawn.path = folder / "image.vrt"
    return drawn


def _stored(rng, image, missing, encoding, dtype, layout) -> tuple[np.ndarray, list[float | None]]:
    """The image in an encoding with one kind of no-data, and the no-data tag of each band."""
    scale, offset = SCALES[encoding]
    values = (image / 1e4 - offset) / scale
    kinds: list[tuple[float, float | None]] = [(0, None), (0, 0)]  # (what is stored, its tag)
    if dtype.kind == "f":
        kinds += [(np.nan, None), (np.nan, np.nan), (np.inf, None), (-9999, None), (-9999, -9999), (-3.4e38, -3.4e38)]
    elif dtype.kind == "i":
        kinds += [(-9999, None), (-9999, -9999), (-32000, -32000)]
    else:
        kinds += [(2 ** (8 * dtype.itemsize) - 9999, None), (65535, 65535)]
    stored = (values if encoding in TYPES else np.rint(values)).astype(dtype)
    kind = kinds[int(rng.integers(len(kinds)))]
    tags = []
    for index in range(6):
        if layout == "folder" and kind[1] is not None and index % 2:  # another tag in each file
            kind = kinds[int(rng.choice([i for i, (_, tag) in enumerate(kinds) if tag is not None]))]
        stored[missing, index] = np.float32(kind[0]) if dtype.kind == "f" else kind[0]
        tags.append(float(np.float32(kind[1])) if kind[1] is not None and dtype.kind == "f" else kind[1])
    return stored, tags


def _write(path, bands, labels, nodata, hidden, profile, how) -> None:
    alpha = how["mask"] == "alpha"
    count = len(bands) + alpha
    with rasterio.open(path, "w", **profile, count=count, nodata=nodata[0]) as file:
        if alpha:  # before the pixels: GDAL drops it afterwards
            file.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (len(bands) - 1), ColorInterp.alpha]
            file.write(np.where(hidden, 0, 255).astype(profile["dtype"]), count)
        for index, band in enumerate(bands, 1):
            file.write(band, index)
        named = any(labels)
        for index, label in enumerate(labels, 1):
            if label and how["name_in"] in ("description", "around"):
                file.set_band_description(index, f"2020_{label}_mean" if how["name_in"] == "around" else label)
            elif label and how["name_in"] == "band":
                file.update_tags(index, long_name=label)
        if named and how["name_in"] == "file":
            file.update_tags(band_names=str([*labels, *["alpha"] * alpha]))
        if how["sensor"]:
            file.update_tags(SENSOR=how["sensor"])
        if how["told"] and how["in_tags"]:
            file.update_tags(scale_factor=how["told"][0], add_offset=how["told"][1])
        elif how["told"]:
            file.scales, file.offsets = ([number] * count for number in how["told"])
    if how["mask"] in ("internal", "side-car"):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=how["mask"] == "internal"), rasterio.open(path, "r+") as file:
            file.write_mask(~hidden)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(stub_bundle(), model_fn=weighted)


def check(predictor: Predictor, seed: int, folder: Path) -> None:
    drawn = draw(np.random.default_rng(seed), folder)
    for number, (option, message) in enumerate(drawn.refusals):
        without = {key: value for key, value in drawn.options.items() if key != option}
        with pytest.raises(RasterError, match=message):
            predictor.predict_file(drawn.path, folder / f"refused{number}", **without)
        assert not list(folder.glob(f"refused{number}/*"))
    result = predictor.predict_file(drawn.path, folder / "out", **drawn.options)
    with rasterio.open(result.path) as file:
        found = file.read(1)
    assert found.shape == drawn.expected.shape
    np.testing.assert_array_equal(found == -1, drawn.expected == -1)
    np.testing.assert_allclose(found, drawn.expected, atol=drawn.tolerance)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("seed", range(30))
def test_a_map_is_that_of_the_image_however_the_file_holds_it(predictor, tmp_path, seed):
    check(predictor, seed, tmp_path)


if __name__ == "__main__":
    one_for_all = Predictor(stub_bundle(), model_fn=weighted)
    for tried in range(*map(int, sys.argv[1:3])):
        with tempfile.TemporaryDirectory() as made:
            try:
                check(one_for_all, tried, Path(made))
            except (Exception, pytest.fail.Exception) as error:
                print(f"seed {tried}: {type(error).__name__}: {str(error).strip()[:600]}", flush=True)
