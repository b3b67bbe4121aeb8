"""Pretrain, fine-tune, evaluate and predict as two processes of `launch/local.sh` and as one; two that are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.runtime.lock import one_writer
from tests.compiling import QUICK
from tests.prediction.stubs import coded_image, write_raster
from tests.training import world

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the launcher's processes in /proc"),
]

STEPS = 8  # an epoch
EPOCHS = {"pretrain": 2, "finetune": 6}
MAIN = (sys.executable, "-m", "biomass_jax.main")
FINETUNE = "configs/finetune_all_biomes.py"
PRETRAIN = "configs/pretrain_simmim_swin_b_100ep.py"


def fields(**values):
    """Flags for fields of a config; `__` stands for the dot."""
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


class Jobs:
    """Runs of the program, in one process or two, on a folder of shards."""

    def __init__(self, root, folder):
        self.root, self.folder, self.started = root, folder, []
        self.shards = world.write(folder / "shards", train=4 * STEPS, val=5, test=7)
        self.training = [*fields(data__path=self.shards, log_every=1, draw_every=0)]

    def start(self, count, workdir, config, *flags):
        command = [*MAIN] if count == 1 else ["launch/local.sh", str(count)]
        environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
        self.started.append(
            subprocess.Popen(
                [*command, "--config", config, "--workdir", str(self.folder / workdir), *flags],
                cwd=self.root,
                # Only process 0 of several reads and writes the cache: the other compiles in each run.
                env=environment | {"XLA_FLAGS": QUICK},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return self.started[-1]

    def run(self, *arguments):
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def pretrain(self, count):
        tiny = [f"--config.{name}={value!r}" for name, value in world.TINY_PRETRAINING.items()]
        extra = fields(
            epochs=EPOCHS["pretrain"],
            optimizer__learning_rate=1e-3,
            optimizer__reference_batch=0,
            schedule__warmup_epochs=1,
        )
        extra += fields(augment__size=32, mask_patch_size=16, dtype="float32")
        return self.run(count, f"pretrain{count}", PRETRAIN, *tiny, *self.training, *extra)

    def finetuning(self):
        """Flags of the fine-tuning, from what one process has pretrained."""
        tiny = [f"--config.{name}={value!r}" for name, value in world.TINY.items()]
        start = fields(init_from=self.folder / "pretrain1" / "best", load="encoder")
        return [*tiny, *self.training, *start, *fields(epochs=EPOCHS["finetune"], optimizer__learning_rate=1e-3)]

    def lines(self, workdir):
        """metrics.jsonl without what depends on time."""
        path = self.folder / workdir / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last line may still be written
        found = [json.loads(text) for text in whole.splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in found]


@pytest.fixture(scope="module")
def jobs(root, tmp_path_factory):
    """Jobs whose pretraining and fine-tuning are done, by one process and by two."""
    made = Jobs(root, tmp_path_factory.mktemp("jobs"))
    try:
        for count in (1, 2):
            status, said = made.pretrain(count)
            assert status == 0, said
        for count in (1, 2):
            status, said = made.run(count, f"finetune{count}", FINETUNE, *made.finetuning())
            assert status == 0, said
        yield made
    finally:
        for process in made.started:
            process.terminate()  # does nothing to one that has ended


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_two_processes_learn_what_one_does(jobs, task):
    one, two = (jobs.lines(f"{task}{count}") for count in (1, 2))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert two[-1]["step"] == EPOCHS[task] * STEPS
    for name, losses in (("train/loss", EPOCHS[task] * STEPS), ("val/loss", EPOCHS[task])):
        found, expected = ([line[name] for line in lines if name in line] for lines in (two, one))
        assert len(expected) == losses
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    best = [bundle.read_meta(jobs.folder / f"{task}{count}" / "best") for count in (1, 2)]
    assert best[0]["training"]["step"] == best[1]["training"]["step"]


def close(found, expected):
    """Equal but for rounding, number by number through lists and dictionaries."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            close(*pair)
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found == expected


