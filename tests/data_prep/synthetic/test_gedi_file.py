"""The synthetic GEDI files: laid out as the real product is."""

from datetime import datetime

import h5py
import numpy as np
import pytest
from scipy import stats

from data_prep.synthetic.gedi_file import fit_error, granule_name, seconds_since_epoch, shot_numbers, write_gedi

START = datetime(2020, 7, 1, 18, 45, 12)


def a_beam(count: int = 5) -> dict:
    return {
        "shot_number": shot_numbers(6515, "BEAM0101", count),
        "delta_time": seconds_since_epoch(START) + np.arange(count) / 128,
        "lat_lowestmode": np.linspace(36, 37, count),
        "lon_lowestmode": np.linspace(-120, -119, count),
        "agbd": np.arange(count) * 10.0,
    }


def test_names_and_numbers_are_those_of_the_product():
    name = granule_name(START, 8852, version="002_01")
    assert name == "GEDI04_A_2020183184512_O08852_02_T00198_02_002_01_V002.h5"
    # The first shots of beam 0101 in the file of orbit 6515 that tests/../samples holds.
    assert shot_numbers(6515, "BEAM0101", 2).tolist() == [65150500200000001, 65150500200000002]
    assert len(set(shot_numbers(6515, "BEAM0101", 9).astype(float))) < 9
    assert seconds_since_epoch(datetime(2018, 1, 2)) == 86400


def test_groups_types_and_attributes_are_those_of_a_real_file(tmp_path, samples):
    ours = write_gedi(tmp_path / granule_name(START, 6515), {"BEAM0101": a_beam()})
    (real,) = samples.glob("GEDI04_A_*.h5")
    with h5py.File(ours) as mine, h5py.File(real) as theirs:
        assert set(mine) == {"BEAM0101", "ANCILLARY", "METADATA"}
        assert dict(mine.attrs) == dict(theirs.attrs)
        assert dict(mine["BEAM0101"].attrs) == dict(theirs["BEAM0101"].attrs)
        assert set(mine["METADATA/DatasetIdentification"].attrs) <= set(theirs["METADATA/DatasetIdentification"].attrs)
        for table in ("pft_lut", "region_lut"):
            assert sorted(mine["ANCILLARY"][table][:].tolist()) == sorted(theirs["ANCILLARY"][table][:].tolist())
        model, real_model = (file["ANCILLARY/model_data"].dtype for file in (mine, theirs))
        assert {name: model[name] for name in model.names}.items() <= {
            n: real_model[n] for n in real_model.names
        }.items()

        # All that stands in the beam itself and under land_cover_data; of the rest some.
        for group in ("BEAM0101", "BEAM0101/land_cover_data"):
            assert set(mine[group]) == set(theirs[group])
        found = []
        mine["BEAM0101"].visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        assert len(found) > 50
        for name in found:
            a, b = mine["BEAM0101"][name], theirs["BEAM0101"][name]
            assert (a.dtype, a.chunks, a.compression, a.maxshape[0]) == (b.dtype, b.chunks, b.compression, None), name
            assert h5py.check_string_dtype(a.dtype) == h5py.check_string_dtype(b.dtype), name
            if "/" not in name and name != "xvar":
                assert (a.attrs["units"], a.attrs["long_name"]) == (b.attrs["units"], b.attrs["long_name"]), name


def test_values_are_as_given_and_the_rest_as_in_good_shots(tmp_path):
    shots = a_beam() | {"degrade_flag": [0, 4, 38, 34, 74], "agbd": [0.0, -9999, np.nan, 12.5, 1.5e7]}
    path = write_gedi(tmp_path / granule_name(START, 6515), {"BEAM0101": shots, "BEAM0000": a_beam(2)})
    with h5py.File(path) as file:
        beam = file["BEAM0101"]
        np.testing.assert_array_equal(beam["shot_number"][:], shots["shot_number"])
        np.testing.assert_array_equal(beam["land_cover_data/shot_number"][:], shots["shot_number"])
        np.testing.assert_array_equal(beam["agbd"][:], np.float32(shots["agbd"]))
        np.testing.assert_array_equal(beam["degrade_flag"][:], shots["degrade_flag"])
        assert (beam["agbd_se"][:] == -9999).tolist() == [False, True, True, False, False]
        assert (beam["l4_quality_flag"][:] == 1).all()
        assert (beam["predictor_limit_flag"][:] == 255).all()
        assert beam["predict_stratum"].asstr()[0] == "DBT_NAm"
        whole = beam["master_int"][:] + beam["master_frac"][:]
        np.testing.assert_array_equal(whole, beam["delta_time"][:])
        assert beam["beam"][0] == 5
        assert (file["BEAM0000"].attrs["description"], beam.attrs["description"]) == (
            "Coverage beam",
            "Full power beam",
        )
        # What another algorithm makes of a shot is not what the selected one makes of it.
        assert (beam["agbd_prediction/agbd_a10"][:] != beam["agbd"][:]).sum() >= 4
        assert (beam["geolocation/lat_lowestmode_a10"][:] != beam["lat_lowestmode"][:]).all()


