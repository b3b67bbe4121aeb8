"""The synthetic L2A files: laid out as readers of the product tell, of both versions, and read as such."""

from datetime import datetime

import h5py
import numpy as np
import pytest

from data_prep.gedi.orbits import read_granule
from data_prep.synthetic.gedi_file import seconds_since_epoch, shot_numbers
from data_prep.synthetic.height_file import height_name, height_of, profile_of, write_heights

START = datetime(2020, 7, 1, 18, 45, 12)


def a_beam(count=5):
    return {
        "shot_number": shot_numbers(6515, "BEAM0101", count),
        "delta_time": seconds_since_epoch(START) + np.arange(count) / 128,
        "lat_lowestmode": np.linspace(36, 37, count),
        "lon_lowestmode": np.linspace(-120, -119, count),
        "rh": profile_of(10.0 + 5 * np.arange(count)),
    }


def test_names_are_those_of_the_product():
    assert height_name(START, 8852) == "GEDI02_A_2020183184512_O08852_02_T00198_02_003_01_V002.h5"
    assert height_name(START, 8852, version=3) == "GEDI02_A_2020183184512_O08852_02_T00198_02_004_01_V003.h5"


def test_heights_rise_with_biomass_and_profiles_with_the_share():
    np.testing.assert_allclose(height_of([0, 25, 100, 400]), [2.5, 12.0, 21.5, 40.5])
    profile = profile_of(np.array([12.0, 40.5]))
    assert profile.shape == (2, 101) and (np.diff(profile, axis=1) > 0).all()
    np.testing.assert_allclose(profile[:, 98], [12.0, 40.5], rtol=1e-6)
    assert (profile[:, 0] < 0).all() and (profile[:, 100] > profile[:, 98]).all()


@pytest.mark.parametrize("version", [2, 3])
def test_types_shapes_and_names_of_each_version(tmp_path, version):
    path = write_heights(tmp_path / height_name(START, 6515, version=version), {"BEAM0101": a_beam()}, version=version)
    with h5py.File(path) as file:
        beam = file["BEAM0101"]
        flag = {2: "quality_flag", 3: "l2a_quality_flag_rel3"}[version]
        kinds = {
            **{"rh": "f4", "shot_number": "u8", "delta_time": "f8", "lat_lowestmode": "f8", "sensitivity": "f4"},
            **{flag: "u1", "degrade_flag": "u1", "surface_flag": "u1", "digital_elevation_model": "f4"},
            **{"land_cover_data/leaf_off_flag": "u1", "land_cover_data/landsat_treecover": "f8"},
            **{"geolocation/rh_a1": "i2", f"geolocation/{flag}_a2": "u1", "beam": "u2"},
        }
        assert {name: beam[name].dtype for name in kinds} == {name: np.dtype(kind) for name, kind in kinds.items()}
        assert beam["rh"].shape == beam["geolocation/rh_a5"].shape == (5, 101)
        assert ("quality_flag" in beam) == (version == 2)
        assert ("geolocation/rh_a10" in beam) == ("land_cover_data/worldcover_class" in beam) == (version == 3)
        assert abs(beam["geolocation/rh_a1"][:, 98] / 100.0 - beam["rh"][:, 98]).min() > 0.4
        assert (file.attrs["short_name"], beam.attrs["description"]) == ("GEDI_L2A", "Full power beam")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore:.*beams absent")
def test_the_reader_reads_what_was_written(tmp_path, version):
    shots = a_beam() | {"degrade_flag": [0, 4, 38, 0, 0], "quality_flag": [1, 1, 1, 0, 1]}
    path = write_heights(tmp_path / height_name(START, 6515, version=version), {"BEAM0101": shots}, version=version)
    orbit = read_granule(path, label="rh98")
    np.testing.assert_allclose(orbit.footprints["rh98"], [10, 20, 30], rtol=1e-6)
    assert (orbit.product.level, orbit.product.version) == ("L2A", f"V00{version}")


def test_nothing_unknown_is_written(tmp_path):
    path = tmp_path / height_name(START, 6515)
    for beams, unknown in (({"BEAM0100": a_beam()}, "BEAM0100"), ({"BEAM0101": a_beam() | {"agbd": 0}}, "agbd")):
        with pytest.raises(ValueError, match=f"L2A knows no {unknown}"):
            write_heights(path, beams)
    assert list(tmp_path.iterdir()) == []
