"""The golden models, read once and compiled once a session."""

import jax
import numpy as np
import pytest

from biomass_jax.convert import torch_file
from biomass_jax.models.biomass import BiomassModel
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
