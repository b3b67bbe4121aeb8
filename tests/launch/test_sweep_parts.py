"""Spaces, the best config, claiming of trials: parts of sweeps that need no process."""

import math
import os
import runpy
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="sweeps need the extra 'sweep'")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from launch import sweep_space, sweep_trial  # noqa: E402
from launch.sweep_space import SweepError  # noqa: E402
from launch.sweep_study import SharedStudy, SweepPlan  # noqa: E402
from launch.sweep_trial import TrialJob, read_losses  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "configs" / "finetune_all_biomes.py"
RATE = {"optimizer.learning_rate": FloatDistribution(1e-6, 1.0, log=True)}


@pytest.fixture
def open_study(tmp_path):
    """Opens studies in one workdir, as several processes would; closed at the end."""
    opened = []

    def open_it(space=RATE, sampler="random", trials=100, prune_after=None):
        plan = SweepPlan(space=space, sampler=sampler, seed=0, trials=trials, prune_after=prune_after, described={})
        opened.append(SharedStudy(tmp_path / "out", None, plan))
        return opened[-1]

    yield open_it
    for study in opened:
        study.close()


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_the_shipped_space_fits_its_config(sampler):
    path = ROOT / "configs" / "sweeps" / "finetune.py"
    space = sweep_space.load_space(path, sampler)
    sweep_space.check_space(space, BASE, ["--config.epochs=3"], path)
    assert {"optimizer.learning_rate", "optimizer.weight_decay", "model.decoder_channels"} <= set(space)
    if sampler == "tpe":
        assert {"model.head_dropout", "model.drop_path_rate"} <= set(space)
        assert space["optimizer.learning_rate"].log
        assert isinstance(space["model.decoder_channels"], CategoricalDistribution)
    else:
        assert len(sweep_space.grid(space, 0)) == 36


@pytest.mark.parametrize(
    ("text", "sampler", "message"),
    [
        ("x = 1", "tpe", r"no get_space\(\), which --sampler tpe needs"),
        ("def get_space(): return {}", "tpe", "at least one field"),
        ("def get_space(): return {'seed': 3}", "tpe", "is 3; expected one of optuna.distributions"),
        ("def get_grid(): return {'seed': 3}", "grid", "is 3; expected a list of different values"),
        ("def get_grid(): return {'seed': [3, 3]}", "grid", "expected a list of different values"),
        ("def get_grid(): return {'optimiser.decay': ['all']}", "grid", "'optimiser.decay', .*did you mean optimizer"),
        ("def get_grid(): return {'model': [1]}", "grid", "names 'model', a field that the config lacks"),
        ("def get_grid(): return {'seed': [1, 2.5]}", "grid", "seed"),
        ("def get_grid(): return {'model.depths': [(1, 1)]}", "grid", "write a tuple as text"),
    ],
)
@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")  # Optuna's word on the tuple
def test_a_wrong_space_is_refused_by_name(tmp_path, text, sampler, message):
    path = tmp_path / "space.py"
    path.write_text(text)
    with pytest.raises(SweepError, match=message) as error:
        sweep_space.check_space(sweep_space.load_space(path, sampler), BASE, [], path)
    assert "space.py" in str(error.value) or "finetune_all_biomes.py" in str(error.value)


def test_the_best_config_derives_from_the_base_and_holds_every_set_field(tmp_path):
    overrides = ["--config.data.path=shards", "--config.epochs=7", "--config.optimizer.freeze=('encoder',)"]
    params = {
        "optimizer.learning_rate": 3.0000000000000004e-4,
        "model.decoder_channels": 64,
        "model.depths": "(1, 1, 1, 1)",
        "augment.turn": False,
        "schedule.kind": "cosine",
    }
    for base in (BASE, tmp_path / "mine.py"):
        (tmp_path / "mine.py").write_text(BASE.read_text())
        text = sweep_space.best_config(base, overrides, params, "Trial 4 of 9.")
        assert text.startswith('"""Trial 4 of 9.\n')
        assert ("from biomass_jax.configs import finetune_all_biomes as base" in text) == (base == BASE)
        (tmp_path / "best.py").write_text(text)
        config = runpy.run_path(str(tmp_path / "best.py"))["get_config"]()
        assert config.is_locked
        assert config.optimizer.learning_rate == 3.0000000000000004e-4
        assert (config.model.decoder_channels, config.model.depths) == (64, (1, 1, 1, 1))
        assert (config.augment.turn, config.schedule.kind) == (False, "cosine")
        assert (config.data.path, config.epochs, config.optimizer.freeze) == ("shards", 7, ("encoder",))
        assert config.optimizer.weight_decay == 0.03283253068408954  # the base's


def test_a_grid_has_each_combination_once_in_an_order_of_its_seed():
    space = {"a": CategoricalDistribution((1, 2, 3)), "b": CategoricalDistribution(("x", "y"))}
    first, other = sweep_space.grid(space, 0), sweep_space.grid(space, 1)
    key = lambda params: sorted(params.items())  # noqa: E731
    assert sorted(first, key=key) == [{"a": a, "b": b} for a in (1, 2, 3) for b in ("x", "y")]
    assert first == sweep_space.grid(space, 0) != other
    assert sorted(other, key=key) == sorted(first, key=key)


def test_tpe_looks_where_losses_were_low(open_study):
    study = open_study(sampler="tpe", trials=30)
    values = []
    while claim := study.claim():
        values.append((math.log10(claim.trial.params["optimizer.learning_rate"]) + 3) ** 2)
        study.finish(claim.trial, TrialState.COMPLETE, values[-1])
        claim.lock.release()
    assert len(values) == 30
    assert statistics.median(values[15:]) < 1.0  # 2.25 without looking: the exponent is uniform from -6 to 0