def test_two_processes_score_as_one_does(jobs):
    flags = fields(bundle=jobs.folder / "finetune1" / "best", data__path=jobs.shards, batch_size=2)
    for count in (1, 2):
        status, said = jobs.run(count, f"scores{count}", "configs/evaluate.py", *flags)
        assert status == 0, said
    one, two = (jobs.folder / f"scores{count}" for count in (1, 2))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (two, one))
    close(found, expected)
    assert json.dumps(expected).count(".") > 20  # there was something to compare


def test_two_processes_map_as_one_does_and_one_failure_fails_both(jobs):
    scenes = jobs.folder / "scenes"
    for number, name in enumerate(("a", "sub/c", "sub/d")):
        write_raster(scenes / f"{name}.tif", coded_image(30 + 40 * number, 90))
    (scenes / "b.tif").write_text("no raster")
    flags = fields(bundle=jobs.folder / "finetune1" / "best", inputs=scenes, tile=32, stride=24, margin=2)
    said = {}
    for count in (1, 2):
        status, said[count] = jobs.run(count, f"maps{count}", "configs/predict.py", *flags)
        assert status == 1, said[count]
    for text in said.values():
        assert text.count("1 of 4 inputs failed:") == 1
        assert len(re.findall(r"^.*  \S*b\.tif  .*not recognized", text, re.M)) == 1
        assert "Traceback" not in text
    one, two = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.tif")}
        for folder in (jobs.folder / "maps1", jobs.folder / "maps2")
    )
    assert sorted(one) == ["a_agbd.tif", "sub/c_agbd.tif", "sub/d_agbd.tif"]
    assert two == one


def test_two_processes_are_refused_together_where_another_run_is_at_work(jobs):
    with one_writer(jobs.folder / "held"):
        status, said = jobs.run(2, "held", "configs/predict.py", *fields(bundle="none", inputs=jobs.folder))
        assert [path.name for path in (jobs.folder / "held").iterdir()] == [".biomass_jax.lock"]
    assert status == 1
    assert said.count("another run is at work there") == 1 and "process 0 says what is wrong with it" in said


def processes(launcher):
    """Process ids of the launcher's processes by their number in the run."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return {int(re.search(r"--process_id=(\d)", command)[1]): pid for pid, command in commands.items()}


def wait_for_step(jobs, launcher, workdir, step):
    deadline = time.monotonic() + 200
    while not any(line["step"] >= step for line in jobs.lines(workdir)):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_broken_three_times_comes_to_the_same_end(jobs):
    """Stopped by SIGTERM, then one process killed, then the coordinator; each time the same command resumes."""
    command = (2, "broken", FINETUNE, *jobs.finetuning())
    launcher = jobs.start(*command)
    wait_for_step(jobs, launcher, "broken", 3)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, said
    for number in (0, 1):
        assert re.search(rf"^\[{number}\] .* stopped by SIGTERM after", said, re.M), said
    stopped = int(re.search(r"stopping at step (\d+): saving", said)[1])
    assert stopped % 10 == 0
    assert (jobs.folder / "broken" / "checkpoints" / f"step_{stopped}").is_dir()

    for lost in (1, 0):
        launcher = jobs.start(*command)
        begun = stopped if lost else int(jobs.lines("broken")[-1]["step"])
        wait_for_step(jobs, launcher, "broken", begun + STEPS + 1)
        pids = processes(launcher)
        began = time.monotonic()
        os.kill(pids[lost], signal.SIGKILL)
        said, _ = launcher.communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert launcher.returncode == 128 + signal.SIGKILL, said
        assert f"[launch] process {lost} of 2 was killed by signal 9 (SIGKILL); ending the other 1" in said
        assert f"process {1 - lost} of 2 ends here" in said, said
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
        assert jobs.lines("broken")[-1]["step"] < EPOCHS["finetune"] * STEPS

    status, said = jobs.run(*command)
    assert status == 0, said
    assert re.search(r"resuming from step \d+ of 48", said)
    assert jobs.lines("broken") == jobs.lines("finetune2")
    best = [bundle.read_meta(jobs.folder / name / "best") for name in ("broken", "finetune2")]
    assert best[0]["weights_sha256"] == best[1]["weights_sha256"]
