"""The six bands: names, HLS band numbers, units, the no-data rule, and which of a file's bands is which.

Bands are found by name and never by position: a file's band descriptions (names or HLS band numbers), or an explicit
list of names. NumPy only, because data preparation uses this module too.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from biomass_jax.data import band_names
from biomass_jax.data.band_names import ANY_NIR, TM, Called
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
# What -9999 becomes where it was cast to a type that can't hold it.
CAST_FILLS = {"uint16": 2**16 + FILL, "uint32": 2**32 + FILL}

_BY_SENSOR = {
    "L30": {band.name: band.l30 for band in BANDS},
    "S30": {band.name: band.s30 for band in BANDS},
    TM: dict(zip(BAND_NAMES, ("B01", "B02", "B03", "B04", "B05", "B07"), strict=True)),  # SR_B6 is no band of theirs
}
_SENSOR_WORDS = {
    "L30": re.compile(r"L30|OLI|LANDSAT(?![-_ ]?[4-7](?!\d))"),
    "S30": re.compile(r"S30|MSI|SENTINEL[-_ ]?2"),
    TM: re.compile(r"LANDSAT[-_ ]?[4-7](?!\d)|(?<![A-Z0-9])E?TM(?![A-Z0-9])"),
}
_WHICH_NIR = (
    "may be the broad near infrared (B08 of Sentinel-2) or the narrow one that is wanted, NIR_NARROW (B8A of "
    "Sentinel-2 and S30, B05 of Landsat 8 and 9 and L30)"
)


# `no_data` in words, for the bundles that rely on it
NO_DATA_RULE = (
    "a pixel is no-data if any used band equals the file's fill or -9999, is NaN or infinite, or if all used bands are "
    "0; such pixels are set to 0 before z-scoring"
)


class BandSelection(NamedTuple):
    """Where the wanted bands lie in a file.

    Attributes:
        indexes: band indexes counted from 1, in the order of the wanted names.
        warnings: sentences for the user, each naming the file.
        sensor: `L30`, `S30`, `L30+S30`, `TM` (Landsat 4 to 7) or None where nothing tells.
        unverified: `numbers` or `positions` where the choice rests on those alone and no sensor is known, else None.
    """

    indexes: tuple[int, ...]
    warnings: tuple[str, ...]
    sensor: str | None
    unverified: str | None


def no_data(image: np.ndarray, fill: float | None = None) -> np.ndarray:
    """Pixels without data: any band equals `fill` or -9999, is NaN or infinite, or all bands are 0 (one 0 is legal).

    In unsigned integers, what -9999 becomes in their type counts as -9999.

    Args:
        image: (..., bands) digital numbers of the used bands, integers or floats.
        fill: the file's own fill value, if it has one.

    Returns:
        bool (...), True where there is no data.
    """
    image = np.asarray(image)
    floating = np.issubdtype(image.dtype, np.floating)
    fills = {float(FILL)} if fill is None or np.isnan(fill) else {float(FILL), float(fill)}
    fills |= {float(CAST_FILLS.get(image.dtype.name, FILL))}
    marks = [image.dtype.type(value) if floating else int(value) for value in fills if floating or value.is_integer()]
    missing = np.zeros(image.shape[:-1], bool)
    zero = np.ones(image.shape[:-1], bool)
    for index in range(image.shape[-1]):  # band by band: temporaries of one band, not of six
        band = image[..., index]
        zero &= band == 0
        for mark in marks:
            missing |= band == mark
        if floating:
            missing |= ~np.isfinite(band)
    return missing | zero


def odd_values(band: np.ndarray, stored: str, tagged: float | None = None) -> tuple[np.ndarray, str] | None:
    """Values of a band that `no_data` means though nothing marks them, and what they are; None of a type without such.

    Args:
        band: numbers as they are stored.
        stored: their type's name.
        tagged: the band's own no-data value, which is not odd.

    Returns:
        bool of the band's shape, and `infinite` (in float32) or which number it is that -9999 became.
    """
    cast = CAST_FILLS.get(stored)
    if cast not in (None, tagged):
        return band == cast, f"{cast}, which is -9999 cast to {stored}"
    if band.dtype.kind != "f":
        return None
    with np.errstate(over="ignore"):
        return np.isinf(band.astype(np.float32, copy=False)), "infinite"


def count_odd(
    oddities: dict[str, tuple[int, int, int]], odd: np.ndarray, what: str, top: int = 0, left: int = 0
) -> None:
    """Count odd values, bool (rows, columns) from (top, left) on, into {what: (values, row, column of the first)}."""
    if odd.any():
        row, column = (int(axis[0]) for axis in np.nonzero(odd))
        number, *first = oddities.get(what, (0, row + top, column + left))
        oddities[what] = (number + int(odd.sum()), first[0], first[1])


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
        descriptions: the file's band descriptions in order: names or numbers as `band_names.called` knows, or None.
        requested: an explicit list as from `parse_band_list`, one entry for each band of the file.
        sensor: `L30`, `S30`, `L30+S30` or `TM` where the granule's name or a tag tells.
        long_names: what tags call each band (HLS's `long_name`), as far as known.
        path: the file, for messages.
        wanted: names to find, in this order.

    Returns:
        BandSelection.

    Raises:
        BandError: wrong count, a band missing or found twice, names or numbers that may mean several bands, or S30
            bands picked by L30 numbers (or the reverse); it names the file, what was found and what was expected.
    """
    unknown = [name for name in wanted if name not in BAND_NAMES]
    if unknown:
        raise BandError(f"unknown band name {', '.join(unknown)}; known names: {', '.join(BAND_NAMES)}")
    where = f"{path}: " if path else ""
    found = f"it has {len(descriptions)} band{'s' * (len(descriptions) != 1)}: {_show(descriptions)}"
    _check_single(descriptions, wanted, where)
    bands, sensor = _read(descriptions, long_names, sensor, where, found)
    names = [one.name for one in bands]
    if requested is not None:
        names = list(requested)
    elif "NIR_NARROW" in wanted:
        names = _with_nir(bands, wanted, sensor, where, found)
    if len(names) != len(descriptions):
        raise BandError(
            f"{where}the band list has {len(names)} entries ({_show(names)}), but {found}; "
            "give one entry for each band, None for an unused one"
        )
    numbers = [one.number for one in bands]
    if requested is not None or set(names) >= set(wanted) or (any(names) and not any(numbers)):
        indexes = _find(names, wanted, wanted, where, found)
    else:
        indexes = _find(numbers, _numbers_of(wanted, descriptions, numbers, sensor, where, found), wanted, where, found)
    _check_choice(indexes, wanted, bands, long_names, sensor, where)
    named = all(bands[i].name is not None for i in indexes)
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


