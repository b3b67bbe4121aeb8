"""The docs: each command is one that its program understands, the quick ones run; each quoted error exists."""

import argparse
import ast
import contextlib
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
import shapely
from absl import flags
from ml_collections import config_flags

from biomass_jax import cli
from biomass_jax import main as runner
from biomass_jax.runtime.settings import find_config
from tests.data_prep.archive_gate import open_archive, stand_in

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "launch/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
OURS = ("make", "pip", "biomass-jax", "python")
# Of other programs, or for clusters: tests/end_to_end/test_launch_scripts.py runs our scripts.
OTHERS = ("python3", "source", "sbatch", "srun", "kubectl", "gcloud", "gsutil", "cd", ".ci/run", "dask", "tensorboard")
MADE_BY_RUNS = {"OUT/best_config.py": "finetune_all_biomes"}  # a sweep writes it


def commands(page):
    """The shell commands of a page, as word lists; `...` stands for the one before it in its block."""
    found, before = [], []
    for block in re.findall(r"(?m)((?:^    \S.*\n)+(?:^ {5,}\S.*\n|^    \S.*\n)*)", (ROOT / page).read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(re.sub(r"(^|\s)#.*", "", line))
            except ValueError:  # a piece of text, no command
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] == ["..."]:
                words = [*before, *words[1:]]
            elif words and words[0] in OURS:
                before = [word for word in words if not word.startswith("--data.path") and "datasets/" not in word]
            if words and (words[0] in (*OURS, *OTHERS) or words[0].startswith("launch/")):
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


ALL = sorted({(page, shlex.join(words)) for page in PAGES for words in commands(page)})


class Understood(Exception):
    """A parser has read its command line."""


@contextlib.contextmanager
def read_only():
    """Command lines are read, and what they ask for isn't done."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *arguments):
        found = parse(self, *arguments)
        if self.add_help and "{hls" not in self.format_usage():  # else more is read behind it
            raise Understood
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        yield patch


def check_run(arguments):
    """Arguments of `biomass_jax.main`: the config is there, and has the fields."""
    given = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    path = find_config(MADE_BY_RUNS.get(given[0], given[0]))
    values = flags.FlagValues()
    config = runpy.run_path(str(path))["get_config"]()
    words = ["main", *(word for word in arguments if not word.startswith("--config="))]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    for name in ("workdir", "coordinator", "process_count", "process_id"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(words)
    assert values["workdir"].value and config.mode in runner.MODES


def check_python(module, arguments):
    if module == "biomass_jax.main":
        joined = re.sub(r"--(config|workdir) ", r"--\1=", " ".join(arguments))
        check_run(joined.split())
        return
    if module == "launch.sweep":
        pytest.importorskip("optuna")
    name = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
    with read_only() as patch, pytest.raises(Understood):
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, name, raising=False)
        runpy.run_module(name, run_name="__main__")


def check_ours(words):
    """`biomass-jax`; a run's fields are looked up in its config."""
    command = words[0] if words else ""
    if command == "completion" or command.startswith("--"):
        assert cli.main(words) == 0
    elif command in cli.RUNS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "cli", check_run)
            cli.main(words)
    else:
        if command == "sweep":
            pytest.importorskip("optuna")
        with read_only(), pytest.raises(Understood):
            cli.main(words)


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_of_the_docs_is_understood(page, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"(?m)^([a-z-]+):.*## ", Path("Makefile").read_text())
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "pip":
        extras = set(re.findall(r'(?m)^        "(\w+)": ', Path("setup.py").read_text()))
        assert words[0] == "install" and set(re.findall(r"\w+", re.search(r"\[(.*)]", command)[1])) <= extras
    elif program == "biomass-jax":
        check_ours(words)
    elif program == "python":
        assert words[0] == "-m"
        check_python(words[1], words[2:])
    elif program.startswith("launch/"):
        assert os.access(program, os.X_OK)
        subprocess.run(["bash", "-n", program], check=True)
    for word in re.findall(r"(?:launch|configs)/[\w./]+\.\w+", command):
        assert Path(word).is_file()


def test_the_docs_have_commands():
    """What finds them would otherwise be free to find none."""
    assert len(ALL) > 60 and {shlex.split(command)[0] for _, command in ALL} >= set(OURS)


