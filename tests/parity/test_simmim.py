"""SimMIM against the PyTorch original: encoder output, reconstruction, loss and gradients.

How its checkpoints are converted is in tests/convert (`test_convert.py`: to another window, tensor by tensor and stage
by stage; `test_export.py`: back to the original's layout).
"""

import functools
import re

import jax
import numpy as np
import pytest

from biomass_jax.models.simmim import SimMIM
from biomass_jax.tasks.losses import simmim_chip_sums, simmim_finish
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


@pytest.fixture(scope="module")
def run(golden, read_tensors):
    """Runs a case: (golden arrays, our encoder output, reconstruction, loss, gradients where asked for)."""

    @functools.cache
    def of(name, with_gradients):
        reference = np.load(golden / "simmim" / f"{name}.npz")
        tensors = read_tensors(f"simmim/{name}.pth")
        model = model_of(tensors, CASES[name])
        image, mask = reference["input"].transpose(0, 2, 3, 1), reference["mask"].astype(np.float32)

        def forward(params):
            rec, state = model.apply(
                {"params": params}, image, mask, train=True, capture_intermediates=lambda _, method: method == "encode"
            )
            total, count = (sums.sum() for sums in simmim_chip_sums(image, rec, mask, patch_size=PATCH))
            return simmim_finish(total, count, bands=model.in_channels), (state["intermediates"]["encode"][0], rec)

        function = jax.value_and_grad(forward, has_aux=True) if with_gradients else lambda p: (forward(p), None)
        # Compiling is all that takes time here: without LLVM's optimisations, half as long.
        step = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
        with jax.default_matmul_precision("highest"):
            (loss, (z, rec)), gradients = step(to_variables(tensors, unfold_order=False)["params"])
        return reference, z, rec, loss, gradients

    return of


@pytest.mark.parametrize(("name", "with_gradients"), [("c6_img96_w3", True), ("c3_img192_w6_official", False)])
def test_encoder_output_reconstruction_and_loss(run, name, with_gradients):
    reference, z, rec, loss, _ = run(name, with_gradients)
    assert relative_error(z.transpose(0, 3, 1, 2), reference["z"]) < 1e-5
    assert relative_error(rec.transpose(0, 3, 1, 2), reference["rec"]) < 1e-5
    assert relative_error(loss, reference["loss"]) < 1e-5


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", ["c6_img96_w3", pytest.param("c3_img192_w6_official", marks=pytest.mark.slow)])
def test_gradients(run, name):
    reference, *_, gradients = run(name, True)
    golden = {key.removeprefix("grad."): reference[key] for key in reference.files if key.startswith("grad.")}
    expected = leaves(to_variables(golden, unfold_order=False)["params"])
    ours = leaves(gradients)
    assert len(expected) == 6
    assert {p: e for p in expected if not (e := relative_error(ours[p], expected[p])) < 1e-4} == {}
