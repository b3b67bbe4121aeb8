"""Checkpoints through the converter: real files and numeric references."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert import torch_file
from biomass_jax.convert.convert import nested, read
from biomass_jax.convert.declared import Options
from biomass_jax.convert.layouts import GRANITE, match
from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.errors import ConvertError
from biomass_jax.models.build import build_module
from biomass_jax.models.swin import SwinTransformer

ALL_FLAGS = Options(drop_path=0.3, head_dropout=0.1, final_act="relu", bands=BAND_NAMES, statistics="granite")
TINY_FLAGS = Options(means=(1, 2, 3, 4, 5), stds=(5, 4, 3, 2, 1))


def assert_close(ours, reference, limit=1e-5):
    difference = np.abs(np.asarray(ours, np.float64) - reference).max() / np.abs(reference).max()
    assert difference <= limit, difference


def run(module, variables, x_nchw):
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply)(variables, np.transpose(x_nchw, (0, 2, 3, 1)))


# Real and reference files


def test_both_real_lightning_files_have_equal_weights(golden):
    options = Options(statistics="granite")
    full = read(golden / "ckpt_micro_cli" / "lightning.ckpt", options=options)
    weights = read(golden / "ckpt_micro_cli" / "state_dict.ckpt", options=options)
    digests = [bundle.weights_sha256(nested(found.variables)) for found in (full, weights)]
    assert digests[0] == digests[1]
    assert full.architecture == weights.architecture
    assert weights.optimizer is None
    assert full.input["sensors"] == ["L30"]
    assert full.architecture == {
        "embed_dim": 8,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "window_size": 7,
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "in_channels": 6,
        "shift_single_window": True,
        "decoder_channels": 8,
        "upscale_layers": 2,
        "drop_path_rate": 0.3,
        "head_dropout": 0.16194593880230534,
        "final_relu": True,
        "output_scale": 1.0,
        "output_offset": 0.0,
        "pool_scales": (1, 2, 3, 6),
    }


@pytest.mark.parametrize("case", ["eval_a_2x64x64", "eval_b_1x72x88", "eval_c_1x61x58"])
def test_a_converted_granite_model_computes_what_the_original_did(golden, case):
    found = read(golden / "micro" / "model.pt", options=ALL_FLAGS)
    module = build_module("biomass", found.architecture)
    reference = np.load(golden / "micro" / f"{case}.npz")
    assert_close(run(module, nested(found.variables), reference["input"]), reference["output"])


def test_a_converted_timm_encoder_computes_what_the_original_did(golden):
    found = read(golden / "timm_swin" / "timm_tiny.pt", options=ALL_FLAGS)
    assert (found.layout.name, found.architecture["final_norm"], found.architecture["stage_norms"]) == (
        "timm",
        True,
        False,
    )
    module = build_module("encoder", found.architecture)
    reference = np.load(golden / "timm_swin" / "timm_tiny_224.npz")
    features = run(module, {"params": nested(found.variables)["params"]}, reference["input"])
    assert_close(features[0][:, :8], reference["layer0_rows0_8"])
    assert_close(features[1], reference["layer1"])
    assert_close(features[2], reference["layer2"])
    assert_close(features[3], reference["norm"])


@pytest.fixture(scope="module")
def simmim_w7(golden):
    """The SimMIM encoder of the reference conversion, a file without a decoder, converted to window 7."""
    options = Options(drop_path=0.0, bands=BAND_NAMES, statistics="prithvi", window_size=7)
    found = read(golden / "simmim" / "convert_src_c6_img192_w6.pth", options=options)
    assert (found.layout.name, found.layout.task) == ("simmim-encoder", "encoder")
    return found


def test_simmim_to_window_7_is_the_reference_conversion_tensor_by_tensor(golden, simmim_w7):
    reference = np.load(golden / "simmim" / "convert_dst_w7.npz")
    # The reference holds granite's layout: our variables through granite's table must give its tensors.
    keys = {f"encoder.{name.removeprefix('conv.')}": name for name in reference.files if name.startswith("conv.")}
    rows = match(GRANITE, keys).tensors
    assert len(rows) == len(keys) == 21
    for path, (key, transform) in rows.items():
        ours = transform.inverse(simmim_w7.variables[path])
        if "bias_table" in key:
            assert ours.shape[0] == 169
            assert_close(ours, reference[keys[key]], 1e-6)
        else:
            assert np.array_equal(ours, reference[keys[key]])
    assert simmim_w7.provenance["window_resized"] == {"from": 6, "to": 7}
    assert simmim_w7.architecture["window_size"] == 7


def test_simmim_to_window_7_gives_the_reference_features(golden, simmim_w7):
    reference = np.load(golden / "simmim" / "convert_dst_w7.npz")
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "patch_size", "in_channels")
    fields = {name: simmim_w7.architecture[name] for name in names}
    module = SwinTransformer(**fields, shift_single_window=True, stage_norms=True, final_norm=False)
    params = nested(simmim_w7.variables)["params"]["encoder"]
    del params["norm"]
    for i in range(4):
        width = 4 * 2**i
        params[f"stages_{i}"]["norm"] = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    features = run(module, {"params": params}, reference["input"])
    # A LayerNorm over 4 channels magnifies rounding: in stage 0 the reference itself is 9e-6 from what float64 gives.
    for i, stage in enumerate(features):
        assert_close(stage, reference[f"stage{i}"])


def test_the_optimisers_moments_are_laid_out_like_their_weights(golden):
    path = golden / "ckpt_micro_cli" / "lightning.ckpt"
    found = read(path, options=Options(statistics="granite"))
    root = torch_file.read(path).root
    state, names = root["optimizer_states"][0]["state"], list(root["state_dict"])
    buffers = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
    names = [name for name in names if not name.endswith(buffers)]
    assert len(names) == len(state) == 171
    mu, nu = found.optimizer["mu"], found.optimizer["nu"]
    assert set(mu) == set(nu) == {p for p in found.variables if p.startswith("params/")}
    qkv = state[names.index("model.encoder.stages_1.blocks.0.attn.w_msa.qkv.weight")]
    assert np.array_equal(mu["params/encoder/stages_1/blocks_0/attn/qkv/kernel"], qkv["exp_avg"].array().T)
    conv = state[names.index("model.head.head.0.1.conv.weight")]
    assert np.array_equal(nu["params/head/upscale_1/conv/kernel"], conv["exp_avg_sq"].array().transpose(2, 3, 1, 0))
    merge = state[names.index("model.encoder.stages_0.downsample.norm.weight")]["exp_avg"].array()
    # Block 1 of ours is (row 1, column 0), number 2 of torch's unfold; 8 channels.
    assert np.array_equal(mu["params/encoder/stages_0/downsample/norm/scale"][8:16], merge[2::4])
    assert int(found.optimizer["count"]) == 6
    assert found.optimizer["lr"] == 0.00031406904191973693
    plateau = found.optimizer["plateau"]
    assert (plateau["patience"], plateau["factor"], plateau["num_bad_epochs"], plateau["last_epoch"]) == (10, 0.1, 1, 2)
    assert plateau["best"] == 122.44294738769531
    # Three epochs were run and the scheduler has seen two: the third loss is in the checkpoint callback.
    callback = next(c for name, c in root["callbacks"].items() if name.startswith("StateDictAware"))
    assert plateau["owed_loss"] == float(callback["current_score"].array())


def test_the_optimiser_can_be_left_out(golden):
    options = Options(statistics="granite", no_optimizer=True)
    assert read(golden / "ckpt_micro_cli" / "lightning.ckpt", options=options).optimizer is None


def test_an_optimiser_that_does_not_fit_is_an_error(tiny):
    group = {"lr": 0.1, "params": [0, 1]}
    path = tiny(optimizer_states=[{"state": {0: {}, 1: {}}, "param_groups": [group]}])
    with pytest.raises(ConvertError, match=r"2 parameters, the weights \d+; --no-optimizer"):
        read(path, options=TINY_FLAGS)
    path = tiny(optimizer_states=["nonsense"])
    with pytest.raises(ConvertError, match="isn't Lightning's"):
        read(path, options=TINY_FLAGS)
    assert read(path, options=replace(TINY_FLAGS, no_optimizer=True)).optimizer is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_precisions_become_float32(tiny, dtype):
    reference = read(tiny(), options=TINY_FLAGS).variables

    def edit(state):
        state.update({key: a.astype(dtype) for key, a in state.items() if a.dtype == np.float32})

    found = read(tiny(edit), options=TINY_FLAGS).variables
    for path, array in found.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, reference[path].astype(dtype).astype(np.float32))


def test_moments_are_not_resized(golden):
    with pytest.raises(ConvertError, match="--no-optimizer"):
        read(golden / "ckpt_micro_cli" / "lightning.ckpt", options=Options(statistics="granite", window_size=8))
