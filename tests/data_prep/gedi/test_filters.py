"""Which GEDI shots are kept: every trap of the product, each filter on and off, version 3."""

import warnings
from datetime import date

import numpy as np
import pytest

from biomass_jax.errors import PrepError
from data_prep.gedi.orbits import Filters
from data_prep.season import Season
from tests.data_prep.gedi_files import DAY, FIRST, NEW, OLD, read_granule, whole, write

EVERGREEN = {"land_cover_data/pft_class": 2, "lat_lowestmode": -3.0, "sensitivity": 0.9799}
TRAPS = [
    # (what is unlike a good shot, filter that drops it or None)
    ({}, None),
    ({"algorithm_run_flag": 0, "l4_quality_flag": 0, "agbd": -9999.0}, "algorithm_run_flag"),
    ({"l4_quality_flag": 0}, "l4_quality_flag"),
    ({"agbd": -9999.0}, "agbd_valid"),
    ({"agbd": np.nan}, "agbd_valid"),
    ({"agbd": np.inf}, "agbd_valid"),
    ({"agbd": 9.96921e36}, "agbd_valid"),  # NetCDF's fill
    ({"agbd": -9998.5}, "agbd_valid"),
    ({"agbd": 0.0}, None),
    ({"agbd": 1296.0}, None),
    *(({"degrade_flag": flag}, None) for flag in (3, 8, 10, 13, 28, 30, 38, 40, 60, 68)),
    *(({"degrade_flag": flag}, "degrade_flag") for flag in (4, 34, 74, 1, 50, 70, 73, 80, 255)),
    ({"selected_algorithm": 10}, "selected_algorithm"),
    ({"land_cover_data/leaf_off_flag": 255}, None),
    ({"land_cover_data/leaf_off_flag": 1}, "leaf_off_flag"),
    ({"land_cover_data/landsat_water_persistence": 9}, None),
    *(({"land_cover_data/landsat_water_persistence": share}, "water_persistence_below") for share in (10, 100, 255)),
    ({"land_cover_data/urban_proportion": 49}, None),
    *(({"land_cover_data/urban_proportion": share}, "urban_proportion_below") for share in (50, 100, 255)),
    ({"delta_time": DAY - 30 * 86400.0}, None),
    ({"delta_time": np.nextafter(DAY - 30 * 86400.0, 0)}, "season"),
    ({"delta_time": DAY + 77 * 86400.0}, "season"),
    ({"delta_time": np.nextafter(DAY + 77 * 86400.0, 0)}, None),
    *(({"sensitivity": share}, None) for share in (np.float32(0.95), 1.0)),
    *(({"sensitivity": share}, "sensitivity_min") for share in (0.9499, np.nan, -9999.0, 1.001)),
    # Evergreen broadleaf forest of the tropics has to be seen through better than elsewhere, and than others there.
    *((EVERGREEN | {"sensitivity": share}, None) for share in (np.float32(0.98), 1.0)),
    *((EVERGREEN | {"lat_lowestmode": lat}, "sensitivity_min_tropical_evergreen") for lat in (-23.5, 0.1, 23.5)),
    *((EVERGREEN | {"lat_lowestmode": lat}, None) for lat in (-23.51, 23.51)),
    *((EVERGREEN | {"land_cover_data/pft_class": pft}, None) for pft in (1, 3, 4, 5)),
]
ORDER = (
    "algorithm_run_flag",
    "l4_quality_flag",
    "agbd_valid",
    "degrade_flag",
    "selected_algorithm",
    "leaf_off_flag",
    "water_persistence_below",
    "urban_proportion_below",
    "season",
    "sensitivity_min",
    "sensitivity_min_tropical_evergreen",
)
DEFAULT = tuple(step for step in ORDER if step != "season")
SEASON = Season(date(2020, 6, 1), date(2020, 9, 16))


@pytest.mark.parametrize(("name", "wrong_algorithm"), [(NEW, False), (OLD, True)])
def test_every_trap_falls_to_its_filter(tmp_path, name, wrong_algorithm):
    path = write(tmp_path / name, whole([trap for trap, _ in TRAPS]))
    fates = [None if fate == "selected_algorithm" and not wrong_algorithm else fate for _, fate in TRAPS]
    table, counts = read_granule(path, season=[SEASON])
    expected = [FIRST + k for k, fate in enumerate(fates) if fate is None]
    assert table["shot_number"].tolist() == expected
    left, chain = len(TRAPS), list(ORDER)
    if not wrong_algorithm:
        chain.remove("selected_algorithm")
    assert list(counts) == ["shots", *chain]
    for step in chain:
        left -= fates.count(step)
        assert counts[step] == left, step


@pytest.mark.parametrize(
    ("setting", "value", "shot"),
    [
        ("full_power_only", True, {}),  # the odd one out lies in a coverage beam
        ("night_only", True, {"solar_elevation": 0.5}),
        ("max_relative_se", 0.5, {"agbd": 9.9}),
        ("max_agbd", 500.0, {"agbd": 500.5}),
    ],
)
def test_filters_off_by_default(tmp_path, setting, value, shot):
    kept = {"sensitivity": 0.98, "solar_elevation": -0.5, "agbd": 500.0 if setting == "max_agbd" else 10.0}
    path = write(tmp_path / NEW, whole([kept]) | {"BEAM0001": [kept | shot]})
    assert len(read_granule(path)[0]["agbd"]) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table, counts = read_granule(path, filters=Filters(**{setting: value}))
    assert table["shot_number"].tolist() == [FIRST + 1]  # BEAM0001 comes first in the file
    assert table["beam"].tolist() == ["BEAM0101"]
    assert list(counts.items())[-1] == (setting, 1)
    assert [setting in str(warning.message) for warning in caught] == [True] * (setting == "max_relative_se")


