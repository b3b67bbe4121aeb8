"""The study that sweep processes share: who runs which trial, and what came of it.

A trial is one Optuna trial with one number and one folder for good, however often its process is started. Optuna's
storage knows states and values; locks on files in the workdir tell whether a trial that the storage calls running still
has somebody: the kernel lets go of them when a process dies, however it dies. Optuna's own heartbeat is not used: it
needs minutes to notice, and gives the trial that it revives another number.
"""

import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from biomass_jax.errors import SweepError
from biomass_jax.runtime.files import replacing
from biomass_jax.runtime.settings import changed_fields, known_fields
from biomass_jax.runtime.system import lock

from .sweep_space import Space, grid

EMBEDDED = "study.db"  # SQLite in the workdir, where no other storage is named
SETTINGS = "sweep.json"
HOST = socket.gethostname().encode()

log = logging.getLogger("sweep")


@dataclass(frozen=True)
class SweepPlan:
    """What to search, how, and how much.

    Attributes:
        space: fields and what they may be.
        sampler: `tpe`, `random` or `grid`.
        seed: of the sampler.
        trials: of the study, over all processes and restarts.
        prune_after: epochs before which no trial is pruned; None = no pruning.
        described: what must not change between two starts, as JSON: base config, overrides and the like.
    """

    space: Space
    sampler: str
    seed: int
    trials: int
    prune_after: int | None
    described: dict[str, Any]


class TrialLock:
    """Held while a trial runs: by the sweep that owns it, and by the trial's process too, which may outlive the sweep.

    Attributes:
        handle: file descriptor that the trial's process has to inherit.
    """

    def __init__(self, owner: int, handle: int) -> None:
        self._owner, self.handle = owner, handle

    def release(self) -> None:
        """Let go, as far as this process is concerned."""
        os.close(self._owner)
        os.close(self.handle)


class Claim(NamedTuple):
    """A trial that this process is to run.

    Attributes:
        trial: with all fields sampled.
        lock: to be held as long as it runs.
        before: what the storage knew of it; a trial that lost its sweep may have losses and crashes.
    """

    trial: Trial
    lock: TrialLock
    before: FrozenTrial


