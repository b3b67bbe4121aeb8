"""`python -m benchmarks.gpu`: limits are kept, what was found stays, and it needs few libraries."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.__main__ import GpuPart, main, run_part, summary

# A part that has a figure, and then waits with a child of its own.
WAITS = "sleep 600 & echo $! > {out}/child; echo '{{\"value\": 1.5}}' > {out}/first.json; wait"
# Modules that a bare machine with a GPU hasn't, refused as if they weren't installed.
BARE = """
import sys
class Refuse:
    names = {"rasterio", "grain", "tensorflow_datasets", "array_record", "ml_collections", "pyproj", "shapely",
             "geopandas", "pandas", "portpicker", "torch", "matplotlib", "tensorboardX", "affine"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in Refuse.names else find(name, *more)
"""


@pytest.fixture
def parts(monkeypatch):
    def give(**commands):
        found = {
            name: GpuPart(5, command=("bash", "-c", words)) if isinstance(words, str) else words
            for name, words in commands.items()
        }
        monkeypatch.setattr(program, "PARTS", found)
        monkeypatch.setattr(program, "has_gpu", lambda: True)

    return give


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="it looks a process up in /proc")
def test_a_part_that_takes_too_long_is_killed_with_its_children_and_its_figures_stay(tmp_path, parts):
    parts(first=WAITS.format(out=tmp_path))
    said = run_part("first", tmp_path, 60, tiny=False)
    assert said.startswith("cut short after") and said.endswith("figures until then kept")
    assert json.loads((tmp_path / "first.json").read_text()) == {"value": 1.5}
    child, ends = int((tmp_path / "child").read_text()), time.monotonic() + 30
    while alive(child) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(child)


def test_a_failing_part_and_a_missing_library_do_not_stop_the_rest(tmp_path, parts, capsys):
    parts(bad="echo why; exit 3", lacking=GpuPart(5, needs=("nothing_of_that_name",)), good="true")
    assert main(["--out", str(tmp_path / "o")]) == 1  # the first one has no figure
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("bad: failed after") and said[0].endswith("exit code 3: why")
    assert said[1] == "lacking: skipped: nothing_of_that_name not installed"
    assert said[2].startswith("good: done in ")
    assert json.loads((tmp_path / "o/good.json").read_text()) == {"passed": True}
    page = (tmp_path / "o/summary.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("- ")] == [f"- {line}" for line in said]
    assert main(["--out", str(tmp_path / "o"), "--only", "good"]) == 0


def test_without_time_a_part_is_left_out_and_an_old_figure_of_it_goes(tmp_path, parts):
    parts(first="true")
    (tmp_path / "first.json").write_text("{}")
    assert main(["--out", str(tmp_path), "--minutes", "0.1"]) == 1
    assert "- first: left out: no time left" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "first.json").exists()


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["--out", str(tmp_path / "o")]) == 2
    assert "no GPU here; --tiny" in capsys.readouterr().err and not (tmp_path / "o").exists()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "forward,backwards"])
    assert "unknown: backwards; expected some of ceilings, forward" in capsys.readouterr().err


def test_the_summary_has_shares_of_the_ceiling():
    found = {
        "ceilings": {"product_bfloat16_tflops": 640.0, "copy_tbytes": 3.4},
        "forward": {"batches": {"128": {"ms": 20.5, "tflops": 160.0}}},
    }
    page = summary({"ceilings": "done in 9 s", "forward": "done in 20 s"}, found)
    assert "| product_bfloat16_tflops | 640 |" in page and "| copy_tbytes | 3.4 |" in page
    assert "| batches: 128: ms | 20.5 |" in page and "| batches: 128: tflops | 160 (25% of the ceiling) |" in page


def bare(tmp_path, root, *words):
    """Run it where only jax, flax, optax, orbax and NumPy are."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out"), "--tiny", *words]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines(), {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("out/*.json")}


@pytest.mark.slow
def test_on_a_bare_machine_parts_run_or_are_skipped_by_name(tmp_path, root):
    said, found = bare(tmp_path, root, "--only", "ceilings,attention,rival,smoke")
    assert [line.partition(" in ")[0] for line in said] == [
        "ceilings: done",
        "attention: done",
        "rival: skipped: torch not installed",
        "smoke: skipped: rasterio, grain, tensorflow_datasets, ml_collections not installed",
    ]
    assert {"product_bfloat16_tflops", "product_float32_tflops", "copy_tbytes"} == set(found["ceilings"])
    assert all(value > 0 for value in found["ceilings"].values())
    for label, figures in found["attention"].items():  # bfloat16
        assert figures["value"] < 0.05 if "difference" in label else {"forward_ms", "both_ms"} == set(figures)


@pytest.mark.long
def test_every_part_of_ours_runs_on_a_bare_machine(tmp_path, root):
    said, found = bare(tmp_path, root, "--minutes", "30", "--only", "forward,step,parity,profile")
    assert [line.partition(" in ")[0] for line in said] == [
        "forward: done",
        "step: done",
        "parity: done",
        "profile: done",
    ]
    for part in ("forward", "step"):
        (timing,) = found[part]["batches"].values()
        assert timing["chips_per_s"] == pytest.approx(2000 / timing["ms"]) and timing["compile_s"] > 0
    errors = {label: figures["rmse"] for label, figures in found["parity"].items() if "Mg/ha" in label}
    exact = [errors[f"float32, {way}, Mg/ha"] for way in ("einsum", "fused")]
    rough = [errors[f"bfloat16, {way}, Mg/ha"] for way in ("einsum", "fused")]
    assert max(exact) < 0.01 < min(rough) < max(rough) < 10
    for shares in found["profile"].values():
        assert sum(shares.values()) == pytest.approx(1) and max(shares.values()) < 1
