"""SimMIM against the PyTorch original: encoder output, reconstruction, loss and gradients.

How its checkpoints are converted is in tests/convert (`test_convert.py`: to another window, tensor by tensor and stage
by stage; `test_export.py`: back to the original's layout).
"""

import re

import jax
import numpy as np
import pytest

from biomass_jax.models.simmim import SimMIM
from biomass_jax.training.pretrain_loss import simmim_finish, simmim_loss_sums
from tests.parity.torch_names import relative_error, to_variables

CASES = {"c6_img96_w3": 3, "c3_img192_w6_official": 6}  # name -> window
PATCH = 4


def model_of(tensors, window):
    """The model of a checkpoint's own shapes."""
    blocks = [re.match(r"encoder\.layers\.(\d)\.blocks\.(\d+)\.norm1\.bias", key) for key in tensors]
    numbers = [(int(found[1]), int(found[2])) for found in blocks if found]
    table = "encoder.layers.{}.blocks.0.attn.relative_position_bias_table"
    width = tensors["encoder.mask_token"].size
    return SimMIM(
        embed_dim=width,
        depths=tuple(sum(stage == i for stage, _ in numbers) for i in range(4)),
        num_heads=tuple(tensors[table.format(i)].shape[1] for i in range(4)),
        window_size=window,
        mlp_ratio=tensors["encoder.layers.0.blocks.0.mlp.fc1.bias"].size / width,
        in_channels=tensors["encoder.patch_embed.proj.weight"].shape[1],
    )


@pytest.fixture(scope="module", params=CASES)
def case(request, golden, read_tensors):
    """(golden arrays, our encoder output, reconstruction, loss, gradients), compiled once a case."""
    reference = np.load(golden / "simmim" / f"{request.param}.npz")
    tensors = read_tensors(f"simmim/{request.param}.pth")
    model = model_of(tensors, CASES[request.param])
    image, mask = reference["input"].transpose(0, 2, 3, 1), reference["mask"].astype(np.float32)

    def forward(params):
        rec, state = model.apply(
            {"params": params}, image, mask, train=True, capture_intermediates=lambda _, method: method == "encode"
        )
        total, count = simmim_loss_sums(image, rec, mask, patch_size=PATCH)
        return simmim_finish(total, count, bands=model.in_channels), (state["intermediates"]["encode"][0], rec)

    params = to_variables(tensors, unfold_order=False)["params"]
    with jax.default_matmul_precision("highest"):
        (loss, (z, rec)), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
    return reference, z, rec, loss, gradients


def test_encoder_output_reconstruction_and_loss(case):
    reference, z, rec, loss, _ = case
    assert relative_error(z.transpose(0, 3, 1, 2), reference["z"]) < 1e-5
    assert relative_error(rec.transpose(0, 3, 1, 2), reference["rec"]) < 1e-5
    assert relative_error(loss, reference["loss"]) < 1e-5


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_gradients(case):
    reference, *_, gradients = case
    golden = {key.removeprefix("grad."): reference[key] for key in reference.files if key.startswith("grad.")}
    expected = leaves(to_variables(golden, unfold_order=False)["params"])
    ours = leaves(gradients)
    assert len(expected) == 6
    assert {p: e for p in expected if not (e := relative_error(ours[p], expected[p])) < 1e-4} == {}
