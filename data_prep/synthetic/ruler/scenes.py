"""The ruler world's images: every pixel tells its row and column, and everything to be dropped carries a poison."""

from datetime import date, datetime, time, timedelta
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biomass_jax.data.bands import BANDS, FILL
from data_prep.synthetic.granule import Overpass
from data_prep.synthetic.ruler.tiles import RulerTile
from data_prep.synthetic.scene import FMASK_FILL

IN_SEASON = 4  # scenes of a season that count
UNUSED = {"L30": ("B01", "B09", "B10", "B11"), "S30": ("B01", "B05", "B06", "B07", "B08", "B09", "B10")}
SCENE_POISONS = {"out_of_season": 3000, "other_year": 2000, "other_sensor": 1500, "older_duplicate": 900}


class PixelState(NamedTuple):
    """What a pixel of a scene is: its Fmask value, what is added to its digital numbers, which of them are fill."""

    fmask: int
    poison: int = 0
    fill: str = ""  # `all` bands, `one` band, or none
    clear: bool = False


STATES = {
    # All that has to be kept: every level of aerosol, water, the unused bit 0, a clear pixel whose Fmask is 0.
    "climatology": PixelState(0b00_000000, clear=True),
    "low": PixelState(0b01_000000, clear=True),
    "average": PixelState(0b10_000000, clear=True),
    "high": PixelState(0b11_000000, clear=True),
    "water": PixelState(0b01_100000, clear=True),
    "cirrus": PixelState(0b01_000001, clear=True),
    # All that has to be dropped.
    "cloud": PixelState(0b11_000010, 7000),
    "adjacent": PixelState(0b01_000100, 500),
    "shadow": PixelState(0b10_001000, -400),
    "snow": PixelState(0b01_010000, 4000),
    "masked": PixelState(FMASK_FILL, 6000),  # values under an Fmask without
    "fill": PixelState(FMASK_FILL, fill="all"),
    "unmasked_fill": PixelState(0b01_000000, fill="all"),
    "one_band": PixelState(0b01_000000, 250, fill="one"),
}
# One row a class of pixels, one column a scene of the season. In rows with one clear state that scene is needed.
PATTERN = [
    ("low", "high", "average", "climatology"),
    ("cloud", "cloud", "cloud", "water"),
    ("adjacent", "shadow", "snow", "high"),
    ("snow", "cloud", "cirrus", "adjacent"),
    ("one_band", "low", "one_band", "average"),
    ("masked", "climatology", "fill", "cloud"),
    ("unmasked_fill", "average", "unmasked_fill", "low"),
    ("low", "cloud", "low", "low"),
    ("water", "adjacent", "water", "cirrus"),
    ("fill", "fill", "low", "fill"),
    ("shadow", "low", "high", "cloud"),
    ("average", "one_band", "adjacent", "shadow"),
    ("low", "low", "low", "low"),
    ("masked", "water", "masked", "one_band"),
    ("cirrus", "snow", "average", "unmasked_fill"),
    ("low", "shadow", "low", "snow"),
    ("cloud", "one_band", "fill", "shadow"),  # never seen: class NEVER, rare
]
NEVER = len(PATTERN) - 1


class RulerScene(NamedTuple):
    """A granule to be made: what it is there for, when and how it was sensed, which column of PATTERN it shows."""

    role: str  # `season` or a key of SCENE_POISONS
    overpass: Overpass
    column: int | None = None


