"""The six bands: names, HLS band numbers, units, the no-data rule, and which of a file's bands is which.

Bands are found by name and never by position: a file's band descriptions (names or HLS band numbers), or an explicit
list of names. NumPy only, because data preparation uses this module too.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from biomass_jax.errors import BandError


class Band(NamedTuple):
    """One band: its name here, its number in HLS L30 and S30 files, and HLS's long name for it."""

    name: str
    l30: str
    s30: str
    description: str


BANDS: tuple[Band, ...] = (
    Band("BLUE", "B02", "B02", "Blue"),
    Band("GREEN", "B03", "B03", "Green"),
    Band("RED", "B04", "B04", "Red"),
    Band("NIR_NARROW", "B05", "B8A", "NIR_Narrow"),
    Band("SWIR_1", "B06", "B11", "SWIR1"),
    Band("SWIR_2", "B07", "B12", "SWIR2"),
)
BAND_NAMES: tuple[str, ...] = tuple(band.name for band in BANDS)
UNITS = "digital numbers (reflectance x 10000)"
FILL = -9999

# B11 is no sign of a sensor: Landsat has a thermal B11. These exist on Sentinel-2 alone.
_S30_ONLY_NUMBERS = frozenset({"B08", "B8A", "B12"})
_S30_ONLY_LONG_NAMES = frozenset({"rededge1", "rededge2", "rededge3", "nirbroad", "watervapor"})
_BY_SENSOR = {"L30": {band.name: band.l30 for band in BANDS}, "S30": {band.name: band.s30 for band in BANDS}}
_SENSOR_WORDS = {"L30": ("L30", "OLI", "LANDSAT"), "S30": ("S30", "MSI", "SENTINEL-2", "SENTINEL2")}
_NUMBER = re.compile(r"B0?(\d{1,2}|8A)", re.IGNORECASE)  # not "Band 2": there programs number positions


# `no_data` in words, for the bundles that rely on it
NO_DATA_RULE = (
    "a pixel is no-data if any used band equals the file's fill, -9999 or NaN, or if all used bands are 0; "
    "such pixels are set to 0 before z-scoring"
)


class BandSelection(NamedTuple):
    """Where the wanted bands lie in a file.

    Attributes:
        indexes: band indexes counted from 1, in the order of the wanted names.
        warnings: sentences for the user, each naming the file.
        sensor: `L30`, `S30`, `L30+S30` or None where nothing tells.
        unverified: `numbers` or `positions` where the choice rests on those alone and no sensor is known, else None.
    """

    indexes: tuple[int, ...]
    warnings: tuple[str, ...]
    sensor: str | None
    unverified: str | None


def no_data(image: np.ndarray, fill: float | None = None) -> np.ndarray:
    """Pixels without data: any band equals `fill`, -9999 or NaN, or all bands are 0 (a single 0 is legal).

    Args:
        image: (..., bands) digital numbers of the used bands, integers or floats.
        fill: the file's own fill value, if it has one.

    Returns:
        bool (...), True where there is no data.
    """
    image = np.asarray(image)
    floating = np.issubdtype(image.dtype, np.floating)
    fills = {float(FILL)} if fill is None or np.isnan(fill) else {float(FILL), float(fill)}
    marks = [image.dtype.type(value) if floating else int(value) for value in fills if floating or value.is_integer()]
    missing = np.zeros(image.shape[:-1], bool)
    zero = np.ones(image.shape[:-1], bool)
    for index in range(image.shape[-1]):  # band by band: temporaries of one band, not of six
        band = image[..., index]
        zero &= band == 0
        for mark in marks:
            missing |= band == mark
        if floating:
            missing |= np.isnan(band)
    return missing | zero