class Locks:
    """Locks in a folder that all processes of a sweep see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of the sweep is inside this at the same time."""
        handle = os.open(self._folder / "study", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(handle, wait=True)
            yield
        finally:
            os.close(handle)

    def take(self, number: int) -> TrialLock | None:
        """Both locks of a trial, or None where a sweep or the trial's own process holds one."""
        owner = self._try(number, "owner")
        if owner is None:
            return None
        handle = self._try(number, "run")
        if handle is None:
            os.close(owner)
            return None
        os.truncate(owner, 0)
        os.write(owner, HOST)
        return TrialLock(owner, handle)

    def orphaned(self, number: int) -> bool:
        """Whether the trial's process is still there on this machine, but its sweep is not."""
        owner = self._try(number, "owner")
        if owner is None:
            return False
        handle = self._try(number, "run")
        if handle is not None:
            os.close(handle)
        here = os.read(owner, len(HOST) + 1) == HOST  # just opened, so from its beginning
        os.close(owner)
        return handle is None and here

    def _try(self, number: int, kind: str) -> int | None:
        handle = os.open(self._folder / f"{number:04d}.{kind}", os.O_RDWR | os.O_CREAT, 0o644)
        if lock(handle):
            return handle
        os.close(handle)
        return None


class SharedStudy:
    """An Optuna study of which other processes may run trials at the same time."""

    def __init__(self, workdir: Path, storage: str | None, plan: SweepPlan) -> None:
        """Open the study of a workdir, or begin it.

        Args:
            workdir: of the sweep, on a file system whose locks all its processes share.
            storage: database URL; None = SQLite in the workdir.
            plan: what to search.

        Raises:
            SweepError: the study was begun with other settings, or workdir and storage don't belong together.
        """
        self.workdir, self.plan = workdir, plan
        self._grid = grid(plan.space, plan.seed) if plan.sampler == "grid" else None
        self.total = min(plan.trials, len(self._grid)) if self._grid is not None else plan.trials
        workdir.mkdir(parents=True, exist_ok=True)
        self._locks = Locks(workdir / ".locks")
        with self._locks.alone():  # Optuna makes tables without asking whether another process is about to
            self._storage = open_storage(storage or f"sqlite:///{workdir.absolute() / EMBEDDED}")
            self.study = self._open(storage)
        self.study.pruner = _pruner(plan.prune_after)

    def _open(self, storage: str | None) -> optuna.Study:
        """The study, after a look at whether it is the one meant."""
        path = self.workdir / SETTINGS
        shown = sqlalchemy.make_url(storage).render_as_string() if storage else EMBEDDED  # hides the password
        # A database may hold many sweeps, a workdir's own SQLite only one, which may be moved with it.
        settings: dict[str, Any] = {"study": str(self.workdir.resolve()) if storage else "sweep", "storage": shown}
        settings |= self.plan.described | {"sampler": self.plan.sampler, "seed": self.plan.seed}
        settings |= {"space": {name: json.loads(distribution_to_json(d)) for name, d in self.plan.space.items()}}
        settings = json.loads(json.dumps(settings))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            settings["study"] = before["study"]
            unknown = sorted(settings.keys() - before)
            changes = changed_fields(before, known_fields(before, settings))
            if changes:
                more = f", and {len(changes) - 1} more changes" if changes[1:] else ""
                raise SweepError(
                    f"{path}: this sweep was begun with other settings or data: {changes[0]}{more}; "
                    "give the same again, or another --workdir"
                )
            if unknown:
                log.warning("%s, an older version's, doesn't tell %s; taken as they are now", path, ", ".join(unknown))
                write(path, json.dumps(before | settings, indent=2) + "\n")
            try:
                return optuna.load_study(study_name=settings["study"], storage=self._storage)
            except KeyError as error:
                raise SweepError(f"{shown} doesn't hold the study of {path}; give another --workdir") from error
        study = optuna.create_study(study_name=settings["study"], storage=self._storage, load_if_exists=True)
        if study.get_trials(deepcopy=False):
            raise SweepError(
                f"{shown} holds trials of a study {settings['study']!r}, but {path} isn't there; give another --workdir"
            )
        write(path, json.dumps(settings, indent=2) + "\n")
        return study

    def claim(self) -> Claim | None:
        """A trial to run: one that lost its sweep, else a new one; None where there is none of either.

        Its fields are sampled. Values depend on the seed and the trial's number (and, for `tpe`, on what is known by
        then), not on which process asks.
        """
        with self._locks.alone():
            trials = self.study.get_trials(deepcopy=False)
            for frozen in trials:
                if frozen.state == TrialState.RUNNING and frozen.number < self.total:
                    lock = self._locks.take(frozen.number)
                    if lock is not None:
                        return Claim(self._sampled(Trial(self.study, frozen._trial_id)), lock, frozen)
            waiting = [frozen.number for frozen in trials if frozen.state == TrialState.WAITING]
            number = min(waiting, default=len(trials))
            if number >= self.total:
                return None
            # Optuna's GridSampler gives a combination up whose trial was cut short while it began; the queue doesn't.
            if self._grid is not None and not waiting:
                self.study.enqueue_trial(self._grid[number])
            self.study.sampler = _sampler(self.plan.sampler, self.plan.seed, number)
            trial = self._sampled(self.study.ask())
            lock = self._locks.take(trial.number)
            assert lock is not None, "a new trial's lock is free"
            return Claim(trial, lock, self.study.get_trials(deepcopy=False)[trial.number])

    def _sampled(self, trial: Trial) -> Trial:
        """Give every field a value that has none yet: a sweep may have died between two of them."""
        for field, distribution in self.plan.space.items():
            if isinstance(distribution, CategoricalDistribution):
                trial.suggest_categorical(field, distribution.choices)
            else:
                assert isinstance(distribution, FloatDistribution | IntDistribution)
                suggest: Any = trial.suggest_float
                if isinstance(distribution, IntDistribution):
                    suggest = trial.suggest_int
                suggest(field, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
        return trial

    def orphans(self) -> list[int]:
        """Trials whose process is still there on this machine, but whose sweep isn't."""
        with self._locks.alone():  # asking takes a lock for a moment, in which nobody may claim
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            return [frozen.number for frozen in running if self._locks.orphaned(frozen.number)]

    def report(self, trial: Trial, epoch: int, loss: float) -> bool:
        """Note a validation loss; whether the trial should be pruned."""
        with self._locks.alone():
            trial.report(loss, epoch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of a trial whose losses are all NaN: it's pruned
            return trial.should_prune()

    def note(self, trial: Trial, name: str, value: Any) -> None:
        """Keep a fact with a trial."""
        with self._locks.alone():
            trial.set_user_attr(name, value)

    def finish(self, trial: Trial, state: TrialState, value: float | None = None) -> None:
        """Set what became of a trial; `value` where it is complete."""
        with self._locks.alone():
            self.study.tell(trial, value, state=state)

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage behind a database URL.

    Raises:
        SweepError: no such database, or its driver isn't installed.
    """
    try:
        arguments: dict[str, Any] = {"pool_pre_ping": True}  # a server may have closed a connection that was idle
        if sqlalchemy.make_url(url).drivername == "sqlite":
            # A sweep waits for another one's writing rather than fail after SQLite's 5 s.
            arguments = {"connect_args": {"timeout": 60}}
        return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        text = str(error).splitlines()[0]
        raise SweepError(f"--storage: can't open the database: {text}; expected a URL as SQLAlchemy has it") from error


def write(path: Path, text: str) -> None:
    """Write a file whole; several searches of one workdir may do so at a time."""
    with replacing(path, f".{os.getpid()}") as partial:
        partial.write_text(text, encoding="utf-8")


def _sampler(kind: str, seed: int, number: int) -> BaseSampler:
    """A sampler whose random numbers belong to one trial: restarts and other processes don't draw the same again."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return TPESampler(seed=own) if kind == "tpe" else RandomSampler(seed=own)


def _pruner(after: int | None) -> BasePruner:
    """Ends a trial whose best loss so far is worse than the median of finished trials by the same epoch."""
    return NopPruner() if after is None else MedianPruner(n_startup_trials=5, n_warmup_steps=after)
