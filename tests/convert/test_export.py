"""Bundles written as PyTorch checkpoints: the originals' keys, order, shapes, dtypes and bits come back."""

import json
import shutil

import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert import architecture, export, torch_file
from biomass_jax.convert.convert import convert, nested, read
from biomass_jax.convert.declared import Options
from biomass_jax.convert.layouts import GRANITE, SIMMIM
from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.errors import ConvertError
from biomass_jax.models.build import abstract_variables, build_module

SIMMIM_FLAGS = Options(drop_path=0.0, bands=BAND_NAMES, statistics="prithvi")


def tensors(path, folder):
    return {key: tensor.array() for key, tensor in torch_file.read(path).root[folder].items()}


def assert_same(found, original):
    assert list(found) == list(original)
    for key, array in found.items():
        assert (array.dtype, array.shape) == (original[key].dtype, original[key].shape), key
        assert array.tobytes() == original[key].tobytes(), key


@pytest.fixture(scope="module")
def granite_bundle(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("granite") / "bundle"
    source = golden / "ckpt_micro_cli" / "lightning.ckpt"
    convert(source, folder, options=Options(statistics="granite"))
    return folder


@pytest.fixture(scope="module")
def simmim_bundle(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simmim") / "bundle"
    convert(golden / "simmim" / "c6_img96_w3.pth", folder, options=SIMMIM_FLAGS)
    return folder


def test_granite_comes_back_bit_for_bit(golden, granite_bundle, tmp_path):
    export.export(granite_bundle, tmp_path / "model.ckpt")
    original = golden / "ckpt_micro_cli" / "lightning.ckpt"
    assert_same(tensors(tmp_path / "model.ckpt", "state_dict"), tensors(original, "state_dict"))
    ours, theirs = torch_file.read(tmp_path / "model.ckpt").root, torch_file.read(original).root
    for name in ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters"):
        assert ours[name] == theirs[name]


def test_an_exported_checkpoint_converts_again_without_flags(granite_bundle, tmp_path):
    export.export(granite_bundle, tmp_path / "model.ckpt")
    again = read(tmp_path / "model.ckpt")
    meta = bundle.read_meta(granite_bundle)
    assert bundle.weights_sha256(nested(again.variables)) == meta["weights_sha256"]
    assert json.loads(json.dumps(again.architecture)) == meta["architecture"]
    assert again.input == meta["input"]
    assert again.provenance["num_batches_tracked"] == meta["provenance"]["num_batches_tracked"]


def test_an_exported_calibrated_bundle_is_the_model_alone(granite_bundle, tmp_path):
    arrays = {"centres": np.ones((5, 3), np.float32)}
    calibrated = bundle.with_uncertainty(
        bundle.load(granite_bundle), tmp_path / "c", {}, arrays, output_bands=["agbd", "agbd_sd", "di"], provenance={}
    )
    done = export.export(calibrated, tmp_path / "model.ckpt")
    assert done[-1] == ("left out", "calibration, for which a checkpoint has no place")
    again, meta = read(tmp_path / "model.ckpt"), bundle.read_meta(granite_bundle)
    assert again.output["bands"] == ["agbd"]
    assert bundle.weights_sha256(nested(again.variables)) == meta["weights_sha256"]
    assert export.export(granite_bundle, tmp_path / "plain.ckpt")[-1][0] == "file"


def test_an_output_scale_and_offset_go_into_the_last_layer(granite_bundle, tmp_path):
    loaded = bundle.load(granite_bundle)
    names = ("task", "input", "output", "training", "provenance")
    about = {name: loaded.meta[name] for name in names}
    scaled = loaded.meta["architecture"] | {"output_scale": 3.0, "output_offset": -5.0}
    bundle.save(tmp_path / "scaled", loaded.variables, architecture=scaled, **about)
    export.export(tmp_path / "scaled", tmp_path / "model.ckpt")
    again = read(tmp_path / "model.ckpt")
    found, original = again.variables, bundle.flatten(loaded.variables)
    for name, factor, shift in (("kernel", 3, 0), ("bias", 3, -5)):
        path = f"params/head/final/{name}"
        np.testing.assert_allclose(found[path], np.asarray(original[path]) * factor + shift, rtol=1e-6)
    assert again.architecture["output_scale"] == 1


def test_a_spread_has_no_place_there_and_its_fields_are_in_nobodys_way_without_one(granite_bundle, tmp_path):
    loaded = bundle.load(granite_bundle)
    about = {name: loaded.meta[name] for name in ("task", "input", "output", "training", "provenance")}
    head = loaded.variables["params"]["head"]
    layer = {
        "kernel": np.zeros((1, 1, head["final"]["kernel"].shape[2], 1), np.float32),
        "bias": np.zeros(1, np.float32),
    }
    params = loaded.variables["params"] | {"head": head | {"spread": layer}}
    fields = loaded.meta["architecture"] | {"spread": "gaussian"}
    bundle.save(tmp_path / "spread", loaded.variables | {"params": params}, architecture=fields, **about)
    message = (
        "spread: spread=gaussian; the original of the layout granite gives a mean alone and has no place for params"
    )
    with pytest.raises(ConvertError, match=message):
        export.export(tmp_path / "spread", tmp_path / "model.ckpt")
    assert not (tmp_path / "model.ckpt").exists()
    fields = loaded.meta["architecture"] | {"spread_scale": 5.0, "quantile_levels": [0.1, 0.9]}
    bundle.save(tmp_path / "without", loaded.variables, architecture=fields, **about)
    export.export(tmp_path / "without", tmp_path / "model.ckpt")


def test_a_bundle_that_never_was_torchs_declares_its_architecture(granite_bundle, tmp_path):
    meta = bundle.read_meta(granite_bundle)
    meta["provenance"] = {}
    root = export._lightning({}, meta)
    fields = meta["architecture"]
    arguments = root["hyper_parameters"]["model_args"]
    assert arguments["backbone_depths"] == fields["depths"]
    assert arguments["head_final_act"] == "torch.nn.ReLU"
    state = dict(export._state(GRANITE, _zeros("biomass", fields), meta, None))
    assert state["model.decoder.bottleneck.norm.num_batches_tracked"] == 0


def _zeros(task, fields):
    shapes = bundle.flatten(abstract_variables(build_module(task, fields)))
    return {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in shapes.items()}


def described(state):
    return [(key, array.shape, str(array.dtype)) for key, array in state]


def test_swin_b_has_the_released_models_keys_order_shapes_and_dtypes(checkpoints, key_list):
    fields = dict(checkpoints.SWIN_B) | {"pool_scales": (1, 2, 3, 6), "upscale_layers": 2, "patch_size": 4}
    meta = {"architecture": fields, "provenance": {}}
    found = described(export._state(GRANITE, _zeros("biomass", fields), meta, None))
    assert found == [(key, *rest) for key, rest in key_list("granite_swin_b_keys.txt").items()]


def test_simmims_swin_b_has_the_originals_keys_order_shapes_and_dtypes(checkpoints, key_list):
    fields = {name: value for name, value in checkpoints.SWIN_B.items() if name != "decoder_channels"}
    fields |= {"window_size": 6, "patch_size": 4}
    meta = {"architecture": fields, "provenance": {}}
    found = described(export._state(SIMMIM, _zeros("simmim", fields), meta, 192))
    assert found == [(key, *rest) for key, rest in key_list("simmim/keys_swinB_img192_w6_c6.txt").items()]


def test_simmim_comes_back_bit_for_bit(golden, simmim_bundle, tmp_path):
    export.export(simmim_bundle, tmp_path / "model.pth")
    assert_same(tensors(tmp_path / "model.pth", "model"), tensors(golden / "simmim" / "c6_img96_w3.pth", "model"))


def test_simmims_masks_follow_the_image_size(simmim_bundle, tmp_path):
    export.export(simmim_bundle, tmp_path / "model.pth", img_size=192)
    found = tensors(tmp_path / "model.pth", "model")
    assert found["encoder.layers.3.blocks.1.attn_mask"].shape == (4, 9, 9)  # 6 x 6 tokens in windows of 3
    with pytest.raises(ConvertError, match=r"image size 100.*as 96 px gives"):
        export.export(simmim_bundle, tmp_path / "other.pth", img_size=100)
    assert not (tmp_path / "other.pth").exists()


def changed(source, target, **provenance):
    """A bundle's bundle.json alone, its provenance changed: enough for what is refused before weights are read."""
    meta = bundle.read_meta(source)
    meta["provenance"] |= provenance
    target.mkdir()
    (target / "bundle.json").write_text(json.dumps(meta))
    return target


# Of another data set, another sensor, another label: nothing that a conversion would take for granted.
OTHER = {
    "input": {"fill": 0, "sensors": ["L30", "S30"], "pixel_size": 10.0, "means": [1.5] * 6, "stds": [2.5] * 6},
    "output": {"bands": ["canopy_height"], "units": "m"},
}


@pytest.mark.parametrize(
    ("kind", "fields", "kept"),
    [
        ("granite_bundle", {"pool_scales": [1, 2, 3, 5], "drop_path_rate": 0.125, "head_dropout": 0.25}, False),
        ("granite_bundle", {"final_relu": False}, False),
        # Flags gave what the original's hyper-parameters left out.
        ("granite_bundle", {"pool_scales": [1, 2, 3, 5]}, True),
        ("simmim_bundle", {"drop_path_rate": 0.125}, False),
        ("encoder", {"drop_path_rate": 0.125}, False),
    ],
)
def test_an_export_converts_back_to_the_same_bundle_without_flags(request, tmp_path, monkeypatch, kind, fields, kept):
    """A granite bundle as training writes it, a SimMIM and an encoder: the same fields, input, output and weights."""
    monkeypatch.setattr(bundle, "compute_check", lambda *_: {"values": [0.0], "mean": 0.0})  # it costs a compilation
    source = request.getfixturevalue("simmim_bundle" if kind == "encoder" else kind)
    shutil.copytree(source, tmp_path / "bundle")
    meta = bundle.read_meta(source)
    meta["architecture"] |= fields
    meta["input"] |= OTHER["input"]
    meta["output"] |= OTHER["output"] if kind == "granite_bundle" else {}
    meta["provenance"].pop("img_size", None)
    if not kept:
        meta["provenance"].pop("hyper_parameters", None)
    if not meta["architecture"].get("final_relu", True):
        meta["output"]["nodata"] = -9999
    opened = bundle.load(source)
    if kind == "encoder":
        meta |= {"task": "encoder", "output": {"bands": [], "units": "features", "nodata": None}}
        del meta["architecture"]["encoder_stride"]
        meta["architecture"] |= {"stage_norms": False, "final_norm": True}
        weights = {"params": {"encoder": opened.variables["params"]["encoder"]}, "batch_stats": {}}
        about = {name: meta[name] for name in ("task", "architecture", "input", "output", "training", "provenance")}
        bundle.save(tmp_path / "bundle", weights, overwrite=True, **about)
    else:
        (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(meta))
        weights = opened.variables
    img_size = None if kind == "granite_bundle" else 96
    export.export(tmp_path / "bundle", tmp_path / "model.ckpt", img_size=img_size)
    again = read(tmp_path / "model.ckpt")
    assert json.loads(json.dumps(again.architecture)) == meta["architecture"]
    assert (again.input, again.output) == (meta["input"], meta["output"])
    assert bundle.weights_sha256({"batch_stats": {}} | nested(again.variables)) == bundle.weights_sha256(weights)


def of_fields(source, target, **fields):
    """A bundle's bundle.json alone, with other fields of the architecture."""
    meta = bundle.read_meta(source)
    meta["architecture"] |= fields
    meta["provenance"].pop("hyper_parameters", None)
    target.mkdir()
    (target / "bundle.json").write_text(json.dumps(meta))
    return target


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        # Every fine-tune from our own pretraining.
        (
            "granite_bundle",
            {"shift_single_window": False},
            r"bundle: shift_single_window=False; the original of the layout granite always has shift_single_window=True"
            r".* something else with these weights; .*--config\.model\.shift_single_window=true",
        ),
        ("granite_bundle", {"mlp_ratio": 2.1}, r"layout granite cannot say what it is \(mlp_ratio: .*2\.1"),
        ("simmim_bundle", {"mlp_ratio": 2.1}, r"layout simmim cannot say what it is \(mlp_ratio: .*2\.1"),
        ("granite_bundle", {"drop_path_rate": 1.0}, r"cannot say what it is \(.*backbone_drop_path_rate is 1\.0"),
    ],
)
def test_a_field_that_the_layout_cannot_say_is_refused_by_name(request, tmp_path, kind, fields, words):
    folder = of_fields(request.getfixturevalue(kind), tmp_path / "bundle", **fields)
    with pytest.raises(ConvertError, match=words):
        export.export(folder, tmp_path / "model.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_field_that_nothing_declares_is_refused_by_name(granite_bundle, tmp_path, monkeypatch):
    """Whatever field a model gains: one that neither shapes nor arguments tell would come back as its default."""
    folder = of_fields(granite_bundle, tmp_path / "bundle", final_relu=False)
    complete = architecture.complete

    def forgetful(*arguments):
        fields, missing = complete(*arguments)
        return fields | {"final_relu": True}, missing

    monkeypatch.setattr(architecture, "complete", forgetful)
    with pytest.raises(ConvertError, match="layout granite cannot say final_relu=False, which would be read as True"):
        export.export(folder, tmp_path / "model.ckpt")


def test_a_resized_window_of_a_biomass_model_is_refused(granite_bundle, tmp_path):
    folder = changed(granite_bundle, tmp_path / "bundle", window_resized={"from": 7, "to": 8})
    with pytest.raises(ConvertError, match="resized from window 7 to 8"):
        export.export(folder, tmp_path / "model.ckpt")


def test_an_unknown_image_size_is_asked_for(simmim_bundle):
    meta = bundle.read_meta(simmim_bundle)
    with pytest.raises(ConvertError, match="--img-size"):
        dict(export._state(SIMMIM, _zeros("simmim", meta["architecture"]), meta | {"provenance": {}}, None))


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [("simmim", "shift_single_window", True), ("encoder", "stage_norms", True), ("encoder", "final_norm", False)],
)
def test_a_model_that_the_original_cannot_be_is_refused(simmim_bundle, tmp_path, task, field, value):
    meta = bundle.read_meta(simmim_bundle) | {"task": task}
    meta["architecture"] |= {field: value}
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(meta))
    with pytest.raises(ConvertError, match=f"{field}={value}.*something else"):
        export.export(tmp_path / "bundle", tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


def test_an_existing_file_is_kept_unless_told_otherwise(simmim_bundle, tmp_path):
    target = tmp_path / "model.pth"
    target.write_bytes(b"precious")
    with pytest.raises(ConvertError, match="--overwrite"):
        export.export(simmim_bundle, target)
    assert target.read_bytes() == b"precious"
    export.export(simmim_bundle, target, overwrite=True)
    assert torch_file.read(target).format == "zip"


@pytest.mark.parametrize(
    ("kind", "folder", "original"),
    [
        ("granite_bundle", "state_dict", "ckpt_micro_cli/lightning.ckpt"),
        ("simmim_bundle", "model", "simmim/c6_img96_w3.pth"),
    ],
)
def test_torch_itself_reads_an_export(kind, folder, original, request, golden, tmp_path):
    torch = pytest.importorskip("torch")
    export.export(request.getfixturevalue(kind), tmp_path / "model.pt")
    ours = torch.load(tmp_path / "model.pt", weights_only=True)[folder]
    theirs = torch.load(golden / original, weights_only=False)[folder]
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
