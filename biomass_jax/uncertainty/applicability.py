"""Area of applicability: how unlike its training ground a place looks to the model, and where that is too much.

Meyer & Pebesma (2021), Methods in Ecology and Evolution 12, doi 10.1111/2041-210X.13650, as in their R package CAST
(`trainDI`, `aoa`): predictors are standardised and weighted by their importance; the dissimilarity index (DI) of a
place is its distance to the nearest training point over the mean distance between training points. Here a point is a
cell of the encoder's map at about 16 pixels, its predictors are the map's channels, and folds are blocks of ground.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

from biomass_jax.errors import DataError

CENTRES = 4096  # of a bundle's area: 8 MiB for the 512 channels of granite's third stage
CELL = 16  # px, about the side of a cell
_ROWS = 512  # cells at a time, on the host and on the device
_LEAST_LABELLED = 3  # two points correlate perfectly, whatever they are
_NO_SPREAD = 1e-6  # relative to the largest value: rounding of float32


@dataclass(frozen=True, eq=False)
class Applicability:
    """What is kept of the training ground.

    Attributes:
        centres: float32 (K, C), features of training cells as `(features - mean) * scale` has them in float32.
        mean: float32 (C,), of the channels over the training cells.
        scale: float32 (C,), weight over standard deviation; 0 for a channel without spread.
        mean_distance: between two centres, averaged over all pairs of them.
        threshold: the largest DI of a centre to those of other blocks that is no outlier; a place above it is outside.
        blocks: of ground, in which the centres lie.
        cells: from which the centres were drawn, and by which channels were standardised and weighted.
    """

    centres: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    mean_distance: float
    threshold: float
    blocks: int
    cells: int

    def arrays(self) -> dict[str, np.ndarray]:
        """What `dissimilarity` takes and a bundle stores: float32 centres, mean, scale, and mean_distance ()."""
        distance = np.asarray(self.mean_distance, np.float32)
        return {"centres": self.centres, "mean": self.mean, "scale": self.scale, "mean_distance": distance}

    def about(self) -> dict[str, Any]:
        """What a bundle's description says of it, beside the arrays: {threshold, blocks, cells, centres}."""
        return {"threshold": self.threshold, "blocks": self.blocks, "cells": self.cells, "centres": len(self.centres)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> "Applicability":
        """From `arrays` and `about`, as a bundle gives them back; `mean_distance` in float32."""
        centres, mean, scale = (np.asarray(arrays[name], np.float32) for name in ("centres", "mean", "scale"))
        distance = float(arrays["mean_distance"])
        return cls(centres, mean, scale, distance, about["threshold"], about["blocks"], about["cells"])


def feature_stage(patch_size: int, stages: int) -> tuple[int, int]:
    """Index and stride in pixels of the encoder's map whose stride is nearest to 16 pixels; granite's is (2, 16)."""
    strides = [patch_size * 2**stage for stage in range(stages)]  # no two of them are equally far from 16
    return min(enumerate(strides), key=lambda item: abs(item[1] - CELL))


def cell_labels(label: np.ndarray, no_data: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """What a chip's labels and its no-data say of the cells of the encoder's map.

    Args:
        label: (H, W) in its unit, below 0 or NaN where there is none.
        no_data: bool (H, W), pixels without data; labels there don't count.
        stride: pixels a side of a cell; cells at the lower and right edge may be cut.

    Returns:
        labels: float64 (h, w), mean of the cell's labels, NaN where it has none.
        valid: bool (h, w), false where all pixels of the cell are no-data, so that it must have no say.
    """
    h, w = (math.ceil(side / stride) for side in label.shape)
    cell = (np.arange(label.shape[0])[:, None] // stride * w + np.arange(label.shape[1]) // stride).ravel()
    known = (np.isfinite(label) & (label >= 0) & ~no_data).ravel()
    sums = np.bincount(cell[known], label.ravel()[known].astype(np.float64), h * w)
    counts = np.bincount(cell[known], minlength=h * w)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    valid = np.bincount(cell[~no_data.ravel()], minlength=h * w) > 0
    return means.reshape(h, w), valid.reshape(h, w)


class CellSample:
    """A bounded number of training cells, evenly from all blocks of ground, whatever the order of the chips.

    Each cell has a priority that follows from the seed, its chip and its place in it; each block keeps its cells of
    the smallest priorities, all blocks as many as they have and the size allows.
    """

    def __init__(self, size: int = 4 * CENTRES, seed: int = 0) -> None:
        """`size`: cells that are kept; up to twice as many are held meanwhile."""
        self.size, self.seed = size, seed
        self._parts: list[tuple[np.ndarray, ...]] = []  # features, labels, blocks, priorities
        self._held = 0

    def add(
        self,
        chip_id: str,
        features: np.ndarray,
        labels: np.ndarray,
        block: str | np.ndarray,
        *,
        valid: np.ndarray | None = None,
    ) -> None:
        """Take the cells of one chip into account; each chip is to be given once.

        Args:
            chip_id: the chip's name, which no other has.
            features: (h, w, C) or (n, C) of its cells.
            labels: (h, w) or (n,), mean label of the cell, NaN for none.
            block: of ground, one name for all cells or one each, (h, w) or (n,).
            valid: bool (h, w) or (n,), false for cells that have no say: all their pixels are no-data.

        Raises:
            DataError: features that are no numbers.
        """
        features = features.reshape(-1, features.shape[-1])
        chosen = np.ones(len(features), bool) if valid is None else valid.ravel()
        _refuse_no_numbers(f"chip {chip_id}", features[chosen])
        # A bit generator's raw numbers are the same in every version of NumPy.
        key = hashlib.sha256(f"{self.seed} {chip_id}".encode()).digest()
        priorities = np.random.PCG64(int.from_bytes(key)).random_raw(len(features))
        blocks = np.broadcast_to(np.asarray(block, object).ravel(), len(features))
        self._parts.append(tuple(part[chosen] for part in (features, labels.ravel(), blocks, priorities)))
        self._held += int(chosen.sum())
        if self._held > 2 * self.size:
            self._prune()

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n, C) features, (n,) labels, (n,) blocks of the cells drawn: what `fit` takes.

        Raises:
            DataError: there are none.
        """
        if not self._held:
            raise DataError("the area of applicability: no chip has a cell with data; give chips with data")
        self._prune()
        features, labels, blocks, _ = self._parts[0]
        return features, labels, blocks

    def _prune(self) -> None:
        # What is dropped now would be dropped at the end too: later cells only add to those that come before it.
        joined = [np.concatenate(parts) for parts in zip(*self._parts, strict=True)]
        kept = _evenly(np.unique(joined[2], return_inverse=True)[1], joined[3], self.size)
        self._parts = [tuple(part[kept] for part in joined)]
        self._held = len(kept)


def fit(
    features: np.ndarray, labels: np.ndarray, blocks: np.ndarray, *, centres: int = CENTRES, seed: int = 0
) -> Applicability:
    """The area of applicability of a model by its features of training cells; double precision.

    Channels are standardised by mean and standard deviation of all cells and weighted by how much they tell of it:
    |Pearson's r| with the label over the labelled cells, normalised to a mean of 1; all alike where labels tell nothing
    (fewer than 3, no spread, no correlation). DI is the same for any factor common to all weights. Cells of no-data
    must have been left out (see `cell_labels`). Quartiles are NumPy's; CAST's hinges are as good as equal to them.

    Args:
        features: (n, C) of the cells.
        labels: (n,) mean label of the cell, NaN for none.
        blocks: (n,) block of ground of the cell, texts or numbers: the folds of the threshold.
        centres: cells that are kept at most, drawn by the seed evenly from all blocks.
        seed: of the draw.

    Raises:
        DataError: features that are no numbers, cells of fewer than two blocks, or cells that are all alike.
    """
    _refuse_no_numbers(f"the {len(features):,} training cells", features)
    names, folds = np.unique(np.asarray(blocks), return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"the area of applicability: training cells of {len(names)} blocks of ground, expected 2 or more; its "
            "threshold is how unlike ground can be that training didn't see, which one block can't tell; give chips "
            "from more ground or smaller blocks"
        )
    everything = np.arange(len(features))
    mean, sd = _moments(features, everything)
    weights = _weights(features, np.asarray(labels, np.float64)) * (sd > 0)
    if weights.any():
        weights /= weights.mean()
    scale = np.divide(weights, sd, out=np.zeros_like(sd), where=sd > 0)
    priorities = np.random.PCG64(seed).random_raw(len(features))
    kept = np.sort(_evenly(folds, priorities, centres))
    mean_distance, nearest = _distances((features[kept].astype(np.float64) - mean) * scale, folds[kept])
    if not mean_distance > 0:
        raise DataError(
            f"the area of applicability: all {len(kept):,} training cells have the same features, expected cells that "
            "differ; is the model trained, and do the chips show anything?"
        )
    mean32, scale32 = mean.astype(np.float32), scale.astype(np.float32)
    return Applicability(
        # In the arithmetic of the device, so that a training cell lies where its centre lies.
        centres=(features[kept].astype(np.float32) - mean32) * scale32,
        mean=mean32,
        scale=scale32,
        mean_distance=mean_distance,
        threshold=_largest_no_outlier(nearest / mean_distance),
        blocks=len(np.unique(folds[kept])),
        cells=len(features),
    )


def dissimilarity(arrays: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    """DI of cells, on the device; may be jitted.

    Products tell which centre of each 512 is nearest; its distance is then computed from differences, because |a|^2 +
    |b|^2 - 2ab loses all digits where a cell lies close to a centre.

    Args:
        arrays: `Applicability.arrays()`.
        features: [B, h, w, C], the encoder's map.

    Returns:
        float32 [B, h, w], 0 for a training cell itself; NaN where features are no numbers.
    """
    centres = arrays["centres"]
    k, c = centres.shape
    rows = min(_ROWS, k)
    padding = jnp.broadcast_to(centres[:1], (-k % rows, c))  # a centre said twice changes no minimum
    chunks = jnp.concatenate([centres, padding]).reshape(-1, rows, c)
    cells = ((features.astype(jnp.float32) - arrays["mean"]) * arrays["scale"]).reshape(-1, c)

    def nearer(best: jax.Array, chunk: jax.Array) -> tuple[jax.Array, None]:
        products = jnp.matmul(cells, chunk.T, precision=jax.lax.Precision.HIGHEST)
        found = chunk[jnp.argmin((chunk**2).sum(1) - 2 * products, axis=1)]
        return jnp.minimum(best, ((cells - found) ** 2).sum(1)), None

    squares, _ = jax.lax.scan(nearer, jnp.full(len(cells), jnp.inf, jnp.float32), chunks)
    return (jnp.sqrt(squares) / arrays["mean_distance"]).reshape(features.shape[:-1])


def to_pixels(di: jax.Array, size: tuple[int, int], stride: int) -> jax.Array:
    """[B, ceil(H / stride), ceil(W / stride)] -> [B, H, W], each pixel its cell's value; `size` is (H, W).

    Raises:
        ValueError: cells that don't cover the pixels exactly.
    """
    expected = tuple(math.ceil(side / stride) for side in size)
    if di.shape[1:] != expected:
        raise ValueError(f"{size} px in cells of {stride} px are {expected} cells, found {di.shape[1:]}")
    rows, columns = (np.arange(side) // stride for side in size)
    return di[:, rows][:, :, columns]


def _refuse_no_numbers(where: str, features: np.ndarray) -> None:
    for part in _chunks(np.arange(len(features))):
        if not np.isfinite(features[part]).all():
            raise DataError(f"{where}: the model gives features that are NaN or infinite, expected numbers")


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time: neither n x n distances nor n x C doubles are ever held."""
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


def _evenly(blocks: np.ndarray, priorities: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` cells: the first of each block, then the second of each, and so on, by priority."""
    order = np.lexsort((priorities, blocks))
    ordered = blocks[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.empty(len(blocks), np.int64)
    rank[order] = np.arange(len(blocks)) - np.repeat(starts, np.diff(np.r_[starts, len(blocks)]))
    return np.lexsort((priorities, rank))[:count]


def _moments(features: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float64 (C,); exactly 0 where there is no more than rounding."""
    mean = sum(features[part].sum(0, dtype=np.float64) for part in _chunks(rows)) / len(rows)
    squares, largest = np.zeros_like(mean), np.zeros_like(mean)
    for part in _chunks(rows):
        squares += ((features[part] - mean) ** 2).sum(0)
        largest = np.maximum(largest, np.abs(features[part]).max(0))
    sd = np.sqrt(squares / len(rows))
    return mean, np.where(sd > _NO_SPREAD * largest, sd, 0)


def _weights(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """|Pearson's r| of each channel with the label, float64 (C,); ones where nothing can be told."""
    rows = np.flatnonzero(np.isfinite(labels))
    if len(rows) < _LEAST_LABELLED:
        return np.ones(features.shape[1])
    (label_mean,), (label_sd,) = _moments(labels[:, None], rows)
    mean, sd = _moments(features, rows)
    shared = sum((features[part] - mean).T @ (labels[part] - label_mean) for part in _chunks(rows)) / len(rows)
    r = np.abs(np.divide(shared, sd * label_sd, out=np.zeros_like(sd), where=sd * label_sd > 0))
    return r if r.any() else np.ones_like(r)


def _distances(points: np.ndarray, folds: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean distance between two points, and each one's to the nearest of another fold, (K,)."""
    total, nearest = 0.0, np.empty(len(points))
    for part in _chunks(np.arange(len(points))):
        distances = cdist(points[part], points)
        total += float(distances.sum())
        distances[folds[part, None] == folds] = np.inf
        nearest[part] = distances.min(1)
    return total / (len(points) * (len(points) - 1)), nearest


def _largest_no_outlier(di: np.ndarray) -> float:
    """The upper whisker of a box plot: the largest value up to Q3 + 1.5 (Q3 - Q1)."""
    first, third = np.quantile(di, (0.25, 0.75))
    return float(di[di <= third + 1.5 * (third - first)].max())
