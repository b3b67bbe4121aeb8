"""Low-rank updates of dense layers against loops and closed forms."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from biomass_jax.models.lora import AdaptedDense, Lora, dense, is_update, merge

K, N, RANK = 5, 3, 2
LORA = Lora(RANK, 7.0, ("fc1",))


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (K, N), "bias": (N,), "lora_a": (K, RANK), "lora_b": (RANK, N)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def by_loops(x, w):
    """y_n = sum_k x_k W_kn + b_n + alpha / rank sum_k sum_r x_k A_kr B_rn, in float64."""
    y = np.zeros((len(x), N))
    for i, row in enumerate(x.astype(np.float64)):
        for n in range(N):
            y[i, n] = w["bias"][n]
            for k in range(K):
                y[i, n] += row[k] * w["kernel"][k, n]
                for r in range(RANK):
                    y[i, n] += 7.0 / RANK * row[k] * w["lora_a"][k, r] * w["lora_b"][r, n]
    return y


def test_a_layer_adds_its_update_to_what_it_gave():
    x, w = np.random.default_rng(1).normal(size=(4, K)).astype(np.float32), weights()
    found = dense(N, name="fc1", lora=LORA).apply({"params": w}, x)
    np.testing.assert_allclose(found, by_loops(x, w), rtol=1e-5, atol=1e-5)


def test_a_merged_layer_gives_the_same():
    x, w = np.random.default_rng(1).normal(size=(4, K)).astype(np.float32), weights()
    merged = merge({"block": {"fc1": w, "norm": {"scale": w["bias"]}}}, LORA.scale)
    assert merged["block"]["fc1"].keys() == {"kernel", "bias"} and merged["block"]["norm"]["scale"] is w["bias"]
    assert merged["block"]["fc1"]["kernel"].dtype == np.float32
    np.testing.assert_allclose(x @ merged["block"]["fc1"]["kernel"] + w["bias"], by_loops(x, w), rtol=1e-5, atol=1e-5)


def test_merging_rounds_once():
    """The sum of float64 products, rounded to float32 at the end: off by half a unit in the last place at most."""
    w = weights(3)
    exact = w["kernel"].astype(np.float64) + 3.5 * np.einsum("kr,rn->kn", w["lora_a"], w["lora_b"], dtype=np.float64)
    found = merge(w, 3.5)["kernel"]
    assert (np.abs(found - exact) <= 0.5001 * np.spacing(np.abs(found))).all()


def test_a_fresh_update_is_nothing_and_leaves_the_draws_of_the_weights():
    x = np.random.default_rng(1).normal(size=(4, 400)).astype(np.float32)
    plain, adapted = nn.Dense(N), AdaptedDense(N, lora=LORA, name="fc1")
    old, new = (layer.init(jax.random.key(3), x)["params"] for layer in (plain, adapted))
    assert new.keys() - old.keys() == {"lora_a", "lora_b"} and not np.any(new["lora_b"])
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(new[name], old[name])
    np.testing.assert_array_equal(adapted.apply({"params": new}, x), plain.apply({"params": old}, x))
    # U(-1 / sqrt(K), 1 / sqrt(K)): Kaiming's with a = sqrt(5), as the paper's code draws A.
    a = np.asarray(new["lora_a"])
    assert 0.99 < np.abs(a).max() * 400**0.5 <= 1 and abs(a.std() * (3 * 400) ** 0.5 - 1) < 0.05


def test_only_layers_that_are_named_are_adapted():
    x = np.ones((1, K), np.float32)
    assert dense(N, name="fc2", lora=LORA).init(jax.random.key(0), x)["params"].keys() == {"kernel", "bias"}
    assert type(dense(N, name="fc1", lora=None)) is nn.Dense
    assert is_update("encoder/fc1/lora_a") and is_update("lora_b") and not is_update("lora_a/kernel")


def test_dropout_is_of_the_updates_input_alone():
    """One input of 1 and weights of 1: the update is 0, or alpha / rank over the share that is kept."""
    lora = Lora(1, 3.0, ("fc1",), dropout=0.25)
    one = {name: np.ones((1, 1), np.float32) for name in ("kernel", "lora_a", "lora_b")}
    layer, x = AdaptedDense(1, use_bias=False, lora=lora, name="fc1"), np.ones((4000, 1), np.float32)
    found = np.asarray(layer.apply({"params": one}, x, rngs={"dropout": jax.random.key(0)})) - 1
    assert set(np.round(found.ravel(), 4)) == {0, 4} and abs((found == 0).mean() - 0.25) < 0.03
    quiet = AdaptedDense(1, use_bias=False, lora=lora.without_dropout(), name="fc1")
    np.testing.assert_array_equal(quiet.apply({"params": one}, x), 4)


@pytest.mark.parametrize("path", ["qkv", "encoder/attn/proj"])
def test_other_names_are_no_updates(path):
    assert not is_update(f"{path}/kernel")
