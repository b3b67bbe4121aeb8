"""Faults of a training config are one line that names the field, before anything is computed."""

import pytest

from biomass_jax.errors import BiomassError
from biomass_jax.training import run
from biomass_jax.training import run as training
from configs import finetune_all_biomes, pretrain_simmim_swin_b_100ep
from tests.training import world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(autouse=True)
def computed(monkeypatch):
    """Nothing may be drawn: the faults show before."""

    def draw(*_):
        raise AssertionError("weights were drawn")

    monkeypatch.setattr(training, "create_train_state", draw)


def fault(tmp_path, shards, get_config=finetune_all_biomes.get_config, **fields):
    config = get_config()
    if get_config is pretrain_simmim_swin_b_100ep.get_config:
        config.update_from_flattened_dict(
            world.TINY_PRETRAINING | {"epochs": 3, "data.path": str(shards), "dtype": "float32"}
        )
    else:
        config = world.configure(config, epochs=3, data__path=str(shards))
    for name, value in fields.items():
        group, _, field = name.replace("__", ".").rpartition(".")
        (config[group] if group else config)[field] = value
    with pytest.raises(BiomassError) as caught:
        run.train_and_evaluate(config, tmp_path / "run", stop=lambda: False)
    said = str(caught.value)
    assert said.count("\n") == 0
    return said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", "l2"),
        ("schedule.kind", "linear"),
        ("load", "some"),
        ("dtype", "float8"),
        ("matmul_precision", "best"),
        ("data.cache", "ram"),
        ("data.statistics", "mine"),
        ("model.variant", "swin_x"),
        ("batch_size", 0),
        ("epochs", 0),
        ("log_every", 0),
        ("seed", -1),
        ("data.threads", 0),
        ("checkpoint.keep", 0),
        ("checkpoint.every_steps", -1),
        ("huber_delta", 0.0),
        ("optimizer.gradient_accumulation", 0),
        ("optimizer.learning_rate", -1.0),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.ema_decay", 1.0),
        ("optimizer.betas", (0.9, 2.0)),
        ("optimizer.betas", (0.9,)),
        ("optimizer.layer_decay", 0.0),
        ("schedule.factor", 1.0),
        ("schedule.stop_patience", -1),
        ("augment.rotate_probability", 2.0),
        ("augment.rotate_degrees", -3.0),
        ("profile", "x"),
    ],
)
def test_a_value_that_cannot_be_names_its_field(tmp_path, shards, field, value):
    said = fault(tmp_path, shards, **{field.replace(".", "__"): value})
    assert said.startswith(f"config.{field} is {value!r}; expected ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer.decay": "none"}, "config.optimizer.decay is 'none'; expected one of weights, all"),
        ({"optimizer.freeze": ("encodr",)}, "config.optimizer: freeze: no parameter is called 'encodr'"),
        ({"optimizer.freeze": ("encoder", "decoder", "head")}, "leave no parameter to train"),
        ({"optimizer.gradient_accumulation": 3}, "config.batch_size is 4; expected a multiple of 3"),
        ({"batch_size": 21}, "split train has 20 chips; expected at least 21"),
        ({"mesh.data": 3}, "config.mesh: data 3 x fsdp 1 is not the number of devices"),
        ({"epochs": None}, "config.epochs"),
        ({"resume_optimizer": True}, "config.resume_optimizer goes with config.init_from"),
        ({"data.statistics": "bundle"}, "config.data.statistics is 'bundle', but config.init_from names none"),
        ({"data.means": (1.0,)}, "config.data.means and config.data.stds go together"),
        ({"data.means": (1.0,), "data.stds": (1.0,)}, "config.data.means and stds: expected 6 numbers each"),
        ({"data.means": (1.0,) * 6, "data.stds": (0.0,) * 6}, "stds above 0"),
        ({"data.path": None}, "config.data.path is not given"),
        ({"init_from": "nowhere"}, "nowhere: not a model bundle"),
        ({"data.bands": "A,B"}, "unknown band name 'A'"),
        ({"model.remat": (7,)}, "config.model: remat names stages [7]"),
        ({"model.attention": "flash"}, "config.model.attention is 'flash'; expected one of auto, einsum, fused"),
        ({"model.attention": "fused"}, "attention is 'fused', but "),  # no GPU, or else heads of 8 channels
        ({"model.num_heads": (3, 3)}, "config.model: stage 0 has 8 channels, not divisible by 3 heads"),
        ({"schedule.kind": "cosine", "schedule.warmup_epochs": 3.0}, "config.schedule: cosine schedule: the warm-up"),
        ({"schedule.warmup_epochs": 1.0}, "config.schedule.warmup_epochs with config.schedule.kind=plateau"),
        ({"schedule.kind": "multistep", "schedule.milestones": (3, 2)}, "config.schedule: multistep schedule"),
        ({"reference": True, "loss": "mae"}, "config.reference with config.loss=mae"),
        ({"nll_beta": 1.5}, "config.nll_beta is 1.5; expected a number from 0 to 1"),
        (
            {"model.spread": "normal"},
            "config.model.spread is 'normal'; expected one of none, gaussian, laplace, quantil",
        ),
        (
            {"model.spread": "quantiles", "loss": "pinball", "model.quantile_levels": (0.9, 0.1)},
            "config.model: quantile_levels are (0.9, 0.1); expected two or more that increase between 0 and 1",
        ),
    ],
)
def test_fields_that_do_not_fit_are_one_line(tmp_path, shards, fields, words):
    said = fault(tmp_path, shards, **{name.replace(".", "__"): value for name, value in fields.items()})
    assert words in said


