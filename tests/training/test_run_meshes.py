"""The same run on one device and on eight fake ones, in every arrangement."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.training import meshes, world

pytestmark = pytest.mark.long
MESHES = ("1x1", "8x1", "4x2", "2x4", "1x8")
FSDP = {mesh: int(mesh.split("x")[1]) for mesh in MESHES}
# A constant added to a map before a batch norm is taken away by it: the true gradient is 0, what is found is noise.
NO_GRADIENT = ("encoder/stages_0/norm/bias",)


def observe(root, folder, kind, names, devices=8):
    """What `tests.training.meshes` finds, by mesh."""
    command = [sys.executable, "-m", "tests.training.meshes", str(folder), kind, ",".join(names)]
    done = subprocess.run(
        command, cwd=root, env=os.environ | meshes.environment(devices), capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: dict(np.load(folder / f"{name}.npz")) for name in names}


def write(folder):
    world.write(folder / "shards", train=24, val=0, test=0)
    return folder


@pytest.fixture(scope="module", params=["finetune", "pretrain"])
def found(root, request, tmp_path_factory):
    return observe(root, write(tmp_path_factory.mktemp(request.param)), request.param, MESHES)


def assert_same_training(one, other):
    """Issue 6's bounds, for every seed: losses, counts, rates, the first step's gradients."""
    for seed in range(meshes.SEEDS):
        losses = one[f"loss/{seed}"]
        np.testing.assert_allclose(other[f"loss/{seed}"][:3], losses[:3], rtol=1e-5)
        np.testing.assert_allclose(other[f"loss/{seed}"], losses, rtol=1e-3)
        for name in ("count", "learning_rate"):
            np.testing.assert_array_equal(other[f"{name}/{seed}"], one[f"{name}/{seed}"])
        assert_same_gradients(
            *({path: each[path] for path in one if f"gradients/{seed}/" in path} for each in (one, other))
        )


def assert_same_gradients(expected, gradients):
    largest = max(np.abs(value).max() for value in expected.values())
    for path, value in expected.items():
        if path.endswith(NO_GRADIENT):
            assert max(np.abs(value).max(), np.abs(gradients[path]).max()) < 1e-6 * largest
            continue
        bound = 1e-4 * np.abs(value).max()
        assert bound > 0, path
        np.testing.assert_allclose(gradients[path], value, rtol=0, atol=bound, err_msg=path)


def test_meshes_train_alike(found):
    one = found["1x1"]
    assert one["loss/0"][-1] < 0.95 * one["loss/0"][0]
    firsts = {float(one[f"loss/{seed}"][0]) for seed in range(meshes.SEEDS)}
    assert len(firsts) == meshes.SEEDS
    for mesh in MESHES[1:]:
        assert_same_training(one, found[mesh])


def test_a_state_is_drawn_and_restored_in_parts(found):
    for mesh, fsdp in FSDP.items():
        assert (found[mesh]["split"] > 5) == (fsdp > 1)
        planned, drawn = found[mesh]["shares"]
        restored = [float(value) for name, value in found[mesh].items() if name.startswith("share/")]
        assert {planned, *restored} == {drawn}
        assert drawn < (1 if fsdp == 1 else 0.7 / fsdp + 0.3) + 1e-9
        for name, value in found["1x1"].items():
            if name.startswith("drawn/"):
                np.testing.assert_array_equal(found[mesh][name], value, err_msg=name)


def test_a_checkpoint_goes_on_with_another_mesh(found):
    for mesh in MESHES[1:]:
        for there, here in (("1x1", mesh), (mesh, "1x1")):
            expected = found[there]["loss/0"][meshes.SAVED]
            np.testing.assert_allclose(found[here][f"next/{there}"], expected, rtol=1e-5)


def test_accumulation_makes_up_for_devices_and_remat_changes_nothing(root, tmp_path):
    found = observe(root, write(tmp_path), "variants", ("variants",))["variants"]
    each = {name: {} for name in ("eight", "accumulated", "remat")}
    for name, value in found.items():
        variant, _, rest = name.partition("/")
        each[variant][rest] = value
    eight = each["eight"]
    scalars = ("loss", "count", "learning_rate", "grad_norm")
    assert (eight.pop("remat"), each["accumulated"].pop("remat")) == (0, 0)
    assert each["remat"].pop("remat") == 3  # blocks
    for other in (each["accumulated"], each["remat"]):
        for name in scalars:
            np.testing.assert_allclose(other[name], eight[name], rtol=1e-5, err_msg=name)
        assert_same_gradients(*({path: one[path] for path in eight if path not in scalars} for one in (eight, other)))


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_a_run_goes_on_with_other_devices(root, tmp_path, kind):
    """Averages and micro-batches included; the table is told where there are several devices."""
    shards = world.write(tmp_path / "shards", train=16, val=5, test=0)
    config = {"finetune": "finetune_all_biomes", "pretrain": "pretrain_simmim_swin_b_100ep"}[kind]
    fields = meshes.COMMON | meshes.FIELDS[kind] | {"data.path": str(shards), "draw_every": 0, "log_every": 1}
    fields |= {"optimizer.gradient_accumulation": 2, "optimizer.ema_decay": 0.9, "schedule.warmup_epochs": 0.0}

    def run(devices, **more):
        flags = [f"--config.{name}={value}" for name, value in (fields | more).items()]
        command = [sys.executable, "-m", "biomass_jax.main", "--config", f"configs/{config}.py", *flags]
        done = subprocess.run(
            [*command, "--workdir", str(tmp_path / "run")],
            cwd=root,
            env=os.environ | meshes.environment(devices),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    said = run(4, **{"mesh.fsdp": 2})
    assert said.count("bytes a device\n") == 1 and "params/encoder/patch_embed/" in said
    said = run(1, epochs=2)
    assert "resuming from step 2 of 4" in said and "bytes a device" not in said
    steps = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "train/loss" in line] == [1, 2, 3, 4]
