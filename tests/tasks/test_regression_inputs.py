"""Inputs of a step, on the device: no-data, augmentation and z-scores in their order, with and without `reference`."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from biomass_jax.data import sources
from biomass_jax.tasks.create import choose
from configs import finetune_all_biomes
from tests.training import world

OFF = (("flip", False), ("turn", False))
MISSING = (slice(4, 9), slice(10, 20))


def with_gap(record):
    """No data in a rectangle, some labels in it."""
    image, label = record["image"].copy(), record["label"].copy()
    image[MISSING] = 0
    label[5, 12] = 77.0
    return record | {"image": image, "label": label}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards", train=6, val=0, test=0, change=with_gap)


@pytest.fixture(scope="module")
def batch(shards):
    source = sources.open_source(shards, "train")
    rows = [source[index] for index in range(6)]
    return {name: np.stack([row[name] for row in rows]) for name in ("image", "label")}


def inputs(shards, batch, key=0, **fields):
    config = world.configure(finetune_all_biomes.get_config(), **fields)
    task = choose(config, sources.open_source(shards, "train"), None, command="")[0]
    found = jax.jit(task.inputs)(batch, jax.random.key(key))
    return task, {name: np.asarray(value) for name, value in found.items()}


def gap(batch):
    missing = np.zeros(batch["label"].shape, bool)
    missing[(slice(None), *MISSING)] = True
    return missing


def per_chip(label):
    known = label >= 0
    return known.sum(axis=(1, 2)), np.where(known, label.astype(np.float64), 0).sum(axis=(1, 2))


@pytest.mark.parametrize("fields", [{}, {"augment__rotate_degrees": 30.0, "augment__rotate_probability": 1.0}])
def test_augmentation_changes_neither_count_nor_sum_of_labels(shards, batch, fields):
    task, found = inputs(shards, batch, **fields)
    kept = np.where(gap(batch), -1, batch["label"])
    count, total = per_chip(kept)
    new_count, new_total = per_chip(found["label"])
    if not fields:
        np.testing.assert_array_equal(new_count, count)
        np.testing.assert_allclose(new_total, total, rtol=1e-12)
    else:  # those whose centre left the frame are gone, none is there twice
        assert (new_count < count).all() and (new_count > 0.7 * count).all()
        for chip in range(6):
            assert np.isin(found["label"][chip][found["label"][chip] >= 0], kept[chip][kept[chip] >= 0]).all()
    assert not np.array_equal(found["label"], kept)  # something was turned


def test_pixels_without_data_are_0_before_the_z_scores(shards, batch):
    off = {"augment__flip": False, "augment__turn": False}
    task, found = inputs(shards, batch, **off)
    means, stds = task.statistics.means, task.statistics.stds
    raw = np.where(gap(batch)[..., None], 0, batch["image"]).astype(np.float64)
    np.testing.assert_allclose(found["image"], (raw - means) / stds, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["label"], np.where(gap(batch), -1, batch["label"]))


def test_the_reference_keeps_labels_on_no_data_and_fills_borders_with_zero_labels(shards, batch):
    zeros = 0
    for key in range(3):
        _, found = inputs(shards, batch, key, reference=True)
        assert (np.isclose(found["label"], 77.0).sum(axis=(1, 2)) >= 1).sum() >= 4  # nearest sampling may lose one
        zeros += (found["label"] == 0).sum()
    real = (batch["label"] == 0).sum()
    assert zeros > 3 * real + 500


@pytest.mark.parametrize("reference", [True, False])
def test_one_filled_band_is_0_by_itself_as_the_reference_has_it_and_else_with_its_pixel(shards, batch, reference):
    image = batch["image"].copy()
    image[:, 20:24, 4:9, 3] = -9999
    config = world.configure(finetune_all_biomes.get_config(), reference=reference)
    task = dataclasses.replace(choose(config, sources.open_source(shards, "train"), None, command="")[0], augment=OFF)
    expected = image.astype(np.float64)
    for place in np.argwhere(image[..., 3] == -9999):
        expected[(*place, 3) if reference else tuple(place)] = 0
    label = np.where((image[..., 3] == -9999) | gap(batch), -1, batch["label"])
    found = jax.jit(task.inputs)({"image": image, "label": batch["label"]}, jax.random.key(0))
    z_scores = (expected - task.statistics.means) / task.statistics.stds
    np.testing.assert_allclose(found["image"], z_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["label"], batch["label"] if reference else label)
    # A validation sees them in the same way.
    task = dataclasses.replace(task, module=SimpleNamespace(apply=lambda variables, x: x.sum(axis=-1)))
    scored = task.evaluate({}, {"image": image, "label": batch["label"]}, np.int32(0))[0]
    np.testing.assert_allclose(scored["prediction"], z_scores.sum(axis=-1), rtol=1e-4, atol=1e-4)


def test_the_reference_turns_nothing_by_quarters(shards):
    """One bright corner stays at the top: horizontal flips and small rotations only."""
    rows = 24
    image = np.full((rows, world.SIDE, world.SIDE, 6), 1000, np.int16)
    image[:, :8] = 3000
    label = np.full((rows, world.SIDE, world.SIDE), -1, np.float32)
    _, found = inputs(shards, {"image": image, "label": label}, reference=True)
    top, bottom = (
        found["image"][:, 4:10, 12:20, 3].mean(axis=(1, 2)),
        found["image"][:, 22:28, 12:20, 3].mean(axis=(1, 2)),
    )
    assert (top > bottom).all()
    _, turned = inputs(shards, {"image": image, "label": label})
    top = turned["image"][:, 4:8, 12:20, 3].mean(axis=(1, 2))
    assert 0 < (top > turned["image"][:, -8:-4, 12:20, 3].mean(axis=(1, 2))).sum() < rows


def test_what_is_drawn_for_a_chip_depends_on_its_row_alone(shards, batch):
    _, whole = inputs(shards, batch)
    changed = {name: values.copy() for name, values in batch.items()}
    changed["image"][:3] += 50
    _, other = inputs(shards, changed)
    np.testing.assert_array_equal(whole["image"][3:], other["image"][3:])
    np.testing.assert_array_equal(whole["label"][3:], other["label"][3:])
