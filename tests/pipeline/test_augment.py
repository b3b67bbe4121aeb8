"""No-data, z-scores, flips and turns on the device, against NumPy; nothing depends on the split over devices."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from biomass_jax.data import bands
from biomass_jax.pipeline import augment as transforms

FIRST, SECOND = jax.random.PRNGKey(0), jax.random.PRNGKey(1)
SETTINGS = (
    "flip",
    "turn",
    "rotate_degrees",
    "rotate_probability",
    "rotate_label",
    "rotate_label_fill",
    "horizontal_only",
)
augment = jax.jit(transforms.augment, static_argnames=SETTINGS)
SQUARE = [np.rot90(np.arange(9).reshape(3, 3), k)[:, ::step] for k in range(4) for step in (1, -1)]


def pixels(dtype, fill):
    """Chips of 2 x 3 pixels: each kind of missing pixel, and legal ones that look like them."""
    values = np.full((2, 2, 3, 6), 400.0)
    values[0, 0, 0] = 0  # all six: missing
    values[0, 0, 1, :5] = 0  # five of six: legal
    values[0, 0, 2, 3] = -9999
    if fill is not None and not np.isnan(fill):
        values[0, 1, 0, 5] = fill
    values[1, 0, 0, 1] = -10000
    if np.dtype(dtype) == np.float32:
        values[0, 1, 1, 2], values[0, 1, 2, 5], values[0, 0, 1, 0] = np.nan, np.inf, -np.inf
        values[1, 1, 1] = [0, 0, 0, 0, 0, 1e-30]
    else:
        values = values.clip(-(2**15), 2**15 - 1)
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("fill", [None, -9999.0, 255.0, float("nan"), 65535.0, 0.1, 0.0])
def test_missing_pixels_are_those_of_the_one_rule(dtype, fill):
    image = pixels(dtype, fill)
    label = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    expected = bands.no_data(image, fill)
    assert expected[0, 0, 0] and expected[0, 0, 2] and not expected[1, 0, 1]
    cleaned, kept, missing = transforms.clean(image, label, fill=fill)
    np.testing.assert_array_equal(missing, expected)
    np.testing.assert_array_equal(cleaned, np.where(expected[..., None], 0, image.astype(np.float32)))
    np.testing.assert_array_equal(kept, np.where(expected, -1, label))
    assert (cleaned.dtype, kept.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(transforms.clean(image, label, fill=fill, reference=True)[1], label)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("fill", [None, -9999.0, 255.0])
def test_the_reference_sets_filled_bands_to_0_and_keeps_the_pixels_others(dtype, fill):
    """Value by value, as the original reads a file: the no-data tag becomes NaN, NaN becomes 0; and infinity here."""
    image = pixels(dtype, fill)
    label = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    expected = image.astype(np.float32)
    partial = 0
    for place in np.ndindex(image.shape[:-1]):
        gone = [not np.isfinite(value) or value in (-9999, fill) for value in image[place].tolist()]
        partial += 0 < sum(gone) < 6
        for band in np.flatnonzero(gone):
            expected[*place, band] = 0
    assert partial >= 1
    cleaned, kept, missing = transforms.clean(image, label, fill=fill, reference=True)
    np.testing.assert_array_equal(cleaned, expected)
    np.testing.assert_array_equal(kept, label)
    np.testing.assert_array_equal(missing, bands.no_data(image, fill))  # what pictures leave out


def test_z_scores():
    image = np.random.default_rng(0).integers(-200, 9000, (2, 3, 4, 6)).astype(np.float32)
    means, stds = np.arange(100, 700, 100.0), np.arange(10, 70, 10.0)
    expected = np.empty(image.shape)
    for band in range(6):
        expected[..., band] = (image[..., band].astype(float) - means[band]) / stds[band]
    np.testing.assert_allclose(transforms.normalize(image, means, stds), expected, rtol=1e-6)


def marked_chips(count, height, width):
    """The same chip `count` times: every pixel of image and label tells where it was."""
    place = np.arange(height * width, dtype=np.float32).reshape(height, width)
    image = np.stack([place + 1000 * band for band in range(6)], -1)
    return np.stack([image] * count), np.stack([place] * count)


def drawn(count=256, height=3, width=3, **settings):
    """How often each arrangement of pixels was drawn; image and label have to agree about it."""
    image, label = augment(FIRST, *marked_chips(count, height, width), **settings)
    for band in range(6):
        np.testing.assert_array_equal(image[..., band] - 1000 * band, label)
    found, counts = np.unique(np.asarray(label), axis=0, return_counts=True)
    return {one.astype(int).tobytes(): int(number) for one, number in zip(found, counts, strict=True)}


def arrangements(chips):
    return {np.ascontiguousarray(chip).tobytes() for chip in chips}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SQUARE),
        ({"turn": False}, [SQUARE[k] for k in (0, 1, 4, 5)]),
        ({"flip": False}, SQUARE[::2]),
        ({"flip": False, "turn": False}, SQUARE[:1]),
        ({"horizontal_only": True}, SQUARE[:2]),
    ],
)
def test_flips_and_turns_are_drawn_alike(settings, expected):
    counts = drawn(**settings)
    assert set(counts) == arrangements(expected)
    share = 256 / len(expected)
    # five standard deviations of a binomial
    assert all(abs(count - share) <= 5 * np.sqrt(share * (1 - share / 256)) for count in counts.values())


def test_oblong_chips_keep_their_shape():
    chip = np.arange(6).reshape(2, 3)
    four = [chip, chip[::-1], chip[:, ::-1], chip[::-1, ::-1]]
    assert set(drawn(64, 2, 3)) == arrangements(four)
    assert set(drawn(64, 2, 3, flip=False)) == arrangements([four[0], four[3]])


def test_labels_keep_count_and_sum_under_all_flips_and_turns():
    rng = np.random.default_rng(5)
    label = np.where(rng.random((64, 12, 12)) < 0.3, rng.integers(0, 500, (64, 12, 12)), -1).astype(np.float32)
    image = rng.integers(0, 9000, (64, 12, 12, 6)).astype(np.float32)
    turned, moved = augment(FIRST, image, label)
    assert (np.asarray(moved) != label).any()
    np.testing.assert_array_equal((np.asarray(moved) >= 0).sum((1, 2)), (label >= 0).sum((1, 2)))
    np.testing.assert_array_equal(np.where(moved < 0, 0, moved).sum((1, 2)), np.where(label < 0, 0, label).sum((1, 2)))
    np.testing.assert_array_equal(np.sort(turned.reshape(64, -1)), np.sort(image.reshape(64, -1)))


def test_draws_follow_key_and_row_alone():
    image, label = marked_chips(16, 3, 3)
    whole = augment(FIRST, image, label)[1]
    np.testing.assert_array_equal(augment(FIRST, image[:5], label[:5])[1], whole[:5])
    assert (np.asarray(augment(SECOND, image, label)[1]) != whole).any()


SPLIT_OVER_DEVICES = """
import jax, numpy as np
from biomass_jax.pipeline import augment as transforms
from biomass_jax.runtime import mesh as sharding

