"""The tables of layouts against key lists printed by the originals, transforms against plain loops."""

import numpy as np
import pytest

from biomass_jax.convert import layouts
from biomass_jax.convert.layouts import (
    CONV_KERNEL,
    LINEAR_KERNEL,
    TABLE,
    UNFOLD_KERNEL,
    UNFOLD_VECTOR,
    VECTOR,
    expand,
    match,
)
from biomass_jax.convert.resize import bicubic_matrix, resize_bias_table, window_of
from biomass_jax.errors import ConvertError

# file -> (layout, tensors of the model, counters, buffers, left out)
KEY_LISTS = {
    "granite_swin_b_keys.txt": ("granite", 379 + 28, 14, 24, []),
    "simmim/keys_swinB_img192_w6_c6.txt": ("simmim", 330, 0, 35, []),
    "simmim/keys_tiny.txt": ("simmim", 122, 0, 11, []),
    "timm_swin/keys_microsoft_swin_base_in6.txt": ("microsoft", 327, 0, 35, ["head.weight", "head.bias"]),
    "timm_swin/keys_microsoft_tiny.txt": ("microsoft", 119, 0, 11, []),
    "timm_swin/keys_timm_swin_base_in6.txt": ("timm", 327, 0, 0, ["head.fc.weight", "head.fc.bias"]),
    "timm_swin/keys_timm_swin_base_in6_features_only.txt": ("timm", 325, 0, 0, []),
    "timm_swin/keys_timm_tiny.txt": ("timm", 119, 0, 0, []),
}


@pytest.mark.parametrize("name", KEY_LISTS)
def test_every_key_of_the_originals_has_its_row(name, key_list):
    keys = key_list(name)
    layout, tensors, counters, buffers, unused = KEY_LISTS[name]
    found = layouts.detect(keys)
    assert found.name == layout
    result = match(found, keys)
    assert (result.unknown, result.duplicates) == ([], [])
    assert (len(result.tensors), len(result.counters), len(result.buffers)) == (tensors, counters, buffers)
    assert result.unused == unused
    assert all(key.endswith(("relative_position_index", "attn_mask")) for key in result.buffers)
    assert tensors + counters + buffers + len(unused) == len(keys)


@pytest.mark.parametrize("name", KEY_LISTS)
def test_a_path_leads_back_to_its_key(name, key_list):
    keys = key_list(name)
    layout = layouts.detect(keys)
    result = match(layout, keys)
    back = {path: layout.key_of(path) for path in result.tensors}
    assert back == {path: layout.canonical(key) for path, (key, _) in result.tensors.items()}


def test_granite_parameters_are_as_many_as_published(key_list):
    keys = key_list("granite_swin_b_keys.txt")
    tensors = match(layouts.GRANITE, keys).tensors
    trainable = [keys[key][0] for path, (key, _) in tensors.items() if path.startswith("params/")]
    assert len(trainable) == 379
    assert sum(int(np.prod(shape)) for shape in trainable) == 87_382_105


@pytest.mark.parametrize(
    ("name", "layout"),
    [("granite_swin_b_keys.txt", layouts.GRANITE), ("simmim/keys_swinB_img192_w6_c6.txt", layouts.SIMMIM)],
)
def test_a_table_written_out_has_torchs_order(name, layout, key_list):
    keys = [layout.canonical(key) for key in key_list(name)]
    depths = (2, 2, 18, 2)
    counts = {"i": 4, "k": 4, "l": 3, "f": 3, "u": 2}
    written = [key for _, key, _ in expand(layout.rows, lambda n, at: depths[at["i"]] if n == "j" else counts[n])]
    assert len(written) == len(set(written))
    assert [key for key in written if key in set(keys)] == keys
    # Only parts that a model may lack are written besides: the last stage's downsample, masks of unshifted blocks.
    assert all(".3.downsample." in k.replace("_", ".") or k.endswith("attn_mask") for k in set(written) - set(keys))


def test_the_tinys_key_names_are_those_of_the_released_model(checkpoints, key_list):
    assert list(checkpoints.granite_shapes(**checkpoints.SWIN_B).items()) == list(
        key_list("granite_swin_b_keys.txt").items()
    )


@pytest.mark.parametrize(
    "respell",
    [
        lambda key: key.removeprefix("model."),
        lambda key: key.replace("encoder.stages_", "encoder.stages."),
        lambda key: key.removeprefix("model.").replace("encoder.stages_", "encoder.stages."),
        lambda key: f"module._orig_mod.{key}",
    ],
)
def test_granite_spellings_are_one_layout(respell, key_list):
    keys = list(key_list("granite_swin_b_keys.txt"))
    spelled = [respell(key) for key in keys]
    assert spelled != keys
    assert layouts.detect(spelled) is layouts.GRANITE
    result = match(layouts.GRANITE, spelled)
    assert list(result.tensors) == list(match(layouts.GRANITE, keys).tensors)
    assert (result.unknown, result.duplicates) == ([], [])


def test_timm_downsamples_end_the_stage_before(key_list):
    timm = match(layouts.TIMM, key_list("timm_swin/keys_timm_tiny.txt")).tensors
    microsoft = match(layouts.MICROSOFT, key_list("timm_swin/keys_microsoft_tiny.txt")).tensors
    path = "params/encoder/stages_0/downsample/reduction/kernel"
    assert timm[path][0] == "layers.1.downsample.reduction.weight"
    assert microsoft[path][0] == "layers.0.downsample.reduction.weight"
    assert set(timm) == set(microsoft)


