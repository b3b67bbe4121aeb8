"""Pictures of scores, chips and training curves: what is drawn equals what was given, and the texts say it."""

import json

import numpy as np
import pytest

from biomass_jax import figures
from biomass_jax.errors import FigureError
from biomass_jax.figures.__main__ import main
from biomass_jax.figures.style import stretch

SCORES = {"n": 3000, "rmse": 41.26, "bias": -3.04, "r2": 0.614}


def synthetic_scores(seed=0, n=3000):
    rng = np.random.default_rng(seed)
    label = rng.gamma(1.5, 80, n).astype(np.float32)
    return (0.7 * label + 30 + rng.normal(0, 20, n)).astype(np.float32), label


def texts_of(figure):
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def inside(figure):
    """Whether titles, labels of axes and legends lie on the paper."""
    figures.to_array(figure)
    width, height = figure.canvas.get_width_height()
    found = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    found += [figure._suptitle] if figure._suptitle else []
    found += [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    shown = [artist for artist in found if getattr(artist, "get_text", lambda: "legend")()]
    boxes = [artist.get_window_extent() for artist in shown]
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)


def test_density_scatter_counts_pixels_in_cells(tmp_path):
    prediction, label = synthetic_scores()
    figure = figures.density_scatter(prediction, label, SCORES, title="a_$model$ on a set")
    assert inside(figure)
    axes, bar = figure.axes
    counts = axes.collections[0].get_array().filled(0).reshape(100, 100)
    top = axes.get_xlim()[1]
    assert axes.get_ylim() == axes.get_xlim() == (0, top)
    cell = top / 100
    expected = np.zeros((100, 100))
    for p, y in zip(prediction, label, strict=True):
        if 0 <= p <= top and 0 <= y <= top:
            expected[min(int(p / cell), 99), min(int(y / cell), 99)] += 1
    assert np.abs(counts - expected).sum() <= 4  # a value on an edge may round to either side
    texts = texts_of(figure)
    assert "a_$model$ on a set\nn = 3,000, RMSE 41.3 Mg/ha, bias -3.0, R² 0.61" in texts
    assert {"AGB of the label (Mg/ha)", "AGB predicted (Mg/ha)", "Pixels in a cell", "1:1"} <= set(texts)
    assert f"{3000 - int(counts.sum())} beyond the axes" in texts
    line = next(line for line in axes.lines if line.get_label() == "1:1")
    assert list(line.get_xdata()) == list(line.get_ydata()) == [0, top]
    assert figures.save(tmp_path / "a.png", figure).stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    image = figures.to_array(figure)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert len(np.unique(image)) > 50


def row(group, rmse, bias, interval=True):
    ends = {"rmse_low": rmse - 4, "rmse_high": rmse + 5, "bias_low": bias - 1, "bias_high": bias + 2}
    return {"group": group, "n": 1200, "rmse": rmse, "bias": bias} | (ends if interval else dict.fromkeys(ends))


def test_error_by_bin_draws_scores_intervals_and_references():
    empty = {"group": "300-inf", "n": 0} | dict.fromkeys(
        ("rmse", "bias", "rmse_low", "rmse_high", "bias_low", "bias_high")
    )
    rows = [row("0-100", 30.0, 12.0), row("100-200", 50.0, -20.0, interval=False), empty]
    tables = {"Bin of label": rows, "Bin of prediction": rows[:2]}
    references = {"Best constant": 88.8, "Another": None}
    figure = figures.error_by_bin(tables, title="a", scores=SCORES, references=references)
    assert inside(figure)
    left, right = figure.axes
    heights = [bar.get_height() for bar in left.patches]
    np.testing.assert_array_equal(heights, [30, 50, np.nan, 12, -20, np.nan])
    assert len(right.patches) == 4
    whiskers = [sorted(segment[:, 1]) for lines in left.collections for segment in lines.get_segments()]
    assert whiskers == [[26, 35], [11, 14]]
    assert [line.get_ydata()[0] for line in left.lines] == [0, 88.8]
    texts = texts_of(figure)
    assert {"Best constant 88.8", "RMSE", "Bias", "Error (Mg/ha)", "Bin of label (Mg/ha)"} <= set(texts)
    assert not any("Noise" in text for text in texts)
    assert "300-inf\nn = 0" in texts


