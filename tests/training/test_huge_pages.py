"""A training run asks glibc for huge pages by starting itself anew; nothing else does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from biomass_jax.runtime import huge_pages

ROOT = Path(__file__).parents[2]
ASKED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """A system that gives huge pages of 2 MiB to who asks."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    return tmp_path


def test_glibc_is_told_to_ask(linux, monkeypatch):
    assert huge_pages.environment(linux) == ASKED
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert huge_pages.environment(linux) == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("tunables", ["glibc.malloc.hugetlb=0", "glibc.malloc.check=1:glibc.malloc.hugetlb=2"])
def test_what_the_user_says_holds(linux, monkeypatch, tunables):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert huge_pages.environment(linux) == {}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("enabled", "[always] madvise never\n"),
        ("enabled", "always madvise [never]\n"),
        ("hpage_pmd_size", "536870912\n"),
        ("hpage_pmd_size", "?\n"),
    ],
)
def test_nothing_is_asked_of_a_system_where_it_has_no_use(linux, file, text):
    (linux / file).write_text(text)
    assert huge_pages.environment(linux) == {}
    (linux / file).unlink()
    assert huge_pages.environment(linux) == {}


@pytest.mark.parametrize(
    ("command", "again"),
    [
        (["python", "-m", "biomass_jax.main", "--config", "c.py"], True),
        (["python", "-u", "-X", "dev", "-m", "biomass_jax.main", "--config", "c.py"], True),
        (["python", "-m", "pdb", "-m", "biomass_jax.main", "--config", "c.py"], False),
        (["python", "-m", "pytest", "--config", "c.py"], False),
        (["python", "script.py", "--config", "c.py"], False),
    ],
)
def test_only_the_program_itself_is_started_anew(monkeypatch, command, again):
    calls = []
    monkeypatch.setattr(huge_pages, "environment", lambda: ASKED)
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py", "--config", "c.py"])
    huge_pages.start_anew()
    assert calls == ([(sys.executable, [sys.executable, *command[1:]], os.environ | ASKED)] if again else [])


def test_a_run_goes_on_where_it_cannot_be_started_anew(monkeypatch):
    refused = []

    def refuse(program, *_):
        refused.append(program)
        raise OSError("no")

    monkeypatch.setattr(huge_pages, "environment", lambda: ASKED)
    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "biomass_jax.main"])
    monkeypatch.setattr(sys, "argv", ["main.py"])
    huge_pages.start_anew()
    assert refused == [sys.executable]


@pytest.mark.parametrize(
    ("config", "fields", "starts"),
    [
        ("finetune_all_biomes.py", {"data.path": "missing"}, ["None", ASKED["GLIBC_TUNABLES"]]),
        ("predict.py", {"bundle": "missing", "inputs": "missing.tif"}, ["None"]),
    ],
)
def test_the_command_trains_with_huge_pages(tmp_path, monkeypatch, config, fields, starts):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if not huge_pages.environment():
        pytest.skip("this system gives huge pages to all or to none")
    notes = tmp_path / "starts.txt"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nopen({str(notes)!r}, 'a').write(f\"{{os.environ.get('GLIBC_TUNABLES')}} {{os.getpid()}}\\n\")\n"
    )
    program = ["-m", "biomass_jax.main", "--config", str(ROOT / "configs" / config), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *program, *(f"--config.{name}={tmp_path / value}" for name, value in fields.items())],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "missing" in done.stderr
    found = [line.split() for line in notes.read_text().splitlines()]
    assert [setting for setting, _ in found] == starts
    assert len({pid for _, pid in found}) == 1