def tells_all(texts: Sequence[str]) -> bool:
    """Whether texts, such as words in the names of files, name all six bands or number them as a sensor does."""
    read = [band_names.called(text) for text in texts]
    names = {"NIR_NARROW" if one.name == ANY_NIR else one.name for one in read}
    numbers = {one.number for one in read}
    return names >= set(BAND_NAMES) or any(numbers >= set(numbering.values()) for numbering in _BY_SENSOR.values())


def sensor_of(text: str) -> str | None:
    """`L30`, `S30`, `TM` or some (`L30+S30`) named in a tag's text (`OLI_TIRS; OLI_TIRS`, `Sentinel-2A`); else None."""
    return "+".join(sensor for sensor, words in _SENSOR_WORDS.items() if words.search(text.upper())) or None


def _check_single(descriptions: Sequence[str | None], wanted: Sequence[str], where: str) -> None:
    """BandError for a file of one band where several are wanted."""
    if len(descriptions) == 1 and len(wanted) > 1:
        raise BandError(
            f"{where}a single band, {len(wanted)} are wanted ({', '.join(wanted)}). Files of one band each make one "
            "image where they lie in one folder and are named alike but for the band (x_B02.tif ..., x_blue.tif ...): "
            "give that folder, or stack them into one file"
        )


def _read(
    descriptions: Sequence[str | None], long_names: Sequence[str | None], sensor: str | None, where: str, found: str
) -> tuple[list[Called], str | None]:
    """What descriptions and tags together call the bands, and the sensor; BandError where two of them disagree."""
    described, around = band_names.read(descriptions)
    tagged, _ = band_names.read([*long_names, *[None] * (len(descriptions) - len(long_names))])
    bands = []
    for index, (first, second) in enumerate(zip(described, tagged, strict=True), 1):
        names = first.name, second.name
        if None not in names and names[0] != names[1] and ANY_NIR not in names:
            raise BandError(
                f"{where}band {index} is named {first.text!r}, but its tags call it {second.text!r}; "
                "correct the one that is wrong"
            )
        exact = second.name if first.name == ANY_NIR else first.name
        numbered = first if first.number else second
        bands.append(Called(first.text, exact or first.name or second.name, numbered.number, numbered.landsat))
    signs: dict[str, list[str]] = {}
    for one in [*described, *tagged]:
        if one.sign:
            signs.setdefault(one.sign, []).append(one.number or str(one.text))
    landsat = {one.number for one in bands if one.landsat}
    if "B06" in landsat:
        signs.setdefault("L30", []).append("SR_B6")
    elif landsat >= set(_BY_SENSOR[TM].values()):
        signs.setdefault(TM, []).append("SR_B1 to SR_B5 and SR_B7 without SR_B6")
    if around and sensor is not None and around not in sensor.split("+"):
        raise BandError(
            f"{where}said to be {sensor}, but its bands' descriptions name {around}; {found}. Correct the file's "
            "name, its SENSOR tag or its descriptions"
        )
    sensor = sensor or around
    if len(signs) > 1 or (signs and sensor is not None and not set(signs) & set(sensor.split("+"))):
        said = f"said to be {sensor}, but " if sensor else ""
        telling = "; ".join(f"{', '.join(sorted(set(what)))} is found on {one} alone" for one, what in signs.items())
        raise BandError(f"{where}{said}{telling}; {found}. Correct the file's name or its SENSOR tag, or its bands")
    if landsat and not signs and sensor not in ("L30", TM):
        raise BandError(
            f"{where}SR_B2 is blue on Landsat 8 and 9 and green on Landsat 4 to 7, and nothing tells which; {found}. "
            "Name the bands with an explicit list (config.bands), or set a SENSOR tag (OLI, TM)"
        )
    return bands, sensor or next(iter(signs), None)


