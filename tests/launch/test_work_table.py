"""Tables of work: who gets what, what is lost and comes back, and that an item is in one state at a time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from biomass_jax.errors import FolderError, WorkError
from biomass_jax.runtime import lock
from launch import work_table
from launch.work_table import Mark, Table, at_work, listed, make_table

ITEMS = 250


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(work_table, "POLL", 0.01)


@pytest.fixture
def table(tmp_path):
    return new(tmp_path / "table", ITEMS)


def new(folder, items, tries=3):
    rows = [{"name": f"item {number}", "tile": "10SFF", "season": str(number)} for number in range(items)]
    make_table(folder, rows, settings={"out": "maps"}, tries=tries)
    return Table(folder)


def states(table):
    """State -> numbers of its items; each item must have one file, and so one state."""
    found = {state: sorted(mark.number for mark in table.marks(state)) for state in ("waiting", "done", "failed")}
    found["taken"] = sorted(mark.number for folder in table.workers() for mark in listed(folder))
    assert sorted(sum(found.values(), [])) == list(range(len(table.items)))
    return {state: numbers for state, numbers in found.items() if numbers}


def killed_worker(table, items, *, silent=False):
    """A process that takes some items and is killed; `silent`: on another machine, as far as can be seen."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom biomass_jax.runtime import lock\n"
        f"if {silent}: lock._space = lambda: 'elsewhere'\n"
        "from launch.work_table import Table, at_work\n"
        "with at_work(Table(Path(sys.argv[1])), (0, 1)) as worker:\n"
        "    claims = worker.claims()\n"
        f"    for _ in range({items}): print(next(claims).number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(table.folder)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_a_table_is_made_whole_and_once(table, tmp_path):
    assert states(table) == {"waiting": list(range(ITEMS))}
    assert (table.tries, table.settings, table.items[7]["season"]) == (3, {"out": "maps"}, "7")
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
    with pytest.raises(WorkError, match="table: it is there already"):
        new(table.folder, 3)
    assert len(Table(table.folder).items) == ITEMS


def test_a_folder_that_holds_no_table_is_named(table, tmp_path):
    with pytest.raises(WorkError, match="nowhere: no table of work there"):
        Table(tmp_path / "nowhere")
    about = json.loads((table.folder / "work.json").read_text())
    (table.folder / "work.json").write_text(json.dumps(about | {"items": 7}))
    with pytest.raises(WorkError, match="schema 1 and 7 items; expected schema 1 and 250"):
        Table(table.folder)
    (table.folder / "work.json").write_text("{")
    with pytest.raises(WorkError, match=r"work\.json or items\.jsonl in it can't be read"):
        Table(table.folder)


def test_one_worker_does_everything_once_and_leaves_nothing(table):
    with at_work(table, (0, 1)) as worker:
        order = [claim.number for claim in worker.claims() if worker.done(claim)]
        name = worker.name
    assert order == list(range(ITEMS))
    assert states(table) == {"done": order}
    assert {(mark.tries, mark.owner) for mark in table.marks("done")} == {(1, name)}
    assert table.workers() == []


def test_a_share_comes_first_and_then_the_others(table):
    with at_work(table, (2, 5)) as worker:
        order = [claim.number for claim in worker.claims() if worker.done(claim)]
    assert order[:50] == list(range(100, 150))
    assert sorted(order) == list(range(ITEMS))


def test_many_workers_get_each_item_once(table):
    taken = []

    def work(number):
        with at_work(table, (number, 6)) as worker:
            for claim in worker.claims():
                taken.append((claim.number, worker.name))
                assert worker.done(claim)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number, _ in taken) == list(range(ITEMS))
    assert states(table) == {"done": list(range(ITEMS))}
    assert {mark.number: mark.owner for mark in table.marks("done")} == dict(taken)


def test_what_fails_is_tried_again_last_and_named_in_the_end(table):
    order, ends = [], []
    with at_work(table, (0, 1)) as worker:
        for claim in worker.claims():
            order.append(claim.number)
            if claim.number == 3:
                ends.append(worker.failed(claim, f"no sky on try {claim.tries}"))
            elif claim.number == 4 and claim.tries == 1:
                ends.append(worker.failed(claim, "a hiccup"))
            else:
                worker.done(claim)
    assert Counter(order) == Counter({**dict.fromkeys(range(ITEMS), 1), 3: 3, 4: 2})
    assert order[:ITEMS] == list(range(ITEMS))  # another try waits until the first ones are made
    assert ends == ["waiting", "waiting", "waiting", "failed"]
    assert states(table) == {"done": [n for n in range(ITEMS) if n != 3], "failed": [3]}
    bad, luckier, good = table.rows()[3:6]
    assert (bad.state, bad.tries, bad.error, bad.owner) == ("failed", 3, "no sky on try 3", worker.name)
    assert (luckier.state, luckier.tries, luckier.error) == ("done", 2, "a hiccup")
    assert (good.state, good.tries, good.error) == ("done", 1, "")
    assert table.again() == 1
    assert table.rows()[3] == work_table.Row(3, table.items[3], "waiting", "", 0, "")


def test_items_of_a_killed_worker_are_taken_again(table):
    lost = killed_worker(table, 3)
    assert [row.state for row in table.rows()[:4]] == ["lost", "lost", "lost", "waiting"]
    with at_work(table, (1, 2)) as worker:
        order = [claim for claim in worker.claims() if worker.done(claim)]
    assert lost == [0, 1, 2]
    assert order[-3:] == [Mark(0, 2), Mark(1, 2), Mark(2, 2)]
    assert states(table) == {"done": list(range(ITEMS))}
    assert table.workers() == []
    assert "its worker ended without a word" in table.rows()[0].error


