"""Pretraining as a task of the loop: cut runs, scores, masks, data, and what becomes of its bundle."""

import dataclasses
import logging
import signal
import subprocess
import sys
import time
from collections import Counter

import jax
import numpy as np
import pytest

from biomass_jax import bundle, figures
from biomass_jax.bundle import flatten
from biomass_jax.convert import __main__ as convert_command
from biomass_jax.convert import torch_file
from biomass_jax.convert.convert import nested, read
from biomass_jax.convert.declared import Options
from biomass_jax.data import bands, sources
from biomass_jax.errors import ConfigError, TrainingError
from biomass_jax.tasks import simmim
from biomass_jax.training import run as training
from biomass_jax.training.run import make_schedule
from configs import finetune_all_biomes, pretrain_simmim_swin_b_100ep, pretrain_simmim_swin_b_800ep
from tests.training import world
from tests.training.runs import assert_same_run, final_state, lines, train

CELL, VAL = 8, 7  # px of a masked cell; validation chips, two batches
TINY = world.TINY_PRETRAINING | {
    "dtype": "float32",
    "epochs": 2,
    "draw_every": 0,
    "mask_patch_size": CELL,
    "augment.size": world.SIDE,
    "optimizer.learning_rate": 1e-3,
    "optimizer.reference_batch": 0,
    "schedule.warmup_epochs": 0.4,
}

pytestmark = pytest.mark.slow  # whole runs: each compiles its own step


def with_gaps(record):
    """A chip with a corner and a single pixel that hold no data."""
    image = record["image"].copy()
    image[:11, :13] = -9999
    image[20, 5] = 0
    return record | {"image": image}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards", test=0, change=with_gaps)


def config_of(shards, **fields):
    config = pretrain_simmim_swin_b_100ep.get_config()
    given = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(TINY | {"data.path": str(shards)} | given)
    return config


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    config = config_of(shards)
    assert train(config, workdir)
    return workdir, final_state(workdir, config)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(unbroken, shards, tmp_path):
    calls = iter(range(1, 100))
    assert not train(config_of(shards), tmp_path / "run", stop=lambda: next(calls) == 7)
    assert lines(tmp_path / "run")[-1]["step"] == 6
    assert train(config_of(shards), tmp_path / "run")
    assert_same_run(tmp_path / "run", config_of(shards), unbroken)


