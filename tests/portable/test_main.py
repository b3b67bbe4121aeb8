"""`biomass-jax export`: its command line, and what it says."""

import pytest

from biomass_jax import cli
from biomass_jax.portable import formats
from biomass_jax.portable.__main__ import parser
from biomass_jax.portable.weights import PRECISIONS


@pytest.fixture
def asked(monkeypatch):
    """What `export` was called with."""
    calls = []

    def export(*paths, **settings):
        calls.append((*paths, settings))
        return [("file", "there")]

    monkeypatch.setattr(formats, "export", export)
    return calls


def test_options_reach_the_program(asked, tmp_path, capsys):
    words = ["export", "--bundle", "b", "--output", str(tmp_path / "f"), "--format"]
    assert cli.main([*words, "onnx", "--size", "64x96", "--precision", "int8", "--overwrite"]) == 0
    assert cli.main([*words, "stablehlo"]) == 0
    assert cli.main([*words, "onnx", "--size", "448"]) == 0
    assert [call[:2] for call in asked] == [("b", str(tmp_path / "f"))] * 3
    assert asked[0][2] == {"form": "onnx", "precision": "int8", "size": (64, 96), "overwrite": True}
    assert asked[1][2] == {"form": "stablehlo", "precision": "float32", "size": (224, 224), "overwrite": False}
    assert asked[2][2]["size"] == (448, 448)
    assert capsys.readouterr().out.splitlines()[0] == "file      there"


def test_choices_are_those_that_there_are():
    """The parser has them by itself: it answers --help before JAX is imported."""
    choices = {action.dest: tuple(action.choices) for action in parser()._actions if action.choices}
    assert choices == {"format": tuple(formats.NEEDS), "precision": PRECISIONS}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "stablehlo", "--size", "64"], "--size: has no effect with --format stablehlo"),
        (["--format", "onnx", "--size", "64x"], "'64x': expected pixels as 224 or as HEIGHTxWIDTH"),
        (["--format", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_a_command_line_that_cannot_be_meant(asked, words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "--bundle", "b", "--output", "f", *words])
    assert said in capsys.readouterr().err
    assert asked == []


def test_an_error_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert cli.main(["export", "--bundle", "nowhere", "--format", "onnx", "--output", str(tmp_path / "f")]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere: not a model bundle")
