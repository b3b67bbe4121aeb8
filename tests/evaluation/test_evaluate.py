"""The run: numbers against a plain forward pass, independence of batches, choices and errors."""

import csv
import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from biomass_jax import bundle as bundles
from biomass_jax.data import bands, sources
from biomass_jax.errors import BundleError, ConfigError, DataError, EvaluationError, PredictionError
from biomass_jax.evaluation import evaluate, tables
from biomass_jax.evaluation.nugget import no_pairs
from biomass_jax.prediction.forward import Forward
from biomass_jax.runtime.mesh import local_placement
from tests.data_prep.shards.test_geotiff import write_pair
from tests.evaluation.worlds import BIOMES, TILES, chip, make_config, write_world
from tests.prediction.stubs import random_bundle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The chips that would be drawn: pictures cost more than scores here; `result` makes them all."""
    seen = []
    monkeypatch.setattr(evaluate, "draw", lambda workdir, result, scored, pictures: seen.extend(pictures))
    return seen


def run(model, path, workdir, **fields):
    workdir.mkdir(parents=True, exist_ok=True)
    return evaluate.run(make_config(model, path, **fields), workdir, shardings=local_placement)


@pytest.fixture(scope="module")
def by_hand(model):
    """Predictions and labels of all chips by one plain forward pass, and each pixel's chip."""
    opened = bundles.load(model)
    chips = [chip(index) for index in range(7)]
    images = np.stack([record["image"] for record in chips])
    missing = np.stack([bands.no_data(image, -9999) for image in images])
    inputs = (np.where(missing[..., None], 0, images).astype(np.float32) - opened.means) / opened.stds
    with jax.default_matmul_precision("highest"):
        predictions = np.asarray(jax.jit(opened.module().apply)(opened.variables, inputs))
    labels = np.stack([record["label"] for record in chips])
    scored = (labels >= 0) & ~missing
    return predictions[scored].astype(float), labels[scored].astype(float), np.nonzero(scored)[0]


