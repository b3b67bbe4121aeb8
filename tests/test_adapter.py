"""Adapters on disk: what they hold, how they find their base, and that merged they are what they were apart."""

import json
import shutil

import jax
import numpy as np
import pytest

from biomass_jax import adapter as adapters
from biomass_jax import bundle
from biomass_jax.errors import BundleError
from biomass_jax.trees import flatten, stored_shapes
from tests.prediction.stubs import random_adapter, random_bundle

SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 4}
SECTION = {"base": {"path": "b", "weights_sha256": "a" * 64}, "rank": 2, "alpha": 6.0, "targets": ["qkv"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `base` and `runs/adapter`."""
    folder = tmp_path_factory.mktemp("made")
    random_bundle(folder / "base", **SMALL, final_relu=False)
    random_adapter(folder / "runs" / "adapter", folder / "base")
    return folder


@pytest.mark.slow
def test_merged_it_is_what_it_is_apart(made):
    base = bundle.load(made / "base")
    apart, merged = bundle.load_adapter(made / "runs" / "adapter", base), bundle.load(made / "runs" / "adapter")
    images = np.random.default_rng(0).normal(size=(2, 30, 44, 6)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        one, other, plain = (jax.jit(model.module().apply)(model.variables, images) for model in (apart, merged, base))
    assert np.abs(one - other).max() <= 1e-6 * np.abs(other).max()
    assert np.abs(one - plain).max() > 1 and np.ptp(one) > 1
    flat = flatten(apart.variables)
    for name, leaf in flatten(merged.variables).items():
        expected = np.asarray(flat[name], np.float64)
        if name.endswith(("qkv/kernel", "fc2/kernel")):
            a, b = (np.asarray(flat[name.replace("kernel", part)], np.float64) for part in ("lora_a", "lora_b"))
            expected = expected + 3 * a @ b
        np.testing.assert_allclose(leaf, expected, rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_it_holds_updates_decoder_and_head_and_takes_the_rest_from_its_base(made):
    held = flatten(stored_shapes(made / "runs" / "adapter" / "variables"))
    encoder = [name for name in held if name.startswith("params/encoder/")]
    assert len(encoder) == 2 * 2 * 2 and all(name.endswith(("lora_a", "lora_b")) for name in encoder)
    whole = flatten(stored_shapes(made / "base" / "variables"))
    assert held.keys() - set(encoder) == {name for name in whole if not name.startswith("params/encoder/")}
    base = bundle.load(made / "base")
    own, shared = (flatten(one.variables) for one in (bundle.load_adapter(made / "runs" / "adapter", base), base))
    pointers = {
        name: own[name].unsafe_buffer_pointer() == leaf.unsafe_buffer_pointer() for name, leaf in shared.items()
    }
    assert all(same == name.startswith("params/encoder/") for name, same in pointers.items())


@pytest.mark.slow
def test_in_memory_it_is_a_plain_bundle(made):
    found = bundle.load(made / "runs" / "adapter", background=True)
    assert "adapter" not in found.meta and "adapter" in bundle.read_meta(made / "runs" / "adapter")
    assert bundle.weights_sha256(found.variables) == found.weights_sha256
    assert max(bundle.verify(made / "runs" / "adapter").values()) < 1e-5


@pytest.mark.slow
def test_the_base_is_found_where_both_were_moved_where_it_was_and_where_it_is_told(made, tmp_path):
    shutil.copytree(made, tmp_path / "both")
    section = bundle.read_meta(made / "runs" / "adapter")["adapter"]
    assert adapters.find_base(tmp_path / "both" / "runs" / "adapter", section) == tmp_path / "both" / "base"
    shutil.copytree(made / "runs", tmp_path / "alone")
    assert adapters.find_base(tmp_path / "alone" / "adapter", section) == made / "base"
    gone = section | {"base": section["base"] | {"path": str(tmp_path / "gone"), "relative": "../gone"}}
    with pytest.raises(BundleError, match=r"gone is no bundle; tell where that model lies \(base\)"):
        adapters.find_base(tmp_path / "alone" / "adapter", gone)
    assert adapters.find_base(tmp_path / "alone" / "adapter", gone, made / "base") == made / "base"
    merged = bundle.load(tmp_path / "alone" / "adapter", base=made / "base")
    assert merged.weights_sha256 == bundle.load(made / "runs" / "adapter").weights_sha256


@pytest.mark.slow
def test_another_base_is_refused(made, tmp_path):
    other = random_bundle(tmp_path / "other", seed=4, **SMALL, final_relu=False)
    sha256 = bundle.read_meta(other)["weights_sha256"]
    with pytest.raises(BundleError, match=f"the weights of {other} have {sha256}"):
        bundle.load(made / "runs" / "adapter", base=other)
    with pytest.raises(BundleError, match=f"those of {other} have {sha256}"):
        bundle.load_adapter(made / "runs" / "adapter", bundle.load(other))
    with pytest.raises(BundleError, match="base: is a whole model and no adapter; leave its base"):
        bundle.load(made / "base", base=other)
    with pytest.raises(BundleError, match="base: is a whole model; expected an adapter of"):
        bundle.load_adapter(made / "base", bundle.load(other))


@pytest.mark.slow
def test_an_adapter_of_an_adapter(made, tmp_path):
    upper = random_adapter(tmp_path / "upper", made / "runs" / "adapter", seed=2)
    lower = bundle.load(made / "runs" / "adapter")
    name = "params/encoder/stages_1/blocks_0/mlp/fc2/kernel"
    with_updates = flatten(bundle.load_adapter(upper, lower).variables)
    a, b = (np.asarray(with_updates[name.replace("kernel", part)], np.float64) for part in ("lora_a", "lora_b"))
    expected = np.asarray(flatten(lower.variables)[name], np.float64) + 3 * a @ b
    np.testing.assert_allclose(flatten(bundle.load(upper).variables)[name], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_damaged_updates_are_known(made, tmp_path):
    shutil.copytree(made, tmp_path / "both")
    file = tmp_path / "both" / "runs" / "adapter" / "bundle.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"adapter": meta["adapter"] | {"alpha": 6.5}}))
    with pytest.raises(BundleError, match="the weights' SHA-256 is"):
        bundle.verify(file.parent)
    file.write_text(json.dumps(meta | {"adapter": meta["adapter"] | {"rank": 3}}))
    with pytest.raises(BundleError, match=r"lora_a has shape \(8, 2\), expected \(8, 3\)"):
        bundle.load(file.parent)


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"rank": "x"}, {"alpha": None}, {"targets": ["norm1"]}, {"base": {"path": "b"}}]
)
def test_a_damaged_section_is_an_error(change):
    with pytest.raises(BundleError, match="model: field `adapter` of bundle.json is damaged"):
        adapters.lora_of("model", SECTION | change)
    assert adapters.lora_of("model", SECTION).scale == 3
