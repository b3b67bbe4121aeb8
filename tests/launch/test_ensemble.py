"""Ensembles as a user makes them: joined from bundles, or trained by a training that takes no time."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert.export import export
from biomass_jax.errors import BundleError, ConfigError, ConvertError
from biomass_jax.models.build import dummy_inputs
from biomass_jax.training import run as training
from configs import finetune_all_biomes
from launch import ensemble
from tests.prediction.stubs import random_bundle
from tests.training import world

pytestmark = pytest.mark.slow  # many, of a second and more each

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_training.py"))]
SMALL = {"embed_dim": 6, "depths": [1, 1], "num_heads": [1, 3], "mlp_ratio": 2.0, "decoder_channels": 7}
SAID_ALIKE = "the members of an ensemble have to be alike in it"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three members; the second has the first one's encoder."""
    folder = tmp_path_factory.mktemp("models")
    first, second, third = (random_bundle(folder / f"m{seed}", seed=seed, **SMALL) for seed in range(3))
    variables = bundle.load(second).variables
    variables["params"]["encoder"] = bundle.load(first).variables["params"]["encoder"]
    meta = bundle.read_meta(second)
    made = ("task", "architecture", "input", "output", "provenance")
    about = {name: meta[name] for name in made} | {"training": {"dataset": "taiga", "seed": 8, "bootstrap": 2}}
    bundle.save(second, variables, **about, overwrite=True)
    return [first, second, third]


def changed(source, folder, **fields):
    """A copy of a bundle with fields of its bundle.json changed, `input__means` for those of a section."""
    shutil.copytree(source, folder)
    meta = bundle.read_meta(folder)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        meta[section] = meta[section] | {field: value} if field else value
    (folder / "bundle.json").write_text(json.dumps(meta))
    return folder


def predict(model):
    opened = bundle.load(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(opened.module().apply)(opened.variables, *dummy_inputs(opened.module())))


def test_joined_models_are_a_bundle_like_any_other(models, tmp_path):
    assert ensemble.main(["--join", *map(str, models[:2]), "--output", str(tmp_path / "both")]) == 0
    both = bundle.load(tmp_path / "both")
    assert max(bundle.verify(both.path).values()) == 0
    first, second = (bundle.load(model) for model in models[:2])
    assert both.meta["architecture"] == first.meta["architecture"] | {"members": 2, "shared_encoder": True}
    assert both.meta["output"] == first.meta["output"] | {"bands": ["agbd", "agbd_sd"]}
    assert both.meta["input"] == first.meta["input"]
    assert both.meta["training"] == {"dataset": "taiga", "season": ""}
    told = both.meta["provenance"]
    assert told["command"].startswith("biomass-jax ensemble --join ")
    assert told["members"] == [
        {"path": str(models[0]), "weights_sha256": first.weights_sha256, "seed": None, "bootstrap": None},
        {"path": str(models[1]), "weights_sha256": second.weights_sha256, "seed": 8, "bootstrap": 2},
    ]
    for number, member in enumerate((first, second)):
        own = bundle.flatten(member.variables["params"])
        found = bundle.flatten(
            both.variables["params"][f"member_{number}"] | {"encoder": both.variables["params"]["encoder"]}
        )
        assert own.keys() == found.keys()
        for path, value in own.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert ensemble.main(["--join", *map(str, models[:2]), "--output", str(tmp_path / "both")]) == 1  # it is there
    with pytest.raises(ConvertError, match="both: is an ensemble, which no checkpoint's layout holds"):
        export(both.path, tmp_path / "model.ckpt")


@pytest.mark.slow
def test_encoders_that_differ_are_all_kept(models, tmp_path):
    made = bundle.load(ensemble.join(models[1:], tmp_path / "both"))
    assert (made.meta["architecture"]["members"], made.meta["architecture"]["shared_encoder"]) == (2, False)
    assert set(made.variables["params"]["member_1"]) == {"encoder", "decoder", "head"}
    means = np.stack([predict(model) for model in models[1:]]).astype(np.float64)
    found = predict(made.path)
    np.testing.assert_allclose(found[..., 0], means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found[..., 1], means.std(0), rtol=1e-4, atol=1e-4)
    assert found[..., 1].min() > 0


