"""A bundle as a function: what has no data, what it says of itself, what it refuses."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.data import bands
from biomass_jax.errors import BiomassError
from biomass_jax.models.build import build_module
from biomass_jax.models.ensemble import join_variables
from biomass_jax.portable.program import Program, of_bundle
from biomass_jax.version import __version__
from tests.portable.conftest import ARCHITECTURE, drawn, image, saved


def program_of_a_band(fill, nodata):
    """A program whose model gives the second band, and looks at neither weights nor fill."""
    model = SimpleNamespace(compute=lambda variables, images, fill: images[..., 1])
    return Program(("A", "B"), "agbd", (), {}, model, {}, np.nan if fill is None else fill, nodata)


@pytest.mark.parametrize(("fill", "nodata"), [(-32768.0, -9999.0), (None, -1.0)])
def test_pixels_without_data_are_those_of_the_rule_on_the_host(fill, nodata):
    numbers = [-32768, -9999, np.nan, np.inf, 0, 7]
    pixels = np.array([(a, b) for a in numbers for b in numbers], np.float32).reshape(1, 4, 9, 2)
    found = np.asarray(program_of_a_band(fill, nodata)(pixels))
    missing = bands.no_data(pixels, fill)
    assert 0 < missing.sum() < missing.size
    np.testing.assert_array_equal(found, np.where(missing, nodata, pixels[..., 1]))


def test_it_says_what_goes_in_and_comes_out(tmp_path, tiny):
    path = tmp_path / "calibrated"
    shutil.copytree(tiny, path)
    meta = json.loads((path / "bundle.json").read_text())
    meta["output"] |= {"bands": ["height", "height_sd"], "nodata": -9999.0}
    meta["input"]["fill"] = -32768
    (path / "bundle.json").write_text(json.dumps(meta))
    program = of_bundle(bundle.load(path), form="onnx", precision="int8")
    assert (program.output, program.left_out) == ("height", ("height_sd",))
    assert program.meta["bundle.json"] == (path / "bundle.json").read_text()
    told = json.loads(program.meta["export.json"])
    assert (told["format"], told["precision"], told["software"]["biomass_jax"]) == ("onnx", "int8", __version__)
    assert told["weights_sha256"] == json.loads(program.meta["bundle.json"])["weights_sha256"]
    assert told["input"]["bands"] == ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1"]
    assert told["input"]["fill"] == -32768
    assert (told["output"]["name"], told["output"]["nodata"]) == ("height", -9999.0)


def test_what_it_cannot_be_made_of(tmp_path, tiny):
    opened = bundle.load(tiny)
    with pytest.raises(BiomassError, match="precision is 'int4'; expected one of float32, bfloat16, int8"):
        of_bundle(opened, form="onnx", precision="int4")
    other = SimpleNamespace(path="p", task="simmim", module=None)
    with pytest.raises(BiomassError, match="p: a bundle of task 'simmim'"):
        of_bundle(other, form="onnx")
    deep = SimpleNamespace(path="p", task="biomass", means=[0], stds=[1], applicability=None)
    deep.module = lambda *more, **given: build_module("biomass", ARCHITECTURE | {"patch_size": 8})
    with pytest.raises(BiomassError, match="p: patches of 8 px and 4 stages don't fit into 32 px"):
        of_bundle(deep, form="onnx")


@pytest.mark.long
def test_an_ensemble_gives_the_mean_of_its_members(tmp_path):
    members = [drawn(build_module("biomass", ARCHITECTURE), seed) for seed in (1, 2)]
    paths = [saved(tmp_path / f"member_{seed}", seed=seed) for seed in (1, 2)]
    meta = bundle.read_meta(paths[0])
    bundle.save(
        tmp_path / "ensemble",
        join_variables(members, shared_encoder=False),
        task="biomass",
        architecture=meta["architecture"] | {"members": 2, "shared_encoder": False},
        **{name: meta[name] for name in ("input", "training", "provenance")},
        output=meta["output"] | {"bands": ["agbd", "agbd_sd"]},
    )
    pixels = image(1, 32, 64)
    found = [
        np.asarray(jax.jit(of_bundle(bundle.load(path), form="stablehlo").__call__)(pixels))
        for path in (*paths, tmp_path / "ensemble")
    ]
    assert found[0].std() > 5 and np.abs(found[0] - found[1]).max() > 5
    np.testing.assert_allclose(found[2], (found[0] + found[1]) / 2, rtol=1e-5, atol=1e-3)