def test_moments_of_frozen_weights_are_refused(tmp_path, shards):
    fields = {"resume_optimizer": True, "init_from": "b", "optimizer__freeze": ("encoder",)}
    assert "frozen weights have no moments" in fault(tmp_path, shards, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_from": None}, "config.spread_only goes with config.init_from and load='all'"),
        ({"load": "encoder"}, "config.spread_only goes with config.init_from and load='all'"),
        ({"resume_optimizer": True}, "config.spread_only with config.resume_optimizer: frozen weights have no moments"),
        (
            {"data__statistics": "dataset"},
            "config.spread_only with config.data.statistics=dataset: frozen weights need",
        ),
        ({"data__means": (1.0,) * 6, "data__stds": (1.0,) * 6}, "config.spread_only with config.data.means=(1.0, 1.0"),
    ],
)
def test_what_a_spread_alone_cannot_be_trained_with(tmp_path, shards, fields, words):
    given = {"spread_only": True, "init_from": "b", "loss": "gaussian_nll", "model__spread": "gaussian"}
    assert words in fault(tmp_path, shards, **given | fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask_ratio": 1.5}, "config.mask_ratio is 1.5; expected a number above 0 to 1"),
        ({"mask_patch_size": 24}, "config.mask_patch_size is 24 px; expected a divisor"),
        ({"data.weights": (1.0, 2.0)}, "config.data.weights has 2 numbers, config.data.path 1 folders"),
        ({"loss": "rmse"}, None),
    ],
)
def test_fields_of_pretraining(tmp_path, shards, fields, words):
    get_config = pretrain_simmim_swin_b_100ep.get_config
    fields = {name.replace(".", "__"): value for name, value in fields.items()}
    if words is None:  # a field of fine-tuning
        with pytest.raises((AttributeError, KeyError)):
            fault(tmp_path, shards, get_config, **fields)
    else:
        assert words in fault(tmp_path, shards, get_config, **fields)


def test_nothing_is_in_the_workdir_after_a_fault(tmp_path, shards):
    fault(tmp_path, shards, loss="l2")
    assert not list(tmp_path.rglob("*.jsonl"))
