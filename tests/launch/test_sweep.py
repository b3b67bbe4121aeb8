"""Sweeps as a user runs them, with a training that takes no time."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="sweeps need the extra 'sweep'")

from biomass_jax.runtime.lock import one_writer  # noqa: E402
from launch import sweep  # noqa: E402

pytestmark = pytest.mark.slow  # many, of a second and more each

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_training.py"))]
DRIVER = """
import sys
from launch import sweep
sweep.POLL, sweep.page = 0.02, lambda *_: ""  # drawing takes longer than all the rest
sys.exit(sweep.main(sys.argv[2:], program=[sys.executable, "-I", "-S", sys.argv[1]]))
"""

CONFIG = """
from ml_collections import config_dict

def get_config():
    config = config_dict.ConfigDict({"mode": "finetune", "epochs": 3})
    config.optimizer = config_dict.ConfigDict({"learning_rate": 1e-3, "weight_decay": 0.1})
    config.model = config_dict.ConfigDict({"crash": "never", "pause": 0.0})
    config.model.decoder_channels = config_dict.placeholder(int)
    return config.lock()
"""
SPACE = """
from optuna.distributions import CategoricalDistribution, FloatDistribution

def get_space():
    return {{"optimizer.learning_rate": FloatDistribution(1e-6, 1.0, log=True)}}

def get_grid():
    return {grid}
