"""SimMIM there and back: a checkpoint in which every dimension differs, at its own window and at another one."""

from dataclasses import replace

import numpy as np
import pytest

from biomass_jax.convert import export
from biomass_jax.convert.convert import read
from biomass_jax.convert.declared import Options
from biomass_jax.convert.resize import resize_bias_table
from biomass_jax.convert.torch_file import write as torch_write
from biomass_jax.errors import ConvertError

BANDS = 5
DEPTHS, HEADS, WIDTH, WINDOW, MLP_RATIO, STRIDE = (1, 2, 3, 1), (1, 2, 3, 4), 12, 5, 3, 32
IMAGE = 160  # px: maps of 40, 20, 10, 5 tokens, the last one a single window
FLAGS = Options(
    drop_path=0.0,
    bands=("GREEN", "BLUE", "RED", "SWIR_1", "SWIR_2"),
    means=(1, 2, 3, 4, 5),
    stds=(5, 4, 3, 2, 1),
    sensors=("L30",),
)


def relative_position_index(window):
    tokens = [(y, x) for y in range(window) for x in range(window)]
    rows = [[(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1 for b in tokens] for a in tokens]
    return np.array(rows, np.int64)


def shift_mask(side, window):
    """The original's mask by plain loops over pairs of tokens: -100 between tokens that lie apart in the image."""

    def region(row, column):
        return tuple(0 if v < side - window else 1 if v < side - window // 2 else 2 for v in (row, column))

    windows = [(i, j) for i in range(side // window) for j in range(side // window)]
    masks = []
    for i, j in windows:
        regions = [region(i * window + y, j * window + x) for y in range(window) for x in range(window)]
        masks.append([[0.0 if a == b else -100.0 for b in regions] for a in regions])
    return np.array(masks, np.float32)


def checkpoint():
    """The original's state dict, spelled out by hand in torch's order, every float random."""
    rng = np.random.default_rng(11)
    state = {}

    def add(key, *shape):
        state[f"encoder.{key}"] = rng.standard_normal(shape, np.float32)

    def pair(key, *shape):
        add(f"{key}.weight", *shape)
        add(f"{key}.bias", shape[0])

    add("mask_token", 1, 1, WIDTH)
    pair("patch_embed.proj", WIDTH, BANDS, 4, 4)
    pair("patch_embed.norm", WIDTH)
    for i, depth in enumerate(DEPTHS):
        c, side = WIDTH * 2**i, IMAGE // 4 // 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            if j % 2 and side > WINDOW:
                state[f"encoder.{block}.attn_mask"] = shift_mask(side, WINDOW)
            pair(f"{block}.norm1", c)
            add(f"{block}.attn.relative_position_bias_table", (2 * WINDOW - 1) ** 2, HEADS[i])
            state[f"encoder.{block}.attn.relative_position_index"] = relative_position_index(WINDOW)
            pair(f"{block}.attn.qkv", 3 * c, c)
            pair(f"{block}.attn.proj", c, c)
            pair(f"{block}.norm2", c)
            pair(f"{block}.mlp.fc1", MLP_RATIO * c, c)
            pair(f"{block}.mlp.fc2", c, MLP_RATIO * c)
        if i < 3:
            add(f"layers.{i}.downsample.reduction.weight", 2 * c, 4 * c)
            pair(f"layers.{i}.downsample.norm", 4 * c)
    pair("norm", WIDTH * 8)
    state["decoder.0.weight"] = rng.standard_normal((STRIDE**2 * BANDS, WIDTH * 8, 1, 1), np.float32)
    state["decoder.0.bias"] = rng.standard_normal(STRIDE**2 * BANDS, np.float32)
    return state


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(file, state dict) of the whole model."""
    path = tmp_path_factory.mktemp("simmim") / "original.pth"
    state = checkpoint()
    torch_write.write(path, {"model": state, "epoch": 99})
    return path, state


def there_and_back(path, *, window=None, img_size=None):
    """(what the converter made of a checkpoint, the state dict that the export makes of that).

    A bundle on disk between the two costs a compilation; test_export.py goes that way.
    """
    found = read(path, options=replace(FLAGS, window_size=window))
    meta = {"task": found.layout.task, "architecture": found.architecture, "provenance": found.provenance}
    layout = export._LAYOUTS[found.layout.task]
    export._check_exportable(layout, meta, str(path))
    return found, dict(export._state(layout, found.variables, meta, img_size))


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, array in found.items():
        assert (array.dtype, array.shape) == (expected[key].dtype, expected[key].shape), key
        assert array.tobytes() == expected[key].tobytes(), key


def test_every_tensor_comes_back_bit_for_bit(original):
    path, state = original
    assert sum(key.endswith("attn_mask") for key in state) == 2  # stages 1 and 2; stage 3's map is a single window
    found, back = there_and_back(path)
    assert_same(back, state)
    assert found.layout.task == "simmim"
    assert found.provenance["img_size"] == IMAGE
    assert found.architecture == {
        "embed_dim": WIDTH,
        "depths": DEPTHS,
        "num_heads": HEADS,
        "window_size": WINDOW,
        "mlp_ratio": MLP_RATIO,
        "patch_size": 4,
        "in_channels": BANDS,
        "drop_path_rate": 0.0,
        "shift_single_window": False,
        "encoder_stride": STRIDE,
    }


def test_with_another_window_only_bias_tables_and_buffers_differ(original, tmp_path):
    path, state = original
    _, found = there_and_back(path, window=7, img_size=224)
    expected = dict(state)
    for key, array in state.items():
        if key.endswith("relative_position_bias_table"):
            expected[key] = resize_bias_table(array, 7)
            assert expected[key].shape == (169, array.shape[1])
        elif key.endswith("relative_position_index"):
            expected[key] = relative_position_index(7)
        elif key.endswith("attn_mask"):
            expected[key] = shift_mask(224 // 4 // 2 ** int(key.split(".")[2]), 7)
    assert_same(found, expected)
    torch_write.write(tmp_path / "back.pth", {"model": found})
    again = read(tmp_path / "back.pth", options=FLAGS)
    assert again.architecture["window_size"] == 7
    assert again.provenance["img_size"] == 224


def test_with_another_window_the_originals_image_size_is_not_taken(original):
    with pytest.raises(ConvertError, match="give --img-size"):
        there_and_back(original[0], window=7)


def test_an_encoder_alone_comes_back_without_its_mask_token(original, tmp_path):
    _, state = original
    encoder = {key: array for key, array in state.items() if not key.startswith("decoder.")}
    torch_write.write(tmp_path / "encoder.pth", {"model": encoder})
    found, back = there_and_back(tmp_path / "encoder.pth")
    assert found.layout.task == "encoder"
    del encoder["encoder.mask_token"]
    assert_same(back, encoder)
