"""Checkpoints of a run: the state, and beside it what the host knows (position in the data, counters, the config)."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from biomass_jax.errors import CheckpointError
from biomass_jax.training.state import TrainState, abstract_state

FOLDER = "checkpoints"
FIGURES = "figures"
LOSS = "val/loss"


class Checkpoints:
    """`checkpoints/` of a workdir, written in the background; the best by `val/loss` and the latest few are kept.

    A checkpoint that was cut short by a kill is not seen by the next run.
    """

    def __init__(self, workdir: Path, *, keep: int) -> None:
        """Open or make the folder.

        Args:
            workdir: of the run.
            keep: how many of the latest are kept, beside the best.
        """
        self.folder = workdir.absolute() / FOLDER
        policies = [
            preservation_policy.LatestN(keep),
            # reverse: the lowest is the best
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[LOSS], n=1, reverse=True, keep_checkpoints_without_metrics=False
            ),
        ]
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

    def save(self, state: TrainState, host: dict[str, Any], *, step: int, loss: float | None) -> None:
        """Begin to write; returns when the arrays are copied, before they are on disk.

        Args:
            state: see `TrainState`.
            host: plain numbers, texts, lists and dictionaries; may be changed as soon as this returns.
            step: the state's.
            loss: `val/loss` where this is the end of an epoch; a checkpoint without one is never the best.
        """
        # Orbax turns the host's part into JSON in its own time, by when the run has gone on.
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(copy.deepcopy(host)))
        self._manager.save(step, args=args, metrics=None if loss is None else {LOSS: loss}, force=True)

    def restore(self, state: TrainState, *, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint into the shapes and places of `state`.

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
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state(state)), host=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0][:300]
            raise CheckpointError(
                f"{folder} doesn't fit this config ({first}); go on with the config that it was written with, or "
                "start in another workdir"
            ) from error
        return restored.state, restored.host

    def wait(self) -> None:
        """Return when everything begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each array by its dotted name."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def changed_fields(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: was X, now Y` for each field in which two configs differ, nested ones as `group.field`."""
    changes = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_fields(old, new, f"{prefix}{name}.")
        elif json.dumps(old) != json.dumps(new):
            changes.append(f"{prefix}{name}: was {old!r}, now {new!r}")
    return changes
