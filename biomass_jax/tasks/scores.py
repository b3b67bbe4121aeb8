"""Errors of predictions as sums that can be added up over batches, tiles and hosts without losing digits."""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar, Self

import numpy as np

SCORES = ("rmse", "mae", "bias", "r2")
# Float32's epsilon, which the reference adds to the number of labelled pixels under the root (terratorch 0.99.2).
REFERENCE_EPSILON = 1.19e-7


@dataclasses.dataclass
class RegressionSums:
    """Sums over labelled pixels in float64.

    The labels' sum of squares is kept about their own mean and merged by the formula of Chan, Golub and LeVeque
    (Updating formulae and a pairwise algorithm for computing sample variances, 1979), so that R2 keeps its digits where
    labels are large and differ little.
    """

    SIZE: ClassVar[int] = 6

    n: int = 0  # labelled pixels
    error: float = 0.0  # sum of prediction - label
    absolute: float = 0.0  # sum of absolute errors
    squared: float = 0.0  # sum of squared errors
    mean: float = 0.0  # of labels
    spread: float = 0.0  # sum of squares of labels about their mean

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
        mean = truth.mean()
        sums = (error.sum(), np.abs(error).sum(), np.square(error).sum(), mean, np.square(truth - mean).sum())
        return self.merge(RegressionSums(truth.size, *map(float, sums)))

    def merge(self, other: "RegressionSums") -> Self:
        """Add the pixels of another; the order of merging changes nothing but the last bits."""
        total = self.n + other.n
        if other.n == 0:
            return self
        shift = other.mean - self.mean
        self.spread += other.spread + shift * shift * (self.n * other.n / total)
        self.mean += shift * (other.n / total)
        self.error += other.error
        self.absolute += other.absolute
        self.squared += other.squared
        self.n = total
        return self

    def results(self) -> dict[str, float | int | None]:
        """{rmse, mae, bias, r2, n}.

        The first three in the labels' unit, bias = mean of prediction - label, r2 = 1 - sum of squared errors / sum of
        squares of the labels about their mean. None where there is no label, r2 also where all labels are equal.
        """
        if not self.n:
            return {"rmse": None, "mae": None, "bias": None, "r2": None, "n": 0}
        return {
            "rmse": math.sqrt(self.squared / self.n),
            "mae": self.absolute / self.n,
            "bias": self.error / self.n,
            "r2": 1 - self.squared / self.spread if self.spread > 0 else None,
            "n": self.n,
        }

    def best_constant(self) -> dict[str, float | None]:
        """{value, rmse}: the one number that, predicted everywhere, has the least RMSE: the labels' mean."""
        if not self.n:
            return {"value": None, "rmse": None}
        return {"value": self.mean, "rmse": math.sqrt(self.spread / self.n)}

    def to_array(self) -> np.ndarray:
        """Float64 (6,): n, sum of errors, of absolute ones, of squared ones, mean of labels, their sum of squares."""
        return np.array(dataclasses.astuple(self), np.float64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> "RegressionSums":
        """What `to_array` gave.

        Raises:
            ValueError: another dtype or shape; float32 would lose digits.
        """
        if values.dtype != np.float64 or values.shape != (cls.SIZE,):
            raise ValueError(f"found {values.dtype} {values.shape}, expected float64 ({cls.SIZE},)")
        return cls(int(values[0]), *map(float, values[1:]))


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