def texts():
    """Every text of the programs, with a NUL where a value is put in."""
    for folder in ("biomass_jax", "data_prep", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_errors_of_the_troubleshooting_page_are_those_of_the_programs():
    quoted = re.findall(r"(?m)^\| `(.+?)` \| ", (ROOT / "docs/troubleshooting.md").read_text())
    said = list(texts())
    unknown = [
        message
        for message in quoted
        if not any(all(part.strip() in text for part in message.split("...")) for text in said)
    ]
    assert len(quoted) > 50 and unknown == []


def run_adapters(run, folder):
    """The commands of docs/adapt.md: trained for two steps, mapped, scored, merged, and by polygon."""
    geopandas = pytest.importorskip("geopandas")
    with rasterio.open(folder / "scene.tif") as scene:
        left, bottom, right, top = scene.bounds
        west = shapely.box(left, bottom, (left + right) / 2, top)
        table = {"adapter": ["run/best"], "geometry": [west]}
        geopandas.GeoDataFrame(table, geometry="geometry", crs=scene.crs.to_wkt()).to_file(folder / "biomes.gpkg")
    short = ["--batch-size", "2", "--config.steps=2", "--config.log_every=1"]
    for words in commands("docs/adapt.md"):
        if words[0] != "biomass-jax":  # the benchmark
            continue
        given = ["data/shards" if word == "shards" else word for word in words]
        run(*given, *(short if words[1] == "finetune" else []))


@pytest.mark.slow
def test_commands_of_the_pages_run_as_they_stand(tmp_path, root):
    """From the archive to shards by the steps of docs/data.md, then a model converted both ways, maps, scores."""
    checkpoint = root / "tests" / "golden" / "ckpt_micro_cli" / "state_dict.ckpt"
    shutil.copy(checkpoint, tmp_path / "biomass_model.ckpt")
    environment = {**os.environ, "PYTHONPATH": str(root), "MPLBACKEND": "Agg"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(root / ".cache" / "jax-tests")

    def run(*words):
        line = [sys.executable, "-m", *(["biomass_jax.cli", *words[1:]] if words[0] == "biomass-jax" else words[2:])]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run("biomass-jax", "synthetic", "--world", "forest", "--out", "made", "--size", "672x448")
    for granule in (tmp_path / "made/granules/hls").iterdir():
        granule.rename(tmp_path / "made" / granule.name)
    for orbit in (tmp_path / "made/granules/gedi").iterdir():
        (tmp_path / "made" / orbit.stem).mkdir()
        orbit.rename(tmp_path / "made" / orbit.stem / orbit.name)
    with open_archive(tmp_path / "made") as archive:
        environment |= stand_in(archive, tmp_path / "library", root)
        for words in commands("docs/data.md"):
            if words[1] == "prepare":  # all steps in one, as in the demo
                continue
            # Blocks as small as this piece of a tile asks for, without a buffer, and each pixel of its five scenes.
            smaller = {"splits": ["--block-km", "5", "--buffer-m", "0"], "composite": ["--min-clear", "1"]}
            said = run(*words, *smaller.get(words[1], []))
            if words[1] in ("download", "stream"):
                assert "10SFF" in said or "GEDI04_A" in said, said
        assert len(archive.asked) > 30  # files in pieces, by stream; whole ones don't count
        (convert, back), (predict,) = commands("docs/convert.md")[:2], commands("docs/maps.md")[:1]
        at = convert.index("--config")
        run(*convert[:at], *convert[at + 2 :], "--statistics", "granite")  # this checkpoint has no config.yaml
        run(*back)
        (from_archive,) = [words for words in commands("docs/install.md") if "--tile" in words]
        run(*from_archive)
    (scene,) = (tmp_path / "data" / "composites").glob("*/*.tif")
    shutil.copy(scene, tmp_path / "scene.tif")
    run(*predict)
    scores = commands("docs/evaluate.md")[0]
    run(*("data/shards" if "datasets/" in word else word for word in scores))
    run_adapters(run, tmp_path)
    made = ("data/chips/chips.parquet", "data/shards/dataset_info.json", "model.ckpt", "granite/bundle.json")
    made += ("merged/bundle.json", "maps_run/scene_agbd.tif", "maps_biomes/scene_agbd.tif", "scores_run/metrics.json")
    made += ("maps/scene_agbd.tif", "maps/scene_agbd_quicklook.png", "scores/metrics.json")
    made += ("data/granules/gedi", "maps/10SFF_2020-05-01_2020-10-01_agbd.tif")
    assert [name for name in made if not (tmp_path / name).exists()] == []