@pytest.fixture(scope="module")
def result(model, world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("out")
    return run(model, world, workdir, batch_size=3, **{"figures.count": 2}), workdir


def test_numbers_equal_a_plain_forward_pass(result, by_hand):
    found, workdir = result
    prediction, label, index = by_hand
    error = prediction - label
    assert found["n"] == len(label) > 300
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    assert found["mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-5)
    assert found["bias"] == pytest.approx(np.mean(error), rel=1e-5)
    assert found["best_constant"]["value"] == pytest.approx(label.mean(), rel=1e-12)
    assert found["best_constant"]["rmse"] == pytest.approx(label.std(), rel=1e-12)
    for table, names in (("biome", BIOMES), ("tile", TILES)):
        rows = {row["group"]: row for row in found["tables"] if row["table"] == table}
        assert set(rows) == set(names)
        for name in names:
            mine = np.array([names[i] == name for i in index])
            assert rows[name]["n"] == mine.sum()
            assert rows[name]["rmse"] == pytest.approx(np.sqrt(np.mean(error[mine] ** 2)), rel=1e-5)


def test_files_hold_what_was_found(result):
    found, workdir = result
    assert json.loads((workdir / "metrics.json").read_text()) == found
    with (workdir / "binwise_rmse.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["experiment_name"] == found["experiment"] == "tiny on shards, test"
    bins = {row["group"]: row for row in found["tables"] if row["table"] == "label_bin"}
    assert all(float(line[name]) == row["rmse"] for name, row in bins.items())
    names = ("chips", "density_scatter", "error_by_bin", "residual_histogram")
    pictures = [workdir / f"{name}.png" for name in names]
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    assert {path.name for path in workdir.iterdir()} == {
        *(path.name for path in pictures),
        "metrics.json",
        "scores.csv",
        "binwise_rmse.csv",
        "config.json",
    }
    said = "\n".join(evaluate.lines(found))
    assert f"{found['rmse']:.2f}" in said
    assert "best constant" in said
    assert "floor" not in said
    error = found["label_error"]  # the world's labels follow from their pixel: most of the error is the model's
    assert error["share"] == pytest.approx(min((error["rmse"] / found["rmse"]) ** 2, 1))
    assert f"geolocation and GEDI itself: about {error['rmse']:.2f}" in said
    assert "an estimate" in said
    assert not [name for name in found if "floor" in name]


def test_without_enough_pairs_of_labels_their_errors_are_not_known():
    error = evaluate.label_error(SimpleNamespace(pairs=no_pairs()), 12.0)
    assert (error["rmse"], error["share"]) == (None, None)


def same(one, other):
    """Whether all numbers of two results agree within 1e-5."""
    for name in ("rmse", "share"):
        assert one["label_error"][name] == pytest.approx(other["label_error"][name], rel=1e-4)
    for mine, theirs in zip(one["tables"], other["tables"], strict=True):
        for name, value in mine.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (mine["table"], mine["group"], name)
            else:
                assert value == theirs[name]


@pytest.mark.filterwarnings("ignore:tiles .* contradict each other")  # chips of 32 px lie on no tile's grid of 224
def test_published_folders_score_as_shards_do(result, model, tmp_path):
    root = tmp_path / "taiga_datasplit"
    for index in range(7):
        record = chip(index)
        image = np.full((10, 32, 32), 7, np.float32)  # B01, the six, and three more
        image[1:7] = np.moveaxis(record["image"], -1, 0)
        write_pair(root, "test", index, image=image, label=record["label"], tile=f"T{TILES[index]}")
    found = run(model, root, tmp_path / "out", batch_size=3, **{"data.biome": "taiga"})
    for score in ("n", "rmse", "bias", "r2"):
        assert found[score] == pytest.approx(result[0][score], rel=1e-5)
    assert [row["group"] for row in found["tables"] if row["table"] == "biome"] == ["taiga"]
    with pytest.raises(ValueError, match=r"no chip of biome 'savanna'; found taiga \(7\)"):
        run(model, root, tmp_path / "out", **{"data.biome": "savanna"})


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_and_padding_change_nothing(result, model, world, tmp_path, batch_size):
    same(run(model, world, tmp_path, batch_size=batch_size), result[0])


def test_one_biome_and_its_chips_drawn(model, world, tmp_path, drawn, by_hand):
    fields = {"data.biome": "taiga", "figures.chips": ("10SFF_1", "36NXF_4"), "experiment": "zero-shot"}
    with pytest.raises(EvaluationError, match="figures.chips: no chip 36NXF_4 in .*shards, split 'test'; the tables"):
        run(model, world, tmp_path, batch_size=3, **fields)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["data"]["chips"], found["data"]["biome"], found["experiment"]) == (3, "taiga", "zero-shot")
    assert [row["group"] for row in found["tables"] if row["table"] == "biome"] == ["taiga"]
    prediction, label, index = by_hand
    assert found["n"] == (index < 3).sum()
    assert [picture.title for picture in drawn] == ["10SFF_1_2020-05-01, taiga"]


def test_statistics_are_chosen(model, world, tmp_path):
    opened = bundles.load(model)

    def choose(**fields):
        group = make_config(model, world, **fields).data
        return evaluate.choose_statistics(
            group,
            opened.bands,
            loaded=opened,
            training=lambda: sources.open_source(world, "train"),
            reference=fields.get("reference", False),
        )

    means, _, kind = choose()
    assert kind == "bundle"
    np.testing.assert_array_equal(means.astype(np.float32), opened.means)
    means, stds, kind = choose(**{"data.means": (1.0,) * 6, "data.stds": (2.0,) * 6})
    assert (kind, means.tolist(), stds.tolist()) == ("explicit", [1] * 6, [2] * 6)
    means, stds, kind = choose(**{"data.statistics": "dataset"})
    info = sources.open_source(world, "train").info
    np.testing.assert_allclose(means, info.metadata["means"], rtol=1e-6)
    np.testing.assert_allclose(stds, info.metadata["stds"], rtol=1e-6)
    reference, _, _ = choose(**{"data.statistics": "dataset", "reference": True})
    assert (reference < means).all()  # zeros count


@pytest.mark.parametrize(
    ("fields", "error", "fault"),
    [
        ({"bundle": None}, EvaluationError, "config.bundle is not given; add --config.bundle=PATH"),
        ({"data.path": None}, EvaluationError, "config.data.path is not given"),
        ({"bundle": "none"}, BundleError, "none: not a model bundle"),
        ({"data.split": "val"}, DataError, "split 'val' is not there"),
        ({"data.statistics": "own"}, ConfigError, "config.data.statistics is 'own'"),
        ({"data.means": (1.0,) * 6}, ConfigError, "means and config.data.stds go together"),
        ({"data.means": (1.0,), "data.stds": (1.0,)}, ConfigError, "expected 6 numbers each"),
        ({"dtype": "float16"}, PredictionError, "dtype is 'float16'"),
        ({"matmul_precision": "low"}, PredictionError, "matmul_precision is 'low'"),
        ({"batch_size": 0}, EvaluationError, "config.batch_size is 0"),
        ({"block_km": -1.0}, ConfigError, "config.block_km is -1.0; expected a number above 0"),
        ({"data.threads": 0}, ConfigError, "config.data.threads is 0; expected a number from 1 on"),
        ({"figures.count": -1}, EvaluationError, "config.figures.count is -1"),
        ({"data.biome": "desert"}, ValueError, r"no chip of biome 'desert'; found savanna \(3\), taiga \(3\), unknown"),
        ({"data.biomes": "a.gpkg"}, ValueError, "config.data.biomes and config.data.biome_field go together"),
    ],
)
def test_wrong_settings_say_so(model, world, tmp_path, fields, error, fault):
    with pytest.raises(error, match=fault):
        run(model, world, tmp_path, **fields)
    assert list(tmp_path.iterdir()) == []


def test_data_without_labels_and_in_other_units(model, tmp_path):
    empty = write_world(tmp_path / "empty", label=np.full((32, 32), -1, np.float32))
    with pytest.raises(EvaluationError, match="empty: split 'test' has no labelled pixel in 7 chips"):
        run(model, empty, tmp_path / "out", batch_size=3)
    opened, info = bundles.load(model), sources.open_source(empty, "test").info
    other = dataclasses.replace(info, metadata={**info.metadata, "label": {"units": "m"}})
    with pytest.raises(EvaluationError, match="labels are in m, the model .* gives Mg ha-1"):
        evaluate.check_units(opened, other)


def test_chips_of_another_pixel_size_are_refused(model, tmp_path):
    place = np.array([10.0, 0, 600000, 0, -10, 4100000])
    fine = write_world(tmp_path / "fine", transform=place)
    message = "split test, chip number 0: its pixels are 10 x 10 m on the ground, but .*tiny was trained on 30 m"
    with pytest.raises(DataError, match=message):
        run(model, fine, tmp_path / "out")


def test_scores_tell_which_data_and_statistics_they_are_of(result, model, world):
    found = result[0]["data"]
    assert found["sha256"] == sources.open_source(world, "test").digest()
    assert found["sha256"] != sources.open_source(world, "train").digest()
    np.testing.assert_allclose(found["means"], bundles.read_meta(model)["input"]["means"])
    np.testing.assert_allclose(found["stds"], bundles.read_meta(model)["input"]["stds"])


def test_a_folder_of_scores_holds_those_of_one_evaluation(result, model, world, tmp_path):
    folder = shutil.copytree(result[1], tmp_path / "out")
    with pytest.raises(DataError, match="split 'val' is not there"):  # refused: nothing of the earlier one is lost
        run(model, world, folder, **{"data.split": "val"})
    assert json.loads((folder / "config.json").read_text())["data"]["split"] == "test"
    others = ("chips.png", "scores_against.csv", "differences.csv")  # no chips are to be drawn, nothing to be compared
    for name in others[1:]:
        (folder / name).touch()
    assert (folder / "chips.png").exists()
    run(model, world, folder, batch_size=3)
    assert not any((folder / name).exists() for name in others)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("second") / "other", seed=5)


def test_two_models_are_compared_on_the_same_pixels(model, second, world, result, tmp_path):
    found = run(model, world, tmp_path, against=str(second), batch_size=3)
    alone = run(second, world, tmp_path / "alone", batch_size=3)
    same(found, result[0])  # the first model's scores are what they are without another
    other, less = found["against"], found["against"]["differences"]
    same(other, alone)
    assert other["bundle"] == {"path": str(second), "weights_sha256": alone["bundle"]["weights_sha256"]}
    assert other["statistics"] == "bundle"
    for score in ("rmse", "mae", "bias", "r2"):
        assert less[score] == found[score] - other[score]
        assert less[f"{score}_low"] < less[score] < less[f"{score}_high"]
    assert less["interval"] == "a jackknife that leaves out one of 7 blocks at a time, with Student's t"
    for name, columns, rows in (
        ("scores", tables.COLUMNS, found["tables"]),
        ("scores_against", tables.COLUMNS, other["tables"]),
        ("differences", tables.DIFFERENCE_COLUMNS, less["tables"]),
    ):
        with (tmp_path / f"{name}.csv").open() as file:
            read = list(csv.DictReader(file))
        assert tuple(read[0]) == columns
        assert [line["rmse"] for line in read] == ["" if row["rmse"] is None else str(row["rmse"]) for row in rows]
    said = "\n".join(evaluate.lines(found))
    assert f"against {second}:" in said
    assert f"{less['rmse']:.2f}" in said
    assert json.loads((tmp_path / "metrics.json").read_text()) == found


def test_both_models_are_looked_at_before_one_works(model, world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "score", lambda *_: pytest.fail("a model works"))
    with pytest.raises(BundleError, match="none: not a model bundle"):
        run(model, world, tmp_path, against="none")
    metres = random_bundle(tmp_path / "metres")
    meta = json.loads((metres / "bundle.json").read_text())
    meta["output"]["units"] = "m"
    (metres / "bundle.json").write_text(json.dumps(meta))
    with pytest.raises(EvaluationError, match=r"config.against .*metres gives m, config.bundle .*tiny Mg ha-1; models"):
        run(model, world, tmp_path, against=str(metres))


def test_scores_tell_which_blocks_their_intervals_leave_out(result):
    told = result[0]["interval"]
    assert told == {
        "level": 0.95,
        "blocks": 7,
        "blocks_are": "blocks of ground, 2 km on a side",
        "is": "a jackknife that leaves out one of 7 blocks at a time, with Student's t",
    }
    assert f"interval: {told['is']} ({told['blocks_are']})" in evaluate.lines(result[0])
    assert all(row["no_interval"] for row in result[0]["tables"] if row["table"] == "tile")
    (row, *_) = [row for row in result[0]["tables"] if row["table"] == "tile"]
    assert evaluate.interval_of(row) == "none: 2 blocks with labels; it takes 5"


def test_blocks_are_those_of_the_data_sets_split():
    assert evaluate.split_block_km({"split": {"kind": "block", "block_km": 10.0}}) == 10
    assert evaluate.split_block_km({"split": [{"block_km": 10.0}]}) == 50  # data sets made differently
    assert evaluate.split_block_km({"split": None}) == evaluate.split_block_km({}) == 50


def test_settings_of_earlier_versions_are_taken_and_told_of(model, world, caplog):
    with caplog.at_level("WARNING", "biomass_jax"):
        evaluate.check_given(make_config(model, world, resamples=1000, seed=3))
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(",")[0] for text in said] == ["config.resamples is 1000", "config.seed is 3"]
    assert "leave config.resamples out" in said[0]
    caplog.clear()
    evaluate.check_given(make_config(model, world))
    assert not caplog.records


