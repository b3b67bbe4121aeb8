"""Files of programs, opened by what others have, against maps of the bundle that they were made from."""

import json
import sys
import zipfile
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.errors import ConvertError
from biomass_jax.portable import formats
from biomass_jax.portable.formats import OPSET, export
from biomass_jax.portable.program import of_bundle
from biomass_jax.prediction.predictor import Predictor
from tests.portable.conftest import image, saved


def opened(path):
    with zipfile.ZipFile(path) as file:
        return jax.export.deserialize(bytearray(file.read("program.jax"))), {
            name: file.read(name).decode() for name in file.namelist() if name.endswith(".json")
        }


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check_against_maps(run, path, shapes, relative):
    predictor = Predictor.open(path)
    for shape in shapes:
        pixels = image(*shape, seed=shape[1])
        expected, found = predictor.predict_array(pixels), np.asarray(run(pixels))
        assert (found.dtype, found.shape) == (np.float32, shape)
        missing = expected == -1
        assert missing.sum() == 4 * 7 + 3
        np.testing.assert_array_equal(found == -1, missing)
        assert expected[~missing].std() > 5  # as far as a map's pixels differ, and not near a constant
        assert np.abs(found - expected).max() <= relative * expected[~missing].std()


@pytest.mark.slow
def test_a_program_for_any_size_gives_what_maps_have(tiny):
    """Windows of 5 tokens: with padding or none in the four stages, and a last stage of a single window or many."""
    program = formats.for_any_size(of_bundle(bundle.load(tiny), form="stablehlo"))
    assert program.platforms == ("cpu", "cuda", "tpu")
    check_against_maps(program.call, tiny, [(1, 64, 160), (3, 96, 32), (1, 160, 320)], 1e-5)
    with pytest.raises(ValueError, match="32"):
        program.call(np.zeros((1, 48, 64, 5), np.float32))
    with pytest.raises(ValueError, match="5"):
        program.call(np.zeros((1, 64, 64, 6), np.float32))


@pytest.mark.slow
def test_a_file_of_stablehlo_tells_all_of_the_bundle(tmp_path, root, tiny, needs):
    needs("flatbuffers")
    lines = export(tiny, tmp_path / "a" / "tiny.zip", form="stablehlo", precision="int8")
    program, texts = opened(tmp_path / "a" / "tiny.zip")
    data = (tmp_path / "a" / "tiny.zip").read_bytes()
    assert b"swin_ops.py" in data and str(root).encode() not in data  # no paths of the machine that wrote it
    assert ("output", "agbd, float32 [batch, height, width]") in lines
    assert str(program.in_avals[0].shape) == "(batch, 32*height, 32*width, 5)"
    assert set(texts) == {"bundle.json", "export.json"}
    assert texts["bundle.json"] == (tiny / "bundle.json").read_text()
    assert json.loads(texts["export.json"])["precision"] == "int8"


@pytest.mark.slow
def test_onnx_of_one_size_gives_what_maps_have(tmp_path, tiny, needs):
    needs("jax2onnx")
    export(tiny, tmp_path / "tiny.onnx", form="onnx", size=(64, 96))
    found = session(tmp_path / "tiny.onnx")
    (source,), (output,) = found.get_inputs(), found.get_outputs()
    assert (source.name, source.type, source.shape[1:]) == ("image", "tensor(float)", [64, 96, 5])
    assert (output.name, output.type, output.shape[1:]) == ("agbd", "tensor(float)", [64, 96])
    import onnx

    model = onnx.load(tmp_path / "tiny.onnx")
    assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSET)]
    props = found.get_modelmeta().custom_metadata_map
    assert props["bundle.json"] == (tiny / "bundle.json").read_text()
    assert json.loads(props["export.json"])["format"] == "onnx"
    check_against_maps(lambda pixels: found.run(["agbd"], {"image": pixels})[0], tiny, [(1, 64, 96), (3, 64, 96)], 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("form", ["stablehlo", "onnx"])
def test_fewer_bits_make_a_smaller_file_and_little_error(tmp_path, tiny, form, needs):
    needs({"stablehlo": "flatbuffers", "onnx": "jax2onnx"}[form])
    sizes, pixels = {}, image(2, 32, 64)
    expected = Predictor.open(tiny).predict_array(pixels)
    for precision in ("float32", "bfloat16", "int8"):
        path = tmp_path / precision
        export(tiny, path, form=form, precision=precision, size=(32, 64))
        sizes[precision] = path.stat().st_size
        if precision == "int8":
            run = session(path).run(None, {"image": pixels})[0] if form == "onnx" else opened(path)[0].call(pixels)
            error = np.abs(np.asarray(run) - expected).max() / expected.std()
            assert 1e-4 < error < 0.5
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(Predictor.open(tiny).bundle.variables))
    assert sizes["float32"] - sizes["bfloat16"] > 0.4 * weights
    assert sizes["float32"] - sizes["int8"] > 0.65 * weights


@pytest.mark.long
@pytest.mark.parametrize("form", ["stablehlo", "onnx"])
def test_the_full_model_gives_what_maps_have(tmp_path, form, needs):
    needs({"stablehlo": "flatbuffers", "onnx": "jax2onnx"}[form])
    swin_b = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7}
    path = saved(tmp_path / "full", **swin_b, mlp_ratio=4.0, decoder_channels=32)
    export(path, tmp_path / "full.file", form=form)
    if form == "onnx":
        found = session(tmp_path / "full.file")
        check_against_maps(lambda pixels: found.run(None, {"image": pixels})[0], path, [(1, 224, 224)], 1e-4)
    else:
        check_against_maps(opened(tmp_path / "full.file")[0].call, path, [(1, 224, 224), (2, 96, 256)], 1e-4)


def test_a_converter_that_does_not_know_this_jax_is_said_to_be_so(tmp_path, monkeypatch):
    def fails(*inputs, **settings):
        raise AttributeError("module has no attribute 'Var'\nand more")

    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "jax2onnx", SimpleNamespace(to_onnx=fails))
    monkeypatch.setattr(formats, "version", lambda name: f"{name[:3]} 1.2")

    class Stub(SimpleNamespace):
        def __call__(self, image):
            return image[..., 0]

    program = Stub(bands=("A", "B"), output="agbd")
    said = (
        rf"jax2onnx jax 1.2 can't convert with JAX {jax.__version__} \(AttributeError: module has no attribute 'Var'\);"
    )
    with pytest.raises(ConvertError, match=said):
        formats.write_onnx(program, tmp_path / "new", size=(32, 32))
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.write_text("kept")
    with pytest.raises(ConvertError, match=r"there is there already; --overwrite replaces it"):
        export("none", there, form="onnx")
    with pytest.raises(ConvertError, match="format is 'tflite'; expected one of stablehlo, onnx"):
        export("none", tmp_path / "new", form="tflite")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for form, library in (("stablehlo", "flatbuffers"), ("onnx", "jax2onnx")):
        with pytest.raises(ConvertError, match=rf"{form} needs {library}; pip install 'biomass-jax\[portable\]'"):
            export("none", tmp_path / "new", form=form)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for size in ((224, 100), (0, 32), (-32, 32)):
        with pytest.raises(ConvertError, match=rf"size is {size[0]}x{size[1]} px; expected multiples of 32"):
            export("none", tmp_path / "new", form="onnx", size=size)
    assert there.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
