"""AdamW by name: masks on the full Swin-B, updates against plain float64 loops, moments of a real training run."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert.convert import convert
from biomass_jax.convert.declared import Options
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.models.build import abstract_variables
from biomass_jax.models.simmim import SimMIM
from biomass_jax.training import optimizer as opt
from tests.training.moments import export_adam

BETAS = (0.9, 0.99)
EPS = 1e-8


@pytest.fixture(scope="module")
def swin_b():
    return abstract_variables(BiomassModel())["params"]


def flat(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}


def draw(seed):
    """Parameters, or gradients, of a small tree that has every kind of name."""
    rng = np.random.default_rng(seed)
    shapes = {
        "mask_token": (1, 1, 2),
        "encoder": {
            "patch_embed": {"projection": {"kernel": (2, 3), "bias": (3,)}},
            "stages_1": {"blocks_0": {"norm1": {"scale": (2,)}, "attn": {"relative_position_bias_table": (4, 1)}}},
            "stages_10": {"blocks_0": {"qkv": {"kernel": (3, 2)}}},
        },
        "head": {"final": {"kernel": (2, 2)}},
    }
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def adamw_in_numpy(p, gradients, rates, decay, scale=1.0):
    """torch's AdamW (torch.optim.AdamW's docstring, decoupled decay first) for one array, in float64."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        lr = lr * scale
        g = g.astype(np.float64)
        p = p * (1 - lr * decay)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        p = p - lr * (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
    return p


def run(optimizer, params, gradients, rates):
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for g, lr in zip(gradients, rates, strict=True):
        updates, state = step(g, state, params)
        params = opt.apply_updates(params, updates, lr)
    return params, state


def test_what_decays_on_swin_b_by_name(swin_b, golden):
    mask = flat(opt.decay_mask(swin_b, "weights"))
    assert {path.split("/")[-1] for path, decays in mask.items() if decays} == {"kernel"}
    left_out = {path.split("/")[-1] for path, decays in mask.items() if not decays}
    assert left_out == {"scale", "bias", "relative_position_bias_table"}
    # Patch embedding; four in each block; downsampling; UPerNet's convolutions; the head's.
    assert sum(mask.values()) == 1 + 4 * 24 + 3 + (4 + 1 + 3 + 3 + 1) + 3
    assert mask["encoder/stages_2/blocks_17/mlp/fc2/kernel"] and not mask["head/upscale_0/norm/scale"]
    # The original's rule on the released tensors leaves out as many numbers.
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat(swin_b).items()}
    assert sum(sizes.values()) == 87_382_105
    lines = [line.split(maxsplit=1) for line in (golden / "granite_swin_b_keys.txt").read_text().splitlines()]
    released = {key: [int(n) for n in re.findall(r"\d+", shape.split("(")[1].split(")")[0])] for key, shape in lines}
    buffers = ("relative_position_index", "running_mean", "running_var", "num_batches_tracked")
    kept = {k: s for k, s in released.items() if not k.endswith(buffers)}
    undecayed = sum(math.prod(s) for k, s in kept.items() if len(s) == 1 or "relative_position_bias_table" in k)
    assert sum(size for path, size in sizes.items() if not mask[path]) == undecayed
    assert all(flat(opt.decay_mask(swin_b, "all")).values())
    simmim = flat(opt.decay_mask(abstract_variables(SimMIM())["params"], "weights"))
    assert not simmim["mask_token"] and simmim["decoder/kernel"]


