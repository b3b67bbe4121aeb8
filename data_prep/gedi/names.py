"""What GEDI L4A and L2A files call their beams and datasets, in product versions 2 (and 2.1) and 3."""

import re
from collections.abc import Container
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from biomass_jax.data.labels import BIOMASS, percentile
from biomass_jax.errors import PrepError

COVERAGE_BEAMS = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011")
FULL_POWER_BEAMS = ("BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
BEAMS = COVERAGE_BEAMS + FULL_POWER_BEAMS

NO_VALUE = -9999  # stands in the product where a quantity has no value
EXAMPLE = "GEDI04_A_2021150031254_O13948_03_T06447_02_002_01_V002.h5"

_NAME = re.compile(
    r"GEDI0(?P<level>[24])_A_\d{13}_O\d+_\d+_T\d+_\d+_(?P<pge>\d{3})_(?P<production>\d{2})_V(?P<version>\d{3})"
)
_LEVEL = re.compile(r"GEDI(?:0|_?L)(\d)(?:_?([A-D])(?![A-Z]))?", re.IGNORECASE)
# What they hold, and a dataset that beams of no other product have.
PRODUCTS = {
    "L1A": ("waveforms", ""),
    "L1B": ("waveforms", "rxwaveform"),
    "L2A": ("elevations and heights", "rh"),
    "L2B": ("canopy cover and its profile", "pai_z"),
    "L3": ("gridded heights", ""),
    "L4A": ("above-ground biomass", "agbd"),
    "L4B": ("gridded biomass", ""),
    "L4C": ("structural complexity", "wsci"),
    "L4D": ("biomass imputed to a grid", ""),
}


class Field(NamedTuple):
    """One quantity of a shot."""

    datasets: dict[int, str | None]  # its dataset's path below the beam, by product version; None where one has none
    dtype: np.dtype  # what it is held as here
    missing: float | bytes | None  # stands where a file lacks the dataset; None for those that no table can do without
    column: int | None = None  # of a dataset (shots, columns) the one that is read; None for a dataset (shots,)


def _field(dtype: str, missing: float | bytes | None, *paths: str | None) -> Field:
    """A field with one path for both versions, or one for each."""
    return Field({2: paths[0], 3: paths[-1]}, np.dtype(dtype), missing)


# 255 is no value that these flags and classes take (of leaf_off_flag it is "not applicable").
FIELDS: dict[str, Field] = {
    "shot_number": _field("u8", None, "shot_number"),
    "lon": _field("f8", None, "lon_lowestmode"),
    "lat": _field("f8", None, "lat_lowestmode"),
    "delta_time": _field("f8", None, "delta_time"),
    "agbd": _field("f4", None, "agbd"),
    "agbd_se": _field("f4", np.nan, "agbd_se"),
    "sensitivity": _field("f4", np.nan, "sensitivity"),
    "l4_quality_flag": _field("u1", 255, "l4_quality_flag", "l4a_quality_flag_rel3"),
    "degrade_flag": _field("u1", 255, "degrade_flag"),
    "selected_algorithm": _field("u1", 255, "selected_algorithm"),
    "pft_class": _field("u1", 255, "land_cover_data/pft_class"),
    "leaf_off_flag": _field("u1", 255, "land_cover_data/leaf_off_flag"),
    # read for agbd_sigma
    "agbd_t": _field("f4", np.nan, "agbd_t"),
    "agbd_t_se": _field("f4", np.nan, "agbd_t_se"),
    "predict_stratum": _field("S16", b"", "predict_stratum"),
    # read for filters only
    "water_persistence": _field("u1", 255, "land_cover_data/landsat_water_persistence"),
    "urban_proportion": _field("u1", 255, "land_cover_data/urban_proportion"),
    "algorithm_run_flag": _field("u1", 255, "algorithm_run_flag", "l2_algrunflag"),
    "l2a_quality_flag": _field("u1", 255, None, "l2a_quality_flag_rel3"),
    "degrade_include_flag": _field("u1", 255, None, "degrade_include_flag"),
    "outlier_flag": _field("u1", 255, None, "elev_highestreturn_outlier_flag"),
    "solar_elevation": _field("f4", np.nan, "solar_elevation"),
}
_ONLY_VERSION_3 = ("l4a_quality_flag_rel3", "l2a_quality_flag_rel3", "l2_algrunflag", "degrade_include_flag")
HEIGHTS = 101  # columns of `rh`: relative heights at which 0 to 100 % of the returned energy lie below
_IN_BOTH = (
    *("shot_number", "lon", "lat", "delta_time", "sensitivity", "degrade_flag", "selected_algorithm", "pft_class"),
    *("leaf_off_flag", "water_persistence", "urban_proportion", "solar_elevation"),
)
# L2A's own fields beside those that both products have. Version 3 has two quality flags, of which rel3 is its own.
_OF_HEIGHTS = {
    "quality_flag": _field("u1", 255, "quality_flag", "l2a_quality_flag_rel3"),
    "surface_flag": _field("u1", 255, "surface_flag"),
    "elev_lowestmode": _field("f4", np.nan, "elev_lowestmode"),
    "dem": _field("f4", np.nan, "digital_elevation_model"),
}


class Level(NamedTuple):
    """What is read of a product, and into which columns of a table of footprints.

    Attributes:
        product: `L4A` or `L2A`.
        label: name of the column with the label.
        fields: what can be read of a shot.
        columns: those that the table has beside time, beam and granule; the remaining fields are read where a filter
            asks for them.
        inputs: fields from which `agbd_sigma` is made; none where labels have no error.
    """

    product: str
    label: str
    fields: dict[str, Field]
    columns: tuple[str, ...]
    inputs: tuple[str, ...]


_BIOMASS = Level("L4A", BIOMASS.name, FIELDS, tuple(FIELDS)[:12], ("agbd_t", "agbd_t_se", "predict_stratum"))


def level_of(label: str) -> Level:
    """The product that a label comes from: L4A for `agbd`, L2A for `rh0` to `rh100`.

    Raises:
        PrepError: another label.
    """
    if label == BIOMASS.name:
        return _BIOMASS
    share = percentile(label)
    if share is None:
        raise PrepError(f"label is {label!r}; expected agbd (of GEDI L4A), or rh0 to rh100 (heights of GEDI L2A)")
    fields = {name: FIELDS[name] for name in _IN_BOTH} | _OF_HEIGHTS
    fields[label] = _field("f4", None, "rh")._replace(column=share)
    flags = ("sensitivity", "quality_flag", "degrade_flag", "selected_algorithm", "pft_class", "leaf_off_flag")
    return Level("L2A", label, fields, ("shot_number", "lon", "lat", "delta_time", label, *flags), ())


class Product(NamedTuple):
    """What a granule's name tells."""

    level: str  # `L4A` or `L2A`
    granule: str  # NASA's name without what a subsetter appended
    release: str  # `002_01`: the version of the programs and of the production
    version: str  # `V002`


def product_of(name: str) -> Product | None:
    """Read an L4A or L2A file's name (`GEDI04_A_2021150031254_O13948_..._V002_subsetted.h5`), None for others."""
    match = _NAME.search(PurePath(name).name)  # the archive's listings put the collection's name before it
    if match is None:
        return None
    return Product(f"L{match['level']}A", match[0], f"{match['pge']}_{match['production']}", f"V{match['version']}")


_EXPECTED = {
    "L4A": "L4A (above-ground biomass, GEDI04_A_...h5), which `python -m data_prep download gedi` gets",
    "L2A": "L2A (heights, GEDI02_A_...h5), which `python -m data_prep download gedi --label rh98` gets",
}


def other_product(*said: str, datasets: Container[str] = (), expected: str = "L4A") -> str | None:
    """Which product of GEDI a file is, and what to get instead; None for the expected one, and where nothing tells.

    Args:
        said: names that it gives itself, or has, the most trustworthy first (`GEDI_L2A`, `GEDI02_A_2019108002011_...`).
        datasets: those of a beam, which tell more than names.
        expected: the product that is wanted, `L4A` or `L2A`.
    """
    levels = [level for level, (_, mark) in PRODUCTS.items() if mark in datasets]
    for match in filter(None, map(_LEVEL.search, said)):
        levels.append(f"L{match[1]}{(match[2] or '').upper()}")
    if not levels or levels[0] == expected:
        return None
    about = PRODUCTS.get(levels[0], ("another product", ""))[0]
    choose = {"L2A": "; for labels of heights say label rh98", "L4A": "; for labels of biomass say label agbd"}
    return f"a GEDI {levels[0]} file ({about}); expected {_EXPECTED[expected]}{choose.get(levels[0], '')}"


def naming(datasets: Container[str]) -> int:
    """Which version's names a beam uses, from the paths of its datasets: 2 or 3."""
    return 3 if any(name in datasets for name in _ONLY_VERSION_3) else 2
