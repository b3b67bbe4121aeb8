"""Losses of a spread against SciPy's densities and plain loops, with their gradients; what must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from biomass_jax.tasks.losses import SPREAD_KINDS, finish, spread_pixel_losses, spread_sums

LEVELS = (0.05, 0.3, 0.95)
BETA = 0.7
SCALE = 25.0  # Mg/ha, of pinball's term of the mean
MORE = {"gaussian_nll": {}, "laplace_nll": {}, "beta_nll": {"nll_beta": BETA}}
MORE["pinball"] = {"quantile_levels": LEVELS, "mean_scale": SCALE}


def by_hand(outputs, label, kind, mean_scale=SCALE):
    """Each labelled pixel's loss in float64, of SciPy or of a loop."""
    outputs, label = np.asarray(outputs, np.float64), np.asarray(label, np.float64)
    losses = []
    for values, y in zip(outputs.reshape(-1, outputs.shape[-1]), label.ravel(), strict=True):
        if not y >= 0:
            continue
        if kind == "pinball":
            parts = [t * (y - q) if y >= q else (1 - t) * (q - y) for t, q in zip(LEVELS, values[1:], strict=True)]
            term = 0 if mean_scale is None else (y - values[0]) ** 2 / (2 * mean_scale)
            losses.append(sum(parts) / len(parts) + term)
            continue
        family = stats.laplace if kind == "laplace_nll" else stats.norm
        loss = -family.logpdf(y, values[0], np.exp(values[1]))
        losses.append(loss * np.exp(values[1]) ** (2 * BETA) if kind == "beta_nll" else loss)
    return np.array(losses)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    label = rng.uniform(0, 300, (6, 9, 7)).astype(np.float32)
    mean = label + rng.normal(0, 30, label.shape).astype(np.float32)
    label[rng.random(label.shape) < 0.6] = -1
    label[0, 0, :2] = 0, -0.5  # zero biomass is a label, anything below is none
    log_scale = rng.normal(3, 0.7, label.shape).astype(np.float32)
    quantiles = mean[..., None] + np.sort(rng.normal(0, 40, (*label.shape, 3)), axis=-1).astype(np.float32)
    outputs = {kind: np.stack([mean, log_scale], axis=-1) for kind in SPREAD_KINDS}
    outputs["pinball"] = np.concatenate([mean[..., None], quantiles], axis=-1)
    return {kind: jnp.asarray(value) for kind, value in outputs.items()}, jnp.asarray(label)


def loss(outputs, label, kind):
    return finish(*spread_sums(outputs, label, kind, **MORE[kind]), kind)


