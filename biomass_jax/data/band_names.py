"""What texts call bands: names in any spelling, numbers of Landsat, Sentinel-2 and HLS; in tags and names of files too.

Nothing is decided here: `bands.resolve` says which band is which.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from biomass_jax.errors import BandError

ANY_NIR = "NIR"  # a near infrared that may be the broad one (Sentinel-2's B08) or the narrow one
TM = "TM"  # what Landsat 4 to 7 carry (ETM+ too); their bands have other numbers than those of Landsat 8 and 9

# Names of the six bands without case and separators: ours, STAC's common names, those of HLS, ESA and other archives.
_ALIASES = {
    "BLUE": ("blue",),
    "GREEN": ("green",),
    "RED": ("red",),
    "NIR_NARROW": ("nirnarrow", "narrownir", "nir08", "nir8a"),
    "SWIR_1": ("swir1", "swir16", "shortwaveinfrared1"),
    "SWIR_2": ("swir2", "swir22", "shortwaveinfrared2"),
    ANY_NIR: ("nir", "nearinfrared"),
}
_NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
# Bands that only one of the sensors has. B11 is no sign: Landsat has a thermal B11.
_S30_ONLY_NUMBERS = frozenset({"B08", "B8A", "B12"})
_S30_ONLY = re.compile(r"rededge\w*|nirbroad|broadnir|watervapou?r")
_L30_ONLY = re.compile(r"lwir1[12]|tirs?[12]")
# SR: surface reflectance of Landsat (SR_B2, sr_band2)
_NUMBER = re.compile(r"(?P<sr>SR[ _-]?)?B(?P<word>AND)?[ _-]?0?(?P<number>\d{1,2}|8A)", re.IGNORECASE)
_SENSOR_IN_NAME = {
    "L30": re.compile(r"(HLS)?L30|L[CO]0[89]|LANDSAT[89]", re.IGNORECASE),
    "S30": re.compile(r"(HLS)?S30|S2[A-D]|SENTINEL2[A-D]?", re.IGNORECASE),
    TM: re.compile(r"LE07|LT0[45]|LANDSAT[4-7]", re.IGNORECASE),
}
_TOKEN = re.compile(r"[A-Za-z0-9]+")
# Beside a band's name these mean that the numbers are no reflectance.
_STATISTICS = re.compile(
    r"std|stdev|stddev|var|variance|count|n?obs|sum|diff\w*|anomaly|trend|slope|err|error|uncertainty|sigma|residuals?|"
    r"qa|qc|mask|cloud\w*|min|max|range|index|z?score",
    re.IGNORECASE,
)
# Sensors whose bands have other numbers (of MODIS, b01 is red), and words that their products have around them.
_OTHER_SENSORS = re.compile(
    r"sur|refl\w*|nadir\w*|modis|m[oy]d\d+\w*|mcd\d+\w*|viirs|vnp\d+\w*|vj\d+\w*|aster|ast|vnir|prisma|enmap|planet\w*|"
    r"rapideye|spot\d?|worldview\d?|wv\d+|olci|s3[ab]|sentinel3\w*",
    re.IGNORECASE,
)
# Tags that name a band, and tags of a file that list its bands
_BAND_TAGS = ("longname", "bandname", "description", "name", "commonname")
_LIST_TAGS = ("longname", "bandnames", "bandname", "bands", "names", "banddescriptions", "descriptions", "description")


class Called(NamedTuple):
    """What a text calls a band.

    Attributes:
        text: the text, or None.
        name: one of the six names, `ANY_NIR`, or None.
        number: `B05` or None.
        landsat: whether the number is one of Landsat's surface reflectance (`SR_B5`).
        sign: `L30` or `S30` where only that sensor has such a band, else None.
    """

    text: str | None
    name: str | None = None
    number: str | None = None
    landsat: bool = False
    sign: str | None = None

    @property
    def telling(self) -> bool:
        """Whether the text is known at all."""
        return bool(self.name or self.number or self.sign)


def plain(text: str | None) -> str:
    """A text without case and separators: `swir1` for `SWIR 1`."""
    return re.sub(r"[^a-z0-9]", "", (text or "").casefold())


def called(text: str | None) -> Called:
    """What a text alone calls a band; nothing for anything but a band's name or number."""
    short = plain(text)
    match = _NUMBER.fullmatch((text or "").strip())
    number = f"B{match['number'].upper():0>2}" if match else None
    landsat = bool(match and match["sr"])
    s30 = _S30_ONLY.fullmatch(short) or (number in _S30_ONLY_NUMBERS and not landsat)
    sign = "L30" if _L30_ONLY.fullmatch(short) else "S30" if s30 else None
    return Called(text, _NAMES.get(short), number, landsat, sign)


def is_unwanted(text: str | None) -> bool:
    """Whether a text names a band that is none of the six: a red edge, the broad near infrared, a thermal one."""
    one = called(text)
    return bool(one.sign and not one.number)


