"""Search for good settings by Optuna: many trainings, several at a time, on one machine or many.

    biomass-jax sweep --config finetune_all_biomes --space finetune --workdir OUT \
        --trials 50 [--parallel 4] [--prune] [--config.field=value ...]

The same command resumes with a sweep that was stopped or killed; given on several machines at once, for example as a
Slurm array, they share the work. See docs/sweeps.md.

Exit codes: 0 finished, 75 stopped by SIGTERM or Ctrl-C (give the same command again to resume), anything else failed.
"""

import argparse
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from ml_collections import ConfigDict
from optuna.trial import TrialState

from biomass_jax.errors import STOPPED, BiomassError, SweepError
from biomass_jax.runtime.lock import refuse_if_held
from biomass_jax.runtime.settings import find_config

from .run_config import depends_on, parse_config
from .sweep_report import as_text, ordered, page, rows, short
from .sweep_space import CONFIGS, SAMPLERS, Space, as_overrides, best_config, check_space, load_space
from .sweep_study import SharedStudy, SweepPlan, write
from .sweep_trial import TrialJob

TRIES = 2  # of a trial that crashes
POLL = 0.5  # seconds between two looks at the trials
PROGRAM = (sys.executable, "-m", "biomass_jax.main")
MODES = ("finetune", "pretrain")  # what has a validation loss
BEST = "best_config.py"
PAGE = "sweep.html"

log = logging.getLogger("sweep")


class Sweep:
    """Runs trials until the study has all of them, or until told to stop."""

    def __init__(
        self,
        shared: SharedStudy,
        config: Path,
        overrides: Sequence[str],
        devices: list[str | None],
        *,
        program: Sequence[str],
    ) -> None:
        """Take over what `main` made.

        Args:
            shared: the study.
            config: base config of all trials.
            overrides: `--config.field=value` of all trials.
            devices: CUDA_VISIBLE_DEVICES of each trial at a time; None = as it is.
            program: what trains; gets --config, --workdir and fields.
        """
        self.shared, self.config, self.overrides, self.program = shared, config, overrides, program
        self.devices = devices
        self.jobs: list[TrialJob] = []
        self.signals = 0

    def stop(self, *_: object) -> None:
        """Have the trials save and leave; the second time, kill them."""
        self.signals += 1

    def run(self) -> bool:
        """Run trials; whether the sweep came to its end, rather than being stopped."""
        waited_for: list[int] = []
        while not self.signals:
            # A process that outlived its sweep still has a GPU, on which another wouldn't find memory.
            orphans = self.shared.orphans() if len(self.jobs) < len(self.devices) else []
            if orphans and orphans != waited_for:
                log.info("waiting for the processes of trials %s, which outlived their sweep", orphans)
            waited_for = orphans
            while not orphans and len(self.jobs) < len(self.devices) and self._begin():
                pass
            if not self.jobs and not orphans:
                return True
            self._watch()
            time.sleep(POLL)
        log.info("stopping: %d trials are told to save", len(self.jobs))
        while self.jobs:
            for job in self.jobs:
                job.terminate()
                if self.signals > 1:
                    job.kill()
            self._watch()
            time.sleep(POLL)
        return False

    def kill(self) -> None:
        """End the trials at once; what they have saved stays."""
        for job in self.jobs:
            job.kill()

    def _begin(self) -> bool:
        """Start the next trial in a free slot; whether there was one."""
        claim = self.shared.claim()
        if claim is None:
            return False
        slot = min(set(range(len(self.devices))) - {job.slot for job in self.jobs})
        job = TrialJob(claim, self.shared.workdir / "trials" / f"{claim.trial.number:04d}", slot=slot)
        self.jobs.append(job)
        values = ", ".join(f"{name} {short(value)}" for name, value in claim.trial.params.items())
        log.info("trial %d%s: %s", claim.trial.number, " resumes" if job.folder.exists() else "", values)
        self._start(job)
        return True

    def _start(self, job: TrialJob) -> None:
        fields = [*self.overrides, *as_overrides(job.trial.params)]
        command = [*self.program, "--config", str(self.config), "--workdir", str(job.folder), *fields]
        job.start(command, self.devices[job.slot])

    def _watch(self) -> None:
        """Look at each trial once: losses, then whether it ended."""
        for job in list(self.jobs):
            code = job.poll()  # before the losses, so that none is missed when it has ended
            for epoch, loss in job.losses().items():
                prune = self.shared.report(job.trial, epoch, loss)
                if prune and code is None and not job.pruned and not self.signals:
                    log.info("trial %d: pruned at epoch %d, val/loss %.5g", job.trial.number, epoch, loss)
                    job.pruned = True
                    job.terminate()
            if code is not None:
                self._ended(job, code)

    def _ended(self, job: TrialJob, code: int) -> None:
        """What becomes of a trial whose process ended."""
        best = job.best()
        if job.pruned:
            self._finish(job, TrialState.PRUNED)
        elif code == 0 and best is not None:
            log.info("trial %d: finished, val/loss %.5g", job.trial.number, best)
            self._finish(job, TrialState.COMPLETE, best)
        elif self.signals:
            self._leave(job)  # it stays as running: the next sweep finds that nobody holds it, and resumes it
        elif code == STOPPED:
            log.info("trial %d: was stopped from outside; resumes", job.trial.number)
            self._start(job)
        else:
            self._crashed(job, code)

    def _crashed(self, job: TrialJob, code: int) -> None:
        what = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if code == 0:
            what = "finished without a finite val/loss"
        job.crashes.append(f"{what}\n{job.tail()}")
        self.shared.note(job.trial, "crashes", job.crashes)
        again = len(job.crashes) < TRIES
        then = "is tried once more" if again else "failed"
        log.warning("trial %d: %s; the trial %s. The end of %s:\n%s", job.trial.number, what, then, job.log, job.tail())
        if again:
            self._start(job)
        else:
            self._finish(job, TrialState.FAIL)

    def _finish(self, job: TrialJob, state: TrialState, value: float | None = None) -> None:
        self.shared.finish(job.trial, state, value)
        self._leave(job)

    def _leave(self, job: TrialJob) -> None:
        job.leave()
        self.jobs.remove(job)


