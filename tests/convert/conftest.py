"""Checkpoints of any size, spelled out by hand: the key names here owe nothing to the converter's tables."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from biomass_jax.convert.torch_file import write as torch_write

Shapes = dict[str, tuple[tuple[int, ...], str]]

# Every dimension differs from every other, so that no two can be mixed up unseen.
TINY = {
    "embed_dim": 12,
    "depths": (1, 2, 3, 1),
    "num_heads": (1, 2, 3, 4),
    "window_size": 5,
    "mlp_ratio": 3,
    "in_channels": 5,
    "decoder_channels": 10,
}
SWIN_B = {
    "embed_dim": 128,
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
    "window_size": 7,
    "mlp_ratio": 4,
    "in_channels": 6,
    "decoder_channels": 32,
}


class _Keys:
    """Shapes of torch modules under their keys, in torch's order."""

    def __init__(self) -> None:
        self.shapes: Shapes = {}

    def add(self, key: str, *shape: int, dtype: str = "float32") -> None:
        self.shapes[f"model.{key}"] = (shape, dtype)

    def norm(self, key: str, size: int) -> None:
        self.add(f"{key}.weight", size)
        self.add(f"{key}.bias", size)

    def linear(self, key: str, out: int, size: int) -> None:
        self.add(f"{key}.weight", out, size)
        self.add(f"{key}.bias", out)

    def batch_norm(self, key: str, size: int) -> None:
        self.norm(key, size)
        self.add(f"{key}.running_mean", size)
        self.add(f"{key}.running_var", size)
        self.add(f"{key}.num_batches_tracked", dtype="int64")

    def conv_module(self, key: str, out: int, size: int, kernel: int) -> None:
        self.add(f"{key}.conv.weight", out, size, kernel, kernel)
        self.batch_norm(f"{key}.norm", out)

    def block(self, key: str, c: int, heads: int, window: int, mlp_ratio: int) -> None:
        self.norm(f"{key}.norm1", c)
        self.add(f"{key}.attn.w_msa.relative_position_bias_table", (2 * window - 1) ** 2, heads)
        self.add(f"{key}.attn.w_msa.relative_position_index", window**2, window**2, dtype="int64")
        self.linear(f"{key}.attn.w_msa.qkv", 3 * c, c)
        self.linear(f"{key}.attn.w_msa.proj", c, c)
        self.norm(f"{key}.norm2", c)
        self.linear(f"{key}.ffn.layers.0.0", mlp_ratio * c, c)
        self.linear(f"{key}.ffn.layers.1", c, mlp_ratio * c)


def granite_shapes(
    *,
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    window_size: int,
    mlp_ratio: int,
    in_channels: int,
    decoder_channels: int,
) -> Shapes:
    """Key -> (shape, dtype) of a granite checkpoint, in torch's order."""
    keys = _Keys()
    keys.add("encoder.patch_embed.projection.weight", embed_dim, in_channels, 4, 4)
    keys.add("encoder.patch_embed.projection.bias", embed_dim)
    keys.norm("encoder.patch_embed.norm", embed_dim)
    widths = [embed_dim * 2**i for i in range(len(depths))]
    for i, c in enumerate(widths):
        for j in range(depths[i]):
            keys.block(f"encoder.stages_{i}.blocks.{j}", c, num_heads[i], window_size, mlp_ratio)
        if i < len(depths) - 1:
            keys.norm(f"encoder.stages_{i}.downsample.norm", 4 * c)
            keys.add(f"encoder.stages_{i}.downsample.reduction.weight", 2 * c, 4 * c)
        keys.norm(f"encoder.stages_{i}.norm", c)
    d = decoder_channels
    for k in range(4):
        keys.conv_module(f"decoder.psp_modules.{k}.1", d, widths[-1], 1)
    keys.conv_module("decoder.bottleneck", d, widths[-1] + 4 * d, 3)
    for i, c in enumerate(widths[:-1]):
        keys.conv_module(f"decoder.lateral_convs.{i}", d, c, 1)
    for i in range(len(widths) - 1):
        keys.conv_module(f"decoder.fpn_convs.{i}", d, d, 3)
    keys.conv_module("decoder.fpn_bottleneck", d, len(widths) * d, 3)
    for i in range(2):
        keys.add(f"head.head.0.{i}.conv.weight", 4 * d, d, 3, 3)
        keys.add(f"head.head.0.{i}.conv.bias", 4 * d)
        keys.batch_norm(f"head.head.0.{i}.bn", d)
    keys.add("head.head.2.weight", 1, d, 1, 1)
    keys.add("head.head.2.bias", 1)
    return keys.shapes


def relative_position_index(window: int) -> np.ndarray:
    """Swin's index by plain loops."""
    tokens = [(y, x) for y in range(window) for x in range(window)]
    rows = [[(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1 for b in tokens] for a in tokens]
    return np.array(rows, np.int64)


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes: floats random, variances positive, counters 7, indexes right."""
    rng = np.random.default_rng(seed)
    state = {}
    for key, (shape, dtype) in shapes.items():
        if dtype == "float32":
            values = rng.standard_normal(shape, np.float32)
            state[key] = np.abs(values) if key.endswith("running_var") else values
        elif shape:
            state[key] = relative_position_index(round(shape[0] ** 0.5))
        else:
            state[key] = np.array(7, np.int64)
    return state


def model_args(fields: Mapping[str, object]) -> dict[str, object]:
    """Terratorch's arguments for `TINY` or `SWIN_B`."""
    return {
        "decoder": "UperNetDecoder",
        "backbone": "prithvi_swin_B",
        "backbone_embed_dim": fields["embed_dim"],
        "backbone_drop_path_rate": 0.25,
        "in_channels": fields["in_channels"],
        "decoder_channels": fields["decoder_channels"],
        "bands": ["GREEN", "BLUE", "RED", "SWIR_1", "SWIR_2"],
        "head_dropout": 0.125,
        "head_final_act": "torch.nn.ReLU",
        "head_learned_upscale_layers": 2,
    }


@pytest.fixture(scope="session")
def checkpoints() -> SimpleNamespace:
    """The functions and configurations of this file."""
    return SimpleNamespace(
        TINY=TINY, SWIN_B=SWIN_B, granite_shapes=granite_shapes, random_state=random_state, model_args=model_args
    )


@pytest.fixture(scope="session")
def key_list(golden) -> Callable[[str], Shapes]:
    """Read one of the key lists: name -> key -> (shape, dtype), in torch's order."""

    def read(name: str) -> Shapes:
        result: Shapes = {}
        for line in (golden / name).read_text().splitlines():
            key, rest = line.split(" ", 1)
            shape, dtype = rest.rsplit(" ", 1)
            sizes = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
            result[key] = (sizes, dtype.removeprefix("torch."))
        return result

    return read


@pytest.fixture
def tiny(tmp_path) -> Callable[..., Path]:
    """Write a tiny granite checkpoint whose state `edit(state)` may change; returns its path."""

    def make(edit=lambda state: None, arguments=None, **top):
        state = random_state(granite_shapes(**TINY))
        edit(state)
        arguments = model_args(TINY) if arguments is None else arguments
        path = tmp_path / "tiny.ckpt"
        torch_write.write(path, {"state_dict": state, "hyper_parameters": {"model_args": arguments}, **top})
        return path

    return make
