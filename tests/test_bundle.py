"""Bundles: what is written is what is read, and what does not fit is refused by name."""

import gc
import hashlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.errors import BundleError
from biomass_jax.models.build import abstract_variables, build_module

# Every dimension different, so that no transposed or swapped array can pass.
ARCHITECTURE = {
    "embed_dim": 12,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 3, 4],
    "mlp_ratio": 3,
    "in_channels": 5,
    "decoder_channels": 7,
}
FIELDS = {
    "task": "biomass",
    "architecture": ARCHITECTURE,
    "input": {"bands": list("ABCDE"), "fill": -9999, "means": [1.0] * 5, "stds": [2.0] * 5, "sensors": ["L30"]},
    "output": {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1},
    "training": {"dataset": "none"},
    "provenance": {"source": "random"},
}


def random_variables(architecture, seed=0, task="biomass"):
    rng = np.random.default_rng(seed)
    shapes = abstract_variables(build_module(task, architecture))
    drawn = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)
    return drawn | {"batch_stats": jax.tree.map(np.exp, drawn["batch_stats"])}  # variances are positive


@pytest.fixture(scope="module")
def variables():
    return random_variables(ARCHITECTURE)


@pytest.fixture(scope="module")
def saved(variables, tmp_path_factory):
    return bundle.save(tmp_path_factory.mktemp("bundles") / "tiny", variables, **FIELDS)


def edit(saved, folder, **changes):
    """A copy of a bundle with fields of its bundle.json changed."""
    subprocess.run(["cp", "-r", saved, folder], check=True)
    meta = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(meta | changes))
    return folder


def test_reads_back_every_array_and_field(saved, variables):
    opened = bundle.load(saved)
    assert bundle.flatten(opened.variables).keys() == bundle.flatten(variables).keys()
    for path, leaf in bundle.flatten(variables).items():
        np.testing.assert_array_equal(bundle.flatten(opened.variables)[path], leaf, err_msg=path)
    written = {name: opened.meta[name] for name in FIELDS}
    assert written["architecture"].items() >= ARCHITECTURE.items()
    assert written | {"architecture": ARCHITECTURE} == FIELDS
    assert opened.bands == tuple("ABCDE") and opened.fill == -9999 and opened.nodata == -1
    assert opened.means.dtype == np.float32 and opened.stds.tolist() == [2.0] * 5


def test_every_field_of_the_architecture_is_written_down(saved):
    assert json.loads((saved / "bundle.json").read_text())["architecture"] == ARCHITECTURE | {
        "window_size": 7,
        "patch_size": 4,
        "drop_path_rate": 0.3,
        "shift_single_window": True,
        "pool_scales": [1, 2, 3, 6],
        "upscale_layers": 2,
        "head_dropout": 0.16194593880230534,
        "final_relu": True,
        "output_scale": 1.0,
        "output_offset": 0.0,
    }


def test_digest_is_that_of_sorted_path_dtype_shape_bytes():
    tree = {"b": {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.asarray([7], ">i4")}
    expected = hashlib.sha256(
        b"a int32 (1,)\n" + (7).to_bytes(4, "little") + b"b/x float32 (2, 3)\n" + tree["b"]["x"].tobytes()
    )
    assert bundle.weights_sha256(tree) == expected.hexdigest()


def test_digest_sees_a_transposed_array():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bundle.weights_sha256({"x": array}) != bundle.weights_sha256({"x": array.T})
    assert bundle.weights_sha256({"x": array.T}) == bundle.weights_sha256({"x": np.ascontiguousarray(array.T)})


def test_verify_accepts_what_was_saved(saved):
    assert max(bundle.verify(saved).values()) < 1e-6


def test_verify_finds_changed_weights(saved, tmp_path):
    meta = json.loads((saved / "bundle.json").read_text())
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.verify(edit(saved, tmp_path / "digest", weights_sha256="0" * 64))
    check = meta["check"] | {"mean": meta["check"]["mean"] * 1.01}
    with pytest.raises(BundleError, match=r"check.*mean"):
        bundle.verify(edit(saved, tmp_path / "check", check=check))


def test_check_is_not_blind_where_every_biomass_is_zero(variables):
    dead = jax.tree.map(np.copy, variables)
    final = dead["params"]["head"]["final"]  # sees a ReLU's output, so that all it gives now is negative
    final["kernel"], final["bias"] = -np.abs(final["kernel"]), np.full(1, -1, np.float32)
    module = build_module("biomass", ARCHITECTURE)
    check = bundle.compute_check(module, dead)
    assert check["max"] < 0 and check["min"] < check["max"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version 2"),
        ({"architecture": {"depth": 3}}, "unknown fields"),
        ({"task": "canopy"}, "unknown task 'canopy'"),
        ({"output": None}, "field `output` must be a dict"),
        (
            {"architecture": ARCHITECTURE | {"decoder_channels": 8}},
            r"/norm/mean has shape \(7,\), expected \(8,\), .*73 in",
        ),
        ({"architecture": ARCHITECTURE | {"depths": [1, 1, 3, 1]}}, "missing params/encoder/stages_2/blocks_2/attn"),
        ({"architecture": ARCHITECTURE | {"depths": [1, 1, 1, 1]}}, "unknown params/encoder/stages_2/blocks_1/attn"),
    ],
)
# Orbax leaves reads that it never started to the garbage collector, which warns of them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_refuses_another_description(saved, tmp_path, changes, message):
    with pytest.raises(BundleError, match=message):
        bundle.load(edit(saved, tmp_path / "edited", **changes))
    gc.collect()