def test_an_item_that_kills_its_workers_fails_and_stops_nothing(tmp_path):
    table = new(tmp_path / "table", 2, tries=2)
    for _ in range(2):
        killed_worker(table, 1)
        with at_work(table, (0, 1)) as worker:
            assert worker._take_from_the_dead()
    assert states(table) == {"waiting": [1], "failed": [0]}
    assert table.rows()[0].error.startswith("its worker ended without a word, as it does when it is killed")


def test_of_two_that_find_a_dead_worker_one_has_its_item(table, monkeypatch):
    """Both have seen it there; the one that is late notes nothing, and doesn't disturb the other's note."""
    killed_worker(table, 1)
    (folder,) = table.workers()
    with at_work(table, (0, 2)) as one, at_work(table, (1, 2)) as other:
        monkeypatch.setattr(work_table, "is_held", lambda path, now: path != folder)
        seen = listed(folder)
        assert one._take_from_the_dead()
        ended = []
        monkeypatch.setattr(work_table, "listed", lambda path: seen if path == folder else [])
        monkeypatch.setattr(Table, "workers", lambda self: [folder])
        monkeypatch.setattr(Table, "end", lambda *given: ended.append(given))
        assert other._take_from_the_dead()
    assert ended == []
    monkeypatch.undo()
    assert states(table) == {"waiting": list(range(ITEMS))}


def test_a_worker_of_another_machine_is_given_time(table):
    """Its number says nothing here; it's dead when it has shown no sign of life by the file server's clock."""
    killed_worker(table, 1, silent=True)
    (folder,) = table.workers()
    with at_work(table, (1, 2)) as worker:
        assert not worker._take_from_the_dead()
        assert states(table)["taken"] == [0]
        old = (worker.folder / lock.LOCK).stat().st_mtime - lock.STALE - 1
        os.utime(folder / lock.LOCK, (old, old))
        assert worker._take_from_the_dead()
    assert states(table) == {"waiting": list(range(ITEMS))}
    assert not folder.exists()


def test_a_worker_that_starts_is_left_alone(table):
    folder = table.folder / "taken" / "just-starting"
    folder.mkdir()
    with at_work(table) as worker:
        assert not worker._take_from_the_dead()
    assert folder.is_dir()


def test_one_that_was_taken_for_dead_can_finish_nothing(table, monkeypatch):
    """It was silent for too long, and its item is another's now: what it says of it changes nothing."""
    gone = pytest.raises(FolderError, match="deleted under this run")
    with at_work(table, (1, 2)) as other, gone, at_work(table, (0, 1)) as silent:
        claims = silent.claims()
        mine, another = next(claims), next(claims)
        monkeypatch.setattr(work_table, "is_held", lambda folder, now: folder != silent.folder)
        assert other._take_from_the_dead()
        assert not silent.holds(mine)
        assert not silent.done(mine)
        assert silent.failed(another, "a late word") == "gone"
        next(claims)  # nothing can be taken into a folder that is gone
    assert states(table) == {"waiting": list(range(ITEMS))}


def test_what_is_held_is_given_back_untried(table):
    with pytest.raises(KeyboardInterrupt), at_work(table, (0, 1)) as worker:
        claims = worker.claims()
        worker.done(next(claims))
        assert [next(claims).number for _ in range(2)] == [1, 2]
        raise KeyboardInterrupt
    assert states(table) == {"waiting": list(range(1, ITEMS)), "done": [0]}
    assert {mark.tries for mark in table.marks("waiting")} == {0}
    assert list(worker.claims()) == []
    assert table.workers() == []


def test_a_worker_waits_for_what_another_may_lose(tmp_path):
    table = new(tmp_path / "table", 2)
    with at_work(table, (0, 2)) as one, at_work(table, (1, 2)) as other:
        held = next(one.claims())
        found = []
        thread = threading.Thread(target=lambda: found.extend(c for c in other.claims() if other.done(c)))
        thread.start()
        while not found:
            time.sleep(0.01)
        assert thread.is_alive()
        one.failed(held, "a hiccup")
        thread.join(timeout=30)
    assert [claim.number for claim in found] == [1, 0]
    assert states(table) == {"done": [0, 1]}


def test_asked_to_stop_it_takes_no_more(table):
    asked = []
    with at_work(table, (0, 1), lambda: len(asked) > 4) as worker:
        for claim in worker.claims():
            asked.append(claim)
            worker.done(claim)
    assert len(asked) == 5


def test_a_table_that_goes_away_is_an_error(table):
    with pytest.raises(FolderError, match="deleted under this run"), at_work(table) as worker:
        next(worker.claims())
        table.folder.rename(table.folder.with_name("gone"))


def test_old_lists_of_a_file_server_end(table, monkeypatch):
    """NFS may show for a while what others have taken: each name is tried once a visit, not forever."""
    old = {shard: listed(table.folder / "waiting" / f"{shard:04d}") for shard in range(table.shards)}
    with at_work(table, (0, 1)) as worker:
        for claim in worker.claims():
            worker.done(claim)
        looks = []

        def stale(folder):
            looks.append(folder)
            return old[int(folder.name)] if folder.parent.name == "waiting" else []

        monkeypatch.setattr(work_table, "listed", stale)
        assert list(worker.claims()) == []
    assert len(looks) <= 4 * ITEMS
