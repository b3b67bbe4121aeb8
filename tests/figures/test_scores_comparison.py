"""The picture of scores over the number of training chips: what is drawn equals what was given."""

import numpy as np
import pytest

from biomass_jax import figures

PANELS = {
    "Fine-tuning": {
        "pretrained": {20: [50.0, 54.0, 52.0], 8: [70.0, 60.0, 68.0]},
        "from scratch": {8: [72.0, 61.0, 65.0], 20: [51.0, 55.0, 56.0]},
    },
    "Probe": {"pretrained": {8: [30.0], 20: [20.0]}},
}


def test_dots_bars_and_means_are_those_of_the_scores(tmp_path):
    figure = figures.by_training_size(PANELS, title="a_$b$", levels={"Fine-tuning": {"Best constant": 88.0}})
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    for way, scores in PANELS["Fine-tuning"].items():
        x, y = lines[way].get_data()
        np.testing.assert_allclose(y, [np.mean(scores[8]), np.mean(scores[20])])
        np.testing.assert_allclose(x, [8, 20], rtol=0.05)
    dots = sorted(y for line in left.lines if line.get_marker() == "." for y in line.get_ydata())
    assert dots == sorted(y for scores in PANELS["Fine-tuning"].values() for values in scores.values() for y in values)
    bars = {tuple(segment[:, 1]) for lines in left.collections for segment in lines.get_segments()}
    assert bars == {(60, 70), (50, 54), (61, 72), (51, 56)}
    assert list(lines["Best constant 88"].get_ydata()) == [88, 88]
    assert not any("constant" in line.get_label() for line in right.lines)
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["8", "20"]
    figure.canvas.draw()
    texts = {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    assert {"a_$b$", "Fine-tuning", "Probe", "Labelled training chips", "Validation RMSE (Mg/ha)"} <= texts
    assert figures.save(tmp_path / "a.png", figure).stat().st_size > 10_000


def test_a_number_of_chips_without_a_score_is_an_error():
    with pytest.raises(ValueError, match=r"Probe, a: no score for \[8\] chips"):
        figures.by_training_size({"Probe": {"a": {8: []}}}, title="")
