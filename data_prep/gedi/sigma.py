"""`agbd_sigma`, the error of a footprint's biomass in Mg/ha, from that of its model's prediction.

GEDI fits t = f(biomass), f the `y_transform` of the stratum's model, and gives agbd = bias_correction_value * h(t), h
the inverse of f. To first order (delta method) an error agbd_t_se of t makes one of bias_correction_value * h'(t) *
agbd_t_se of agbd. For square roots this is half the product's own prediction interval over its quantile, exactly.

It is an error against field plots. `agbd_se` of the product isn't: it is bias_correction_value * agbd_t_se ** 2.
"""

from collections.abc import Mapping
from typing import NamedTuple

import h5py
import numpy as np

from biomass_jax.data.gedi import BACK_TRANSFORMS

INPUTS = ("agbd_t", "agbd_t_se", "predict_stratum")  # fields of a shot
UNKNOWN_MODEL = "of a stratum without a model in ANCILLARY/model_data"
NO_INPUTS = f"without {', '.join(INPUTS[:-1])} or {INPUTS[-1]}"
NO_SLOPE = "with agbd_t of 0 or less"  # a clipped prediction: the first order says nothing there
FAULTS = ("", UNKNOWN_MODEL, NO_INPUTS, NO_SLOPE)


class StratumModel(NamedTuple):
    """What a row of ANCILLARY/model_data says of the way back from t."""

    y_transform: str
    bias_correction_value: float


def read_models(file: h5py.File) -> dict[bytes, StratumModel]:
    """The models of a granule by predict_stratum; without those that can't be used, {} where it tells of none."""
    table = file.get("ANCILLARY/model_data")
    names = ("predict_stratum", "y_transform", "bias_correction_value")
    if not isinstance(table, h5py.Dataset) or not set(names) <= set(table.dtype.names or ()):
        return {}
    found = {}
    for stratum, transform, correction in table[:][list(names)].tolist():
        model = StratumModel(bytes(transform).decode(errors="replace").strip().lower(), float(correction))
        if model.y_transform in BACK_TRANSFORMS and 0 < model.bias_correction_value < np.inf:
            found[bytes(stratum).strip()] = model
    return found


def agbd_sigma(
    t: np.ndarray, t_se: np.ndarray, strata: np.ndarray, models: Mapping[bytes, StratumModel]
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of shots.

    Args:
        t: (N,) agbd_t, in the units of the model's fit; NaN or -9999 where there is none.
        t_se: (N,) agbd_t_se, likewise.
        strata: (N,) bytes, predict_stratum.
        models: of `read_models`.

    Returns:
        (N,) float32 Mg/ha, NaN where there is none, and (N,) uint8: why, a number in FAULTS.
    """
    t, t_se = np.asarray(t, np.float64), np.asarray(t_se, np.float64)
    sigma, fault = np.full(t.shape, np.nan), np.zeros(t.shape, np.uint8)
    names, index = np.unique(strata, return_inverse=True)
    for number, name in enumerate(names.tolist()):
        mine, model = index.reshape(-1) == number, models.get(name.strip())
        if model is None:
            fault[mine] = FAULTS.index(UNKNOWN_MODEL)
            continue
        with np.errstate(over="ignore"):
            slope = model.bias_correction_value * BACK_TRANSFORMS[model.y_transform].slope(t[mine])
            sigma[mine] = slope * t_se[mine]
    fault[(fault == 0) & ~(sigma > 0)] = FAULTS.index(NO_SLOPE)
    given = np.isfinite(t) & (t != -9999) & np.isfinite(t_se) & (t_se > 0) & (np.asarray(strata) != b"")
    fault[~given | np.isinf(sigma)] = FAULTS.index(NO_INPUTS)
    return np.where(fault == 0, sigma, np.nan).astype(np.float32), fault