def test_the_table_says_how_the_test_chips_were_drawn(model, world, tmp_path):
    split = {"kind": "folds", "block_km": 50.0, "buffer_m": 10000.0, "folds": 5, "fold": 2, "leave_out": "", "seed": 1}
    apart = {"test_chips": 9, "test_median_m": 12345.6, "test_touching": 0}
    apart |= {"predicted_chips": 256, "predicted_median_m": 0.0}
    assert evaluate.how_drawn({"split": {**split, "counts": {}, "distances": apart}}) == split | apart
    found = run(model, world, tmp_path)
    said = "split: folds (fold 2 of 5), buffer 10,000 m; median distance to the nearest train chip: test chips 12.3 km"
    lines = evaluate.lines(found | {"data": found["data"] | {"drawn": split | apart}})
    assert f"{said}, chips of a map 0.0 km" in lines
    left_out = split | apart | {"kind": "block", "leave_out": "biome=taiga", "test_median_m": None}
    lines = evaluate.lines(found | {"data": found["data"] | {"drawn": left_out}})
    assert any("split: block, biome=taiga left out, buffer 10,000 m; " in line for line in lines)
    # Shards of before, and folders of GeoTIFFs, of which less or nothing is known.
    for old in ({"kind": "block", "block_km": 50.0, "buffer_m": 0.0, "seed": 0, "counts": {}}, {"kind": "published"}):
        drawn = evaluate.how_drawn({"split": old})
        lines = evaluate.lines(found | {"data": found["data"] | {"drawn": drawn}})
        assert any(
            line.startswith(f"split: {old['kind']}, buffer ") and "test chips not known" in line for line in lines
        )
    assert evaluate.how_drawn({}) is None
    assert found["data"]["drawn"] is None and "split: not known how it was drawn" in evaluate.lines(found)