def test_a_loss_that_is_not_finite_stops_the_run(shards, tmp_path):
    begun = training.set_up(config_of(shards), tmp_path / "run", command="")
    token = begun.state.params["mask_token"]
    params = begun.state.params | {
        "mask_token": jax.device_put(np.full(token.shape, np.nan, np.float32), token.sharding)
    }
    begun.state = dataclasses.replace(begun.state, params=params)
    with pytest.raises(TrainingError) as caught:
        begun.fit(stop=lambda: False)
    begun.close()
    said = str(caught.value)
    assert "the loss became nan at step 1" in said
    assert said.count("train_") == 4  # the chips of the batch
    assert "The last good checkpoint: none" in said
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_finishes_the_same_run(unbroken, root, shards, tmp_path):
    workdir = tmp_path / "run"
    fields = [f"--config.{name}={value}" for name, value in (TINY | {"data.path": str(shards)}).items()]
    command = [sys.executable, "-m", "biomass_jax.main", "--config", "configs/pretrain_simmim_swin_b_100ep.py"]
    command += ["--workdir", str(workdir), *fields]
    process = subprocess.Popen([*command, "--config.epochs=1000"], cwd=root, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while time.monotonic() < until and not ((workdir / "metrics.jsonl").exists() and lines(workdir)):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    stopped = int(said.split("stopping at step ")[1].split(":")[0])
    epochs = stopped // 5 + 2
    done = subprocess.run([*command, f"--config.epochs={epochs}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {stopped} of {5 * epochs}" in done.stderr
    assert lines(workdir)[-1]["epoch"] == epochs
    assert bundle.read_meta(workdir / "best")["task"] == "simmim"


def validation_chips(shards):
    """In the order of the shards, which is that of validation."""
    source = sources.open_source(shards, "val")
    return [source[index] for index in range(len(source))]


def masked_pixels(config):
    """The masks of validation by the rule that docs/pretrain.md gives: from the seed and the batch's number."""
    key = jax.random.key(config.seed)
    drawn = []
    for number, count in enumerate((4, VAL - 4)):
        mask = simmim.block_mask(
            jax.random.fold_in(key, number), 4, world.SIDE, world.SIDE, mask_patch_size=CELL, ratio=config.mask_ratio
        )
        drawn.append(np.asarray(mask)[:count].repeat(4, axis=1).repeat(4, axis=2) == 1)
    return np.concatenate(drawn)


def cell_statistics(target, known):
    """Mean and spread of each cell and band over its pixels with data, by plain loops, at each pixel."""
    means, spreads = np.empty_like(target), np.empty_like(target)
    for n, y, x, c in np.ndindex(len(target), world.SIDE // CELL, world.SIDE // CELL, target.shape[-1]):
        at = np.s_[n, CELL * y : CELL * (y + 1), CELL * x : CELL * (x + 1)]
        values = target[at][..., c][known[at]]
        mean = values.mean() if values.size else 0.0
        variance = values.var(ddof=1) if values.size > 1 else 0.0
        means[at + (c,)], spreads[at + (c,)] = mean, np.sqrt(variance + 1e-6)
    return means, spreads


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="recipe"),
        pytest.param({"skip_nodata": False}, id="no-data counts", marks=pytest.mark.slow),
        pytest.param({"normalize_targets": True}, id="normalised", marks=pytest.mark.slow),
        pytest.param({"seed": 5, "mask_ratio": 0.3}, id="other masks", marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_numpy(shards, tmp_path, fields):
    config = config_of(shards, **fields)
    begun = training.set_up(config, tmp_path / "run", command="")
    state, task = jax.tree.map(np.array, begun.state.params), begun.task
    found = begun.validate()
    begun.state = dataclasses.replace(begun.state, step=begun.state.step + 3)
    assert begun.validate() == found  # the same masks every time
    begun.close()
    image = np.stack([record["image"] for record in validation_chips(shards)]).astype(np.float32)
    known = ~(np.any(image == -9999, -1) | np.all(image == 0, -1))
    image[~known] = 0
    z = ((image - task.statistics.means.astype(np.float32)) / task.statistics.stds.astype(np.float32)).astype(
        np.float32
    )
    masked = masked_pixels(config)
    tokens = masked[:, ::4, ::4].astype(np.float32)
    painted = np.asarray(jax.jit(task.module.apply)({"params": state}, z, tokens), np.float64)
    counted = masked & known if config.skip_nodata else masked
    target = z.astype(np.float64)
    if config.normalize_targets:
        means, spreads = cell_statistics(target, known)
        target = (target - means) / spreads
    error = np.abs(painted - target)[counted]
    np.testing.assert_allclose(found["val/loss"], error.mean(), rtol=1e-5)
    by_band = [found[f"val/l1_{name.lower()}"] for name in bands.BAND_NAMES]
    np.testing.assert_allclose(by_band, error.mean(0), rtol=1e-5)
    assert counted.sum() < masked.sum() or not config.skip_nodata


def losses_of(config, workdir):
    """Losses of three steps from fresh weights, the weights after them and their scores."""
    begun = training.set_up(config, workdir, command="")
    batches, losses = begun.feed.batches(start=0), []
    for _ in range(3):
        begun.state, metrics = begun.steps.train(begun.state, next(batches).arrays)
        losses.append(float(metrics["loss"]))
    scores = begun.validate()
    begun.close()
    return losses, bundle.weights_sha256(begun.state.evaluated()), scores


def test_labels_are_ignored(shards, tmp_path):
    def unlabelled(record):
        return with_gaps(record) | {"label": np.full_like(record["label"], -1)}

    bare = world.write(tmp_path / "unlabelled", test=0, change=unlabelled)
    expected = losses_of(config_of(shards), tmp_path / "labelled")
    assert len(set(expected[0])) == 3
    assert losses_of(config_of(bare), tmp_path / "run") == expected


def test_an_epoch_of_several_folders_holds_their_chips_by_weight(tmp_path):
    def named(letter):
        return lambda record: record | {"chip_id": f"{letter}_{record['chip_id']}"}

    a = world.write(tmp_path / "a", train=12, val=2, test=0, change=named("a"))
    b = world.write(tmp_path / "b", train=8, val=3, test=0, seed=9, change=named("b"))
    config = config_of(f"{a},{b}", data__weights=(3.0, 1.0))
    begun = training.set_up(config, tmp_path / "run", command="")
    assert begun.steps_per_epoch == 4  # all 12 of a, 4 of b's 8
    batches = begun.feed.batches(start=0)
    seen = []
    for _ in range(2):
        chips = [chip.chip_id for _ in range(4) for chip in next(batches).chips]
        assert len(set(chips)) == 16
        assert Counter(chip[0] for chip in chips) == {"a": 12, "b": 4}
        seen.append({chip for chip in chips if chip[0] == "b"})
    assert seen[0] != seen[1]
    scored = [chip.chip_id for batch in begun.feed.validation() for chip in batch.chips if chip.chip_id]
    assert Counter(chip[0] for chip in scored) == {"a": 2, "b": 3}
    begun.close()
    # Statistics are those of all training chips together.
    images = [world.make_record("train", i)["image"] for i in range(12)]
    images += [world.make_record("train", i, seed=9)["image"] for i in range(8)]
    means = np.stack(images).reshape(-1, 6).astype(np.float64).mean(0)
    np.testing.assert_allclose(begun.about["input"]["means"], means, rtol=1e-9)


@pytest.mark.slow
def test_the_picture_is_of_validation_chips(unbroken, shards, tmp_path, monkeypatch):
    drawn = []
    real = figures.reconstructions
    monkeypatch.setattr(figures, "reconstructions", lambda panels, **text: drawn.append(panels) or real(panels, **text))
    config = config_of(shards, draw_every=1, init_from=str(unbroken[0] / "best"), normalize_targets=True)
    begun = training.set_up(config, tmp_path, command="")
    begun.validate(picture=True)
    begun.close()
    assert (tmp_path / "figures" / "validation.png").read_bytes().startswith(b"\x89PNG")
    (panels,) = drawn
    assert [panel.title for panel in panels] == [record["chip_id"] for record in validation_chips(shards)[:3]]
    task, masks = begun.task, masked_pixels(config)
    images = np.stack([record["image"] for record in validation_chips(shards)]).astype(np.float32)
    known = ~(np.any(images == -9999, -1) | np.all(images == 0, -1))
    images[~known] = 0
    z = ((images - task.statistics.means) / task.statistics.stds).astype(np.float32)
    params = bundle.load(unbroken[0] / "best").variables["params"]
    painted = jax.jit(task.module.apply)({"params": params}, z, masks[:, ::4, ::4].astype(np.float32))
    means, spreads = cell_statistics(z.astype(np.float64), known)  # the picture is in z-scores, whatever the loss is of
    for i, panel in enumerate(panels):
        np.testing.assert_array_equal(panel.mask.repeat(4, 0).repeat(4, 1), masks[i])
        np.testing.assert_array_equal(panel.nodata, ~known[i])
        np.testing.assert_allclose(panel.image, z[i], atol=1e-5)
        np.testing.assert_allclose(panel.reconstruction, painted[i] * spreads[i] + means[i], atol=1e-4)


@pytest.fixture(scope="module")
def finetuned(unbroken, shards, tmp_path_factory):
    """Fine-tuning that begins with the pretrained encoder: the bundle, the fresh state, what was said."""
    loaded = bundle.load(unbroken[0] / "best")
    config = finetune_all_biomes.get_config()
    given = {"init_from": str(loaded.path), "load": "encoder", "data.path": str(shards), "batch_size": 4}
    config.update_from_flattened_dict(given | {"model.decoder_channels": 8, "epochs": 1})
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("biomass_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    begun = training.set_up(config, tmp_path_factory.mktemp("finetune"), command="")
    begun.close()
    logger.removeHandler(handler)
    logger.setLevel(level)
    return loaded, begun, said


def test_fine_tuning_begins_with_the_encoder(finetuned):
    loaded, begun, said = finetuned
    pretrained, fresh = flatten(loaded.variables["params"]["encoder"]), flatten(begun.state.params["encoder"])
    shared = pretrained.keys() & fresh.keys()
    assert fresh.keys() - shared == {f"stages_{i}/norm/{what}" for i in range(2) for what in ("scale", "bias")}
    assert pretrained.keys() - shared == {"norm/scale", "norm/bias"}
    for path in shared:
        np.testing.assert_array_equal(fresh[path], pretrained[path], err_msg=path)
    (drawn,) = (text.removeprefix("not loaded, drawn anew: ") for text in said if text.startswith("not loaded"))
    (unused,) = (text.removeprefix("in the bundle, not used: ") for text in said if text.startswith("in the bundle"))
    variables = flatten({"params": begun.state.params, "batch_stats": begun.state.batch_stats})
    ends = ("params/encoder/norm/scale", "params/encoder/norm/bias")
    loaded_paths = {f"params/encoder/{path}" for path in shared}
    assert drawn.startswith(f"{len(variables.keys() - loaded_paths)} arrays, of decoder/bottleneck, ")
    assert drawn.endswith(" in all)") and len(drawn) < 200
    left = flatten(loaded.variables).keys() - loaded_paths
    assert left == {"params/mask_token", "params/decoder/kernel", "params/decoder/bias", *ends}
    assert unused == f"{len(left)} arrays, of decoder/bias, decoder/kernel, encoder/norm, mask_token"
    fields = begun.task.module
    for name in ("embed_dim", "depths", "num_heads", "mlp_ratio", "window_size", "patch_size", "shift_single_window"):
        value = loaded.meta["architecture"][name]
        assert getattr(fields, name) == (tuple(value) if isinstance(value, list) else value)
    assert begun.about["input"]["means"] == loaded.meta["input"]["means"]


def test_the_bundle_goes_back_to_the_official_layout(unbroken, tmp_path):
    best = unbroken[0] / "best"
    flags = ["--input", str(best), "--output", str(tmp_path / "model.pth"), "--to", "torch", "--img-size", "224"]
    assert convert_command.main(flags) == 0
    written = torch_file.read(tmp_path / "model.pth").root["model"]
    arrays = flatten(bundle.load(best).variables["params"])
    kernel = written["encoder.layers.1.blocks.0.attn.qkv.weight"].array()
    np.testing.assert_array_equal(kernel.T, arrays["encoder/stages_1/blocks_0/attn/qkv/kernel"])
    np.testing.assert_array_equal(written["encoder.mask_token"].array(), arrays["mask_token"])
    assert written["decoder.0.weight"].array().shape == (8 * 8 * 6, 16, 1, 1)
    again = read(tmp_path / "model.pth", options=Options())  # what no tensor says went along
    meta = bundle.read_meta(best)
    assert again.layout.task == meta["task"] == "simmim"
    assert bundle.weights_sha256(nested(again.variables)) == meta["weights_sha256"]
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in again.architecture.items()}
    assert found == {name: meta["architecture"][name] for name in found}


def test_sizes_that_do_not_fit_are_an_error_that_names_the_field(shards, tmp_path):
    for fields, named in (
        ({"mask_patch_size": 12}, "config.mask_patch_size is 12 px"),
        ({"mask_patch_size": 4, "augment__size": 36}, "encoder_stride"),
    ):
        with pytest.raises(ConfigError, match=named):
            training.set_up(config_of(shards, **fields), tmp_path / "run", command="")


def test_rates_are_those_of_the_official_recipes_times_four():
    """microsoft/SimMIM: scaled by the batch over 512, here 2048; 625 steps are an epoch of 1,280,000 images."""
    per_epoch = 625
    config = pretrain_simmim_swin_b_100ep.get_config()
    rate = make_schedule(config, 100 * per_epoch, per_epoch)
    assert (config.batch_size, config.epochs, config.mask_patch_size, config.mask_ratio) == (2048, 100, 32, 0.6)
    at = [0, 5 * per_epoch, 10 * per_epoch, 50 * per_epoch, 100 * per_epoch]
    falling = 1e-5 + (2e-4 - 1e-5) * np.cos(np.pi * 0.05) ** 2  # the cosine has run since step 0
    expected = np.multiply(4, [1e-6, (1e-6 + 2e-4) / 2, falling, (2e-4 + 1e-5) / 2, 1e-5])
    np.testing.assert_allclose([rate(step) for step in at], expected, rtol=1e-5)
    config = pretrain_simmim_swin_b_800ep.get_config()
    rate = make_schedule(config, 800 * per_epoch, per_epoch)
    at = [0, 10 * per_epoch, 700 * per_epoch - 1, 700 * per_epoch]
    np.testing.assert_allclose([rate(step) for step in at], np.multiply(4, [5e-7, 1e-4, 1e-4, 1e-5]), rtol=1e-5)
