"""Which GEDI shots are kept, of L4A and of L2A: filters in a fixed order, each a setting."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from data_prep.gedi.names import FULL_POWER_BEAMS, Level, level_of
from data_prep.season import Season
from data_prep.settings import Filters

Table = dict[str, np.ndarray]
EPOCH = date(2018, 1, 1)  # of delta_time; no leap second has been since, so UTC counts its seconds
WRONG_RELEASE, WRONG_ALGORITHM = "002_01", 10  # agbd of this algorithm setting is wrong in this release
EVERGREEN_BROADLEAF = 2  # of pft_class
TROPIC = 23.5  # degrees: how far from the equator the tropics reach
BEYOND = 1e9  # Mg/ha, or metres, that nothing reaches: the fill values of other libraries are greater
_HIGHEST = 9000.0  # metres: beyond it, up or down, is no elevation but a fill value (-9999, -999999)
DEFAULT = Filters()
BIOMASS = level_of("agbd")
# Settings that belong to one product alone; the others are about both.
OF_BIOMASS = (
    *("algorithm_run_flag", "l4_quality_flag", "outlier_flag", "agbd_valid", "algorithm_10", "max_relative_se"),
    "max_agbd",
)
OF_HEIGHTS = ("quality_flag", "surface_flag", "rh_valid", "dem_difference_below", "max_rh")


def as_dict(filters: Filters, level: Level = BIOMASS) -> dict[str, Any]:
    """The settings that are about a product, for JSON."""
    others = OF_HEIGHTS if level is BIOMASS else OF_BIOMASS
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(filters).items()}
    return {key: value for key, value in given.items() if key not in others}


class Step(NamedTuple):
    """One filter: its name in counts, the fields it needs, and the mask of shots it keeps."""

    name: str
    needs: tuple[str, ...]
    keep: Callable[[Table], np.ndarray]


def steps(
    filters: Filters, *, naming: int, release: str, seasons: Sequence[Season] | None, level: Level = BIOMASS
) -> list[Step]:
    """The enabled filters in their order.

    Args:
        filters: settings.
        naming: version of dataset names, 2 or 3.
        release: for example `002_01`.
        seasons: shots inside any of them are kept; None for no filter.
        level: the product.
    """
    own = _of_biomass(filters, naming, release) if level is BIOMASS else _of_heights(filters, level.label)
    found = [step for step in (*own, *_of_both(filters, seasons)) if step is not None]
    return [*found, *filter(None, _last_of_biomass(filters) if level is BIOMASS else ())]


def _of_biomass(f: Filters, naming: int, release: str) -> Iterator[Step | None]:
    yield _equals("algorithm_run_flag", "algorithm_run_flag", 1) if f.algorithm_run_flag else None
    if naming == 3:
        both = ("l2a_quality_flag", "l4_quality_flag")
        yield Step(both[1], both, lambda t: (t[both[0]] == 1) & (t[both[1]] == 1)) if f.l4_quality_flag else None
        yield _equals("outlier_flag", "outlier_flag", 0) if f.outlier_flag else None
    else:
        yield _equals("l4_quality_flag", "l4_quality_flag", 1) if f.l4_quality_flag else None
    yield _valid("agbd_valid", "agbd") if f.agbd_valid else None
    if f.degrade_tens or f.degrade_ones:
        yield _equals("degrade_flag", "degrade_include_flag", 1) if naming == 3 else _degrade(f)
    if f.algorithm_10 == "drop" or (f.algorithm_10 == "auto" and release == WRONG_RELEASE):
        yield _differs("selected_algorithm", WRONG_ALGORITHM)


def _of_heights(f: Filters, label: str) -> Iterator[Step | None]:
    """Version 3 has no degrade_include_flag in L2A, so the digits of degrade_flag decide in both versions."""
    yield _equals("quality_flag", "quality_flag", 1) if f.quality_flag else None
    yield _equals("surface_flag", "surface_flag", 1) if f.surface_flag else None
    yield _valid("rh_valid", label) if f.rh_valid else None
    if f.max_rh:
        top = np.float32(f.max_rh)
        yield Step("max_rh", (label,), lambda t: t[label] <= top)
    if f.dem_difference_below:
        yield _near_the_ground(float(f.dem_difference_below))
    yield _degrade(f) if f.degrade_tens or f.degrade_ones else None


def _of_both(f: Filters, seasons: Sequence[Season] | None) -> Iterator[Step | None]:
    yield _differs("leaf_off_flag", 1) if f.leaf_off_flag else None
    yield _below("water_persistence", f.water_persistence_below) if f.water_persistence_below else None
    yield _below("urban_proportion", f.urban_proportion_below) if f.urban_proportion_below else None
    if seasons is not None:
        spans = [((one.start - EPOCH).days * 86400.0, (one.stop - EPOCH).days * 86400.0) for one in seasons]
        yield Step("season", ("delta_time",), lambda t: inside(t["delta_time"], spans))
    if f.sensitivity_min:
        least = f.sensitivity_min
        yield Step("sensitivity_min", ("sensitivity",), lambda t: _sensitive(t, least))
    if f.sensitivity_min_tropical_evergreen:
        bar = f.sensitivity_min_tropical_evergreen
        yield Step(
            "sensitivity_min_tropical_evergreen",
            ("sensitivity", "pft_class"),
            lambda t: _sensitive(t, bar) | (t["pft_class"] != EVERGREEN_BROADLEAF) | (np.abs(t["lat"]) > TROPIC),
        )
    if f.full_power_only:
        yield Step("full_power_only", (), lambda t: np.isin(t["beam"], FULL_POWER_BEAMS))
    if f.night_only:
        yield Step(
            "night_only", ("solar_elevation",), lambda t: (t["solar_elevation"] < 0) & (t["solar_elevation"] >= -90)
        )


def _last_of_biomass(f: Filters) -> Iterator[Step | None]:
    if f.max_relative_se is not None:
        most = float(f.max_relative_se)
        yield Step("max_relative_se", ("agbd_se",), lambda t: _se_within(t["agbd"], t["agbd_se"], most))
    if f.max_agbd is not None:
        top = np.float32(f.max_agbd)
        yield Step("max_agbd", (), lambda t: t["agbd"] <= top)


def _valid(name: str, field: str) -> Step:
    """Numbers from 0 on that can be; NaN compares false without a warning."""
    return Step(name, (field,), lambda t: (t[field] >= 0) & (t[field] < BEYOND))


def _near_the_ground(most: float) -> Step:
    """The ground that GEDI saw within so many metres of a digital elevation model's; without one it can't be told."""

    def keep(t: Table) -> np.ndarray:
        known = (np.abs(t["elev_lowestmode"]) < _HIGHEST) & (np.abs(t["dem"]) < _HIGHEST)
        off = np.abs(np.where(known, t["elev_lowestmode"].astype(np.float64) - t["dem"], np.inf))
        return off < most

    return Step("dem_difference_below", ("elev_lowestmode", "dem"), keep)


def _below(field: str, bar: float) -> Step:
    """Percents below a bar; a fill value is none, being greater than any percent."""
    return Step(f"{field}_below", (field,), lambda t: t[field] < bar)


def _sensitive(t: Table, least: float) -> np.ndarray:
    """Whether sensitivity is a share, and this high; NaN and other fill values are neither."""
    return (t["sensitivity"] >= np.float32(least)) & (t["sensitivity"] <= 1)


def _se_within(agbd: np.ndarray, se: np.ndarray, most: float) -> np.ndarray:
    return (agbd > 0) & (se >= 0) & (se <= most * agbd)  # -9999 is no small error


def _equals(name: str, field: str, value: int) -> Step:
    return Step(name, (field,), lambda t: t[field] == value)


def _differs(field: str, value: int) -> Step:
    return Step(field, (field,), lambda t: t[field] != value)


def _degrade(f: Filters) -> Step:
    tens, ones = f.degrade_tens or tuple(range(26)), f.degrade_ones or tuple(range(10))
    admitted = [flag for flag in range(256) if flag // 10 in tens and flag % 10 in ones]
    return Step("degrade_flag", ("degrade_flag",), lambda t: np.isin(t["degrade_flag"], admitted))


def inside(times: np.ndarray, spans: Iterable[tuple[Any, Any]]) -> np.ndarray:
    """Which times lie in any of the half-open spans; all are seconds of delta_time, or all are dates."""
    kept = np.zeros(times.shape, bool)
    for start, stop in spans:
        kept |= (times >= start) & (times < stop)
    return kept
