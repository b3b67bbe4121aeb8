"""A run that trains low-rank updates: what moves, what is written, and that it resumes to the bit."""

import os
import shutil

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.errors import BundleError, CheckpointError, ConfigError
from biomass_jax.models.lora import is_update
from biomass_jax.training import run as training
from biomass_jax.trees import flatten, weights_sha256
from configs import finetune_all_biomes
from tests.prediction.stubs import random_bundle
from tests.training import world
from tests.training.runs import assert_same_run, final_state, lines, train

pytestmark = pytest.mark.slow
SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 8}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards", train=12, val=4, test=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return bundle.load(random_bundle(tmp_path_factory.mktemp("base") / "bundle", **SMALL, final_relu=False))


def config_of(base, shards, **fields):
    config = finetune_all_biomes.get_config()
    given = {"init_from": str(base.path), "data.path": str(shards), "data.threads": 2, "batch_size": 4, "epochs": 3}
    given |= {"lora.rank": 2, "lora.alpha": 6.0, "lora.targets": ("qkv", "fc2"), "lora.dropout": 0.25}
    given |= {"model.drop_path_rate": 0.1, "optimizer.learning_rate": 0.01, "optimizer.ema_decay": 0.5, "log_every": 1}
    config.update_from_flattened_dict(given | {name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module")
def whole(base, shards, tmp_path_factory):
    """A run never interrupted: workdir, and the state at its end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    config = config_of(base, shards)
    assert train(config, workdir)
    return workdir, final_state(workdir, config)


def test_it(base, whole):
    best = bundle.load(whole[0] / "best")
    print(best.meta)
    print(list(bundle.stored_shapes(whole[0] / "best" / "variables")["params"]["encoder"]))
    print(bundle.verify(whole[0] / "best"))
    print(sorted(whole[1])[:5], lines(whole[0])[-1])
