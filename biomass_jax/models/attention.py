"""Multi-head self-attention within windows, with a relative position bias: by einsums, or by one kernel on GPUs.

Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2.
"""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from biomass_jax.errors import ConfigError
from biomass_jax.models import fused_attention, initialisation, swin_ops
from biomass_jax.models.lora import Lora, dense

log = logging.getLogger(__name__)

CHOICES = ("auto", "einsum", "fused")
_TRUSTED = 0.03  # of the largest number: thrice what bfloat16 and TF32 may round


def why_not_here() -> str:
    """Why this machine doesn't run the fused kernel, '' where it does: one NVIDIA GPU, of compute capability 8 on.

    And one on which the kernel was seen to work.
    """
    if jax.default_backend() != "gpu":
        return f"it is for NVIDIA GPUs, and JAX computes on {jax.default_backend()} here"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if not capability[:1].isdigit() or float(capability) < 8:
        return f"it is for NVIDIA GPUs of compute capability 8.0 on, found {capability or 'none'}"
    if jax.device_count() > 1:
        return f"it isn't split over devices, and there are {jax.device_count()}"
    return fault_here()


@functools.cache
def fault_here() -> str:
    """What is wrong with the kernel on this machine, by trying it on a small map; '' where it does what einsums do.

    A card or a version of Triton that it was never tried with must not cost a run, or its numbers.
    """
    with ThreadPoolExecutor(1) as other:  # a thread knows nothing of what is being traced in this one
        reason = other.submit(_tried).result()
    if reason:
        log.warning("attention by einsums: %s", reason)
    return reason


def _tried() -> str:
    """What is wrong with the kernel by a shifted map of four windows, in both dtypes; '' where nothing is."""
    size, shift, side, heads = 7, 3, 14, 2
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((heads, size**2, size**2), np.float32)

    def found(attend: Callable[[jax.Array, jax.Array, int, int], jax.Array], qkv: jax.Array) -> list[np.ndarray]:
        def square(qkv: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(qkv, bias, size, shift).astype(jnp.float32)
            return jnp.sum(out**2), out

        (_, out), of = jax.jit(jax.value_and_grad(square, argnums=(0, 1), has_aux=True))(qkv, jnp.asarray(bias))
        return [np.asarray(array, np.float32) for array in (out, *of)]

    for dtype in (jnp.bfloat16, jnp.float32):
        qkv = jnp.asarray(rng.standard_normal((1, side, side, 3 * 32 * heads), np.float32), dtype)
        try:
            pairs = zip(found(fused_attention.attend, qkv), found(swin_ops.attend_map, qkv), strict=True)
            worst = max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)
        except Exception as error:  # Triton, XLA and the driver each have their own kinds
            return f"the fused kernel fails on this machine: {str(error).strip().partition(chr(10))[0]}"
        if not worst < _TRUSTED:
            return f"the fused kernel's {jnp.dtype(dtype).name} numbers are off by {worst:.1%} on this machine"
    return ""


def check_here(choice: str, field: str) -> None:
    """Refuse the choice `fused`, given by a setting's name, where the kernel would be interpreted.

    Raises:
        ConfigError: why it doesn't run here.
    """
    reason = why_not_here() if choice == "fused" else ""
    if reason:
        raise ConfigError(f"{field} is 'fused', but {reason}; expected auto or einsum")


def is_fused(choice: str, shape: tuple[int, ...], num_heads: int, window_size: int, dtype: DTypeLike) -> bool:
    """Whether the fused kernel computes the attention of a map.

    Args:
        choice: `auto`, the kernel where machine and shape allow it; `einsum`; `fused`, the kernel, which a machine
            without a GPU interprets (very slowly: for tests).
        shape: [B, H, W, C], H and W multiples of the window.
        num_heads: of the block.
        window_size: side of a window, tokens.
        dtype: of the computation.

    Raises:
        ConfigError: another choice; or `fused` with a shape that the kernel doesn't take.
    """
    if choice not in CHOICES:
        raise ConfigError(f"attention is {choice!r}; expected one of {', '.join(CHOICES)}")
    if choice == "einsum" or (choice == "auto" and why_not_here()):
        return False
    reason = fused_attention.why_not(shape, num_heads, window_size, dtype)
    if reason and choice == "fused":
        raise ConfigError(f"attention is 'fused', but {reason}; expected auto or einsum")
    return not reason


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows of a map, with a relative position bias."""

    num_heads: int
    window_size: int
    initializer: str = "torch"
    attention: str = "auto"
    dtype: Any = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shift: int) -> jax.Array:
        """x [B, H, W, C], H and W multiples of the window -> same shape. Softmax in float32.

        Windows are those of the map rolled by `shift` tokens, in which what lay apart before doesn't attend.
        """
        _, height, width, c = x.shape
        size = self.window_size
        fused = is_fused(self.attention, x.shape, self.num_heads, size, self.dtype)
        table = self.param(
            "relative_position_bias_table",
            initialisation.bias_table(self.initializer),
            ((2 * size - 1) ** 2, self.num_heads),
            jnp.float32,
        )
        how: dict[str, Any] = {"dtype": self.dtype, "lora": self.lora, **initialisation.dense(self.initializer, c)}
        qkv = dense(3 * c, name="qkv", **how)
        proj = dense(c, name="proj", **how)
        bias = table[swin_ops.relative_position_index(size)].transpose(2, 0, 1)
        if fused and not self.is_initializing():
            return proj(fused_attention.attend(qkv(x), bias, size, shift))
        mask = swin_ops.shift_mask(height, width, size, shift) if shift else None
        windows = swin_ops.attend_windows(qkv(swin_ops.to_windows(x, size, shift)), bias, mask)
        return swin_ops.from_windows(proj(windows), size, shift, height, width)
