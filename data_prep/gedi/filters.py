"""Which GEDI L4A shots are kept: filters in a fixed order, each a setting."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from data_prep.gedi.names import FULL_POWER_BEAMS
from data_prep.season import Season
from data_prep.settings import Filters

Table = dict[str, np.ndarray]
EPOCH = date(2018, 1, 1)  # of delta_time; no leap second has been since, so UTC counts its seconds
WRONG_RELEASE, WRONG_ALGORITHM = "002_01", 10  # agbd of this algorithm setting is wrong in this release
EVERGREEN_BROADLEAF = 2  # of pft_class
TROPIC = 23.5  # degrees: how far from the equator the tropics reach
BEYOND = 1e9  # Mg/ha that nothing reaches: the fill values of other libraries are greater
DEFAULT = Filters()


def as_dict(filters: Filters) -> dict[str, Any]:
    """The settings for JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(filters).items()}


class Step(NamedTuple):
    """One filter: its name in counts, the fields it needs, and the mask of shots it keeps."""

    name: str
    needs: tuple[str, ...]
    keep: Callable[[Table], np.ndarray]


def steps(filters: Filters, *, naming: int, release: str, seasons: Sequence[Season] | None) -> list[Step]:
    """The enabled filters in their order.

    Args:
        filters: settings.
        naming: version of dataset names, 2 or 3.
        release: for example `002_01`.
        seasons: shots inside any of them are kept; None for no filter.
    """
    return [step for step in _all_steps(filters, naming, release, seasons) if step is not None]


def _all_steps(f: Filters, naming: int, release: str, seasons: Sequence[Season] | None) -> Iterator[Step | None]:
    yield _equals("algorithm_run_flag", "algorithm_run_flag", 1) if f.algorithm_run_flag else None
    if naming == 3:
        both = ("l2a_quality_flag", "l4_quality_flag")
        yield Step(both[1], both, lambda t: (t[both[0]] == 1) & (t[both[1]] == 1)) if f.l4_quality_flag else None
        yield _equals("outlier_flag", "outlier_flag", 0) if f.outlier_flag else None
    else:
        yield _equals("l4_quality_flag", "l4_quality_flag", 1) if f.l4_quality_flag else None
    # NaN compares false without a warning
    yield Step("agbd_valid", ("agbd",), lambda t: (t["agbd"] >= 0) & (t["agbd"] < BEYOND)) if f.agbd_valid else None
    if f.degrade_tens or f.degrade_ones:
        yield _equals("degrade_flag", "degrade_include_flag", 1) if naming == 3 else _degrade(f)
    if f.algorithm_10 == "drop" or (f.algorithm_10 == "auto" and release == WRONG_RELEASE):
        yield _differs("selected_algorithm", WRONG_ALGORITHM)
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
    if f.max_relative_se is not None:
        most = float(f.max_relative_se)
        yield Step("max_relative_se", ("agbd_se",), lambda t: _se_within(t["agbd"], t["agbd_se"], most))
    if f.max_agbd is not None:
        top = np.float32(f.max_agbd)
        yield Step("max_agbd", (), lambda t: t["agbd"] <= top)


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
