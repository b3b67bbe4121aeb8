"""What a step does, against NumPy: accumulation, averages, frozen weights, learning rates, what `reference` means."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.data import sources
from biomass_jax.runtime import cpu
from biomass_jax.runtime import mesh as sharding
from biomass_jax.tasks import losses
from biomass_jax.tasks import regression as tasks
from biomass_jax.tasks.create import choose
from biomass_jax.training import plateau
from biomass_jax.training import run as training
from biomass_jax.training.optimizer import create_optimizer, create_schedule, trainable_mask
from biomass_jax.training.state import create_train_state, plan_train_state
from biomass_jax.training.steps import StepSettings, compile_steps
from configs import finetune_all_biomes
from tests.training import world

B, SIDE = 8, 4


class Part(nn.Module):
    size: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.size)(x)


class Model(nn.Module):
    """Two dense layers with noise between them: an encoder and a head without batch norms."""

    noise: float = 0.0

    def setup(self):
        self.encoder, self.head = Part(5), Part(1)

    def __call__(self, x, *, train=False):
        y = jnp.tanh(self.encoder(x))
        if train and self.noise:
            y = y + self.noise * jax.random.normal(self.make_rng("drop_path"), y.shape)
        return 100 + 50 * self.head(y)[..., 0]


@dataclasses.dataclass(frozen=True)
class Stub:
    """A task whose batches are its inputs."""

    module: nn.Module = Model()
    loss: str = "rmse"

    def init(self, key):
        rng = np.random.default_rng(0)  # nothing to compile
        shapes = {"encoder": (6, 5), "head": (5, 1)}
        params = {
            name: {
                "Dense_0": {"kernel": rng.normal(0, 0.5, shape).astype(np.float32), "bias": np.zeros(shape[1:], "f")}
            }
            for name, shape in shapes.items()
        }
        return {"params": params, "batch_stats": {"seen": np.zeros((), np.float32)}}

    def inputs(self, batch, key):
        return batch

    def loss_sums(self, variables, inputs, key):
        model = {"params": variables["params"]}
        prediction = self.module.apply(model, inputs["image"], train=True, rngs=tasks.model_keys(key))
        total, count = losses.loss_sums(prediction, inputs["label"], self.loss, huber_delta=20.0)
        return total, count, {"seen": variables["batch_stats"]["seen"] + 1}

    def finish(self, total, count):
        return losses.finish(total, count, self.loss)

    def evaluate(self, variables, batch, number):
        return {}, {}


def batch_of(seed=0, labelled=0.3):
    """Rows with very different numbers of labels, so that a mean of means would show."""
    rng = np.random.default_rng(seed)
    known = rng.random((B, SIDE, SIDE)) < labelled * np.arange(B)[:, None, None] / 4
    return {
        "image": rng.normal(size=(B, SIDE, SIDE, 6)).astype(np.float32),
        "label": np.where(known, rng.gamma(2, 70, known.shape), -1).astype(np.float32),
    }


def begin(task=None, *, accumulation=1, ema=0.0, freeze=(), schedule=None, rate=None):
    """State and compiled steps of a task, with granite's AdamW."""
    task = task or Stub()
    mesh = sharding.create_mesh()
    params = task.init(None)["params"]
    optimizer = create_optimizer(params, weight_decay=0.03, freeze=freeze)
    fresh, planned = plan_train_state(task, optimizer, mesh, seed=3, ema=ema > 0, learning_rate=rate)
    options = StepSettings(3, accumulation, ema, trainable_mask(params, freeze))
    schedule = schedule or create_schedule("constant", learning_rate=0.01)
    state = create_train_state(fresh, planned)
    return state, compile_steps(task, optimizer, schedule, options, mesh, planned)


def host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


@pytest.mark.parametrize(("kind", "numbers"), [("rmse", (2, 4)), ("mae", (4,)), ("huber", (4,))])
def test_accumulation_gives_the_step_of_the_whole_batch(kind, numbers):
    results = []
    for parts in (1, *numbers):
        state, steps = begin(Stub(loss=kind), accumulation=parts)
        for seed in range(2):
            state, metrics = steps.train(state, batch_of(seed))
        results.append((host(state), {name: float(value) for name, value in metrics.items()}))
    (whole, expected), *others = results
    labels = batch_of(1)["label"]
    assert expected["count"] == (labels >= 0).sum() > 20
    for parts, (state, metrics) in zip(numbers, others, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, whole.params)
        assert (whole.batch_stats["seen"], state.batch_stats["seen"]) == (2, 2 * parts)  # one micro-batch after another