@pytest.mark.parametrize("name", KEY_LISTS)
def test_wrapped_keys_of_every_layout_are_known(name, key_list):
    keys = list(key_list(name))
    layout = layouts.detect(keys)
    wrapped = [f"_orig_mod.module.model.{key.replace('.blocks.', '._orig_mod.blocks.')}" for key in keys]
    assert layouts.detect(wrapped) is layout
    assert [layout.canonical(key) for key in wrapped] == [layout.canonical(key) for key in keys]
    assert match(layout, wrapped).unknown == []


def test_two_spellings_of_one_tensor_are_a_duplicate():
    result = match(layouts.GRANITE, ["model.encoder.stages_0.norm.weight", "encoder.stages.0.norm.weight"])
    assert result.duplicates == [("model.encoder.stages_0.norm.weight", "encoder.stages.0.norm.weight")]


@pytest.mark.parametrize(
    "key",
    [
        "encoder.stages_0.norm.running_mean",
        "encoder.stages_00.norm.weight",
        "encoder.stages_0.norm.weight.extra",
        "x.encoder.stages_0.norm.weight",
        "encoder.stages_0.blocks.-1.norm1.weight",
        "encoder.stages_123456.norm.weight",
    ],
)
def test_near_misses_are_unknown(key):
    assert match(layouts.GRANITE, [key]).unknown == [key]


def test_no_layout_and_several_layouts_are_errors():
    with pytest.raises(ConvertError, match=r"no known layout.*Found keys: backbone\.conv1\.weight"):
        layouts.detect(["backbone.conv1.weight"])
    with pytest.raises(ConvertError, match="granite, simmim"):
        layouts.detect(["encoder.stages_0.norm.weight", "encoder.layers.0.blocks.0.norm1.weight"])


# Where each of our block's offsets lies in the 2 x 2 square: (row, column) in the original Swin's order.
OFFSETS = ((0, 0), (1, 0), (0, 1), (1, 1))


def test_transforms_move_every_element_to_its_place():
    rng = np.random.default_rng(1)
    conv = rng.standard_normal((2, 3, 5, 7))
    ours = CONV_KERNEL.forward(conv)
    assert all(ours[h, w, i, o] == conv[o, i, h, w] for o, i, h, w in np.ndindex(conv.shape))
    linear = rng.standard_normal((2, 3))
    assert all(LINEAR_KERNEL.forward(linear)[i, o] == linear[o, i] for o, i in np.ndindex(linear.shape))
    c = 3
    norm, reduction = rng.standard_normal(4 * c), rng.standard_normal((2 * c, 4 * c))
    our_norm, our_reduction = UNFOLD_VECTOR.forward(norm), UNFOLD_KERNEL.forward(reduction)
    for k, (row, column) in enumerate(OFFSETS):
        for channel in range(c):
            unfolded = channel * 4 + row * 2 + column
            assert our_norm[k * c + channel] == norm[unfolded]
            assert np.array_equal(our_reduction[k * c + channel], reduction[:, unfolded])


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (CONV_KERNEL, (2, 3, 5, 7)),
        (LINEAR_KERNEL, (2, 3)),
        (UNFOLD_VECTOR, (12,)),
        (UNFOLD_KERNEL, (6, 12)),
        (TABLE, (9, 2)),
        (VECTOR, (4,)),
    ],
)
def test_transforms_have_their_inverse_and_shapes(transform, shape):
    x = np.random.default_rng(2).standard_normal(shape)
    ours = transform.forward(x)
    assert np.array_equal(transform.inverse(ours), x)
    assert ours.shape == transform.shape(shape)
    assert transform.torch_shape(ours.shape) == shape
    assert ours.flags.c_contiguous
    assert transform.shape((*shape, 1)) is None


def test_an_unfolded_axis_that_is_no_multiple_of_four_fits_nothing():
    assert UNFOLD_VECTOR.shape((10,)) is None


def test_bicubic_rows_sum_to_one_and_keep_a_table_of_the_same_size():
    assert np.allclose(bicubic_matrix(11, 13).sum(1), 1)
    table = np.random.default_rng(3).standard_normal((25, 2)).astype(np.float32)
    assert np.array_equal(resize_bias_table(table, 3), table)


def test_bicubic_weights_by_hand():
    # Keys' kernel with a = -0.75 at distances 1.5, 0.5, 0.5, 1.5 is -3/32, 19/32, 19/32, -3/32; upscaling 2 -> 1 takes
    # the two middle taps and clamps the outer ones onto them.
    assert np.allclose(bicubic_matrix(2, 1), [[0.5, 0.5]])
    assert np.allclose(bicubic_matrix(4, 2), [[16 / 32, 19 / 32, -3 / 32, 0], [0, -3 / 32, 19 / 32, 16 / 32]])


def test_window_of_takes_odd_squares_alone():
    assert [window_of(n) for n in (1, 25, 121, 169)] == [1, 3, 6, 7]
    assert [window_of(n) for n in (0, 4, 16, 168)] == [None] * 4
