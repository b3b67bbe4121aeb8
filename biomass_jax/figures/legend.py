"""The colours of maps, here and in other programs: a style for QGIS, a ramp for GDAL."""

import math
from xml.etree import ElementTree

import numpy as np

from biomass_jax.figures.style import limits

MAP_COLOURS = "viridis"  # even steps look even, on paper without colours and to colour-blind readers too
SPREAD_COLOURS = "magma"  # of how sure a map is: another scale, so that the two aren't taken for each other
CHANGE_COLOURS = "PuOr"  # less is orange, more is purple: colour-blind readers tell them apart
_STOPS = 26  # between which both programs go straight: within 3 of 255 of all colours


def map_style(values: np.ndarray, *, name: str, unit: str) -> tuple[str, str]:
    """The colours of a map from 0 (or below) to where 99 % of its values lie, as two texts.

    Args:
        values: (h, w) of the map, may be of reduced size; NaN for no-data, which is left transparent.
        name: what the values are.
        unit: their unit.

    Returns:
        A style of QGIS (.qml) for the file's first band, and a ramp for `gdaldem color-relief -alpha`.
    """
    low, high = limits(values, tail=1).values()
    step = 10.0 ** (math.floor(math.log10(high - low)) - 1)  # two digits make a legend that reads well
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    stops = list(zip([f"{value:.6g}" for value in np.linspace(low, high, _STOPS)], _colours(), strict=True))
    ramp = [f"# {name} ({unit}): value, red, green, blue, alpha", "nv 0 0 0 0"]
    ramp += [f"{value} {red} {green} {blue} 255" for value, (red, green, blue) in stops]
    return _qgis(stops, unit), "\n".join(ramp) + "\n"


def _colours() -> list[tuple[int, int, int]]:
    from matplotlib import colormaps

    rgb = np.rint(colormaps[MAP_COLOURS](np.linspace(0, 1, _STOPS))[:, :3] * 255).astype(int)
    return [(int(red), int(green), int(blue)) for red, green, blue in rgb]


def _qgis(stops: list[tuple[str, tuple[int, int, int]]], unit: str) -> str:
    """Elements and attributes as QGIS 3 writes them; what isn't said stays as it is in QGIS."""
    low, high = stops[0][0], stops[-1][0]
    style = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    pipe = ElementTree.SubElement(style, "pipe")
    renderer = ElementTree.SubElement(
        pipe, "rasterrenderer", type="singlebandpseudocolor", band="1", alphaBand="-1", opacity="1", nodataColor=""
    )  # no colour for no-data: transparent
    renderer.attrib |= {"classificationMin": low, "classificationMax": high}
    ElementTree.SubElement(renderer, "rasterTransparency")
    origin = ElementTree.SubElement(renderer, "minMaxOrigin")
    ElementTree.SubElement(origin, "limits").text = "None"  # as given here: not taken from the pixels in view
    shader = ElementTree.SubElement(
        ElementTree.SubElement(renderer, "rastershader"),
        "colorrampshader",
        colorRampType="INTERPOLATED",
        classificationMode="1",  # the stops of the ramp
        clip="0",  # what lies beyond an end has its colour
        labelPrecision="6",
        minimumValue=low,
        maximumValue=high,
    )
    ramp = ElementTree.SubElement(shader, "colorramp", type="gradient", name="[source]")
    rgba = [f"{red},{green},{blue},255" for _, (red, green, blue) in stops]
    between = ":".join(f"{place / (_STOPS - 1):g};{colour}" for place, colour in enumerate(rgba[1:-1], 1))
    gradient = {"color1": rgba[0], "color2": rgba[-1], "discrete": "0", "rampType": "gradient", "stops": between}
    options = ElementTree.SubElement(ramp, "Option", type="Map")
    for key, value in gradient.items():
        ElementTree.SubElement(options, "Option", name=key, type="QString", value=value)
        ElementTree.SubElement(ramp, "prop", k=key, v=value)  # how QGIS before 3.26 reads it
    for value, (red, green, blue) in stops:
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        ElementTree.SubElement(shader, "item", value=value, color=colour, alpha="255", label=f"{value} {unit}")
    ElementTree.SubElement(
        shader, "rampLegendSettings", useContinuousLegend="1", orientation="2", direction="0", suffix=f" {unit}"
    )
    ElementTree.indent(style)
    text = ElementTree.tostring(style, encoding="unicode")
    return f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{text}\n"
