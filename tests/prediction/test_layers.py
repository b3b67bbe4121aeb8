import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio

from biomass_jax import bundle as bundles
from biomass_jax.data import bands
from biomass_jax.errors import PredictionError
from biomass_jax.models.build import architecture_of, build_module
from biomass_jax.prediction.layers import Layers
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.uncertainty.applicability import Applicability
from biomass_jax.uncertainty.calibration import Calibration, CalibrationGroup
from tests.prediction.stubs import nir, stub_bundle, write_raster

FIELDS = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "patch_size": 8,  # the second stage's cells are 16 px
    "decoder_channels": 4,
    "pool_scales": [1, 2],
    "upscale_layers": 3,
    "head_dropout": 0.3,
    "spread": "gaussian",
    "output_scale": 20.0,
    "output_offset": 80.0,
}
CALIBRATION = Calibration(
    kind="sd",
    level=0.8,
    seed=3,
    variance=(4.0, 0.25, 0.01),
    least_sd=2.0,
    groups=(CalibrationGroup("", None, None, 1.5, 30, 900), CalibrationGroup("taiga", None, None, 2.5, 20, 500)),
)
SPREAD = {"way": "model"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bundle with a spread that isn't calibrated."""
    rng = np.random.default_rng(0)
    module = build_module("biomass", FIELDS)
    shapes = bundles.abstract_variables(module)

    def drawn(path, leaf):
        kept = (
            np.abs(rng.normal(0.3, 0.2, leaf.shape)) if "batch_stats" in str(path) else rng.normal(0, 0.3, leaf.shape)
        )
        return kept.astype(leaf.dtype)

    import jax

    path = tmp_path_factory.mktemp("bundles") / "plain"
    return bundles.load(
        bundles.save(
            path,
            jax.tree_util.tree_map_with_path(drawn, shapes),
            task="biomass",
            architecture=architecture_of(module),
            input={
                "bands": list(bands.BAND_NAMES),
                "units": bands.UNITS,
                "fill": -9999,
                "means": [1000.0 + 100 * band for band in range(6)],
                "stds": [300.0 + 10 * band for band in range(6)],
                "sensors": ["L30"],
                "no_data_rule": bands.NO_DATA_RULE,
                "pixel_size": 30.0,
            },
            output={"bands": ["agbd", "agbd_sd"], "units": "Mg ha-1", "nodata": -1},
            training={},
            provenance={"source": "random", "sha256": None, "command": "", "versions": {}},
        )
    )


@pytest.fixture(scope="module")
def calibrated(plain):
    rng = np.random.default_rng(1)
    area = Applicability(
        centres=rng.normal(size=(7, 16)).astype(np.float32),
        mean=rng.normal(size=16).astype(np.float32),
        scale=np.abs(rng.normal(size=16)).astype(np.float32),
        mean_distance=2.5,
        threshold=0.75,
        blocks=3,
        cells=70,
    )
    section = {"spread": SPREAD, "calibration": CALIBRATION.to_json(), "applicability": area.about()}
    names = ["agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di"]
    path = plain.path.parent / "calibrated"
    return bundles.load(
        bundles.with_uncertainty(plain, path, section, area.arrays(), output_bands=names, provenance={})
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A raster of 150 x 130 pixels, one of its corners without data."""
    values = np.random.default_rng(2).integers(300, 3000, (150, 130, 6)).astype(np.int16)
    values[:30, :20] = -9999
    return write_raster(tmp_path_factory.mktemp("images") / "scene.tif", values), values


def read(path):
    """Values (bands, H, W), and what the file says of them."""
    with rasterio.open(path) as file:
        about = SimpleNamespace(
            descriptions=file.descriptions,
            units=file.units,
            nodata=file.nodata,
            tags=file.tags(),
            means=[float(file.tags(band)["STATISTICS_MEAN"]) for band in file.indexes],
        )
        return file.read(), about


TILED = {"tile": 64, "stride": 48, "margin": 4, "batch_size": 3}


def test_a_calibrated_bundles_map_has_five_described_bands(calibrated, image, tmp_path):
    result = Predictor(calibrated, **TILED).predict_file(image[0], tmp_path, quicklook=True, style=True)
    values, file = read(result.path)
    assert result.path.name == "scene_agbd.tif"
    assert file.descriptions == ("agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di")
    assert file.units == ("Mg ha-1",) * 4 + ("1",)
    assert file.nodata == -1
    tags = file.tags
    assert (tags["INTERVAL_LEVEL"], float(tags["DI_THRESHOLD"])) == ("0.8", 0.75)
    assert json.loads(tags["CALIBRATION"])["groups"][1]["biome"] == "taiga"
    gone = values == -1
    assert (gone == gone[0]).all()
    assert gone[0, :30, :20].all()
    assert gone[0].sum() == 600
    agbd, sd, lo, hi, di = (band[~gone[0]].astype(np.float64) for band in values)
    # From the raw spread, which no band holds: sd^2 = 4 + 0.25 raw^2 + 0.01 agbd^2, so sd is at least this.
    assert (sd >= np.sqrt(4 + 0.01 * agbd**2) - 1e-4).all()
    np.testing.assert_allclose(lo, np.maximum(agbd - 1.5 * sd, 0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(hi, agbd + 1.5 * sd, rtol=1e-5)
    assert (di > 0).all()
    np.testing.assert_allclose(file.means, [band.mean() for band in (agbd, sd, lo, hi, di)], rtol=1e-5)
    assert (tmp_path / "scene_agbd_quicklook.png").is_file()


def test_a_resumed_map_is_the_unbroken_one(calibrated, image, tmp_path):
    predictor = Predictor(calibrated, **TILED)
    path = predictor.predict_file(image[0], tmp_path / "tiled").path
    first = path.read_bytes()
    assert predictor.predict_file(image[0], tmp_path / "tiled").status == "skipped"
    assert predictor.predict_file(image[0], tmp_path / "tiled", overwrite=True).status == "written"
    assert path.read_bytes() == first
    # In one batch size or another.
    other = Predictor(calibrated, **TILED | {"batch_size": 5}).predict_file(image[0], tmp_path / "other").path
    np.testing.assert_allclose(read(other)[0], read(path)[0], rtol=2e-4, atol=2e-3)


def test_arrays_have_the_bands_last(calibrated, image):
    predictor = Predictor(calibrated, tile=224)
    found = predictor.predict_array(image[1])
    assert found.shape == (150, 130, 5)
    assert list(predictor.layers) == ["agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di"]
    assert (found[:30, :20] == -1).all()
    assert (found[30:, 20:, 1] > 2).all()


def test_a_spread_without_calibration_is_given_as_it_is(plain, image):
    predictor = Predictor(plain, tile=224)
    assert predictor.layers == {"agbd": "Mg ha-1", "agbd_sd": "Mg ha-1"}
    both = predictor.predict_array(image[1], mask_nodata=False)
    alone = Predictor(plain, tile=224, uncertainty="none")
    assert alone.layers == {"agbd": "Mg ha-1"}
    np.testing.assert_allclose(both[..., 0], alone.predict_array(image[1], mask_nodata=False), rtol=1e-5)
    assert predictor.settings["uncertainty"] == SPREAD
    assert "uncertainty" not in alone.settings


def test_a_biome_has_its_own_interval(calibrated, image):
    all_of_them, taiga = (
        Predictor(calibrated, tile=224, biome=biome).predict_array(image[1]) for biome in ("", "taiga")
    )
    there = all_of_them[..., 0] != -1
    np.testing.assert_array_equal(taiga[..., 1], all_of_them[..., 1])
    agbd, sd = taiga[there][:, 0], taiga[there][:, 1]
    np.testing.assert_allclose(taiga[there][:, 3], agbd + 2.5 * sd, rtol=1e-5)


def test_xarray_gets_a_dataset(calibrated, image):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("rioxarray")
    predictor = Predictor(calibrated, **TILED)
    found = predictor.predict(image[0])
    assert isinstance(found, xarray.Dataset)
    assert list(found.data_vars) == ["agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di"]
    assert found.agbd_lo.attrs["units"] == "Mg ha-1"
    assert found.attrs["INTERVAL_LEVEL"] == "0.8"
    import rioxarray

    lazy = rioxarray.open_rasterio(image[0], chunks={"x": 64, "y": 64}, band_as_variable=False)
    lazy = lazy.assign_coords(band=list(bands.BAND_NAMES))
    mapped = predictor.predict(lazy)
    assert mapped.di.chunks is not None
    for name in found.data_vars:
        np.testing.assert_allclose(mapped[name].values, found[name].values, rtol=2e-4, atol=2e-3)


def test_outside_the_area_of_applicability_can_be_left_out(calibrated, image):
    kept = Predictor(calibrated, tile=224).predict_array(image[1])
    there = kept[..., 0] != -1
    threshold = float(np.median(kept[there][:, 4]))
    section = calibrated.meta["uncertainty"]
    about = {"uncertainty": section | {"applicability": section["applicability"] | {"threshold": threshold}}}
    other = bundles.Bundle(calibrated.path, calibrated.meta | about, calibrated.variables)
    cut = Predictor(other, tile=224, outside="nodata").predict_array(image[1])
    outside = there & (kept[..., 4] > threshold)
    assert 0 < outside.sum() < there.sum()
    assert (cut[outside] == -1).all()
    np.testing.assert_array_equal(cut[~outside], kept[~outside])


def test_contradictions_are_refused(plain, calibrated):
    for bundle, settings, said in (
        (calibrated, {"uncertainty": "dropout"}, "calibrated for way model, asked for is way dropout, samples 10"),
        (plain, {"di": True}, "no area of applicability"),
        (plain, {"outside": "nodata"}, "takes the dissimilarity"),
        (calibrated, {"outside": "white"}, "expected one of keep, nodata"),
        (plain, {"biome": "taiga"}, "it is not calibrated"),
        (calibrated, {"biome": "desert"}, "biomes: taiga"),
    ):
        with pytest.raises(PredictionError, match=said):
            Layers(bundle, **settings)
    assert Layers(calibrated, uncertainty="none", di=False).named(("mean",)) == {"agbd": "Mg ha-1"}


def test_a_map_of_a_symmetric_model_has_no_scatter(image, tmp_path):
    """Each pixel's answer is its own value: eight maps agree to the bit, tile by tile."""
    predictor = Predictor(stub_bundle(), model_fn=nir, uncertainty="symmetries", **TILED)
    values, file = read(predictor.predict_file(image[0], tmp_path).path)
    assert file.descriptions == ("agbd", "agbd_sd")
    there = values[0] != -1
    assert (values[1][there] == 0).all()
    np.testing.assert_allclose(values[0][there], image[1][..., bands.BAND_NAMES.index("NIR_NARROW")][there], rtol=1e-6)


def test_quantiles_go_through_their_calibration(plain):
    section = {"spread": SPREAD, "calibration": replace(CALIBRATION, kind="quantiles").to_json()}
    plain_meta = plain.meta | {"uncertainty": section}
    layers = Layers(bundles.Bundle(plain.path, plain_meta, plain.variables))
    values = np.array([[50.0, 30.0, 80.0], [5.0, 1.0, 9.0]], np.float32)
    found = layers.finish(values, ("mean", "lo", "hi"))
    np.testing.assert_allclose(found[:, 2:], [[28.5, 81.5], [0.0, 10.5]])
    found = layers.finish(values, ("mean", "lo", "hi"), np.array(["taiga", ""]))
    np.testing.assert_allclose(found[:, 2:], [[27.5, 82.5], [0.0, 10.5]])