"""


class World:
    """A folder with a config and a space, and sweeps in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "base.py").write_text(CONFIG)
        self.grid({"optimizer.learning_rate": [1e-4, 1e-3, 1e-2]})

    def grid(self, grid: dict) -> None:
        (self.folder / "space.py").write_text(SPACE.format(grid=grid))

    def arguments(self, *more: str) -> list[str]:
        names = ("config", "base.py"), ("space", "space.py"), ("workdir", "out")
        return [*(text for name, file in names for text in (f"--{name}", str(self.folder / file))), *more]

    def run(self, *more: str) -> int:
        return sweep.main(self.arguments(*more), program=FAKE)

    def start(self, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, FAKE[-1], *self.arguments(*more)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def trials(self) -> list:
        storage = optuna.storages.RDBStorage(f"sqlite:///{self.out / 'study.db'}")
        trials = optuna.load_study(study_name="sweep", storage=storage).trials
        storage.remove_session()
        storage.engine.dispose()
        return trials

    def notes(self, number: int) -> str:
        path = self.out / "trials" / f"{number:04d}" / "notes.txt"
        return path.read_text() if path.exists() else ""

    def losses(self, number: int) -> list[float]:
        lines = (self.out / "trials" / f"{number:04d}" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["val/loss"] for line in lines]


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setattr(sweep, "POLL", 0.02)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return World(tmp_path)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Drawing takes longer than all the rest of a small sweep."""
    monkeypatch.setattr(sweep, "page", lambda *_: "")


def states(trials: list) -> list[str]:
    return [trial.state.name for trial in trials]


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't come"
        time.sleep(0.02)


def test_a_sweep_finds_the_best_of_its_trials(world, capsys):
    assert world.run("--trials", "6", "--parallel", "2", "--config.epochs=4") == 0
    trials = world.trials()
    assert states(trials) == ["COMPLETE"] * 6
    lowest = [min(world.losses(number)) for number in range(6)]
    assert [trial.value for trial in trials] == lowest
    best = trials[lowest.index(min(lowest))]

    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["trial", "state", "val/loss", "epochs", "optimizer.learning_rate"]
    assert table[1].split()[:2] == [str(best.number), "finished"]
    assert [float(row.split()[2]) for row in table[1:]] == pytest.approx(sorted(lowest), rel=1e-4)

    config = runpy.run_path(str(world.out / "best_config.py"))["get_config"]()
    assert config.optimizer.learning_rate == best.params["optimizer.learning_rate"]
    assert (config.epochs, config.optimizer.weight_decay, config.is_locked) == (4, 0.1, True)

    html = (world.out / "sweep.html").read_text()
    assert re.findall(r'<img alt="(\w+)" src="data:image/png;base64,', html) == ["Importance", "History"]
    assert "://" not in html and "src=" not in html.replace('src="data:', "")
    assert html.count("<tr>") == 7


def test_a_trial_worse_than_the_median_is_stopped_early(world, undrawn):
    world.grid({"optimizer.learning_rate": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 1e6]})
    seed = next(str(n) for n in range(100) if sweep_grid(world, n)[-1]["optimizer.learning_rate"] == 1e6)
    assert world.run("--sampler", "grid", "--seed", seed, "--prune", "--config.epochs=20") == 0
    trials = world.trials()
    assert states(trials) == ["COMPLETE"] * 5 + ["PRUNED"]
    assert 2 <= len(world.losses(5)) < 15  # not before a tenth of the epochs
    assert world.notes(5).splitlines()[-1] == "sigterm"


def test_a_sweep_is_refused_where_a_run_is_at_work(world, caplog):
    with one_writer(world.out):
        assert world.run("--trials", "1") == 1
        assert [path.name for path in world.out.iterdir()] == [".biomass_jax.lock"]
    assert f"{world.out}: another run is at work there: process {os.getpid()} on " in caplog.text


def test_a_sweep_whose_folder_goes_away_ends_with_its_path(world):
    process = world.start("--trials", "1000", "--config.model.pause=0.2")
    until(lambda: (world.out / "trials" / "0001").exists())
    shutil.rmtree(world.out)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"{world.out}: can't be read or written any more" in said and "Traceback" not in said


def sweep_grid(world: World, seed: int) -> list[dict]:
    from launch.sweep_space import grid, load_space

    return grid(load_space(world.folder / "space.py", "grid"), seed)


def test_a_crashed_trial_is_tried_once_more_and_then_failed_with_its_last_lines(world, caplog):
    world.grid({"model.crash": ["never", "once", "always", "nan", "stopped"]})
    assert world.run("--sampler", "grid", "--parallel", "2") == 0
    trials = {trial.params["model.crash"]: trial for trial in world.trials()}
    assert {name: trial.state.name for name, trial in trials.items()} == {
        "never": "COMPLETE",
        "once": "COMPLETE",
        "always": "FAIL",
        "nan": "FAIL",
        "stopped": "COMPLETE",
    }
    starts = {name: world.notes(trial.number).count("start") for name, trial in trials.items()}
    assert starts == {"never": 1, "once": 2, "always": 2, "nan": 2, "stopped": 2}
    assert len(world.losses(trials["once"].number)) == 3  # it went on, not began anew
    crashes = trials["always"].user_attrs["crashes"]
    assert crashes == ["exit code 3\nno room left in this forest"] * 2
    assert "finished without a finite val/loss" in trials["nan"].user_attrs["crashes"][0]
    assert f"trial {trials['always'].number} failed: exit code 3\nno room left" in caplog.text
    assert "crashes" not in trials["stopped"].user_attrs


def test_a_sweep_without_a_finished_trial_fails(world):
    world.grid({"model.crash": ["always"]})
    assert world.run("--sampler", "grid") == 1
    assert not (world.out / "best_config.py").exists()
    assert "No trial has finished" in (world.out / "sweep.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_was_killed_or_stopped_goes_on_and_loses_nothing(world, how):
    world.grid({"optimizer.learning_rate": [1e-4, 1e-3, 1e-2], "optimizer.weight_decay": [0.1, 0.2]})
    arguments = ("--sampler", "grid", "--parallel", "2", "--config.epochs=6", "--config.model.pause=0.15")
    first = world.start(*arguments)
    until(lambda: "start" in world.notes(3))  # two have ended
    first.send_signal(how)
    first.communicate(timeout=120)
    assert first.returncode == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: world.notes(3).splitlines()[-1] == "sigterm")  # trials don't outlive the sweep
    assert set(states(world.trials())) == {"COMPLETE", "RUNNING"}

    again = world.start(*arguments)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "trial 3 resumes" in output
    trials = world.trials()
    assert states(trials) == ["COMPLETE"] * 6
    assert [trial.params for trial in trials] == sweep_grid(world, 0)
    assert {tuple(trial.params.values()) for trial in trials} == {
        (rate, decay) for rate in (1e-4, 1e-3, 1e-2) for decay in (0.1, 0.2)
    }
    for trial in trials:
        assert len(world.losses(trial.number)) == 6
        assert sorted(trial.intermediate_values) == [1, 2, 3, 4, 5, 6]
    assert "start" in world.notes(3) and world.notes(3).count("start") == 2
    assert not list(world.out.glob(".*.partial"))


@pytest.mark.slow
def test_sweeps_that_share_a_workdir_make_the_total_together(world):
    arguments = ("--sampler", "random", "--trials", "7", "--config.model.pause=0.2")
    both = [world.start(*arguments), world.start(*arguments)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    trials = world.trials()
    assert states(trials) == ["COMPLETE"] * 7
    assert all(world.notes(number).count("start") == 1 for number in range(7))
    assert all(re.search(r"trial \d+: optimizer", output) for output in outputs)
    assert len({trial.params["optimizer.learning_rate"] for trial in trials}) == 7
    assert any("7 trials finished" in output and "elsewhere" not in output for output in outputs)


def test_more_trials_go_on_where_fewer_ended_with_the_values_of_a_sweep_in_one_go(world, undrawn):
    assert world.run("--sampler", "random", "--trials", "2") == 0
    assert world.run("--sampler", "random", "--trials", "4") == 0
    split = [trial.params for trial in world.trials()]
    (world.folder / "other").mkdir()
    other = World(world.folder / "other")
    assert other.run("--sampler", "random", "--trials", "4", "--parallel", "3") == 0
    assert [trial.params for trial in other.trials()] == split
    assert len({trial.params["optimizer.learning_rate"] for trial in other.trials()}) == 4
    assert all(world.notes(number).count("start") == 1 for number in range(4))


def test_each_trial_at_a_time_has_a_gpu_of_its_own(world, undrawn, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    arguments = ("--sampler", "grid", "--config.model.pause=0.1")
    assert world.run(*arguments, "--parallel", "2") == 0
    assert {re.search(r"gpu (\S+)", world.notes(n))[1] for n in range(2)} == {"4", "GPU-7"}
    assert sweep.cuda_devices(1) == [None]
    with pytest.raises(sweep.SweepError, match=r"--parallel is 3, but there are 2 GPUs \(4, GPU-7\)"):
        sweep.cuda_devices(3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert sweep.cuda_devices(3) == [None] * 3


def test_gpus_are_counted_where_the_environment_names_none(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA (UUID: a)'\necho '  MIG 1g (UUID: b)'\necho 'GPU 1: NVIDIA (UUID: c)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert sweep.cuda_devices(2) == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "3", "--config.epoch=3"], r"'epoch', a field that the config lacks; did you mean epochs\?"),
        (["--trials", "3", "--config.epochs=many"], "many"),
        (["--trials", "3", "--config.optimizer.learning_rate=1"], "which the command line fixes"),
        (["--trials", "3", "--config.mode=predict"], "mode is 'predict'; expected one of finetune, pretrain"),
        (["--trials", "3", "epochs=3"], "unexpected argument 'epochs=3'"),
        (["--trials", "0"], "--trials is 0"),
        (["--trials", "3", "--parallel", "0"], "--parallel is 0"),
        ([], "--trials is needed for --sampler tpe"),
        (["--trials", "3", "--storage", "nosuch://host/db"], "can't open the database"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_trial(world, caplog, arguments, message):
    assert world.run(*arguments) == 1
    assert re.search(message, caplog.text), caplog.text
    assert not (world.out / "trials").exists()


def test_a_sweep_does_not_go_on_with_other_settings(world, undrawn, caplog):
    assert world.run("--trials", "1") == 0
    for changed, message in [
        (["--config.epochs=4"], "fields.epochs: was 3, now 4, and 1 more changes; give the same"),
        (["--seed", "1"], "seed: was 0, now 1; give the same"),
        (["--sampler", "random"], "sampler: was 'tpe', now 'random'"),
        (["--storage", f"sqlite:///{world.folder}/other.db"], "storage: was 'study.db'"),
    ]:
        caplog.clear()
        assert world.run("--trials", "2", *changed) == 1
        assert re.search(message, caplog.text), caplog.text
    assert len(world.trials()) == 1


def test_a_sweep_does_not_go_on_with_an_edited_config_or_space(world, undrawn, caplog):
    assert world.run("--trials", "1") == 0
    base, space = world.folder / "base.py", world.folder / "space.py"
    base.write_text(CONFIG.replace('"weight_decay": 0.1', '"weight_decay": 0.2'))
    assert world.run("--trials", "2") == 1
    assert "fields.optimizer.weight_decay: was 0.1, now 0.2; give the same" in caplog.text
    base.write_text(CONFIG)
    space.write_text(space.read_text().replace("1e-6", "1e-5"))
    assert world.run("--trials", "2") == 1
    assert "space.optimizer.learning_rate.attributes.low: was 1e-06, now 1e-05" in caplog.text


def test_a_sweep_of_an_older_version_goes_on_and_says_so(world, undrawn, caplog):
    assert world.run("--trials", "1") == 0
    path = world.out / "sweep.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in told.items() if name not in ("fields", "data")}))
    assert world.run("--trials", "1") == 0
    assert f"{path}, an older version's, doesn't tell data, fields; taken as they are now" in caplog.text
    assert json.loads(path.read_text()) == told


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weights_sha256": "b"}, "init_from.{}: was 'a', now 'b'"),
        ({"input": {"means": [1.0], "stds": [3.0]}}, "bundles.{}.statistics.stds: was [2.0], now [3.0]"),
        ({"architecture": {"window": 8, "head_dropout": 0.5}}, "bundles.{}.model.window: was 7, now 8"),
        ({"provenance": {"source": "elsewhere"}, "architecture": {"window": 7, "head_dropout": 0.3}}, None),
    ],
)
def test_a_sweep_does_not_go_on_with_an_edited_bundle(world, undrawn, caplog, change, words):
    """By the rule by which training resumes: what values depend on, and no more."""
    bundle = world.folder / "bundle"
    bundle.mkdir()
    meta = dict.fromkeys(("output", "training", "provenance", "check"), {})
    meta |= {"schema_version": 1, "task": "biomass", "weights_sha256": "a", "input": {"means": [1.0], "stds": [2.0]}}
    meta |= {"architecture": {"window": 7, "head_dropout": 0.5}}
    (bundle / "bundle.json").write_text(json.dumps(meta))
    base = world.folder / "base.py"
    base.write_text(CONFIG.replace('"epochs": 3', f'"epochs": 3, "init_from": {str(bundle)!r}'))
    assert world.run("--trials", "1") == 0
    (bundle / "bundle.json").write_text(json.dumps(meta | change))
    assert world.run("--trials", "1") == (1 if words else 0)
    if words:
        assert f"{words.format(bundle)}; give the same" in caplog.text
    else:
        assert "was begun with other settings" not in caplog.text


@pytest.mark.parametrize("fault", ["absent", "no path", "bundle", "anew"])
def test_data_and_bundles_are_looked_at_before_the_first_trial(tmp_path, caplog, fault, undrawn):
    from tests.training import world as chips

    (tmp_path / "space.py").write_text(SPACE.format(grid={}))
    data = chips.write(tmp_path / "shards", train=8, val=4, test=0)
    arguments = ["--config", str(ROOT / "configs" / "demo_finetune.py"), "--space", str(tmp_path / "space.py")]
    arguments += ["--workdir", str(tmp_path / "out"), "--trials", "1"]
    path = [f"--config.data.path={data}"]
    if fault == "absent":
        next(data.glob("*-val.*")).unlink()
        words = "biomass-val.array_record-00000-of-00001: no such file"
    elif fault == "no path":
        path, words = ["--config.data.path="], "config.data.path is not given"
    elif fault == "bundle":
        path, words = [*path, f"--config.init_from={tmp_path / 'none'}"], "none: not a model bundle"
    else:
        failing = [sys.executable, "-c", "raise SystemExit(1)"]
        assert sweep.main([*arguments, *path], program=failing) == 1
        shutil.rmtree(data)
        chips.write(data, train=8, val=4, test=0, seed=1)
        words = f"data.{data}.train: was "
    assert sweep.main([*arguments, *path], program=FAKE) == 1
    assert words in caplog.text
    assert (tmp_path / "out").exists() == (fault == "anew")
