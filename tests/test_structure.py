"""The import rules of CONTRIBUTING.md ("Layers"), and how large files, functions and folders may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("biomass_jax", "data_prep", "configs", "benchmarks", "launch", "tests")
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_MODULES_IN_A_FOLDER = 14
MOST_PRODUCT_LINES = 46_000  # of biomass_jax and data_prep; lower it when they shrink, raise it for what users get
# Modules that one other module imports stand for an idea of their own, or belong to that one.
OF_THEIR_OWN = {
    "biomass_jax.convert.torch_file.pickle": "safe against hostile files; read and tested by itself",
    "biomass_jax.convert.torch_file.write": "the other direction of the file formats",
    "biomass_jax.evaluation.uncertainty": "measures of pixels' uncertainty as numbers, without a model or a run",
    "biomass_jax.models.simmim": "the other model",
    "biomass_jax.models.upernet": "the decoder of the literature",
    "biomass_jax.prediction.adapters": "which of several models counts where, whatever predicts",
    "biomass_jax.regional.significance": "which differences are no chance as numbers, without maps or files",
    "biomass_jax.regional.products": "the layouts of maps that others publish, whatever is done with them",
    "biomass_jax.tasks.simmim": "one task a module",
    "biomass_jax.training.loop": "what happens step by step, once a run is set up",
    "data_prep.hls.composite_sums": "the arithmetic of composites, without files",
    "data_prep.prepare.chain": "the order of the steps",
    "data_prep.prepare.steps": "what workers call by name",
    "data_prep.synthetic.height_file": "the layout of GEDI L2A, beside gedi_file for L4A",
    "data_prep.synthetic.ruler.shots": "the labels of the ruler world, beside its images",
}
MOST_OF_THEIR_OWN = 15
NOT_MIRRORED = {"parity", "reliability", "end_to_end", "mutation"}  # about the whole

# From the bottom up: a part may import the parts of the lines above its own, and itself.
LAYERS: tuple[set[str], ...] = (
    {"errors", "version", "configs"},  # of configs, where the files are; they themselves know the settings of all parts
    {"runtime"},
    {"data", "figures"},
    {"models", "trees"},
    {"adapter"},
    {"bundle"},
    {"pipeline", "tasks", "uncertainty"},
    {"convert", "training", "prediction"},
    {"evaluation", "regional", "portable"},
    {"__init__", "main", "cli", "serving", "launch"},
)
BESIDE = {
    ("tasks", "pipeline"),
    ("data", "figures"),
    ("regional", "evaluation"),
    ("cli", "main"),
}  # of one line, and one may know the other
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FREE_OF_JAX = ("biomass_jax/errors", "biomass_jax/data/", "biomass_jax/figures/")
_LIGHT = ("content", "environment", "files", "lock", "progress", "settings", "system")
FREE_OF_JAX += (*(f"biomass_jax/runtime/{name}" for name in _LIGHT), "data_prep/")
FOR_DATA_PREP = ("errors", "data", "figures", *(f"runtime.{name}" for name in _LIGHT))
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
NEVER = {"tensorflow", "clu"}
# By these a program names an axis of the device mesh.
MESH_NAMES = {"Mesh", "make_mesh", "create_device_mesh", "PartitionSpec", "NamedSharding", "shard_map", "pmap"}
MESH_NAMES |= {"psum", "pmean", "all_gather", "axis_index"}
MESH_OWNER = "biomass_jax/runtime/mesh.py"


def sources() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    yield "setup.py", (ROOT / "setup.py").read_text(encoding="utf-8")


def imported(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every imported name in full, with its line: `from a.b import c` is a.b.c."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def part_of(dotted: str) -> str | None:
    """`biomass_jax.data.bands` belongs to `data`; None for the package itself and what isn't a part of it."""
    pieces = dotted.split(".")
    return pieces[1] if pieces[0] == "biomass_jax" and len(pieces) > 1 and pieces[1] in LEVEL else None


