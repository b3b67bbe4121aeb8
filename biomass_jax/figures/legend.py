"""The colours of maps, here and in other programs: a style for QGIS, a ramp for GDAL."""

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from biomass_jax.figures.style import limits

MAP_COLOURS = "viridis"  # even steps look even, on paper without colours and to colour-blind readers too
SPREAD_COLOURS = "magma"  # of how sure a map is: another scale, so that the two aren't taken for each other
CHANGE_COLOURS = "PuOr"  # less is orange, more is purple: colour-blind readers tell them apart
_STOPS = 26  # between which both programs go straight: within 3 of 255 of all colours
_CLASSES = 5  # of zones: as many as readers tell apart


def style_path(path: Path) -> Path:
    """`<raster's stem>.qml` beside it, where QGIS looks for its style."""
    return path.with_name(f"{path.stem}.qml")


def map_style(values: np.ndarray, *, name: str, unit: str, band: int = 1, change: bool = False) -> tuple[str, str]:
    """The colours of a map from 0 (or below) to where 99 % of its values lie, as two texts.

    Args:
        values: (h, w) of the map, may be of reduced size; NaN for no-data, which is left transparent.
        name: what the values are.
        unit: their unit.
        band: of the file that holds them, from 1.
        change: they are differences: as far below 0 as above it, in colours of their own.

    Returns:
        A style of QGIS (.qml) for that band, and a ramp for `gdaldem color-relief -alpha`.
    """
    low, high = limits(np.abs(values) if change else values, tail=1).values()
    step = 10.0 ** (math.floor(math.log10(high - low)) - 1)  # two digits make a legend that reads well
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    places = np.linspace(-high if change else low, high, _STOPS)
    stops = list(zip([f"{value:.6g}" for value in places], _colours(_STOPS, change), strict=True))
    ramp = [f"# {name} ({unit}): value, red, green, blue, alpha", "nv 0 0 0 0"]
    ramp += [f"{value} {red} {green} {blue} 255" for value, (red, green, blue) in stops]
    return _qgis(stops, unit, band), "\n".join(ramp) + "\n"


def zone_style(values: np.ndarray, *, field: str, unit: str, change: bool = False) -> str:
    """A style of QGIS for polygons: classes by a field, each with about as many zones; of changes, equal steps about 0.

    Args:
        values: (n,) of the field; NaN for zones without one, which stay without a colour.
        field: its name.
        unit: of its values.
        change: they are differences.
    """
    known = values[np.isfinite(values)]
    if change:
        most = float(np.abs(known).max(initial=0.0)) or 1.0
        edges = np.linspace(-most, most, _CLASSES + 1)
    else:
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _CLASSES + 1))) if known.size else np.zeros(1)
    edges = edges if len(edges) > 1 else np.array([edges[0], edges[0]])
    style = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    renderer = ElementTree.SubElement(
        style, "renderer-v2", type="graduatedSymbol", attr=field, graduatedMethod="GraduatedColor"
    )
    ranges, symbols = (ElementTree.SubElement(renderer, name) for name in ("ranges", "symbols"))
    colours = _colours(len(edges) - 1, change)
    for number, (low, high, (red, green, blue)) in enumerate(zip(edges[:-1], edges[1:], colours, strict=True)):
        label = f"{low:.4g} to {high:.4g} {unit}"
        bounds = {"lower": f"{low:.15g}", "upper": f"{high:.15g}"}
        ElementTree.SubElement(ranges, "range", bounds, symbol=str(number), label=label, render="true")
        symbol = ElementTree.SubElement(symbols, "symbol", type="fill", name=str(number), alpha="1")
        layer = ElementTree.SubElement(symbol, "layer", {"class": "SimpleFill"}, enabled="1")
        _options(layer, {"color": f"{red},{green},{blue},255", "outline_color": "35,35,35,255", "style": "solid"})
    return _text(style)


def _colours(count: int, change: bool = False) -> list[tuple[int, int, int]]:
    from matplotlib import colormaps

    rgb = np.rint(colormaps[CHANGE_COLOURS if change else MAP_COLOURS](np.linspace(0, 1, count))[:, :3] * 255)
    return [(int(red), int(green), int(blue)) for red, green, blue in rgb]


def _options(parent: ElementTree.Element, values: dict[str, str]) -> None:
    options = ElementTree.SubElement(parent, "Option", type="Map")
    for key, value in values.items():
        ElementTree.SubElement(options, "Option", name=key, type="QString", value=value)
        ElementTree.SubElement(parent, "prop", k=key, v=value)  # how QGIS before 3.26 reads it


def _text(style: ElementTree.Element) -> str:
    ElementTree.indent(style)
    text = ElementTree.tostring(style, encoding="unicode")
    return f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{text}\n"


def _qgis(stops: list[tuple[str, tuple[int, int, int]]], unit: str, band: int) -> str:
    """Elements and attributes as QGIS 3 writes them; what isn't said stays as it is in QGIS."""
    low, high = stops[0][0], stops[-1][0]
    style = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    pipe = ElementTree.SubElement(style, "pipe")
    renderer = ElementTree.SubElement(
        pipe,
        "rasterrenderer",
        type="singlebandpseudocolor",
        band=str(band),
        alphaBand="-1",
        opacity="1",
        nodataColor="",
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
    _options(ramp, gradient)
    for value, (red, green, blue) in stops:
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        ElementTree.SubElement(shader, "item", value=value, color=colour, alpha="255", label=f"{value} {unit}")
    ElementTree.SubElement(
        shader, "rampLegendSettings", useContinuousLegend="1", orientation="2", direction="0", suffix=f" {unit}"
    )
    return _text(style)