def parse_band_list(value: Any) -> tuple[str | None, ...] | None:
    """A list of band names, one for each band of a file, None for an unused one.

    Args:
        value: a tuple or list of names and Nones, its text (`(None,'BLUE',...)` or `None,BLUE,...`), or None or "".

    Returns:
        Names as in BAND_NAMES and Nones, or None where no list is given.

    Raises:
        BandError: an unknown name, a name given twice, or no name at all.
    """
    if value is None or (isinstance(value, str) and value.strip().casefold() in ("", "none")):
        return None
    if not isinstance(value, str) and len(value) == 1 and isinstance(value[0], str) and "," in value[0]:
        value = value[0]  # a flag parser's wrapping of `None,BLUE,...`
    if isinstance(value, str):
        value = value.strip().strip("()[]").strip().removesuffix(",").split(",")
    names = tuple(_listed_name(entry, value) for entry in value)
    used = [name for name in names if name is not None]
    if not used:
        raise BandError(f"band list {_show(names)} names no band; expected names among {', '.join(BAND_NAMES)}")
    doubled = sorted({name for name in used if used.count(name) > 1})
    if doubled:
        raise BandError(f"band list {_show(names)} names {', '.join(doubled)} more than once")
    return names


def resolve(
    descriptions: Sequence[str | None],
    requested: Sequence[str | None] | None = None,
    *,
    sensor: str | None = None,
    long_names: Sequence[str | None] = (),
    path: str = "",
    wanted: Sequence[str] = BAND_NAMES,
) -> BandSelection:
    """Find the wanted bands in a file.

    Args:
        descriptions: the file's band descriptions in order: names, HLS band numbers (`B05`), or None.
        requested: an explicit list as from `parse_band_list`, one entry for each band of the file.
        sensor: `L30`, `S30` or `L30+S30` where the granule's name or a tag tells.
        long_names: HLS's `long_name` of each band, as far as known.
        path: the file, for messages.
        wanted: names to find, in this order.

    Returns:
        BandSelection.

    Raises:
        BandError: wrong count, a band missing or found twice, or S30 bands picked by L30 numbers (or the reverse);
            it names the file, what was found and what was expected.
    """
    unknown = [name for name in wanted if name not in BAND_NAMES]
    if unknown:
        raise BandError(f"unknown band name {', '.join(unknown)}; known names: {', '.join(BAND_NAMES)}")
    where = f"{path}: " if path else ""
    found = f"it has {len(descriptions)} bands: {_show(descriptions)}"
    numbers = [_number(text) for text in descriptions]
    sensor = _known_sensor(numbers, long_names, sensor, where, found)
    names = [_canonical(text) for text in descriptions] if requested is None else requested
    if len(names) != len(descriptions):
        raise BandError(
            f"{where}the band list has {len(names)} entries ({_show(names)}), but {found}; "
            "give one entry for each band, None for an unused one"
        )
    if requested is not None or any(name in wanted for name in names):
        indexes = _find(names, wanted, wanted, where, found)
    else:
        indexes = _find(numbers, _numbers_of(wanted, numbers, sensor, where, found), wanted, where, found)
    _check_choice(indexes, wanted, descriptions, numbers, long_names, sensor, where)
    named = all(_canonical(descriptions[i]) is not None for i in indexes)
    unverified = None
    warnings: tuple[str, ...] = ()
    if sensor is None and not named:
        unverified = "numbers" if all(numbers[i] for i in indexes) else "positions"
        warnings = (
            f"{where}the sensor cannot be verified, bands are taken by {unverified} as those of L30: "
            f"{_show([descriptions[i] for i in indexes])} as {', '.join(wanted)}; an S30 file has other numbers "
            "(B8A, B11, B12). Name the bands in their descriptions, or set a SENSOR tag, to be sure",
        )
    return BandSelection(tuple(i + 1 for i in indexes), warnings, sensor, unverified)


def sensor_of(text: str) -> str | None:
    """`L30`, `S30` or `L30+S30` named in a tag's text (`OLI_TIRS; OLI_TIRS`, `Sentinel-2A`, `L30+S30`), else None."""
    found = [sensor for sensor, words in _SENSOR_WORDS.items() if any(word in text.upper() for word in words)]
    return "+".join(found) or None


def _known_sensor(
    numbers: Sequence[str | None], long_names: Sequence[str | None], sensor: str | None, where: str, found: str
) -> str | None:
    """The sensor as claimed, else as the bands tell; BandError where they contradict the claim."""
    signs = sorted(_S30_ONLY_NUMBERS & {number for number in numbers if number})
    signs += [str(name) for name in long_names if _plain(name) in _S30_ONLY_LONG_NAMES]
    if signs and sensor == "L30":
        raise BandError(
            f"{where}said to be L30, but {', '.join(signs)} is found on S30 alone; {found}. "
            "Correct the file's name or its SENSOR tag, or its bands"
        )
    return "S30" if signs and sensor is None else sensor


