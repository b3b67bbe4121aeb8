"""The reconstruction figure: which pixels come from where, in which colours."""

import numpy as np
import pytest
from PIL import Image

from biomass_jax import figures
from biomass_jax.figures.examples import COMPOSITES, MASKED, reconstruction_pictures

BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
TOKEN = 4


@pytest.fixture
def panel():
    """A chip of 32 x 40 px, tokens of 4 px, 16 of 80 masked; a corner without data, half of it masked."""
    rng = np.random.default_rng(8)
    image = rng.normal(size=(32, 40, 6))
    reconstruction = rng.normal(scale=3, size=image.shape)  # beyond the input's range, so that clipping shows
    mask = np.zeros((8, 10), np.float32)
    mask[2:6, 3:5] = mask[0:4, 8:10] = 1
    nodata = np.zeros((32, 40), bool)
    nodata[0:6, 28:40] = True
    image[nodata] = -99
    return figures.ReconstructionPanel(image, reconstruction, mask, nodata, "10SFF_17")


def masked_pixels(panel):
    out = np.zeros(panel.nodata.shape, bool)
    for y, x in np.ndindex(out.shape):
        out[y, x] = panel.mask[y // TOKEN, x // TOKEN] == 1
    return out


@pytest.mark.parametrize("name", COMPOSITES)
def test_each_pixel_comes_from_its_source(panel, name):
    colours = {"RGB": (2, 1, 0), "SWIR": (5, 3, 2)}[name]  # red, green, blue of the picture, by hand
    seen, hidden, filled = reconstruction_pictures(panel, BANDS, COMPOSITES[name])
    masked = masked_pixels(panel)
    expected = {}
    for source in ("image", "reconstruction"):
        channels = []
        for band in colours:
            low, high = np.percentile(panel.image[~panel.nodata][:, band], [2, 98])  # of the input, for both
            channels.append(np.clip((getattr(panel, source)[..., band] - low) / (high - low), 0, 1) ** 0.6)
        expected[source] = np.stack(channels, -1)
    data = ~panel.nodata
    np.testing.assert_allclose(seen[data, :3], expected["image"][data])
    np.testing.assert_allclose(hidden[data & ~masked, :3], expected["image"][data & ~masked])
    assert (hidden[masked] == [MASKED, MASKED, MASKED, 1]).all()
    np.testing.assert_allclose(filled[data & ~masked, :3], expected["image"][data & ~masked])
    np.testing.assert_allclose(filled[data & masked, :3], expected["reconstruction"][data & masked])
    assert (filled[..., 3] == data).all()
    assert (seen[..., 3] == data).all()


def test_the_scale_of_the_units_does_not_matter(panel):
    scale, offset = np.linspace(100, 900, 6), np.linspace(300, 2000, 6)
    changed = figures.ReconstructionPanel(
        panel.image * scale + offset, panel.reconstruction * scale + offset, panel.mask, panel.nodata, ""
    )
    for colours in COMPOSITES.values():
        np.testing.assert_allclose(
            reconstruction_pictures(changed, BANDS, colours), reconstruction_pictures(panel, BANDS, colours), atol=1e-9
        )


def test_the_figure_shows_six_pictures_a_chip(panel, tmp_path):
    second = figures.ReconstructionPanel(panel.image[::-1], panel.image * 0, panel.mask, panel.nodata[::-1], "other")
    figure = figures.reconstructions([panel, second], bands=BANDS, title="Step 300")
    assert len(figure.axes) == 12
    for n, chip in enumerate((panel, second)):
        pictures = [p for colours in COMPOSITES.values() for p in reconstruction_pictures(chip, BANDS, colours)]
        for axes, picture in zip(figure.axes[6 * n : 6 * n + 6], pictures, strict=True):
            assert (np.asarray(axes.images[0].get_array()) == picture).all()
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {"Step 300", "10SFF_17", "other", "RGB masked", "SWIR reconstruction"} <= set(texts)
    pixels = np.asarray(Image.open(figures.save(tmp_path / "a.png", figure)).convert("RGB"))
    assert (np.abs(pixels - 127.5) < 1).all(-1).mean() > 0.02  # the masked cells are there


def test_a_chip_without_any_data_is_blank_but_for_the_mask(panel):
    nothing = figures.ReconstructionPanel(panel.image, panel.reconstruction, panel.mask, np.ones_like(panel.nodata), "")
    seen, hidden, filled = reconstruction_pictures(nothing, BANDS, COMPOSITES["RGB"])
    assert not seen.any() and not filled.any()
    assert (hidden[..., 3] == masked_pixels(panel)).all()


def test_what_cannot_be_shown_is_an_error(panel):
    with pytest.raises(ValueError, match="no band SWIR_2"):
        figures.reconstructions([panel], bands=("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "X"), title="")
    short = figures.ReconstructionPanel(panel.image, panel.reconstruction, panel.mask[:, :4], panel.nodata, "")
    with pytest.raises(ValueError, match=r"mask \(8, 4\).*32 x 40 px"):
        reconstruction_pictures(short, BANDS, COMPOSITES["RGB"])
