"""`biomass-jax`: what each command runs, its help, its completion."""

import argparse
import importlib
import importlib.metadata
import runpy
import subprocess

import pytest

import biomass_jax
from biomass_jax import cli
from biomass_jax import main as runner
from data_prep import __main__ as steps

COMMANDS = (*cli.RUNS, *cli.TOOLS, *steps.STEPS)


@pytest.fixture
def started(monkeypatch):
    """What `biomass_jax.main` is started with, instead of starting it."""
    calls = []
    monkeypatch.setattr(runner, "cli", calls.append)
    return calls


def refused(words, capsys):
    """Exit code and words of a command line that can't be run."""
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err


def test_every_command_is_listed_and_the_version_told(capsys):
    assert (cli.main([]), cli.main(["--help"])) == (2, 0)
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n  {name} ") == 2 for name in (*COMMANDS, "completion"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"biomass-jax {biomass_jax.__version__}\n"


def test_options_reach_the_run_as_fields_of_its_config(root, started):
    words = (
        "predict --bundle b --inputs a*.tif --workdir out --resample 30 --mask-keep 10,95 --quicklook --config.tile=100"
    )
    cli.main(words.split())
    assert started == [
        [
            *(f"--config={root}/configs/predict.py", "--workdir=out", "--config.bundle=b", "--config.inputs=a*.tif"),
            *("--config.resample=30.0", "--config.mask_keep=(10, 95)", "--config.quicklook=True", "--config.tile=100"),
        ]
    ]


def test_a_config_of_ones_own_begins_with_a_packaged_one(tmp_path, started):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from biomass_jax.configs import finetune_all_biomes\n\ndef get_config():\n"
        "    config = finetune_all_biomes.get_config().unlock()\n    config.epochs = 3\n    return config.lock()\n"
    )
    together = ["--coordinator=a:1", "--process_count=2", "--process_id=0"]
    cli.main(["finetune", "--config", str(mine), "--workdir", "w", "--optimizer.learning-rate", "1e-3", *together])
    assert started == [[f"--config={mine}", "--workdir=w", "--config.optimizer.learning_rate=0.001", *together]]
    config = runpy.run_path(str(mine))["get_config"]()
    assert (config.epochs, config.batch_size) == (3, 64)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["predct"], 2, "error: no command 'predct'; did you mean predict? `biomass-jax --help` lists all"),
        (["--verbose"], 2, "error: no command '--verbose';"),
        (["predict"], 2, "the following arguments are required: --workdir"),
        (
            ["predict", "--workdir", "w", "--batch_size", "3"],
            2,
            "unexpected '--batch_size'; did you mean --batch-size?",
        ),
        (["predict", "--workdir", "w", "scene.tif"], 2, "unexpected 'scene.tif'"),
        (["predict", "--workdir", "w", "--tile", "big"], 2, "argument --tile: invalid int value: 'big'"),
        (
            ["predict", "--workdir", "w", "--config", "evaluate"],
            1,
            "evaluate.py: config.mode is 'evaluate'; biomass-jax",
        ),
        (["evaluate", "--workdir", "w", "--config", "evalute"], 1, "error: evalute: no such config file"),
        (["completion", "tcsh"], 2, "usage: biomass-jax completion {bash,zsh,fish}"),
    ],
)
def test_command_lines_that_cannot_be_run(words, code, said, capsys, started):
    found, text = refused(words, capsys)
    assert (found, said in text, started) == (code, True, []), text


def test_a_file_that_is_no_config_is_named(tmp_path, capsys, started):
    (tmp_path / "x.py").write_text("")
    code, text = refused(["predict", "--workdir", "w", "--config", str(tmp_path / "x.py")], capsys)
    assert (code, "x.py: no function get_config" in text, started) == (1, True, [])


@pytest.mark.parametrize(("name", "module"), [("convert", cli.TOOLS["convert"].module), ("gedi", "data_prep.__main__")])
@pytest.mark.parametrize("code", [0, 75])
def test_tools_and_steps_get_their_words_and_give_their_exit_code(name, module, code, monkeypatch):
    calls = []
    monkeypatch.setattr(importlib.import_module(module), "main", lambda words: calls.append(words) or code)
    assert cli.main([name, "--out", "x"]) == code
    assert calls == [["--out", "x"] if name == "convert" else ["gedi", "--out", "x"]]


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, capsys):
    def main(words):
        raise ModuleNotFoundError("No module named 'tool_x.y'", name="tool_x.y")

    monkeypatch.setattr(importlib.import_module(cli.STEPS), "main", main)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["jax>=0.10", "tool-x>=3; extra == 'prep'", 'tool-x; extra == "dev"']
    )
    assert cli.main(["gedi"]) == 1
    assert capsys.readouterr().err == "error: biomass-jax gedi needs tool_x; pip install 'biomass-jax[prep]'\n"
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["jax>=0.10"])
    with pytest.raises(ModuleNotFoundError):  # a fault of the program keeps its traceback
        cli.main(["gedi"])


class Understood(Exception):
    """A parser has read its command line."""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_an_example_that_its_parser_understands(name, capsys, started, monkeypatch):
    if name == "sweep":
        pytest.importorskip("optuna")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "exit", lambda *_: (_ for _ in ()).throw(SystemExit(0)))
        try:
            cli.main([name, "--help"])
        except SystemExit as ended:
            assert ended.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: biomass-jax {name} ")
    assert "python -m" not in shown
    example = shown.rstrip().rpartition("\n")[2].split()
    assert example[:2] == ["biomass-jax", name]
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_tell(self, *arguments):
        found = parse(self, *arguments)
        if self.prog.startswith("python -m") and "{hls" not in self.format_usage() and self.add_help:
            raise Understood
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_tell)
    if name in cli.RUNS:
        cli.main(example[1:])
        assert len(started) == 1
    else:
        with pytest.raises(Understood):
            cli.main(example[1:])


def complete(script, *words):
    """What bash offers for the last of some words."""
    line = " ".join(f"'{word}'" for word in ("biomass-jax", *words))
    code = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _biomass_jax; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{code}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_shells_complete_commands_options_and_what_they_may_be(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # of a narrow window, in which every text is broken
    options = {name: cli._options(name) for name in (*COMMANDS, "completion")}
    monkeypatch.setattr(cli, "_options", options.__getitem__)
    script = cli.completion("bash")
    assert complete(script, "pre") == ["predict", "pretrain", "prepare", "preview"]
    assert complete(script, "predict", "--ba") == ["--base", "--bands", "--batch-size"]
    assert complete(script, "predict", "--no-q") == ["--no-quicklook"]
    assert complete(script, "finetune", "--optimizer.le") == ["--optimizer.learning-rate"]
    assert complete(script, "finetune", "--load", "") == ["all", "encoder"]
    assert complete(script, "composite", "--statistic", "m") == ["mean", "median"]
    assert complete(script, "predict", "--inputs", "sc") == []  # names of files, by the shell itself
    assert complete(script, "completion", "") == ["bash", "zsh", "fish"]
    assert complete(script, "convert", "--to", "t") == ["torch"]
    assert cli.completion("zsh").endswith(script) and cli.completion("zsh").startswith("#compdef biomass-jax\n")
    fish = cli.completion("fish").splitlines()
    seen = "complete -c biomass-jax -n '__fish_seen_subcommand_from"
    assert f"{seen} finetune' -l load -x -a 'all encoder'" in fish
    assert f"{seen} predict' -l quicklook" in fish
    assert (
        "complete -c biomass-jax -n __fish_use_subcommand -f -a composite -d 'a season\\'s scenes to one image a tile'"
        in fish
    )
