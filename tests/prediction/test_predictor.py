"""The predictor around stub models: what goes in, what comes out, at which sizes, on how many devices."""

import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax import bundle as bundles
from biomass_jax.data import bands
from biomass_jax.errors import PredictionError, TilingError
from biomass_jax.pipeline.augment import no_data
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.prediction.tiling import default_plan
from biomass_jax.runtime import cpu
from tests.prediction.stubs import NIR, coded_image, nir, random_bundle, read_map, stub_bundle, write_raster

SIZES = [(223, 223), (224, 224), (225, 225), (500, 437), (460, 700), (223, 300), (30, 500)]
TILINGS = [("default", "cosine"), ("default", "none"), ("reference_0_99", "cosine"), ("reference_1_2", "cosine")]


def edges(length: int) -> list[int]:
    """Pixels at and beside every border of a tile or of its used part."""
    starts = [row.row - 8 for row in default_plan(length, 224, tile=224, stride=192, margin=8, blend="cosine").rows]
    borders = [s + d for s in starts for d in (0, 8, 16, 24, 200, 208, 216, 224)]
    return sorted({p for b in borders for p in (b - 1, b, b + 1) if 0 <= p < length} | {0, length - 1})


@pytest.mark.parametrize(("tiling", "blend"), TILINGS)
@pytest.mark.parametrize("size", SIZES)
def test_a_coordinate_coded_raster_comes_back_at_every_pixel(stub, tmp_path, size, tiling, blend):
    image = coded_image(*size)
    source = write_raster(tmp_path / "scene.tif", image)
    predictor = stub(tiling=tiling, blend=blend)
    if tiling != "default" and (size[0] < 208 or (tiling == "reference_0_99" and min(size) < 224 < max(size))):
        with pytest.raises(TilingError, match="tiling='default'"):
            predictor.predict_file(source, tmp_path)
        return
    result = read_map(predictor.predict_file(source, tmp_path))
    expected = image[..., NIR].astype(np.float32)
    assert result.shape == size
    for row in edges(size[0]):
        np.testing.assert_allclose(result[row], expected[row], rtol=1e-6, err_msg=f"row {row}")
    for column in edges(size[1]):
        np.testing.assert_allclose(result[:, column], expected[:, column], rtol=1e-6, err_msg=f"column {column}")
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_small_rasters_are_one_plain_forward_at_their_own_size(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    shapes = []

    def model(variables, x):
        shapes.append(x.shape)
        return nir(variables, x)

    predictor = stub(model, batch_size=8)
    for height, width in [(224, 224), (30, 200), (1, 1)]:
        predictor.predict_file(write_raster(tmp_path / f"{height}.tif", coded_image(height, width)), tmp_path)
    predictor.predict_file(write_raster(tmp_path / "big.tif", coded_image(225, 30)), tmp_path)
    assert shapes == [(1, 224, 224, 6), (1, 30, 200, 6), (1, 1, 1, 6), (8, 224, 224, 6)]


def test_warm_up_compiles_what_the_first_map_needs(stub, tmp_path):
    shapes = []

    def model(variables, x):
        shapes.append(x.shape)
        return nir(variables, x)

    predictor = stub(model, batch_size=3)
    predictor.warm_up()
    assert shapes == [(3, 224, 224, 6)]
    predictor.predict_file(write_raster(tmp_path / "scene.tif", coded_image(300, 225)), tmp_path)
    assert shapes == [(3, 224, 224, 6)]  # traced once


def test_array_is_one_plain_forward_however_large(stub):
    shapes = []

    def model(variables, x):
        shapes.append(x.shape)
        return nir(variables, x)

    image = coded_image(300, 250)
    result = stub(model).predict_array(image)
    assert shapes == [(1, 300, 250, 6)]
    np.testing.assert_array_equal(result, image[..., NIR])
    batch = np.stack([image, image[::-1]])
    result = stub(model).predict_array(batch)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, batch[..., NIR])


@pytest.mark.parametrize(("count", "seen"), [(3, 3), (4, 4), (6, 6), (8, 4), (12, 4)])
def test_a_cpu_computes_two_images_a_core_at_a_time_where_they_come_out_even(stub, monkeypatch, count, seen):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: set(range(2)), raising=False)
    shapes = []

    def model(variables, x):
        shapes.append(x.shape)
        return nir(variables, x)

    images = np.stack([coded_image(20, 30) + np.int16(number) for number in range(count)])
    np.testing.assert_array_equal(stub(model).predict_array(images), images[..., NIR])
    assert shapes == [(seen, 20, 30, 6)]


def place_dependent(variables, x):
    """Blending shows: the same pixel has another value in each tile."""
    rows, columns = jnp.indices(x.shape[1:3])
    return x[..., NIR] + 0.25 * rows - 0.125 * columns


