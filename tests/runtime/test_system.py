"""What operating systems do each in their own way: with what Linux has, and without."""

import importlib
import os
import signal
import subprocess
import sys
import types

import pytest

from biomass_jax.runtime import system


def test_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert system.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert system.cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.cores() == 1


class Windows(types.ModuleType):
    """`msvcrt` as far as locks go: bytes of a file, taken by a handle until it lets go."""

    LK_NBLCK = 2

    def __init__(self):
        super().__init__("msvcrt")
        self.taken, self.asked = {}, 0

    def locking(self, handle, mode, size):
        self.asked += 1
        place = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR))
        assert (mode, size) == (self.LK_NBLCK, 1)
        if self.taken.setdefault(place, handle) != handle:
            if self.asked == 3:
                self.taken.clear()  # its holder ends
            raise PermissionError(13, "Permission denied")


@pytest.fixture(params=["posix", "windows"])
def module(request, monkeypatch):
    """The module as it is on the two kinds of systems."""
    if request.param == "posix":
        pytest.importorskip("fcntl")
        yield system
        return
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "msvcrt", Windows())
    yield importlib.reload(system)
    monkeypatch.undo()
    importlib.reload(system)


def test_a_lock_keeps_others_out(module, tmp_path):
    path = tmp_path / "lock"
    with open(path, "w+") as first, open(path, "r+") as second:
        first.write("held")
        first.flush()
        assert module.lock(first.fileno())
        assert first.tell() == 4
        assert not module.lock(second.fileno())
        assert second.read() == "held"
    with open(path, "r+") as third:
        assert module.lock(third.fileno(), wait=True)


def test_a_lock_is_waited_for_where_asking_is_all_there_is(monkeypatch, tmp_path):
    windows, pauses = Windows(), []
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "msvcrt", windows)
    monkeypatch.setattr(system.time, "sleep", pauses.append)
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert system.lock(first.fileno())
        assert system.lock(second.fileno(), wait=True)
    assert len(pauses) == 2


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_process_ends_with_or_without_groups(monkeypatch, groups, at_once):
    if not groups:
        monkeypatch.delattr(os, "killpg", raising=False)
    elif not hasattr(os, "killpg"):
        pytest.skip("no groups here")
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    with process:
        system.end_group(process, at_once=at_once)
        assert process.wait(60) == -(signal.SIGKILL if at_once else signal.SIGTERM)


def test_what_is_flushed(monkeypatch, tmp_path):
    path, flushed = tmp_path / "a", []
    path.write_text("kept")
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    system.flush(path)
    assert flushed == [path.stat().st_ino] and path.read_text() == "kept"
    system.flush_folder(tmp_path)
    assert flushed[1:] == [tmp_path.stat().st_ino]
    monkeypatch.setattr(os, "name", "nt")
    system.flush_folder(tmp_path)
    monkeypatch.undo()
    assert len(flushed) == 2
