"""Tiny GEDI L4A and L2A files for tests, made by hand: one shot for each point that a reader may get wrong."""

from datetime import date

import h5py
import numpy as np

from data_prep.gedi import orbits

NEW = "GEDI04_A_2020183184512_O08852_02_T00198_02_002_02_V002.h5"
OLD = NEW.replace("002_02", "002_01")
DAY = (date(2020, 7, 1) - date(2018, 1, 1)).days * 86400.0
FIRST = 88520500200000001  # above 2**53: its neighbours are one number in float64
BEAMS = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011", "BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
GOOD = {
    "lon_lowestmode": ("f8", -121.0),
    "lat_lowestmode": ("f8", 37.0),
    "delta_time": ("f8", DAY),
    "agbd": ("f4", 100.0),
    "agbd_se": ("f4", 5.0),
    "agbd_t": ("f4", 8.0),
    "agbd_t_se": ("f4", 2.0),
    "predict_stratum": ("S7", b"DBT_NAm"),
    "sensitivity": ("f4", 0.97),
    "solar_elevation": ("f4", 30.0),
    "algorithm_run_flag": ("u1", 1),
    "l2_quality_flag": ("u1", 1),
    "l4_quality_flag": ("u1", 1),
    "degrade_flag": ("u1", 0),
    "selected_algorithm": ("u1", 1),
    "predictor_limit_flag": ("u1", 255),
    "response_limit_flag": ("u1", 255),
    "land_cover_data/pft_class": ("u1", 4),
    "land_cover_data/landsat_water_persistence": ("u1", 0),
    "land_cover_data/urban_proportion": ("u1", 0),
    "land_cover_data/leaf_off_flag": ("u1", 0),
}


MODEL = [("predict_stratum", "S7"), ("y_transform", "S8"), ("bias_correction_value", "f4")]
MODELS = [("DBT_NAm", "sqrt", 1.5625), ("EBT_SA", "log", 1.25), ("GSW_Af", "none", 0.5), ("ENT_Eu", "cubic", 1)]


def write(path, beams, *, chunk=4, lacking=(), renamed=()):
    """An L4A file: `beams` gives a list of shots each, a shot is what it has unlike a good one."""
    start = FIRST
    with h5py.File(path, "w") as file:
        file["ANCILLARY/model_data"] = np.array(MODELS, MODEL)
        for beam, shots in beams.items():
            group = file.create_group(beam)
            numbers = np.arange(start, start + len(shots), dtype=np.uint64)
            start += len(shots)
            columns = {name: (kind, [shot.get(name, good) for shot in shots]) for name, (kind, good) in GOOD.items()}
            columns["shot_number"] = ("u8", numbers)
            for name, (kind, values) in columns.items():
                for old, new in dict(renamed).items():
                    name = new if name == old else name
                if name not in lacking:
                    layout = {"maxshape": (None,), "chunks": (chunk,), "compression": "gzip"}
                    group.create_dataset(name, data=np.array(values, kind), **layout)
    return path


HEIGHTS = NEW.replace("GEDI04", "GEDI02").replace("002_02", "003_01")
HEIGHTS_3 = HEIGHTS.replace("003_01_V002", "004_01_V003")
# What L2A has and L4A hasn't, and where it has another name. `rh` is added: (shots, 101), metres.
GOOD_HEIGHT = {name: GOOD[name] for name in GOOD if not name.startswith(("agbd", "predict", "l4", "l2", "algorithm"))}
GOOD_HEIGHT |= {
    "quality_flag": ("u1", 1),
    "surface_flag": ("u1", 1),
    "elev_lowestmode": ("f4", 1000.0),
    "digital_elevation_model": ("f4", 1010.0),
    "elev_highestreturn": ("f4", 1030.0),
}


def a_profile(top):
    """101 relative heights that all differ: `top` metres at 98, half a metre a percent."""
    return top + 0.5 * (np.arange(101) - 98)


def write_heights(path, beams, *, chunk=4, lacking=(), version=2):
    """An L2A file: `beams` gives a list of shots each; a shot's `rh98` is the height, or `rh` its whole profile."""
    start = FIRST
    with h5py.File(path, "w") as file:
        for beam, shots in beams.items():
            group = file.create_group(beam)
            columns = {
                name: (kind, [shot.get(name, good) for shot in shots]) for name, (kind, good) in GOOD_HEIGHT.items()
            }
            columns["shot_number"] = ("u8", np.arange(start, start + len(shots), dtype=np.uint64))
            start += len(shots)
            if version == 3:
                columns["l2a_quality_flag_rel3"] = columns.pop("quality_flag")
                columns["l2a_quality_flag_rel2"] = ("u1", [0] * len(shots))  # of another release: no flag to go by
            profiles = [shot.get("rh", a_profile(shot.get("rh98", 20.0))) for shot in shots]
            rh = np.array(profiles, np.float64).reshape(len(shots), 101)
            of_one = np.where(np.abs(rh) < 300, rh * 100 + 77, 0).astype(np.int16)  # centimetres, another ground
            columns |= {"rh": ("f4", rh), "geolocation/rh_a1": ("i2", of_one)}
            for name, (kind, values) in columns.items():
                if name not in lacking:
                    values = np.asarray(values)
                    layout = {"maxshape": (None, *values.shape[1:]), "chunks": (chunk, *values.shape[1:])}
                    group.create_dataset(name, data=values.astype(kind), **layout)
    return path


def whole(shots):
    """All eight beams, the shots in one of them, so that no beam is absent."""
    return {beam: shots if beam == "BEAM0101" else [] for beam in BEAMS}


def read_granule(path, **options):
    """Footprints and counts of an orbit."""
    return orbits.read_granule(path, **options)[:2]
