"""The second half of a Swin block as one kernel for GPUs: LayerNorm, two dense layers with GELU, added to its input.

A program has some rows of the map. It normalises them, goes through the hidden layer some columns at a time, and
keeps its part of the result on the chip: neither the normalised map nor the hidden layer, four times as wide, is
ever in memory. It reads all weights, which stay in the card's cache. That pays where maps are long and narrow, and
memory, not arithmetic, is what bounds them: in the first two stages. Forward alone; derivatives are plain JAX's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.ref import AbstractRef
from jax.typing import DTypeLike

from biomass_jax.models.fused import kernels
from biomass_jax.models.layers import LayerNorm, gelu, layer_norm

MOST_CHANNELS = 256  # a program's part of the result has to stay in registers
EPSILON = LayerNorm.epsilon
HIDDEN = 64  # the hidden layer is a multiple of
ROWS = 64  # of the map, that a program computes

# erf(x) = x P(x^2) / Q(x^2), x cut at 3.8325, where float32 has 1: the polynomials of XLA's own float32 erf
# (xla/hlo/builder/lib/math.cc, ErfImpl32), the highest power first. Pallas on Triton has no erf.
_ERF_ABOVE = (
    0.00022905065861350646,
    0.0034082910107109506,
    0.050955695062380861,
    0.18520832239976145,
    1.128379143519084,
)
_ERF_BELOW = (
    -1.1791602954361697e-7,
    0.000023547966471313185,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)
_ERF_IS_ONE = 3.832506856900711


@dataclasses.dataclass(frozen=True)
class MlpWeights:
    """What the second half of a block has learned, as its modules hold it.

    Attributes:
        scale: of the LayerNorm, float32 [C].
        shift: likewise.
        kernel_in: of the dense layer into the hidden one, [C, hidden].
        bias_in: [hidden].
        kernel_out: of the dense layer back, [hidden, C].
        bias_out: [C].
    """

    scale: jax.Array
    shift: jax.Array
    kernel_in: jax.Array
    bias_in: jax.Array
    kernel_out: jax.Array
    bias_out: jax.Array


jax.tree_util.register_dataclass(MlpWeights)


def why_not(shape: tuple[int, ...], hidden: int, dtype: DTypeLike) -> str:
    """Why the kernel doesn't take a map, '' where it does: shape [..., C] and dtype of the block's input."""
    c, numbers = shape[-1], int(np.prod(shape))
    if c > MOST_CHANNELS:
        return f"the map has {c} channels, and the kernel takes up to {MOST_CHANNELS}"
    if hidden % HIDDEN:
        return f"the hidden layer has {hidden} channels, and the kernel takes multiples of {HIDDEN}"
    if jnp.dtype(dtype).name != "bfloat16":
        return f"the dtype is {jnp.dtype(dtype).name}, and the kernel takes bfloat16: others are bound by arithmetic"
    if not 0 < numbers <= kernels.MOST_NUMBERS:
        return f"the batch's map is {numbers:,} numbers, and the kernel takes 1 to {kernels.MOST_NUMBERS:,}"
    return ""


@jax.custom_jvp
def add_mlp(x: jax.Array, weights: MlpWeights) -> jax.Array:
    """x + fc2(gelu(fc1(norm(x)))) by the kernel; `why_not` says what it takes.

    Args:
        x: [..., C], in the type in which it is computed; sums are float32.
        weights: of the block.

    Returns:
        as x.
    """
    return _forward(x, weights)


def plain_add_mlp(x: jax.Array, weights: MlpWeights) -> jax.Array:
    """What `add_mlp` computes, as the block's modules compute it."""
    y = layer_norm(x, weights.scale, weights.shift, EPSILON).astype(x.dtype)
    y = gelu(jnp.dot(y, weights.kernel_in.astype(x.dtype)) + weights.bias_in.astype(x.dtype))
    return x + (jnp.dot(y, weights.kernel_out.astype(x.dtype)) + weights.bias_out.astype(x.dtype))