def test_a_trial_is_claimed_by_one_and_again_when_that_one_is_gone(open_study):
    one, other = open_study(trials=2), open_study(trials=2)
    first, second = one.claim(), other.claim()
    assert [first.trial.number, second.trial.number] == [0, 1]
    assert one.claim() is None and other.claim() is None
    assert one.orphans() == []  # each has its sweep
    one.report(first.trial, 1, 5.0)
    first.lock.release()
    again = other.claim()
    assert (again.trial.number, again.trial.params) == (0, first.trial.params)
    assert again.before.intermediate_values == {1: 5.0}
    other.finish(again.trial, TrialState.COMPLETE, 4.0)
    assert [trial.state for trial in one.trials()] == [TrialState.COMPLETE, TrialState.RUNNING]


def test_a_trial_whose_process_outlives_its_sweep_is_waited_for(open_study, tmp_path):
    one, other = open_study(), open_study()
    claim = one.claim()
    process = os.dup(claim.lock.handle)  # what a child inherits
    claim.lock.release()
    assert other.orphans() == [0]
    (tmp_path / "out" / ".locks" / "0000.owner").write_text("another machine")
    assert other.orphans() == []
    assert other.claim().trial.number == 1
    os.close(process)
    assert other.orphans() == []
    assert other.claim().trial.number == 0


def test_a_trial_cut_short_while_its_fields_were_drawn_gets_the_rest(open_study):
    space = RATE | {"n": IntDistribution(1, 9), "kind": CategoricalDistribution(("a", "b"))}
    study = open_study(space)
    begun = study.study.ask()
    rate = begun.suggest_float("optimizer.learning_rate", 1e-6, 1.0, log=True)
    claim = open_study(space).claim()
    assert claim.trial.number == 0
    assert claim.trial.params["optimizer.learning_rate"] == rate
    assert claim.trial.params.keys() == space.keys()


def test_a_grid_cut_short_before_a_trial_began_leaves_no_combination_out(open_study):
    space = {"a": CategoricalDistribution((1, 2, 3))}
    study = open_study(space, "grid")
    study.study.enqueue_trial(sweep_space.grid(space, 0)[0])  # and then it died
    found = []
    while claim := study.claim():
        found.append(claim.trial.params)
    assert found == sweep_space.grid(space, 0)


def test_pruning_begins_after_a_tenth_of_the_epochs_and_five_trials(open_study):
    study = open_study(prune_after=3)
    for _ in range(5):
        claim = study.claim()
        assert [study.report(claim.trial, epoch, 1.0) for epoch in (1, 2, 3)] == [False, False, False]
        study.finish(claim.trial, TrialState.COMPLETE, 1.0)
    bad, broken, good = (study.claim().trial for _ in range(3))
    assert [study.report(bad, epoch, 2.0) for epoch in (1, 2, 3)] == [False, False, True]
    assert [study.report(broken, epoch, math.nan) for epoch in (1, 2, 3)] == [False, False, True]
    assert [study.report(good, epoch, 0.5) for epoch in (1, 2, 3)] == [False, False, False]
    unpruned = open_study()
    assert not unpruned.report(unpruned.claim().trial, 3, 2.0)


def test_losses_are_read_while_the_file_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 5, "train/loss": 3.0}\n{"step": 9, "epoch": 1, "val/loss": 2.5}\n'
        '{"step": 18, "epoch": 2, "val/loss": null}\n{"step": 27, "epoch": 3, "val/lo'
    )
    losses = read_losses(path)
    assert losses[1] == 2.5 and math.isnan(losses[2]) and len(losses) == 2


def test_a_workdir_without_its_study_is_refused(open_study, tmp_path):
    open_study().close()
    (tmp_path / "out" / "study.db").unlink()
    with pytest.raises(SweepError, match="doesn't hold the study of .*sweep.json"):
        open_study()
    (tmp_path / "out" / "sweep.json").unlink()
    study = open_study()
    study.claim()
    (tmp_path / "out" / "sweep.json").unlink()
    with pytest.raises(SweepError, match="holds trials of a study 'sweep', but .*sweep.json isn't there"):
        open_study()


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""


def test_a_trials_process_holds_its_lock_and_is_killed_where_it_does_not_leave(open_study, monkeypatch):
    study = open_study()
    job = TrialJob(study.claim(), study.workdir / "trials" / "0000", slot=0)
    job.start([sys.executable, "-I", "-S", "-c", STUBBORN], None)
    end = time.monotonic() + 60
    while "deaf" not in job.tail():
        assert time.monotonic() < end
        time.sleep(0.01)
    job.pruned = True
    job.terminate()
    time.sleep(0.1)
    assert job.poll() is None  # it has GRACE seconds
    job.leave()
    assert study.orphans() == [0]
    monkeypatch.setattr(sweep_trial, "GRACE", 0)
    while (code := job.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert code == -signal.SIGKILL
    assert study.orphans() == []


def test_sweeps_share_a_database_and_not_their_trials(tmp_path):
    url = f"sqlite:///{tmp_path / 'all.db'}"
    plan = SweepPlan(space=RATE, sampler="random", seed=0, trials=3, prune_after=None, described={})
    for name in ("one", "other", "one"):
        study = SharedStudy(tmp_path / name, url, plan)
        study.claim()
        study.close()
    counts = dict.fromkeys(("one", "other"), 0)
    for name in counts:
        study = SharedStudy(tmp_path / name, url, plan)
        counts[name] = len(study.trials())
        study.close()
    assert counts == {"one": 2, "other": 1}
    assert not list(tmp_path.glob("*/study.db"))
