"""Tensors that do not fit: each is named, all at once, and nothing is written."""

import numpy as np
import pytest

from biomass_jax.convert.convert import convert, read
from biomass_jax.convert.declared import Options
from biomass_jax.convert.torch_file import write as torch_write
from biomass_jax.errors import ConvertError

TINY_FLAGS = Options(means=(1, 2, 3, 4, 5), stds=(5, 4, 3, 2, 1))


def drop(*keys):
    return lambda state: [state.pop(key) for key in keys]


def put(**arrays):
    return lambda state: state.update({key.replace("__", "."): array for key, array in arrays.items()})


BLOCK = "model.encoder.stages_1.blocks.1"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            drop(
                f"{BLOCK}.attn.w_msa.qkv.bias", "model.decoder.bottleneck.norm.running_mean", "model.head.head.2.bias"
            ),
            [
                "missing tensors: ",
                "encoder.stages_1.blocks.1.attn.w_msa.qkv.bias",
                "decoder.bottleneck.norm.running_mean",
                "head.head.2.bias",
            ],
        ),
        (drop("model.decoder.fpn_bottleneck.conv.weight"), ["missing tensor decoder.fpn_bottleneck.conv.weight"]),
        (
            put(model__neck__weight=np.zeros(3, np.float32), criterion__weight=np.zeros(3, np.float32)),
            ["unknown tensors: model.neck.weight"],
        ),
        (
            put(model__encoder__stages_3__downsample__norm__weight=np.zeros(384, np.float32)),
            ["extra tensors: model.encoder.stages_3.downsample.norm.weight"],
        ),
        (
            put(encoder__stages_0__norm__bias=np.zeros(12, np.float32)),
            ["duplicate tensors: model.encoder.stages_0.norm.bias = encoder.stages_0.norm.bias"],
        ),
        (
            lambda state: state.update({"model.encoder.stages.0.norm.bias": state["model.encoder.stages_0.norm.bias"]}),
            ["duplicate tensors: model.encoder.stages_0.norm.bias = model.encoder.stages.0.norm.bias"],
        ),
        (
            lambda state: state.update(
                {
                    f"{BLOCK}.mlp": np.zeros(2, np.float32),
                    f"{BLOCK}.ffn.layers.1.weight": np.zeros((24, 71), np.float32),
                    f"{BLOCK}.norm1.bias": np.zeros((24, 1), np.float32),
                }
            ),
            [f"{BLOCK}.mlp", f"{BLOCK}.ffn.layers.1.weight (24, 71), expected (24, 72)", f"{BLOCK}.norm1.bias (24, 1)"],
        ),
        (
            # transposed: a square matrix elsewhere would hide it
            lambda state: state.update({f"{BLOCK}.attn.w_msa.qkv.weight": np.zeros((24, 72), np.float32)}),
            [f"misshapen tensors: {BLOCK}.attn.w_msa.qkv.weight (24, 72), expected (72, 24)"],
        ),
        (
            lambda state: state.update({f"{BLOCK}.norm1.weight": np.full(24, np.nan, np.float32)}),
            ["NaN", f"{BLOCK}.norm1.weight"],
        ),
        (
            put(model__head__head__0__1__bn__running_var=np.full(10, -1, np.float32)),
            ["below 0", "model.head.head.0.1.bn.running_var"],
        ),
        (
            lambda state: state.update({f"{BLOCK}.norm1.weight": np.zeros(24, np.int64)}),
            ["floating-point", f"{BLOCK}.norm1.weight int64"],
        ),
        (
            lambda state: state[f"{BLOCK}.attn.w_msa.relative_position_index"].__setitem__((0, 0), 1),
            ["relative positions", f"{BLOCK}.attn.w_msa.relative_position_index"],
        ),
        (
            lambda state: state.update(
                {"model.encoder.stages_0.blocks.0.attn.w_msa.relative_position_bias_table": np.zeros((80, 1), "f4")}
            ),
            ["relative_position_bias_table has 80 rows"],
        ),
        (
            lambda state: [
                state.update({key: np.zeros((49, a.shape[1]), np.float32)})
                for key, a in state.items()
                if "stages_2" in key and "bias_table" in key
            ],
            ["window sizes differ between stages", "stages_2"],
        ),
        (
            lambda state: [
                state.update({key.replace("blocks.2", "blocks.4"): state.pop(key)})
                for key in list(state)
                if "stages_2.blocks.2" in key
            ],
            ["blocks_N", "[0, 1, 4]"],
        ),
        (
            lambda state: state.update({"model.decoder.bottleneck.norm.num_batches_tracked": np.zeros(2, np.int64)}),
            ["misshapen", "num_batches_tracked (2,), expected ()"],
        ),
        (put(**{"model.encoder.note": "text"}), ["more than tensors: model.encoder.note"]),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(tiny, tmp_path, edit, words):
    path = tiny(edit)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConvertError) as caught:
        convert(path, tmp_path / "bundle", options=TINY_FLAGS)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_long_list_of_names_is_cut_and_counted(tiny):
    def edit(state):
        state.update({f"model.extra.{n}": np.zeros(1, np.float32) for n in range(50)})

    with pytest.raises(ConvertError, match=r"model\.extra\.4 \.\.\. and 45 more \(50 in all\)$"):
        read(tiny(edit), options=TINY_FLAGS)


@pytest.mark.parametrize("root", [{"epoch": 3}, [1, 2], {"state_dict": {}}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_an_error(tmp_path, root):
    torch_write.write(tmp_path / "x.pt", root)
    with pytest.raises(ConvertError, match=r"x\.pt: (holds list|no state dict)"):
        read(tmp_path / "x.pt", options=TINY_FLAGS)


def test_two_state_dicts_are_an_error(tmp_path):
    state = {"encoder.stages_0.norm.weight": np.zeros(1, np.float32)}
    torch_write.write(tmp_path / "x.pt", {"state_dict": state, "model": state})
    with pytest.raises(ConvertError, match="under both state_dict and model"):
        read(tmp_path / "x.pt", options=TINY_FLAGS)