@pytest.mark.parametrize("tiling", ["default", "reference_0_99", "reference_1_2"])
def test_batch_size_changes_no_bit(stub, tmp_path, tiling):
    source = write_raster(tmp_path / "scene.tif", coded_image(460, 700))
    maps = [
        read_map(stub(place_dependent, batch_size=size, tiling=tiling).predict_file(source, tmp_path / str(size)))
        for size in (1, 3, 8)
    ]
    np.testing.assert_array_equal(maps[1], maps[0])
    np.testing.assert_array_equal(maps[2], maps[0])


def test_batch_size_by_default_suits_the_device(stub):
    assert jax.default_backend() == "cpu" and stub().batch_size == 4
    assert stub(batch_size=7).batch_size == 7


def test_seams_are_smooth(stub, tmp_path):
    """Two tiles that disagree by a constant blend over 16 px: no step between neighbours beyond the ramp's steepest."""
    source = write_raster(tmp_path / "scene.tif", np.full((224, 400, 6), 500, np.int16))

    def model(variables, x):
        return jnp.zeros(x.shape[:3]) + jnp.arange(x.shape[0])[:, None, None] * 100.0

    smooth = read_map(stub(model).predict_file(source, tmp_path / "cosine"))
    plain = read_map(stub(model, blend="none").predict_file(source, tmp_path / "none"))
    steepest = 100 * np.pi / 2 / 17
    assert np.abs(np.diff(smooth, axis=1)).max() <= steepest * 1.01
    assert np.abs(np.diff(plain, axis=1)).max() == pytest.approx(50)


def test_digital_numbers_are_z_scored_and_no_data_is_0_before(stub):
    bundle = stub_bundle()
    bundle.means = np.array([1, 2, 3, 100, 5, 6], np.float32)
    bundle.stds = np.array([1, 1, 1, 50, 1, 1], np.float32)
    image = np.array([[[7, 7, 7, 300, 7, 7], [7, 7, 7, 300, 7, -9999], [0] * 6, [0, 0, 0, 300, 0, 0]]], np.int16)
    predictor = stub(bundle=bundle)
    np.testing.assert_allclose(predictor.predict_array(image, mask_nodata=False), [[4.0, -2.0, -2.0, 4.0]])
    np.testing.assert_allclose(predictor.predict_array(image), [[4.0, -1.0, -1.0, 4.0]])


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("fill", [None, -9999.0, 255.0, -3.4e38, float("nan")])
def test_no_data_on_the_device_is_the_table_rule(dtype, fill):
    rng = np.random.default_rng(0)
    image = rng.choice([0, 0, 1, 255, -9999, 300], (40, 30, 6), p=[0.3, 0.3, 0.1, 0.1, 0.05, 0.15]).astype(dtype)
    image[:4] = 0
    if dtype == np.float32:
        image[5:7, :, 2] = np.nan
        image[7, :15, 2], image[7, 15:, 5] = np.inf, -np.inf
        image[8, :, 3] = -3.4e38
        image[9] = 0.25
    ours = no_data(jnp.asarray(image), jnp.float32(np.nan if fill is None else fill))
    expected = bands.no_data(image, fill)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(ours, expected)


def test_no_data_of_a_file_becomes_minus_1(stub, tmp_path):
    image = coded_image(240, 260)
    image[:3, :5, 2] = 32000  # the file's own fill, in one band only
    image[10:20, 30:40] = 0
    image[50, 60, 0] = -9999
    image[70, 80, 1] = 0  # a single 0 is legal
    result = read_map(stub().predict_file(write_raster(tmp_path / "a.tif", image, nodata=32000), tmp_path))
    expected = image[..., NIR].astype(np.float32)
    expected[:3, :5] = expected[10:20, 30:40] = expected[50, 60] = -1
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("fill", [-9999, 32000])
@pytest.mark.parametrize("side", [200, 250])
def test_no_data_next_to_data_reaches_the_model_as_0(stub, tmp_path, side, fill):
    """A file's raw fill must not leak into its neighbours: the model sees 0 there."""

    def blur(variables, x):
        return x[..., NIR] + jnp.roll(x[..., NIR], 1, axis=2)

    image = np.full((side, side, 6), 1000, np.int16)
    image[100, 100] = fill
    source = write_raster(tmp_path / "a.tif", image, nodata=fill)
    result = read_map(stub(blur).predict_file(source, tmp_path))
    assert result[100, 101] == 1000
    assert result[100, 102] == 2000


