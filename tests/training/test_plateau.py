"""Plateau and early stopping against tables computed by hand from torch's and Lightning's rules."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.convert.convert import read
from biomass_jax.convert.declared import Options
from biomass_jax.training.plateau import (
    early_stop_init,
    early_stop_step,
    plateau_from_bundle,
    plateau_init,
    plateau_step,
)

NAN = math.nan

# factor 0.1, patience 2, relative threshold 0.01, cooldown 2, lr 1 at first, never below 0.05.
# loss, then afterwards: best, bad epochs, cooldown left, lr.
PLATEAU = [
    (100.0, 100.0, 0, 0, 1.0),  # anything is better than nothing
    (99.5, 100.0, 1, 0, 1.0),  # lower, but not below 100 * 0.99 = 99: bad
    (98.9, 98.9, 0, 0, 1.0),  # below 99: better
    (NAN, 98.9, 1, 0, 1.0),  # NaN is never better
    (98.9, 98.9, 2, 0, 1.0),  # two bad ones: patience holds
    (98.0, 98.9, 0, 2, 0.1),  # 98.9 * 0.99 = 97.911, so the third bad one in a row: lr * 0.1, and two epochs of rest
    (120.0, 98.9, 0, 1, 0.1),  # bad, but resting: not counted
    (120.0, 98.9, 0, 0, 0.1),  # still resting (the counter is read before it falls)
    (120.0, 98.9, 1, 0, 0.1),
    (97.0, 97.0, 0, 0, 0.1),  # better: the count starts anew
    (97.0, 97.0, 1, 0, 0.1),
    (97.0, 97.0, 2, 0, 0.1),
    (97.0, 97.0, 0, 2, 0.05),  # 0.01 would be less than min_lr 0.05
    (90.0, 90.0, 0, 1, 0.05),  # a better one counts as such also while resting
    (90.0, 90.0, 0, 0, 0.05),
    (90.0, 90.0, 1, 0, 0.05),
    (90.0, 90.0, 2, 0, 0.05),
    (90.0, 90.0, 0, 2, 0.05),  # nothing left to reduce, but the rest starts all the same
]

# patience 3, min_delta 0.5. loss, then afterwards: best, epochs waited, stop.
EARLY = [
    (10.0, 10.0, 0, False),
    (9.6, 10.0, 1, False),  # 9.6 + 0.5 is not below 10
    (9.5, 10.0, 2, False),  # nor is 10 below 10
    (9.4, 9.4, 0, False),  # better: the wait starts anew
    (9.4, 9.4, 1, False),
    (12.0, 9.4, 2, False),
    (9.0, 9.4, 3, True),  # the third epoch without a better one
]


def test_plateau_against_a_table_by_hand():
    state = plateau_init(1.0, factor=0.1, patience=2, threshold=0.01, min_lr=0.05) | {"cooldown": 2}
    for epoch, (loss, best, bad, rest, lr) in enumerate(PLATEAU, start=1):
        before = dict(state)
        new = plateau_step(state, loss)
        assert state == before  # a new dictionary
        state = new
        found = (state["best"], state["num_bad_epochs"], state["cooldown_counter"], state["lr"])
        assert found == (best, bad, rest, pytest.approx(lr, rel=1e-15)), f"epoch {epoch}"
        assert state["last_epoch"] == epoch


def test_granites_settings_reduce_after_eleven_bad_epochs():
    state = plateau_init(3e-4, factor=0.1, patience=10, threshold=1e-4)
    rates = []
    for loss in [50.0, *[50.0] * 11, *[49.996] * 11]:  # 49.996 is not 1e-4 better than 50
        state = plateau_step(state, loss)
        rates.append(state["lr"])
    assert rates == pytest.approx([3e-4] * 11 + [3e-5] * 11 + [3e-6])


def test_a_change_not_above_eps_is_not_made():
    state = plateau_init(1e-8, factor=0.1, patience=0, threshold=0.0)
    state = plateau_step(plateau_step(state, 1.0), 1.0)
    assert state["lr"] == 1e-8  # 0.9e-8 less is not more than eps
    assert state["num_bad_epochs"] == 0
    state = plateau_init(1e-8, factor=0.1, patience=0, threshold=0.0) | {"eps": 0.0}
    assert plateau_step(plateau_step(state, 1.0), 1.0)["lr"] == pytest.approx(1e-9)


def test_a_state_survives_json_and_arrays():
    state = plateau_init(1.0, factor=0.1, patience=2, threshold=0.01, min_lr=0.05) | {"cooldown": 2}
    stop = early_stop_init(3, 0.5)
    for loss, *_ in PLATEAU[:6]:
        state, stop = plateau_step(state, loss), early_stop_step(stop, 5.0)
    for stored in (
        json.loads(json.dumps(state)),
        {name: np.asarray(value) for name, value in state.items()},
        {name: jnp.asarray(value) for name, value in state.items()},
    ):
        later = plateau_step(stored, 120.0)
        assert later == pytest.approx(plateau_step(state, 120.0))
        assert {type(value) for value in later.values()} == {int, float}
        assert type(later["patience"]) is int
    assert early_stop_step(json.loads(json.dumps(stop)), 5.0) == early_stop_step(stop, 5.0)


def test_the_owed_step_is_made_once():
    # Two epochs seen, the third's loss owed; patience 0, so that a bad epoch shows in the rate.
    stored = {"factor": 0.5, "patience": 0.0, "threshold": 1e-4, "cooldown": 0.0, "cooldown_counter": 0.0}
    stored |= {"best": 10.0, "num_bad_epochs": 0.0, "last_epoch": 2.0, "min_lr": 0.0, "owed_loss": 11.0}
    state = plateau_from_bundle({"lr": 0.2, "plateau": stored})
    assert (state["lr"], state["last_epoch"], state["best"], state["eps"]) == (0.1, 3, 10.0, 1e-8)
    settled = plateau_from_bundle({"lr": 0.2, "plateau": stored | {"owed_loss": NAN}})
    assert (settled["lr"], settled["last_epoch"]) == (0.2, 2)
    # What a run of ours stores owes nothing.
    assert plateau_from_bundle({"lr": state["lr"], "plateau": state}) == state
    assert plateau_from_bundle({"lr": 0.2}) is None


def test_a_real_lightning_file_goes_on_where_it_stopped(golden):
    found = read(golden / "ckpt_micro_cli" / "lightning.ckpt", options=Options(statistics="granite"))
    stored = found.optimizer["plateau"]
    assert (stored["best"], stored["num_bad_epochs"], stored["last_epoch"]) == (122.44294738769531, 1, 2)
    # The third epoch's loss is below 122.44295 * (1 - 1e-4) = 122.43070, so the count of bad epochs starts anew.
    assert stored["owed_loss"] == 122.42398071289062
    state = plateau_from_bundle(found.optimizer)
    assert (state["best"], state["num_bad_epochs"], state["last_epoch"]) == (122.42398071289062, 0, 3)
    assert (state["lr"], state["patience"], state["factor"]) == (0.00031406904191973693, 10, 0.1)


def test_early_stopping_against_a_table_by_hand():
    state = early_stop_init(3, 0.5)
    for epoch, (loss, best, waited, stop) in enumerate(EARLY, start=1):
        state = early_stop_step(state, loss)
        assert (state["best"], state["wait_count"], state["stop"]) == (best, waited, stop), f"epoch {epoch}"


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_at_once(loss):
    state = early_stop_step(early_stop_step(early_stop_init(100), 10.0), loss)
    assert state["stop"] and state["best"] == 10.0