def report(shared: SharedStudy, config: Path, overrides: Sequence[str]) -> bool:
    """Print the table; write the best config and the page. Whether any trial finished."""
    trials = shared.trials()[: shared.total]
    print(as_text(rows(trials)), flush=True)
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    running = counts[TrialState.RUNNING] + counts[TrialState.WAITING]
    summary = (
        f"{counts[TrialState.COMPLETE]} trials finished, {counts[TrialState.PRUNED]} pruned, "
        f"{counts[TrialState.FAIL]} failed" + (f", {running} still running elsewhere" if running else "")
    )
    log.info("%s", summary)
    for trial in trials:
        if trial.state == TrialState.FAIL:
            log.warning("trial %d failed: %s", trial.number, trial.user_attrs.get("crashes", ["no log"])[-1])
    workdir = shared.workdir
    if counts[TrialState.COMPLETE]:
        best = ordered(trials)[0]
        about = f"Trial {best.number} of {len(trials)}, val/loss {best.value:.5g}; written by launch.sweep."
        write(workdir / BEST, best_config(config, overrides, best.params, about))
        log.info("the best: trial %d, val/loss %.5g: %s", best.number, best.value, workdir / BEST)
    write(workdir / PAGE, page(shared.study, f"Sweep over {config}", summary))
    log.info("plots of importance and history: %s", workdir / PAGE)
    return counts[TrialState.COMPLETE] > 0


