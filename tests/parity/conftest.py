"""The golden models, read once and compiled once a session."""

import jax
import numpy as np
import pytest

from biomass_jax.convert import torch_file
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.tasks.losses import finish, loss_sums
from tests.parity.torch_names import to_variables

MICRO = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "mlp_ratio": 2, "decoder_channels": 8}


@pytest.fixture(scope="session")
def read_tensors(golden):
    """Reads a golden checkpoint: {torch name: array}."""

    def read(name):
        root = torch_file.read(golden / name).root
        return {key: tensor.array() for key, tensor in root.get("model", root).items()}

    return read


@pytest.fixture(scope="session")
def micro_variables(read_tensors):
    """Variables of the micro granite model."""
    return to_variables(read_tensors("micro/model.pt"), unfold_order=True)


@pytest.fixture(scope="session")
def micro_eval(golden, micro_variables):
    """Golden arrays of an evaluation, and our output with every module's intermediate output."""

    def capture(module, method):
        return method in ("__call__", "_attend")

    def run(name):
        reference = np.load(golden / "micro" / f"eval_{name}.npz")
        model = BiomassModel(**MICRO)
        with jax.default_matmul_precision("highest"):
            output, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=capture))(
                micro_variables, reference["input"].transpose(0, 2, 3, 1)
            )
        return reference, output, state["intermediates"]

    return run


@pytest.fixture(scope="session")
def make_micro_step(golden):
    """Makes for a float type (params, batch_stats) -> loss, output, gradients and new batch_stats in train mode, on
    the golden batch.
    """

    def make(dtype):
        batch = np.load(golden / "micro" / "train_step.npz")
        model = BiomassModel(**MICRO, drop_path_rate=0.0, head_dropout=0.0, dtype=dtype)
        image, target = batch["input"].transpose(0, 2, 3, 1).astype(dtype), batch["target"].astype(dtype)

        def total_of(params, batch_stats):
            variables = {"params": params, "batch_stats": batch_stats}
            output, state = model.apply(variables, image, train=True, mutable=["batch_stats"])
            total, count = loss_sums(output, target, "rmse")
            return total, (count, output, state["batch_stats"])

        @jax.jit
        def step(params, batch_stats):
            (total, (count, output, batch_stats)), gradients = jax.value_and_grad(total_of, has_aux=True)(
                params, batch_stats
            )
            # As accumulation has it: the derivative of the loss by the sum, times the gradient of the sum.
            loss, slope = jax.value_and_grad(finish)(total, count, "rmse")
            return loss, output, jax.tree.map(lambda g: slope * g, gradients), batch_stats

        return step

    return make


@pytest.fixture(scope="session")
def micro_step(make_micro_step):
    """The step in float32."""
    return make_micro_step(np.float32)
