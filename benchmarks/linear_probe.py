"""How much biomass a frozen encoder's features tell, read out by a ridge regression in closed form.

NumPy, float64. Hoerl and Kennard, Technometrics 12 (1970); the leave-one-out residuals are Allen's PRESS (Technometrics
16, 1974): e_i / (1 - h_ii).
"""

from collections.abc import Sequence

import numpy as np


def pool_features(maps: Sequence[np.ndarray], valid: np.ndarray) -> np.ndarray:
    """Mean of each stage's features over the valid pixels of a chip, stages side by side.

    Args:
        maps: one array a stage, [B, h, w, C], each side dividing the chip's.
        valid: bool [B, H, W], pixels that count: with data, or those with a label. A token counts by its share of them.

    Returns:
        float64 [B, sum of C].

    Raises:
        ValueError: a chip without a valid pixel, or maps that do not divide the chips.
    """
    if empty := np.flatnonzero(~valid.any((1, 2))).tolist():
        raise ValueError(f"chips {empty} have no valid pixel to pool over; leave them out")
    b, height, width = valid.shape
    pooled = []
    for features in maps:
        n, h, w, _ = features.shape
        if n != b or height % h or width % w:
            raise ValueError(f"a map of shape {features.shape} does not divide chips of {valid.shape}")
        share = valid.reshape(b, h, height // h, w, width // w).mean((2, 4))
        pooled.append(np.einsum("bhw,bhwc->bc", share, features.astype(np.float64)) / share.sum((1, 2))[:, None])
    return np.concatenate(pooled, axis=1)


def ridge(features: np.ndarray, y: np.ndarray, alphas: Sequence[float]) -> tuple[np.ndarray, float, float]:
    """Ridge regression with the penalty that predicts left-out rows best.

    Minimises |y - intercept - features @ weights|^2 + alpha |weights|^2; the intercept is not penalised.

    Args:
        features: [n, d].
        y: [n].
        alphas: penalties to choose among, above 0.

    Returns:
        (weights [d], intercept, alpha).

    Raises:
        ValueError: no penalty, or one that is not above 0.
    """
    if not len(alphas) or min(alphas) <= 0:
        raise ValueError(f"alphas {list(alphas)}: expected penalties above 0")
    centre, mean = features.mean(0), y.mean()
    u, s, vt = np.linalg.svd(features - centre, full_matrices=False)
    projected = u.T @ (y - mean)
    best = (np.inf, 0.0)
    for alpha in alphas:
        shrink = s**2 / (s**2 + alpha)
        residual = y - mean - u @ (shrink * projected)
        leverage = 1 / len(y) + (u**2) @ shrink
        best = min(best, (float(np.mean((residual / (1 - leverage)) ** 2)), float(alpha)))
    alpha = best[1]
    weights = vt.T @ (s / (s**2 + alpha) * projected)
    return weights, float(mean - centre @ weights), alpha


def ridge_probe(
    features_train: np.ndarray,
    y_train: np.ndarray,
    features_val: np.ndarray,
    y_val: np.ndarray,
    alphas: Sequence[float],
) -> float:
    """RMSE on the validation chips of a ridge regression on the training chips.

    Features are z-scored with the training chips' statistics; the penalty is chosen by leaving training chips out, so
    that the score owes nothing to the validation chips.

    Args:
        features_train: [n, d].
        y_train: [n], Mg/ha.
        features_val: [m, d].
        y_val: [m].
        alphas: penalties to choose among, above 0.

    Returns:
        Mg/ha.
    """
    train, val = (np.asarray(a, np.float64) for a in (features_train, features_val))
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 0, std, 1)  # a constant feature tells nothing and weighs nothing
    weights, intercept, _ = ridge((train - mean) / std, np.asarray(y_train, np.float64), alphas)
    error = (val - mean) / std @ weights + intercept - y_val
    return float(np.sqrt(np.mean(error**2)))
