"""Four AdamW steps of the granite classes in small against the PyTorch original (tests/golden/README.md: adamw4).

Adam divides each gradient by its own size, so an element whose gradient is small moves by the rounding of its gradient
as far as others by theirs, and one preactivation that rounding takes across a ReLU's corner changes later gradients:
what several float32 steps lead to differs from machine to machine. Compared is what doesn't: four steps in float64,
which rounds alike everywhere, with the original's; and at the parameters of each of them float32's loss, gradients and
statistics with float64's. The first step's own arrays are in test_micro_model.py, AdamW against a NumPy loop in
tests/training/test_optimizer.py.
"""

import jax
import numpy as np
import pytest

from biomass_jax.bundle import flatten
from biomass_jax.training.optimizer import apply_updates, create_optimizer
from tests.parity.torch_names import relative_error, to_variables
from tests.precision import float64

pytestmark = pytest.mark.slow  # compiles the step for two types

LEARNING_RATE, WEIGHT_DECAY = 3.1406904191973693e-4, 0.03283253068408954
# Gradients that are exactly 0 in truth: what is left of them is rounding, in float64 too.
ZERO = 1e-9
# Of a tensor's largest gradient. The coarsest pooling's norm over two numbers and a ReLU's corner make 4e-4 of rounding
# at one of the four steps; a fault in the model's mathematics makes a hundredth or more.
ROUNDING = 2e-3
# Of the loss, and of a tensor's largest statistic: sums of a few thousand numbers. In the original they are float32's.
ROUNDING_OF_SUMS = 1e-5


def four_steps(step, variables):
    """Losses, parameters before each step and after the last, gradients of each step, statistics afterwards."""
    params, statistics = variables["params"], variables["batch_stats"]
    optimizer = create_optimizer(params, weight_decay=WEIGHT_DECAY, decay="all")
    update = jax.jit(optimizer.update)
    losses, places, slopes, state = [], [(params, statistics)], [], optimizer.init(params)
    with jax.default_matmul_precision("highest"):
        for _ in range(4):
            loss, _, gradients, statistics = step(params, statistics)
            updates, state = update(gradients, state, params)
            params = apply_updates(params, updates, LEARNING_RATE)
            losses.append(float(loss))
            places.append((params, statistics))
            slopes.append(jax.device_get(gradients))
    return losses, jax.device_get(places), slopes


@pytest.fixture(scope="module")
def in_float64(micro_variables, make_micro_step):
    with float64():
        variables = jax.tree.map(lambda x: x.astype(np.float64), micro_variables)
        return four_steps(make_micro_step(np.float64), variables)


@pytest.fixture(scope="module")
def reference(golden):
    """Losses, parameters and batch statistics of the original; it keeps tensors whose true gradient isn't 0."""
    arrays = np.load(golden / "micro" / "adamw4.npz")
    tensors = {key[2:]: arrays[key] for key in arrays.files if key[:2] in ("p.", "b.")}
    variables = to_variables(tensors, unfold_order=True)
    return arrays["losses"], flatten(variables["params"]), flatten(variables["batch_stats"])


@pytest.fixture(scope="module")
def in_float32(in_float64, micro_step):
    """At the parameters of each step in float64: loss, gradients and statistics afterwards."""
    found = []
    for params, statistics in in_float64[1][:4]:
        rounded = jax.tree.map(np.float32, (params, statistics))
        with jax.default_matmul_precision("highest"):
            loss, _, gradients, after = micro_step(*rounded)
        found.append((float(loss), flatten(jax.device_get(gradients)), flatten(jax.device_get(after))))
    return found


def test_losses_of_four_steps(in_float32, in_float64, reference):
    expected = reference[0]
    assert len(expected) == 4 and expected[3] < expected[0] - 0.05
    np.testing.assert_allclose(in_float64[0], expected, rtol=1e-6)
    np.testing.assert_allclose([loss for loss, _, _ in in_float32], in_float64[0], rtol=ROUNDING_OF_SUMS)


def test_parameters_after_four_steps(in_float64, reference):
    places, expected = in_float64[1], reference[1]
    before, ours = flatten(places[0][0]), flatten(places[4][0])
    assert len(expected) >= 9
    for path, value in expected.items():
        assert ours[path].dtype == np.float64
        assert np.abs(ours[path] - value).max() < 3e-6, path  # the original's own float32
        assert np.abs(before[path] - value).max() > 5e-4, path  # four steps of about 3e-4 each


def test_statistics_after_four_steps(in_float64, reference):
    before, ours = (flatten(in_float64[1][number][1]) for number in (0, 4))
    expected = reference[2]
    assert len(expected) >= 3
    assert {path: e for path in expected if not (e := relative_error(ours[path], expected[path])) < 1e-5} == {}
    assert all(relative_error(before[path], expected[path]) > 1e-2 for path in expected)


def test_gradients_of_each_step_at_the_same_parameters(in_float32, in_float64):
    for (_, found, _), slopes in zip(in_float32, in_float64[2], strict=True):
        truth = flatten(slopes)
        zero = {path for path, slope in truth.items() if np.abs(slope).max() < ZERO}
        errors = {path: relative_error(found[path], truth[path]) for path in truth.keys() - zero}
        assert len(errors) > 150
        assert {path: error for path, error in errors.items() if not error < ROUNDING} == {}


def test_statistics_of_each_step_at_the_same_parameters(in_float32, in_float64):
    for (_, _, found), (_, after) in zip(in_float32, in_float64[1][1:], strict=True):
        truth = flatten(after)
        errors = {path: relative_error(found[path], truth[path]) for path in truth}
        assert len(errors) >= 3
        assert {path: error for path, error in errors.items() if not error < ROUNDING_OF_SUMS} == {}
