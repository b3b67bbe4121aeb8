"""One writer a folder: who is refused, which locks are dead, that one taker wins, and folders lost under a run."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

from biomass_jax.errors import FolderError, RasterError, Stopped
from biomass_jax.runtime import lock
from biomass_jax.runtime.lock import is_held, one_writer, refuse_if_held

REAL_LINK = os.link


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds as hundredths."""
    for name, value in {"BEAT": 0.03, "STALE": 0.6, "LOOK": 0.01}.items():
        monkeypatch.setattr(lock, name, value)


def put(folder, age=0.0, **fields):
    """A lock as another run leaves it; the one of this process but for `fields`."""
    holder = dataclasses.replace(lock._myself(), **fields)
    path = folder / lock.LOCK
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in [folder / lock.LOCK, folder / "a"]}


def ended():
    """Number of a process that was there."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def held(folder):
    return json.loads((folder / lock.LOCK).read_text())["pid"]


def test_a_second_writer_is_refused_in_a_line_and_changes_nothing(tmp_path):
    with one_writer(tmp_path / "new" / "run"):
        folder = tmp_path / "new" / "run"
        (folder / "a").write_text("b")
        os.utime(folder, ns=(1, 1))
        before = contents(folder)
        with pytest.raises(FolderError) as refused, one_writer(folder):
            pass
        after = contents(folder)
        assert folder.stat().st_mtime_ns == 1  # nothing was made and removed again either
    assert {name: data for name, (data, _) in before.items()} == {name: data for name, (data, _) in after.items()}
    said = str(refused.value)
    assert said.startswith(f"{folder}: another run is at work there: process {os.getpid()} on {os.uname().nodename} (")
    assert (
        re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", said)
        and f"({folder / '.biomass_jax.lock'} says so" in said
    )
    assert "\n" not in said
    assert [path.name for path in folder.iterdir()] == ["a"]
    with one_writer(folder):  # free again
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stopped])
def test_the_lock_goes_however_the_block_ends(tmp_path, error):
    with pytest.raises(error), one_writer(tmp_path):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields", [{"pid": None}, {"born": "1"}], ids=["ended", "its number is another's now"])
def test_a_lock_of_this_machine_is_dead_when_its_process_is(tmp_path, fields):
    put(tmp_path, **{name: value or ended() for name, value in fields.items()})
    refuse_if_held(tmp_path)
    with one_writer(tmp_path):
        assert held(tmp_path) == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_and_not_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    put(tmp_path, pid=process.pid, born=lock._born(process.pid))
    with pytest.raises(FolderError), one_writer(tmp_path):
        pass
    with pytest.raises(FolderError, match=f"process {process.pid} on "):
        refuse_if_held(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    with one_writer(tmp_path):
        pass
    process.communicate()


def test_whether_a_lock_is_held_is_told_by_the_clock_of_its_server(tmp_path):
    assert is_held(tmp_path, time.time()) is None
    with one_writer(tmp_path):
        assert is_held(tmp_path, time.time() + 1000) is True  # a process of this machine is known by its number
    put(tmp_path, pid=ended())
    assert is_held(tmp_path, time.time()) is False
    path = put(tmp_path, host="node7", space="node7")
    changed = path.stat().st_mtime
    assert [is_held(tmp_path, changed + age) for age in (-1000, 0, 0.5, 0.7)] == [True, True, True, False]


def test_another_machine_that_gives_signs_of_life_is_alive(tmp_path):
    path = put(tmp_path, host="node7", space="node7", pid=ended())
    over = threading.Event()

    def beat():
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderError, match="process .* on node7 "), one_writer(tmp_path):
            pass
    finally:
        over.set()
        thread.join()
    with pytest.raises(FolderError, match="process .* on node7 "):
        refuse_if_held(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


@pytest.mark.parametrize(("age", "least", "most"), [(0.0, 0.5, 3.0), (60.0, 0.0, 0.4), (-60.0, 0.5, 3.0)])
def test_another_machine_that_gives_none_is_dead(tmp_path, age, least, most):
    put(tmp_path, age, host="node7", space="node7", pid=os.getpid())  # the number says nothing there
    began = time.monotonic()
    with one_writer(tmp_path):
        assert least <= time.monotonic() - began <= most
        assert held(tmp_path) == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', '{"surprise": 1}'])
def test_a_broken_lock_goes_by_its_age(tmp_path, text):
    path = tmp_path / lock.LOCK
    path.write_text(text)
    with pytest.raises(FolderError):
        refuse_if_held(tmp_path)
    os.utime(path, (0, 0))
    with one_writer(tmp_path):
        pass


def test_a_lock_that_is_given_back_while_one_waits_is_taken(tmp_path):
    path = put(tmp_path, host="node7", space="node7")
    threading.Timer(0.1, path.unlink).start()
    with one_writer(tmp_path):
        assert held(tmp_path) == os.getpid()


def no_links(*_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("link", [REAL_LINK, no_links], ids=["links", "no links"])
@pytest.mark.parametrize("dead", [True, False], ids=["a dead lock", "no lock"])
def test_one_of_many_takers_wins(tmp_path, monkeypatch, link, dead):
    monkeypatch.setattr(os, "link", link)
    takers, rounds = 6, 25
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        if dead:
            put(folder, born="1")
        start, won, lost = threading.Barrier(takers), [], []

        def take(folder=folder, start=start, won=won, lost=lost):
            start.wait()
            mine = lock._myself()
            try:
                lock._claim(folder / lock.LOCK, mine)
                won.append(mine.token)
            except FolderError:
                lost.append(mine.token)

        threads = [threading.Thread(target=take) for _ in range(takers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, takers - 1)
        assert json.loads((folder / lock.LOCK).read_text())["token"] == won[0]
        assert [path.name for path in folder.iterdir()] == [lock.LOCK]


def test_a_latecomer_does_not_take_the_lock_of_the_taker(tmp_path, monkeypatch):
    """It saw the dead lock before it was taken over, and comes to its turn when the taker has gone on."""
    put(tmp_path, born="1")
    dead, taken = lock._dead, []

    def late(path, found, draft):
        if not taken and path.name == lock.LOCK:
            taken.append(lock._myself())
            lock._claim(path, taken[0])
        return dead(path, found, draft)

    monkeypatch.setattr(lock, "_dead", late)
    with pytest.raises(FolderError):
        lock._claim(tmp_path / lock.LOCK, lock._myself())
    assert json.loads((tmp_path / lock.LOCK).read_text())["token"] == taken[0].token


def test_a_taker_that_died_in_the_midst_is_in_nobodys_way(tmp_path):
    path = put(tmp_path, born="1")
    heir = tmp_path / f"{lock.LOCK}.{json.loads(path.read_text())['token']}"
    heir.write_text(path.read_text().replace(heir.suffix[1:], "0123"))
    with one_writer(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def comes(condition):
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_a_holder_gives_signs_of_life(tmp_path):
    path = tmp_path / lock.LOCK
    with one_writer(tmp_path):
        os.utime(path, (0, 0))
        assert comes(lambda: path.stat().st_mtime > 0)


def lose(folder, kind, monkeypatch):
    """What can happen to a folder under a run."""
    if kind == "deleted":
        shutil.rmtree(folder)
    elif kind == "emptied":
        (folder / lock.LOCK).unlink()
    elif kind == "taken":
        put(folder, token="another", pid=7, host="node7")
    else:

        def refuse(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "utime", refuse)
        monkeypatch.setattr(lock.Path, "write_text", refuse)


LOSSES = [
    ("deleted", "was deleted under this run"),
    ("emptied", "was deleted under this run"),
    ("taken", "another took the folder over: process 7 on node7"),
    ("read-only", "can't be written any more: Read-only file system"),
]


@pytest.mark.parametrize(("kind", "words"), LOSSES)
def test_a_folder_lost_under_a_run_is_noticed_in_its_midst_and_at_its_end(tmp_path, monkeypatch, kind, words):
    said = []
    folder = tmp_path / "run"
    with pytest.raises(FolderError, match=words), one_writer(folder, lost=said.append):
        lose(folder, kind, monkeypatch)
        assert comes(lambda: said)
    assert len(said) == 1
    assert said[0].startswith(f"{folder}: ") and words in said[0]
    if kind == "taken":
        assert held(folder) == 7  # not ours to remove


@pytest.mark.parametrize("error", [Stopped(), OSError(errno.ENOENT, "none", "run/checkpoints"), ValueError("Orbax")])
def test_what_a_lost_folder_brings_about_is_told_by_its_cause(tmp_path, monkeypatch, error):
    monkeypatch.setattr(lock, "BEAT", 100)  # the run is faster than the watch
    folder = tmp_path / "run"
    with pytest.raises(FolderError, match=f"{folder}: .* was deleted under this run"), one_writer(folder):
        shutil.rmtree(folder)
        raise error


def caused(first):
    try:
        raise first
    except BaseException as cause:
        try:
            raise ValueError("a thread of Orbax failed") from cause
        except ValueError as error:
            return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_a_line_with_the_folder(tmp_path, number):
    reason = os.strerror(number)
    for error in (
        OSError(number, reason, "metrics.jsonl"),
        caused(OSError(number, reason)),
        ValueError(f"x: {reason}"),
    ):
        with pytest.raises(FolderError) as raised, one_writer(tmp_path):
            raise error
        said = str(raised.value)
        assert said.startswith(f"{tmp_path}: can't be written any more: ") and reason in said and "\n" not in said


def test_other_errors_pass(tmp_path):
    known = RasterError(f"a.tif: {os.strerror(errno.ENOSPC)}")  # has said it in its own words
    for error in (known, OSError(errno.ENOENT, "none", "input.tif"), ValueError("a fault of the program")):
        with pytest.raises(type(error)) as raised, one_writer(tmp_path):
            raise error
        assert raised.value is error


PROGRAM = """
import sys, threading
from pathlib import Path
from biomass_jax.runtime import lock
lock.BEAT = 0.1
with lock.one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    threading.Event().wait()
"""


def start(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_program_that_hangs_is_ended_and_a_killed_one_is_no_obstacle(tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    with pytest.raises(FolderError, match=f"process {process.pid} on "), one_writer(folder):
        pass
    shutil.rmtree(folder)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"{folder}: the folder" in said and "was deleted under this run" in said and "Traceback" not in said
    process = start(folder)
    process.kill()
    process.communicate()
    assert held(folder) == process.pid
    with one_writer(folder):
        assert held(folder) == os.getpid()


def test_a_fork_of_the_holder_does_not_let_go(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, one_writer(tmp_path):
        patch.setattr(os, "getpid", lambda: 1)
    assert held(tmp_path) == os.getpid()
