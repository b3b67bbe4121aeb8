"""GEDI L2A: which relative height is read, in both versions; every trap of the product falls to its filter."""

import warnings
from datetime import date

import h5py
import numpy as np
import pytest

from biomass_jax.errors import PrepError
from data_prep.gedi import orbits
from data_prep.gedi.footprints import read_footprints, read_settings
from data_prep.gedi.orbits import Filters
from data_prep.season import Season
from tests.data_prep.gedi_files import (
    BEAMS,
    DAY,
    FIRST,
    HEIGHTS,
    HEIGHTS_3,
    NEW,
    a_profile,
    read_granule,
    whole,
    write,
    write_heights,
)

EVERGREEN = {"land_cover_data/pft_class": 2, "lat_lowestmode": -3.0, "sensitivity": 0.9799}
TRAPS = [
    # (what is unlike a good shot, filter that drops it or None)
    ({}, None),
    ({"quality_flag": 0}, "quality_flag"),
    ({"surface_flag": 0}, "surface_flag"),
    ({"rh98": 0.0}, None),
    *(({"rh98": height}, "rh_valid") for height in (-0.01, -9999.0, np.nan, np.inf, 9.96921e36)),
    ({"rh98": 150.0}, None),
    ({"rh98": 150.1}, "max_rh"),
    ({"digital_elevation_model": 1099.9}, None),
    ({"digital_elevation_model": 900.1}, None),
    *(({"digital_elevation_model": dem}, "dem_difference_below") for dem in (1100.0, 900.0, -999999.0, np.nan)),
    ({"elev_lowestmode": -9999.0, "digital_elevation_model": -9999.0}, "dem_difference_below"),
    *(({"degrade_flag": flag}, None) for flag in (3, 8, 10, 68)),
    *(({"degrade_flag": flag}, "degrade_flag") for flag in (4, 34, 50, 255)),
    ({"selected_algorithm": 10}, None),
    ({"land_cover_data/leaf_off_flag": 255}, None),
    ({"land_cover_data/leaf_off_flag": 1}, "leaf_off_flag"),
    ({"land_cover_data/landsat_water_persistence": 10}, "water_persistence_below"),
    ({"land_cover_data/urban_proportion": 50}, "urban_proportion_below"),
    ({"delta_time": DAY + 77 * 86400.0}, "season"),
    ({"sensitivity": 0.9499}, "sensitivity_min"),
    (EVERGREEN, "sensitivity_min_tropical_evergreen"),
]
ORDER = (
    *("quality_flag", "surface_flag", "rh_valid", "max_rh", "dem_difference_below", "degrade_flag", "leaf_off_flag"),
    *("water_persistence_below", "urban_proportion_below", "season", "sensitivity_min"),
    "sensitivity_min_tropical_evergreen",
)
OFF = {"degrade_flag": {"degrade_tens": (), "degrade_ones": ()}}
SEASON = Season(date(2020, 6, 1), date(2020, 9, 16))


@pytest.mark.parametrize(("name", "version"), [(HEIGHTS, 2), (HEIGHTS_3, 3)])
def test_every_trap_falls_to_its_filter_in_both_versions(tmp_path, name, version):
    path = write_heights(tmp_path / name, whole([trap for trap, _ in TRAPS]), version=version)
    table, counts = read_granule(path, season=[SEASON], label="rh98")
    fates = [fate for _, fate in TRAPS]
    assert table["shot_number"].tolist() == [FIRST + k for k, fate in enumerate(fates) if fate is None]
    assert list(counts) == ["shots", *ORDER]
    left = len(TRAPS)
    for step in ORDER:
        left -= fates.count(step)
        assert counts[step] == left, step


def test_each_filter_can_be_turned_off_and_those_of_biomass_have_no_say(tmp_path):
    path = write_heights(tmp_path / HEIGHTS, whole([{}]))
    for step in (step for step in ORDER if step != "season"):
        off = OFF.get(step, {step: 0 if step.startswith(("max", "dem", "water", "urban", "sens")) else False})
        counts = read_granule(path, filters=Filters(**off), label="rh98")[1]
        assert list(counts) == ["shots", *(name for name in ORDER if name not in (step, "season"))]
    of_biomass = Filters(max_agbd=1.0, max_relative_se=0.1, algorithm_10="drop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_granule(path, filters=of_biomass, label="rh98")[1]) == [
            "shots",
            *(name for name in ORDER if name != "season"),
        ]