def test_layers_of_swin_b_by_name(swin_b):
    scales = flat(opt.layer_scales(swin_b, 0.9))
    layers = {path: round(25 - math.log(scale) / math.log(0.9), 6) for path, scale in scales.items()}
    expected = {
        "encoder/patch_embed/projection/kernel": 0,
        "encoder/patch_embed/norm/bias": 0,
        "encoder/stages_0/blocks_0/attn/qkv/kernel": 1,
        "encoder/stages_0/blocks_1/attn/relative_position_bias_table": 2,
        "encoder/stages_0/downsample/reduction/kernel": 2,
        "encoder/stages_1/blocks_0/mlp/fc1/bias": 3,
        "encoder/stages_1/downsample/norm/scale": 4,
        "encoder/stages_2/blocks_0/norm1/scale": 5,
        "encoder/stages_2/blocks_17/norm2/bias": 22,
        "encoder/stages_2/downsample/reduction/kernel": 22,
        "encoder/stages_3/blocks_0/attn/proj/kernel": 23,
        "encoder/stages_3/blocks_1/mlp/fc2/kernel": 24,
        "encoder/stages_0/norm/scale": 25,
        "encoder/stages_3/norm/bias": 25,
        "decoder/lateral_convs_0/conv/kernel": 25,
        "head/final/bias": 25,
    }
    assert {path: layers[path] for path in expected} == expected
    assert set(layers.values()) == set(range(26))
    assert flat(opt.layer_scales({"mask_token": 0, "encoder": swin_b["encoder"]}, 0.9))["mask_token"] == 0.9**25


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_four_steps_against_numpy(decay):
    params, gradients, rates = draw(0), [draw(i) for i in range(1, 5)], [0.1, 0.1, 0.01, 0.05]
    optimizer = opt.create_optimizer(params, weight_decay=0.3, decay=decay, betas=BETAS)
    found = flat(run(optimizer, params, gradients, rates)[0])
    for path, p in flat(params).items():
        wd = 0.3 if decay == "all" or path.endswith("kernel") else 0.0
        expected = adamw_in_numpy(p, [flat(g)[path] for g in gradients], rates, wd)
        np.testing.assert_allclose(found[path], expected, atol=2e-6, err_msg=path)


def test_clipping_and_layer_decay_against_numpy():
    params, gradients, rates = draw(0), [draw(i) for i in range(1, 4)], [0.1, 0.1, 0.1]
    gradients[1] = jax.tree.map(lambda g: 1e-3 * g, gradients[1])  # short enough to stay as it is
    optimizer = opt.create_optimizer(params, weight_decay=0.3, betas=BETAS, clip_norm=0.5, layer_decay=0.5)
    found = flat(run(optimizer, params, gradients, rates)[0])
    norms = [np.sqrt(sum((leaf.astype(float) ** 2).sum() for leaf in flat(g).values())) for g in gradients]
    assert norms[0] > 0.5 > norms[1]
    # Two blocks: patch embedding 0, stages_1 is layer 1, stages_10 layer 2, the head 3.
    layers = {"mask_token": 0, "encoder/patch_embed": 0, "encoder/stages_1/": 1, "encoder/stages_10/": 2, "head": 3}
    for path, p in flat(params).items():
        (layer,) = (n for name, n in layers.items() if path.startswith(name))
        cut = [flat(g)[path] * min(1, 0.5 / norm) for g, norm in zip(gradients, norms, strict=True)]
        expected = adamw_in_numpy(p, cut, rates, 0.3 if path.endswith("kernel") else 0.0, scale=0.5 ** (3 - layer))
        np.testing.assert_allclose(found[path], expected, atol=2e-6, err_msg=path)