def test_residuals_are_prediction_minus_label():
    label = np.full(1000, 50, np.float32)
    prediction = label + np.repeat([10.0, 20.0], [700, 300]).astype(np.float32)
    figure = figures.residual_histogram(prediction, label, SCORES, title="a")
    assert inside(figure)
    (axes,) = figure.axes
    counts, edges, _ = axes.patches[0].get_data()
    assert edges[0] == -edges[-1]
    assert counts[np.searchsorted(edges, 10) - 1] == 700
    assert counts.sum() == 1000
    assert counts[counts > 0].tolist() == [700, 300]
    assert {"Mean +13", "Median +10", "Prediction - label (Mg/ha)", "Pixels"} <= set(texts_of(figure))


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_and_one_pixel_can_be_drawn(n):
    values = np.full(n, 0.0, np.float32)
    scores = {"n": n, "rmse": 0.0 if n else None, "bias": None, "r2": None}
    for draw in (figures.density_scatter, figures.residual_histogram):
        figure = draw(values, values, scores, title="a")
        assert any(f"n = {n}" in text for text in texts_of(figure))


def test_chip_panels_place_footprints_on_their_pixels_in_the_predictions_colours():
    rng = np.random.default_rng(0)
    rgb = rng.uniform(200, 900, (40, 40, 3))
    rgb[:5] = np.nan
    prediction = np.repeat(np.linspace(0, 100, 40)[None], 40, 0)
    prediction[:5] = np.nan
    label = np.full((40, 40), -1.0)
    label[10, 30], label[39, 2], label[20, 20] = 70.0, 0.0, 55.0
    panels = [figures.ChipPanel(rgb, prediction, label, f"10SFF_{k}") for k in range(2)]
    figure = figures.chip_panels(panels, title="a")
    assert inside(figure)
    image, shown, footprints = figure.axes[:3]
    dots = footprints.collections[0]
    assert sorted(map(tuple, dots.get_offsets().tolist())) == [(2, 39), (20, 20), (30, 10)]
    colours = dict(zip(map(tuple, dots.get_offsets().tolist()), dots.get_array().tolist(), strict=True))
    assert colours == {(2, 39): 0, (20, 20): 55, (30, 10): 70}
    assert dots.get_clim() == shown.images[0].get_clim()
    assert shown.images[0].get_array().mask[:5].all()
    np.testing.assert_array_equal(image.images[0].get_array(), stretch(rgb))
    errors = np.array([prediction[10, 30] - 70, prediction[39, 2], prediction[20, 20] - 55])
    texts = texts_of(figure)
    assert f"Footprints: n = 3, RMSE {np.sqrt((errors**2).mean()):.1f}" in texts
    assert texts.count("AGB (Mg/ha)") == 2
    assert {"10SFF_0", "10SFF_1", "Prediction"} <= set(texts)


def test_a_chip_without_labels_or_data_can_be_drawn():
    empty = np.full((8, 8), np.nan)
    panel = figures.ChipPanel(np.full((8, 8, 3), np.nan), empty, np.full((8, 8), -1.0), "a")
    assert "Footprints: n = 0" in texts_of(figures.chip_panels([panel], title="a"))