def check_relations(file):
    """What the product says of a shot's biomass, recomputed from t, its error and the stratum's model."""
    models, checked = {row["predict_stratum"]: row for row in file["ANCILLARY/model_data"][:]}, 0
    for beam in (file[name] for name in file if name.startswith("BEAM")):
        good = beam["agbd"][:] >= 0
        assert (beam["agbd_pi_upper"][:][~good] == -9999).all()
        names = ("agbd", "agbd_t", "agbd_t_se", "agbd_se", "agbd_pi_lower", "agbd_pi_upper")
        agbd, t, t_se, se, low, high = (beam[name][:][good].astype(float) for name in names)
        rows = [models[stratum] for stratum in beam["predict_stratum"][:][good]]
        par = np.array([row["par"] for row in rows]).reshape(-1, 5)
        factor, dof = (np.array([row[name] for row in rows], float) for name in ("bias_correction_value", "dof"))
        assert {row["y_transform"] for row in rows} <= {b"sqrt"}
        q = stats.t.ppf(1 - beam["agbd_prediction"].attrs["alpha"] / 2, dof)
        np.testing.assert_allclose(t, par[:, 0] + (par[:, 1:] * beam["xvar"][:][good]).sum(1), atol=2e-4)
        np.testing.assert_allclose(agbd, factor * t**2, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(se, factor * t_se**2, rtol=1e-5)
        np.testing.assert_allclose(high, factor * (t + q * t_se) ** 2, rtol=1e-5)
        cut = t <= q * t_se
        np.testing.assert_allclose(low, np.where(cut, -9999, factor * (t - q * t_se) ** 2), rtol=1e-4, atol=1e-3)
        checked += len(t)
    return checked


def test_biomass_its_errors_and_intervals_are_related_as_in_the_product(tmp_path, samples):
    kinds = {"land_cover_data/pft_class": [1, 2, 3, 5, 11], "agbd_t_se": [0.5, 2, 1, 3, 4]}
    beams = {"BEAM0101": a_beam() | kinds | {"agbd": [0, 3.5, 400, -9999, 1.5e7]}, "BEAM0000": a_beam(60)}
    path = write_gedi(tmp_path / granule_name(START, 6515), beams)
    (real,) = samples.glob("GEDI04_A_*.h5")
    with h5py.File(path) as file, h5py.File(real) as theirs:
        assert check_relations(file) == 64
        assert check_relations(theirs) == 438
        assert file["ANCILLARY/model_data"].dtype == theirs["ANCILLARY/model_data"].dtype
        strata = [set(one["ANCILLARY/model_data"]["predict_stratum"]) for one in (file, theirs)]
        assert strata[0] == strata[1]


def test_an_error_in_biomass_becomes_one_of_the_prediction():
    pft_class, agbd = np.array([1, 2, 4, 4]), np.array([50.0, 300.0, 2.0, 0.0])
    t_se = fit_error(np.array([3.0, 25.0, 4.0, 3.0]), agbd, pft_class)
    factor = np.array([1.0125337, 1.1133657, 1.0524216])
    np.testing.assert_allclose(2 * np.sqrt(agbd[:3] / factor) * t_se[:3] * factor, [3, 25, 4], rtol=1e-6)
    assert 3 < t_se[3] < 3.2  # that of the fit: biomass of 0 has no error to first order


def test_nothing_unknown_is_written(tmp_path):
    path = tmp_path / granule_name(START, 6515)
    for beams, unknown in (({"BEAM0100": a_beam()}, "BEAM0100"), ({"BEAM0101": a_beam() | {"agdb": 0}}, "agdb")):
        with pytest.raises(ValueError, match=f"knows no {unknown}"):
            write_gedi(path, beams)
    with pytest.raises(KeyError):
        write_gedi(path, {"BEAM0101": {"agbd": np.zeros(3)}})
    assert list(tmp_path.iterdir()) == []
