"""Metadata, tested versions, citation, and the script that makes the environment."""

import ast
import email
import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import biomass_jax

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {
    "prep",
    "regional",
    "dask",
    "sweep",
    "xarray",
    "hub",
    "portable",
    "bench",
    "docs",
    "site",
    "tools",
    "dev",
    "tpu",
    "cuda",
}
# Imported under another name than the distribution's, where the distribution need not be installed.
OTHER_NAMES = {"absl": "absl-py", "yaml": "pyyaml", "orbax": "orbax-checkpoint", "grain": "grain"}

# Runs setup.py with a stand-in for setuptools, which an environment of Python 3.12 does not have.
READ_SETUP = """
import json, runpy, sys, types
given = {}
stand_in = types.ModuleType("setuptools")
stand_in.find_packages = lambda **_: []
stand_in.setup = given.update
sys.modules["setuptools"] = stand_in
runpy.run_path("setup.py")
print(json.dumps([given["install_requires"], given["extras_require"], given["version"]]))
"""


@pytest.fixture(scope="module")
def declared() -> dict[str | None, list[Requirement]]:
    """Requirements of the core (None) and of each extra, as setup.py states them."""
    done = subprocess.run([sys.executable, "-c", READ_SETUP], cwd=ROOT, capture_output=True, text=True, check=True)
    core, extras, version = yaml.safe_load(done.stdout)
    assert version == biomass_jax.__version__
    return {name: [Requirement(r) for r in reqs] for name, reqs in {None: core, **extras}.items()}


def pinned(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def needed(roots: list[Requirement]) -> set[str]:
    """Names of everything that installing `roots` brings, followed through the installed distributions."""
    seen: set[str] = set()
    todo = [(requirement, "") for requirement in roots]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ["", *sorted(requirement.extras)]:
            if f"{name}[{wanted}]" in seen:
                continue
            seen.add(f"{name}[{wanted}]")
            try:
                further = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # an extra's dependency that is not installed here
                continue
            todo += [(Requirement(text), wanted) for text in further]
    return {name.split("[")[0] for name in seen}


def imports_of(folder: str) -> set[str]:
    """Top-level names imported anywhere under a folder, without the standard library and our own."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"biomass_jax", "data_prep", "configs"}


def test_jax_is_bounded_no_tighter_than_it_has_to_be(declared):
    (jax,) = [r for r in declared[None] if r.name == "jax"]
    allowed = [v for v in ("0.9.2", "0.10.2", "0.11.0", "0.12.0", "0.12.9", "0.13.0") if jax.specifier.contains(v)]
    assert allowed == ["0.10.2", "0.11.0", "0.12.0", "0.12.9"]
    others = [r for r in declared[None] if r.name != "jax" and "<" in str(r.specifier)]
    assert not others, "only JAX has an upper bound"


def test_extras(declared):
    assert set(declared) == {None, *EXTRAS}
    parts = [str(r) for part in ("prep", "regional", "sweep", "xarray", "docs", "tools") for r in declared[part]]
    assert sorted(str(r) for r in declared["dev"]) == sorted(parts)
    assert [str(r) for r in declared["bench"]] == ["torch==2.13.0", "rioxarray>=0.19"]


def test_neither_tensorflow_nor_torch_is_needed(declared):
    roots = [r for extra in (None, "dev", "dask", "hub") for r in declared[extra]]
    names = needed(roots)
    assert {"jax", "jaxlib", "numpy", "tensorflow-datasets", "tensorstore"} <= names  # it does follow
    assert not {n for n in names if re.fullmatch(r"tensorflow(-cpu|-gpu|-intel)?|tf-nightly.*|clu|torch.*|keras", n)}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("biomass_jax", ["hub", "portable", "prep", "regional", "xarray"]), ("data_prep", ["prep", "dask"])],
)
def test_whatever_is_imported_is_declared(declared, folder, extras):
    names = {canonicalize_name(r.name) for extra in [None, *extras] for r in declared[extra]}
    owners = metadata.packages_distributions()
    for top in imports_of(folder):
        candidates = {OTHER_NAMES.get(top, top), *owners.get(top, [])}
        known = names & {canonicalize_name(c) for c in candidates}
        assert known, f"{folder} imports {top}, which setup.py does not list"


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("py*.txt")), ids=lambda path: path.stem)
def test_tested_versions_satisfy_every_floor(declared, path):
    pins = pinned(path)
    for requirement in [*declared[None], *declared["dev"], *declared["dask"]]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{path.name} does not pin {name}"
        assert requirement.specifier.contains(pins[name]), f"{path.name}: {name} {pins[name]} against {requirement}"


def test_the_versions_run_together_on_python_3_11_are_pinned():
    pins = pinned(ROOT / "constraints" / "py3.11.txt")
    expected = {
        "jax": "0.10.2",
        "flax": "0.12.8",
        "optax": "0.2.8",
        "orbax-checkpoint": "0.12.8",
        "grain": "0.2.18",
        "array-record": "0.8.6",
        "tensorflow-datasets": "4.9.10",
        "ml-collections": "1.1.0",
        "rasterio": "1.4.4",
    }
    assert expected.items() <= pins.items()
    assert pins["numpy"].startswith("2.4.")


def test_citation_names_the_software_the_papers_and_the_data():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", biomass_jax.__version__)
    assert {r["doi"] for r in citation["references"]} == {
        "10.48550/arXiv.2406.19888",
        "10.48550/arXiv.2310.18660",
        "10.5067/HLS/HLSL30.002",
        "10.5067/HLS/HLSS30.002",
        "10.3334/ORNLDAAC/2056",
    }
    assert all(r["authors"] and r["title"] and r["type"] in {"article", "data"} for r in citation["references"])


# A Python that tells its version, makes environments and "installs" by writing a line; it breaks where a file says so.
FAKE_PYTHON = """#!/usr/bin/env bash
set -eu
here={here}
case "$1 ${{2:-}}" in
    "-m venv") echo "venv $3" >> $here/log; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") echo "pip ${{*:3}}" >> $here/log; [ ! -e $here/break ] || exit 1 ;;
    *) exec {real} -c "import sys; sys.version_info = {version} + sys.version_info[2:]; $2" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what setting up reads, with pretended interpreters `new`, `newer` and `old`."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", ".ci", "constraints"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for name, version in {"new": (3, 11), "newer": (3, 99), "old": (3, 10)}.items():
        path = tmp_path / name
        path.write_text(FAKE_PYTHON.format(here=tmp_path, real=sys.executable, version=version))
        path.chmod(0o755)
    return folder


