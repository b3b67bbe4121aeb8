"""Losses over labelled or masked pixels, each as a sum and a count, so that micro-batches and hosts add up exactly.

The loss of any number of parts is `finish(sum of totals, sum of counts)`, and its gradient follows by the chain rule:
d finish / d total times the sum of the parts' gradients of their totals. The mean of per-part losses is neither.
"""

import jax
import jax.numpy as jnp

from biomass_jax.tasks.scores import REFERENCE_EPSILON

KINDS = ("rmse", "mse", "mae", "huber")
# The original adds it to the number of masked pixels, lest none be masked.
_EPSILON = 1e-5
# MAE's and Swin's, added to a patch's variance.
_VARIANCE_EPSILON = 1e-6


def loss_sums(
    prediction: jax.Array, label: jax.Array, kind: str, *, huber_delta: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Sum of the pixel losses where there is a label, and how many those are.

    Args:
        prediction: [B, H, W], Mg/ha. Values at pixels without a label, NaN among them, have no influence, neither on
            the sum nor on its gradient; NaN at a labelled pixel makes the sum NaN.
        label: [B, H, W], Mg/ha; below 0 or NaN for none.
        kind: one of `KINDS`. `rmse` and `mse` sum squares, `mae` magnitudes, `huber` e^2 / 2 up to `huber_delta` and
            delta (|e| - delta / 2) beyond (Huber 1964, as torch's HuberLoss).
        huber_delta: Mg/ha; read by `huber` alone.

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
    return _pixel_loss(error, kind, huber_delta).sum(), labelled.sum(dtype=jnp.float32)


def finish(total: jax.Array, count: jax.Array, kind: str) -> jax.Array:
    """The loss of all that was summed, a float32 scalar.

    `rmse` takes the root once, sqrt(total / (count + 1.19e-7)); the others are total / count. Nothing labelled gives 0,
    and so does a perfect prediction, both with zero gradients (the root's derivative at 0 is infinite, which is NaN in
    the reference). A NaN total stays NaN.

    Raises:
        ValueError: unknown kind.
    """
    _check(kind)
    if kind != "rmse":
        return total / jnp.maximum(count, 1)
    perfect = total == 0
    return jnp.where(perfect, 0, jnp.sqrt(jnp.where(perfect, 1, total / (count + REFERENCE_EPSILON))))


def _pixel_loss(error: jax.Array, kind: str, huber_delta: float) -> jax.Array:
    _check(kind)
    # |e|, whose derivative at 0 is 0 as in torch; that of `jnp.abs` is 1.
    magnitude = error * jax.lax.stop_gradient(jnp.sign(error))
    if kind == "mae":
        return magnitude
    if kind == "huber":
        near = jnp.minimum(magnitude, huber_delta)
        return near * (magnitude - 0.5 * near)
    return jnp.square(error)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown loss {kind!r}; expected one of {', '.join(KINDS)}")


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
