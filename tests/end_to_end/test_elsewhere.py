"""macOS and Windows, as far as Linux can show: our modules are run without what Linux alone has."""

import ast
import os
import subprocess
import sys

import pytest

from tests.end_to_end.elsewhere import ABSENT_ON_WINDOWS, LINUX_ALONE, OURS, POSIX_ALONE

OWNER = "biomass_jax/runtime/system.py"
GUARDED = {("launch/local.py", "SIGKILL")}  # where there is a Linux libc alone


def names_of_few_systems(source):
    """Every use of a name, or import of a module, that macOS or Windows lacks."""
    few = {name: f"{LINUX_ALONE.get(name, '')} {POSIX_ALONE.get(name, '')}".split() for name in POSIX_ALONE}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in few.get(node.value.id, ()):
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in few.get(node.module, ()))
            yield from {node.module} & {*ABSENT_ON_WINDOWS}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ABSENT_ON_WINDOWS)


def test_one_module_names_what_not_every_system_has(root):
    found = {
        (path.relative_to(root).as_posix(), name)
        for top in OURS
        for path in (root / top).rglob("*.py")
        for name in names_of_few_systems(path.read_text(encoding="utf-8"))
    }
    assert {(path, name) for path, name in found if path != OWNER} == GUARDED


def test_such_names_are_seen():
    source = "import os, fcntl\nfrom signal import SIGUSR1\nos.fork()\nos.replace(1, 2)\nfrom pwd import getpwuid"
    assert sorted(names_of_few_systems(source)) == ["SIGUSR1", "fcntl", "fork", "pwd"]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", pytest.param("darwin", marks=pytest.mark.long)])  # which lacks less
def test_all_modules_and_the_short_path_without_what_linux_alone_has(root, tmp_path, system):
    command = [sys.executable, "-m", "tests.end_to_end.elsewhere", str(tmp_path), system]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("modules, a data set and a map\n")
