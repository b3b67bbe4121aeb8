"""docs/getting_started.ipynb runs from end to end on a small forest, and what its readers paste fits the configs.

It is committed without outputs: they would go stale with the code, and here they are made anew.
"""

import json
import re
import runpy

import numpy as np
import pytest
import rasterio

from biomass_jax.main import ROOT
from launch import demo

NOTEBOOK = ROOT / "docs" / "getting_started.ipynb"
SETTINGS = {"DATA", "MODEL", "OUT", "IMAGE", "ONE_BIOME", "FEW_SHOT"}
EXPERIMENTS = ("zero_shot_all", "zero_shot_one", "few_shot_one")
MIB = 2**20  # bytes
LAST_CELL = """
import resource
import psutil  # comes with ipykernel
largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the processes that it started
print(psutil.Process().memory_info().rss, largest, "jax" in sys.modules)
"""


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def parameters():
    (cell,) = [cell for cell in cells("code") if "parameters" in cell["metadata"].get("tags", ())]
    return "".join(cell["source"])


def published():
    """What readers put in place of the parameters."""
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return block


def settings(source):
    values = {}
    exec(source, values)
    return {name: value for name, value in values.items() if name.isupper()}


def test_it_is_committed_without_outputs():
    assert cells("code")
    for cell in cells("code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("block", [parameters, published])
def test_what_readers_set_are_fields_of_the_configs(block):
    values = settings(block())
    assert set(values) == SETTINGS
    config, *few_shot = values["FEW_SHOT"]
    for path, given in (("configs/evaluate.py", values["ONE_BIOME"]), (config, few_shot)):
        known = runpy.run_path(str(ROOT / path))["get_config"]().unlock()
        assert any(field.startswith("--config.data.path=") for field in given)
        for field in given:
            name = re.fullmatch(r"--config\.([\w.]+)=.+", field)[1]
            group = known
            *groups, last = name.split(".")
            for part in groups:
                group = group[part]
            assert last in group, field


def test_the_demo_makes_what_it_starts_from(tmp_path):
    values = settings(parameters())
    commands = " ".join(word for _, command in demo.stages("demo_out") for word in command)
    assert f"--config.data.path={values['DATA']} " in commands
    assert f"--config.bundle={values['MODEL']} " in commands
    assert f"--config.inputs={values['IMAGE']}/{demo.TILE} " in commands


def untrained(path):
    """A bundle of the demo's architecture with fresh weights: training finds much to improve."""
    import jax

    from biomass_jax import bundle
    from biomass_jax.data.bands import BAND_NAMES, UNITS
    from biomass_jax.models.biomass import BiomassModel
    from biomass_jax.models.build import architecture_of, dummy_inputs

    fields = runpy.run_path(str(ROOT / "configs" / "demo_finetune.py"))["get_config"]().model.to_dict()
    module = BiomassModel(**{name: value for name, value in fields.items() if value is not None and name != "variant"})
    return bundle.save(
        path,
        jax.jit(module.init)(jax.random.key(0), *dummy_inputs(module)),
        task="biomass",
        architecture=architecture_of(module),
        input={
            "bands": list(BAND_NAMES),
            "units": UNITS,
            "fill": -9999,
            "sensors": ["L30"],
            "means": [334, 591, 503, 2885, 1715, 955],  # about what the forest has
            "stds": [70, 96, 128, 136, 231, 215],
        },
        output={"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1},
        training={},
        provenance={"source": "untrained"},
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Folder like the demo's, and the notebook with its outputs, run on it."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook is run with the extra docs")
    nbclient = pytest.importorskip("nbclient", reason="the notebook is run with the extra docs")
    pytest.importorskip("ipykernel", reason="the notebook is run with the extra docs")
    from data_prep.prepare import run as prepare
    from data_prep.synthetic.forest.world import write_forest_world

    out = tmp_path_factory.mktemp("demo")
    write_forest_world(out, shape=(460, 700))
    smaller = ["--config.season=2020", "--config.chips.size=112", "--config.splits.block_km=3.5"]
    smaller += ["--config.splits.buffer_m=0", "--config.splits.fractions=(0.6, 0.2, 0.2)"]  # test chips in both halves
    smaller += ["--config.composite.min_clear=1"]  # as the demo does
    assert prepare.main(["--config", str(ROOT / "configs/prepare.py"), "--out", str(out), *smaller]) == 0
    untrained(out / "finetune" / "best")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (cell,) = [cell for cell in notebook.cells if cell.source == parameters()]
    cell.source = cell.source.replace('"demo_out/', f'"{out}/')
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_CELL))
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    return out, {cell["id"]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}, notebook


@pytest.mark.long
def test_three_experiments_give_scores(executed):
    out, outputs, _ = executed
    (shown,) = outputs["few-scores"]
    assert re.findall(r"^((?:zero|few)-shot, \w+ \w+) ", shown.data["text/plain"], re.M) == [
        "zero-shot, all biomes",
        "zero-shot, one biome",
        "few-shot, one biome",
    ]
    found = {name: json.loads((out / "notebook" / name / "metrics.json").read_text()) for name in EXPERIMENTS}
    for name, scores in found.items():
        (row,) = [row for row in scores["tables"] if (row["table"], row["group"]) == ("label_bin", "0-300")]
        assert f"{row['rmse']:.2f}".rstrip("0") in shown.data["text/plain"], name
    everywhere, west, trained = (found[name] for name in EXPERIMENTS)
    assert 0 < west["n"] == trained["n"] < everywhere["n"]
    assert trained["rmse"] < west["rmse"]
    for name in ("scores.csv", "binwise_rmse.csv", "density_scatter.png"):
        assert (out / "notebook" / "few_shot_one" / name).stat().st_size


@pytest.mark.long
def test_pictures_and_a_map_appear(executed):
    out, outputs, _ = executed
    for cell, count in {"all-pictures": 2, "few-curves": 1, "map-picture": 1}.items():
        assert [set(output.data) >= {"image/png"} for output in outputs[cell]] == [True] * count, cell
    (path,) = (out / "notebook" / "maps").rglob("*_agbd.tif")
    (source,) = (out / "composites").rglob("*.tif")
    with rasterio.open(path) as made, rasterio.open(source) as image:
        assert (made.shape, made.transform, made.crs) == (image.shape, image.transform, image.crs)
        assert np.ptp(made.read(1, masked=True)) > 0


@pytest.mark.long
def test_memory_stays_small(executed):
    *_, notebook = executed
    own, largest, has_jax = notebook.cells[-1].outputs[0].text.split()
    assert has_jax == "False"  # it would take the accelerator from the commands
    assert int(own) < 600 * MIB
    assert int(largest) < 2000 * MIB
