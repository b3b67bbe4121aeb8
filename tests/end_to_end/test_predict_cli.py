"""Maps from the command line, from Python and by hand: the same numbers on the input's grid."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import rasterio

import biomass_jax
from biomass_jax import bundle as bundles
from biomass_jax.data.bands import BAND_NAMES
from tests.prediction.stubs import coded_image, random_bundle, read_map, write_raster

pytestmark = pytest.mark.slow  # many, of a second and more each

CHIP_BANDS = "(None,'BLUE','GREEN','RED','NIR_NARROW','SWIR_1','SWIR_2',None,None,None)"


def program(root, workdir, *fields, **environment):
    command = [sys.executable, "-m", "biomass_jax.main", "--config", "configs/predict.py", "--workdir", str(workdir)]
    done = subprocess.run(
        [*command, *fields], cwd=root, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("bundle") / "small")


def close(ours, expected):
    assert np.abs(ours - expected).max() / np.abs(expected).max() <= 1e-5


def three_ways_agree(root, samples, workdir, model):
    """The real chip through the command line, the API, and a plain forward pass written out here."""
    source = samples / "chip_input.tif"
    status, said = program(
        root, workdir, f"--config.bundle={model}", f"--config.inputs={source}", f"--config.bands={CHIP_BANDS}"
    )
    assert status == 0, said
    with rasterio.open(source) as file, rasterio.open(workdir / "chip_input_agbd.tif") as made:
        image = np.moveaxis(file.read([2, 3, 4, 5, 6, 7]), 0, -1)
        assert (made.crs, made.transform, made.shape) == (file.crs, file.transform, file.shape)
        mapped = made.read(1)
    missing = (image == 0).all(-1)
    assert missing.sum() == 79
    assert (mapped[missing] == -1).all()
    assert (mapped[~missing] >= 0).all()
    assert mapped[~missing].std() > 0.1

    predictor = biomass_jax.load(model)
    close(predictor.predict_array(image), mapped)

    opened = bundles.load(model)
    scored = (np.where(missing[..., None], 0, image).astype(np.float32) - opened.means) / opened.stds
    with jax.default_matmul_precision("highest"):
        plain = np.asarray(jax.jit(opened.module().apply)(opened.variables, scored[None]))[0]
    close(mapped[~missing], plain[~missing])
    close(predictor.predict_array(image, mask_nodata=False), plain)


def test_real_chip_three_ways(root, samples, small, tmp_path):
    three_ways_agree(root, samples, tmp_path, small)


@pytest.mark.long
def test_real_chip_three_ways_with_the_full_swin_b(root, samples, tmp_path):
    model = random_bundle(tmp_path / "bundle", embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
    three_ways_agree(root, samples, tmp_path / "out", model)


def test_a_folder_with_pictures_and_one_bad_file(root, small, tmp_path):
    folder, workdir = tmp_path / "in", tmp_path / "run" / "out"
    image = coded_image(120, 90)
    write_raster(folder / "a" / "scene.tif", image)
    write_raster(folder / "other.tif", coded_image(40, 50, np.float32))
    write_raster(folder / "bad.tif", np.ones((20, 20, 3), np.int16), named=False)
    fields = (f"--config.bundle={small}", f"--config.inputs={folder}", "--config.quicklook=true", "--config.tile=64")
    status, said = program(root, workdir, *fields, "--config.stride=40")
    assert status == 1
    assert "1 of 3 inputs failed:" in said
    assert "bad.tif" in said.splitlines()[-1]
    assert "3 bands" in said.splitlines()[-1]
    assert "Traceback" not in said
    maps = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*.*"))
    assert maps == ["a/scene_agbd.tif", "a/scene_agbd_quicklook.png", "config.json", "other_agbd.tif",
                    "other_agbd_quicklook.png"]  # fmt: skip
    (folder / "bad.tif").unlink()
    status, said = program(root, workdir, *fields, "--config.stride=40")
    assert (status, "0 maps written in 0 s, 2 finished before" in said) == (0, True)
    assert json.loads((workdir / "config.json").read_text())["stride"] == 40
    # the same tiles by hand: one plain forward each, at the API
    predictor = biomass_jax.load(small, tile=64, stride=40)
    np.testing.assert_allclose(
        read_map(predictor.predict_file(folder / "a" / "scene.tif", tmp_path / "api")),
        read_map(workdir / "a" / "scene_agbd.tif"),
        rtol=1e-5,
    )
    middle = predictor.predict_array(np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="reflect")[:64, :64])
    # the first tile's pixels that no other tile reaches
    np.testing.assert_allclose(read_map(workdir / "a" / "scene_agbd.tif")[:32, :32], middle[8:40, 8:40], rtol=1e-5)


@pytest.mark.slow
def test_compiled_programs_are_kept_beside_the_workdir(root, small, tmp_path):
    write_raster(tmp_path / "scene.tif", coded_image(20, 30))
    fields = (f"--config.bundle={small}", f"--config.inputs={tmp_path / 'scene.tif'}")
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "given")
    assert program(root, tmp_path / "runs" / "a", *fields, **environment)[0] == 0
    assert any((tmp_path / "given").iterdir())
    assert not (tmp_path / "runs" / ".jax_cache").exists()
    del environment["JAX_COMPILATION_CACHE_DIR"]
    kept = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    try:
        assert program(root, tmp_path / "runs" / "b", *fields, **environment)[0] == 0
    finally:
        if kept is not None:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = kept
    assert any((tmp_path / "runs" / ".jax_cache").iterdir())


def test_bands_of_the_map_follow_the_bundle_and_not_the_file(small, tmp_path):
    """Bands in another order in the file give the same map."""
    image = coded_image(30, 40)
    image[..., :3] += np.arange(3, dtype=np.int16) * 100
    plain = write_raster(tmp_path / "plain.tif", image)
    order = [5, 3, 1, 0, 4, 2]
    mixed = write_raster(tmp_path / "mixed.tif", image[..., order], named=False)
    predictor = biomass_jax.load(small)
    first = read_map(predictor.predict_file(plain, tmp_path))
    second = read_map(predictor.predict_file(mixed, tmp_path, bands=[BAND_NAMES[i] for i in order]))
    np.testing.assert_array_equal(first, second)