def test_one_program_for_files_of_one_type_whatever_their_fill(stub, tmp_path):
    traces = []

    def model(variables, x):
        traces.append(x.shape)
        return nir(variables, x)

    predictor = stub(model, batch_size=8)
    for number, (dtype, nodata) in enumerate([(np.int16, -9999), (np.int16, 7), (np.float32, None), (np.float32, 0)]):
        source = write_raster(tmp_path / f"{number}.tif", coded_image(230 + number, 240, dtype), nodata=nodata)
        predictor.predict_file(source, tmp_path)
    assert len(traces) == 2


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64]
)
def test_arrays_of_every_kind_of_number_agree(stub, dtype):
    image = np.random.default_rng(0).integers(0, 100, (20, 30, 6)).astype(dtype)
    result = stub().predict_array(image)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, image[..., NIR].astype(np.float32))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 5)), "image has shape (4, 4, 5); expected (H, W, 6) or (B, H, W, 6)"),
        (np.zeros((6, 4, 4)), "image has shape (6, 4, 4)"),
        (np.zeros((4, 6)), "image has shape (4, 6)"),
        (np.zeros((0, 4, 6)), "image has shape (0, 4, 6)"),
        (np.zeros((4, 4, 6), bool), "image has dtype bool"),
        (np.zeros((4, 4, 6), complex), "image has dtype complex128"),
        (np.zeros((4, 4, 6), "U3"), "image has dtype <U3"),
    ],
)
def test_arrays_of_another_shape_or_kind_are_refused(stub, image, words):
    with pytest.raises(PredictionError, match=re.escape(words)):
        stub().predict_array(image)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_size": 0}, PredictionError, "batch_size is 0"),
        ({"batch_size": 2.5}, PredictionError, "batch_size is 2.5"),
        ({"stride": 300}, TilingError, "stride 300"),
        ({"dtype": "float16"}, PredictionError, "dtype is 'float16'; expected one of float32, bfloat16"),
        ({"matmul_precision": "best"}, PredictionError, "matmul_precision is 'best'; expected one of default, high"),
    ],
)
def test_wrong_settings_are_refused(stub, settings, error, words):
    with pytest.raises(error, match=words):
        stub(**settings)


def test_a_bundle_without_a_biomass_model_is_refused():
    bundle = stub_bundle()
    bundle.task = "simmim"
    with pytest.raises(PredictionError, match="a bundle of task 'simmim'; maps and scores need one of task 'biomass'"):
        Predictor(bundle)


def test_precision_is_highest_in_float32_and_default_in_bfloat16(stub):
    def model(variables, x):
        return jnp.einsum("bhwc,cd->bhwd", x, jnp.ones((6, 1)))[..., 0]

    def precisions(**settings):
        run = stub(model, **settings).forward._run
        return str(jax.make_jaxpr(run)(({}, {}), jnp.ones((1, 2, 2, 6)), jnp.float32(0)))

    assert "Precision.HIGHEST" in precisions()
    assert "Precision.HIGHEST" not in precisions(matmul_precision="default")
    assert "Precision.HIGHEST" not in precisions(dtype="bfloat16")


def test_bfloat16_is_the_model_in_bfloat16(tmp_path):
    """Weights are cast once and not in each call: the numbers are the module's own."""
    opened = bundles.load(random_bundle(tmp_path / "bundle"))
    image = coded_image(64, 96)
    scores = (image.astype(np.float32) - opened.means) / opened.stds
    expected = jax.jit(opened.module("bfloat16").apply)(opened.variables, scores[None])[0]
    found = Predictor(opened, dtype="bfloat16").predict_array(image)
    exact = Predictor(opened).predict_array(image)
    # Another program, whose sums may be rounded otherwise now and then: far less than bfloat16 itself does.
    assert np.abs(found - expected).max() < 0.1 * np.abs(found - exact).max()


DEVICES = """
import jax, numpy as np
from tests.prediction.stubs import coded_image, stub_bundle, nir
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.runtime import mesh as sharding
assert len(jax.local_devices()) == {devices}
mesh = sharding.create_mesh()
seen = []
predictor = Predictor(stub_bundle(), model_fn=lambda v, x: nir(v, x) * 1.5 + x[..., 0], batch_size=3, stride=160,
    batch_sharding=sharding.batch_sharding(mesh), replicated=sharding.replicated(mesh))
print(predictor.batch_size)
predictor.predict_file({source!r}, {target!r})
np.save({array!r}, predictor.predict_array(coded_image(50, 60)))
"""


@pytest.mark.slow
def test_values_are_the_same_on_1_and_4_devices(tmp_path, monkeypatch, root):
    source = write_raster(tmp_path / "scene.tif", coded_image(460, 500))
    results, arrays, sizes, flags = [], [], [], os.environ["XLA_FLAGS"]
    for devices in (1, 4):
        monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_force_host_platform_device_count={devices}")
        target, array = tmp_path / f"{devices}.tif", tmp_path / f"{devices}.npy"
        code = DEVICES.format(devices=devices, source=str(source), target=str(target), array=str(array))
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sizes.append(int(done.stdout))
        results.append(read_map(target))
        arrays.append(np.load(array))
    assert sizes == [3, 4]  # rounded up to a multiple of the devices
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(arrays[0], arrays[1])


def test_a_notebook_shows_what_a_predictor_is(tmp_path):
    shown = Predictor.open(random_bundle(tmp_path / "<b>"))._repr_html_()
    for text in ("NIR_NARROW", "2665.5", "812.44", "30 m", "Mg ha-1", "random", "stride 192", "&lt;b&gt;"):
        assert text in shown


def test_a_predictor_that_is_sent_to_another_process_says_what_to_do(stub):
    with pytest.raises(PredictionError, match="scheduler='threads'"):
        pickle.dumps(stub())
