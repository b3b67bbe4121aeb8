"""`python -m data_prep STEP`: the list of steps, and every spelling of each."""

import os
import runpy
import sys

import pytest

from biomass_jax.runtime.lock import one_writer
from data_prep.__main__ import STEPS, main
from data_prep.commands import command


def test_the_steps_are_listed(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {step} " in printed for step in STEPS)


def test_an_unknown_step_is_refused(capsys):
    assert main(["compost"]) == 2
    assert "no step 'compost'; expected one of prepare, download, stream" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy on what the first spelling ran
@pytest.mark.parametrize("step", STEPS)
def test_both_spellings_show_the_same_help(step, capsys, monkeypatch):
    shown = []
    for run in (lambda: main([step, "--help"]), lambda: runpy.run_module(f"data_prep.{step}", run_name="__main__")):
        monkeypatch.setattr(sys, "argv", [step, "--help"])
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith(f"usage: python -m data_prep {step} ")


@pytest.mark.parametrize(
    "words",
    [
        "composite granules --season 2020 --out {out}/composites",
        "gedi orbit.h5 --out {out}",
        "labels --out {out}",
        "chips --out {out}",
        "splits --out {out}",
        "shards --out {out}",
    ],
    ids=lambda words: words.split()[0],
)
def test_a_step_is_refused_beside_prepare(tmp_path, capsys, words):
    out = tmp_path / "out"
    with one_writer(out):
        assert main(words.format(out=out).split()) == 1
        assert [path.name for path in out.iterdir()] == [".biomass_jax.lock"]
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: another run is at work there: ") and said.count("\n") == 1


def test_a_fault_of_the_environment_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/gone.pem")

    @command
    def main(argv=None):
        raise {"environment": OSError("Could not find a suitable TLS CA certificate bundle"), "ours": KeyError("x")}[
            argv
        ]

    assert main("environment") == 1
    said = capsys.readouterr().err
    assert said == "error: REQUESTS_CA_BUNDLE is /gone.pem, and there is nothing; correct or unset it\n"
    with pytest.raises(KeyError):  # a fault of the program keeps its traceback
        main("ours")


def test_variables_that_results_would_hang_on_are_left_out(capsys, monkeypatch):
    monkeypatch.setenv("GDAL_PAM_ENABLED", "NO")
    with pytest.raises(SystemExit):
        main(["stats", "--help"])
    assert "left out of the environment" in capsys.readouterr().err
    assert "GDAL_PAM_ENABLED" not in os.environ
