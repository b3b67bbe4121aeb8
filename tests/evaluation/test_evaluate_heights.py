"""Scores of heights: bins, names and units are those of the bundle; intervals are calibrated between its bins."""

import numpy as np
import pytest

from biomass_jax.data import labels
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation import evaluate
from biomass_jax.evaluation.tables import Scored, tables
from biomass_jax.evaluation.uncertainty import sure_lines
from biomass_jax.uncertainty import calibration
from tests.evaluation.worlds import write_world

HEIGHT = labels.parse("rh98")


def scored(bins):
    """Heights at a pixel each, the prediction a metre above."""
    label = np.array([4, 9, 12, 25, 31, 48], np.float32)
    place = [evaluate.sources.Place(32610, 6e5 + 9e4 * k, 4.1e6) for k in range(6)]
    ids = tuple(f"chip_{k}" for k in range(6))
    return Scored(
        label + 1, label, np.arange(6, dtype=np.int32), ids, ("",) * 6, ("taiga",) * 6, tuple(place), bins=bins
    )


def test_rows_are_those_of_the_labels_bins():
    rows = {(row["table"], row["group"]): row["n"] for row in tables(scored(HEIGHT.bins))}
    found = {group: rows["label_bin", group] for group in ("0-10", "10-20", "20-30", "0-30", "30-inf")}
    assert found == {"0-10": 2, "10-20": 1, "20-30": 1, "0-30": 4, "30-inf": 2}
    assert rows["prediction_bin", "10-20"] == 2  # 9 + 1, and 12 + 1
    plain = {row["group"] for row in tables(scored(labels.BIOMASS.bins)) if row["table"] == "label_bin"}
    assert plain == {"0-100", "100-200", "200-300", "0-300", "300-inf"}


def test_intervals_of_heights_are_calibrated_between_their_bins():
    """300 blocks of five pixels, whose errors grow from bin to bin: each bin gets its own quantile."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(0, 40, 1500)
    size = np.select([mean < 10, mean < 20, mean < 30], [1, 2, 4], 8)
    label = np.maximum(mean + size * rng.standard_normal(1500), 0)
    given = {"blocks": np.arange(1500) // 5, "biomes": np.full(1500, "")}
    found = calibration.fit({"mean": mean, "sd": np.ones(1500)}, label, **given, edges=HEIGHT.cuts)
    assert [(group.low, group.high) for group in found.groups[1:]] == [(None, 10), (10, 20), (20, 30), (30, None)]
    _, low, high = found.apply({"mean": mean, "sd": np.ones(1500)})
    held = (low <= label) & (label <= high)
    for start in (0, 10, 20, 30):
        assert 0.87 <= held[(mean >= start) & (mean < start + 10)].mean() <= 0.95
    assert calibration.fit({"mean": mean, "sd": np.ones(1500)}, label, **given).groups[1:] == ()  # all below 50


def test_the_console_says_the_unit():
    found = {"is": "model", "level": 0.9, "coverage": 0.91, "coverage_low": None, "width": 6.25}
    found |= {"z_variance": 1.0, "crps": 1.0, "ence": 0.1}
    assert ", 6.2 m wide;" in sure_lines(found, "m")[0]


def test_a_model_of_biomass_is_not_scored_on_heights(tmp_path):
    shards = write_world(tmp_path / "shards", metadata={"label": HEIGHT.metadata()})
    source = evaluate.sources.open_source(shards, "test")
    output = {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1}
    bundle = type("Model", (), {"meta": {"output": output}, "path": tmp_path / "model"})()
    with pytest.raises(EvaluationError, match="labels are in m, the model .* gives Mg ha-1"):
        evaluate.check_units(bundle, source.info)
