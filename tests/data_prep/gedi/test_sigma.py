"""agbd_sigma: closed forms, the product's own prediction interval, and what a file may lack."""

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from data_prep.gedi import orbits
from data_prep.gedi.filters import Filters
from data_prep.gedi.footprints import read_footprints, read_settings
from data_prep.gedi.sigma import StratumModel, agbd_sigma, read_models
from data_prep.synthetic.gedi_file import write_gedi
from tests.data_prep.gedi_files import BEAMS, FIRST, MODELS, NEW, whole, write

STRATA = ("DBT_NAm", "EBT_SA", "GSW_Af")
T = {"DBT_NAm": 8.0, "EBT_SA": 4.5, "GSW_Af": 180.0}
ALL = Filters(
    l4_quality_flag=False,
    agbd_valid=False,
    degrade_tens=(),
    degrade_ones=(),
    algorithm_run_flag=False,
    sensitivity_min=0,
)


def shot(stratum, t, se=0.25):
    return {"predict_stratum": stratum.encode(), "agbd_t": t, "agbd_t_se": se}


def test_square_roots_logs_and_plain_models_have_the_slope_of_their_way_back(tmp_path):
    path = write(tmp_path / NEW, whole([shot(name, T[name]) for name in STRATA]))
    found = orbits.read_granule(path).footprints["agbd_sigma"]
    assert found.dtype == np.float32
    correction = {name: value for name, _, value in MODELS}
    backs = (lambda t: t**2, np.exp, lambda t: t)
    ends = [(back(T[name] - 1e-4), back(T[name] + 1e-4)) for name, back in zip(STRATA, backs, strict=True)]
    by_slope = [correction[name] * (b - a) / 2e-4 * 0.25 for name, (a, b) in zip(STRATA, ends, strict=True)]
    np.testing.assert_allclose(found, by_slope, rtol=1e-6)
    np.testing.assert_allclose(found, [2 * 8 * 0.25 * 1.5625, 1.25 * np.exp(4.5) * 0.25, 0.5 * 0.25], rtol=1e-6)


def test_small_errors_spread_biomass_as_far_as_sigma_says():
    models = {b"a": StratumModel("sqrt", 1.1), b"b": StratumModel("log", 0.9)}
    rng = np.random.default_rng(0)
    for name, t, se, back in ((b"a", 9.0, 0.2, np.square), (b"b", 4.0, 0.02, np.exp)):
        drawn = models[name].bias_correction_value * back(t + se * rng.standard_normal(200_000))
        (sigma,), _ = agbd_sigma(np.array([t]), np.array([se]), np.array([name]), models)
        assert drawn.std() == pytest.approx(sigma, rel=0.01)


def test_what_can_not_be_known_is_nan_and_counted(tmp_path):
    odd = [
        shot("DBT_NAm", 8.0),
        shot("DBT_NAm", -9999),
        shot("DBT_NAm", 8.0, -9999),
        shot("DBT_NAm", np.nan),
        shot("DBT_NAm", 8.0, 0.0),
        shot("", 8.0),
        shot("EBT_SA", 1e3),
        shot("ENT_Eu", 8.0),  # a transform that nobody knows
        shot("DNT_Au", 8.0),
        shot("DBT_NAm", 0.0),
        shot("DBT_NAm", -2.0),
    ]
    path = write(tmp_path / NEW, whole(odd))
    with pytest.warns(
        UserWarning, match="agbd_sigma is NaN for shots 2 of 11 of a stratum without a model in ANCILLARY"
    ):
        made, _ = orbits.convert_granule(path, tmp_path / "out")
    table = read_footprints(made)
    assert np.isfinite(table["agbd_sigma"]).tolist() == [True] + [False] * 10
    assert read_settings(made)["without_sigma"] == {
        "of a stratum without a model in ANCILLARY/model_data": 2,
        "without agbd_t, agbd_t_se or predict_stratum": 6,
        "with agbd_t of 0 or less": 2,
    }


@pytest.mark.parametrize("lacking", ["agbd_t", "agbd_t_se", "predict_stratum", "ANCILLARY"])
@pytest.mark.parametrize("box", [None, (-122, 36, -120, 38)])
def test_a_subset_without_the_inputs_has_no_sigma_and_says_so(tmp_path, lacking, box):
    path = write(tmp_path / NEW, {beam: [{}] * 2 for beam in BEAMS}, lacking=(lacking,))
    if lacking == "ANCILLARY":
        with h5py.File(path, "r+") as file:
            del file[lacking]
    why = "of a stratum without a model" if lacking == "ANCILLARY" else "without agbd_t, agbd_t_se or predict_stratum"
    with pytest.warns(UserWarning, match=f"agbd_sigma is NaN for shots 16 of 16 {why}") as caught:
        made = orbits.read_granule(path, bbox=box)
    assert len(caught) == 1
    assert np.isnan(made.footprints["agbd_sigma"]).all()
    assert sum(made.without_sigma.values()) == 16