def test_what_is_frozen_stays_and_has_no_moments():
    params, freeze = draw(0), ("encoder/stages_1", "mask_token")
    frozen = ("mask_token", "encoder/stages_1/")
    mask = flat(opt.trainable_mask(params, freeze))
    assert {path for path, trained in mask.items() if not trained} == {p for p in mask if p.startswith(frozen)}
    assert sum(mask.values()) == 4  # stages_10 is another stage
    optimizer = opt.create_optimizer(
        params, weight_decay=0.3, decay="all", betas=BETAS, clip_norm=0.5, layer_decay=0.5, freeze=freeze
    )
    # Whatever arrives for a frozen parameter, it moves nothing, nor does it count for the norm.
    gradients = draw(1)
    spoilt = jax.tree.map(
        lambda g, trained: g if trained else g * np.nan, gradients, opt.trainable_mask(params, freeze)
    )
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(spoilt, state, params)
    new = flat(opt.apply_updates(params, updates, 0.1))
    norm = np.sqrt(sum((g.astype(float) ** 2).sum() for path, g in flat(gradients).items() if mask[path]))
    scales = flat(opt.layer_scales(params, 0.5))
    for path, p in flat(params).items():
        if mask[path]:
            cut = flat(gradients)[path] * 0.5 / norm
            expected = adamw_in_numpy(p, [cut], [0.1], 0.3, scale=scales[path])
            np.testing.assert_allclose(new[path], expected, atol=2e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(new[path], p)
    stored = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert stored == 1 + 2 * sum(p.size for path, p in flat(params).items() if mask[path])  # a count and two moments


def test_names_that_freeze_nothing_or_everything_are_refused(swin_b):
    with pytest.raises(ValueError, match=r"no parameter is called 'encoder/stage_0'.*encoder/stages_0"):
        opt.trainable_mask(swin_b, ("encoder/stage_0",))
    with pytest.raises(ValueError, match="decoder, encoder, head"):
        opt.create_optimizer(swin_b, weight_decay=0.0, freeze=("encode",))
    with pytest.raises(ValueError, match="leave no parameter to train"):
        opt.trainable_mask(swin_b, ("encoder", "decoder", "head"))


@pytest.mark.parametrize("freeze", [(), ("encoder/patch_embed",)])
def test_moments_out_and_in(freeze):
    params = draw(0)
    optimizer = opt.create_optimizer(params, weight_decay=0.3, betas=BETAS, clip_norm=1.0, freeze=freeze)
    later, state = run(optimizer, params, [draw(i) for i in (1, 2)], [0.1, 0.1])
    count, mu, nu = export_adam(state, params)
    assert int(count) == 2
    assert jax.tree.structure(mu) == jax.tree.structure(nu) == jax.tree.structure(params)
    again = opt.import_adam(optimizer.init(params), np.asarray(count), jax.tree.map(np.asarray, mu), nu)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    step = jax.jit(optimizer.update)
    jax.tree.map(np.testing.assert_array_equal, step(draw(3), again, later), step(draw(3), state, later))
    for path, leaf in flat(nu).items():
        assert bool((leaf == 0).all()) == path.startswith(freeze)


def test_imported_state_does_not_share_memory_with_what_was_imported():
    params = draw(0)
    state = opt.create_optimizer(params, weight_decay=0.0).init(params)
    mu = jax.tree.map(jnp.asarray, draw(1))
    imported = opt.import_adam(state, 1, mu, draw(2))
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(imported)
    np.testing.assert_array_equal(flat(mu)["head/final/kernel"], flat(draw(1))["head/final/kernel"])


@pytest.mark.slow
def test_first_update_from_a_real_checkpoint(golden, tmp_path):
    """Weights, moments, count and rate of a Lightning run (three epochs of two steps) through a bundle."""
    options = Options(statistics="granite")
    convert(golden / "ckpt_micro_cli" / "lightning.ckpt", tmp_path / "micro", options=options)
    loaded = bundle.load(tmp_path / "micro")
    stored = bundle.load_optimizer(loaded)
    params = jax.tree.map(np.asarray, loaded.variables["params"])
    rng = np.random.default_rng(5)
    gradients = jax.tree.map(lambda p: (0.1 * rng.standard_normal(p.shape)).astype(np.float32), params)
    wd, lr = 0.03283253068408954, float(stored["lr"])
    assert lr == pytest.approx(0.00031406904191973693, rel=1e-7)
    optimizer = opt.create_optimizer(params, weight_decay=wd, decay="all")
    state = opt.import_adam(optimizer.init(params), stored["count"], stored["mu"], stored["nu"])
    updates, state = jax.jit(optimizer.update)(gradients, state, params)
    new = flat(opt.apply_updates(params, updates, lr))
    mu, nu, gradients = flat(stored["mu"]), flat(stored["nu"]), flat(gradients)
    assert len(new) == 171 and max(np.abs(m).max() for m in mu.values()) > 0
    for path, p in flat(params).items():
        m = 0.9 * np.asarray(mu[path], float) + 0.1 * gradients[path]
        v = 0.999 * np.asarray(nu[path], float) + 0.001 * gradients[path].astype(float) ** 2
        u = m / (1 - 0.9**7) / (np.sqrt(v / (1 - 0.999**7)) + 1e-8)
        np.testing.assert_allclose(new[path], p * (1 - lr * wd) - lr * u, atol=1e-7, rtol=2e-7, err_msg=path)
    assert int(export_adam(state, params)[0]) == 7
