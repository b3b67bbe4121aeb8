"""Colours for other programs: what QGIS and GDAL make of them is what our own pictures show."""

import itertools
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from biomass_jax.figures import map_style, zone_style

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


def test_differences_have_their_own_colours_with_nothing_in_the_middle(values):
    style, ramp = map_style(60 - values, **NAMED, band=3, change=True)
    _, stops, colours = entries(ramp)
    np.testing.assert_allclose(stops, -stops[::-1], rtol=1e-6)
    assert np.nanpercentile(abs(60 - values), 99) <= stops[-1] < 1.1 * np.nanpercentile(abs(60 - values), 99)
    expected = matplotlib.colormaps["PuOr"](np.linspace(0, 1, len(stops)))[:, :3] * 255
    assert np.abs(colours[:, :3] - expected).max() <= 1
    assert ElementTree.fromstring(style).find("pipe/rasterrenderer").get("band") == "3"


def classes(style):
    """Edges and colours of a style of polygons."""
    renderer = ElementTree.fromstring(style).find("renderer-v2")
    assert renderer.get("type") == "graduatedSymbol"
    ranges = renderer.findall("ranges/range")
    symbols = {symbol.get("name"): symbol for symbol in renderer.findall("symbols/symbol")}
    assert sorted(symbols) == [one.get("symbol") for one in ranges]
    colours = [symbols[one.get("symbol")].find("layer/Option/Option[@name='color']").get("value") for one in ranges]
    edges = [(float(one.get("lower")), float(one.get("upper"))) for one in ranges]
    return renderer.get("attr"), edges, colours, [one.get("label") for one in ranges]


def test_zones_have_five_classes_with_as_many_zones_each():
    values = np.random.default_rng(0).permutation(np.append(np.arange(20.0) ** 2, [np.nan, np.nan]))
    field, edges, colours, labels = classes(zone_style(values, field="mean", unit="Mg/ha"))
    assert field == "mean" and len(edges) == 5 and (edges[0][0], edges[-1][1]) == (0, 361)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(edges))
    inside = [((values >= low) & (values < high)).sum() for low, high in edges]
    assert inside == [4, 4, 4, 4, 3]  # and the highest, which closes the last
    assert (colours[0], colours[-1]) == ("68,1,84,255", "253,231,37,255")
    assert labels[0] == f"0 to {edges[0][1]:.4g} Mg/ha"


def test_changes_of_zones_are_classed_about_0():
    _, edges, colours, _ = classes(
        zone_style(np.array([-50.0, 10.0, np.nan]), field="a / b", unit="Mg/ha", change=True)
    )
    np.testing.assert_allclose(edges, [(-50, -30), (-30, -10), (-10, 10), (10, 30), (30, 50)])
    assert colours[0] == "127,59,8,255" and colours[-1] == "45,0,75,255"  # less is orange, more is purple


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("values", [[7.0], [7.0, 7.0], [np.nan], [0.0]])
def test_few_zones_have_a_style_too(values, change):
    _, edges, _, _ = classes(zone_style(np.array(values), field="mean", unit="Mg/ha", change=change))
    known = [value for value in values if value == value]
    assert all(any(low <= value <= high for low, high in edges) for value in known)