def test_strata_may_be_text_of_any_length(tmp_path):
    path = write(tmp_path / NEW, whole([{}, {}]))
    with h5py.File(path, "r+") as file:
        del file["BEAM0101/predict_stratum"]
        file["BEAM0101"].create_dataset("predict_stratum", data=["DBT_NAm", "EBT_SA"], dtype=h5py.string_dtype())
        assert read_models(file)[b"EBT_SA"] == StratumModel("log", 1.25)
    found = orbits.read_granule(path).footprints["agbd_sigma"]
    np.testing.assert_allclose(found, [2 * 8 * 2 * 1.5625, 1.25 * np.exp(8) * 2], rtol=1e-6)


def test_tables_of_earlier_versions_open_without_sigma(tmp_path):
    made, _ = orbits.convert_granule(write(tmp_path / NEW, whole([{}, {}])), tmp_path)
    old = pq.read_table(made)
    pq.write_table(old.drop_columns(["agbd_sigma"]), made)
    table = read_footprints(made)
    assert np.isnan(table["agbd_sigma"]).tolist() == [True, True]
    assert (table["agbd_sigma"].dtype, table["shot_number"].tolist()) == (np.float32, [FIRST, FIRST + 1])


def half_intervals(path):
    """shot_number -> half the product's prediction interval over the quantile of Student's t, where it is finite."""
    found = {}
    with h5py.File(path) as file:
        degrees = {row["predict_stratum"]: row["dof"] for row in file["ANCILLARY/model_data"][:]}
        for beam in (file[name] for name in file if name.startswith("BEAM")):
            names = ("shot_number", "predict_stratum", "agbd_pi_lower", "agbd_pi_upper")
            level = 1 - beam["agbd_prediction"].attrs["alpha"] / 2
            for number, stratum, low, high in zip(*(beam[name][:] for name in names), strict=True):
                if low > 0:
                    found[int(number)] = (high - low) / 2 / stats.t.ppf(level, degrees[stratum])
    return found


def check_against_intervals(path, least):
    half = half_intervals(path)
    table = orbits.read_granule(path, filters=ALL).footprints
    expected = np.array([half.get(number, np.nan) for number in table["shot_number"].tolist()])
    known = np.isfinite(expected)
    sigma, expected = table["agbd_sigma"][known], expected[known]
    assert known.sum() >= least
    np.testing.assert_allclose(sigma, expected, rtol=2e-5)
    return table


def test_it_is_half_a_synthetic_file_s_interval_over_its_quantile(tmp_path):
    count = 400
    rng = np.random.default_rng(1)
    shots = {
        "shot_number": FIRST + np.arange(count),
        "delta_time": np.full(count, 8e7),
        "lat_lowestmode": np.full(count, 37.0),
        "lon_lowestmode": np.full(count, -121.0),
        "agbd": rng.gamma(1.5, 80, count),
        "land_cover_data/pft_class": rng.choice([1, 2, 3, 4, 5, 6, 11], count),
        "land_cover_data/region_class": rng.integers(1, 8, count),
    }
    path = write_gedi(tmp_path / NEW, {beam: shots if beam == "BEAM0101" else none(shots) for beam in BEAMS})
    table = check_against_intervals(path, 300)
    assert (table["agbd_sigma"] > 0).all()
    wide = table["agbd_se"] / table["agbd_sigma"]
    assert not np.allclose(wide, wide[0], rtol=0.1)  # the two aren't the same thing


def none(shots):
    return {name: values[:0] for name, values in shots.items()}


@pytest.mark.filterwarnings("ignore")
def test_it_is_half_the_real_product_s_interval_over_its_quantile(samples):
    (path,) = samples.glob("GEDI04_A_*.h5")
    check_against_intervals(path, 280)
    good = orbits.read_granule(path, filters=Filters(degrade_tens=(), degrade_ones=(), leaf_off_flag=False)).footprints
    sigma = good["agbd_sigma"]
    # FACTS of this granule: mean 16.6, root mean square 20.9 Mg/ha; agbd_se has a mean of 3.0
    assert (np.mean(sigma), np.sqrt(np.mean(sigma**2))) == (pytest.approx(16.6, abs=0.1), pytest.approx(20.9, abs=0.1))
    assert np.mean(good["agbd_se"]) == pytest.approx(3.0, abs=0.05)
