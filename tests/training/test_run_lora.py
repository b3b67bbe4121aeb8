"""A run that trains low-rank updates: what moves, what is written, and that it resumes to the bit."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert.merge import merge
from biomass_jax.errors import CheckpointError, ConfigError
from biomass_jax.evaluation import evaluate as evaluation
from biomass_jax.models.lora import Lora, is_update
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.runtime.mesh import local_placement
from biomass_jax.tasks.create import chosen_lora
from biomass_jax.training import run as training
from biomass_jax.training.config import check_fields
from biomass_jax.trees import flatten, weights_sha256
from configs import finetune_all_biomes
from configs.evaluate import get_config as evaluate_config
from tests.prediction.stubs import coded_image, random_bundle, read_map, write_raster
from tests.training import world
from tests.training.runs import assert_same_run, final_state, lines, train

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


@pytest.mark.long
def test_nothing_moves_but_updates_decoder_and_head(base, whole):
    best = bundle.load_adapter(whole[0] / "best", base)
    found, old = flatten(best.variables), flatten(base.variables)
    assert {name for name in found if is_update(name)} == found.keys() - old.keys() and len(found) - len(old) == 8
    moved = {name for name, leaf in old.items() if np.any(np.asarray(found[name]) != np.asarray(leaf))}
    assert moved and not any(name.startswith("params/encoder/") for name in moved)
    assert {name.split("/")[1] for name in moved} == {"decoder", "head"}
    updates = [np.abs(leaf).max() for name, leaf in found.items() if name.endswith("lora_b")]
    assert len(updates) == 4 and min(updates) > 1e-3
    for name, leaf in old.items():  # of the state itself, too, and of its averages
        if name.startswith("params/encoder/"):
            _, *parts = name.split("/")
            key = "".join(f"['{part}']" for part in parts)
            for tree in (f".params{key}", f".ema['params']{key}"):
                np.testing.assert_array_equal(whole[1][tree], leaf, err_msg=tree)


@pytest.mark.long
def test_moments_are_those_of_what_is_trained(base, whole):
    moments = {name: leaf.size for name, leaf in whole[1].items() if ".mu" in name or ".nu" in name}
    trained = sum(leaf.size for name, leaf in flatten(base.variables["params"]).items() if "encoder" not in name)
    # qkv 8 -> 24 and fc2 16 -> 8 of the first stage, 16 -> 48 and 32 -> 16 of the second, at rank 2.
    trained += 2 * (8 + 24 + 16 + 8 + 16 + 48 + 32 + 16)
    assert sum(moments.values()) == 2 * trained


@pytest.mark.long
def test_the_best_model_is_an_adapter_of_the_base(base, whole):
    meta = bundle.read_meta(whole[0] / "best")
    known = {"path": str(base.path), "weights_sha256": base.weights_sha256}
    known["relative"] = os.path.relpath(base.path, whole[0] / "best")
    assert meta["adapter"] == {"base": known, "rank": 2, "alpha": 6.0, "targets": ["qkv", "fc2"]}
    merged = bundle.load(whole[0] / "best")
    assert weights_sha256(merged.variables) == merged.weights_sha256 != base.weights_sha256
    assert merged.meta["architecture"] == base.meta["architecture"] | {"drop_path_rate": 0.1}


@pytest.mark.long
def test_scores_are_those_of_the_merged_model(base, whole, shards):
    """The best epoch's val/rmse, from the merged weights and the validation chips by hand."""
    best = bundle.load(whole[0] / "best")
    chips = [world.make_record("val", index) for index in range(4)]
    images = (np.stack([chip["image"] for chip in chips]).astype(np.float32) - best.means) / best.stds
    labels = np.stack([chip["label"] for chip in chips])
    found = np.asarray(jax.jit(best.module().apply)(best.variables, images))
    rmse = np.sqrt(np.mean((found - labels)[labels >= 0].astype(np.float64) ** 2))
    assert abs(rmse / best.meta["training"]["scores"]["val/rmse"] - 1) < 1e-5


@pytest.mark.long
def test_a_run_that_was_cut_short_resumes_to_the_bit(base, shards, whole, tmp_path):
    config = config_of(base, shards)
    steps = iter(range(100))
    assert not train(config, tmp_path / "run", stop=lambda: next(steps) >= 4)  # within the second epoch
    assert 0 < len(lines(tmp_path / "run")) < len(lines(whole[0]))
    assert train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", config, whole)


@pytest.mark.long
def test_another_scale_or_other_layers_are_no_way_to_resume(base, shards, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    for change, said in (
        ({"lora.alpha": 7.0}, "config.lora.alpha: was 6.0, now 7.0"),
        ({"lora.targets": ("qkv",)}, "doesn't fit this config .*fc2.lora_a: found"),
    ):
        with pytest.raises(CheckpointError, match=said):
            training.set_up(config_of(base, shards, **change), tmp_path / "run", command="")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_from": None}, "config.lora goes with config.init_from"),
        ({"optimizer.freeze": ("encoder",)}, "config.lora with config.optimizer.freeze='encoder'"),
        ({"spread_only": True}, "config.lora with config.spread_only"),
        ({"resume_optimizer": True}, "config.lora with config.resume_optimizer"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change, said):
    config = finetune_all_biomes.get_config()
    config.update_from_flattened_dict({"init_from": "base", "lora.rank": 8})
    check_fields(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=said):
        check_fields(config)


@pytest.mark.parametrize("targets", [(), ("qkv", "qkv"), ("norm1",)])
def test_layers_that_are_none_are_refused(targets):
    config = finetune_all_biomes.get_config()
    assert chosen_lora(config) is None
    config.update_from_flattened_dict({"lora.rank": 8})
    assert chosen_lora(config) == Lora(8, 16.0, ("qkv", "proj"))
    config.update_from_flattened_dict({"lora.targets": targets})
    with pytest.raises(ConfigError, match="expected some of qkv, proj, fc1, fc2, each once"):
        chosen_lora(config)


@pytest.mark.long
def test_maps_and_scores_take_an_adapter_as_a_bundle(base, whole, shards, tmp_path):
    image = write_raster(tmp_path / "scene.tif", coded_image(40, 36))
    place = bundle.load(whole[0] / "best")
    merged = merge(whole[0] / "best", tmp_path / "merged")
    maps = [Predictor.open(path).predict_file(image, tmp_path / f"{path.name}.tif") for path in (place.path, merged)]
    one, other = (read_map(done.path) for done in maps)
    np.testing.assert_array_equal(one, other)
    assert np.ptp(one) > 0
    shutil.move(tmp_path / "merged", tmp_path / "elsewhere")
    config = evaluate_config()
    config.update_from_flattened_dict({"data.path": str(shards), "data.split": "val", "data.threads": 2})
    config.update_from_flattened_dict({"figures.count": 0, "bundle": str(place.path), "base": str(base.path)})
    (tmp_path / "scores").mkdir()
    evaluation.run(config, tmp_path / "scores", shardings=local_placement)
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert abs(scores["rmse"] / place.meta["training"]["scores"]["val/rmse"] - 1) < 1e-5
