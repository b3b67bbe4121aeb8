"""Multi-head self-attention within windows, with a relative position bias: by einsums, or by one kernel on GPUs.

Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models import initialisation, shapes, swin_ops
from biomass_jax.models.fused import attention, choice
from biomass_jax.models.lora import Lora, dense
from biomass_jax.models.shapes import Size
from biomass_jax.runtime import mesh


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows of a map, with a relative position bias."""

    num_heads: int
    window_size: int
    initializer: str = "torch"
    attention: str = "auto"
    dtype: Any = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shift: Size) -> jax.Array:
        """x [B, H, W, C], H and W multiples of the window -> same shape. Softmax in float32.

        Windows are those of the map rolled by `shift` tokens, in which what lay apart before doesn't attend.
        """
        _, height, width, c = x.shape
        size = self.window_size
        fused = choice.attention_is_fused(self.attention, x.shape, self.num_heads, size, self.dtype)
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
            attend = partial(attention.attend, window_size=size, shift=shift)
            return proj(mesh.on_each_device(attend, qkv(x), bias))
        mask = None if shapes.is_zero(shift) else swin_ops.shift_mask(height, width, size, shift)
        windows = swin_ops.attend_windows(qkv(swin_ops.to_windows(x, size, shift)), bias, mask)
        return swin_ops.from_windows(proj(windows), size, shift, height, width)
