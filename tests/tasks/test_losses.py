"""Losses against hand-written numbers and plain loops; what must not count, and what must add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.tasks.losses import KINDS, finish, loss_sums

DELTA = 2.0


def loss(prediction, label, kind):
    return finish(*loss_sums(prediction, label, kind, huber_delta=DELTA), kind)


def in_a_loop(prediction, label, kind):
    """Total and count in float64, pixel by pixel."""
    total, count = 0.0, 0
    for p, y in zip(np.ravel(prediction).astype(float), np.ravel(label).astype(float), strict=True):
        if y >= 0:
            e = abs(p - y)
            huber = e * e / 2 if e <= DELTA else DELTA * (e - DELTA / 2)
            total += {"rmse": e * e, "mse": e * e, "mae": e, "huber": huber}[kind]
            count += 1
    return total, count


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    label = rng.uniform(0, 300, (6, 9, 7)).astype(np.float32)
    label[rng.random(label.shape) < 0.8] = -1
    label[0, 0, :2] = 0, -0.5  # zero biomass is a label, anything below is none
    prediction = label + rng.normal(0, 3, label.shape).astype(np.float32)
    return jnp.asarray(prediction), jnp.asarray(label)


@pytest.mark.parametrize(
    ("kind", "total", "result"),
    [("rmse", 26, np.sqrt(26 / 3)), ("mse", 26, 26 / 3), ("mae", 8, 8 / 3), ("huber", 0.5 + 2 * (3 - 1) + 6, 3.5)],
)
def test_hand_written_numbers(kind, total, result):
    # Errors 1, -3 and 4 (exactly, huber with delta 2: 1/2, 2 (3 - 1), 2 (4 - 1)); the pixel of -1 has no label.
    prediction, label = jnp.asarray([[[11.0, 47.0, 4.0, 99.0]]]), jnp.asarray([[[10.0, 50.0, 0.0, -1.0]]])
    found, count = loss_sums(prediction, label, kind, huber_delta=DELTA)
    assert (float(found), float(count)) == (total, 3)
    np.testing.assert_allclose(finish(found, count, kind), result, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_loop_with_its_gradient(batch, kind):
    total, count = loss_sums(*batch, kind, huber_delta=DELTA)
    expected, pixels = in_a_loop(*batch, kind)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert total.dtype == count.dtype == np.float32 and count == pixels
    value = np.sqrt(expected / pixels) if kind == "rmse" else expected / pixels
    np.testing.assert_allclose(loss(*batch, kind), value, rtol=1e-5)
    error = np.asarray(batch[0] - batch[1], np.float64)
    slope = {
        "rmse": error / value / pixels,
        "mse": 2 * error / pixels,
        "mae": np.sign(error) / pixels,
        "huber": np.clip(error, -DELTA, DELTA) / pixels,
    }[kind]
    gradient = jax.grad(loss)(*batch, kind)
    np.testing.assert_allclose(gradient, np.where(batch[1] >= 0, slope, 0), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_predictions_without_a_label_have_no_influence(batch, kind, junk):
    prediction, label = batch
    spoilt = jnp.where(label >= 0, prediction, junk)
    assert loss(spoilt, label, kind) == loss(prediction, label, kind)
    np.testing.assert_array_equal(jax.grad(loss)(spoilt, label, kind), jax.grad(loss)(prediction, label, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_label_is_none_and_a_nan_prediction_at_a_label_shows(batch, kind):
    prediction, label = batch
    assert loss(prediction, jnp.where(label >= 0, label, jnp.nan), kind) == loss(prediction, label, kind)
    assert np.isnan(loss(prediction.at[0, 0, 0].set(jnp.nan), label, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_no_labels_give_zero_and_zero_gradients(batch, kind):
    prediction, _ = batch
    value, gradient = jax.value_and_grad(loss)(prediction, jnp.full_like(prediction, -1), kind)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_has_a_zero_gradient(batch, kind):
    _, label = batch
    value, gradient = jax.value_and_grad(loss)(label, label, kind)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_global_loss_and_its_gradient(batch, kind):
    prediction, label = batch
    # The first part has no labels at all, and the others have different numbers of them.
    label = label.at[:2].set(-1)
    sums_and_gradient = jax.value_and_grad(lambda p, y: loss_sums(p, y, kind, huber_delta=DELTA), has_aux=True)
    totals, counts, gradients = [], [], []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        (total, count), gradient = sums_and_gradient(prediction[rows], label[rows])
        totals.append(total), counts.append(count), gradients.append(gradient)
    assert len({float(count) for count in counts}) == 3 and counts[0] == 0
    value, slope = jax.value_and_grad(finish)(sum(totals), sum(counts), kind)
    expected, expected_gradient = jax.value_and_grad(loss)(prediction, label, kind)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope * jnp.concatenate(gradients), expected_gradient, rtol=1e-5, atol=1e-9)
    means = [loss(prediction[rows], label[rows], kind) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    assert abs(np.mean(means) - expected) > 0.05 * expected  # what averaging the parts would give instead


def test_bfloat16_predictions_are_compared_and_summed_in_float32():
    # 301 is no bfloat16 number (its neighbours are 300 and 302).
    total, _ = loss_sums(jnp.full((1, 64, 64), 300, jnp.bfloat16), jnp.full((1, 64, 64), 301.0), "mse")
    assert total == 4096


def test_unknown_kinds_and_other_shapes_are_refused():
    one = jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match="unknown loss 'l2'; expected one of rmse, mse, mae, huber"):
        loss_sums(one, one, "l2")
    with pytest.raises(ValueError, match="unknown loss 'l2'"):
        finish(jnp.ones(()), jnp.ones(()), "l2")
    with pytest.raises(ValueError, match=r"prediction \(1, 2, 2, 1\) and label \(1, 2, 2\)"):
        loss_sums(one[..., None], one, "mse")