def _find(
    names: Sequence[str | None], sought: Sequence[str], wanted: Sequence[str], where: str, found: str
) -> list[int]:
    """The place of each sought name, whose band is called as in `wanted`; BandError where it isn't there once."""
    indexes = []
    for name, want in zip(sought, wanted, strict=True):
        places = [i for i, other in enumerate(names) if other == name]
        if len(places) != 1:
            what = "not found" if not places else f"found {len(places)} times, at bands {[i + 1 for i in places]}"
            raise BandError(f"{where}band {want} {what}; {found}")
        indexes += places
    return indexes


def _numbers_of(
    wanted: Sequence[str], numbers: Sequence[str | None], sensor: str | None, where: str, found: str
) -> list[str]:
    """HLS's numbers of the wanted bands; BandError where those of the file can't tell its bands."""
    if not any(numbers):
        raise BandError(
            f"{where}no band description is a band name ({', '.join(wanted)}) or an HLS band number; {found}. "
            "Name its bands with an explicit list (config.bands), None for each unused band"
        )
    if sensor == "L30+S30":
        raise BandError(
            f"{where}holds both sensors, so band numbers say nothing; {found}. Describe its bands by name, "
            "or give an explicit list (config.bands)"
        )
    by_name = _BY_SENSOR[sensor or "L30"]
    missing = [f"{by_name[want]} ({want})" for want in wanted if by_name[want] not in numbers]
    if missing:
        hint = f"bands of {sensor or 'L30'}: "
        if sensor == "S30" and not {"B05", "B06", "B07"}.isdisjoint(numbers):
            hint = "an S30 file with the band numbers of L30 (B05, B06, B07 are red edges on S30): "
        raise BandError(f"{where}{hint}{', '.join(missing)} not found; {found}")
    return [by_name[want] for want in wanted]


def _check_choice(
    indexes: Sequence[int],
    wanted: Sequence[str],
    descriptions: Sequence[str | None],
    numbers: Sequence[str | None],
    long_names: Sequence[str | None],
    sensor: str | None,
    where: str,
) -> None:
    """BandError where a picked band's own description, number or long name says that it is another band."""
    fitting = {"L30", "S30"} if sensor is None else set(sensor.split("+"))
    for name, index in zip(wanted, indexes, strict=True):
        long_name = long_names[index] if index < len(long_names) else None
        for text in (descriptions[index], long_name):
            other = _canonical(text)
            if other not in (None, name) or _plain(text) in _S30_ONLY_LONG_NAMES:
                raise BandError(f"{where}band {index + 1} is taken as {name}, but the file calls it {text!r}")
        number = numbers[index]
        if number is None:
            continue
        fitting &= {one for one in ("L30", "S30") if _BY_SENSOR[one][name] == number}
        if not fitting:
            numbering = _BY_SENSOR["S30" if sensor == "S30" else "L30"]
            expected = ", ".join(f"{want}={numbering[want]}" for want in wanted)
            raise BandError(
                f"{where}band {index + 1} is taken as {name}, but the file calls it {descriptions[index]!r}; "
                f"expected for {sensor or 'L30'}: {expected}. Check the sensor and the band list"
            )


def _listed_name(entry: object, value: Iterable[Any]) -> str | None:
    text = "" if entry is None else str(entry).strip().strip("'\"").strip()
    if text.casefold() in ("", "none"):
        return None
    name = text.upper()
    if name not in BAND_NAMES:
        raise BandError(
            f"unknown band name {text!r} in the band list {_show(list(value))}; known names: {', '.join(BAND_NAMES)}, "
            "and None for an unused band"
        )
    return name


def _plain(text: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", (text or "").casefold())


_PLAIN_NAMES = {_plain(band.name): band.name for band in BANDS}


def _canonical(text: str | None) -> str | None:
    return _PLAIN_NAMES.get(_plain(text))


def _number(text: str | None) -> str | None:
    """`B05` for B05 or b5; None for anything else."""
    match = _NUMBER.fullmatch((text or "").strip())
    return None if match is None else f"B{match[1].upper():0>2}"


def _show(values: Iterable[Any]) -> str:
    return "(" + ", ".join("None" if value is None else str(value) for value in values) + ")"