def make(checkout: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run make in the copy; return its result and what the pretended interpreters were told to do."""
    log = checkout.parent / "log"
    log.write_text("")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    command = ["make", *(a.replace("@", f"{checkout.parent}/") for a in arguments)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
    return done, log.read_text().splitlines()


def test_make_installs_once_and_again_only_when_something_changed(checkout):
    done, log = make(checkout, "setup", "PYTHON=@new")
    assert done.returncode == 0, done.stderr
    assert log[0] == "venv .venv"
    assert len(log) == 2
    assert "--constraint constraints/py3.11.txt --editable .[prep,regional,dask,xarray,sweep,docs,tools]" in log[1]
    for arguments in (["setup", "PYTHON=@new"], ["setup"]):
        done, log = make(checkout, *arguments)
        assert (done.returncode, log) == (0, []), done.stderr
    os.utime(checkout / "setup.py")
    _, log = make(checkout, "setup", "PYTHON=@new")
    assert [line.split()[0] for line in log] == ["pip"]


def test_make_redoes_an_installation_that_was_cut_short(checkout):
    (checkout.parent / "break").touch()
    done, log = make(checkout, "setup", "PYTHON=@new")
    assert done.returncode != 0
    assert [line.split()[0] for line in log] == ["venv", "pip"]
    (checkout.parent / "break").unlink()
    done, log = make(checkout, "setup", "PYTHON=@new")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in log] == ["venv", "pip"]


def test_make_takes_another_python_when_told(checkout):
    make(checkout, "setup", "PYTHON=@new")
    done, log = make(checkout, "setup", "PYTHON=@newer")
    assert [line.split()[0] for line in log] == ["venv", "pip"]
    assert "constraint" not in log[1]
    assert "No tested set of versions for Python 3.99" in done.stdout


@pytest.mark.parametrize(("python", "message"), [("@old", "is Python 3.10"), ("@none", "cannot run")])
def test_make_says_what_is_wrong_with_the_python(checkout, python, message):
    done, log = make(checkout, "setup", f"PYTHON={python}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "make test PYTHON=python3.12" in done.stderr
    assert log == []
    assert not (checkout / ".venv").exists()


def test_make_alone_lists_the_targets(checkout):
    done, _ = make(checkout)
    for target in ("demo", "test", "test-slow", "mutate", "check", "bench", "clean"):
        assert re.search(rf"^  {target} +\w", done.stdout, re.M), done.stdout


def test_documents_link_to_files_that_are_there():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_documents_name_no_flag_that_is_not_there():
    from biomass_jax import cli

    flags = {flag for name in ("convert", *cli.RUNS) for flag in cli._options(name)} | {"--help", "--version"}
    for name in ("README.md", "docs/convert.md", "docs/install.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", re.sub(r"--config\.\S+", "", text)))
        assert used - {"--config"} and used <= flags, used - flags


def programs() -> list[str]:
    """Every module of the packages, and of the folders that the wheel puts inside of biomass_jax."""
    found = []
    for folder in ("biomass_jax", "data_prep", "configs", "launch"):
        inside = "biomass_jax/" if folder in ("configs", "launch") else ""
        found += [inside + path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git knows, without the network."""
    setuptools = pytest.importorskip("setuptools")
    if tuple(int(part) for part in setuptools.__version__.split(".")[:2]) < (70, 1):
        pytest.skip(f"setuptools {setuptools.__version__} can't build a wheel by itself, 70.1 can: make setup")
    copy = tmp_path_factory.mktemp("source")
    for name in (*("biomass_jax", "data_prep", "configs", "launch"), "tests/golden/ckpt_micro_cli"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(copy / "dist"), str(copy)], check=True, timeout=300)
    (made,) = (copy / "dist").glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_all_that_is_used_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        about = f"biomass_jax-{biomass_jax.__version__}.dist-info"
        told = email.message_from_bytes(file.read(f"{about}/METADATA"))
        scripts = file.read(f"{about}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"biomass_jax", "data_prep", about}
    others = {"biomass_jax/launch/checkpoint/state_dict.ckpt", "biomass_jax/py.typed", "data_prep/py.typed"}
    assert {name for name in names if not name.startswith(about)} == {*programs(), *others}
    assert (told["Name"], told["Version"]) == ("biomass-jax", biomass_jax.__version__)
    assert "Apache-2.0" in (told["License"], told["License-Expression"])
    assert (told["Requires-Python"], told["Description-Content-Type"]) == (">=3.11", "text/markdown")
    assert told.get_payload().startswith("# biomass_jax")
    assert set(told.get_all("Provides-Extra")) == EXTRAS
    assert len(told.get_all("Project-URL")) == 2
    assert scripts.split() == ["[console_scripts]", "biomass-jax", "=", "biomass_jax.cli:main"]


@pytest.mark.slow
def test_what_the_wheel_installs_works_in_an_empty_folder(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}

    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    command = str(site / "bin" / "biomass-jax")
    ask = "import biomass_jax, data_prep; from biomass_jax.launch import demo; print(demo.CHECKPOINT.stat().st_size)"
    code, said = run("-c", f"{ask}; print(biomass_jax.__file__, data_prep.__file__, sep='\\n')")
    assert (code, said.splitlines()[1:]) == (0, [f"{site / p / '__init__.py'}" for p in ("biomass_jax", "data_prep")])
    assert said.startswith("744773\n")
    assert run(command, "--version") == (0, f"biomass-jax {biomass_jax.__version__}\n")
    code, said = run(command, "--help")
    assert (code, "  composite " in said) == (0, True)
    code, said = run(command, "predict", "--help")
    assert (code, said.startswith("usage: biomass-jax predict --workdir DIR [options]\n")) == (0, True)
    assert "biomass-jax predict --bundle granite --inputs scene.tif" in said
    code, said = run("-m", "biomass_jax.main", "--config", "predict", "--workdir", "w")
    assert (code, "config.bundle is not given; add --config.bundle=PATH" in said) == (1, True), said
    (here / "mine.py").write_text(
        "from biomass_jax.configs import demo_finetune\n\ndef get_config():\n"
        "    config = demo_finetune.get_config().unlock()\n    config.epochs = 3\n    return config.lock()\n"
    )
    code, said = run(command, "finetune", "--config", "mine.py", "--workdir", "run", "--data.path", "nowhere")
    assert (code, "nowhere" in said, "Traceback" in said) == (1, True, False), said
    assert not (here / "run" / "config.json").exists()  # of a run that hasn't begun
    code, said = run("-m", "data_prep", "prepare", "--out", "data")
    assert (code, "season is not set" in said) == (1, True), said
    code, said = run(command, "sweep", "--config", "demo_finetune", "--space", "finetune", "--workdir", "sweep")
    assert (code, "--trials is needed" in said) == (1, True), said