def cuda_devices(parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each of the trials at a time: one GPU each; None where there is none to share out.

    A single trial at a time has all GPUs that the sweep has.

    Raises:
        SweepError: fewer GPUs than trials at a time.
    """
    if parallel < 1:
        raise SweepError(f"--parallel is {parallel}; expected a number from 1 on")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if parallel == 1 or os.environ.get("JAX_PLATFORMS") == "cpu":
        found = []
    elif visible is not None:
        found = [name.strip() for name in visible.split(",") if name.strip()]
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        found = [
            str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))
        ]
    else:
        found = []
    if found and len(found) < parallel:
        raise SweepError(f"--parallel is {parallel}, but there are {len(found)} GPUs ({', '.join(found)}): one a trial")
    return [*found[:parallel]] if found else [None] * parallel


def parser() -> argparse.ArgumentParser:
    """The command line; `--config.field=value` comes beside it."""
    parser = argparse.ArgumentParser("python -m launch.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, help="config of all trials: a file, or the name of one of configs/")
    parser.add_argument("--space", required=True, help="fields to vary: a file, or the name of one of configs/sweeps/")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the study and its trials")
    parser.add_argument("--trials", type=int, help="of the study in all, over restarts and machines; grid: all")
    parser.add_argument("--parallel", type=int, default=1, help="trials at a time here, each on a GPU of its own")
    parser.add_argument("--storage", help="URL of a database that machines share; default: SQLite in the workdir")
    parser.add_argument("--sampler", choices=SAMPLERS, default="tpe")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--prune", action="store_true", help="end trials that are worse than the median of others")
    return parser


def make_plan(arguments: argparse.Namespace, overrides: list[str]) -> SweepPlan:
    """The search that the command line asks for, after every check that needs no trial.

    Raises:
        SweepError: what doesn't fit.
    """
    config = parse_config(arguments.config, overrides)
    if config.mode not in MODES:
        raise SweepError(f"{arguments.config}: mode is {config.mode!r}; expected one of {', '.join(MODES)}")
    if config.get("overwrite"):
        raise SweepError("overwrite=True would begin a trial anew each time that it resumes; leave it off")
    space = load_space(arguments.space, arguments.sampler)
    check_space(space, arguments.config, overrides, arguments.space)
    trials = arguments.trials
    if trials is None:
        if arguments.sampler != "grid":
            raise SweepError(f"--trials is needed for --sampler {arguments.sampler}; only a grid has an end of its own")
        trials = sys.maxsize
    if trials < 1:
        raise SweepError(f"--trials is {trials}; expected a number from 1 on")
    resolved = arguments.config.resolve()
    root = CONFIGS.parent  # the checkout, or the installed package
    name = str(resolved.relative_to(root) if resolved.is_relative_to(root) else resolved)
    return SweepPlan(
        space=space,
        sampler=arguments.sampler,
        seed=arguments.seed,
        trials=trials,
        prune_after=(config.get("epochs") or 0) // 10 if arguments.prune else None,
        described={"config": name, "overrides": sorted(overrides)} | described(config, space),
    )


def described(config: ConfigDict, space: Space) -> dict[str, Any]:
    """What trials depend on beside their own fields: the base config, the data and bundles that it or the space names.

    All are looked at now, so that none is missed by the first trial.

    Raises:
        SweepError: data or a bundle that can't be used.
    """
    data, start = (_named(config, space, field) for field in ("data.path", "init_from"))
    return depends_on(config, data=data, start=start)


def _named(config: ConfigDict, space: Space, field: str) -> list[str]:
    """The values of a field that trials may have."""
    if field in space:
        return [str(value) for value in getattr(space[field], "choices", ()) if value]
    group, _, name = field.rpartition(".")
    value = (config.get(group, {}) if group else config).get(name)
    return [value] if value else []


def main(argv: Sequence[str] | None = None, *, program: Sequence[str] = PROGRAM) -> int:
    """Run a sweep; the exit code.

    Args:
        argv: the command line; that of the process where none is given.
        program: what trains, see `Sweep`.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments, overrides = parser().parse_known_args(argv)
    try:
        arguments.config = find_config(arguments.config)
        arguments.space = find_config(arguments.space, "sweeps")
        plan = make_plan(arguments, overrides)
        devices = cuda_devices(arguments.parallel)
        refuse_if_held(arguments.workdir)  # by a run; sweeps of one folder share its trials
        shared = SharedStudy(arguments.workdir, arguments.storage, plan)
    except BiomassError as error:
        log.error("%s", error)
        return 1
    with contextlib.closing(shared):
        sweep = Sweep(shared, arguments.config, overrides, devices, program=program)
        before = {number: signal.signal(number, sweep.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            finished = sweep.run()
        except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
            sweep.kill()
            first = str(error).splitlines()[0]
            log.error("%s: can't be read or written any more: %s; the sweep ends here", arguments.workdir, first)
            return 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if not finished:
            log.warning("stopped; give the same command again to resume")
            return STOPPED
        return 0 if report(shared, arguments.config, overrides) else 1


if __name__ == "__main__":
    sys.exit(main())
