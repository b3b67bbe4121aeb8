"""The profiler traces the steps of its range; lines and events are tested in test_writer.py and test_loop.py."""

import jax
import pytest

from biomass_jax.errors import ConfigError
from biomass_jax.training.monitor import Profiler


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def test_a_trace_covers_its_steps_and_no_more(calls, tmp_path):
    profiler, after = Profiler("2:4", tmp_path), {}
    for step in range(7):
        profiler.after_step(step)
        after[step] = len(calls)
    profiler.close()
    assert calls == [("start", str(tmp_path)), "stop"]
    assert after == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}


def test_a_trace_that_the_run_ends_before_is_closed_once(calls, tmp_path):
    profiler = Profiler("1:9", tmp_path)
    profiler.after_step(1)
    profiler.close()
    profiler.close()
    assert calls == [("start", str(tmp_path)), "stop"]


def test_without_a_range_nothing_is_traced(calls, tmp_path):
    profiler = Profiler(None, tmp_path)
    for step in range(3):
        profiler.after_step(step)
    profiler.close()
    assert calls == []


@pytest.mark.parametrize("steps", ["4", "4:2", "2:2", "a:b", "-1:3"])
def test_a_range_that_is_none_is_refused(steps, tmp_path):
    with pytest.raises(ConfigError, match=r"expected START:STOP"):
        Profiler(steps, tmp_path)
