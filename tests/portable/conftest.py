"""Bundles with strong random weights, in which no two dimensions are alike."""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from packaging.version import Version

from biomass_jax import bundle
from biomass_jax.data.bands import BAND_NAMES, UNITS
from biomass_jax.models.build import abstract_variables, build_module

ARCHITECTURE = {
    "embed_dim": 12,
    "depths": [2, 1, 2, 2],
    "num_heads": [1, 2, 3, 4],
    "window_size": 5,
    "mlp_ratio": 3.0,
    "in_channels": 5,
    "decoder_channels": 10,
    "output_scale": 30.0,
    "output_offset": 120.0,
}
MEANS, STDS = [500.0, 700.0, 600.0, 3000.0, 2000.0], [200.0, 250.0, 300.0, 900.0, 700.0]


def drawn(module, seed=0):
    """Variables of a module with weights that make every part bear on the output."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, values = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.exp(values * np.float32(0.3)) if name in ("scale", "var") else values * np.float32(0.3)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(module))


def saved(path: Path, *, seed=0, **fields) -> Path:
    """A bundle on disk; `fields` are of its architecture."""
    fields = ARCHITECTURE | fields
    names = list(BAND_NAMES[: fields["in_channels"]])
    source = {"bands": names, "units": UNITS, "fill": -9999, "means": MEANS, "stds": STDS, "sensors": ["L30"]}
    return bundle.save(
        path,
        drawn(build_module("biomass", fields), seed),
        task="biomass",
        architecture=fields,
        input=source,
        output={"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1.0},
        training={},
        provenance={"source": "random"},
    )


def image(*shape: int, seed=0) -> np.ndarray:
    """(B, H, W, 5) float32 digital numbers with pixels of each kind without data, and one that is 0 in one band."""
    rng = np.random.default_rng(seed)
    found = rng.normal(MEANS, STDS, (*shape, 5)).round().clip(1).astype(np.float32)
    found[0, :4, 2:9] = -9999
    found[-1, 20, 30, 2] = -9999
    found[-1, 21, 3] = 0
    found[0, 22, 5, 1] = np.nan
    found[0, 23, 6, 4] = 0
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A bundle that doesn't shift where the map is a single window."""
    return saved(tmp_path_factory.mktemp("portable") / "tiny", shift_single_window=False)


@pytest.fixture
def needs() -> Callable[[str], None]:
    """needs("jax2onnx") skips a test where that library is not installed, or is known not to go with this JAX."""

    def check(library: str) -> None:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed; pip install 'biomass-jax[portable]'")
        if library == "jax2onnx":
            ours, theirs = Version(version("jax")), Version(version("jax2onnx"))
            if (
                ours >= Version("0.12")
                and theirs < Version("0.18")
                or ours >= Version("0.11")
                and theirs < Version("0.17")
            ):
                pytest.skip(f"jax2onnx {theirs} doesn't go with JAX {ours}: docs/export.md")

    return check
