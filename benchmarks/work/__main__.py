"""Items that do next to nothing, handed out: what an item costs, and whether each is done once.

    python -m benchmarks.work                    # cost per item in tables of 100 and of 10,000 items, and their ratio
    python -m benchmarks.work --kills 0.05       # 10,000 items over 8 processes; 5 % of the items kill theirs

Of docs/scaling.md.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from launch import work_table
from launch.work_table import Table, at_work, listed, make_table

RECORD = "record.txt"  # beside the table: a line for each thing that happens, appended by whom it happens to
SIZES = (100, 10_000)
ROUNDS = 7


def new_table(folder: Path, items: int, tries: int) -> Table:
    """A table of so many items that hold nothing."""
    make_table(folder, [{"name": f"item {number}"} for number in range(items)], settings={}, tries=tries)
    return Table(folder)


def play(folder: Path, kills: float, seed: str, share: tuple[int, int]) -> None:
    """A worker's process: note each item, and be killed by SIGKILL in the midst of some."""
    work_table.POLL = 0.1  # items take no time
    table, drawn = Table(folder), random.Random(seed)
    record = os.open(folder / RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(record, (" ".join(map(str, words)) + "\n").encode())

    def perhaps_die(when: str, number: int) -> None:
        if when == fate:
            note("killed", number, when)
            os.kill(os.getpid(), signal.SIGKILL)

    with at_work(table, share) as worker:
        for claim in worker.claims():
            fate = drawn.choice(("before", "after", "late")) if drawn.random() < kills else ""
            if any(mark.number == claim.number for mark in listed(table.place("done", claim).parent)):
                note("twice", claim.number)
            perhaps_die("before", claim.number)
            note("did", claim.number)
            perhaps_die("after", claim.number)
            worker.done(claim)
            perhaps_die("late", claim.number)


@dataclass(frozen=True)
class Played:
    """What became of a simulation.

    Attributes:
        did: how often each item's work was done.
        killed: how often each item's worker was killed before the item was finished.
        kills: in all.
        twice: items that were begun after they were done.
        starts: processes.
        seconds: on the clock.
    """

    did: Counter[int]
    killed: Counter[int]
    kills: int
    twice: int
    starts: int
    seconds: float


def simulate(folder: Path, items: int, *, workers: int = 8, kills: float = 0.05, seed: int = 0) -> Played:
    """Many items over several processes; one that is killed is followed by another."""
    table, began, starts = new_table(folder, items, tries=100), time.perf_counter(), 0
    running: dict[int, subprocess.Popen[bytes]] = {}
    left = list(range(workers))
    try:
        while left or running:
            for share in left:
                words = [str(table.folder), "--kills", str(kills), "--seed", f"{seed}-{starts}"]
                command = [sys.executable, "-m", "benchmarks.work", "--play", *words, "--share", f"{share}/{workers}"]
                running[share] = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2])
                starts += 1
            time.sleep(0.02)
            ended = {share: process.returncode for share, process in running.items() if process.poll() is not None}
            left = [share for share, code in ended.items() if code == -signal.SIGKILL]
            if wrong := {code for code in ended.values() if code not in (0, -signal.SIGKILL)}:
                raise RuntimeError(f"workers ended with {wrong}")
            for share in ended:
                del running[share]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    lines = re.findall(r"(?m)^(\w+) (\d+) ?(\w*)$", (folder / RECORD).read_text())
    did = Counter(int(number) for what, number, _ in lines if what == "did")
    killed = Counter(int(number) for what, number, when in lines if what == "killed" and when != "late")
    count = Counter(what for what, _, _ in lines)
    return Played(did, killed, count["killed"], count["twice"], starts, time.perf_counter() - began)


def cost(folder: Path, items: int) -> tuple[float, float]:
    """Microseconds that a worker spends on taking and finishing an item: on the clock, of the processor."""
    table = new_table(folder, items, tries=3)
    with at_work(table, (0, 1)) as worker:
        clock, processor = time.perf_counter(), time.process_time()
        done = sum(worker.done(claim) for claim in worker.claims())
        spent = time.perf_counter() - clock, time.process_time() - processor
    assert done == items
    return spent[0] / items * 1e6, spent[1] / items * 1e6


def measure(folder: Path) -> None:
    """Print the cost per item by size of the table, medians of several rounds, and the ratio.

    A round has as many tables of 100 items as make 10,000, so that both sizes see the same machine.
    """
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    for number in range(ROUNDS):
        for size in SIZES:
            costs = [cost(folder / f"{number}_{size}_{part}", size) for part in range(SIZES[-1] // size)]
            found[size].append((statistics.fmean(one[0] for one in costs), statistics.fmean(one[1] for one in costs)))
    medians = {size: [statistics.median(column) for column in zip(*rows, strict=True)] for size, rows in found.items()}
    for size, (clock, processor) in medians.items():
        print(f"{size:>6,} items: {clock:6.1f} us an item on the clock, {processor:6.1f} us of the processor")
    few, many = (medians[size] for size in SIZES)
    print(f"ratio, 10,000 to 100: {many[0] / few[0]:.3f} on the clock, {many[1] / few[1]:.3f} of the processor")


def main() -> None:
    """Measure or simulate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.work", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=float, help="share of the items that kill their worker")
    parser.add_argument("--items", type=int, default=SIZES[-1], help="of the simulation")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        number, count = args.share.split("/")
        play(args.play, args.kills, args.seed, (int(number), int(count)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.kills is None:
            measure(Path(folder))
            return
        played = simulate(Path(folder) / "table", args.items, workers=args.workers, kills=args.kills)
    print(
        f"{len(played.did):,} of {args.items:,} items done by {args.workers} workers in {played.seconds:.0f} s, "
        f"{played.kills} kills, {played.starts} starts, {sum(played.did.values()) - len(played.did)} done again "
        f"because their worker was killed before it could say so, {played.twice} begun after they were done"
    )


if __name__ == "__main__":
    main()