@pytest.mark.parametrize(("label", "column"), [("rh0", 0), ("rh25", 25), ("rh98", 98), ("rh100", 100)])
def test_the_percentile_of_the_label_is_read_and_no_other(tmp_path, label, column):
    """Of whole orbits and of the few chunks that a box asks for, against the profile that was written."""
    shots = [{"rh98": 60.0 + 3 * k, "lon_lowestmode": -121.0 + k / 100} for k in range(11)]
    path = write_heights(tmp_path / HEIGHTS, whole(shots))
    expected = [a_profile(60.0 + 3 * k)[column] for k in range(11)]
    table, _ = read_granule(path, label=label)
    np.testing.assert_allclose(table[label], expected, rtol=1e-6)
    assert table[label].dtype == np.float32
    part, counts = read_granule(path, label=label, bbox=(-120.955, 36, -120.935, 38))
    np.testing.assert_allclose(part[label], expected[5:7], rtol=1e-6)
    assert counts["box"] == 2


def test_the_table_on_disk_has_the_height_and_no_error(tmp_path):
    path = write_heights(tmp_path / HEIGHTS, whole([{"rh98": 31.25}, {"quality_flag": 0}]))
    made, counts = orbits.convert_granule(path, tmp_path / "out", label="rh98")
    assert made.name == HEIGHTS.replace(".h5", ".parquet")
    table, told = read_footprints(made, label="rh98"), read_settings(made)
    assert table["rh98"].tolist() == [31.25] and table["quality_flag"].tolist() == [1]
    assert not any("agbd" in name or "l4" in name for name in table)
    assert (told["product"], told["label"], told["without_sigma"]) == ("GEDI_L2A", "rh98", {})
    assert told["counts"][:2] == [["shots", 2], ["quality_flag", 1]] and counts["quality_flag"] == 1
    assert "quality_flag" in told["filters"] and "l4_quality_flag" not in told["filters"]
    with pytest.raises(PrepError, match="column agbd: found nothing"):
        read_footprints(made)
    with pytest.raises(PrepError, match="column rh95: found nothing, expected float"):
        read_footprints(made, label="rh95")


def test_what_is_no_l2a_file_is_refused_and_says_what_to_do(tmp_path):
    heights, biomass = write_heights(tmp_path / HEIGHTS, whole([{}])), write(tmp_path / NEW, whole([{}]))
    with pytest.raises(PrepError, match="a GEDI L2A file .*expected L4A .*for labels of heights say label rh98"):
        read_granule(heights)
    with pytest.raises(PrepError, match="a GEDI L4A file .*expected L2A .*for labels of biomass say label agbd"):
        read_granule(biomass, label="rh98")
    for label in ("rh101", "rh", "rh07", "height", "canopy_height"):
        with pytest.raises(PrepError, match=rf"label is '{label}'; expected agbd .* or rh0 to rh100"):
            read_granule(heights, label=label)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((1, 100), "f4"), r"rh has shape \(1, 100\), shot_number \(1,\), and 101 columns are expected"),
        (np.zeros(1, "f4"), r"rh has shape \(1,\), shot_number \(1,\), and 101 columns"),
        (np.zeros((1, 101), "i2"), "rh is int16, expected float32"),  # centimetres
    ],
)
def test_heights_of_another_shape_or_unit_are_no_heights(tmp_path, values, says):
    path = write_heights(tmp_path / HEIGHTS, {"BEAM0101": [{}]}, lacking=("rh",))
    with h5py.File(path, "a") as file:
        file["BEAM0101/rh"] = values
    with pytest.raises(PrepError, match=says), pytest.warns(UserWarning, match="beams absent"):
        read_granule(path, label="rh98")


@pytest.mark.parametrize(
    ("lacking", "step"),
    [("quality_flag", "quality_flag"), ("digital_elevation_model", "dem_difference_below"), ("surface_flag",) * 2],
)
def test_a_subset_without_what_a_filter_needs_is_refused(tmp_path, lacking, step):
    path = write_heights(tmp_path / HEIGHTS, whole([{}]), lacking=(lacking,))
    with pytest.raises(PrepError, match=f"no dataset {lacking}, which filter {step} needs"):
        read_granule(path, label="rh98")


def test_version_3_is_not_read_by_the_names_of_version_2(tmp_path):
    """A file of version 3 that has `quality_flag` too, of an earlier release, is judged by rel3."""
    path = write_heights(tmp_path / HEIGHTS_3, whole([{}, {"quality_flag": 0}]), version=3)
    with h5py.File(path, "a") as file:
        for beam in BEAMS:
            file[f"{beam}/quality_flag"] = np.zeros(len(file[f"{beam}/shot_number"]), "u1")
    assert read_granule(path, label="rh98")[0]["shot_number"].tolist() == [FIRST]
