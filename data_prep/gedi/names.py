"""What GEDI L4A files call their beams and datasets, in product versions 2 (and 2.1) and 3."""

import re
from collections.abc import Container
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

COVERAGE_BEAMS = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011")
FULL_POWER_BEAMS = ("BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
BEAMS = COVERAGE_BEAMS + FULL_POWER_BEAMS

NO_VALUE = -9999  # stands in the product where a quantity has no value
EXAMPLE = "GEDI04_A_2021150031254_O13948_03_T06447_02_002_01_V002.h5"

_NAME = re.compile(r"GEDI04_A_\d{13}_O\d+_\d+_T\d+_\d+_(?P<pge>\d{3})_(?P<production>\d{2})_V(?P<version>\d{3})")
_LEVEL = re.compile(r"GEDI(?:0|_?L)(\d)(?:_?([A-D])(?![A-Z]))?", re.IGNORECASE)
# What they hold, and a dataset that beams of no other product have.
OTHER_PRODUCTS = {
    "L1A": ("waveforms", ""),
    "L1B": ("waveforms", "rxwaveform"),
    "L2A": ("elevations and heights", "rh"),
    "L2B": ("canopy cover and its profile", "pai_z"),
    "L3": ("gridded heights", ""),
    "L4B": ("gridded biomass", ""),
    "L4C": ("structural complexity", "wsci"),
    "L4D": ("biomass imputed to a grid", ""),
}


class Field(NamedTuple):
    """One quantity of a shot."""

    datasets: dict[int, str | None]  # its dataset's path below the beam, by product version; None where one has none
    dtype: np.dtype  # what it is held as here
    missing: float | bytes | None  # stands where a file lacks the dataset; None for those that no table can do without


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
# The table's own columns; the remaining fields are read where a filter asks for them.
COLUMNS = tuple(FIELDS)[:12]
_ONLY_VERSION_3 = ("l4a_quality_flag_rel3", "l2a_quality_flag_rel3", "l2_algrunflag", "degrade_include_flag")


class Product(NamedTuple):
    """What a granule's name tells."""

    granule: str  # NASA's name without what a subsetter appended
    release: str  # `002_01`: the version of the programs and of the production
    version: str  # `V002`


def product_of(name: str) -> Product | None:
    """Read a file's name (`GEDI04_A_2021150031254_O13948_03_T06447_02_002_01_V002_subsetted.h5`), None for others."""
    match = _NAME.search(PurePath(name).name)  # the archive's listings put the collection's name before it
    if match is None:
        return None
    return Product(match[0], f"{match['pge']}_{match['production']}", f"V{match['version']}")


def other_product(*said: str, datasets: Container[str] = ()) -> str | None:
    """Which product of GEDI a file is, and what to get instead; None for L4A, and where nothing tells.

    Args:
        said: names that it gives itself, or has, the most trustworthy first (`GEDI_L2A`, `GEDI02_A_2019108002011_...`).
        datasets: those of a beam, which tell more than names.
    """
    levels = [level for level, (_, mark) in OTHER_PRODUCTS.items() if mark in datasets]
    for match in filter(None, map(_LEVEL.search, said)):
        levels.append(f"L{match[1]}{(match[2] or '').upper()}")
    if not levels or levels[0] == "L4A":
        return None
    about = OTHER_PRODUCTS.get(levels[0], ("another product", ""))[0]
    return (
        f"a GEDI {levels[0]} file ({about}); expected L4A (above-ground biomass, GEDI04_A_...h5), which "
        "`python -m data_prep download gedi` gets"
    )


def naming(datasets: Container[str]) -> int:
    """Which version's names a beam uses, from the paths of its datasets: 2 or 3."""
    return 3 if any(name in datasets for name in _ONLY_VERSION_3) else 2
