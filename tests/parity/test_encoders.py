"""Encoders of other origins: timm's Swin."""

import jax
import numpy as np

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