@pytest.mark.parametrize("kind", SPREAD_KINDS)
def test_sums_against_scipy_and_loops(batch, kind):
    outputs, label = batch[0][kind], batch[1]
    total, count = spread_sums(outputs, label, kind, **MORE[kind])
    expected = by_hand(outputs, label, kind)
    assert total.dtype == count.dtype == np.float32 and count == expected.size == int((label >= 0).sum())
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    np.testing.assert_allclose(loss(outputs, label, kind), expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", SPREAD_KINDS)
def test_pixel_losses_by_numpy_are_float64(batch, kind):
    outputs, label = np.asarray(batch[0][kind], np.float64), np.asarray(batch[1], np.float64)
    known = label >= 0
    for mean_scale in (SCALE, None):
        more = {"quantile_levels": LEVELS, "mean_scale": mean_scale} if kind == "pinball" else {}
        found = spread_pixel_losses(outputs[known], label[known], kind, **more)
        expected = by_hand(outputs, label, kind, mean_scale)
        if kind == "beta_nll":  # without its weight
            expected = expected / np.exp(outputs[known][:, 1]) ** (2 * BETA)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_hand_written_numbers():
    # sd 2 and an error of 2: ln(sqrt(2 pi) 2) + 1/2; b 2 and an error of 3: ln 4 + 3/2. Quantiles 6 and 12 of a label
    # of 10 at the levels 0.1 and 0.6: 0.1 * 4 and 0.4 * 2.
    label = jnp.asarray([[[10.0, -1.0]]])
    for kind, e, expected in (
        ("gaussian_nll", 2, np.log(2 * np.sqrt(2 * np.pi)) + 0.5),
        ("laplace_nll", 3, np.log(4) + 1.5),
    ):
        outputs = jnp.asarray([[[[10.0 - e, np.log(2)], [np.nan, np.nan]]]])
        np.testing.assert_allclose(spread_sums(outputs, label, kind), (expected, 1), rtol=1e-6)
    outputs = jnp.asarray([[[[7.0, 6.0, 12.0], [np.nan, np.nan, np.nan]]]])
    for scale, more in ((None, 0), (3.0, 1.5)):
        found = spread_sums(outputs, label, "pinball", quantile_levels=(0.1, 0.6), mean_scale=scale)
        np.testing.assert_allclose(found, ((0.4 + 0.8) / 2 + more, 1), rtol=1e-6)


def test_beta_of_0_is_the_likelihood_and_of_1_the_squared_error_to_the_mean(batch):
    outputs, label = batch[0]["beta_nll"], batch[1]
    plain, _ = spread_sums(outputs, label, "gaussian_nll")
    np.testing.assert_array_equal(spread_sums(outputs, label, "beta_nll", nll_beta=0.0)[0], plain)
    slope = jax.grad(lambda x: spread_sums(x, label, "beta_nll", nll_beta=1.0)[0])(outputs)[..., 0]
    np.testing.assert_allclose(slope, np.where(label >= 0, outputs[..., 0] - label, 0), rtol=1e-5, atol=1e-5)


def test_the_weight_of_beta_has_no_gradient(batch):
    """Of the weight times the likelihood: with the weight held, sigma^(2 beta) (1 - z^2) in ln sigma."""
    outputs, label = np.asarray(batch[0]["beta_nll"], np.float64), np.asarray(batch[1], np.float64)
    found = jax.grad(lambda x: spread_sums(x, batch[1], "beta_nll", nll_beta=BETA)[0])(batch[0]["beta_nll"])
    known = label >= 0
    weight = np.exp(2 * BETA * outputs[..., 1])
    z = (label - outputs[..., 0]) / np.exp(outputs[..., 1])
    slopes = [-weight * z / np.exp(outputs[..., 1]), weight * (1 - z**2)]
    # The closed form is the central difference of the likelihood, times the weight.
    for i, slope in enumerate(slopes):
        step = 1e-4 * np.eye(2)[i]
        ends = [spread_pixel_losses(outputs + sign * step, label, "gaussian_nll") for sign in (1, -1)]
        np.testing.assert_allclose(weight * (ends[0] - ends[1]) / 2e-4, slope, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found[..., i], np.where(known, slope, 0), rtol=2e-5, atol=1e-4)
    # With a gradient through the weight it would be another one by 2 beta times the loss.
    through = 2 * BETA * weight * spread_pixel_losses(outputs, label, "gaussian_nll")
    assert np.abs(through[known]).min() > 1


@pytest.mark.parametrize("kind", SPREAD_KINDS)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_outputs_without_a_label_have_no_influence(batch, kind, junk):
    outputs, label = batch[0][kind], batch[1]
    spoilt = jnp.where((label >= 0)[..., None], outputs, junk)
    assert loss(spoilt, label, kind) == loss(outputs, label, kind)
    slope = jax.grad(loss)(spoilt, label, kind)
    np.testing.assert_array_equal(slope, jax.grad(loss)(outputs, label, kind))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("kind", SPREAD_KINDS)
def test_a_nan_label_is_none_a_nan_at_a_label_shows_and_no_label_is_0(batch, kind):
    outputs, label = batch[0][kind], batch[1]
    assert loss(outputs, jnp.where(label >= 0, label, jnp.nan), kind) == loss(outputs, label, kind)
    for channel in range(outputs.shape[-1]):
        assert np.isnan(loss(outputs.at[0, 0, 0, channel].set(jnp.nan), label, kind))
    value, slope = jax.value_and_grad(loss)(outputs, jnp.full_like(label, -1), kind)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("kind", SPREAD_KINDS)
def test_micro_batches_add_up_to_the_global_loss(batch, kind):
    outputs, label = batch[0][kind], batch[1].at[:2].set(-1)
    parts = [
        spread_sums(outputs[rows], label[rows], kind, **MORE[kind]) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert parts[0][1] == 0
    total, count = (sum(values) for values in zip(*parts, strict=True))
    np.testing.assert_allclose(finish(total, count, kind), loss(outputs, label, kind), rtol=1e-6)


def test_unknown_kinds_and_other_shapes_are_refused(batch):
    outputs, label = batch[0]["pinball"], batch[1]
    with pytest.raises(ValueError, match="unknown loss 'rmse'; expected one of gaussian_nll, beta_nll, lap"):
        spread_sums(outputs, label, "rmse")
    with pytest.raises(ValueError, match=r"outputs \(6, 9, 7, 4\) and label \(6, 9, 7\); gaussian_nll takes .*, 2\]"):
        spread_sums(outputs, label, "gaussian_nll")
    with pytest.raises(ValueError, match=r"pinball takes outputs \[B, H, W, 3\]"):
        spread_sums(outputs, label, "pinball", quantile_levels=(0.1, 0.9))
