"""Losses over labelled or masked pixels, each as a sum and a count, so that micro-batches and hosts add up exactly.

The loss of any number of parts is `finish(sum of totals, sum of counts)`, and its gradient follows by the chain rule:
d finish / d total times the sum of the parts' gradients of their totals. The mean of per-part losses is neither.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax.tasks.scores import REFERENCE_EPSILON

Array = TypeVar("Array", jax.Array, np.ndarray)

KINDS = ("rmse", "mse", "mae", "huber")  # of the mean alone
# Losses of a spread, and the `spread` of the model that each belongs to.
SPREAD_KINDS = {"gaussian_nll": "gaussian", "beta_nll": "gaussian", "laplace_nll": "laplace", "pinball": "quantiles"}
CHOICES = (*KINDS, *SPREAD_KINDS)
# The original adds it to the number of masked pixels, lest none be masked.
_EPSILON = 1e-5
# MAE's and Swin's, added to a patch's variance.
_VARIANCE_EPSILON = 1e-6


def loss_sums(
    prediction: jax.Array, label: jax.Array, kind: str, *, huber_delta: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Sum of the pixel losses where there is a label, and how many those are.

    Args:
        prediction: [B, H, W], as labels. Values at pixels without a label, NaN among them, have no influence, neither
            on the sum nor on its gradient; NaN at a labelled pixel makes the sum NaN.
        label: [B, H, W], in its unit; below 0 or NaN for none.
        kind: one of `KINDS`. `rmse` and `mse` sum squares, `mae` magnitudes, `huber` e^2 / 2 up to `huber_delta` and
            delta (|e| - delta / 2) beyond (Huber 1964, as torch's HuberLoss).
        huber_delta: in the label's unit; read by `huber` alone.

    Returns:
        (total, count), float32 scalars.

    Raises:
        ValueError: unknown kind, or shapes that differ.
    """
    if prediction.shape != label.shape:  # broadcasting would make a plausible number of it
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} must have the same shape")
    labelled = label >= 0
    # Replaced before the arithmetic: 0 times the gradient of a NaN is NaN. Every loss of 0 is 0.
    error = jnp.where(labelled, prediction.astype(jnp.float32) - label.astype(jnp.float32), 0)
    # |e|, whose derivative at 0 is 0 as in torch; that of `jnp.abs` is 1.
    magnitude = error * jax.lax.stop_gradient(jnp.sign(error))
    return pixel_losses(magnitude, kind, huber_delta).sum(), labelled.sum(dtype=jnp.float32)


def finish(total: jax.Array, count: jax.Array, kind: str) -> jax.Array:
    """The loss of all that was summed, a float32 scalar.

    `rmse` takes the root once, sqrt(total / (count + 1.19e-7)); the others are total / count. Nothing labelled gives 0,
    and so does a perfect prediction, both with zero gradients (the root's derivative at 0 is infinite, which is NaN in
    the reference). A NaN total stays NaN.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in CHOICES:
        raise _unknown(kind, CHOICES)
    if kind != "rmse":
        return total / jnp.maximum(count, 1)
    perfect = total == 0
    return jnp.where(perfect, 0, jnp.sqrt(jnp.where(perfect, 1, total / (count + REFERENCE_EPSILON))))


def pixel_losses(magnitude: Array, kind: str, huber_delta: float) -> Array:
    """Loss of each pixel by the magnitude of its error, see `loss_sums`; by JAX or by NumPy, as the array is.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "mae":
        return magnitude
    if kind == "huber":
        numbers: Any = magnitude.__array_namespace__()
        near = numbers.minimum(magnitude, huber_delta)
        return near * (magnitude - 0.5 * near)
    if kind in ("rmse", "mse"):
        return magnitude * magnitude
    raise _unknown(kind, KINDS)


def _unknown(kind: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"unknown loss {kind!r}; expected one of {', '.join(known)}")


