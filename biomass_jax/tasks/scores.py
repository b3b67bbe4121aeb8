"""Errors of predictions as sums that can be added up over batches, tiles and hosts without losing digits."""

import math
from collections.abc import Iterable
from typing import Self

import numpy as np

SCORES = ("rmse", "mae", "bias", "r2")
REFERENCE_EPSILON = 1.19e-7  # float32's, which the reference adds to the number of labels


class RegressionSums:
    """Sums over labelled pixels in float64.

    The labels' sum of squares is kept about their own mean and merged by the formula of Chan, Golub and LeVeque
    (Updating formulae and a pairwise algorithm for computing sample variances, 1979), so that R2 keeps its digits where
    labels are large and differ little.
    """

    SIZE = 6

    def __init__(self) -> None:
        self._n = 0
        self._error = 0.0
        self._absolute = 0.0
        self._squared = 0.0
        self._mean = 0.0  # of labels
        self._spread = 0.0  # sum of squares of labels about their mean

    @property
    def n(self) -> int:
        """Labelled pixels."""
        return self._n

    def add(self, prediction: np.ndarray, label: np.ndarray) -> Self:
        """Add the pixels that have a label.

        Args:
            prediction: of any shape.
            label: of the same shape; below 0 for none.

        Raises:
            ValueError: other shapes.
        """
        prediction, label = np.asarray(prediction), np.asarray(label)
        if prediction.shape != label.shape:
            raise ValueError(f"predictions have shape {prediction.shape}, labels {label.shape}; expected the same")
        chosen = label >= 0
        truth = label[chosen].astype(np.float64)
        if not truth.size:
            return self
        error = prediction[chosen].astype(np.float64) - truth
        added = RegressionSums()
        added._n = truth.size
        added._error = float(error.sum())
        added._absolute = float(np.abs(error).sum())
        added._squared = float(np.square(error).sum())
        added._mean = float(truth.mean())
        added._spread = float(np.square(truth - added._mean).sum())
        return self.merge(added)

    def merge(self, other: "RegressionSums") -> Self:
        """Add the pixels of another; the order of merging changes nothing but the last bits."""
        total = self._n + other._n
        if other._n == 0:
            return self
        shift = other._mean - self._mean
        self._spread += other._spread + shift * shift * (self._n * other._n / total)
        self._mean += shift * (other._n / total)
        self._error += other._error
        self._absolute += other._absolute
        self._squared += other._squared
        self._n = total
        return self

    def results(self) -> dict[str, float | int | None]:
        """{rmse, mae, bias, r2, n}.

        The first three in the labels' unit, bias = mean of prediction - label, r2 = 1 - sum of squared errors / sum of
        squares of the labels about their mean. None where there is no label, r2 also where all labels are equal.
        """
        if not self._n:
            return {"rmse": None, "mae": None, "bias": None, "r2": None, "n": 0}
        return {
            "rmse": math.sqrt(self._squared / self._n),
            "mae": self._absolute / self._n,
            "bias": self._error / self._n,
            "r2": 1 - self._squared / self._spread if self._spread > 0 else None,
            "n": self._n,
        }

    def best_constant(self) -> dict[str, float | None]:
        """{value, rmse}: the one number that, predicted everywhere, has the least RMSE: the labels' mean."""
        if not self._n:
            return {"value": None, "rmse": None}
        return {"value": self._mean, "rmse": math.sqrt(self._spread / self._n)}

    def to_array(self) -> np.ndarray:
        """Float64 (6,): n, sum of errors, of absolute ones, of squared ones, mean of labels, their sum of squares."""
        return np.array([self._n, self._error, self._absolute, self._squared, self._mean, self._spread], np.float64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> "RegressionSums":
        """What `to_array` gave.

        Raises:
            ValueError: another dtype or shape; float32 would lose digits.
        """
        values = np.asarray(values)
        if values.dtype != np.float64 or values.shape != (cls.SIZE,):
            raise ValueError(f"found {values.dtype} {values.shape}, expected float64 ({cls.SIZE},)")
        made = cls()
        made._n = int(values[0])
        made._error, made._absolute, made._squared, made._mean, made._spread = (float(value) for value in values[1:])
        return made


def batch_weighted_rmse(batches: Iterable[tuple[float, float, int]]) -> float | None:
    """The validation loss that the original system monitored: the mean of batches' RMSEs, weighted by their chips.

    It differs from the RMSE over all pixels. A batch without labels counts as 0, as it did there (terratorch 0.99.2,
    regression task and its loss with an ignored index).

    Args:
        batches: for each (sum of squared errors, labelled pixels, chips without padding).

    Returns:
        In the labels' unit; None without a chip.
    """
    total, weight = 0.0, 0
    for squared, labels, chips in batches:
        total += chips * math.sqrt(squared / (labels + REFERENCE_EPSILON))
        weight += chips
    return total / weight if weight else None
