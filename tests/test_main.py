"""The command line: flags, configs, exit codes, and which fields a run reads."""

import json
import logging
import subprocess
import sys

import pytest

from biomass_jax import main
from biomass_jax.errors import PredictionError
from biomass_jax.prediction import run as prediction_run
from configs import predict


def command(root, *arguments, cwd=None):
    """Run the program from anywhere; returns exit code and standard error."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from biomass_jax.main import cli; cli()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            ["--config.bundel=x"],
            "no field 'bundel' in this config; it has adapter_blend, adapter_field, adapters, allow_empty",
        ),
        ([], "config.bundle is not given; add --config.bundle=PATH"),
        (["--config.bundle=b"], "config.inputs is not given; add --config.inputs=PATH"),
        (["--config.bundle=b", "--config.inputs=None"], "config.inputs is not given"),
        (["--config.bundle=b", "--config.inputs=nowhere.tif"], "nowhere.tif: no such file or folder"),
        (["--config.batch_size=many"], "--config.batch_size=many"),
        (["--config.mode=train"], "config.mode is 'train'; expected one of evaluate, finetune, predict, pretrain"),
        (["left", "over"], "unexpected arguments ['left', 'over']"),
    ],
)
def test_faults_of_the_command_line_are_one_line(root, tmp_path, fields, words):
    status, said = command(root, "--config", root / "configs" / "predict.py", "--workdir", tmp_path / "w", *fields)
    assert status == 1
    assert words in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2


def test_no_config_no_workdir_and_unwritable_workdir(root, tmp_path):
    status, said = command(root, "--config", tmp_path / "none.py", "--workdir", tmp_path)
    assert (status, f"{tmp_path / 'none.py'}: no such config file" in said) == (1, True)
    status, said = command(root, "--config", root / "configs" / "predict.py")
    assert (status, "--workdir" in said) == (1, True)
    (tmp_path / "file").touch()
    status, said = command(root, "--config", root / "configs" / "predict.py", "--workdir", tmp_path / "file")
    assert (status, f"{tmp_path / 'file'}: can't write to the workdir" in said) == (1, True)
    assert "Traceback" not in said


def test_a_missing_bundle_is_one_line_and_what_was_asked_for_is_kept(root, tmp_path):
    (tmp_path / "a.tif").touch()
    workdir = tmp_path / "out" / "w"
    status, said = command(
        root,
        f"--config={root / 'configs' / 'predict.py'}",
        f"--workdir={workdir}",
        "--config.bundle=missing",
        f"--config.inputs={tmp_path / 'a.tif'}",
        "--config.mask_keep=10,95",
        cwd=tmp_path,  # configs are found from any folder
    )
    assert status == 1
    assert "missing: not a model bundle" in said
    assert "Traceback" not in said
    kept = json.loads((workdir / "config.json").read_text())
    assert set(kept) == set(predict.get_config())
    assert (kept["bundle"], kept["mask_keep"], kept["tile"]) == ("missing", [10, 95], 224)


LIST = (None, "BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2", None, None, None)


class Recorder:
    """Stands for a config and notes which fields are read."""

    def __init__(self, config):
        self._config = config
        self.read = set()

    def __getattr__(self, name):
        self.read.add(name)
        return self._config[name]

    __getitem__ = __getattr__


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "JAX_PLATFORMS",
            "cuda",
            "JAX_PLATFORMS is 'cuda', but this machine, or this installation of JAX, has no such",
        ),
        ("XLA_FLAGS", "--xla_nonsense=1", "XLA_FLAGS holds --xla_nonsense, which this version of XLA doesn't know"),
        ("JAX_NUM_CPU_DEVICES", "x", "JAX_NUM_CPU_DEVICES is 'x', which JAX can't read; correct or unset it"),
    ],
)
def test_faults_of_the_environment_are_one_line(root, tmp_path, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    (tmp_path / "a.tif").touch()
    fields = ["--config.bundle=missing", f"--config.inputs={tmp_path / 'a.tif'}"]
    status, said = command(root, f"--config={root / 'configs' / 'predict.py'}", f"--workdir={tmp_path / 'w'}", *fields)
    assert status == 1
    assert words in said
    assert "Traceback" not in said


def run(monkeypatch, tmp_path, **fields):
    """Run predict with a predictor that only notes what it is given."""
    given = {}

    class Noting:
        def predict_items(self, items, dst, **options):
            given["files"] = {"src": [item.name for item in items], "dst": dst, **options}
            return [], []

    def open_(path, **settings):
        given["open"] = {"path": path, **settings}
        return Noting()

    monkeypatch.setattr(prediction_run.Predictor, "open", open_)
    monkeypatch.setattr(prediction_run, "check", lambda *_: None)  # which reads all
    (tmp_path / "scene.tif").touch()
    config = predict.get_config()
    config.update({"bundle": "b", "inputs": str(tmp_path / "scene.tif"), **fields})
    recorder = Recorder(config)
    prediction_run.run(recorder, tmp_path, shardings=lambda: {"replicated": "r", "batch_sharding": "s"})
    return given, recorder.read


def test_every_field_of_the_config_is_read(monkeypatch, tmp_path):
    _, read = run(monkeypatch, tmp_path)
    assert read | {"mode"} == set(predict.get_config())  # mode is main's


def test_every_field_reaches_its_place(monkeypatch, tmp_path):
    settings = {"batch_size": 5, "tile": 100, "stride": 80, "margin": 4, "blend": "none", "tiling": "reference_1_2"}
    settings |= {"dtype": "bfloat16", "matmul_precision": "high", "uncertainty": "dropout", "samples": 3}
    settings |= {"di": True, "biome": "taiga", "outside": "nodata", "attention": "einsum"}
    settings |= {"base": "c", "adapters": "d.gpkg", "adapter_field": "name", "adapter_blend": 3.0}
    options = {"encoding": "percent", "resample": 30.0, "allow_empty": True, "overwrite": True, "quicklook": True}
    options |= {"style": True, "stac": True}
    options |= {"mask": "cover.tif", "mask_keep": (1, 2)}
    given, _ = run(monkeypatch, tmp_path, bands="None,BLUE", **settings, **options)
    assert given["open"] == {"path": "b", "replicated": "r", "batch_sharding": "s", **settings}
    assert given["files"] == {
        "src": [str(tmp_path / "scene.tif")], "dst": tmp_path, "bands": (None, "BLUE"), "progress": True, **options,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # inside ml_collections, for 3.12
@pytest.mark.parametrize(
    "spelling",
    [
        "None,BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2,None,None,None",
        "(None,'BLUE','GREEN','RED','NIR_NARROW','SWIR_1','SWIR_2',None,None,None)",
        "('None', 'BLUE', 'GREEN', 'RED', 'NIR_NARROW', 'SWIR_1', 'SWIR_2', None, None, None)",
    ],
)
def test_both_spellings_of_a_band_list_go_through_the_flag_parser(monkeypatch, tmp_path, root, spelling):
    from absl import flags
    from ml_collections import config_flags

    arguments = ["x", f"--config={root / 'configs' / 'predict.py'}", f"--config.bands={spelling}"]
    monkeypatch.setattr(sys, "argv", arguments)  # config_flags looks there for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(arguments)
    given, _ = run(monkeypatch, tmp_path, bands=values["config"].value.bands)
    assert given["files"]["bands"] == LIST


def test_configs_are_locked_and_of_one_mode():
    config = predict.get_config()
    assert config.mode in main.MODES
    with pytest.raises(AttributeError):
        config.zzz = 1
    with pytest.raises(TypeError):
        config.tile = "large"


@pytest.mark.parametrize("missing", ["bundle", "inputs"])
def test_what_is_not_given_is_asked_for(monkeypatch, tmp_path, missing):
    with pytest.raises(PredictionError, match=f"config.{missing} is not given"):
        run(monkeypatch, tmp_path, **{missing: ""})


def test_our_lines_and_not_those_of_libraries_are_shown(capsys):
    handlers, level, propagate = main.log.handlers[:], main.log.level, main.log.propagate
    try:
        main.set_up_logging()
        logging.getLogger("biomass_jax.prediction").info("ours")
        logging.getLogger("orbax").info("theirs")
        assert "INFO ours" in capsys.readouterr().err
    finally:
        main.log.handlers[:], main.log.propagate = handlers, propagate
        main.log.setLevel(level)