assert jax.device_count() == 8
rng = np.random.default_rng(0)
image = rng.integers(0, 9000, (16, 12, 12, 6)).astype(np.int16)
label = np.where(rng.random((16, 12, 12)) < 0.3, rng.integers(0, 500, (16, 12, 12)), -1).astype(np.float32)

def run(key, image, label):
    cleaned, label, _ = transforms.clean(image, label, fill=-9999)
    crop = transforms.random_resized_crop(key, cleaned, size=8)
    return *transforms.augment(key, cleaned, label, rotate_degrees=30, rotate_probability=0.7), *crop

def on(devices):
    mesh = sharding.create_mesh(devices)
    split = sharding.batch_sharding(mesh)
    step = jax.jit(run, in_shardings=(sharding.replicated(mesh), split, split), out_shardings=(split,) * 4)
    key = jax.random.PRNGKey(3)
    step = step.lower(key, image, label).compile()
    return step(jax.device_put(key, sharding.replicated(mesh)), *jax.device_put((image, label), split)), step.as_text()

(one, _), (eight, text) = on(jax.devices()[:1]), on(jax.devices())
for a, b in zip(one, eight, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
assert (np.asarray(one[1]) != label).any()
assert "all-gather" not in text and "all-to-all" not in text, "chips travel between devices"
"""


@pytest.mark.slow
def test_a_batch_split_over_eight_devices_gives_the_same_chips(root):
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", SPLIT_OVER_DEVICES]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
