"""Writes GEDI L4A version 2 files: the groups, datasets, types, chunks and attributes of the real product."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from biomass_jax.runtime.files import replacing
from data_prep.gedi.names import BEAMS, FULL_POWER_BEAMS
from data_prep.gedi.sigma import BACK_TRANSFORMS

EPOCH = datetime(2018, 1, 1)  # of delta_time, UTC
CHUNK = 14200  # shots, as in the real files
NO_VALUE = -9999.0
_SUB_ORBIT = 2  # the quarter of each orbit
_TEXT = h5py.string_dtype()
COORDINATES = "delta_time lat_lowestmode lon_lowestmode"
_ALGORITHMS = (1, 2, 10)  # the real files have seven
_ALPHA_QUANTILE = 1.6448536269514722  # of the normal distribution, for the product's intervals of 90 %
_PFT = {1: "ENT", 2: "EBT", 3: "DNT", 4: "DBT", 5: "GSW", 6: "GSW", 11: "GSW"}
_REGIONS = {1: "Eu", 2: "NAs", 3: "Au", 4: "Af", 5: "SAs", 6: "SA", 7: "NAm"}
# of each plant functional type: bias correction, residual standard error in square roots of Mg/ha, degrees of freedom
_FITS = {
    "DBT": (1.0524216, 3.1269765, 2279),
    "EBT": (1.1133657, 3.9209127, 4811),
    "ENT": (1.0125337, 3.3100748, 1983),
    "DNT": (1.0183679, 3.292492, 1983),
    "GSW": (1.1181948, 1.6262748, 87),
}
_PAR = (-124.83228302, 12.42630959)  # of t on xvar, for all of them
_WIDER = 1.004  # agbd_t_se over the residual standard error, of a footprint like those of the fit

# dataset -> (dtype, value where the caller gives none, units, long name); `/` goes into a subgroup
_DATASETS: dict[str, tuple[Any, Any, str, str]] = {
    "agbd": ("f4", NO_VALUE, "Mg / ha", "Aboveground biomass density"),
    "agbd_pi_lower": ("f4", NO_VALUE, "Mg / ha", "Aboveground biomass density lower prediction interval"),
    "agbd_pi_upper": ("f4", NO_VALUE, "Mg / ha", "Aboveground biomass density upper prediction interval"),
    "agbd_se": ("f4", NO_VALUE, "Mg / ha", "Aboveground biomass density prediction standard error"),
    "agbd_t": ("f4", NO_VALUE, "-", "Model prediction"),
    "agbd_t_se": ("f4", NO_VALUE, "-", "Model prediction standard error"),
    "algorithm_run_flag": ("u1", 1, "-", "Algorithm run flag"),
    "beam": ("u2", 0, "-", "Beam"),
    "channel": ("u1", 0, "-", "Channel"),
    "degrade_flag": ("u1", 0, "-", "Degrade flag"),
    "delta_time": ("f8", 0, "s", "Delta time"),
    "elev_lowestmode": ("f4", 250, "m", "Elevation of the lowest mode"),
    "l2_quality_flag": ("u1", 1, "-", "Level 2 quality flag"),
    "l4_quality_flag": ("u1", 1, "-", "Level 4 quality flag"),
    "lat_lowestmode": ("f8", 0, "degrees", "Latitude of the lowest mode"),
    "lon_lowestmode": ("f8", 0, "degrees", "Longitude of the lowest mode"),
    "master_frac": ("f8", 0, "s", "Fraction component of shot time"),
    "master_int": ("u4", 0, "s", "Integer component of shot time"),
    "predict_stratum": (_TEXT, "", "-", "Prediction stratum identifier"),
    "predictor_limit_flag": ("u1", 255, "-", "Predictor is outside the bounds of the training data"),
    "response_limit_flag": ("u1", 255, "-", "Prediction is outside the bounds of the training data"),
    "selected_algorithm": ("u1", 1, "-", "Selected algorithm setting group"),
    "selected_mode": ("u1", 0, "-", "Selected mode"),
    "selected_mode_flag": ("u1", 0, "-", "Selected mode flag"),
    "sensitivity": ("f4", 0.97, "-", "Beam sensitivity"),
    "shot_number": ("u8", 0, "-", "Shot number"),
    "solar_elevation": ("f4", -20, "degrees", "Solar elevation"),
    "surface_flag": ("u1", 1, "-", "Surface flag"),
    "land_cover_data/landsat_treecover": ("f8", 60, "", ""),
    "land_cover_data/landsat_water_persistence": ("u1", 0, "", ""),
    "land_cover_data/leaf_off_doy": ("i2", 290, "", ""),
    "land_cover_data/leaf_off_flag": ("u1", 0, "", ""),
    "land_cover_data/leaf_on_cycle": ("u1", 0, "", ""),
    "land_cover_data/leaf_on_doy": ("i2", 120, "", ""),
    "land_cover_data/pft_class": ("u1", 4, "", ""),
    "land_cover_data/region_class": ("u1", 7, "", ""),
    "land_cover_data/shot_number": ("u8", 0, "", ""),
    "land_cover_data/urban_focal_window_size": ("u1", 3, "", ""),
    "land_cover_data/urban_proportion": ("u1", 0, "", ""),
    "agbd_prediction/shot_number": ("u8", 0, "", ""),
    "geolocation/stale_return_flag": ("u1", 0, "", ""),
    # A reader that takes one algorithm's values for the selected one's finds these.
    **{f"agbd_prediction/agbd_a{number}": ("f4", NO_VALUE, "", "") for number in _ALGORITHMS},
    **{f"agbd_prediction/l4_quality_flag_a{number}": ("u1", 1, "", "") for number in _ALGORITHMS},
    **{f"geolocation/lat_lowestmode_a{number}": ("f8", NO_VALUE, "", "") for number in _ALGORITHMS},
    **{f"geolocation/lon_lowestmode_a{number}": ("f8", NO_VALUE, "", "") for number in _ALGORITHMS},
}


def granule_name(start: datetime, orbit: int, *, version: str = "002_02") -> str:
    """Return a file's name, for example `GEDI04_A_2020183184512_O08852_02_T00198_02_002_02_V002.h5`.

    Args:
        start: when the sub-orbit begins, UTC.
        orbit: orbit number.
        version: release and production version of the product, `002_01` or `002_02`.
    """
    return f"GEDI04_A_{start:%Y%j%H%M%S}_O{orbit:05d}_{_SUB_ORBIT:02d}_T00198_02_{version}_V002.h5"


def shot_numbers(orbit: int, beam: str, count: int) -> NDArray[np.uint64]:
    """Return (count,) shot numbers: orbit, beam, 0, sub-orbit and index digits, too long for a float64."""
    start = ((orbit * 100 + int(beam.removeprefix("BEAM"), 2)) * 1000 + _SUB_ORBIT) * 10**8 + 1
    return np.arange(start, start + count, dtype=np.uint64)


def seconds_since_epoch(time: datetime) -> float:
    """Return the delta_time of a UTC time."""
    return (time - EPOCH) / timedelta(seconds=1)


def write_gedi(path: Path, beams: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write one L4A file through a file beside it.

    Args:
        path: the file, named as the product's files are.
        beams: by beam name, the shots' arrays (N,) by dataset name as in the product; at least shot_number,
            delta_time, lat_lowestmode, lon_lowestmode and agbd. What is not given is filled in. A beam that is not
            named is absent from the file.

    Returns:
        The path.

    Raises:
        ValueError: an unknown beam or dataset.
    """
    unknown = sorted(set(beams) - set(BEAMS)) + sorted({n for shots in beams.values() for n in shots} - set(_DATASETS))
    if unknown:
        raise ValueError(f"{path}: GEDI L4A knows no {', '.join(unknown)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        file.attrs["short_name"] = "GEDI_L4A"
        _write_ancillary(file.create_group("ANCILLARY"))
        for beam in BEAMS:
            if beam in beams:
                _write_beam(file.create_group(beam), beam, dict(beams[beam]))
        file.create_group("METADATA/DatasetIdentification").attrs.update(
            PGEVersion=path.name.split("_")[-2],
            VersionID="02",
            abstract="Synthetic shots in the layout of the GEDI L4A standard data product.",
            fileName=path.name,
            shortName="GEDI_L4A",
            spatialRepresentationType="along-track",
        )
    return path


def _write_beam(group: h5py.Group, beam: str, shots: dict[str, Any]) -> None:
    group.attrs["description"] = "Full power beam" if beam in FULL_POWER_BEAMS else "Coverage beam"
    shots = _derived(beam, shots) | shots
    count = len(shots["shot_number"])
    for name, (dtype, default, units, long_name) in _DATASETS.items():
        values = shots.get(name, default)
        if np.ndim(values) == 0:
            values = np.full(count, values, object if dtype is _TEXT else dtype)
        dataset = create(group, name, np.asarray(values), dtype)
        if "/" not in name:
            dataset.attrs.update(coordinates=COORDINATES, long_name=long_name, units=units)
    xvar = np.zeros((count, 4), np.float32)
    xvar[:, 0] = (np.maximum(np.asarray(shots["agbd_t"], np.float64), 0) - _PAR[0]) / _PAR[1]
    create(group, "xvar", xvar, "f4")
    group["agbd_prediction"].attrs.update(alpha=0.1, max_nvar=4, predictor_offset=100)


def create(group: h5py.Group, name: str, values: np.ndarray, dtype: object) -> h5py.Dataset:
    """A dataset in the product's chunks, of one column where there are several, compressed as the product's are."""
    layout = {"maxshape": (None, *values.shape[1:]), "chunks": (CHUNK, *[1] * (values.ndim - 1))}
    return group.create_dataset(name, data=values, dtype=dtype, compression="gzip", compression_opts=4, **layout)


def _derived(beam: str, shots: Mapping[str, Any]) -> dict[str, Any]:
    """Datasets that repeat others, and those of the algorithms that were not selected, which hold other values."""
    number = int(beam.removeprefix("BEAM"), 2)
    agbd, seconds = np.asarray(shots["agbd"], np.float32), np.asarray(shots["delta_time"], np.float64)
    has = np.isfinite(agbd) & (agbd >= 0)
    derived: dict[str, Any] = _prediction(np.where(has, agbd, 0).astype(np.float64), shots)
    derived = {name: np.where(has, values, NO_VALUE) for name, values in derived.items()}
    derived |= {
        "predict_stratum": _strata(shots, len(agbd)),
        "beam": number,
        "channel": BEAMS.index(beam) // 2 if number < 4 else BEAMS.index(beam) - 2,
        "master_int": np.floor(seconds),
        "master_frac": seconds - np.floor(seconds),
        "land_cover_data/shot_number": shots["shot_number"],
        "agbd_prediction/shot_number": shots["shot_number"],
    }
    for algorithm in _ALGORITHMS:
        derived[f"agbd_prediction/agbd_a{algorithm}"] = np.where(has, agbd + algorithm, np.float32(NO_VALUE))
        for axis in ("lat", "lon"):  # half a millidegree away, some 50 m
            derived[f"geolocation/{axis}_lowestmode_a{algorithm}"] = np.asarray(shots[f"{axis}_lowestmode"]) + 5e-4
    return derived


def fit_error(sigma: np.ndarray, agbd: np.ndarray, pft_class: np.ndarray) -> np.ndarray:
    """The agbd_t_se (N,) with which shots have errors of `sigma` Mg/ha to first order; of biomass 0 the fit's own."""
    correction, error, _ = _fits(pft_class)
    slope = 2 * np.sqrt(correction * agbd)  # of agbd over agbd_t
    return np.where(slope > 0, sigma / np.where(slope > 0, slope, 1), _WIDER * error)


def _classes(shots: Mapping[str, Any], kind: str, count: int) -> np.ndarray:
    name = f"land_cover_data/{kind}_class"
    return np.broadcast_to(np.asarray(shots.get(name, _DATASETS[name][1])), count)


def _strata(shots: Mapping[str, Any], count: int) -> np.ndarray:
    pairs = zip(_classes(shots, "pft", count).tolist(), _classes(shots, "region", count).tolist(), strict=True)
    return np.array([f"{_PFT[pft]}_{_REGIONS[region]}" for pft, region in pairs], object)


def _fits(pft_class: np.ndarray) -> NDArray[np.float64]:
    """Bias correction, residual standard error and degrees of freedom, (3, N), as files hold them."""
    fits = np.array([_FITS[_PFT[pft]] for pft in pft_class.tolist()], np.float32)
    return fits.reshape(-1, 3).T.astype(np.float64)


def _prediction(agbd: np.ndarray, shots: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the product says beside biomass (N,), from 0 on, as it relates them: t, its error, and what follows."""
    correction, error, freedom = _fits(_classes(shots, "pft", len(agbd)))
    t = np.sqrt(agbd / correction)
    t_se = np.asarray(shots.get("agbd_t_se", _WIDER * error), np.float64)
    # Student's quantile from the normal one: Abramowitz and Stegun 26.7.5, right to 1e-6 from 80 degrees on.
    z = _ALPHA_QUANTILE
    quantile = z + (z**3 + z) / 4 / freedom + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / freedom**2
    back = BACK_TRANSFORMS["sqrt"].value
    lower = correction * back(t - quantile * t_se)
    return {
        "agbd_t": t,
        "agbd_t_se": t_se,
        "agbd_se": correction * t_se**2,
        "agbd_pi_lower": np.where(lower > 0, lower, NO_VALUE),
        "agbd_pi_upper": correction * back(t + quantile * t_se),
    }


def _write_ancillary(group: h5py.Group) -> None:
    """Write the lookup tables and the models, one for each plant functional type whatever the region."""
    group["pft_lut"] = np.array(list(_PFT.items()), [("pft_class", "u1"), ("pft_name", _TEXT)])
    group["region_lut"] = np.array(list(_REGIONS.items()), [("region_class", "u1"), ("region_name", _TEXT)])
    model = [
        ("predict_stratum", _TEXT),
        ("model_group", "u1"),
        ("model_name", _TEXT),
        ("model_id", "u1"),
        ("x_transform", _TEXT),
        ("y_transform", _TEXT),
        ("bias_correction_name", _TEXT),
        ("fit_stratum", _TEXT),
        ("rh_index", "u1", (8,)),
        ("predictor_id", "u1", (8,)),
        ("predictor_max_value", "f4", (8,)),
        ("vcov", "f8", (5, 5)),
        ("par", "f8", (5,)),
        ("rse", "f4"),
        ("dof", "u4"),
        ("response_max_value", "f4"),
        ("bias_correction_value", "f4"),
        ("npar", "u1"),
    ]
    none, vcov = [0] * 7, np.diag([8.0, 0.08, 0, 0, 0])
    rows = [
        (f"{name}_{region}", 4, f"{name}_coarse", 1, "sqrt", "sqrt", "Snowdon", name)
        + ([98, *none], [1, *none], [12.7, *none], vcov, [*_PAR, 0, 0, 0], error, freedom, 1768.7, correction, 2)
        for name, (correction, error, freedom) in _FITS.items()
        for region in _REGIONS.values()
    ]
    group["model_data"] = np.array(rows, model)
