"""The best state of a run as a bundle, which is all that maps, scores and a further training need."""

from pathlib import Path
from typing import Any

import jax

from biomass_jax import bundle
from biomass_jax.runtime.hosts import to_host
from biomass_jax.training.state import TrainState

BEST = "best"


def export_best(workdir: Path, about: dict[str, Any], state: TrainState, best: dict[str, Any]) -> None:
    """Write `best/` in the workdir, whole or not at all, in place of an earlier one.

    Args:
        workdir: of the run.
        about: of `Choice`.
        state: whose weights (averages where they are on) are the best so far.
        best: {"step", "loss", "scores"}.
    """
    variables = to_host(state.evaluated())
    if jax.process_index() == 0:
        bundle.save(
            workdir / BEST,
            variables,
            task=about["task"],
            architecture=about["architecture"],
            input=about["input"],
            output=about["output"],
            training=about["training"] | {"scores": best["scores"], "step": best["step"]},
            provenance={
                "source": about["source"],
                "sha256": about["source_sha256"],
                "command": about["command"],
                "versions": bundle.software_versions(),
            },
            overwrite=True,
        )
