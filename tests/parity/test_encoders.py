"""Encoders of other origins: timm's Swin, and SimMIM's masked forward pass."""

import jax
import numpy as np
import pytest

from biomass_jax.models.simmim import SimMIM
from biomass_jax.models.swin import SwinEncoder
from tests.parity.torch_names import relative_error, to_variables


def test_timm_swin(golden, read_tensors):
    reference = np.load(golden / "timm_swin" / "timm_tiny_224.npz")
    tensors = {}
    for name, array in read_tensors("timm_swin/timm_tiny.pt").items():
        parts = name.split(".")
        if "downsample" in parts:  # timm's sits one layer later
            parts[1] = str(int(parts[1]) - 1)
        if parts[0] != "head":
            tensors["encoder." + ".".join(parts)] = array
    model = SwinEncoder(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2)
    variables = to_variables(tensors, unfold_order=False)
    with jax.default_matmul_precision("highest"):
        features, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))(
            variables, reference["input"].transpose(0, 2, 3, 1)
        )
    raw_last = state["intermediates"]["encoder"]["stages_3"]["__call__"][0][0]
    assert relative_error(features[0][:, :8], reference["layer0_rows0_8"]) < 1e-5
    assert relative_error(features[1], reference["layer1"]) < 1e-5
    assert relative_error(features[2], reference["layer2"]) < 1e-5
    assert relative_error(raw_last, reference["layer3"]) < 1e-5
    assert relative_error(features[3], reference["norm"]) < 1e-5


@pytest.mark.parametrize(("name", "bands", "window"), [("c6_img96_w3", 6, 3), ("c3_img192_w6_official", 3, 6)])
def test_simmim_forward(golden, read_tensors, name, bands, window):
    reference = np.load(golden / "simmim" / f"{name}.npz")
    tensors = read_tensors(f"simmim/{name}.pth")
    depths = tuple(
        len({key.split(".")[4] for key in tensors if key.startswith(f"encoder.layers.{i}.blocks.")}) for i in range(4)
    )
    heads = tuple(tensors[f"encoder.layers.{i}.blocks.0.attn.relative_position_bias_table"].shape[1] for i in range(4))
    model = SimMIM(
        embed_dim=tensors["encoder.mask_token"].shape[-1],
        depths=depths,
        num_heads=heads,
        window_size=window,
        mlp_ratio=tensors["encoder.layers.0.blocks.0.mlp.fc1.bias"].size / tensors["encoder.mask_token"].size,
        in_channels=bands,
    )
    variables = to_variables(tensors, unfold_order=False)
    image, mask = reference["input"].transpose(0, 2, 3, 1), reference["mask"]
    with jax.default_matmul_precision("highest"):
        z = jax.jit(lambda v: model.apply(v, image, mask, method=SimMIM.encode))(variables)
        rec = jax.jit(lambda v: model.apply(v, image, mask))(variables)
    assert relative_error(z.transpose(0, 3, 1, 2), reference["z"]) < 1e-5
    assert relative_error(rec.transpose(0, 3, 1, 2), reference["rec"]) < 1e-5
