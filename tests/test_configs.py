"""Configs: each becomes a jitted step, none has a field that nobody reads, and each says how it is run."""

import importlib
import re

import jax
import numpy as np
import pytest
import rasterio

from biomass_jax import main
from biomass_jax.data import bands, sources
from biomass_jax.evaluation import evaluate
from biomass_jax.models.build import MODULES
from biomass_jax.runtime import mesh as sharding
from biomass_jax.tasks.create import choose
from biomass_jax.training import run as training
from tests.training import world

SWIN_B = {
    "finetune_all_biomes": 87_382_105,
    "few_shot_taiga": 87_382_105,
    "finetune_frozen_encoder": 87_382_105,
    "spread": 87_382_105 + 33,
    "pretrain_simmim_swin_b_100ep": 93_047_096,
    "pretrain_simmim_swin_b_800ep": 93_047_096,
}
DEMOS = ("demo_finetune", "demo_pretrain")
TRAINING = (*SWIN_B, *DEMOS)


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config()


def fields(config, prefix=""):
    """Dotted names of all fields."""
    found = set()
    for name, value in config.items():
        found |= fields(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name}
    return found


def test_every_config_is_known_here(root):
    others = {"__init__", "common", "evaluate", "predict", "prepare"}  # prepare: tests/data_prep
    assert {path.stem for path in (root / "configs").glob("*.py")} == {*TRAINING, *others}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")  # as in test_loop: programs are compiled once


def plan(name, shards):
    config = config_of(name)
    task, _ = choose(config, sources.open_source(shards, "train"), None, command="")
    mesh = sharding.create_mesh(jax.devices(), **config.mesh)
    return config, training.plan_steps(config, task, mesh, total_steps=1000, steps_per_epoch=20)


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["finetune_all_biomes", "pretrain_simmim_swin_b_100ep"])
def test_swin_b_has_the_parameters_of_the_original(name, shards):
    _, planned = plan(name, shards)
    assert count(planned.state.params) == SWIN_B[name]


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in [*SWIN_B, "demo_pretrain"]), "demo_finetune"]
)
def test_every_config_becomes_its_jitted_step(name, shards):
    config, planned = plan(name, shards)
    rows = (config.batch_size, 224, 224)
    batch = {"image": jax.ShapeDtypeStruct((*rows, 6), np.int16), "label": jax.ShapeDtypeStruct(rows, np.float32)}
    state = planned.state
    after, metrics = planned.steps.train.eval_shape(state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype(np.float32)}
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(
        ("loss", "learning_rate", "grad_norm", "count"), ()
    )
    outputs, _ = planned.steps.evaluate.eval_shape(
        after.evaluated(), batch | {"valid": jax.ShapeDtypeStruct(rows[:1], bool)}, np.int32(0)
    )
    assert {leaf.shape[0] for leaf in jax.tree.leaves(outputs)} == {config.batch_size}
    assert count(after.params) == SWIN_B.get(name, count(after.params))
    # What does not learn has no moments.
    moments = count(state.opt_state)
    frozen = count(state.params.get("encoder", {})) if config.optimizer.freeze else 0
    trained = 33 if name == "spread" else count(state.params) - frozen
    assert moments == 2 * trained + 1


def test_every_model_field_is_the_modules(shards):
    for name in TRAINING:
        config = config_of(name)
        module = MODULES["simmim" if config.mode == "pretrain" else "biomass"]
        given = set(config.model) - {"variant", "remat"}
        assert given <= set(module.__dataclass_fields__), name


class Recorder:
    """Stands for a config and notes the dotted names of the fields that are read."""

    def __init__(self, config, read, prefix=""):
        self.__dict__.update(_config=config, _read=read, _prefix=prefix)

    def __getitem__(self, name):
        value = self._config[name]
        if hasattr(value, "items"):
            return Recorder(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name):
        return name in self._config

    def get(self, name, default=None):
        return self[name] if name in self._config else default

    def keys(self):
        return self._config.keys()

    def items(self):
        return [(name, self[name]) for name in self._config]

    def to_dict(self):  # for records of the run: nothing depends on it
        return self._config.to_dict()

    def to_json(self):
        return self._config.to_json()