def test_each_default_filter_can_be_turned_off(tmp_path):
    path = write(tmp_path / OLD, whole([trap for trap, _ in TRAPS]))
    off = {"degrade_flag": {"degrade_tens": (), "degrade_ones": ()}, "selected_algorithm": {"algorithm_10": "keep"}}
    for step in DEFAULT:
        for value in (0, None) if step.endswith("_below") or "sensitivity" in step else (False,):
            counts = read_granule(path, filters=Filters(**off.get(step, {step: value})))[1]
            assert list(counts) == ["shots", *(name for name in DEFAULT if name != step)]
    assert (
        "selected_algorithm"
        in read_granule(write(tmp_path / NEW, whole([{}])), filters=Filters(algorithm_10="drop"))[1]
    )


def test_an_orbit_that_a_filter_empties_is_a_warning_that_names_both(tmp_path):
    path = write(tmp_path / NEW, whole([{"degrade_flag": flag} for flag in (4, 34, 74)]))
    with pytest.warns(UserWarning, match=f"{NEW}: filter degrade_flag drops all of the 3 shots"):
        table, counts = read_granule(path)
    assert len(table["agbd"]) == counts["leaf_off_flag"] == 0


@pytest.mark.parametrize(
    ("lacking", "step"),
    [
        ("land_cover_data/landsat_water_persistence", "water_persistence_below"),
        ("land_cover_data/urban_proportion", "urban_proportion_below"),
        ("sensitivity", "sensitivity_min"),
        ("land_cover_data/pft_class", "sensitivity_min_tropical_evergreen"),
    ],
)
def test_a_subset_that_lacks_what_a_default_filter_needs_is_refused_until_that_is_off(tmp_path, lacking, step):
    path = write(tmp_path / NEW, whole([{}]), lacking=(lacking,))
    with pytest.raises(PrepError, match=f"no dataset {lacking}, which filter {step} needs; .* turn that filter off"):
        read_granule(path)
    off = {step: 0} | ({"sensitivity_min_tropical_evergreen": 0} if lacking == "sensitivity" else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*no dataset {lacking}")  # a column of the table holds no value
        assert read_granule(path, filters=Filters(**off))[0]["shot_number"].tolist() == [FIRST]


def test_several_seasons_widen_the_shots(tmp_path):
    year = 365 * 86400.0
    path = write(tmp_path / NEW, whole([{"delta_time": DAY + k * year} for k in (-2, -1, 0, 1, 2)]))
    assert read_granule(path, season=[SEASON])[1]["season"] == 1
    assert read_granule(path, season=SEASON.widened(1))[1]["season"] == 3


def test_version_3_names(tmp_path):
    renamed = {
        "algorithm_run_flag": "l2_algrunflag",
        "l2_quality_flag": "l2a_quality_flag_rel3",
        "l4_quality_flag": "l4a_quality_flag_rel3",
        "predictor_limit_flag": "degrade_include_flag",
        "response_limit_flag": "elev_highestreturn_outlier_flag",
    }
    good = {"predictor_limit_flag": 1, "response_limit_flag": 0, "degrade_flag": 4}
    bad = [
        {"algorithm_run_flag": 0},
        {"l2_quality_flag": 0},
        {"l4_quality_flag": 0},
        {"response_limit_flag": 1},
        {"agbd": -9999.0},
        {"predictor_limit_flag": 0},
        {"land_cover_data/leaf_off_flag": 1},
    ]
    name = NEW.replace("002_02_V002", "003_01_V003")
    path = write(tmp_path / name, whole([good] + [good | shot for shot in bad]), renamed=renamed)
    table, counts = read_granule(path)
    assert table["shot_number"].tolist() == [FIRST]
    assert (table["l4_quality_flag"][0], table["degrade_flag"][0]) == (1, 4)
    steps = ["algorithm_run_flag", "l4_quality_flag", "outlier_flag", "agbd_valid", "degrade_flag", "leaf_off_flag"]
    assert list(counts.items())[:7] == list(zip(["shots", *steps], [8, 7, 5, 4, 3, 2, 1], strict=True))
    assert list(counts)[7:] == list(DEFAULT[-4:])


@pytest.mark.parametrize(
    ("setting", "value", "good", "fill"),
    [
        ("night_only", True, {"solar_elevation": -5.0}, {"solar_elevation": -9999.0}),
        ("max_relative_se", 0.5, {}, {"agbd_se": -9999.0}),
        ("sensitivity_min", 0.9, {}, {"sensitivity": 9.96921e36}),
    ],
)
def test_no_filter_takes_a_fill_value_for_a_measurement(tmp_path, setting, value, good, fill):
    path = write(tmp_path / NEW, whole([good, fill]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*max_relative_se removes low biomass")
        table, counts = read_granule(path, filters=Filters(**{setting: value}))
    assert table["shot_number"].tolist() == [FIRST]
    assert counts[setting] == 1