def layer_faults(path: str, name: str) -> Iterator[str]:
    top = name.split(".")[0]
    if path.startswith("biomass_jax/"):
        part = path.removeprefix("biomass_jax/").removesuffix(".py").split("/")[0]
        if part not in LEVEL:
            yield f"{part} is no part known to the import rules"
            return
        target = part_of(name)
        if target not in {None, part} and (part, target) not in BESIDE and LEVEL[target] >= LEVEL[part]:
            yield f"{part} must not know {target}"
        if top == "data_prep":
            yield "biomass_jax must not import data_prep"
        if part == "figures" and top not in {"numpy", "matplotlib", "biomass_jax", *sys.stdlib_module_names}:
            yield "figures knows NumPy and matplotlib only"
    given = any(f"{name}.".startswith(f"biomass_jax.{part}.") for part in FOR_DATA_PREP)
    if path.startswith("data_prep/") and top == "biomass_jax" and not given:
        yield f"data_prep takes only {', '.join(FOR_DATA_PREP)} from biomass_jax"
    if path.startswith(FREE_OF_JAX) and top in JAX_FAMILY:
        yield "must not import JAX"


def does_without_torch(path: str, line: int, tree: ast.AST) -> bool:
    """Whether a test skips, or goes on, where torch is not installed; scripts that made fixtures are run by hand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node) == "pytest.importorskip('torch')":
            return True
        if isinstance(node, ast.Try) and node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0):
            return any(ast.unparse(handler.type or node) == "ImportError" for handler in node.handlers)
    return "/fixtures/" in path


def package_faults(path: str, line: int, name: str, tree: ast.AST) -> Iterator[str]:
    top = name.split(".")[0]
    if top in NEVER:
        yield "nothing imports TensorFlow, nor clu, which brings it"
    alone = path.startswith("tests/") and top == "torch" and does_without_torch(path, line, tree)
    if top == "torch" and not path.startswith("benchmarks/") and not alone:
        yield "only benchmarks import torch, and tests that do without it"
    opens_rasters = path.startswith(("biomass_jax/data/raster", "data_prep/", "benchmarks/", "tests/"))
    if top in {"rasterio", "osgeo"} and not opens_rasters:
        yield "only biomass_jax/data/raster and data_prep open rasters"


def command_faults(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if path.startswith("biomass_jax/") and path != "biomass_jax/cli.py":
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"data_prep(\.\w+)+", text):
                yield (
                    node.lineno,
                    f"{text}: only cli.py names a command of data_prep, and imports it when it is asked for",
                )


def mesh_faults(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if not path.startswith("biomass_jax/") or path == MESH_OWNER:
        return
    for node in ast.walk(tree):
        names = {getattr(node, "attr", None), getattr(node, "id", None)}
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        if isinstance(node, ast.keyword) and node.arg == "axis_name" and isinstance(node.value, ast.Constant):
            names = {"axis_name"} if isinstance(node.value.value, str) else set()
        for name in sorted(names & {*MESH_NAMES, "axis_name"} - {None}):
            yield node.lineno, f"only {MESH_OWNER} names mesh axes, not {name} here"


def faults(path: str, source: str) -> list[str]:
    """What is wrong with one file, each as `path:line: imported name: rule`."""
    tree = ast.parse(source)
    found = [(line, f"{name}: {f}") for line, name in imported(path, tree) for f in layer_faults(path, name)]
    for line, name in imported(path, tree):
        found += [(line, f"{name}: {fault}") for fault in package_faults(path, line, name, tree)]
    found += [*command_faults(path, tree), *mesh_faults(path, tree)]
    return [f"{path}:{line}: {fault}" for line, fault in sorted(set(found))]


def too_long(path: str, source: str) -> list[str]:
    found = []
    if (lines := source.count("\n")) > MOST_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {MOST_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MOST_FUNCTION_LINES}")
    return found


def test_imports_go_one_way():
    found = [fault for path, source in sources() for fault in faults(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_files_and_functions_stay_short():
    found = [fault for path, source in sources() for fault in too_long(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_no_module_imports_itself_by_way_of_others():
    assert house.circles(house.imports()) == []


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert house.circles(graph) == [["a", "b", "c"]]
    assert house.circles(graph | {"c": set()}) == []


def test_folders_stay_small():
    assert {folder: n for folder, n in house.modules_in_folders().items() if n > MOST_MODULES_IN_A_FOLDER} == {}


def test_a_module_with_one_importer_has_a_reason():
    assert set(house.single_importers()) == set(OF_THEIR_OWN)
    assert len(OF_THEIR_OWN) <= MOST_OF_THEIR_OWN


def test_public_classes_have_names_of_their_own():
    assert {name: where for name, where in house.classes_by_name().items() if len(where) > 1} == {}


def test_tests_lie_as_the_packages_do():
    """`tests/data/raster/test_image_mask.py` is about a module, or a folder, `image` of `biomass_jax/data/raster`."""
    lost = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        top = folder.parts[0] if folder.parts else "biomass_jax"
        if top not in NOT_MIRRORED:
            source = ROOT / ("" if top in FOLDERS else "biomass_jax") / folder
            about = path.stem.removeprefix("test_")
            names = {other.stem.strip("_") for other in source.iterdir() if other.suffix == ".py" or other.is_dir()}
            if folder.parts and not any(f"{about}_".startswith(f"{name}_") for name in names):
                lost.append(path.relative_to(ROOT).as_posix())
    assert not lost


def test_the_packages_do_not_grow_unseen():
    assert house.product_lines() <= MOST_PRODUCT_LINES


def test_no_score_is_said_to_have_a_floor_of_noise():
    phrase = re.compile("noise[ _-]" + "floor|no model gets " + "below", re.IGNORECASE)
    files = [
        path
        for folder in (*FOLDERS, "docs")
        for kind in ("py", "md", "ipynb")
        for path in (ROOT / folder).rglob(f"*.{kind}")
    ]
    found = {path.relative_to(ROOT).as_posix() for path in files if phrase.search(path.read_text(encoding="utf-8"))}
    assert len(files) > 300
    assert found == {"docs/evaluate.md"}  # which says why there is none


def test_every_folder_is_read():
    read = [path for path, _ in sources()]
    for part in ("biomass_jax/models/swin.py", "data_prep/synthetic/granule.py", "tests/test_structure.py", "setup.py"):
        assert part in read


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("biomass_jax/models/swin.py", "from biomass_jax import bundle", "models must not know bundle"),
        ("biomass_jax/data/raster.py", "from biomass_jax import bundle", "data must not know bundle"),
        ("biomass_jax/data/raster.py", "from .. import bundle", "data must not know bundle"),
        ("biomass_jax/data/raster.py", "from ..models.swin import x", "data must not know models"),
        ("biomass_jax/bundle.py", "import biomass_jax.convert.layouts", "bundle must not know convert"),
        ("biomass_jax/bundle.py", "from biomass_jax.tasks.losses import KINDS", "bundle must not know tasks"),
        ("biomass_jax/prediction/a.py", "from biomass_jax.training.steps import m", "must not know training"),
        ("biomass_jax/evaluation/a.py", "def f():\n    import biomass_jax.main", "must not know main"),
        ("biomass_jax/training/steps.py", "import biomass_jax.evaluation.tables", "must not know evaluation"),
        ("biomass_jax/convert/a.py", "importlib.import_module('biomass_jax.main')", "must not know main"),
        ("biomass_jax/figures.py", "from biomass_jax.data.bands import BANDS", "figures must not know data"),
        ("biomass_jax/figures.py", "import jax.numpy as jnp", "figures knows NumPy and matplotlib only"),
        ("biomass_jax/utils.py", "import os", "no part known"),
        ("biomass_jax/convert/a.py", "import data_prep.gedi", "must not import data_prep"),
        ("biomass_jax/cli.py", "from data_prep import season", "must not import data_prep"),
        ("biomass_jax/convert/a.py", "STEPS = 'data_prep.__main__'", "only cli.py names a command of data_prep"),
        ("biomass_jax/__init__.py", "from biomass_jax import main", "must not know main"),
        ("data_prep/gedi/orbits.py", "from biomass_jax.pipeline.augment import flip", "data_prep takes only"),
        ("data_prep/gedi/orbits.py", "from biomass_jax import load", "data_prep takes only"),
        ("data_prep/gedi/orbits.py", "import jax.numpy as jnp", "must not import JAX"),
        ("biomass_jax/training/writer.py", "from clu import metric_writers", "nor clu"),
        ("tests/test_a.py", "import tensorflow as tf", "nothing imports TensorFlow"),
        ("biomass_jax/convert/a.py", "import torch", "only benchmarks import torch"),
        ("tests/test_a.py", "from torch import nn", "only benchmarks import torch"),
        ("tests/test_a.py", "try:\n    pass\nexcept ImportError:\n    import torch", "only benchmarks import torch"),
        ("tests/test_a.py", "try:\n    import torch\nexcept OSError:\n    pass", "only benchmarks import torch"),
        ("biomass_jax/convert/fixtures/b.py", "import torch", "only benchmarks import torch"),
        ("biomass_jax/prediction/a.py", "import rasterio.windows", "open rasters"),
        ("biomass_jax/pipeline/batches.py", "from osgeo import gdal", "open rasters"),
        ("biomass_jax/training/steps.py", "from jax.sharding import PartitionSpec as P", "not PartitionSpec here"),
        ("biomass_jax/prediction/a.py", "mesh = jax.make_mesh((2,), ('data',))", "not make_mesh here"),
        ("biomass_jax/tasks/losses.py", "total = jax.lax.psum(x, 'data')", "not psum here"),
        ("biomass_jax/models/a.py", "nn.BatchNorm(axis_name='data')", "not axis_name here"),
    ],
)
def test_the_checker_sees_each_kind_of_fault(path, source, rule):
    (fault,) = faults(path, source)
    assert fault.startswith(f"{path}:")
    assert rule in fault


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("biomass_jax/convert/a.py", "from biomass_jax import bundle"),
        ("biomass_jax/evaluation/a.py", "from biomass_jax.prediction.forward import Forward"),
        ("biomass_jax/runtime/mesh.py", "from jax.sharding import PartitionSpec\njax.make_mesh((2,), ('data',))"),
        ("biomass_jax/data/raster/cog.py", "import rasterio"),
        ("biomass_jax/data/records.py", "import tensorflow_datasets as tfds"),
        ("biomass_jax/figures.py", "import math\nfrom matplotlib.figure import Figure"),
        ("biomass_jax/main.py", "from biomass_jax.prediction.predictor import Predictor"),
        ("biomass_jax/cli.py", "STEPS = 'data_prep.__main__'\nimport biomass_jax.main"),
        ("data_prep/synthetic/a.py", "from biomass_jax.data import bands\nfrom data_prep.synthetic.scene import Sun"),
        ("benchmarks/model.py", "import torch"),
        ("tests/test_a.py", 'import pytest\npytest.importorskip("torch")\nfrom torch import nn'),
        ("tests/test_a.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("tests/a/fixtures/make.py", "import torch"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(path, source):
    assert faults(path, source) == []


def test_the_length_check_sees_a_long_function_and_a_long_file():
    body = "    pass\n"
    assert too_long("a.py", "def f():\n" + 59 * body) == []
    assert too_long("a.py", "def f():\n" + 60 * body) == ["a.py:1: f has 61 lines, at most 60"]
    assert too_long("a.py", 500 * "#\n") == []
    assert too_long("a.py", 501 * "#\n") == ["a.py: 501 lines, at most 500"]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_light():
    heavy = {*JAX_FAMILY, *NEVER, "torch", "numpy", "rasterio", "matplotlib", "ml_collections"}
    assert loaded_by("import biomass_jax") & {"biomass_jax", *heavy} == {"biomass_jax"}


def test_the_command_is_light():
    heavy = {*JAX_FAMILY, *NEVER, "torch", "numpy", "rasterio", "matplotlib"}
    assert loaded_by("import biomass_jax.cli") & {"biomass_jax", *heavy, "ml_collections"} == {"biomass_jax"}
    ask = "import contextlib, io\nfrom biomass_jax.cli import main\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    asked = loaded_by(f"{ask}    main(['--help'])\n    try: main(['finetune', '--help'])\n    except SystemExit: pass")
    assert asked & {"biomass_jax", "ml_collections", *heavy} == {"biomass_jax", "ml_collections"}


def test_data_prep_never_brings_jax_in():
    modules = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path, _ in sources()
        if path.startswith("data_prep/") and not path.endswith("__main__.py")
    ]
    assert "data_prep.synthetic.granule" in modules
    loaded = loaded_by("import " + ", ".join(modules))
    assert "data_prep" in loaded
    assert not loaded & {*JAX_FAMILY, *NEVER}


def test_parameters_say_what_they_are():
    """`Any` lets every mistake pass; it is for what really may be anything, or comes from a library without types."""
    functions = [
        node
        for module, tree in house.TREES.items()
        if module.split(".")[0] in house.PRODUCT
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    given = [argument for node in functions for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
    assert (
        sum(argument.annotation is not None and ast.unparse(argument.annotation) == "Any" for argument in given) < 100
    )