MAINS = {"mode", "deterministic"}  # read before a mode begins


def unread(config, workdir, monkeypatch):
    """Run a config as `main` does; the fields that nothing has read."""
    read = set()
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    workdir.mkdir()
    main.MODES[config.mode](Recorder(config, read), workdir)
    return fields(config) - read - MAINS


@pytest.fixture(scope="module")
def finetuned(shards, tmp_path_factory):
    """A finished run of the fine-tuning config, and what it did not read."""
    workdir = tmp_path_factory.mktemp("finetune") / "run"
    config = world.configure(config_of("finetune_all_biomes"), data__path=str(shards), epochs=1)
    config.optimizer.learning_rate = 1e-3
    with pytest.MonkeyPatch.context() as monkeypatch:
        return workdir, unread(config, workdir, monkeypatch)


@pytest.mark.long
def test_every_field_of_fine_tuning_is_read(finetuned):
    workdir, missed = finetuned
    assert (workdir / "best" / "bundle.json").is_file()
    assert missed == set()


@pytest.mark.long
def test_every_field_of_pretraining_is_read(shards, tmp_path, monkeypatch):
    config = config_of("pretrain_simmim_swin_b_100ep")
    config.update_from_flattened_dict(
        world.TINY_PRETRAINING | {"data.path": str(shards), "epochs": 1, "schedule.warmup_epochs": 0.5}
    )
    config.augment.size = world.SIDE
    assert unread(config, tmp_path / "run", monkeypatch) == set()


@pytest.mark.long
def test_every_field_of_an_evaluation_is_read(finetuned, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    config = config_of("evaluate")
    config.update_from_flattened_dict({"bundle": str(finetuned[0] / "best"), "data.path": str(shards)})
    assert unread(config, tmp_path / "run", monkeypatch) == set()
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.long
def test_every_field_of_a_prediction_is_read(finetuned, tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(500, 3000, (6, 32, 32)).astype(np.int16)
    form = {"driver": "GTiff", "height": 32, "width": 32, "count": 6, "dtype": "int16", "nodata": -9999}
    place = {"crs": "EPSG:32610", "transform": rasterio.Affine(30, 0, 6e5, 0, -30, 4.2e6)}
    with rasterio.open(tmp_path / "scene.tif", "w", **form, **place) as file:
        file.write(image)
        file.descriptions = bands.BAND_NAMES
    config = config_of("predict")
    config.update({"bundle": str(finetuned[0] / "best"), "inputs": str(tmp_path / "scene.tif")})
    assert unread(config, tmp_path / "run", monkeypatch) == set()
    assert (tmp_path / "run" / "scene_agbd.tif").is_file()


@pytest.mark.parametrize("name", ["few_shot_taiga", "finetune_frozen_encoder", "spread", "demo_finetune"])
def test_other_configs_of_fine_tuning_have_the_same_fields(name):
    assert fields(config_of(name)) == fields(config_of("finetune_all_biomes"))


@pytest.mark.parametrize("name", ["pretrain_simmim_swin_b_800ep", "demo_pretrain"])
def test_other_configs_of_pretraining_have_the_same_fields(name):
    assert fields(config_of(name)) == fields(config_of("pretrain_simmim_swin_b_100ep"))


@pytest.mark.parametrize("name", [*TRAINING, "evaluate"])
def test_each_docstring_says_how_it_is_run_on_what_and_what_is_expected(name):
    config, text = config_of(name), importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m biomass_jax.main --config {name} --workdir " in text
    assert re.search(r"(?i)hardware|cores", text)
    assert re.search(r"(?i)expected", text)
    assert ("--config.reference=True" in text) == ("reference" in config)
    given = set(re.findall(r"--config\.([\w.]+)=", text))
    assert given <= fields(config), given - fields(config)


def test_configs_are_locked():
    for name in (*TRAINING, "evaluate", "predict"):
        with pytest.raises(AttributeError):
            config_of(name).no_such_field = 1
