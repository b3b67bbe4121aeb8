"""Bundles without a model or with a random one, and rasters whose pixels are known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import rasterio
from affine import Affine

from biomass_jax import bundle
from biomass_jax.adapter import Adapter
from biomass_jax.data.bands import BAND_NAMES, UNITS
from biomass_jax.models.build import abstract_variables, build_module
from biomass_jax.models.lora import Lora, is_update
from biomass_jax.trees import flatten, unflatten

NIR = BAND_NAMES.index("NIR_NARROW")


def stub_bundle(means=0.0, stds=1.0, sha="f" * 64, nodata=-1.0):
    """What the predictor needs of a bundle; the default statistics leave digital numbers as they are."""
    statistics = {"means": np.full(6, means, np.float32), "stds": np.full(6, stds, np.float32)}
    return SimpleNamespace(
        path=Path("stub"),
        task="biomass",
        meta={"input": {"sensors": ["L30"]}, "output": {"bands": ["agbd"], "units": "Mg ha-1", "nodata": nodata}},
        bands=BAND_NAMES,
        fill=-9999,
        pixel_size=30.0,
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


def random_bundle(path: Path, *, seed: int = 0, **architecture) -> Path:
    """A real bundle with seeded random weights; the smallest architecture unless told otherwise."""
    small = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 8}
    architecture = architecture or small
    rng = np.random.default_rng(seed)

    def values(tree, name=""):
        if isinstance(tree, dict):
            return {key: values(branch, f"{name}/{key}") for key, branch in tree.items()}
        if name.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, tree.shape).astype(np.float32)
        if name.endswith("final/bias"):
            return np.full(tree.shape, 100, np.float32)  # above the final ReLU
        size = 1 / np.sqrt(np.prod(tree.shape[:-1])) if name.endswith("kernel") else 0.1
        return rng.normal(0, 10 * size if "final" in name else size, tree.shape).astype(np.float32)

    module = build_module("biomass", architecture)
    statistics = {
        "means": [547.36707, 898.5121, 1020.9082, 2665.5352, 2340.584, 1610.1407],
        "stds": [411.4701, 558.54065, 815.94025, 812.4403, 1113.7145, 1067.641],
    }
    return bundle.save(
        path,
        values(abstract_variables(module)),
        task="biomass",
        architecture=architecture,
        input={"bands": list(BAND_NAMES), "units": UNITS, "fill": -9999, "sensors": ["L30"], **statistics},
        output={"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1},
        training={},
        provenance={"source": "random"},
    )


def random_adapter(path: Path, base: Path, *, seed: int = 1, constant: float | None = None, **changes) -> Path:
    """An adapter of a bundle with seeded random updates; `constant` is then all that it predicts.

    `changes` are of what `bundle.save` takes, by the names of its arguments.
    """
    loaded, lora = bundle.load(base), Lora(rank=2, alpha=6.0, targets=("qkv", "fc2"))
    rng = np.random.default_rng(seed)
    module = loaded.module().clone(lora=lora)
    own = {name: leaf for name, leaf in flatten(abstract_variables(module)).items() if is_update(name)}
    drawn = {name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in own.items()}
    flat = {name: np.asarray(leaf) for name, leaf in flatten(loaded.variables).items()}
    if constant is not None:
        kernel = flat["params/head/final/kernel"]
        flat |= {"params/head/final/kernel": 0 * kernel, "params/head/final/bias": np.float32([constant])}
    else:
        flat["params/head/final/bias"] = flat["params/head/final/bias"] + np.float32(7)
    about = {name: loaded.meta[name] for name in ("task", "architecture", "input", "output", "training", "provenance")}
    adapter = Adapter.of(loaded.path, loaded.weights_sha256, loaded.variables, lora)
    return bundle.save(path, unflatten(flat | drawn), **about | changes, adapter=adapter)
