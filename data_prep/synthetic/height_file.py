"""Writes GEDI L2A files, version 2 or 3: groups, datasets, types and units as far as readers of the product tell them.

No file of the product was at hand. Names and types of version 3 are those that gtiler and gedih3 list from its files;
chunks, fill values and attributes are taken to be those of L4A. Where a reader could go wrong, the file is as the
product: `rh` (shots, 101) in metres beside `geolocation/rh_a1` and others in centimetres, of algorithms that were not
selected; the quality flag under its name of each version.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from biomass_jax.runtime.files import replacing
from data_prep.gedi.names import BEAMS, FULL_POWER_BEAMS, HEIGHTS
from data_prep.synthetic.gedi_file import COORDINATES, create, granule_name

NO_DEM = -999999.0  # where there is no elevation model
BARE, STEEPNESS = 2.5, 1.9  # metres over bare ground, whose return is as long as the pulse; metres a root of Mg/ha
_ALGORITHMS = {2: (1, 2, 5), 3: (1, 2, 5, 10)}
_RELEASES = {2: "003_01_V002", 3: "004_01_V003"}
# dataset -> (dtype, value where the caller gives none, units); `/` goes into a subgroup
_DATASETS: dict[str, tuple[str, Any, str]] = {
    "beam": ("u2", 0, "-"),
    "channel": ("u1", 0, "-"),
    "degrade_flag": ("u1", 0, "-"),
    "delta_time": ("f8", 0, "s"),
    "digital_elevation_model": ("f4", 251, "m"),
    "digital_elevation_model_srtm": ("f4", 249, "m"),
    "elev_highestreturn": ("f4", 270, "m"),
    "elev_lowestmode": ("f4", 250, "m"),
    "elevation_bias_flag": ("u1", 0, "-"),
    "energy_total": ("f4", 5000, "counts"),
    "lat_lowestmode": ("f8", 0, "degrees"),
    "lon_lowestmode": ("f8", 0, "degrees"),
    "master_frac": ("f8", 0, "s"),
    "master_int": ("u4", 0, "s"),
    "num_detectedmodes": ("u1", 3, "-"),
    "quality_flag": ("u1", 1, "-"),
    "selected_algorithm": ("u1", 1, "-"),
    "selected_mode": ("u1", 0, "-"),
    "selected_mode_flag": ("u1", 0, "-"),
    "sensitivity": ("f4", 0.97, "-"),
    "shot_number": ("u8", 0, "-"),
    "solar_azimuth": ("f4", 120, "degrees"),
    "solar_elevation": ("f4", -20, "degrees"),
    "surface_flag": ("u1", 1, "-"),
    "land_cover_data/landsat_treecover": ("f8", 60, ""),
    "land_cover_data/landsat_water_persistence": ("u1", 0, ""),
    "land_cover_data/leaf_off_doy": ("i2", 290, ""),
    "land_cover_data/leaf_off_flag": ("u1", 0, ""),
    "land_cover_data/leaf_on_cycle": ("u1", 0, ""),
    "land_cover_data/leaf_on_doy": ("i2", 120, ""),
    "land_cover_data/modis_nonvegetated": ("f8", 20, ""),
    "land_cover_data/modis_treecover": ("f8", 55, ""),
    "land_cover_data/pft_class": ("u1", 4, ""),
    "land_cover_data/region_class": ("u1", 7, ""),
    "land_cover_data/urban_focal_window_size": ("u1", 3, ""),
    "land_cover_data/urban_proportion": ("u1", 0, ""),
    "geolocation/stale_return_flag": ("u1", 0, ""),
    "rx_assess/quality_flag": ("u1", 1, ""),
    "rx_assess/rx_assess_flag": ("u2", 0, ""),
}
_OF_ALGORITHM: dict[str, tuple[str, Any, str]] = {
    "geolocation/lat_lowestmode_a{}": ("f8", 0, ""),
    "geolocation/lon_lowestmode_a{}": ("f8", 0, ""),
    "geolocation/elev_lowestmode_a{}": ("f4", 245, ""),
    "geolocation/quality_flag_a{}": ("u1", 1, ""),
    "geolocation/sensitivity_a{}": ("f4", 0.9, ""),
    "rx_processing_a{}/rx_algrunflag": ("u1", 1, ""),
}
_ONLY_3: dict[str, tuple[str, Any, str]] = {
    "l2a_quality_flag_rel2": ("u1", 1, "-"),
    "land_cover_data/phenology_phase": ("u1", 2, ""),
    "land_cover_data/phenology_year": ("u2", 2020, ""),
    "land_cover_data/worldcover_class": ("u1", 10, ""),
}


def height_name(start: datetime, orbit: int, *, version: int = 2) -> str:
    """Return a file's name, for example `GEDI02_A_2020183184512_O08852_02_T00198_02_003_01_V002.h5`.

    Args:
        start: when the sub-orbit begins, UTC.
        orbit: orbit number.
        version: of the product, 2 or 3.
    """
    stem = granule_name(start, orbit, version="").split("__")[0]
    return f"{stem.replace('GEDI04', 'GEDI02')}_{_RELEASES[version]}.h5"


def height_of(biomass: np.ndarray) -> NDArray[np.float64]:
    """The height in metres that goes with biomass in Mg/ha, a stated relation: 2.5 + 1.9 sqrt(biomass)."""
    return BARE + STEEPNESS * np.sqrt(np.maximum(np.asarray(biomass, np.float64), 0))


def profile_of(height: np.ndarray) -> NDArray[np.float32]:
    """Relative heights (N, 101) of shots whose rh98 is `height` (N,), metres: rising, below the ground at first."""
    share = (np.arange(HEIGHTS) / 98) ** 0.7
    height = np.asarray(height, np.float64)[:, None]
    return (share * (height + BARE) - BARE).astype(np.float32)


def write_heights(path: Path, beams: Mapping[str, Mapping[str, Any]], *, version: int = 2) -> Path:
    """Write one L2A file through a file beside it.

    Args:
        path: the file, named as the product's files are.
        beams: by beam name, the shots' arrays (N,) by the dataset names of version 2; at least shot_number, delta_time,
            lat_lowestmode, lon_lowestmode and `rh` (N, 101) in metres. What is not given is filled in. A beam that is
            not named is absent from the file.
        version: whose names the file has, 2 or 3.

    Returns:
        The path.

    Raises:
        ValueError: an unknown beam or dataset.
    """
    known = {*_DATASETS, "rh"}
    unknown = sorted(set(beams) - set(BEAMS)) + sorted({name for shots in beams.values() for name in shots} - known)
    if unknown:
        raise ValueError(f"{path}: GEDI L2A knows no {', '.join(unknown)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        file.attrs["short_name"] = "GEDI_L2A"
        for beam in BEAMS:
            if beam in beams:
                _write_beam(file.create_group(beam), beam, beams[beam], version)
        file.create_group("METADATA/DatasetIdentification").attrs.update(
            VersionID=f"0{version}",
            abstract="Synthetic shots in the layout of the GEDI L2A standard data product.",
            fileName=path.name,
            shortName="GEDI_L2A",
        )
    return path


def _write_beam(group: h5py.Group, beam: str, shots: Mapping[str, Any], version: int) -> None:
    group.attrs["description"] = "Full power beam" if beam in FULL_POWER_BEAMS else "Coverage beam"
    seconds, count = np.asarray(shots["delta_time"], np.float64), len(shots["shot_number"])
    rh = np.asarray(shots["rh"], np.float32)
    given = {"master_int": np.floor(seconds), "master_frac": seconds - np.floor(seconds), **shots}
    given.setdefault("beam", int(beam.removeprefix("BEAM"), 2))
    wanted = dict(_DATASETS)
    for number in _ALGORITHMS[version]:
        wanted |= {name.format(number): how for name, how in _OF_ALGORITHM.items()}
        for axis in ("lat", "lon"):  # half a millidegree away, some 50 m
            given[f"geolocation/{axis}_lowestmode_a{number}"] = np.asarray(shots[f"{axis}_lowestmode"]) + 5e-4
    wanted |= _ONLY_3 if version == 3 else {}
    for name, (dtype, default, units) in wanted.items():
        values = np.asarray(given.get(name, default))
        dataset = create(group, _named(name, version), np.broadcast_to(values, count).astype(dtype), dtype)
        if "/" not in name:
            dataset.attrs.update(coordinates=COORDINATES, units=units)
    create(group, "rh", rh, "f4").attrs.update(units="m")
    for number in _ALGORITHMS[version]:  # centimetres, and another ground
        create(group, f"geolocation/rh_a{number}", np.rint(100 * rh + 50 * number), "i2")


def _named(name: str, version: int) -> str:
    """Version 3 calls quality_flag l2a_quality_flag_rel3, of each algorithm too."""
    own = name == "quality_flag" or name.startswith("geolocation/quality_flag")
    return name.replace("quality_flag", "l2a_quality_flag_rel3") if version == 3 and own else name
