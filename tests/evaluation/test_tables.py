"""Tables and intervals against plain loops over pixels."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from biomass_jax.data.sources import Chip, Place
from biomass_jax.errors import EvaluationError, RasterError
from biomass_jax.evaluation import tables as binwise
from biomass_jax.evaluation.intervals import block_intervals
from biomass_jax.evaluation.tables import BINS, Scored, blocks_of, differences, tables
from biomass_jax.tasks.scores import RegressionSums

TILES = ("10SFF", "10SGF", "10SGF", "36NXF", "", "10SFF", "55KDV")
BIOMES = ("taiga", "taiga", "savanna", "savanna", "unknown", "desert", "desert")


def synthetic_scores(seed=0, n=4000, empty_chip=6):
    """Pixels of seven chips, the last without a label; every edge of a bin occurs as label and as prediction."""
    rng = np.random.default_rng(seed)
    label = rng.gamma(1.5, 90, n).astype(np.float32)
    prediction = (0.6 * label + 45 + rng.normal(0, 25, n)).astype(np.float32)
    edges = np.array([0, 100, 200, 300, np.nextafter(np.float32(100), np.float32(0)), 99.5], np.float32)
    label[: len(edges)] = edges
    prediction[20 : 20 + len(edges)] = edges
    chip = rng.integers(0, empty_chip, n).astype(np.int32)
    return Scored(prediction, label, chip, tuple(f"chip_{i}" for i in range(7)), TILES, BIOMES, (Place(),) * 7)


def plain(prediction, label):
    """Scores by the formulas as one would write them down, in float64."""
    if not len(label):
        return {"n": 0, "rmse": None, "mae": None, "bias": None, "r2": None}
    p, y = prediction.astype(np.float64), label.astype(np.float64)
    return {
        "n": len(y),
        "rmse": np.sqrt(np.mean((p - y) ** 2)),
        "mae": np.mean(np.abs(p - y)),
        "bias": np.mean(p) - np.mean(y),
        "r2": 1 - np.sum((p - y) ** 2) / np.sum((y - np.mean(y)) ** 2) if len(set(y)) > 1 else None,
    }


def close(found, expected):
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            # bias is a small difference of large numbers in `plain`, so it is compared with their size
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-11 if name == "bias" else 0), name


def loop_rows(scored):
    """Every group by a loop over pixels."""
    groups = {("all", "all"): []}
    for table in ("label_bin", "prediction_bin"):
        for low, high in BINS:
            groups[table, f"{low}-{high}"] = []
    groups["prediction_bin", "below 0"] = []
    for biome in set(BIOMES):
        groups["biome", biome] = []
    for tile in set(TILES):
        groups["tile", tile or "unknown"] = []
    for i, (p, y, chip) in enumerate(zip(scored.prediction, scored.label, scored.chip, strict=True)):
        mine = [("all", "all"), ("biome", BIOMES[chip]), ("tile", TILES[chip] or "unknown")]
        for low, high in BINS:
            mine += [("label_bin", f"{low}-{high}")] if low <= y < high else []
            mine += [("prediction_bin", f"{low}-{high}")] if low <= p < high else []
        mine += [("prediction_bin", "below 0")] if p < 0 else []
        for key in mine:
            groups[key].append(i)
    return groups


@pytest.mark.parametrize("seed", range(3))
def test_every_row_equals_plain_numpy(seed):
    scored = synthetic_scores(seed)
    rows = tables(scored)
    expected = loop_rows(scored)
    assert {(row["table"], row["group"]) for row in rows} == set(expected)
    assert len(rows) == len(expected)
    for row in rows:
        chosen = np.array(expected[row["table"], row["group"]], int)
        p, y, chips = scored.prediction[chosen], scored.label[chosen], scored.chip[chosen]
        close(row, plain(p, y))
        assert row["chips"] == len(set(chips.tolist()))
        assert row["tiles"] == len({TILES[chip] for chip in chips})
        if len(y):
            y = y.astype(np.float64)
            close(row, {"best_constant": y.mean(), "best_constant_rmse": y.std()})
        else:
            assert row["best_constant"] is row["best_constant_rmse"] is row["rmse_low"] is None
    empty = {row["group"] for row in rows if row["n"] == 0}
    assert "55KDV" in empty


def test_bins_hold_their_lower_edge_and_not_their_upper():
    label = np.array([0, 99.99999, 100, 199, 200, 299.9999, 300, 1296], np.float32)
    n = len(label)
    scored = Scored(label + 1, label, np.zeros(n, np.int32), ("a",), ("10SFF",), ("taiga",), (Place(),))
    found = {row["group"]: row["n"] for row in tables(scored) if row["table"] == "label_bin"}
    assert found == {"0-100": 2, "100-200": 2, "200-300": 2, "0-300": 6, "300-inf": 2}


def test_blocks_are_ground_and_not_tiles():
    """Two tiles of two zones that show the same ground are one block; one tile is many."""
    places = (
        Place(32610, 750_000, 4_100_000),
        Place(32611, 217_000, 4_103_000),
        *(Place(32610, 4e5 + 6e4 * i, 4.2e6) for i in range(5)),
    )
    scored = dataclasses.replace(synthetic_scores(5), places=places)
    blocks = blocks_of(scored)
    assert blocks.are == "blocks of ground, 50 km on a side"
    assert blocks.of_chip[0] == blocks.of_chip[1]
    assert len(set(blocks.of_chip[1:6])) == 5
    assert blocks_of(scored, 1).of_chip[0] != blocks_of(scored, 1).of_chip[1]
    (row,) = [row for row in tables(scored) if row["table"] == "all"]
    assert (row["blocks"], row["no_interval"], row["tiles"]) == (5, None, 4)
    parts = [np.isin(scored.chip, chips) for chips in ((0, 1), (2,), (3,), (4,), (5,))]
    expected, _ = block_intervals([RegressionSums().add(scored.prediction[m], scored.label[m]) for m in parts])
    for name, ends in expected.items():
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(ends, rel=1e-12)
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    (row,) = [row for row in tables(scored) if (row["table"], row["group"]) == ("biome", "taiga")]
    assert (row["blocks"], row["rmse_low"], row["no_interval"]) == (1, None, "1 block with labels; it takes 5")


def test_tiles_are_the_blocks_where_a_place_is_not_known():
    scored = synthetic_scores(6)
    places = (Place(), *[Place(32610, 4e5, 4.2e6)] * 5, Place())
    blocks = blocks_of(dataclasses.replace(scored, places=places))
    assert blocks.are == (
        "MGRS tiles, since 1 of 6 chips have no coordinates (chip chip_0); tiles that lie side by side overlap and err "
        "together; chips of unknown tile are one block"
    )
    assert blocks.of_chip.tolist() == [tile or "unknown" for tile in TILES]
    (row,) = [row for row in tables(scored) if row["table"] == "all"]  # no place at all
    assert (row["blocks"], row["no_interval"]) == (4, "4 blocks with labels; it takes 5")


def test_a_place_that_can_not_be_is_told():
    with pytest.raises(RasterError, match="EPSG:999999: can't be brought to EPSG:6933"):
        blocks_of(dataclasses.replace(synthetic_scores(), places=(Place(999999, 1, 2),) * 7))
    with pytest.raises(RasterError, match="EPSG:32610: found x inf"):
        blocks_of(dataclasses.replace(synthetic_scores(), places=(Place(32610, float("inf"), 2),) * 7))


def test_differences_are_of_the_same_pixels():
    scored = dataclasses.replace(synthetic_scores(3), places=tuple(Place(32610, 1e5 * i, 4e6) for i in range(2, 9)))
    other = dataclasses.replace(scored, prediction=scored.prediction * np.float32(0.9))
    rows = differences(scored, other)
    mine, theirs = ({(r["table"], r["group"]): r for r in tables(one)} for one in (scored, other))
    assert {(r["table"], r["group"]) for r in rows} == {key for key in mine if key[0] != "prediction_bin"}
    for row in rows:
        one, another = (found[row["table"], row["group"]] for found in (mine, theirs))
        assert set(row) == set(binwise.DIFFERENCE_COLUMNS)
        assert {name: row[name] for name in ("n", "chips", "tiles", "blocks")} == {
            name: one[name] for name in ("n", "chips", "tiles", "blocks")
        }
        for score in ("rmse", "mae", "bias", "r2"):
            assert row[score] == (None if one[score] is None else one[score] - another[score])
    assert rows[0]["rmse_low"] < rows[0]["rmse"] < rows[0]["rmse_high"]
    fewer = dataclasses.replace(other, label=other.label + 1)
    with pytest.raises(EvaluationError, match="4000 and 4000 labelled pixels that are not the same"):
        differences(scored, fewer)


def test_csv_has_the_references_columns_and_empty_cells(tmp_path):
    scored = synthetic_scores(1)
    few = scored.label < 200
    scored = dataclasses.replace(
        scored, prediction=scored.prediction[few], label=scored.label[few], chip=scored.chip[few]
    )
    rows = tables(scored)
    path = binwise.write_reference_table(tmp_path / "binwise_rmse.csv", rows, "zero-shot, taiga")
    with path.open() as file:
        (line,) = csv.DictReader(file)
    assert list(line) == ["experiment_name", "0-100", "100-200", "200-300", "0-300", "300-inf"]
    assert (line["experiment_name"], line["200-300"], line["300-inf"]) == ("zero-shot, taiga", "", "")
    low = (scored.label >= 0) & (scored.label < 100)
    assert float(line["0-100"]) == pytest.approx(plain(scored.prediction[low], scored.label[low])["rmse"], rel=1e-12)
    with binwise.write_csv(tmp_path / "scores.csv", binwise.COLUMNS, rows).open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for text, row in zip(read, rows, strict=True):
        for name in binwise.COLUMNS:
            value = row[name]
            assert text[name] == ("" if value is None else str(value))
            assert not (isinstance(value, float) and math.isnan(value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binwise_rmse.csv", "scores.csv"]


def test_pairs_of_errors_lie_within_chips_and_add_up_over_batches_and_processes():
    """Against all pairs of a chip, each counted once; predictions are 0, so the errors are the labels."""
    rng = np.random.default_rng(5)
    label = np.where(rng.random((5, 30, 30)) < 0.2, rng.uniform(0, 300, (5, 30, 30)), -1).astype(np.float32)
    image = np.zeros((5, 30, 30, 6), np.int16)

    def batch(rows, valid):
        arrays = {"image": image[rows], "label": label[rows], "valid": np.array(valid)}
        return SimpleNamespace(arrays=arrays, chips=[Chip(f"chip_{row}", "10SFF", "taiga") for row in rows])

    def forward(images, labels):
        return np.zeros(labels.shape, np.float32), labels, labels < -1

    one = binwise.score_batches([batch([0, 1], [True, True]), batch([2, 4], [True, False])], forward)
    other = binwise.score_batches([batch([3], [True])], forward)
    counts, halves = binwise.join([one, other])[0].pairs
    expected = np.zeros(2)
    for chip in label[:4].astype(float):
        y, x = np.nonzero(chip >= 0)
        near = np.triu(np.hypot(y[:, None] - y, x[:, None] - x) <= 10, 1)
        expected += near.sum(), ((chip[y, x][:, None] - chip[y, x]) ** 2 / 2)[near].sum()
    np.testing.assert_allclose((counts.sum(), halves.sum()), expected, rtol=1e-12)