def _with_nir(
    bands: Sequence[Called], wanted: Sequence[str], sensor: str | None, where: str, found: str
) -> list[str | None]:
    """The bands' names, a plain `nir` being NIR_NARROW where it can be no other; BandError where it can."""
    names = [None if one.name == ANY_NIR else one.name for one in bands]
    if "NIR_NARROW" in names:
        return names
    for index, one in enumerate(bands):
        if one.name != ANY_NIR or one.number == "B08":
            continue
        others = set(wanted) - {"NIR_NARROW"} <= set(names)  # else what is missing is said first
        if others and sensor not in ("L30", TM) and one.number not in ("B8A", "B05"):
            answer = [*names[:index], "NIR_NARROW", *names[index + 1 :]]
            raise BandError(
                f"{where}band {index + 1}, {one.text!r}, {_WHICH_NIR}; {found}. If it is the narrow one, say so: "
                f"config.bands='{','.join(map(str, answer))}' (in Python the keyword bands)"
            )
        names[index] = "NIR_NARROW"
    return names


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
    wanted: Sequence[str],
    descriptions: Sequence[str | None],
    numbers: Sequence[str | None],
    sensor: str | None,
    where: str,
    found: str,
) -> list[str]:
    """The sensor's numbers of the wanted bands; BandError where those of the file can't tell its bands."""
    if not any(numbers):
        told = {text for text in descriptions if text}
        alike = len(told) == 1 and sum(map(bool, descriptions)) > 1
        what = "its bands are all called alike" if alike else "no band description"
        what += "" if alike else f" is a band name ({', '.join(wanted)}) or an HLS band number"
        raise BandError(
            f"{where}{what}; {found}. Name its bands with an explicit list (config.bands), None for each unused band"
        )
    if sensor is not None and "+" in sensor:
        raise BandError(
            f"{where}holds both sensors ({sensor}), so band numbers say nothing; {found}. Describe its bands by "
            "name, or give an explicit list (config.bands)"
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
    bands: Sequence[Called],
    long_names: Sequence[str | None],
    sensor: str | None,
    where: str,
) -> None:
    """BandError where a picked band's own description, number or long name says that it is another band."""
    landsat = any(one.landsat for one in bands)
    fitting = set(sensor.split("+")) if sensor else {"L30", TM if landsat else "S30"}
    for name, index in zip(wanted, indexes, strict=True):
        one = bands[index]
        long_name = long_names[index] if index < len(long_names) else None
        known = {name, None, *([ANY_NIR] if name == "NIR_NARROW" else [])}
        strange = [text for text in (one.text, long_name) if band_names.is_unwanted(text)]
        if one.name not in known or strange:
            text = strange[0] if strange else one.text if band_names.called(one.text).telling else long_name
            raise BandError(f"{where}band {index + 1} is taken as {name}, but the file calls it {text!r}")
        if one.number is None:
            continue
        fitting &= {each for each, numbers in _BY_SENSOR.items() if numbers[name] == one.number}
        if not fitting:
            numbering = _BY_SENSOR[sensor if sensor in _BY_SENSOR else "L30"]
            expected = ", ".join(f"{want}={numbering[want]}" for want in wanted)
            raise BandError(
                f"{where}band {index + 1} is taken as {name}, but the file calls it {one.text or long_name!r}; "
                f"expected for {sensor or 'L30'}: {expected}. Check the sensor and the band list"
            )


def _listed_name(entry: object, value: Iterable[Any]) -> str | None:
    text = "" if entry is None else str(entry).strip().strip("'\"").strip()
    if text.casefold() in ("", "none"):
        return None
    name = band_names.called(text).name
    if name not in BAND_NAMES:
        hint = f"; {text} {_WHICH_NIR}: write NIR_NARROW where it is that one" if name == ANY_NIR else ""
        raise BandError(
            f"unknown band name {text!r} in the band list {_show(list(value))}; known names: {', '.join(BAND_NAMES)}, "
            f"and None for an unused band{hint}"
        )
    return name


def _show(values: Iterable[Any]) -> str:
    return "(" + ", ".join("None" if value is None else str(value) for value in values) + ")"
