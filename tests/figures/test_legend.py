"""Colours for other programs: what QGIS and GDAL make of them is what our own pictures show."""

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from biomass_jax.figures import map_style

NAMED = {"name": "Above-ground biomass", "unit": "Mg/ha"}


@pytest.fixture
def values():
    values = np.random.default_rng(0).gamma(2, 50, (300, 200)).astype(np.float32)
    values[:100] = np.nan
    return values


def entries(ramp):
    """Values and colours of a ramp as `gdaldem` reads it, its no-data line apart."""
    lines = [line.split() for line in ramp.splitlines() if not line.startswith("#")]
    assert all(len(line) == 5 for line in lines)
    none = [line[1:] for line in lines if line[0] == "nv"]
    found = np.array([line for line in lines if line[0] != "nv"], float)
    return none, found[:, 0], found[:, 1:]


def test_a_ramp_of_gdal_gives_the_colours_of_our_pictures(values):
    none, stops, colours = entries(map_style(values, **NAMED)[1])
    assert none == [["0", "0", "0", "0"]]  # transparent
    assert (np.diff(stops) > 0).all() and (colours[:, 3] == 255).all()
    top = np.nanpercentile(values, 99)
    assert stops[0] == 0 and top <= stops[-1] < top * 1.1
    shown = np.linspace(0, stops[-1], 500)
    straight = np.stack([np.interp(shown, stops, colours[:, k]) for k in range(3)], axis=-1)  # as gdaldem does
    expected = matplotlib.colormaps["viridis"](shown / stops[-1])[:, :3] * 255
    assert np.abs(straight - expected).max() <= 4


def test_a_style_of_qgis_has_the_same_stops_and_the_unit(values):
    style, ramp = map_style(values, **NAMED)
    assert style.startswith("<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n<qgis ")
    renderer = ElementTree.fromstring(style).find("pipe/rasterrenderer")
    given = renderer.attrib
    assert (given["type"], given["band"], given["nodataColor"], given["alphaBand"]) == (
        "singlebandpseudocolor",
        "1",
        "",  # transparent
        "-1",
    )
    assert renderer.find("minMaxOrigin/limits").text == "None"
    shader = renderer.find("rastershader/colorrampshader")
    assert (shader.get("colorRampType"), shader.get("clip")) == ("INTERPOLATED", "0")
    items = shader.findall("item")
    _, stops, colours = entries(ramp)
    assert [float(item.get("value")) for item in items] == stops.tolist()
    assert [[int(item.get("color")[i : i + 2], 16) for i in (1, 3, 5)] for item in items] == colours[:, :3].tolist()
    assert all(item.get("label") == f"{item.get('value')} Mg/ha" and item.get("alpha") == "255" for item in items)
    assert float(shader.get("minimumValue")) == float(given["classificationMin"]) == stops[0]
    assert float(shader.get("maximumValue")) == float(given["classificationMax"]) == stops[-1]
    assert shader.find("rampLegendSettings").get("suffix") == " Mg/ha"
    # QGIS makes the stops anew from the gradient where somebody changes the range
    gradient = {option.get("name"): option.get("value") for option in shader.findall("colorramp/Option/Option")}
    assert gradient == {prop.get("k"): prop.get("v") for prop in shader.findall("colorramp/prop")}
    between = [re.split("[;,]", stop) for stop in gradient["stops"].split(":")]
    np.testing.assert_allclose([float(stop[0]) for stop in between], stops[1:-1] / stops[-1], rtol=1e-5)
    assert [[int(part) for part in stop[1:]] for stop in between] == colours[1:-1].tolist()
    assert (gradient["color1"], gradient["color2"]) == ("68,1,84,255", "253,231,37,255")


@pytest.mark.parametrize("low", [0, -40.0])
def test_maps_without_a_spread_or_with_values_below_0(low):
    for values in (np.full((5, 5), low), np.full((5, 5), np.nan)):
        _, stops, _ = entries(map_style(values.astype(np.float32), **NAMED)[1])
        assert (np.diff(stops) > 0).all()
        assert stops[0] <= np.nanmin([low if np.isfinite(values).any() else 0, 0])


def test_names_are_text_and_no_markup(values):
    style, _ = map_style(values, name="a < b", unit='m "3" & <more>')
    shader = ElementTree.fromstring(style).find(".//rampLegendSettings")
    assert shader.get("suffix") == ' m "3" & <more>'
