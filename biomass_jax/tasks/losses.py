"""Losses over labelled pixels, each as a sum and a count, so that batches, micro-batches and hosts add up exactly.

The loss of any number of parts is `finish(sum of totals, sum of counts)`, and its gradient follows by the chain rule:
d finish / d total times the sum of the parts' gradients of their totals. The mean of per-part losses is neither.
"""

import jax
import jax.numpy as jnp

KINDS = ("rmse", "mse", "mae", "huber")
# The reference divides by (number of valid pixels + float32's epsilon) under the root (terratorch 0.99.2).
EPSILON = 1.19e-7


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
    # Replaced before the arithmetic as well as after it: 0 times the gradient of a NaN is NaN.
    error = jnp.where(labelled, prediction.astype(jnp.float32) - label.astype(jnp.float32), 0)
    error = jnp.where(labelled, _pixel_loss(error, kind, huber_delta), 0)
    return error.sum(), labelled.sum(dtype=jnp.float32)


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
    return jnp.where(perfect, 0, jnp.sqrt(jnp.where(perfect, 1, total / (count + EPSILON))))


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