@add_mlp.defjvp
def _add_mlp_jvp(
    primals: tuple[jax.Array, MlpWeights], tangents: tuple[jax.Array, MlpWeights]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(plain_add_mlp, primals, tangents)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a program computes of a map of `rows` x `channels`."""

    rows: int
    channels: int
    hidden: int

    @property
    def wide(self) -> int:
        """Channels, filled up to what the card multiplies."""
        return max(16, pl.next_power_of_2(self.channels))

    # By the compiler's word for compute capability 9.0: no register is spilled, and of narrow maps a processor holds
    # two programs, so that one multiplies while the other computes GELU.
    @property
    def at_once(self) -> int:
        """Columns of the hidden layer that are computed at a time."""
        return HIDDEN if self.wide <= 128 else HIDDEN // 2

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return 4 if self.wide <= 128 else 8


# Compiled by itself, so that blocks alike are traced once.
@jax.jit
def _forward(x: jax.Array, weights: MlpWeights) -> jax.Array:
    sizes = _Sizes(x.size // x.shape[-1], x.shape[-1], weights.kernel_in.shape[1])
    rows = x.reshape(sizes.rows, sizes.channels)
    narrow = [kernel.astype(x.dtype) for kernel in (weights.kernel_in, weights.kernel_out)]
    vectors = [
        vector.astype(jnp.float32) for vector in (weights.scale, weights.shift, weights.bias_in, weights.bias_out)
    ]
    found = kernels.call(
        functools.partial(_kernel, sizes=sizes),
        "swin_mlp",
        pl.cdiv(sizes.rows, ROWS),
        (jax.ShapeDtypeStruct(rows.shape, x.dtype),),
        (rows, *narrow, *vectors),
        warps=sizes.warps,
        stages=2,
    )
    return found[0].reshape(x.shape)


def _erf(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -_ERF_IS_ONE, _ERF_IS_ONE)
    square = x * x
    above, below = jnp.full_like(x, _ERF_ABOVE[0]), jnp.full_like(x, _ERF_BELOW[0])
    for factor in _ERF_ABOVE[1:]:
        above = above * square + factor
    for factor in _ERF_BELOW[1:]:
        below = below * square + factor
    return x * above / below


def _gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + _erf(x * 0.5**0.5))


def _kernel(
    x_ref: AbstractRef,
    in_ref: AbstractRef,
    out_ref: AbstractRef,
    scale_ref: AbstractRef,
    shift_ref: AbstractRef,
    bias_in_ref: AbstractRef,
    bias_out_ref: AbstractRef,
    y_ref: AbstractRef,
    *,
    sizes: _Sizes,
) -> None:
    """Some rows: x [rows, C], kernels [C, hidden] and [hidden, C] -> y [rows, C]."""
    rows = pl.program_id(0) * ROWS + lax.iota(jnp.int32, ROWS)
    channels = lax.iota(jnp.int32, sizes.wide)
    known = channels < sizes.channels
    there = (rows < sizes.rows)[:, None] & known[None, :]
    # What is masked isn't read on a GPU, but the interpreter reads and writes it: it must lie within, and be nobody's.
    rows = jnp.where(rows < sizes.rows, rows, sizes.rows)
    places = rows[:, None], channels[None, :]

    def read() -> jax.Array:
        return triton.load(kernels.at(x_ref, *places), mask=there, other=0.0).astype(jnp.float32)

    def vector(ref: AbstractRef) -> jax.Array:
        return triton.load(kernels.at(ref, channels), mask=known, other=0.0)[None, :]

    wide = read()
    centred = jnp.where(known[None, :], wide - jnp.sum(wide, axis=1, keepdims=True) / sizes.channels, 0.0)
    variance = jnp.sum(centred * centred, axis=1, keepdims=True) / sizes.channels
    normed = centred / jnp.sqrt(variance + EPSILON) * vector(scale_ref) + vector(shift_ref)
    normed = normed.astype(x_ref.dtype)

    def part(number: jax.Array, total: jax.Array) -> jax.Array:
        columns = number * sizes.at_once + lax.iota(jnp.int32, sizes.at_once)
        into = triton.load(kernels.at(in_ref, channels[:, None], columns[None, :]), mask=known[:, None], other=0.0)
        back = triton.load(kernels.at(out_ref, columns[:, None], channels[None, :]), mask=known[None, :], other=0.0)
        hidden = kernels.dot(normed, into, (1, 0)) + triton.load(kernels.at(bias_in_ref, columns))[None, :]
        return total + kernels.dot(_gelu(hidden).astype(x_ref.dtype), back, (1, 0))

    start = jnp.zeros((ROWS, sizes.wide), jnp.float32)
    total = lax.fori_loop(np.int32(0), np.int32(sizes.hidden // sizes.at_once), part, start)
    # Read again, from the card's cache: there are no registers to keep it in.
    y = read() + total + vector(bias_out_ref)
    triton.store(kernels.at(y_ref, *places), y.astype(y_ref.dtype), mask=there)
