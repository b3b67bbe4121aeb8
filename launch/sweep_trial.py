"""One trial's process: started, watched, stopped."""

import json
import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biomass_jax.runtime.system import end_group

from . import sweep_child
from .sweep_study import Claim

LOG = "log.txt"
METRICS = "metrics.jsonl"
TAIL_LINES = 15  # of the log, kept where a trial crashed
GRACE = 120.0  # seconds that a pruned trial may take to leave


class TrialJob:
    """A trial that this sweep runs.

    Attributes:
        trial: Optuna's side of it.
        folder: its workdir.
        slot: its place among the ones that run at a time.
        crashes: last lines of the log, one text for each time that it crashed.
        log: what its process says.
        pruned: whether it was told to leave because it is no good.
    """

    def __init__(self, claim: Claim, folder: Path, *, slot: int) -> None:
        self.trial, self.folder, self.slot = claim.trial, folder, slot
        self.crashes: list[str] = list(claim.before.user_attrs.get("crashes", []))
        self.log = folder / LOG
        self.pruned = False
        self._seen = set(claim.before.intermediate_values)
        self._lock = claim.lock
        self._signature: tuple[int, int, int] | None = None
        self._told: float | None = None

    def start(self, command: Sequence[str], device: str | None) -> None:
        """Start the trial's process, or start it again: it resumes from what its workdir holds.

        Args:
            command: program and arguments.
            device: value of CUDA_VISIBLE_DEVICES; None = as it is.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        with self.log.open("ab") as log:
            log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} $ {shlex.join(command)}\n".encode())
            log.flush()
            self._began = log.tell()
            before = sweep_child.words()  # none where no program becomes another, nor is given open files
            self._process = subprocess.Popen(
                [*before, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the sweep, which then asks its trials to save
                pass_fds=(self._lock.handle,) if before else (),
            )
        self._told = None

    def poll(self) -> int | None:
        """Exit code, or None while it runs; a pruned trial that doesn't leave in time is killed."""
        if self.pruned and self._told is not None and time.monotonic() - self._told > GRACE:
            self.kill()
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to save and leave, once."""
        if self._told is None:
            self._told = time.monotonic()
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and whatever it started, now."""
        if self._process.poll() is None:
            end_group(self._process, at_once=True)

    def losses(self) -> dict[int, float]:
        """Validation losses by epoch that weren't there the last time; NaN for one that isn't finite."""
        path = self.folder / METRICS
        try:
            found = path.stat()
        except FileNotFoundError:
            return {}
        signature = (found.st_ino, found.st_size, found.st_mtime_ns)
        if signature == self._signature:
            return {}
        self._signature = signature
        new = {epoch: loss for epoch, loss in read_losses(path).items() if epoch not in self._seen}
        self._seen |= new.keys()
        return new

    def best(self) -> float | None:
        """The lowest finite validation loss of the run, which is that of its `best/`; None where there is none."""
        path = self.folder / METRICS
        losses = read_losses(path).values() if path.exists() else ()
        return min((loss for loss in losses if math.isfinite(loss)), default=None)

    def tail(self) -> str:
        """The last lines that its process wrote since it was started."""
        with self.log.open("rb") as log:
            log.seek(max(self._began, log.seek(0, os.SEEK_END) - TAIL_LINES * 1000))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(line[:500] for line in lines[-TAIL_LINES:])

    def leave(self) -> None:
        """Let go of the trial."""
        self._lock.release()


def read_losses(path: Path) -> dict[int, float]:
    """`val/loss` by epoch of a `metrics.jsonl`, also of one that is being written."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:
            continue  # not whole yet, or cut short by a kill
        if "val/loss" in line and "epoch" in line:
            found[line["epoch"]] = math.nan if line["val/loss"] is None else float(line["val/loss"])
    return found
