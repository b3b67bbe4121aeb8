"""Biomass of footprints as a function of their models' parameters: by differences, on synthetic and real granules."""

import h5py
import numpy as np
import pytest

from biomass_jax.data.gedi import read_gradients
from biomass_jax.errors import RegionalError
from data_prep.synthetic.gedi_file import shot_numbers, write_gedi

NAME = "GEDI04_A_2020183184512_O08852_02_T00198_02_002_02_V002.h5"
COUNT = 50


def granule(folder, name=NAME, orbit=8852):
    rng = np.random.default_rng(orbit)
    beams = {
        beam: {
            "shot_number": shot_numbers(orbit, beam, COUNT),
            "delta_time": np.full(COUNT, 8e7),
            "lat_lowestmode": np.full(COUNT, 37.0),
            "lon_lowestmode": np.full(COUNT, -121.0),
            "agbd": rng.gamma(1.5, 80, COUNT) + 1,
            "land_cover_data/pft_class": rng.choice([1, 2, 5], COUNT),
        }
        for beam in ("BEAM0101", "BEAM1000")
    }
    return write_gedi(folder / name, beams), np.concatenate([shots["shot_number"] for shots in beams.values()])


def biomass(path, number, step):
    """A footprint's biomass, worked out from its file with parameters that are moved by a step."""
    with h5py.File(path) as file:
        for beam in (file[name] for name in file if name.startswith("BEAM")):
            for row in np.flatnonzero(beam["shot_number"][:] == number):
                for model in file["ANCILLARY/model_data"][:]:
                    if model["predict_stratum"] == beam["predict_stratum"][row]:
                        x = np.array([1, *beam["xvar"][row]], float)
                        return model["bias_correction_value"] * max((model["par"] + step) @ x, 0) ** 2
    raise AssertionError(number)


def test_slopes_are_those_of_small_steps(tmp_path):
    path, numbers = granule(tmp_path)
    other, more = granule(tmp_path, NAME.replace("O08852", "O08853"), 8853)
    wanted = np.random.default_rng(0).permutation(np.concatenate([numbers[::7], more[::11]]))
    found = read_gradients([tmp_path], wanted)
    assert found.slope.shape == (len(wanted), 5) and len(set(found.stratum)) == 3
    for place in (0, 3, len(wanted) - 1):
        file = path if wanted[place] in numbers else other
        for parameter in range(2):
            step = np.zeros(5)
            step[parameter] = 1e-4
            difference = (biomass(file, wanted[place], step) - biomass(file, wanted[place], -step)) / 2e-4
            assert found.slope[place, parameter] == pytest.approx(difference, rel=1e-5)
    assert not found.slope[:, 2:].any()
    np.testing.assert_array_equal(found.covariances[found.stratum[0]], np.diag([8.0, 0.08, 0, 0, 0]))
    assert read_gradients([path], wanted[:0]).slope.shape == (0, 0)


def test_granules_that_do_not_fit_are_refused(tmp_path):
    path, numbers = granule(tmp_path)
    with pytest.raises(RegionalError, match=f"1 of 3 footprints, shot_number {numbers[0] + 10**13} first, are in none"):
        read_gradients([path], np.append(numbers[:2], numbers[0] + np.uint64(10**13)))
    (tmp_path / "none").mkdir()
    with pytest.raises(RegionalError, match=r"no GEDI04_A_\*.h5 in it"):
        read_gradients([tmp_path / "none"], numbers)
    (tmp_path / "a.h5").write_bytes(b"nothing")
    with pytest.raises(RegionalError, match="a.h5: can't be read as a whole GEDI L4A granule"):
        read_gradients([tmp_path / "a.h5"], numbers)
    with h5py.File(path, "r+") as file:
        table = file["ANCILLARY/model_data"][:]
        table["par"] *= 1.1
        file["ANCILLARY/model_data"][:] = table
    with pytest.raises(RegionalError, match="agbd_t is .* but xvar and par give"):
        read_gradients([path], numbers)
    with h5py.File(path, "r+") as file:
        table["par"] /= 1.1
        table["vcov"] *= 2
        file["ANCILLARY/model_data"][:] = table
    other, more = granule(tmp_path, NAME.replace("O08852", "O08853"), 8853)
    with pytest.raises(RegionalError, match="isn't that of the granules before; give one release"):
        read_gradients([path, other], np.concatenate([numbers, more]))


def test_a_real_granule_s_errors_are_its_parameters_and_its_residuals(samples):
    """agbd_t_se^2 = rse^2 + x' vcov x, for each of its good shots."""
    (path,) = samples.glob("GEDI04_A_*.h5")
    numbers, expected = [], []
    with h5py.File(path) as file:
        models = {row["predict_stratum"]: row for row in file["ANCILLARY/model_data"][:]}
        for beam in (file[name] for name in file if name.startswith("BEAM")):
            names = ("l4_quality_flag", "agbd_t", "agbd_t_se", "predict_stratum", "shot_number")
            for good, t, se, stratum, number in zip(*(beam[name][:] for name in names), strict=True):
                if good == 1 and t > 0:
                    model = models[stratum]
                    assert model["y_transform"] == b"sqrt"
                    slope = 2 * float(t) * model["bias_correction_value"]
                    numbers.append(number)
                    expected.append(slope**2 * (float(se) ** 2 - float(model["rse"]) ** 2))
    found = read_gradients([path], np.array(numbers, np.uint64))
    own = [slope @ found.covariances[name] @ slope for name, slope in zip(found.stratum, found.slope, strict=True)]
    assert len(own) > 280
    np.testing.assert_allclose(own, expected, rtol=2e-3)