def spread_sums(
    outputs: jax.Array,
    label: jax.Array,
    kind: str,
    *,
    nll_beta: float = 0.5,
    quantile_levels: Sequence[float] = (),
    mean_scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the pixel losses of mean and spread where there is a label, and how many those are.

    Args:
        outputs: [B, H, W, C], named by `BiomassModel.outputs`, the mean first. Values at pixels without a label, NaN
            among them, have no influence, neither on the sum nor on its gradient.
        label: [B, H, W], in its unit; below 0 or NaN for none.
        kind: one of `SPREAD_KINDS`; see `spread_pixel_losses`.
        nll_beta: read by `beta_nll` alone, which weighs each pixel's `gaussian_nll` by sigma^(2 beta), without a
            gradient through the weight (Seitzer et al. 2022, arXiv 2203.09168, equation 4, constants kept): 0 is the
            likelihood itself, 1 gives the mean the gradient of the squared error.
        quantile_levels: of `pinball`.
        mean_scale: in the label's unit; see `spread_pixel_losses`.

    Returns:
        (total, count), float32 scalars; `finish` makes their loss.

    Raises:
        ValueError: unknown kind, or shapes that don't belong together.
    """
    if kind not in SPREAD_KINDS:
        raise _unknown(kind, SPREAD_KINDS)
    channels = 1 + len(quantile_levels) if kind == "pinball" else 2
    if outputs.shape != (*label.shape, channels):
        raise ValueError(f"outputs {outputs.shape} and label {label.shape}; {kind} takes outputs [B, H, W, {channels}]")
    known = label >= 0
    # Replaced before the arithmetic and left out after it: 0 times the gradient of a NaN is NaN.
    outputs = jnp.where(known[..., None], outputs.astype(jnp.float32), 0)
    target = jnp.where(known, label.astype(jnp.float32), 0)
    losses = spread_pixel_losses(outputs, target, kind, quantile_levels=quantile_levels, mean_scale=mean_scale)
    if kind == "beta_nll":
        losses *= jax.lax.stop_gradient(jnp.exp(2 * nll_beta * outputs[..., 1]))
    return jnp.where(known, losses, 0).sum(), known.sum(dtype=jnp.float32)


def spread_pixel_losses(
    outputs: Array, label: Array, kind: str, *, quantile_levels: Sequence[float] = (), mean_scale: float | None = None
) -> Array:
    """Loss of each labelled pixel, by JAX or by NumPy, whichever the arrays are of.

    With the error e = label - mean and a scale s, both in the label's unit:

    - `gaussian_nll`, `beta_nll` (before its weight): ln(2 pi) / 2 + ln s + (e / s)^2 / 2, minus the log density of a
      normal distribution with standard deviation s.
    - `laplace_nll`: ln 2 + ln s + |e| / s, likewise of a Laplace distribution with scale s (standard deviation
      sqrt(2) s).
    - `pinball`: the mean over the levels t of max(t d, (t - 1) d), d = label - quantile (Koenker and Bassett 1978),
      which does nothing for the mean; with `mean_scale`, e^2 / (2 mean_scale) besides, in its unit too, so that a mean
      that is trained stays a mean.

    Args:
        outputs: [..., C], the mean, then ln s or the quantiles.
        label: [...], in its unit.
        kind: one of `SPREAD_KINDS`.
        quantile_levels: of `pinball`.
        mean_scale: in the label's unit; read by `pinball` alone.

    Raises:
        ValueError: unknown kind.
    """
    numbers: Any = outputs.__array_namespace__()
    error = label - outputs[..., 0]
    if kind == "pinball":
        levels = numbers.asarray(quantile_levels, dtype=outputs.dtype)
        above = label[..., None] - outputs[..., 1:]
        losses = numbers.maximum(levels * above, (levels - 1) * above).mean(-1)
        return losses if mean_scale is None else losses + 0.5 / mean_scale * error**2
    log_scale = outputs[..., 1]
    z = error * numbers.exp(-log_scale)
    if kind == "laplace_nll":
        return math.log(2) + log_scale + numbers.abs(z)
    if kind in ("gaussian_nll", "beta_nll"):
        return 0.5 * math.log(2 * math.pi) + log_scale + 0.5 * z**2
    raise _unknown(kind, SPREAD_KINDS)


def simmim_chip_sums(
    image_zscored: jax.Array,
    reconstruction: jax.Array,
    mask_patch_grid: jax.Array,
    *,
    patch_size: int,
    nodata: jax.Array | None = None,
    normalize_patch: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of |target - reconstruction| over masked pixels of each chip and band, and how many pixels those are.

    Args:
        image_zscored: [B, H, W, bands].
        reconstruction: [B, H, W, bands], of the targets: z-scores, or normalised ones with `normalize_patch`.
        mask_patch_grid: [B, H/p, W/p], 1 where a token is masked; cells of any size are spelt out in tokens.
        patch_size: side of a token in pixels, p.
        nodata: bool [B, H, W], pixels to leave out, whose values (NaN, too) then have no influence on the sum and its
            gradient; None counts every masked pixel, as the original does.
        normalize_patch: side in pixels of the patches whose own statistics normalise the targets, see
            `patch_statistics`; None for z-scored targets.

    Returns:
        (total, count), float32 [B, bands] each.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_shapes(image_zscored, reconstruction, mask_patch_grid, patch_size, nodata)
    counted = mask_patch_grid.repeat(patch_size, axis=1).repeat(patch_size, axis=2) > 0
    target = image_zscored.astype(jnp.float32)
    if nodata is not None:
        counted &= ~nodata
    if normalize_patch is not None:
        mean, std = patch_statistics(target, normalize_patch, nodata)
        target = (target - mean) / std
    counted = counted[..., None]
    # Replaced inside: 0 times the gradient of a NaN would be NaN.
    error = jnp.abs(jnp.where(counted, target - reconstruction.astype(jnp.float32), 0))
    count = counted.sum((1, 2), dtype=jnp.float32)
    return error.sum((1, 2)), jnp.broadcast_to(count, (target.shape[0], target.shape[-1]))


def simmim_finish(total: jax.Array, count: jax.Array, *, bands: int) -> jax.Array:
    """The loss of added-up sums: total / (count + 1e-5 bands), 0 with zero gradients where nothing was masked.

    `bands` is how many of them are in the sums; 1 gives each band's masked L1 of that band's sums.
    """
    return total / (count + _EPSILON * bands)


def patch_statistics(image: jax.Array, patch: int, nodata: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Mean and spread of each patch and band over its pixels with data, spread over the image again.

    Normalised targets follow MAE (He et al., arXiv 2111.06377, `norm_pix_loss` of facebookresearch/mae): fixed patches,
    (x - mean) / sqrt(var + 1e-6) with the unbiased variance. Each band has statistics of its own, as in the
    `norm_targets` of microsoft/Swin-Transformer models/simmim.py: MAE's, joint over bands, would leave infrared the
    bright band of every patch of forest and so be predicted by a constant.

    Args:
        image: [B, H, W, bands].
        patch: side in pixels, which divides H and W; the mask patch is the natural choice.
        nodata: bool [B, H, W], pixels that do not count.

    Returns:
        (mean, std), float32 [B, H, W, bands]; reconstruction * std + mean is in the image's units. std is
        sqrt(var + 1e-6); 0 and 1e-3 in a patch without data.

    Raises:
        ValueError: a side that is no multiple of `patch`.
    """
    b, h, w, bands = image.shape
    if patch < 1 or h % patch or w % patch:
        raise ValueError(f"targets of {h} x {w} px cannot be normalised in patches of {patch} px: no multiples of it")
    blocks = image.astype(jnp.float32).reshape(b, h // patch, patch, w // patch, patch, bands)
    valid = jnp.ones((b, h, w), bool) if nodata is None else ~nodata
    valid = valid.reshape(b, h // patch, patch, w // patch, patch, 1)
    count = valid.sum((2, 4), keepdims=True, dtype=jnp.float32)
    mean = jnp.where(valid, blocks, 0).sum((2, 4), keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.square(jnp.where(valid, blocks - mean, 0)).sum((2, 4), keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(count - 1, 1) + _VARIANCE_EPSILON)
    spread = [jnp.broadcast_to(x, blocks.shape).reshape(image.shape) for x in (mean, std)]
    return spread[0], spread[1]


def _check_shapes(
    image: jax.Array, reconstruction: jax.Array, mask: jax.Array, patch_size: int, nodata: jax.Array | None
) -> None:
    """Broadcasting would make plausible numbers of shapes that do not belong together."""
    if image.ndim != 4 or reconstruction.shape != image.shape:
        raise ValueError(
            f"image {image.shape} and reconstruction {reconstruction.shape}: expected one [B, H, W, bands]"
        )
    b, h, w, _ = image.shape
    if (mask.shape[0], mask.shape[1] * patch_size, mask.shape[2] * patch_size) != (b, h, w):
        raise ValueError(f"mask {mask.shape} of {patch_size} px tokens does not cover images {image.shape}")
    if nodata is not None and nodata.shape != (b, h, w):
        raise ValueError(f"nodata {nodata.shape} does not belong to images {image.shape}: expected {(b, h, w)}")
