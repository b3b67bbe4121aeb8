"""`metrics.jsonl` and TensorBoard events: what is written, and what a resumed run cuts back."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from biomass_jax.training import loop, monitor
from biomass_jax.training.monitor import METRICS, Clock, Writer, cut_back


def write(path, *lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def kept(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


LINES = [
    {"step": 2, "train/loss": 3.0},
    {"step": 4, "train/loss": 2.0},
    {"step": 4, "val/loss": 2.5},
    {"step": 6, "train/loss": 1.0},
    {"step": 8, "val/loss": 1.5},
]


@pytest.mark.parametrize(("step", "count"), [(-1, 0), (1, 0), (3, 1), (4, 2), (5, 3), (8, 4), (9, 5)])
def test_lines_after_the_checkpoint_and_its_own_validation_go(tmp_path, step, count):
    path = tmp_path / METRICS
    write(path, *LINES)
    cut_back(path, step)
    # The validation at the checkpoint's step is written again; a line of training there is not.
    expected = [line for line in LINES if line["step"] < step or (line["step"] == step and "train/loss" in line)]
    assert kept(path) == expected and len(expected) == count
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS]


def test_half_a_line_goes_and_no_file_is_no_fault(tmp_path):
    path = tmp_path / METRICS
    cut_back(path, 3)
    assert not path.exists()
    write(path, *LINES[:2], tail='{"step": 5, "train')
    cut_back(path, 100)
    assert kept(path) == LINES[:2]


def events(folder):
    """(step, tag, value) of all scalars, read by their framing: length, its checksum, event, its checksum."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            found += [(event.step, value.tag, value) for value in event.summary.value]
    return found


def test_numbers_become_lines_and_scalars_and_bad_ones_null(tmp_path):
    writer = Writer(tmp_path, resumed=None)
    writer.write(3, {"val/loss": 1.5, "val/r2": None, "val/mae": float("nan"), "val/rmse": float("inf"), "epoch": 1})
    writer.figure(3, "validation", np.full((4, 5, 3), 7, np.uint8))
    assert kept(tmp_path / METRICS) == [
        {"step": 3, "val/loss": 1.5, "val/r2": None, "val/mae": None, "val/rmse": None, "epoch": 1}
    ]  # on disk before the writer is closed
    writer.close()
    found = events(tmp_path)
    scalars = {(step, tag, value.simple_value) for step, tag, value in found if not value.HasField("image")}
    assert scalars == {(3, "val/loss", 1.5), (3, "epoch", 1.0)}
    ((step, tag, picture),) = [entry for entry in found if entry[2].HasField("image")]
    assert (step, tag, picture.image.height, picture.image.width) == (3, "validation", 4, 5)


def test_a_new_run_begins_the_file_anew_and_a_resumed_one_adds_to_it(tmp_path):
    for resumed, count in ((None, 1), (4, 2), (None, 1)):
        writer = Writer(tmp_path, resumed=resumed)
        writer.write(4 if resumed is None else 6, {"train/loss": 1.0})
        writer.close()
        assert len(kept(tmp_path / METRICS)) == count


def test_other_processes_write_nothing(tmp_path):
    writer = Writer(tmp_path, resumed=None, active=False)
    writer.write(1, {"train/loss": 1.0})
    writer.figure(1, "a", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_does_not_bring_torch(tmp_path):
    """tensorboardX imports what it finds: seconds and hundreds of megabytes for nothing."""
    (tmp_path / "torch.py").write_text("Tensor = None\n")
    code = (
        "import sys; from biomass_jax.training.monitor import tensorboard; tensorboard();"
        "print('torch' in sys.modules);"
        "import torch; tensorboard(); print(sys.modules['torch'] is torch)"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def full():
    return open("/dev/full", "wb")  # noqa: SIM115, closed with what it stands in for


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that can't be flushed
def test_a_full_disk_is_told_by_the_line_that_finds_it_full(tmp_path):
    """tensorboardX's own thread dies of it in silence, and the eleventh event waits for ever."""
    writer = Writer(tmp_path, resumed=None)
    events = writer._board._file._py_recordio_writer
    whole, events._writer = events._writer, full()
    whole.close()
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(1, {f"score {number}": 1.0 for number in range(30)})


def test_compiling_is_no_part_of_the_speed(monkeypatch):
    """Five minutes of it, then steps of a second: 8 steps of 10 are left after two."""
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def compile_slowly(*_):
        now[0] += 300
        return take_a_second

    def take_a_second(state, _):
        now[0] += 1
        return state, {}

    nothing = SimpleNamespace(add=lambda *_: None, after_step=lambda *_: None, check=lambda: None)
    run = SimpleNamespace(_compiled=None, state=None, steps=SimpleNamespace(train=None), host=SimpleNamespace(step=0))
    run.metrics = run.profiler = run.checkpoints = nothing
    run.step, run.total_steps, run.log_every, run.steps_per_epoch, run.save_every = 1, 10, 50, 50, 0
    run.clock, run.batch_size = Clock(), 4
    monkeypatch.setattr(loop, "compiled", compile_slowly)
    for _ in range(2):
        loop.Run._train(run, SimpleNamespace(arrays=None, chips=[]))
    perf = run.clock.read(steps_left=8)
    assert (perf["perf/eta_s"], perf["perf/step_s"], perf["perf/chips_per_s"]) == (8.0, 1.0, 4.0)