def read(texts: Sequence[str | None]) -> tuple[list[Called], str | None]:
    """What texts call the bands of one file, in order.

    One text for all bands says nothing, nor does `Band 1`, `Band 2` ... that counts positions, as programs write it.
    Words around the names (`HLS.L30.T10SFF.2020183T184512.v2.0.B02`, `B2_median`) are left out where they are the same
    for all.

    Returns:
        one for each text, and the sensor that the words around the names tell, if any.
    """
    told = [text for text in texts if text]
    if len(told) > 1 and len(set(told)) == 1:
        return [Called(text, sign=called(text).sign) for text in texts], None
    found = [called(text) for text in texts]
    around: set[str] = set()
    if not any(one.telling for one in found):
        parts = [split(text or "") for text in texts]
        around = {rest for rest, spans in parts if spans}
        if len(around) == 1:
            found = [_joined(text, spans) for text, (_, spans) in zip(texts, parts, strict=True)]
    if _count_positions(texts):
        found = [one if one.landsat else one._replace(number=None, sign=None) for one in found]
    if len({one.name for one in found}) == 1 and len({one.number for one in found}) > 1:
        found = [one._replace(name=None) for one in found]  # `blue_ridge_B02`, `blue_ridge_B03` ...
    return found, sensor_in(next(iter(around))) if len(around) == 1 else None


def split(text: str) -> tuple[str, list[Called]]:
    """What calls a band within a longer text, and the rest of it; none where a word tells of no reflectance."""
    tokens = list(_TOKEN.finditer(text))
    if any(_STATISTICS.fullmatch(token[0]) for token in tokens):
        return text, []
    spans: list[Called] = []
    rest = []
    at = 0
    while at < len(tokens):
        for length in (3, 2, 1):
            part = tokens[at : at + length]
            one = called("_".join(token[0] for token in part))
            if len(part) == length and one.telling:
                spans.append(one)
                at += length
                break
        else:
            rest.append(tokens[at])
            at += 1
    if any(one.number for one in spans) and any(_OTHER_SENSORS.fullmatch(token[0]) for token in rest):
        return text, []
    joined = ""
    for before, token in zip([None, *rest], rest, strict=False):
        joined += f"{text[before.end()]}{token[0]}" if before else token[0]
    return joined, spans


def sensor_in(name: str) -> str | None:
    """`L30`, `S30` or `TM` where words of a file's name tell (`HLSL30.020`, `LC08`), else None."""
    words = _TOKEN.findall(name)
    found = [sensor for sensor, word in _SENSOR_IN_NAME.items() if any(word.fullmatch(one) for one in words)]
    return found[0] if len(found) == 1 else None


def tagged(band_tags: Sequence[Mapping[str, str]], tags: Mapping[str, str], path: str = "") -> list[str | None]:
    """What a file's tags call its bands: each band's own (`long_name`, `BandName` ...), or a list of the file.

    Args:
        band_tags: of each band.
        tags: of the file.
        path: the file, for messages.

    Raises:
        BandError: two tags that call a band by different names.
    """
    own = [{plain(key): value for key, value in one.items()} for one in band_tags]
    whole = {plain(key): value for key, value in tags.items()}
    lists = [[one.get(key) for one in own] for key in _BAND_TAGS]
    if len(own) == 1:
        lists += [[whole.get(key)] for key in _BAND_TAGS]
    lists += [entries for key in _LIST_TAGS if len(entries := _entries(whole.get(key, ""))) == len(own)]
    lists.append([whole.get(f"band{index}") for index in range(1, len(own) + 1)])  # ENVI's `Band_1=blue`
    found = [read(texts)[0] for texts in lists]
    merged: list[str | None] = []
    for index in range(len(own)):
        known = [one[index] for one in found if one[index].telling]
        names = {one.name: one.text for one in known if one.name}
        if len(names) > 1:
            raise BandError(
                f"{f'{path}: ' if path else ''}its tags call band {index + 1} both "
                f"{' and '.join(repr(text) for text in names.values())}; correct the one that is wrong"
            )
        merged.append(next((one.text for one in sorted(known, key=lambda one: one.name is None)), None))
    return merged


def _count_positions(texts: Sequence[str | None]) -> bool:
    """Whether `Band 1`, `Band 2` ... are but the bands' places in the file."""
    words = [(place, _NUMBER.search(text or "")) for place, text in enumerate(texts, 1)]
    counted = [(place, match["number"]) for place, match in words if match and match["word"] and not match["sr"]]
    return bool(counted) and all(number == str(place) for place, number in counted)


def _joined(text: str | None, spans: Iterable[Called]) -> Called:
    """One name and one number together; nothing where there are several of a kind."""
    names = [one for one in spans if one.name]
    numbers = [one for one in spans if one.number]
    signs = {one.sign for one in spans if one.sign}
    if len(names) > 1 or len(numbers) > 1 or len(signs) > 1:
        return Called(text)
    return Called(
        text,
        names[0].name if names else None,
        numbers[0].number if numbers else None,
        bool(numbers and numbers[0].landsat),
        signs.pop() if signs else None,
    )


def _entries(text: str) -> list[str | None]:
    """`('blue', 'green')`, `["blue", "green"]` or `blue;green` as a list."""
    inner = text.strip().strip("()[]{}")
    separator = next((mark for mark in ",;|\n" if mark in inner), None)
    parts = inner.split(separator) if separator else inner.split()
    return [part.strip().strip("'\"").strip() or None for part in parts]
