"""What a Swin encoder's parts are worth: small ones that learn the context world, and then lose a part.

Nothing but the encoder brings surroundings in: its stages go through dense layers alone to the pixels. One that is
trained again without a part makes up for some of it elsewhere; here a trained one is to lose it, as a faulty port does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from biomass_jax.models import swin, swin_ops
from biomass_jax.runtime import cpu
from data_prep.synthetic.context.land import Context, biomass_of
from data_prep.synthetic.context.view import lit, surface
from data_prep.synthetic.forest.view import Day, under_sky

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
SIDE, TRAIN, VAL, BATCH, STEPS = 112, 256, 16, 8, 500
LABELLED, NOISE = 0.03, 4.0  # share of pixels, Mg/ha
PATCH, HIDDEN = 2, 32


class Encoder(nn.Module):
    """A Swin encoder and dense layers: z-scored images [B, H, W, 6] -> Mg/ha [B, H, W]."""

    @nn.compact
    def __call__(self, x):
        encoder = swin.SwinTransformer(
            embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4), mlp_ratio=2.0, patch_size=PATCH, name="encoder"
        )
        tokens = SIDE // PATCH
        total = jnp.zeros((len(x), tokens, tokens, PATCH * PATCH * HIDDEN))
        for stage, features in enumerate(encoder(x, train=True)):  # as in training, where a part can be replaced
            told = nn.Dense(total.shape[-1], name=f"stage_{stage}")(features)
            total = total + told.repeat(2**stage, 1).repeat(2**stage, 2)
        pixels = total.reshape(-1, tokens, tokens, PATCH, PATCH, HIDDEN).swapaxes(2, 3).reshape(-1, SIDE, SIDE, HIDDEN)
        return nn.relu(60 * nn.Dense(1, name="out")(nn.gelu(pixels))[..., 0] + 80)


def chip(number):
    """Image, truth, and number of the pixel's colour: biome, cover as far as it is seen, light."""
    land, rng = Context(0), np.random.default_rng([7, number])
    left, top = 600000.0 + 30 * SIDE * number, 4100040.0
    at, crowns = land.pixels(left, top, (SIDE, SIDE)), land.crowns(left, top, (SIDE + 1, SIDE))
    image, _ = under_sky(surface(at, crowns, 0.9), Day(leaves=0.9, clouds=0.0), rng)
    cover = np.where(at.bare, -10, np.where(at.water, -20, np.minimum(at.cover, 150) // 5))
    light = np.minimum(np.abs(lit(at, crowns) - 1) // 0.02, 5)
    return image.astype(np.float32), biomass_of(at), (cover + 20) * 100 + light * 10 + at.moist


def rmse(found, truth):
    return float(np.sqrt(np.mean((found - truth) ** 2)))


@pytest.fixture(scope="module")
def world():
    """Images, z-scored, truth and one-pixel limit: {"train", "val"} -> (images, truth), and Mg/ha."""
    chips = [chip(number) for number in (*range(TRAIN), *range(10_000, 10_000 + VAL))]
    images, truth, colours = (np.stack(part) for part in zip(*chips, strict=True))
    images = (images - images[:TRAIN].mean((0, 1, 2))) / images[:TRAIN].std((0, 1, 2))
    _, number = np.unique(colours, return_inverse=True)
    number = number.reshape(colours.shape)
    means = np.bincount(number.ravel(), truth.ravel()) / np.bincount(number.ravel())  # what is best said of a colour
    limit = rmse(means[number[TRAIN:]], truth[TRAIN:])
    return {"train": (images[:TRAIN], truth[:TRAIN]), "val": (images[TRAIN:], truth[TRAIN:])}, limit


@pytest.fixture(scope="module")
def trained(world):
    """Parameters of the encoder as it is."""
    (images, truth), rng = world[0]["train"], np.random.default_rng(0)
    measured = truth + NOISE * rng.standard_normal(truth.shape)
    labels = np.where(rng.random(truth.shape) < LABELLED, np.maximum(measured, 0), -1).astype(np.float32)
    model = Encoder()
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, STEPS // 10, STEPS, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def loss(params, x, label):
        has = label >= 0
        return jnp.sqrt(jnp.sum(has * (model.apply({"params": params}, x) - label) ** 2) / has.sum())

    def step(params, moments, x, label):
        updates, moments = optimizer.update(jax.grad(loss)(params, x, label), moments, params)
        return optax.apply_updates(params, updates), moments

    step = jax.jit(cpu.for_training(step), donate_argnums=(0, 1))
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    moments = optimizer.init(params)
    for _ in range(STEPS):
        rows = rng.permutation(TRAIN)[:BATCH]
        params, moments = step(params, moments, images[rows], labels[rows])
    return jax.tree.map(np.asarray, params)


def score(params, world):
    """RMSE on chips that it has not seen, Mg/ha; traced anew, since a part may have been replaced."""
    images, truth = world[0]["val"]
    apply = jax.jit(lambda params, x: Encoder().apply({"params": params}, x))
    return rmse(np.concatenate([apply(params, images[k : k + BATCH]) for k in range(0, VAL, BATCH)]), truth)


@pytest.fixture(scope="module")
def right(trained, world):
    return score(trained, world)


def test_the_right_one_passes_what_one_pixel_can_tell(right, world):
    assert right < 0.7 * world[1]


def without_shifts(monkeypatch):
    block = swin.SwinBlock
    monkeypatch.setattr(swin, "SwinBlock", lambda **fields: block(**fields | {"shifted": False}))


def with_windows_shuffled(monkeypatch):
    partition, reverse = swin_ops.window_partition, swin_ops.window_reverse

    def order(count):
        return np.random.default_rng(count).permutation(count)

    def shuffled(x, size):
        b, h, w, c = x.shape
        return partition(x.reshape(b, h * w, c)[:, order(h * w)].reshape(x.shape), size)

    def back(windows, size, h, w):
        x = reverse(windows, size, h, w)
        return x.reshape(len(x), h * w, -1)[:, np.argsort(order(h * w))].reshape(x.shape)

    monkeypatch.setattr(swin_ops, "window_partition", shuffled)
    monkeypatch.setattr(swin_ops, "window_reverse", back)


def with_attention_its_mean(monkeypatch):
    softmax = jax.nn.softmax
    monkeypatch.setattr(jax.nn, "softmax", lambda x, axis: softmax(jnp.where(x < -50, x, 0.0), axis=axis))


def with_merged_rows_for_columns(monkeypatch):
    merge = swin_ops.merge_patches

    def merged(x):
        four = merge(x)
        return four.reshape(*four.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :].reshape(four.shape)

    monkeypatch.setattr(swin_ops, "merge_patches", merged)


def with_merged_channels_in_the_other_layout(monkeypatch):
    merge = swin_ops.merge_patches

    def merged(x):
        four = merge(x)
        return four.reshape(*four.shape[:-1], 4, -1).swapaxes(-1, -2).reshape(four.shape)

    monkeypatch.setattr(swin_ops, "merge_patches", merged)


FAULTS = (
    without_shifts,
    with_windows_shuffled,
    with_attention_its_mean,
    with_merged_rows_for_columns,
    with_merged_channels_in_the_other_layout,
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_a_part_that_is_wrong_costs_a_tenth(fault, trained, right, world, monkeypatch):
    fault(monkeypatch)
    assert score(trained, world) > 1.1 * right


def test_bias_tables_of_zero_cost_a_tenth(trained, right, world):
    def zeroed(path, leaf):
        return leaf * (path[-1].key != "relative_position_bias_table")

    assert score(jax.tree_util.tree_map_with_path(zeroed, trained), world) > 1.1 * right
