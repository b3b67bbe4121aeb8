"""GEDI L4A's models: the way back from what was fitted to biomass, and what their parameters' errors do to it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biomass_jax.data.vectors import files_of
from biomass_jax.errors import RegionalError

if TYPE_CHECKING:
    from h5py import File

_CLOSE = 1e-3  # of t: predictors and parameters, float32 in the files, give it to 1e-6


class BackTransform(NamedTuple):
    """How biomass without its bias correction follows from t, (N,) float64, and by how much it changes with t."""

    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]


_IDENTITY = BackTransform(lambda t: t, np.ones_like)
BACK_TRANSFORMS = {
    "sqrt": BackTransform(lambda t: np.maximum(t, 0) ** 2, lambda t: 2 * np.maximum(t, 0)),
    "log": BackTransform(np.exp, np.exp),
    "none": _IDENTITY,
    "identity": _IDENTITY,
    "": _IDENTITY,
}


class Gradients(NamedTuple):
    """How biomass of footprints hangs on the parameters of the models that gave it.

    Attributes:
        stratum: (n,) texts, whose model it is.
        slope: (n, p) derivatives of agbd by the parameters, Mg/ha a unit; 0 for those that a model doesn't have.
        covariances: (p, p) of a model's parameters, by stratum.
    """

    stratum: np.ndarray
    slope: np.ndarray
    covariances: Mapping[str, np.ndarray]


def read_gradients(paths: Iterable[str | Path], numbers: np.ndarray) -> Gradients:
    """From L4A granules, for footprints by their shot numbers.

    A model is t = parameters . (1, xvar) and agbd = bias_correction_value * h(t), h the inverse of its `y_transform`;
    `vcov` of ANCILLARY/model_data is the covariance of its parameters.

    Args:
        paths: granules (HDF5), and folders of such.
        numbers: (n,) uint64, each once.

    Raises:
        RegionalError: a file can't be read or lacks something, its numbers contradict each other, or a footprint is
            in none of them.
    """
    try:
        import h5py
    except ImportError as error:
        raise RegionalError(f"GEDI's granules need h5py; pip install 'biomass-jax[regional]' ({error})") from error
    order = np.argsort(numbers)
    stratum, slope = np.full(len(numbers), "", object), np.zeros((len(numbers), 0))
    covariances: dict[str, np.ndarray] = {}
    for path in files_of(paths, "**/GEDI04_A_*.h5", "granules of GEDI L4A"):
        try:
            with h5py.File(path) as file:
                models = _models(file, path)
                for beam in (file[name] for name in file if name.startswith("BEAM")):
                    shots = beam["shot_number"][:]
                    place = np.minimum(np.searchsorted(numbers, shots, sorter=order), len(order) - 1)
                    mine = np.flatnonzero(numbers[order[place]] == shots) if len(order) else np.empty(0, int)
                    if not len(mine):
                        continue
                    names = np.array([name.decode().strip() for name in beam["predict_stratum"][:][mine]], object)
                    found = _slopes(beam["xvar"][:][mine], beam["agbd_t"][:][mine], names, models, path)
                    if not slope.shape[1]:
                        slope = np.zeros((len(numbers), found.shape[1]))
                    stratum[order[place[mine]]], slope[order[place[mine]]] = names, found
        except (OSError, KeyError) as error:
            raise RegionalError(f"{path}: can't be read as a whole GEDI L4A granule: {error}") from error
        for name in set(stratum) & set(models):
            covariance = models[name]["vcov"].astype(float)
            if not np.array_equal(covariances.setdefault(name, covariance), covariance):
                raise RegionalError(f"{path}: the model of {name} isn't that of the granules before; give one release")
    if (lost := stratum == "").any():
        raise RegionalError(
            f"{lost.sum():,} of {len(numbers):,} footprints, shot_number {numbers[np.argmax(lost)]} first, are in none "
            "of the granules given; give those that the footprints are from (--granules), or none"
        )
    return Gradients(stratum.astype(str), slope, covariances)


def _models(file: "File", path: Path) -> dict[str, np.void]:
    """Rows of ANCILLARY/model_data by stratum."""
    table = file["ANCILLARY/model_data"][:]
    lacking = {"predict_stratum", "y_transform", "par", "vcov", "npar", "bias_correction_value"} - set(
        table.dtype.names
    )
    if lacking:
        raise RegionalError(f"{path}: ANCILLARY/model_data has no {', '.join(sorted(lacking))}; get the whole granule")
    return {bytes(row["predict_stratum"]).decode().strip(): row for row in table}


def _slopes(
    xvar: np.ndarray, t: np.ndarray, names: np.ndarray, models: Mapping[str, np.void], path: Path
) -> np.ndarray:
    """(n, p) derivatives of agbd by the parameters."""
    found: np.ndarray = np.zeros((len(t), 0))
    for name in sorted(set(names)):
        if name not in models:
            raise RegionalError(f"{path}: no model of stratum {name!r} in ANCILLARY/model_data")
        model, mine = models[name], names == name
        transform = bytes(model["y_transform"]).decode().strip().lower()
        if transform not in BACK_TRANSFORMS:
            raise RegionalError(
                f"{path}: y_transform of {name} is {transform!r}; known are {', '.join(BACK_TRANSFORMS)}"
            )
        used, p = int(model["npar"]), len(model["par"])
        design = np.zeros((int(mine.sum()), p))
        design[:, 0], design[:, 1:used] = 1, xvar[mine, : used - 1]
        again = design @ model["par"].astype(float)
        off = np.abs(again - t[mine])
        if not (off <= _CLOSE * np.maximum(np.abs(again), 1)).all():
            raise RegionalError(
                f"{path}: stratum {name}: agbd_t is {t[mine][off.argmax()]:g}, but xvar and par give "
                f"{again[off.argmax()]:g}; its model isn't what the file says"
            )
        slope = float(model["bias_correction_value"]) * BACK_TRANSFORMS[transform].slope(again)
        if not found.shape[1]:
            found = np.zeros((len(t), p))
        found[mine] = slope[:, None] * design
    return found