@pytest.mark.slow
def test_one_member_several_times_is_that_member(models, tmp_path):
    found = predict(ensemble.join([models[2]] * 3, tmp_path / "again"))
    np.testing.assert_array_equal(found[..., 0], predict(models[2]))
    np.testing.assert_array_equal(found[..., 1], 0)


@pytest.mark.slow
def test_a_bundle_of_an_older_version_is_joined(models, tmp_path):
    fields = bundle.read_meta(models[1])["architecture"]
    old = {name: fields[name] for name in SMALL}  # the others are defaults
    older = changed(models[1], tmp_path / "old", architecture=old)
    made = ensemble.join([models[0], older], tmp_path / "joined")
    assert bundle.read_meta(made)["architecture"]["final_relu"] is True


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input__means": [1.0] * 6}, "input.means is .*, but .*m0 has .*547.36"),
        ({"input__bands": list("ABCDEF")}, "input.bands is .*'A'.*, but .*m0 has .*'BLUE'"),
        ({"input__fill": -1}, "input.fill is -1, but .*m0 has -9999"),
        ({"input__pixel_size": 10.0}, "input.pixel_size is 10.0, but .*m0 has 30.0"),
        ({"output__bands": ["height"]}, "output.bands.0. is height, but .*m0 has agbd"),
        ({"output__nodata": -9999}, "output.nodata is -9999, but .*m0 has -1"),
        ({"architecture__window_size": 5}, "architecture.window_size is 5, but .*m0 has 7"),
        ({"architecture__spread": "gaussian"}, "architecture.spread is gaussian, but .*m0 has none"),
        (
            {"architecture__spread": "quantiles"},
            "architecture.spread is 'quantiles', and the mean of quantiles is no quantile of the ensemble",
        ),
        ({"task": "simmim", "architecture": {}}, "task is 'simmim'; members of an ensemble are of task 'biomass'"),
        ({"architecture__members": 2}, "is an ensemble itself; give its members"),
        ({"uncertainty": {"level": 0.9}}, "is calibrated, and its calibration doesn't hold for an ensemble"),
    ],
)
def test_a_model_that_cannot_be_a_member_is_named(models, tmp_path, fields, said):
    other = changed(models[1], tmp_path / "other", **fields)
    with pytest.raises(BundleError, match=f"^{other}: {said}") as caught:
        ensemble.join([models[0], other], tmp_path / "joined")
    assert (SAID_ALIKE in str(caught.value)) == (" has " in said)
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--join a --output b", "found 1 member, expected two or more"),
        ("--join a b", "--join needs --output"),
        ("--join a b --output c --config.seed=3", "--join doesn't go with --config.seed=3"),
        ("--members 3 --workdir w", "an ensemble's training needs --config"),
        ("--members 1 --workdir w --config finetune_all_biomes", "--members is 1; expected 2 or more"),
        ("--members 2 --workdir w --config evaluate", "evaluate.py: mode is 'evaluate'; expected 'finetune'"),
        ("--members 2 --workdir w --config finetune_all_biomes --config.sed=1", "did you mean seed?"),
        ("--members 2 --workdir w --config finetune_all_biomes --config.overwrite=true", "overwrite=True would begin"),
        ("--members 2 --workdir w --config finetune_all_biomes --config.data.bootstrap=1", "data.bootstrap is 1, but"),
        ("--members 2 --workdir w --config finetune_all_biomes", "config.data.path is not given"),
    ],
)
def test_command_lines_that_cannot_be_run(words, said, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert ensemble.main(words.split(), program=["false"]) == 1
    assert said in caplog.messages[-1]


@pytest.mark.slow
def test_an_ensemble_is_not_trained_further(models, tmp_path, monkeypatch):
    made = ensemble.join(models[:2], tmp_path / "both")
    config = finetune_all_biomes.get_config()
    shards = world.write(tmp_path / "shards", train=4, val=1, test=0)
    for load in ("all", "encoder"):
        world.configure(config, data__path=str(shards), init_from=str(made), load=load)
        with pytest.raises(ConfigError, match=f"config.init_from: {made} is an ensemble, which isn't trained further"):
            training.set_up(config, tmp_path / "run", command="")


CONFIG = """
from configs import finetune_all_biomes

def get_config():
    config = finetune_all_biomes.get_config().unlock()
    config.epochs = 3
    config.model.crash, config.model.pause = "never", 0.0
    return config.lock()
"""
DRIVER = (
    "import sys\nfrom launch import ensemble\nsys.exit(ensemble.main(sys.argv[2:], program=[*{fake}, sys.argv[1]]))"
)


class Command:
    """An ensemble's training in a folder of its own."""

    def __init__(self, folder, models):
        self.out, self.joined = folder / "out", []
        (folder / "base.py").write_text(CONFIG)
        shards = world.write(folder / "shards", train=4, val=1, test=0)
        self.fields = [f"--config.data.path={shards}", f"--config.init_from={models[0]}", "--config.seed=100"]
        self.words = ["--config", str(folder / "base.py"), "--workdir", str(self.out), "--members"]

    def run(self, members, *more):
        """`main`, in this process."""
        return ensemble.main([*self.words, str(members), *self.fields, *more], program=FAKE)

    def starts(self, number):
        path = self.out / f"member_{number}" / "notes.txt"
        return path.read_text().count("start") if path.exists() else 0


@pytest.fixture
def command(tmp_path, models, monkeypatch):
    """The command, which only notes what it would join."""
    found = Command(tmp_path, models)

    def join(paths, output, *, command, overwrite):
        assert all((path / "bundle.json").is_file() for path in paths) and overwrite
        output.mkdir(exist_ok=True)
        found.joined.append([str(path.relative_to(found.out)) for path in paths])

    monkeypatch.setattr(ensemble, "join", join)
    return found


def test_members_have_seeds_and_draws_of_their_own_and_end_as_one_bundle(command, models, monkeypatch):
    started = []

    class Noted(ensemble.Group):
        def __init__(self, count, words, gpus, *, name):
            started.append((name, words))
            super().__init__(count, words, gpus, name=name)

    monkeypatch.setattr(ensemble, "Group", Noted)
    before = signal.getsignal(signal.SIGTERM)
    assert command.run(3) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    for number, (name, words) in enumerate(started):
        assert (name, words[6:8]) == (f"member_{number}", ["--workdir", str(command.out / name)])
        assert words[-3:-1] == [f"--config.seed={100 + number}", f"--config.data.bootstrap={number + 1}"]
        assert sum(word.startswith("--config.seed=") for word in words) == 1
        assert command.fields[0] in words
    assert len(started) == 3

    assert command.run(3) == 0  # nothing is left to train
    assert command.run(4) == 0  # one more
    assert [command.starts(number) for number in range(4)] == [1, 1, 1, 1]
    bests = [f"member_{number}/best" for number in range(4)]
    assert command.joined == [bests[:3], bests[:3], bests]


def test_an_ensemble_begun_with_other_settings_or_data_is_named(command, caplog):
    assert command.run(2) == 0
    assert command.run(2, "--config.optimizer.learning_rate=0.1") == 1
    assert (
        "out/ensemble.json: this ensemble was begun with other settings or data: fields.optimizer.learning_rate: was"
        in (caplog.messages[-1])
    )
    shutil.rmtree(command.out.parent / "shards")
    world.write(command.out.parent / "shards", train=5, val=1, test=0)
    assert command.run(2) == 1
    assert "other settings or data: data." in caplog.messages[-1]


def test_a_member_that_fails_ends_the_command_and_is_resumed(command, caplog):
    assert command.run(2, "--config.model.crash=once") == 3
    assert "a member failed, see above; the same command resumes with it" in caplog.messages[-1]
    assert not (command.out / "ensemble").exists()
    assert command.run(2, "--config.model.crash=once") == 3  # now the second
    assert command.run(2, "--config.model.crash=once") == 0
    assert [command.starts(number) for number in range(2)] == [2, 2]


@pytest.mark.slow
def test_sigterm_reaches_the_member_and_the_same_command_resumes(command):
    code = DRIVER.format(fake=FAKE[:-1])
    words = [*command.words, "2", *command.fields, "--config.model.pause=0.4"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, FAKE[-1], *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not (command.out / "member_0" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "stopped; give the same command again to resume" in process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert (command.out / "member_0" / "notes.txt").read_text().count("sigterm") == 1
    assert not (command.out / "member_1").exists()
    assert command.run(2, "--config.model.pause=0.4") == 0
    assert [command.starts(number) for number in range(2)] == [2, 1]