def stub(names, apply, task="biomass"):
    module = SimpleNamespace(apply=apply)
    return SimpleNamespace(
        path="stub", task=task, bands=names, variables={"scale": np.float32(1)}, module=lambda dtype: module
    )


def test_reference_keeps_labels_without_data():
    model = stub(bands.BAND_NAMES, None)
    plain = {"means": np.zeros(6, np.float32), "stds": np.ones(6, np.float32)}
    forward = Forward(model, **plain, model_fn=lambda variables, x: x[..., 0])
    forward = evaluate.chip_forward(forward, bands.BAND_NAMES, fill=-9999, reference=True)
    _, label, missing = forward(np.zeros((1, 2, 2, 6), np.int16), np.full((1, 2, 2), 7, np.float32))
    assert np.asarray(missing).all()
    assert (np.asarray(label) == 7).all()


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("names", [bands.BAND_NAMES, tuple(reversed(bands.BAND_NAMES)), bands.BAND_NAMES[3:]])
def test_a_partly_filled_pixel_keeps_its_other_bands_for_the_reference_alone(names, reference):
    image = np.random.default_rng(0).integers(1, 5000, (2, 3, 4, 6)).astype(np.int16)
    image[0, 1, 2, 4], image[1, 0, 0, 1] = -9999, -9999
    expected = np.empty((2, 3, 4))
    for place in np.ndindex(expected.shape):
        chosen = [float(image[place][bands.BAND_NAMES.index(name)]) for name in names]
        whole = -9999 in image[place]
        expected[place] = sum(0 if value == -9999 or (whole and not reference) else value for value in chosen)
    plain = {"means": np.zeros(len(names), np.float32), "stds": np.ones(len(names), np.float32)}
    forward = Forward(stub(names, None), **plain, model_fn=lambda variables, x: x.sum(axis=-1), reference=reference)
    on_chips = evaluate.chip_forward(forward, names, fill=-9999, reference=reference)
    prediction, _, _ = on_chips(image, np.full((2, 3, 4), 7, np.float32))
    np.testing.assert_array_equal(prediction, expected)


