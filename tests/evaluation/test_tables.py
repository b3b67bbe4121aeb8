"""Tables and intervals against plain loops over pixels."""

import csv
import math

import numpy as np
import pytest

from biomass_jax.evaluation import tables as binwise
from biomass_jax.evaluation.intervals import tile_intervals
from biomass_jax.evaluation.tables import BINS, Scored, tables
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
    return Scored(prediction, label, chip, tuple(f"chip_{i}" for i in range(7)), TILES, BIOMES)


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
    rows = tables(scored, resamples=20)
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
    scored = Scored(label + 1, label, np.zeros(n, np.int32), ("a",), ("10SFF",), ("taiga",))
    found = {row["group"]: row["n"] for row in tables(scored) if row["table"] == "label_bin"}
    assert found == {"0-100": 2, "100-200": 2, "200-300": 2, "0-300": 6, "300-inf": 2}


def drawn_by_hand(scored, tiles, resamples, seed):
    """Percentiles over resamples whose pixels are really put together."""
    rng = np.random.default_rng(seed)
    pixels = [np.flatnonzero([TILES[chip] == tile for chip in scored.chip]) for tile in tiles]
    found = []
    for _ in range(resamples):
        chosen = np.concatenate([pixels[i] for i in rng.integers(len(tiles), size=len(tiles))])
        found.append(plain(scored.prediction[chosen], scored.label[chosen]))
    return {name: np.percentile([scores[name] for scores in found], [2.5, 97.5]) for name in ("rmse", "mae", "r2")}


def test_the_interval_equals_one_from_pixels_put_together():
    scored = synthetic_scores(5)
    (row,) = [row for row in tables(scored, resamples=200, seed=11) if row["table"] == "all"]
    expected = drawn_by_hand(scored, sorted({TILES[c] for c in scored.chip}, key=lambda t: t or "unknown"), 200, 11)
    for name, (low, high) in expected.items():
        assert row[f"{name}_low"] == pytest.approx(low, rel=1e-12)
        assert row[f"{name}_high"] == pytest.approx(high, rel=1e-12)
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    again = [row for row in tables(scored, resamples=200, seed=12) if row["table"] == "all"][0]
    assert again["rmse_low"] != row["rmse_low"]


def test_one_tile_has_no_interval_and_a_biome_draws_from_its_own_tiles():
    scored = synthetic_scores(6)
    rows = {(row["table"], row["group"]): row for row in tables(scored, resamples=50)}
    assert rows["biome", "desert"]["tiles"] == 1  # its second tile has no label
    assert rows["biome", "desert"]["rmse_low"] is None
    assert rows["tile", "10SGF"]["rmse_low"] is None
    assert rows["biome", "savanna"]["rmse_low"] < rows["biome", "savanna"]["rmse_high"]
    one = RegressionSums().add(np.array([1.0, 3.0]), np.array([2.0, 2.5]))
    assert tile_intervals([one, RegressionSums()], resamples=10, seed=0) is None
    assert tile_intervals([one, one], resamples=0, seed=0) is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        bias = rng.normal(0, 10, 60)  # a tile's pixels err together: the mean bias is 0, its spread a tile's
        parts = [RegressionSums().add(100 + b + rng.normal(0, 5, 30), np.full(30, 100.0)) for b in bias]
        low, high = tile_intervals(parts, resamples=200, seed=trial)["bias"]
        inside += low <= 0 <= high
    assert 180 <= inside <= 198  # 95 % of 200, a little fewer for 60 tiles; pixels as draws would give about 60


def test_csv_has_the_references_columns_and_empty_cells(tmp_path):
    scored = synthetic_scores(1)
    few = scored.label < 200
    scored = Scored(
        scored.prediction[few], scored.label[few], scored.chip[few], scored.chip_ids, scored.tiles, scored.biomes
    )
    rows = tables(scored, resamples=10)
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