def test_the_loss_is_that_of_the_labels_and_a_batch_without_any_changes_little():
    state, steps = begin()
    batch, params = batch_of(), host(state.params)
    hidden = np.tanh(batch["image"] @ params["encoder"]["Dense_0"]["kernel"] + params["encoder"]["Dense_0"]["bias"])
    output = hidden @ params["head"]["Dense_0"]["kernel"] + params["head"]["Dense_0"]["bias"]
    errors = (100 + 50 * output[..., 0] - batch["label"])[batch["label"] >= 0]
    state, metrics = steps.train(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.sqrt(np.mean(errors.astype(np.float64) ** 2)), rtol=1e-5)
    _, metrics = steps.train(state, batch | {"label": np.full_like(batch["label"], -1)})
    assert (metrics["loss"], metrics["count"], metrics["grad_norm"]) == (0, 0, 0)


def test_averages_follow_the_weights_and_batch_statistics():
    decay = 0.9
    state, steps = begin(ema=decay)
    expected = host({"params": state.params, "batch_stats": state.batch_stats})
    for seed in range(4):
        state, _ = steps.train(state, batch_of(seed))
        now = host({"params": state.params, "batch_stats": state.batch_stats})
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, expected, now)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), host(state.ema), expected)
    assert state.evaluated() is state.ema
    behind = expected["params"]["head"]["Dense_0"]["kernel"] - now["params"]["head"]["Dense_0"]["kernel"]
    assert np.abs(behind).max() > 0.005
    plain, _ = begin()
    assert plain.ema is None and plain.evaluated()["params"] is plain.params


def test_a_frozen_encoder_keeps_every_bit_while_it_draws():
    losses_seen = []
    # The rate is the state's, so that a rate of 0 shows what is drawn.
    state, steps = begin(Stub(Model(0.5)), freeze=("encoder",), rate=0.0)
    before, fresh = host(state.params), host(state)
    for _ in range(3):
        state, metrics = steps.train(state, batch_of())
        losses_seen.append(float(metrics["loss"]))
    assert len(set(losses_seen)) == 3  # the same batch and weights, another draw
    again = dataclasses.replace(fresh, step=np.int32(2))
    assert float(steps.train(again, batch_of())[1]["loss"]) == losses_seen[2]  # by the step alone
    state = dataclasses.replace(fresh, learning_rate=np.float32(0.01))
    for seed in range(3):
        state, _ = steps.train(state, batch_of(seed))
    jax.tree.map(np.testing.assert_array_equal, before["encoder"], host(state.params["encoder"]))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["head"], host(state.params["head"]))
    assert min(jax.tree.leaves(moved)) > 0.01


class Kept(Model):
    """The gradient of what is added up reaches it through `computed_once`."""

    def __call__(self, x, *, train=False):
        return super().__call__(cpu.computed_once(x + jnp.tanh(x)), train=train)


def test_the_step_keeps_what_is_to_be_computed_once():
    state, steps = begin(Stub(module=Kept()))
    text = steps.train.lower(state, batch_of()).compile().as_text()
    assert "opt-barrier" in text  # without cpu.COMPILER_OPTIONS, XLA takes it out on CPU


