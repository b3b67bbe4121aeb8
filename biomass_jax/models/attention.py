"""Multi-head self-attention within windows, with a relative position bias.

Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models import initialisation, swin_ops
from biomass_jax.models.layers import Dense


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a relative position bias."""

    num_heads: int
    window_size: int
    initializer: str = "torch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None) -> jax.Array:
        """x [B * nW, w * w, C], mask [nW, w * w, w * w] or None -> [B * nW, w * w, C]. Softmax in float32."""
        n, tokens, c = x.shape
        heads, dim = self.num_heads, c // self.num_heads
        table = self.param(
            "relative_position_bias_table",
            initialisation.bias_table(self.initializer),
            ((2 * self.window_size - 1) ** 2, heads),
            jnp.float32,
        )
        draws = initialisation.dense(self.initializer, c)
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv", **draws)(x)
        # Batch-heads-tokens-dim: both products then are plain batched matmuls, without a transpose inside. And in three
        # from the start, so that the gradients of q, k and v are put together where they are wanted in one go.
        q, k, v = (part.reshape(n, tokens, heads, dim).transpose(0, 2, 1, 3) for part in jnp.split(qkv, 3, axis=-1))
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        bias = table[swin_ops.relative_position_index(self.window_size)].transpose(2, 0, 1)
        if mask is None:
            scores = scores + bias
        else:
            windows = mask.shape[0]
            scores = scores.reshape(n // windows, windows, heads, tokens, tokens) + (bias + mask[:, None])
            scores = scores.reshape(n, heads, tokens, tokens)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        x = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        x = x.transpose(0, 2, 1, 3).reshape(n, tokens, c)
        return Dense(c, dtype=self.dtype, name="proj", **draws)(x)