def band_value(name: str, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the digital number of a band at rows and columns (broadcast)."""
    return {
        "BLUE": 1 + rows + 0 * cols,
        "GREEN": 4001 + 0 * rows + cols,
        "RED": 8001 + (rows + 2 * cols) % 1000,
        "NIR_NARROW": 9501 + (2 * rows + cols) % 1000,
        "SWIR_1": 11001 + 0 * (rows + cols),
        "SWIR_2": 12001 + 0 * (rows + cols),
    }[name]


def pixel_classes(shape: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Return (H, W) which row of PATTERN each pixel follows; about one in a hundred is NEVER seen."""
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    classes = (3 * rows + 5 * cols + 7 * (rows // 16) + seed) % NEVER
    return np.where((7 * rows + 11 * cols + seed) % 97 == 5, NEVER, classes).astype(np.uint8)


def clear_counts(shape: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Return (H, W) how many scenes of the season see each pixel clear."""
    counts = [sum(STATES[state].clear for state in states) for states in PATTERN]
    return np.array(counts, np.uint8)[pixel_classes(shape, seed)]


def ruler_image(
    shape: tuple[int, int], seed: int, column: int | None, poison: int = 0
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return (H, W, 6) digital numbers and (H, W) Fmask of one scene.

    Args:
        shape: (H, W).
        seed: shifts the classes of pixels.
        column: which column of PATTERN it shows; None for a clear sky.
        poison: what is added to every pixel.
    """
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    states = [STATES["low"] if column is None else STATES[row[column]] for row in PATTERN]
    classes = pixel_classes(shape, seed)
    added = np.array([state.poison for state in states], np.int16)[classes] + np.int16(poison)
    missing = np.array([["", "all", "one"].index(state.fill) for state in states], np.uint8)[classes]
    image = np.empty((*shape, len(BANDS)), np.int16)
    for index, band in enumerate(BANDS):
        values = band_value(band.name, rows, cols).astype(np.int16) + added
        gone = (missing == 1) | ((missing == 2) & ((rows + cols) % len(BANDS) == index))
        image[..., index] = np.where(gone, FILL, values)
    return image, np.array([state.fmask for state in states], np.uint8)[classes]


def unused_bands(shape: tuple[int, int], sensor: str) -> dict[str, NDArray[np.int16]]:
    """Return (H, W) of each band that nobody uses: 20000 + its number."""
    return {number: np.full(shape, 20000 + int(number[1:]), np.int16) for number in UNUSED[sensor]}


def tile_scenes(tile: RulerTile, year: int, index: int) -> list[RulerScene]:
    """Return a tile's scenes: those of the season, from its first day to its last, and four that don't count.

    Args:
        tile: the tile.
        year: the season's year.
        index: number of the tile; tiles differ in which of two duplicates comes first by name.
    """
    start, stop = tile.season(year)
    days = (stop - start).days
    noon = datetime.combine(start, time(18, 45, 12))
    passes = [noon + timedelta(days=d) for d in (0, days // 3, 2 * days // 3, days - 1)]
    if index == 0:
        passes[2] = passes[1] + timedelta(minutes=10)  # ten minutes apart: no duplicates
    first: dict[str, Any] = {"tile": tile.name, "left": tile.left, "top": tile.top, "epsg": tile.epsg}
    first["user_defined"] = tile.user_defined
    scenes = [
        RulerScene("season", Overpass(time=passes[k], scale=("file", "band", "both")[k % 3], joined=k == 1, **first), k)
        for k in range(IN_SEASON)
    ]
    if tile.epsg // 100 == 326 and tile.top < 0:  # one scene in the usual southern form
        usual = first | {"epsg": tile.epsg + 100, "top": tile.top + 1e7}
        scenes[1] = RulerScene("season", Overpass(time=passes[1], scale="band", joined=True, **usual), 1)
    elif tile.user_defined:
        scenes[2] = RulerScene("season", Overpass(time=passes[2], scale="both", **first | {"user_defined": False}), 2)

    apart = timedelta(minutes=9, seconds=59) if index % 2 else timedelta(seconds=-24)
    processed = scenes[0].overpass.processing_time - timedelta(days=1)

    def other(role: str, when: datetime, **how: Any) -> RulerScene:
        return RulerScene(role, Overpass(time=when, **(first | how)))

    return [
        *scenes,
        other("older_duplicate", passes[0] + apart, processed=processed),
        other("out_of_season", datetime.combine(_outside(start, stop, index), time(18, 45, 12))),
        other("other_year", passes[1] - timedelta(days=366)),
        other("other_sensor", passes[1] + timedelta(minutes=2), sensor="S30", scale="band"),
    ]


def _outside(start: date, stop: date, index: int) -> date:
    """The day before the season, or the first day after it."""
    return stop if index % 2 == 0 else start - timedelta(days=1)
