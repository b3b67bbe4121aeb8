"""`config.mode = 'finetune'`: train, validate, keep the best."""

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from biomass_jax.training.build import build_run
from biomass_jax.training.export import BEST
from biomass_jax.training.loop import Loop
from biomass_jax.training.settings import check_fields

log = logging.getLogger(__name__)


def train_and_evaluate(config: Any, workdir: Path, *, stop: Callable[[], bool]) -> bool:
    """Train as the config says, from where the workdir stands.

    Args:
        config: of configs/finetune_*.py or configs/pretrain_*.py.
        workdir: of the run: `checkpoints/`, `metrics.jsonl`, TensorBoard events and `best/`, a bundle.
        stop: whether to save and leave; asked after each step.

    Returns:
        whether the run is finished; False = it was stopped, and can be started again.

    Raises:
        ConfigError, DataError, MeshError, BundleError, CheckpointError, ProfileError: before the first step.
        TrainingError: the loss became NaN or infinite.
    """
    check_fields(config)
    with jax.default_matmul_precision(config.matmul_precision):
        run = build_run(config, workdir, command=shlex.join(["python", "-m", "biomass_jax.main", *sys.argv[1:]]))
        try:
            finished = Loop(run, stop=stop).fit()
        finally:
            run.close()
    if finished and run.host["best"] is not None:
        best = run.host["best"]
        log.info("finished; the best model, of step %d, val/loss %.5g: %s", best["step"], best["loss"], workdir / BEST)
    return finished