def write_run(folder, shift=0.0, tail=""):
    folder.mkdir()
    lines = [{"step": s, "train/loss": 90 - s + shift, "perf/chips_per_s": 3.0} for s in range(1, 21)]
    lines.insert(10, {"step": 10, "val/loss": 70 + shift, "val/rmse": 71 + shift})
    lines.append({"step": 20, "val/loss": None, "val/rmse": 61 + shift})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_training_curves_of_two_runs(tmp_path):
    runs = [write_run(tmp_path / "frozen"), write_run(tmp_path / "whole", 5.0, tail='{"step": 21, "tr')]
    figure = figures.training_curves(runs, title="Two runs")
    assert inside(figure)
    loss, rmse = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [90.0 - s for s in range(1, 21)]
    assert (loss.lines[1].get_xdata().tolist(), loss.lines[1].get_ydata().tolist()) == ([10], [70])
    assert loss.lines[2].get_ydata()[0] == 94
    assert rmse.lines[3].get_ydata().tolist() == [76, 66]
    assert loss.lines[1].get_color() == loss.lines[0].get_color() != loss.lines[2].get_color()
    texts = texts_of(figure)
    assert {"frozen, best 70", "whole, best 66", "Validation RMSE (Mg/ha)", "Loss", "Step", "Two runs"} <= set(texts)


def test_curves_from_the_command_line(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    out = tmp_path / "curves.png"
    assert main(["--out", str(out), *runs, "--name", "first", "--name", "second"]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert main(["--out", str(out), *runs, "--name", "first"]) == 1
    assert "2 runs and 1 names" in capsys.readouterr().err
    assert main(["--out", str(out), str(tmp_path / "none")]) == 1
    assert "none: no such file; expected a run's workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"step": 1, "train/loss": 2}\nwords\n', r"line 2: found 'words', expected an object with a step"),
        ("[1]\n", r"line 1: found '\[1\]'"),
        ('{"step": 1, "perf/x": 2}\n', "no line with train/loss or val/loss yet"),
    ],
)
def test_files_that_hold_no_curve(tmp_path, text, fault):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(FigureError, match=fault):
        figures.training_curves([path])


def uncertainty(**changes):
    nominal = [k / 20 for k in range(1, 20)]
    row = {"group": "0-100", "n": 1234, "coverage": 0.91, "coverage_low": 0.87, "coverage_high": 0.94}
    none = dict.fromkeys(row) | {"group": "below 0", "n": 0}
    curves = {"removed": [0, 0.5, 0.9], "rmse": [40.0, 30.0, 21.0], "oracle": [40.0, 12.0, 3.0], "ause": 0.43}
    given = {"reliability": {"nominal": nominal, "observed": [value**1.2 for value in nominal]}, "level": 0.9}
    given |= {"rows": [none, row, row | {"group": "100-200", "coverage_low": None}], "sparsification": curves}
    return figures.uncertainty_panels(**given | {"title": "granite"} | changes)


def test_uncertainty_panels_show_the_curves_and_coverages_as_given():
    figure = uncertainty()
    shares, bins, curve = figure.axes
    np.testing.assert_allclose(shares.lines[1].get_ydata()[9], 0.5**1.2)
    assert [tuple(line.get_xydata()[0]) for line in bins.lines[:2]] == [(1, 0.91), (2, 0.91)]
    assert [collection.get_segments()[0].tolist() for collection in bins.collections] == [[[1, 0.87], [1, 0.94]]]
    assert [list(line.get_ydata()) for line in curve.lines] == [[40, 30, 21], [40, 12, 3]]
    texts = texts_of(figure)
    assert {"granite", "0-100\nn = 1,234", "below 0\nn = 0", "Level 0.9", "By sd, area between 0.43"} <= set(texts)
    assert inside(figure)


def test_uncertainty_panels_do_without_errors_and_reach_down_to_low_coverages():
    row = {"group": "0-100", "n": 9, "coverage": 0.2, "coverage_low": None, "coverage_high": None}
    curves = {"removed": [0, 0.5], "rmse": [0.0, 0.0], "oracle": [0.0, 0.0], "ause": None}
    figure = uncertainty(rows=[row], sparsification=curves)
    assert figure.axes[1].get_ylim()[0] < 0.2
    assert "By sd" in texts_of(figure)
    assert inside(figure)
