"""How a file's numbers become digital numbers, reflectance x 10,000 as HLS stores them; whether they can be such."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from biomass_jax.data import bands
from biomass_jax.errors import RasterError

AUTO, FROM_FILE = "auto", "from_file"
# reflectance = scale * number + offset
SCALES = {
    "digital_numbers": (1e-4, 0.0),  # HLS
    "reflectance": (1.0, 0.0),
    "percent": (0.01, 0.0),
    "landsat_c2": (2.75e-5, -0.2),  # USGS, Landsat Collection 2 Level-2 surface reflectance
    "sentinel2_offset": (1e-4, -0.1),  # ESA, Level-2A from processing baseline 04.00 on
}
ENCODINGS = (AUTO, FROM_FILE, *SCALES)

LOWEST, HIGHEST = 0, 16_000  # of nearly all digital numbers; clouds and noise go beyond
_MOST_BEYOND = 0.05
ENOUGH_PIXELS = 1000  # valid ones of a sample; fewer tell nothing
_LANDSAT_C2_ZERO = 0.2 / 2.75e-5  # its number of reflectance 0: 7,273
_OVERRULE = (
    "encoding='digital_numbers' takes them as they are (config.encoding; of training data config.data.encoding, of "
    "granules config.composite.encoding, of composites config.chips.encoding)"
)


def declared(dataset: Any, index: int) -> tuple[float, float] | None:
    """(scale, offset) of a band, from its own header, its tags or the file's; None where none of them tells.

    Args:
        dataset: an open rasterio dataset.
        index: of the band, from 1.
    """
    pair = float(dataset.scales[index - 1]), float(dataset.offsets[index - 1])
    if pair != (1.0, 0.0):
        return pair
    tags = {name.casefold(): value for name, value in {**dataset.tags(), **dataset.tags(index)}.items()}
    scale, offset = _number(tags, "scale_factor", 1.0), _number(tags, "add_offset", 0.0)
    return None if (scale, offset) == (1.0, 0.0) else (scale, offset)


def _number(tags: Mapping[str, str], name: str, default: float) -> float:
    # scenes that were joined carry a value each: `0.0001; 0.0001`
    try:
        values = {float(part) for part in tags[name].split(";")}
    except (KeyError, ValueError):
        return default
    return values.pop() if len(values) == 1 else default


def conversion(
    encoding: str, found: Mapping[str, tuple[float, float] | None], name: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Gain and shift of each band, (bands,) float64: digital number = gain * number + shift; None for 1 and 0.

    Args:
        encoding: one of `ENCODINGS`. `auto` takes files that tell no scale, or that of digital numbers.
        found: what the file tells of each band, by its name.
        name: of the file, for messages.

    Raises:
        RasterError: an unknown encoding, a scale that `auto` doesn't take, or none where `from_file` wants it.
    """
    if encoding not in ENCODINGS:
        raise RasterError(f"encoding is {encoding!r}; expected one of {', '.join(ENCODINGS)}")
    ours = SCALES["digital_numbers"]
    pairs = []
    for band, pair in found.items():
        if encoding == AUTO and pair is not None and not np.allclose(pair, ours, rtol=1e-6, atol=0):
            raise RasterError(
                f"{name}: band {band} has scale {pair[0]:g} and offset {pair[1]:g}; expected none, or {ours[0]:g} and "
                f"{ours[1]:g} ({bands.UNITS}). encoding='{FROM_FILE}' converts it; {_OVERRULE}"
            )
        if encoding == FROM_FILE and pair is None:
            raise RasterError(f"{name}: encoding is '{FROM_FILE}', but the file tells no scale of band {band}")
        pairs.append({AUTO: ours, FROM_FILE: pair}.get(encoding) or SCALES[encoding])
    scales, offsets = np.array(pairs, np.float64).reshape(-1, 2).T
    if np.allclose(scales, ours[0], rtol=1e-6, atol=0) and not offsets.any():
        return None
    return scales / ours[0], offsets / ours[0]


def check_plausible(values: np.ndarray, stored: str, name: str, *, one_of_many: bool = False) -> str | None:
    """Refuse numbers that can't be digital numbers, naming what they probably are.

    Args:
        values: (pixels, bands) numbers with data, of a sample of the image.
        stored: type in which the file holds them.
        name: of the image, for messages.
        one_of_many: whether the image is a chip, which may be all dark water.

    Returns:
        a warning, or None; None as well for fewer than 1,000 pixels.

    Raises:
        RasterError: reflectance, percent, an 8-bit picture, numbers of Landsat Collection 2, or too many beyond
            0 to 16,000.
    """
    if len(values) < ENOUGH_PIXELS:
        return None
    low, middle, high = np.percentile(values, (1, 50, 99))
    fractions = bool((values != np.rint(values)).any())
    beyond = float(((values < LOWEST) | (values > HIGHEST)).mean())
    shown = (
        f"{name}: percentiles 1, 50, 99 of its values ({stored}) are {low:.4g}, {middle:.4g}, {high:.4g} over "
        f"{len(values):,} valid pixels"
    )
    if stored == "uint8":
        what = f"a picture of 8 bits, not {bands.UNITS}; take the product that it was made from"
        raise RasterError(f"{shown}: {what}. {_OVERRULE}")
    probably = None
    if fractions and high <= 2:
        probably = "reflectance"
    elif fractions and high <= 100:
        probably = "percent"
    elif not fractions and low > 0.9 * _LANDSAT_C2_ZERO and high <= 2**16:
        probably = "landsat_c2"
    if probably:
        what = {"landsat_c2": "Landsat Collection 2 numbers"}.get(probably, probably)
        raise RasterError(
            f"{shown}: probably {what}, not {bands.UNITS}; encoding='{probably}' converts them; {_OVERRULE}"
        )
    if beyond > _MOST_BEYOND:
        raise RasterError(
            f"{shown}, {beyond:.0%} of them beyond {LOWEST} to {HIGHEST:,}: not {bands.UNITS}. {_OVERRULE}"
        )
    if high > 100:
        return None
    low_values = f"{shown}: very low for {bands.UNITS}"
    if one_of_many:
        return f"{low_values}; check the file's units"
    raise RasterError(f"{low_values}, perhaps percent: encoding='percent' converts them; {_OVERRULE}")
