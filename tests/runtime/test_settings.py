"""Settings: their types, command lines made from them, configs by name."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from biomass_jax.errors import ConfigError
from biomass_jax.runtime.settings import Typed, add_options, check, find_config, group, overrides, setting, to_config


@dataclasses.dataclass
class Inner:
    rate: float = setting(0.5, "of something, in %")
    pair: tuple[float, float] = setting((0.9, 0.999), "two")


@dataclasses.dataclass
class Outer:
    path: str | None = setting(None, "what to read; see above")
    size: int = setting(7, "px, see [maps](maps.md)")
    bands: tuple[str, ...] = setting((), "names")
    classes: tuple[int, ...] | None = setting(None, "numbers, as `(10, 95)`")
    draw: bool = setting(False, "a picture")
    kind: str = setting("a", "a, b", choices=("a", "b"))
    late: str = setting("a", "of a module", choices="no_such_module:NAMES")
    other: Inner = group(Inner)


def parser_of(config):
    parser = argparse.ArgumentParser(prog="p", allow_abbrev=False)
    add_options(parser, Outer, config=config)
    return parser


def given(*words):
    """A config that options have changed, by way of the texts that `main` gets."""
    config = to_config(Outer)
    texts = overrides(parser_of(config).parse_args(words), Outer)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["p", *texts])
    values(["p", *texts])
    return config


def test_options_change_the_fields_that_are_given_and_no_others():
    assert overrides(parser_of(to_config(Outer)).parse_args([]), Outer) == []
    words = "--path|a b.tif|--size|9|--draw|--other.rate|0.25|--other.pair|0.8|1e-3|--bands|B02,B03|--classes|10,95"
    config = given(*words.split("|"))
    assert (config.path, config.size, config.draw, config.other.rate) == ("a b.tif", 9, True, 0.25)
    assert (config.other.pair, config.bands, config.classes) == ((0.8, 1e-3), ("B02", "B03"), (10, 95))
    assert (config.kind, config.late) == ("a", "a")
    assert not given("--no-draw").draw


@pytest.mark.parametrize("text", ["10", "(10,)", "(10, )"])
def test_one_value_is_several_of_one(text):
    assert given("--classes", text).classes == (10,)
    assert given("--bands", text).bands == ("10",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "many"], "argument --size: invalid int value: 'many'"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (["--classes", "1,x"], "invalid int (or several, with commas) value: '1,x'"),
        (["--other.pair", "1"], "argument --other.pair: expected 2 arguments"),
        (["--siz", "3"], "unrecognized arguments: --siz 3"),
    ],
)
def test_what_a_field_cannot_be_is_refused_by_its_option(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of(to_config(Outer)).parse_args(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.replace("choose from a, b", "choose from 'a', 'b'")


def test_help_tells_the_values_of_the_config(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    config = to_config(Outer)
    config.other.pair = (0.5, 0.6)
    lines = [" ".join(line.split()) for line in parser_of(config).format_help().splitlines()]
    assert "--path TEXT what to read" in lines
    assert "--size N px, see docs/maps.md (7)" in lines
    assert "--other.rate X of something, in % (0.5)" in lines
    assert "two (0.5,0.6)" in " ".join(lines)
    assert lines.index("other:") > lines.index("--size N px, see docs/maps.md (7)")
    del config.size
    assert "--size" not in parser_of(config).format_help()  # it would change nothing


def test_packaged_configs_are_found_by_name_from_anywhere(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("predict").touch()  # somebody's own, of another kind
    assert find_config("predict") == root / "configs" / "predict.py"
    assert find_config("finetune", "sweeps") == root / "configs" / "sweeps" / "finetune.py"
    Path("mine.py").touch()
    assert find_config("mine.py") == Path("mine.py")


@pytest.mark.parametrize("missing", ["configs/evaluat.py", "evaluat", "common/evaluat"])
def test_a_config_that_is_not_there_is_named_with_those_that_are(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"{missing}: no such config file; .*evaluate, few_.*did you mean evaluate\?"
    ):
        find_config(missing)
    with pytest.raises(ConfigError, match="common: no such config file"):
        find_config("common")


@dataclasses.dataclass(frozen=True)
class Group(Typed):
    count: int = setting(3)
    share: float = setting(0.5)
    name: str = setting("a")
    flag: bool = setting(False)
    parts: tuple[str, ...] = setting(("L30",))
    digits: tuple[int, ...] = setting((0, 3))
    shares: tuple[float, float] = setting((0.5, 0.5))
    most: float | None = setting(None)


TAKEN = [
    ("count", "20", 20),
    ("count", 20.0, 20),
    ("count", np.int64(20), 20),
    ("share", 1, 1.0),
    ("share", " 0.25", 0.25),
    ("name", 2020, "2020"),
    ("name", Path("a/b"), "a/b"),
    ("flag", "false", False),
    ("flag", "True", True),
    ("flag", 1, True),
    ("parts", "S30", ("S30",)),
    ("parts", "('L30', 'S30')", ("L30", "S30")),
    ("parts", ["L30", "S30"], ("L30", "S30")),
    ("digits", 3, (3,)),
    ("digits", "0,3", (0, 3)),
    ("digits", "all", ()),
    ("shares", "0.25, 0.75", (0.25, 0.75)),
    ("most", "300", 300.0),
    ("most", None, None),
]
REFUSED = [
    ("count", 20.5, "count is 20.5; expected a whole number"),
    ("count", "twenty", "count is 'twenty'; expected a whole number"),
    ("count", True, "count is True; expected a whole number"),
    ("count", None, "count is None; expected a whole number"),
    ("share", "half", "share is 'half'; expected a number"),
    ("share", float("nan"), "share is nan; expected a number"),
    ("name", 2.5, "name is 2.5; expected a text"),
    ("name", None, "name is None; expected a text"),
    ("flag", "perhaps", "flag is 'perhaps'; expected true or false"),
    ("flag", 2, "flag is 2; expected true or false"),
    ("parts", {"L30"}, "parts is .*; expected a list"),
    ("digits", (0, 1.5), r"digits\[1\] is 1.5; expected a whole number"),
    ("shares", (0.5,), r"shares is \(0.5,\); expected 2 values"),
    ("most", "much", "most is 'much'; expected a number"),
]


@pytest.mark.parametrize(("name", "given", "expected"), TAKEN)
def test_what_can_be_meant_in_one_way_is_taken(name, given, expected):
    found = getattr(Group(**{name: given}), name)
    assert found == expected and type(found) is type(expected)
    config = to_config(Group)
    with config.ignore_type():
        config[name] = given
    config.lock()
    check(config, Group)
    assert config[name] == expected and type(config[name]) is type(expected)


@pytest.mark.parametrize(("name", "given", "says"), REFUSED)
def test_anything_else_is_refused_by_name(name, given, says):
    with pytest.raises(ConfigError, match=rf"^{says}"):
        Group(**{name: given})
    config = to_config(Group)
    with config.ignore_type():
        config[name] = given
    with pytest.raises(ConfigError, match=rf"^config\.{says}"):
        check(config, Group)