def test_the_rate_of_each_step_is_the_schedules_or_the_states():
    options = {"learning_rate": 0.01, "warmup_steps": 2, "warmup_from": 0.001, "total_steps": 6, "min_lr": 0.002}
    state, steps = begin(schedule=create_schedule("cosine", **options))
    found = []
    for _ in range(6):
        state, metrics = steps.train(state, batch_of())
        found.append(float(metrics["learning_rate"]))
    expected = [0.001, 0.0055, *(0.002 + 0.004 * (1 + np.cos(np.pi * t / 6)) for t in range(2, 6))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    state, steps = begin(rate=0.03)  # a plateau: the loop moves it between steps, nothing is compiled anew
    state, metrics = steps.train(state, batch_of())
    assert metrics["learning_rate"] == np.float32(0.03)
    reduced = plateau.plateau_init(0.03, factor=0.1, patience=0, threshold=1e-4)
    for loss in (1.0, 1.0):
        reduced = plateau.plateau_step(reduced, loss)
    placed = jax.device_put(np.float32(reduced["lr"]), state.learning_rate.sharding)
    before = host(state.params)
    state, metrics = steps.train(dataclasses.replace(state, learning_rate=placed), batch_of())
    np.testing.assert_allclose(metrics["learning_rate"], 0.003, rtol=1e-6)
    moved = np.abs(host(state.params)["head"]["Dense_0"]["bias"] - before["head"]["Dense_0"]["bias"]).max()
    assert 0.002 < moved < 0.0045  # Adam's second step is about as long as the rate
    assert steps.train._cache_size() == 1


@pytest.fixture(scope="module")
def reference_task(tmp_path_factory):
    """The task of `reference=True` on the small shards."""
    shards = world.write(tmp_path_factory.mktemp("data") / "shards", train=2, val=0, test=0)
    config = world.configure(finetune_all_biomes.get_config(), reference=True, epochs=1)
    return config, choose(config, sources.open_source(shards, "train"), None, command="")[0]


def test_the_references_loss_of_a_validation_is_the_mean_of_its_batches_by_hand(reference_task):
    _, task = reference_task
    rng = np.random.default_rng(4)
    scorer, plain = task.scorer(), dataclasses.replace(task, reference=False).scorer()
    weighted, squares, labels = 0.0, 0.0, 0
    for chips, share in ((4, 0.5), (4, 0.01), (2, 0.2)):  # the last batch is padded
        prediction = rng.gamma(2, 60, (4, 8, 8)).astype(np.float32)
        label = np.where(rng.random((4, 8, 8)) < share, rng.gamma(2, 60, (4, 8, 8)), -1).astype(np.float32)
        valid = np.arange(4) < chips
        for each in (scorer, plain):
            each.add({"prediction": prediction, "label": label}, valid)
        known = (label >= 0) & valid[:, None, None]
        errors = (prediction.astype(np.float64) - label)[known] ** 2
        weighted += chips * np.sqrt(errors.sum() / (errors.size + 1.19e-7))
        squares, labels = squares + errors.sum(), labels + errors.size
    result, exact = scorer.results([scorer.vector()]), plain.results([plain.vector()])
    np.testing.assert_allclose(result["val/loss"], weighted / 10, rtol=1e-12)
    np.testing.assert_allclose([result["val/rmse"], exact["val/loss"]], np.sqrt(squares / labels), rtol=1e-12)
    assert abs(result["val/loss"] - exact["val/loss"]) > 0.1


@pytest.mark.parametrize("kind", ["rmse", "mse", "mae", "huber"])
def test_the_loss_of_a_validation_is_the_training_loss_of_all_its_pixels(kind):
    rng = np.random.default_rng(5)
    prediction = rng.gamma(2, 60, (6, 8, 8)).astype(np.float32)
    label = np.where(rng.random((6, 8, 8)) < 0.3, rng.gamma(2, 60, (6, 8, 8)), -1).astype(np.float32)
    scorer = tasks.RegressionScorer(kind, 50.0, False)
    for part in (slice(0, 4), slice(4, 6)):
        rows = {"prediction": prediction[part], "label": label[part]}
        scorer.add(rows, np.ones(len(rows["label"]), bool))
    total, count = losses.loss_sums(prediction, label, kind, huber_delta=50.0)
    expected = float(losses.finish(total, count, kind))
    np.testing.assert_allclose(scorer.results([scorer.vector()])["val/loss"], expected, rtol=1e-5)


def test_the_reference_decays_everything(reference_task):
    config, _ = reference_task
    params = {"encoder": {"norm": {"scale": np.ones(3), "bias": np.ones(3)}}, "head": {"kernel": np.ones((2, 3))}}
    for reference in (True, False):
        with config.unlocked():
            config.reference = reference
        optimizer = training.make_optimizer(config, params)
        zero = jax.tree.map(np.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        expected = config.optimizer.weight_decay if reference else 0.0
        np.testing.assert_allclose(updates["encoder"]["norm"]["scale"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates["encoder"]["norm"]["bias"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates["head"]["kernel"], config.optimizer.weight_decay, rtol=1e-6)
