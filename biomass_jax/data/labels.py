"""What is learnt of a pixel: the label's name, unit, title, bins and highest value, of biomass and of canopy height.

A data set's metadata and a bundle's `output` name the label and its unit; what they say besides wins over what stands
here. Where nothing says anything, it is above-ground biomass.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biomass_jax.errors import DataError

Bin = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """A label.

    Attributes:
        name: of bands, columns and files, `agbd` or `rh98`.
        units: as bands and metadata have them, `Mg ha-1`.
        unit: the same as texts have them, `Mg/ha`.
        title: what it is, as titles and legends begin.
        top: the highest value there may be.
        bins: of evaluations, [low, high).
        edges: lower ends of the bins of histograms, the last one open.
        adds_up: whether a value times an area is an amount of something, so that regions have totals.
    """

    name: str
    units: str
    unit: str
    title: str
    top: float
    bins: tuple[Bin, ...]
    edges: tuple[float, ...]
    adds_up: bool

    @property
    def cuts(self) -> tuple[float, ...]:
        """Where one bin of the label ends and the next one begins."""
        return tuple(sorted({end for limits in self.bins for end in limits if 0 < end < math.inf}))

    def metadata(self) -> dict[str, Any]:
        """What shards and bundles say of it; name and unit alone of biomass, as they always did."""
        named: dict[str, Any] = {"name": self.name, "units": self.units}
        if self == BIOMASS:
            return named
        bins = [[low, None if math.isinf(high) else high] for low, high in self.bins]
        return named | {"top": None if math.isinf(self.top) else self.top, "bins": bins}

    def output(self, bands: Sequence[str], nodata: float) -> dict[str, Any]:
        """`output` of a bundle: names of its outputs, their unit, no-data, and what else is known of the label."""
        more = {name: value for name, value in self.metadata().items() if name not in ("name", "units")}
        return {"bands": list(bands), "units": self.units, "nodata": nodata} | more


# The first four bins are those of granite-geospatial-biomass, in its order.
BIOMASS = Label(
    name="agbd",
    units="Mg ha-1",
    unit="Mg/ha",
    title="Above-ground biomass",
    top=2000.0,  # the densest forests known have less, and GEDI's highest footprint 1,300
    bins=((0, 100), (100, 200), (200, 300), (0, 300), (300, math.inf)),
    edges=(0.0, 25.0, 50.0, 75.0, 100.0, 150.0, 200.0, 250.0, 300.0, 400.0, 500.0),
    adds_up=True,
)
_HEIGHT = Label(
    name="canopy_height",
    units="m",
    unit="m",
    title="Canopy height",
    top=150.0,  # the tallest tree known has 116 m, and GEDI's own models of biomass end there
    bins=((0, 10), (10, 20), (20, 30), (0, 30), (30, math.inf)),
    edges=(0.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0),
    adds_up=False,
)
NAMES = "agbd, canopy_height, or a relative height rh0 to rh100"
_RH = re.compile(r"rh(0|[1-9]\d?|100)")
_UNITS = {"Mg/ha": "Mg ha-1", "metres": "m", "meters": "m"}  # spellings of one unit
_TEXTS = {"Mg ha-1": "Mg/ha"}  # units as texts have them, where they differ


def percentile(name: str) -> int | None:
    """Of a relative height, `rh98` -> 98; None of any other label."""
    match = _RH.fullmatch(name)
    return None if match is None else int(match[1])


def parse(name: str, what: str = "label") -> Label:
    """The label of a name that a user gives.

    Args:
        name: `agbd`, `canopy_height`, or `rh0` to `rh100`, a relative height of GEDI L2A.
        what: the field, for the message.

    Raises:
        DataError: another name.
    """
    if name == BIOMASS.name:
        return BIOMASS
    if name == _HEIGHT.name:
        return _HEIGHT
    share = percentile(name)
    if share is None:
        raise DataError(f"{what} is {name!r}; expected {NAMES}")
    return Label(name, **{**_fields(_HEIGHT), "title": f"Relative height, {share} % of the energy below"})


def named(name: str) -> Label | None:
    """The label of a name, None where it is none."""
    try:
        return parse(name)
    except DataError:
        return None


def of_bands(names: Iterable[str]) -> Label:
    """The label of a map, or of a raster of its change, by the names of its bands; biomass where none is a label's."""
    return next(filter(None, (named(name.removesuffix("_change")) for name in names)), BIOMASS)


def described(about: Mapping[str, Any], where: str = "label") -> Label:
    """The label that metadata tell of.

    Args:
        about: name and units, and `top` and `bins` where there are some; of an empty one biomass.
        where: the file, for messages.

    Raises:
        DataError: a label that is known, in another unit.
    """
    name = about.get("name", BIOMASS.name)
    known = named(name)
    if known is None:
        units = str(about.get("units", ""))
        known = Label(name, units, unit_text(units), name, math.inf, ((0, math.inf),), (0.0,), False)
    units = about.get("units", known.units)
    if _UNITS.get(units, units) != known.units:
        raise DataError(f"{where}: the label {name} is in {units!r}; expected {known.units}")
    top, bins = about.get("top", known.top), about.get("bins")
    ends = known.bins if bins is None else tuple((low, math.inf if high is None else high) for low, high in bins)
    return Label(name, **{**_fields(known), "top": math.inf if top is None else float(top), "bins": ends})


def of_output(output: Mapping[str, Any], where: str = "output") -> Label:
    """The label of a bundle, from `output` of its bundle.json; see `described`."""
    about = {name: output[name] for name in ("units", "top", "bins") if name in output}
    return described(about | {"name": output["bands"][0]}, where)


def title_of(band: str) -> str:
    """What a band of a map holds, as titles say it: `rh98_sd` is `Standard deviation of the relative height ...`."""
    for ending, text in _ENDINGS.items():
        if band.endswith(ending) and (title := _known_title(band.removesuffix(ending))):
            return text.format(title=title, lower=f"the {title[0].lower()}{title[1:]}")
    return _known_title(band) or band


_ENDINGS = {
    "_sd": "Standard deviation of {lower}",
    "_lo": "{title}, lower end of the interval",
    "_hi": "{title}, upper end of the interval",
}


def _known_title(name: str) -> str:
    known = named(name)
    return "" if known is None else known.title


def is_map(stem: str) -> bool:
    """Whether a file's name without its ending is that of a map: `scene_agbd`, `scene_rh98`."""
    return re.search(rf"_({BIOMASS.name}|{_HEIGHT.name}|{_RH.pattern})$", stem) is not None


def unit_text(units: str) -> str:
    """A unit of a band as texts have it: `Mg ha-1` is `Mg/ha`."""
    return _TEXTS.get(units, units)


def _fields(label: Label) -> dict[str, Any]:
    return {name: value for name, value in vars(label).items() if name != "name"}
