"""The house as numbers, read from the sources: which module imports which, how many lines, which classes."""

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("biomass_jax", "data_prep")
FOLDERS = (*PRODUCT, "configs", "benchmarks", "launch")


def dotted(path: Path) -> str:
    """`biomass_jax/data/bands.py` -> `biomass_jax.data.bands`; a package is its folder's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@functools.cache
def names_used(module: str) -> tuple[str, ...]:
    """Every name that a module imports, in full."""
    return tuple(_names_used(module))


def _names_used(module: str) -> Iterator[str]:
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def named_in_tables(module: str) -> Iterator[str]:
    """Modules that a table of commands names in its strings."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            yield node.value


def module_of(name: str) -> str | None:
    """The module that a name belongs to; None where it isn't ours."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def through_faces(module: str) -> Iterator[str]:
    """Modules whose names are taken from a package that passes them on: `figures.quicklook` is of `figures.maps`."""
    faces = {}
    for name in names_used(module):
        found = module_of(name)
        if found and found != module and MODULES[found].name == "__init__.py":
            passed = {full.rpartition(".")[2]: module_of(full) for full in names_used(found)}
            faces[name.rpartition(".")[2]] = passed
            if name != found and name.rpartition(".")[2] in passed:
                yield passed[name.rpartition(".")[2]] or found
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            origin = faces.get(node.value.id, {}).get(node.attr)
            if origin:
                yield origin


def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, at the top or inside functions."""
    found = {module: {module_of(name) for name in names_used(module)} for module in MODULES}
    return {module: {name for name in names if name and name != module} for module, names in found.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, straight or by way of others (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def single_importers() -> dict[str, str]:
    """Modules of the packages that one other module imports -> that one.

    Left out is what has a single importer by nature: packages, commands, and what a door opens, which is a table of
    commands or a config file. A package that passes names on is no user of them; who takes them from it is.
    """
    users = defaultdict(set)
    for module, others in imports().items():
        for other in {*others, *through_faces(module), *named_in_tables(module)} - {module}:
            users[other].add(module)
    single = {}
    for module, path in MODULES.items():
        whose = {user for user in users[module] if MODULES[user].name != "__init__.py"}
        inside = module.split(".")[0] in PRODUCT and path.name not in ("__init__.py", "__main__.py")
        if inside and len(whose) == 1 and not any(map(is_door, whose)):
            (single[module],) = whose
    return single


def is_door(module: str) -> bool:
    """Whether a module is a table of commands or a config."""
    return (
        module in ("biomass_jax.main", "biomass_jax.cli")
        or module.endswith(".__main__")
        or module.startswith("configs.")
    )


def modules_in_folders() -> dict[str, int]:
    """Folder -> modules in it, `__init__.py` left out."""
    found: dict[str, int] = defaultdict(int)
    for path in MODULES.values():
        found[path.parent.relative_to(ROOT).as_posix()] += path.name != "__init__.py"
    return dict(found)


def classes_by_name() -> dict[str, list[str]]:
    """Public class -> the modules of the packages, benchmarks and launch that define one of that name."""
    found = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module)
    return dict(found)


def product_lines() -> int:
    """Lines of the two packages."""
    return sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for module, path in MODULES.items()
        if module.split(".")[0] in PRODUCT
    )


if __name__ == "__main__":
    for module, user in single_importers().items():
        print(module, "<-", user)
    print(len(single_importers()), "single;", circles(imports()), max(modules_in_folders().values()), product_lines())
