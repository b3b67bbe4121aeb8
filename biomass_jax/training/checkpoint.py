"""What a run keeps: checkpoints of its state and of what the host knows beside it, and its best model as a bundle."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from biomass_jax import bundle
from biomass_jax.errors import CheckpointError
from biomass_jax.runtime.processes import to_host
from biomass_jax.training.state import TrainState

FOLDER = "checkpoints"
FIGURES = "figures"
BEST = "best"
LOSS = "val/loss"


@dataclasses.dataclass
class HostState:
    """What the host knows of a run, saved with the state as JSON."""

    config: dict[str, Any]
    step: int = 0  # steps taken, which is the position in the data too
    epoch: int = 0  # epochs ended
    window: list[float] = dataclasses.field(default_factory=list)  # losses of the steps since the last line
    plateau: dict[str, Any] | None = None  # of `plateau_step`
    early_stop: dict[str, Any] | None = None  # of `early_stop_step`
    best: dict[str, Any] | None = None  # {"step", "loss", "scores"} of the best validation so far
    line: dict[str, Any] | None = None  # of an epoch that ended but isn't written yet
    inputs: dict[str, Any] | None = None  # what it learns from, of `run.inputs_of`; older checkpoints don't tell


class Checkpoints:
    """`checkpoints/` of a workdir, written in the background; the best by `val/loss` and the latest few are kept.

    A checkpoint that was cut short by a kill is not seen by the next run.
    """

    def __init__(self, workdir: Path, *, keep: int) -> None:
        """Open or make the folder; `keep` of the latest are kept, beside the best."""
        self.folder = workdir.absolute() / FOLDER
        policies = [
            preservation_policy.LatestN(keep),
            # reverse: the lowest is the best
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[LOSS], n=1, reverse=True, keep_checkpoints_without_metrics=False
            ),
        ]
        self._begun = False  # a save that nobody has waited for
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                step_prefix="step",
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, host: HostState, *, loss: float | None) -> None:
        """Begin to write; returns when the arrays are copied, before they are on disk.

        Args:
            state: see `TrainState`.
            host: may be changed as soon as this returns.
            loss: `val/loss` where this is the end of an epoch; a checkpoint without one is never the best.
        """
        # A copy: Orbax turns the host's part into JSON in its own time, by when the run has gone on.
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(dataclasses.asdict(host)))
        self._begun = True
        self._manager.save(host.step, args=args, metrics=None if loss is None else {LOSS: loss}, force=True)

    def restore(self, state: TrainState, *, step: int) -> tuple[TrainState, HostState]:
        """Read a checkpoint into the shapes and places of `state`, which may be a planned one.

        Raises:
            CheckpointError: it doesn't fit, since the config changed.
        """
        folder = self.folder / f"step_{step}"
        try:
            # Compared first: Orbax finds a wrong shape in the midst of reading, and its threads print what they find.
            stored = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
            wanted = _shapes(state)
            if stored != wanted:
                name = min(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
                raise ValueError(f"{name}: found {stored.get(name, 'none')}, expected {wanted.get(name, 'none')}")
            args = ocp.args.Composite(state=ocp.args.StandardRestore(state), host=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0][:300]
            raise CheckpointError(
                f"{folder} doesn't fit this config ({first}); resume with the config that it was written with, or "
                "start in another workdir"
            ) from error
        return restored.state, HostState(**restored.host)

    def check(self) -> None:
        """Raise what a save met in the background, without waiting for one that is under way."""
        if self._begun and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when everything begun is on disk."""
        self._begun = False
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        self._manager.close()


def _shapes(tree: object) -> dict[str, tuple[int, ...]]:
    """Shape of each array by its dotted name."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def export_best(workdir: Path, about: dict[str, Any], state: TrainState, best: dict[str, Any]) -> None:
    """Write `best/` in the workdir, whole or not at all, in place of an earlier one.

    Args:
        workdir: of the run.
        about: arguments of `bundle.save`, of `tasks.create.choose`.
        state: whose weights (averages where they are on) are the best so far.
        best: {"step", "loss", "scores"}.
    """
    variables = to_host(state.evaluated())
    if jax.process_index() == 0:
        training = about["training"] | {"scores": best["scores"], "step": best["step"]}
        bundle.save(workdir / BEST, variables, **about | {"training": training}, overwrite=True)
