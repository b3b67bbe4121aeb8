"""`python -m data_prep STEP`: the list of steps, and every spelling of each."""

import runpy
import sys

import pytest

from biomass_jax.runtime.lock import one_writer
from data_prep.__main__ import STEPS, main


def test_the_steps_are_listed(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {step} " in printed for step in STEPS)


def test_an_unknown_step_is_refused(capsys):
    assert main(["compost"]) == 2
    assert "no step 'compost'; expected one of prepare, download, composite" in capsys.readouterr().err


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
        assert [path.name for path in out.iterdir()] == [".lock"]
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: another run is at work there: ") and said.count("\n") == 1
