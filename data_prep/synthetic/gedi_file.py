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

EPOCH = datetime(2018, 1, 1)  # of delta_time, UTC
CHUNK = 14200  # shots, as in the real files
NO_VALUE = -9999.0
_SUB_ORBIT = 2  # the quarter of each orbit
_TEXT = h5py.string_dtype()
_COORDINATES = "delta_time lat_lowestmode lon_lowestmode"
_ALGORITHMS = (1, 2, 10)  # the real files have seven

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
    "predict_stratum": (_TEXT, "GSW_NAm", "-", "Prediction stratum identifier"),
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
        dataset = _create(group, name, np.asarray(values), dtype)
        if "/" not in name:
            dataset.attrs.update(coordinates=_COORDINATES, long_name=long_name, units=units)
    _create(group, "xvar", np.tile(np.array([10.5, 0, 0, 0], np.float32), (count, 1)), "f4")
    group["agbd_prediction"].attrs.update(alpha=0.1, max_nvar=4, predictor_offset=100)


def _create(group: h5py.Group, name: str, values: np.ndarray, dtype: object) -> h5py.Dataset:
    layout = {"maxshape": (None, *values.shape[1:]), "chunks": (CHUNK, *[1] * (values.ndim - 1))}
    return group.create_dataset(name, data=values, dtype=dtype, compression="gzip", compression_opts=4, **layout)


def _derived(beam: str, shots: Mapping[str, Any]) -> dict[str, Any]:
    """Datasets that repeat others, and those of the algorithms that were not selected, which hold other values."""
    number = int(beam.removeprefix("BEAM"), 2)
    agbd, seconds = np.asarray(shots["agbd"], np.float32), np.asarray(shots["delta_time"], np.float64)
    has = np.isfinite(agbd) & (agbd >= 0)
    error = np.where(has, np.float32(3), np.float32(NO_VALUE))
    derived: dict[str, Any] = {
        "agbd_se": error,
        "agbd_t": np.where(has, np.sqrt(np.where(has, agbd, 0)), np.float32(NO_VALUE)),
        "agbd_t_se": error,
        "agbd_pi_lower": np.where(has, np.maximum(agbd - 5, 0), np.float32(NO_VALUE)),
        "agbd_pi_upper": np.where(has, agbd + 5, np.float32(NO_VALUE)),
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


def _write_ancillary(group: h5py.Group) -> None:
    """Write the lookup tables; the models are made up."""
    names = {1: "ENT", 2: "EBT", 3: "DNT", 4: "DBT", 5: "GSW", 6: "GSW", 11: "GSW"}
    regions = {1: "Eu", 2: "NAs", 3: "Au", 4: "Af", 5: "SAs", 6: "SA", 7: "NAm"}
    group["pft_lut"] = np.array(list(names.items()), [("pft_class", "u1"), ("pft_name", _TEXT)])
    group["region_lut"] = np.array(list(regions.items()), [("region_class", "u1"), ("region_name", _TEXT)])
    model = [
        ("predict_stratum", _TEXT),
        ("model_group", "u1"),
        ("model_name", _TEXT),
        ("x_transform", _TEXT),
        ("y_transform", _TEXT),
        ("bias_correction_name", _TEXT),
        ("rh_index", "u1", (8,)),
        ("par", "f8", (5,)),
        ("rse", "f4"),
        ("bias_correction_value", "f4"),
        ("npar", "u1"),
    ]
    strata = [f"{name}_{region}" for name in ("DBT", "EBT", "ENT", "GSW") for region in ("Au", "NAm", "SA")]
    rows = [
        (stratum, 4, stratum, "sqrt", "sqrt", "Snowdon", [50, 98] + [0] * 6, [-100, 7, 3.5, 0, 0], 3, 1.1, 3)
        for stratum in strata
    ]
    group["model_data"] = np.array(rows, model)
