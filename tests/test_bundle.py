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

from biomass_jax import bundle, trees
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
        patch.setattr(trees.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
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


SECTION = {"level": 0.9, "applicability": {"threshold": 0.4, "blocks": 3}}
BANDS = ["agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di"]


def area(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"centres": (11, 3), "mean": (3,), "scale": (3,), "mean_distance": ()}
    return {name: np.asarray(rng.random(shape), np.float32) for name, shape in shapes.items()}


def calibrate(source, path, applicability=None, **options):
    given = {"output_bands": BANDS, "provenance": {"command": "calibrate"}} | options
    return bundle.with_uncertainty(bundle.load(source), path, SECTION, applicability, **given)


@pytest.fixture(scope="module")
def calibrated(saved, tmp_path_factory):
    return calibrate(saved, tmp_path_factory.mktemp("calibrated") / "c", area())


def test_a_calibrated_copy_has_the_same_weights_and_says_what_was_added(saved, calibrated):
    before, after = bundle.load(saved), bundle.load(calibrated)
    digest = bundle.weights_sha256(area())
    assert after.meta == before.meta | {
        "output": {"bands": BANDS, "units": "Mg ha-1", "nodata": -1},
        "provenance": {"source": "random", "command": "calibrate"},
        "uncertainty": SECTION | {"applicability_sha256": digest},
    }
    assert bundle.weights_sha256(after.variables) == before.weights_sha256
    assert max(bundle.verify(calibrated).values()) < 1e-6


def test_the_area_of_applicability_comes_back_and_older_bundles_have_none(saved, calibrated):
    found = bundle.load(calibrated).applicability
    assert found.keys() == area().keys()
    for name, array in area().items():
        assert type(found[name]) is np.ndarray and found[name].dtype == np.float32 and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    assert bundle.load(saved).applicability is None


def test_calibrating_again_may_leave_the_area_out(calibrated, tmp_path):
    section = bundle.load(calibrated).meta["uncertainty"]
    options = {"output_bands": BANDS[:4], "provenance": {}}
    without = bundle.with_uncertainty(bundle.load(calibrated), tmp_path / "without", section, **options)
    assert bundle.load(without).applicability is None and bundle.read_meta(without)["uncertainty"] == SECTION


def test_a_calibrated_copy_has_no_optimizer(saved, tmp_path):
    trained = edit(saved, tmp_path / "trained")
    (trained / "optimizer").mkdir()
    names = sorted(path.name for path in calibrate(trained, tmp_path / "c", area()).iterdir())
    assert names == ["applicability", "bundle.json", "variables"]


def test_a_calibrated_copy_is_whole_or_not_there(calibrated, tmp_path, monkeypatch):
    with pytest.raises(BundleError, match="already exists"):
        calibrate(calibrated, calibrated, area(seed=1))
    target = edit(calibrated, tmp_path / "c")
    opened, given = bundle.load(target), {"output_bands": BANDS, "provenance": {}, "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(trees.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            bundle.with_uncertainty(opened, target, SECTION, area(seed=1), **given)
    np.testing.assert_array_equal(opened.applicability["centres"], area()["centres"])
    bundle.with_uncertainty(opened, target, SECTION, area(seed=1), **given)
    np.testing.assert_array_equal(bundle.load(target).applicability["centres"], area(seed=1)["centres"])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def without_area(folder):
    subprocess.run(["rm", "-r", folder / "applicability"], check=True)


def cut_short(folder):
    largest = max((folder / "applicability").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-40])


def of_another_digest(folder):
    meta = json.loads((folder / "bundle.json").read_text())
    meta["uncertainty"]["applicability_sha256"] = "0" * 64
    (folder / "bundle.json").write_text(json.dumps(meta))


def with_no_digest(folder):
    meta = json.loads((folder / "bundle.json").read_text())
    del meta["uncertainty"]
    (folder / "bundle.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_area, r"damaged/applicability: no readable arrays there"),
        (cut_short, r"damaged/applicability: (the arrays are damaged|no readable arrays there)"),
        (of_another_digest, r"damaged/applicability: the arrays' SHA-256 is \w{64}, bundle.json says 0{64}; calibrate"),
        (with_no_digest, r"damaged/applicability: the arrays' SHA-256 is \w{64}, bundle.json says None"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_a_damaged_area_of_applicability_is_refused_and_the_weights_are_not(calibrated, tmp_path, damage, message):
    folder = edit(calibrated, tmp_path / "damaged")
    damage(folder)
    opened = bundle.load(folder)
    assert bundle.weights_sha256(opened.variables) == opened.weights_sha256
    for read in (lambda: opened.applicability, lambda: bundle.verify(folder)):
        with pytest.raises(BundleError, match=message):
            _ = read()
    gc.collect()


def test_refuses_a_section_that_is_none(calibrated, tmp_path):
    with pytest.raises(BundleError, match="field `uncertainty` must be a dict, found 'yes'"):
        bundle.load(edit(calibrated, tmp_path / "c", uncertainty="yes"))


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
