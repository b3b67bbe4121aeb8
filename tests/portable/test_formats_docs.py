"""docs/export.md: its commands and scripts run as they stand, where neither this package is nor the other's needs."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.portable.__main__ import main
from biomass_jax.prediction.predictor import Predictor
from tests.portable.conftest import image
from tests.prediction.stubs import write_raster

# Runs a script as if libraries weren't installed.
WITHOUT = """
import runpy, sys
for name in sys.argv[1].split(","): sys.modules[name] = None
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
JAX_ALONE = "flax,orbax,biomass_jax,onnx,onnxruntime,rasterio,ml_collections"
ONNX_ALONE = "jax,jaxlib,flax,orbax,biomass_jax,onnx,jax2onnx"
SIZE, MARGIN = 96, 32


def run_as_written(root, folder, script, without):
    """A script by the page's own command, in a folder."""
    page = (root / "docs" / "export.md").read_text(encoding="utf-8")
    words = shlex.split(re.search(rf"(?m)^    python3 ({script} .*)$", page)[1])
    shutil.copyfile(root / "docs" / script, folder / script) if (root / "docs" / script).exists() else None
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, without, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return words[1:], done.stdout


def exported(root, folder, form, bundle, monkeypatch, *more):
    """The page's commands for a format, in its order; the files that they made."""
    page = (root / "docs" / "export.md").read_text(encoding="utf-8")
    lines = re.findall(rf"(?m)^    biomass-jax export (.*--format {form} .*)$", page)
    shutil.copytree(bundle, folder / "granite")
    monkeypatch.chdir(folder)
    for line in lines:
        assert main([*shlex.split(line), *more]) == 0
    return [folder / line.split()[-1] for line in lines]


@pytest.mark.slow
def test_the_script_for_jax_alone(tmp_path, root, tiny, needs, monkeypatch):
    """An image that is no multiple of 32, as no-data beyond its edges completes it."""
    needs("flatbuffers")
    exported(root, tmp_path, "stablehlo", tiny, monkeypatch)
    (script,) = re.findall(r"(?s)```python\n(.*?)```", (root / "docs" / "export.md").read_text())
    assert len(script.splitlines()) <= 20
    (tmp_path / "run.py").write_text(script)
    pixels = image(2, 50, 70)
    np.save(tmp_path / "image.npy", pixels)
    (_, _, out), said = run_as_written(root, tmp_path, "run.py", JAX_ALONE)
    whole = np.pad(pixels, ((0, 0), (0, 14), (0, 26), (0, 0)), constant_values=np.nan)
    expected = Predictor.open(tiny).predict_array(whole)[:, :50, :70]
    found = np.load(tmp_path / out)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
    assert said.split()[0] == "agbd" and said.split()[-2] == str((expected != -1).sum())


def pixelwise(path, *, of_place):
    """An ONNX model of tiles of `SIZE` whose answer is the first band, and with `of_place` the place in the tile."""
    from onnx import TensorProto, helper, numpy_helper

    rows, cols = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    place = np.minimum(np.minimum(rows, cols), SIZE - 1 - np.maximum(rows, cols)) * of_place
    nodes = [
        helper.make_node("Slice", ["image", "from", "to", "axis"], ["one"]),
        helper.make_node("Squeeze", ["one", "axis"], ["flat"]),
        helper.make_node("IsNaN", ["flat"], ["gone"]),
        helper.make_node("Mul", ["flat", "keep"], ["kept"]),
        helper.make_node("Add", ["kept", "place"], ["value"]),
        helper.make_node("Where", ["gone", "nodata", "value"], ["agbd"]),
    ]
    numbers = {"from": np.array([0]), "to": np.array([1]), "axis": np.array([3]), "place": place}
    numbers |= {"nodata": np.float32(-1), "keep": np.float32(not of_place)}
    graph = helper.make_graph(
        nodes,
        "stub",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", SIZE, SIZE, 2])],
        [helper.make_tensor_value_info("agbd", TensorProto.FLOAT, ["batch", SIZE, SIZE])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    told = '{"input": {"bands": ["RED", "BLUE"]}, "output": {"name": "agbd", "units": "Mg ha-1", "nodata": -1.0}}'
    helper.set_model_props(model, {"export.json": told})
    path.write_bytes(model.SerializeToString())


def map_of(root, folder, shape, *, of_place):
    """The map and its profile, and the image's red band, of a raster in which a corner has no data."""
    pixelwise(folder / "granite.onnx", of_place=of_place)
    pixels = np.random.default_rng(0).integers(1, 5000, (*shape, len(BAND_NAMES))).astype(np.int16)
    pixels[:3, -2:] = -9999
    write_raster(folder / "scene.tif", pixels)
    (_, _, out), _ = run_as_written(root, folder, "onnx_map.py", ONNX_ALONE)
    with rasterio.open(folder / out) as made, rasterio.open(folder / "scene.tif") as source:
        assert (made.crs, made.transform, made.shape) == (source.crs, source.transform, source.shape)
        assert (made.nodata, made.descriptions, made.dtypes) == (-1, ("agbd",), ("float32",))
        return made.read(1), pixels[..., BAND_NAMES.index("RED")]


@pytest.mark.parametrize("shape", [(200, 310), (40, 96), (97, 31)])
def test_a_map_by_onnxruntime_alone_has_each_pixel_in_its_place(tmp_path, root, needs, shape):
    needs("onnxruntime")
    needs("onnx")
    found, red = map_of(root, tmp_path, shape, of_place=False)
    np.testing.assert_array_equal(found, np.where(red == -9999, -1, red))


def test_a_map_by_onnxruntime_alone_takes_the_middle_of_tiles(tmp_path, root, needs):
    """Each pixel's distance to its tile's edge, which is no less than the margin unless the image ends there."""
    needs("onnxruntime")
    needs("onnx")
    found, red = map_of(root, tmp_path, (200, 310), of_place=True)
    rows, cols = np.mgrid[0:200, 0:310]
    to_edge = np.minimum(np.minimum(rows, 199 - rows), np.minimum(cols, 309 - cols))
    seen = red != -9999
    assert (found[seen] >= np.minimum(MARGIN, to_edge)[seen]).all()


def test_the_margin_is_the_scripts(root, needs):
    needs("onnxruntime")
    spec = importlib.util.spec_from_file_location("onnx_map", root / "docs" / "onnx_map.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.MARGIN == MARGIN
    assert list(script.cuts(96, 96)) == [(0, 0, 96)]
    assert list(script.cuts(200, 96)) == [(0, 0, 64), (32, 64, 96), (64, 96, 128), (96, 128, 160), (104, 160, 200)]


@pytest.mark.slow
def test_a_map_by_an_exported_model_is_the_models(tmp_path, root, tiny, needs, monkeypatch):
    """One tile: no blending, so that it is what the model says of the whole image."""
    needs("jax2onnx")
    whole, smaller = exported(root, tmp_path, "onnx", tiny, monkeypatch, "--size", "64x96", "--overwrite")
    assert smaller.stat().st_size < whole.stat().st_size
    pixels = image(1, 64, 96)[0]
    named = np.concatenate([pixels, pixels[..., :1]], axis=-1)  # a sixth band, which the model doesn't take
    write_raster(tmp_path / "scene.tif", named)
    (_, _, out), _ = run_as_written(root, tmp_path, "onnx_map.py", ONNX_ALONE)
    with rasterio.open(tmp_path / out) as made:
        found = made.read(1)
    expected = Predictor.open(tiny).predict_array(pixels)
    np.testing.assert_array_equal(found == -1, expected == -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)
