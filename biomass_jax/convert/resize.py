"""Relative position bias tables from one window size to another."""

import math

import numpy as np

# The free parameter of Keys' cubic kernel (IEEE TASSP 29, 1981) that torch uses; other libraries take -0.5.
_A = -0.75


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel for distances in [0, 2]."""
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    return np.where(distance <= 1, near, far)


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights of torch's 1-D cubic interpolation, float64 [size_out, size_in].

    Half-pixel centres, taps outside clamped to the edge, no antialiasing: `torch.nn.functional.interpolate(mode=
    "bicubic", align_corners=False)`, aten/src/ATen/native/UpSample.h. Source coordinates are float32, as there.
    """
    scale, half = np.float32(size_in) / np.float32(size_out), np.float32(0.5)
    source = (scale * (np.arange(size_out, dtype=np.float32) + half) - half).astype(np.float64)
    low = np.floor(source).astype(np.int64)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        column = np.clip(low + tap, 0, size_in - 1)
        np.add.at(matrix, (np.arange(size_out), column), _cubic(np.abs(source - (low + tap))))
    return matrix


def window_of(rows: int) -> int | None:
    """The window size w whose bias table has `rows` = (2w - 1)^2 rows, None where there is none."""
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def resize_bias_table(table: np.ndarray, window_size: int) -> np.ndarray:
    """A relative position bias table for another window: ((2v-1)^2, heads) -> ((2w-1)^2, heads), w = `window_size`.

    Each head's biases are an image over (dy, dx), resized by torch's bicubic rule, as SimMIM's and terratorch's own
    loaders do.
    """
    side_in, side_out = math.isqrt(table.shape[0]), 2 * window_size - 1
    matrix = bicubic_matrix(side_in, side_out)
    image = table.astype(np.float64).reshape(side_in, side_in, -1)
    resized = np.einsum("yi,xj,ijh->yxh", matrix, matrix, image)
    return np.ascontiguousarray(resized.reshape(side_out**2, -1).astype(table.dtype))