def test_a_run_as_the_reference_scores_filled_pixels_by_their_other_bands(model, tmp_path, monkeypatch):
    image = chip(0)["image"].copy()
    image[8:24, 8:24, 2] = -9999
    of_sums = functools.partial(Forward, model_fn=lambda variables, x: 100 + x.sum(axis=-1))
    monkeypatch.setattr(evaluate, "Forward", of_sums)
    found = run(model, write_world(tmp_path / "shards", image=image), tmp_path / "out", reference=True)
    opened, values = bundles.load(model), np.where(image == -9999, 0, image).astype(float)
    prediction = 100 + ((values - opened.means) / opened.stds).sum(axis=-1)
    labels = np.stack([chip(index)["label"] for index in range(7)])
    error = (prediction - labels)[labels >= 0]
    assert found["n"] == error.size
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)


def test_bands_go_to_the_model_in_its_order():
    names = tuple(reversed(bands.BAND_NAMES))
    forward = Forward(
        stub(names, None),
        model_fn=lambda variables, x: x[..., 0] * 1000 + x[..., 4],
        means=np.arange(6, dtype=np.float32),
        stds=np.full(6, 2, np.float32),
    )
    forward = evaluate.chip_forward(forward, names, fill=-9999)
    image = np.broadcast_to(np.arange(1, 7, dtype=np.int16), (1, 2, 2, 6)).copy()
    image[0, 1, 1, 3] = -9999
    prediction, label, missing = forward(image, np.full((1, 2, 2), 7, np.float32))
    assert np.asarray(prediction)[0, 0, 0] == (6 - 0) / 2 * 1000 + (2 - 4) / 2
    assert np.asarray(prediction)[0, 1, 1] == (0 - 0) / 2 * 1000 + (0 - 4) / 2
    assert np.asarray(label)[0].tolist() == [[7, 7], [7, -1]]
    assert np.asarray(missing)[0].tolist() == [[False, False], [False, True]]


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(EvaluationError, match="stub: the model takes bands HH; chips have BLUE"):
        evaluate.check_bands(stub(("BLUE", "HH"), None))
    with pytest.raises(PredictionError, match="task 'simmim'; maps and scores need one of task 'biomass'"):
        Forward(stub(bands.BAND_NAMES, None, task="simmim"), means=np.zeros(6), stds=np.ones(6))
