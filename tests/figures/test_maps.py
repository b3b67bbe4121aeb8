"""Pictures: the stretch of colours against hand-made numbers, and that a picture shows what it has to."""

import numpy as np
import pytest
from PIL import Image

from biomass_jax import figures
from biomass_jax.figures.style import stretch


def test_stretch_runs_from_2nd_to_98th_percentile_of_valid_pixels():
    image = np.empty((10, 101, 3))
    image[:] = np.arange(101)[None, :, None] * np.array([1, 10, 100]) + np.array([0, 5, -50])
    image[0, 0] = np.nan
    image[0, 1, 1] = np.nan  # one band is enough
    out = stretch(image)
    assert out.shape == (10, 101, 4)
    assert (out[0, :2] == 0).all()
    assert (out[1:, :, 3] == 1).all()
    for band in range(3):
        valid = image[..., band][np.isfinite(image).all(-1)]
        low, high = np.percentile(valid, [2, 98])
        expected = np.clip((image[5, :, band] - low) / (high - low), 0, 1) ** 0.6
        np.testing.assert_allclose(out[5, :, band], expected)


@pytest.mark.parametrize("image", [np.full((4, 5, 3), np.nan), np.full((4, 5, 3), 7.0)])
def test_stretch_of_nothing_or_of_one_value(image):
    out = stretch(image)
    assert np.isfinite(out).all()
    assert (out[..., 3] == np.isfinite(image[..., 0])).all()


SQUARE = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
SPLIT_COLOURS = {"train": (0, 114, 178), "val": (230, 159, 0), "test": (213, 94, 0)}


def split_picture(outlines, distances, **changes):
    return figures.chips_by_split(outlines, distances, title="block of 50 km", **changes)


@pytest.mark.parametrize("east", [10.0, 180.0])  # across the antimeridian too, where half the chips lie at -180
def test_chips_lie_on_the_map_in_their_splits_colours(east):
    places = {"train": -3.0, "val": -1.0, "test": 1.0, "": 3.0}
    outlines = {}
    for name, shift in places.items():
        ring = SQUARE + (east + shift, 50)
        outlines[name] = [np.column_stack([(ring[:, 0] + 180) % 360 - 180, ring[:, 1]])]
    figure = split_picture(outlines, {})
    pixels = figures.to_array(figure).astype(int)
    axes = figure.axes[0]
    for name, colour in SPLIT_COLOURS.items():
        x, y = axes.transData.transform((east + places[name] + 0.5, 50.5))
        assert abs(pixels[-1 - int(y), int(x)] - colour).max() <= 2, name
    kilometres = [np.ptp(axes.transData.transform([(east, 50.5), (east + 1, 50.5)])[:, 0])]
    kilometres += [np.ptp(axes.transData.transform([(east, 50), (east, 51)])[:, 1])]
    assert kilometres[0] / kilometres[1] == pytest.approx(np.cos(np.radians(50.5)), rel=0.01)
    assert figure.axes[1].get_title() == "No test chips, or no train chips"


def test_distances_are_shares_of_their_own_number_with_medians_and_the_buffer():
    distances = {"test chips": np.array([11.0, 12, 13, 49]), "chips of the map": np.repeat([0.0, 30], [6, 4])}
    right = split_picture({"train": [SQUARE]}, distances, buffer_km=10.0).axes[1]
    texts = [text.get_text() for text in right.get_legend().get_texts()]
    assert texts == [
        "test chips, n = 4",
        "their median, 12.5 km",
        "chips of the map, n = 10",
        "their median, 0.0 km",
        "buffer, 10 km",
    ]
    outlined = [patch.get_data() for patch in right.patches if not patch.get_fill()]
    (test, edges, _), (mapped, _, _) = outlined
    assert edges[0] == 0 and edges[-1] == pytest.approx(np.percentile(distances["test chips"], 99))
    assert mapped[0] == 60 and mapped.sum() == 100 and test.sum() == 75  # 49 km lies beyond the 99th percentile
    assert [line.get_xdata()[0] for line in right.lines] == [12.5, 0.0, 10.0]


def draw(tmp_path, values, rgb=None, **changes):
    rgb = np.repeat(np.arange(values.size, dtype=float).reshape(values.shape)[..., None], 3, -1) if rgb is None else rgb
    arguments = {"title": "scene", "name": "Above-ground biomass", "unit": "Mg/ha"} | changes
    path = figures.quicklook(tmp_path / "look.png", rgb, values, **arguments)
    return np.asarray(Image.open(path).convert("RGBA")).astype(int)


def test_colours_follow_the_values_and_no_data_is_transparent(tmp_path):
    values = np.repeat(np.linspace(0, 200, 100)[None], 100, 0)
    values[:, 40:60] = np.nan
    pixels = draw(tmp_path, values)
    height, width = pixels.shape[:2]
    row = pixels[height // 2, width // 2 : width - width // 6]
    shown = row[row[:, 3] == 255]
    assert (row[:, 3] == 0).sum() > 0.15 * len(shown)
    assert shown[5:15, 2].mean() > shown[5:15, 1].mean() + 40  # viridis begins with violet
    assert shown[-15:-5, 1].mean() > shown[-15:-5, 2].mean() + 100  # and ends with yellow


def test_colour_bar_and_texts_say_name_and_unit(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    original = Figure.draw

    def spy(self, *arguments, **named):
        seen.append(self)
        return original(self, *arguments, **named)

    monkeypatch.setattr(Figure, "draw", spy)
    draw(tmp_path, np.full((30, 40), 120.0), title="HLS_$5$.tif")
    texts = [text.get_text() for text in seen[-1].findobj(lambda artist: hasattr(artist, "get_text"))]
    assert "Above-ground biomass (Mg/ha)" in texts
    assert "HLS_$5$.tif" in texts
    assert any("120 Mg/ha" in text and "100%" in text for text in texts)


@pytest.mark.parametrize("shape", [(1, 1), (3, 900), (900, 3)])
@pytest.mark.parametrize("value", [np.nan, 0.0, -3.0])
def test_odd_rasters_can_be_drawn(tmp_path, shape, value):
    values = np.full(shape, value)
    pixels = draw(tmp_path, values, np.full((*shape, 3), value))
    assert pixels.shape[0] < 1700
    assert [path.name for path in tmp_path.iterdir()] == ["look.png"]


def test_a_failed_picture_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        figures.quicklook(
            tmp_path / "missing" / "a.png", np.ones((4, 4, 3)), np.ones((4, 4)), title="", name="", unit=""
        )
    assert list(tmp_path.iterdir()) == []
