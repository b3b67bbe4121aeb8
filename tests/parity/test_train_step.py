"""Four AdamW steps of the granite classes in small against the PyTorch original (tests/golden/README.md: adamw4).

The first step's output, loss, gradients and statistics are compared in test_micro_model.py.
"""

import jax
import numpy as np
import pytest

from biomass_jax.bundle import flatten
from biomass_jax.training.optimizer import apply_updates, create_optimizer
from tests.parity.torch_names import relative_error, to_variables

LEARNING_RATE, WEIGHT_DECAY = 3.1406904191973693e-4, 0.03283253068408954


@pytest.fixture(scope="module")
def four_steps(micro_variables, micro_step):
    """Our losses of four steps, parameters and batch statistics afterwards."""
    params, statistics = micro_variables["params"], micro_variables["batch_stats"]
    optimizer = create_optimizer(params, weight_decay=WEIGHT_DECAY, decay="all")
    update = jax.jit(optimizer.update)
    losses, state = [], optimizer.init(params)
    with jax.default_matmul_precision("highest"):
        for _ in range(4):
            loss, _, gradients, statistics = micro_step(params, statistics)
            updates, state = update(gradients, state, params)
            params = apply_updates(params, updates, LEARNING_RATE)
            losses.append(float(loss))
    return losses, params, statistics


@pytest.fixture(scope="module")
def reference(golden):
    """Losses, parameters and batch statistics of the original; it keeps tensors whose true gradient isn't 0."""
    arrays = np.load(golden / "micro" / "adamw4.npz")
    tensors = {key[2:]: arrays[key] for key in arrays.files if key[:2] in ("p.", "b.")}
    variables = to_variables(tensors, unfold_order=True)
    return arrays["losses"], flatten(variables["params"]), flatten(variables["batch_stats"])


def test_losses_of_four_steps(four_steps, reference):
    losses, expected = four_steps[0], reference[0]
    assert len(expected) == 4 and expected[3] < expected[0] - 0.05
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_parameters_after_four_steps(four_steps, reference, micro_variables):
    ours, before, expected = flatten(four_steps[1]), flatten(micro_variables["params"]), reference[1]
    assert len(expected) >= 9
    for path, value in expected.items():
        found, old = np.asarray(ours[path]), before[path]
        assert np.abs(found - value).max() < 1e-5, path
        assert np.abs(old - value).max() > 5e-4, path  # four steps of about 3e-4 each


def test_statistics_after_four_steps(four_steps, reference):
    ours, expected = flatten(four_steps[2]), reference[2]
    assert len(expected) >= 3
    assert {path: e for path in expected if not (e := relative_error(ours[path], expected[path])) < 1e-5} == {}
