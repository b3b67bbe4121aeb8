"""Schedules against plain loops over every step."""

import bisect
import math

import jax
import numpy as np
import pytest

from biomass_jax.training.optimizer import create_schedule


def rates(steps, kind, **settings):
    return np.asarray(jax.jit(jax.vmap(create_schedule(kind, **settings)))(np.arange(steps)))


def warmed(t, start, peak, steps, after):
    return start + t * (peak - start) / steps if t < steps else after


@pytest.mark.parametrize("kind", ["constant", "plateau"])
def test_constant_after_a_warm_up(kind):
    found = rates(30, kind, learning_rate=3e-4, warmup_steps=10, warmup_from=1e-6)
    expected = [warmed(t, 1e-6, 3e-4, 10, 3e-4) for t in range(30)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(rates(3, kind, learning_rate=3e-4), 3e-4)


def test_cosine_runs_underneath_the_warm_up():
    # SimMIM's 100 epochs at one step an epoch: 10 of warm-up from 1e-6 to 2e-4, cosine to 1e-5.
    found = rates(120, "cosine", learning_rate=2e-4, warmup_steps=10, warmup_from=1e-6, total_steps=100, min_lr=1e-5)
    cosine = [1e-5 + 0.5 * (2e-4 - 1e-5) * (1 + math.cos(math.pi * t / 100)) for t in range(100)] + [1e-5] * 20
    expected = [warmed(t, 1e-6, 2e-4, 10, cosine[t]) for t in range(120)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # By hand: step 0, halfway up, the first step on the cosine (already below the peak), halfway down, the end.
    np.testing.assert_allclose(found[[0, 5, 10, 50, 100]], [1e-6, 1.005e-4, 1.953504e-4, 1.05e-4, 1e-5], rtol=1e-5)


def test_multistep_falls_at_its_milestones():
    # SimMIM's 800 epochs: 1e-4, warm-up of 10 from 5e-7, a tenth from epoch 700 on.
    found = rates(800, "multistep", learning_rate=1e-4, warmup_steps=10, warmup_from=5e-7, milestones=(700,), gamma=0.1)
    expected = [warmed(t, 5e-7, 1e-4, 10, 1e-4 if t < 700 else 1e-5) for t in range(800)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = rates(50, "multistep", learning_rate=1.0, milestones=(5, 20, 40), gamma=0.5)
    np.testing.assert_allclose(found, [0.5 ** bisect.bisect_right((5, 20, 40), t) for t in range(50)], rtol=1e-6)


def test_large_step_counts_keep_their_digits():
    schedule = create_schedule("cosine", learning_rate=1.0, total_steps=2_000_000)
    for step in (1, 999_999, 1_999_000):
        expected = 0.5 * (1 + math.cos(math.pi * step / 2_000_000))
        np.testing.assert_allclose(schedule(step), expected, atol=2e-7)
        assert schedule(np.int32(step)).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("cosine", {}, "warm-up of 0 steps must be shorter than all 0"),
        ("cosine", {"warmup_steps": 10, "total_steps": 10}, "warm-up of 10 steps must be shorter than all 10"),
        ("multistep", {"milestones": (7, 7)}, r"milestones \[7, 7\] must increase"),
        ("multistep", {"milestones": (5,), "warmup_steps": 6}, r"milestones \[5\] must increase from 6 on"),
    ],
)
def test_nonsense_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        create_schedule(kind, learning_rate=1.0, **settings)