def test_refuses_damaged_or_absent_weights(saved, tmp_path):
    absent = edit(saved, tmp_path / "absent")
    subprocess.run(["rm", "-r", absent / "variables"], check=True)
    with pytest.raises(BundleError, match=r"variables: no readable weights"):
        bundle.load(absent)


def test_refuses_what_is_no_bundle(tmp_path):
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"weights\.ckpt.*biomass_jax\.convert"):
        bundle.load(tmp_path / "weights.ckpt")
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match=r"bundle\.json: not readable as JSON"):
        bundle.load(tmp_path)


def test_save_names_every_array_that_does_not_fit(variables, tmp_path):
    wrong = jax.tree.map(np.copy, variables)
    del wrong["params"]["head"]["final"]["bias"]
    wrong["params"]["extra"] = np.zeros(3, np.float32)
    wrong["batch_stats"]["head"]["upscale_0"]["norm"]["mean"] = np.zeros(8, np.float32)
    with pytest.raises(BundleError) as error:
        bundle.save(tmp_path / "wrong", wrong, **FIELDS)
    for part in ("missing params/head/final/bias (1,)", "unknown params/extra (3,)", "(8,), expected (7,)"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_weights_that_give_no_number(variables, tmp_path):
    broken = jax.tree.map(np.copy, variables)
    broken["params"]["head"]["final"]["bias"][:] = np.nan
    with pytest.raises(BundleError, match="NaN or infinite"):
        bundle.save(tmp_path / "b", broken, **FIELDS)


def test_save_replaces_only_when_told_and_leaves_nothing_when_it_fails(saved, tmp_path, monkeypatch):
    with pytest.raises(BundleError, match="already exists"):
        bundle.save(saved, random_variables(ARCHITECTURE, 1), **FIELDS)
    target = bundle.save(tmp_path / "b", random_variables(ARCHITECTURE, 1), **FIELDS)
    first = bundle.read_meta(target)["weights_sha256"]
    with monkeypatch.context() as patch:
        patch.setattr(bundle.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            bundle.save(target, random_variables(ARCHITECTURE, 2), overwrite=True, **FIELDS)
    assert bundle.read_meta(target)["weights_sha256"] == first
    bundle.save(target, random_variables(ARCHITECTURE, 2), overwrite=True, **FIELDS)
    assert bundle.read_meta(target)["weights_sha256"] != first
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_optimizer_state_comes_back_whole(variables, tmp_path):
    state = {
        "count": np.int64(6),
        "mu": random_variables(ARCHITECTURE, 3)["params"],
        "nu": random_variables(ARCHITECTURE, 4)["params"],
        "lr": np.float32(3e-4),
        "plateau": {"best": np.float32(122.4), "num_bad_epochs": np.int32(1)},
    }
    path = bundle.save(tmp_path / "b", variables, optimizer=state, **FIELDS)
    opened = bundle.load_optimizer(bundle.load(path))
    for name, leaf in bundle.flatten(state).items():
        np.testing.assert_array_equal(bundle.flatten(opened)[name], leaf, err_msg=name)
    assert bundle.load_optimizer(bundle.load(bundle.save(tmp_path / "c", variables, **FIELDS))) is None


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ("simmim", {"embed_dim": 4, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3}),
        ("encoder", {"embed_dim": 4, "depths": [1, 2], "num_heads": [1, 2], "final_norm": False, "stage_norms": True}),
    ],
)
def test_other_tasks(task, architecture, tmp_path):
    fields = FIELDS | {"task": task, "architecture": architecture}
    path = bundle.save(tmp_path / "b", random_variables(architecture, task=task), **fields)
    assert max(bundle.verify(path).values()) < 1e-6


@pytest.mark.slow
def test_bundle_of_one_device_opens_on_eight(saved, variables):
    code = (
        "import sys, numpy as np, jax; from biomass_jax import bundle\n"
        "from biomass_jax.runtime import mesh as sharding\n"
        "mesh = sharding.create_mesh(); assert mesh.size == 8\n"
        "opened = bundle.load(sys.argv[1], sharding.replicated(mesh))\n"
        "leaf = opened.variables['params']['head']['final']['kernel']\n"
        "assert len(leaf.sharding.device_set) == 8; print(bundle.weights_sha256(opened.variables))\n"
    )
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", code, saved], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == bundle.weights_sha256(variables), done.stderr
