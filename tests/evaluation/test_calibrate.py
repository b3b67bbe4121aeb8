"""From a real checkpoint to a map that says how sure it is."""

import json

import numpy as np
import pytest
import rasterio

from biomass_jax import bundle as bundles
from biomass_jax.convert import convert
from biomass_jax.convert.declared import Options
from biomass_jax.data import bands
from biomass_jax.errors import BiomassError
from biomass_jax.evaluation import calibrate as module
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.uncertainty import calibration
from biomass_jax.uncertainty.calibration import Calibration
from data_prep.shards import write as shards
from tests.evaluation.worlds import chip
from tests.prediction.stubs import write_raster

pytestmark = pytest.mark.slow  # many, of a second and more each

VAL, TRAIN = 14, 6
OPTIONS = ["--split", "val", "--block-km", "2", "--samples", "4", "--batch-size", "5"]


def placed(kind, index):
    """A chip three kilometres from the next: a block of two is one chip."""
    left = 600000 + 3000 * index + 300_000 * (kind == "train")
    name = {"chip_id": f"{kind}_{index}", "tile": "10SFF", "biome": ("taiga", "savanna")[index % 2]}
    return chip(index % 7, transform=np.array([30.0, 0, left, 0, -30, 4100000]), **name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "shards"
    splits = {kind: [placed(kind, i) for i in range(n)] for kind, n in (("val", VAL), ("train", TRAIN))}
    shards.write_shards(splits, folder, metadata=None)
    return folder


@pytest.fixture(scope="module")
def micro(golden, tmp_path_factory):
    """The bundle of a real checkpoint, which has no spread of its own."""
    path = tmp_path_factory.mktemp("models") / "micro"
    convert.convert(golden / "ckpt_micro_cli" / "lightning.ckpt", path, options=Options(statistics="granite"))
    return path


@pytest.fixture(scope="module")
def calibrated(micro, world):
    path = micro.with_name("calibrated")
    words = ["--bundle", str(micro), "--data", str(world), "--output", str(path), *OPTIONS]
    assert module.main(words) == 0
    return bundles.load(path)


def test_it_is_the_fit_of_what_the_model_gives_at_the_labels(calibrated, world):
    section = calibrated.meta["uncertainty"]
    assert section["spread"] == {"way": "dropout", "samples": 4, "seed": 0}
    chips = [placed("val", index) for index in range(VAL)]
    images = np.stack([one["image"] for one in chips])
    plain = Predictor(bundles.load(calibrated.path.with_name("micro")), uncertainty="dropout", samples=4)
    raw = plain.predict_array(images, mask_nodata=False)
    labels = np.stack([one["label"] for one in chips])
    scored = (labels >= 0) & ~np.stack([bands.no_data(image, -9999) for image in images])
    index = np.nonzero(scored)[0]
    expected = calibration.fit(
        {"mean": raw[scored][:, 0], "sd": raw[scored][:, 1]},
        labels[scored],
        blocks=index,
        biomes=np.array([one["biome"] for one in chips])[index],
        level=0.9,
    )
    found = Calibration.from_json(section["calibration"])
    np.testing.assert_allclose(
        found.variance, expected.variance, rtol=1e-2, atol=1e-4
    )  # a factor that is 0, by rounding
    assert [group.blocks for group in found.groups] == [group.blocks for group in expected.groups]
    # Blocks are drawn in the order of their names, which differs here.
    assert found.groups[0].quantile == pytest.approx(expected.groups[0].quantile, rel=0.2)
    assert found.groups[0].pixels == scored.sum()
    assert section["calibrated_on"] | {"sha256": ""} == {
        "data": str(world),
        "split": "val",
        "sha256": "",
        "chips": VAL,
        "labels": int(scored.sum()),
        "blocks_are": "blocks of ground, 2 km on a side",
    }


def test_the_weights_are_the_same_and_the_bands_are_named(calibrated, micro):
    before = bundles.load(micro)
    assert calibrated.weights_sha256 == before.weights_sha256
    assert calibrated.meta["output"]["bands"] == ["agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di"]
    assert calibrated.meta["provenance"]["command"].startswith("biomass-jax calibrate --bundle")
    bundles.verify(calibrated.path)


def test_its_map_has_five_bands(calibrated, tmp_path):
    image = np.random.default_rng(0).integers(300, 4000, (90, 70, 6)).astype(np.int16)
    image[:7] = -9999
    write_raster(tmp_path / "scene.tif", image)
    path = Predictor(calibrated).predict_file(tmp_path / "scene.tif", tmp_path / "maps").path
    with rasterio.open(path) as file:
        values, tags = file.read(), file.tags()
        assert file.descriptions == ("agbd", "agbd_sd", "agbd_lo", "agbd_hi", "di")
    assert (values[:, :7] == -1).all()
    assert (values[:, 7:] != -1).all()
    _, sd, lo, hi, di = values[:, 7:]
    assert sd.min() > 0
    assert (lo <= hi).all()
    assert di.min() > 0
    assert tags["INTERVAL_LEVEL"] == "0.9"
    assert json.loads(tags["CALIBRATION"])["kind"] == "sd"


def test_training_chips_are_at_no_distance_and_others_are(calibrated):
    predictor = Predictor(calibrated)
    seen = predictor.predict_array(np.stack([placed("train", index)["image"] for index in range(TRAIN)]))[..., 4]
    # Its own cells are centres: only rounding is between them. Cells with pixels of no data are seen as in training.
    assert np.median(seen[seen != -1]) < 1e-3
    odd = np.full((32, 32, 6), 15000, np.int16)
    assert predictor.predict_array(odd, encoding="digital_numbers")[..., 4].min() > 0.1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--uncertainty", "none"], "intervals need some"),
        (["--uncertainty", "model"], "micro: uncertainty is 'model', but the model gives a mean alone"),
        (["--level", "1.5"], "config.level is 1.5"),
        (["--level", "0.99"], "shards: split val: 14 blocks of ground have labels"),
        (["--split", "test"], "split 'test' is not there"),
        (["--samples", "1"], "samples is 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(micro, world, tmp_path, capsys, more, said):
    words = ["--bundle", str(micro), "--data", str(world), "--output", str(tmp_path / "new"), *OPTIONS, *more]
    assert module.main(words) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_there_is_kept(calibrated, micro, world):
    with pytest.raises(BiomassError, match="already exists"):
        module.calibrate(micro, world, calibrated.path)
