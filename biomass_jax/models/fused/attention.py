"""Attention within shifted windows as one kernel for GPUs, from q, k and v to its output.

The kernel (Pallas on Triton) reads q, k and v where they lie in the map and writes its output there: roll, partition
and their reverse are row numbers that it computes. A program is one window of one head; its tokens are filled up to 16
or 64 and masked; scores and weights never leave the chip. The backward pass computes the weights again. Elsewhere than
on GPUs the kernel is interpreted, which is for tests.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.ref import AbstractRef
from jax.typing import DTypeLike

from biomass_jax.models import swin_ops
from biomass_jax.models.fused import kernels

WINDOW_SIZES = range(1, 9)
HEAD_SIZES = (16, 32, 64)
# Windows of which a program sums up the bias's gradient; fewer where there would be fewer programs than these.
WINDOWS_A_PROGRAM = 16
FEWEST_PROGRAMS = 512
TUNED = {"warps": 4, "stages": 1}  # the fastest of those tried on an H200
NO_KEY = -1e9  # score of a key that only fills up


def why_not(shape: tuple[int, ...], num_heads: int, window_size: int, dtype: DTypeLike) -> str:
    """Why the kernel doesn't take a map, '' where it does: shape [B, H, W, C] and dtype of the block's input."""
    batch, height, width, c = shape
    if window_size not in WINDOW_SIZES:
        return f"windows are {window_size} tokens wide, and the kernel takes 1 to {WINDOW_SIZES[-1]}"
    if height % window_size or width % window_size:
        return f"a map of {height} x {width} tokens isn't cut into windows of {window_size} without a rest"
    if c // num_heads not in HEAD_SIZES:
        return f"a head has {c // num_heads} channels, and the kernel takes {', '.join(map(str, HEAD_SIZES))}"
    if jnp.dtype(dtype).name not in kernels.DTYPES:
        return f"the dtype is {jnp.dtype(dtype).name}, and the kernel takes {', '.join(kernels.DTYPES)}"
    if not 0 < (numbers := batch * height * width * 3 * c) <= kernels.MOST_NUMBERS:
        return f"the batch's q, k and v are {numbers:,} numbers, and the kernel takes 1 to {kernels.MOST_NUMBERS:,}"
    return ""


def attend(qkv: jax.Array, bias: jax.Array, window_size: int, shift: int) -> jax.Array:
    """Attention of a map by the kernel; `why_not` says what it takes.

    Derivatives of the first order work both ways: `jax.grad` by a kernel, `jax.jvp` by the einsums.

    Args:
        qkv: [B, H, W, 3C]: queries, keys and values, each with its heads side by side.
        bias: float32 [heads, w * w, w * w], added to the scores.
        window_size: side of a window, tokens.
        shift: by which the map is rolled before it is cut into windows.

    Returns:
        [B, H, W, C].
    """
    batch, height, width, c = qkv.shape
    heads = bias.shape[0]
    sizes = (batch, height, width, heads, c // 3 // heads, window_size, shift)
    return _attend(qkv, bias, _Layout(*sizes, kernels.precision_here(qkv.dtype), FEWEST_PROGRAMS))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What lies where in a map of H x W tokens of `heads` x `dim` channels."""

    batch: int
    height: int
    width: int
    heads: int
    dim: int
    size: int
    shift: int
    precision: lax.Precision
    fewest_programs: int

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    @property
    def rows(self) -> int:
        """Tokens of the map."""
        return self.batch * self.height * self.width

    @property
    def tokens(self) -> int:
        """Rows of a program's arrays: those of a window, filled up to what the card multiplies."""
        return max(16, pl.next_power_of_2(self.size**2))

    @property
    def windows(self) -> int:
        return self.batch * (self.height // self.size) * (self.width // self.size)

    @property
    def in_a_program(self) -> int:
        """Windows of which a program of the backward pass sums up the bias's gradient."""
        return min(WINDOWS_A_PROGRAM, max(1, self.windows * self.heads // self.fewest_programs))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attend(qkv: jax.Array, bias: jax.Array, layout: _Layout) -> jax.Array:
    return _forward(qkv, bias, layout)


@_attend.defjvp
def _attend_jvp(
    layout: _Layout, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _attend(*primals, layout), _tangent_p.bind(*primals, *tangents, layout=layout)


@functools.partial(jax.jit, static_argnames="layout")
def _tangent(qkv: jax.Array, bias: jax.Array, of_qkv: jax.Array, of_bias: jax.Array, *, layout: _Layout) -> jax.Array:
    """The tangent of the output, [B, H, W, C], from those of qkv [B, H, W, 3C] and bias [heads, w * w, w * w]."""
    by_einsums = functools.partial(swin_ops.attend_map, window_size=layout.size, shift=layout.shift)
    with jax.default_matmul_precision(layout.precision.name.lower()):
        return jax.jvp(by_einsums, (qkv, bias), (of_qkv, of_bias))[1]


# Forward mode takes tangents by the einsums. Reverse mode never computes them: in place of their transpose it calls the
# kernel of the backward pass, which a `jax.custom_vjp` could do too, but that would forbid forward mode.
_tangent_p = Primitive("window_attention_tangent")
_tangent_p.def_impl(_tangent)
_tangent_p.def_abstract_eval(
    lambda qkv, *rest, layout: qkv.update(shape=(*qkv.shape[:3], layout.channels), weak_type=False)
)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=False))


def _tangent_batched(
    arrays: Sequence[jax.Array], axes: Sequence[int | None], *, layout: _Layout
) -> tuple[jax.Array, int]:
    return jax.vmap(functools.partial(_tangent, layout=layout), in_axes=tuple(axes))(*arrays), 0


def _tangent_transposed(
    g: jax.Array | ad.Zero, qkv: jax.Array, bias: jax.Array, *tangents: object, layout: _Layout
) -> list[jax.Array | None]:
    if isinstance(g, ad.Zero):
        return [None] * 4
    found = _backward(qkv, bias, g, layout=layout)
    return [None, None, *(of if ad.is_undefined_primal(one) else None for of, one in zip(found, tangents, strict=True))]


batching.primitive_batchers[_tangent_p] = _tangent_batched
ad.primitive_transposes[_tangent_p] = _tangent_transposed


# Compiled by themselves, so that blocks alike are traced once.
@functools.partial(jax.jit, static_argnames="layout")
def _forward(qkv: jax.Array, bias: jax.Array, layout: _Layout) -> jax.Array:
    """qkv [B, H, W, 3C], bias [heads, w * w, w * w] -> [B, H, W, C]."""
    rows = layout.rows
    found = kernels.call(
        functools.partial(_forward_kernel, layout=layout),
        "window_attention",
        layout.windows * layout.heads,
        (jax.ShapeDtypeStruct((rows, layout.channels), qkv.dtype),),
        (qkv.reshape(rows, -1), _table(bias, layout)),
        **TUNED,
    )
    return found[0].reshape(*qkv.shape[:3], layout.channels)


@functools.partial(jax.jit, static_argnames="layout")
def _backward(qkv: jax.Array, bias: jax.Array, g: jax.Array, *, layout: _Layout) -> tuple[jax.Array, jax.Array]:
    """qkv [B, H, W, 3C], bias [heads, w * w, w * w], g [B, H, W, C] -> gradients of qkv and of bias."""
    rows, tokens = layout.rows, layout.tokens
    groups = pl.cdiv(layout.windows, layout.in_a_program)
    of_qkv, of_bias = kernels.call(
        functools.partial(_backward_kernel, layout=layout),
        "window_attention_gradient",
        groups * layout.heads,
        (
            jax.ShapeDtypeStruct((rows, 3 * layout.channels), qkv.dtype),
            jax.ShapeDtypeStruct((groups * layout.heads * tokens, tokens), jnp.float32),
        ),
        (qkv.reshape(rows, -1), _table(bias, layout), g.astype(qkv.dtype).reshape(rows, -1)),
        **TUNED,
    )
    of_bias = of_bias.reshape(groups, layout.heads, tokens, tokens).sum(0)
    return of_qkv.reshape(qkv.shape), of_bias[:, : layout.size**2, : layout.size**2]


def _table(bias: jax.Array, layout: _Layout) -> jax.Array:
    """What is added to the scores, float32 [kinds * heads * tokens, tokens]: bias and mask of each kind of window.

    A shifted map has four kinds: 2 for the last row of windows plus 1 for the last column.
    """
    size, fill = layout.size, layout.tokens - layout.size**2
    mask = swin_ops.shift_mask(2 * size, 2 * size, size, layout.shift)[:, None] if layout.shift else jnp.zeros(1)
    table = (bias + mask).reshape(-1, size**2, size**2)
    table = jnp.pad(table, ((0, 0), (0, fill), (0, 0)))
    return jnp.pad(table, ((0, 0), (0, 0), (0, fill)), constant_values=NO_KEY).reshape(-1, layout.tokens)


def _divided(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and rest of int32 numbers from 0 on."""
    divisor = np.int32(by)  # with JAX's 64 bits on, a plain number would be an int64
    return lax.div(number, divisor), lax.rem(number, divisor)


def _places(window: jax.Array, layout: _Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of the map, int32 [tokens], in which a window's tokens lie; which of these there are; the window's kind."""
    size, across, down = layout.size, layout.width // layout.size, layout.height // layout.size
    image, column = _divided(window, across)
    image, row = _divided(image, down)
    token = lax.iota(jnp.int32, layout.tokens)
    inner_row, inner_column = _divided(token, size)
    _, y = _divided(row * size + inner_row + layout.shift, layout.height)
    _, x = _divided(column * size + inner_column + layout.shift, layout.width)
    last_row, last_column = _divided(row + 1, down)[0], _divided(column + 1, across)[0]  # 1 there, else 0
    kind = 2 * last_row + last_column if layout.shift else jnp.zeros_like(row)
    there = (token < size**2) & (window < layout.windows)
    # Others are masked, but the interpreter writes back what it finds in their place: it must be nobody's.
    rows = jnp.where(there, (image * layout.height + y) * layout.width + x, layout.rows)
    return rows, there, kind


def _read(ref: AbstractRef, rows: jax.Array, there: jax.Array, first: jax.Array, layout: _Layout) -> jax.Array:
    """A head's channels from the column `first` on, [tokens, dim]; 0 in rows that only fill up."""
    mask = jnp.broadcast_to(there[:, None], (layout.tokens, layout.dim))
    return triton.load(kernels.spot(ref, rows, first, layout.dim), mask=mask, other=0.0)


def _write(ref: AbstractRef, rows: jax.Array, there: jax.Array, first: jax.Array, value: jax.Array) -> None:
    """Write what `_read` reads."""
    mask = jnp.broadcast_to(there[:, None], value.shape)
    triton.store(kernels.spot(ref, rows, first, value.shape[1]), value.astype(ref.dtype), mask=mask)


def _weights(
    q: jax.Array, k: jax.Array, table_ref: AbstractRef, kind: jax.Array, head: jax.Array, layout: _Layout
) -> jax.Array:
    """Softmax of the scores, float32 [tokens, tokens]."""
    rows = (kind * layout.heads + head) * layout.tokens + lax.iota(jnp.int32, layout.tokens)
    table = triton.load(kernels.spot(table_ref, rows, jnp.zeros_like(head), layout.tokens))
    scores = kernels.dot(q, k, (1, 1), layout.precision) * layout.dim**-0.5 + table
    powers = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return powers / jnp.sum(powers, axis=1, keepdims=True)


def _forward_kernel(qkv_ref: AbstractRef, table_ref: AbstractRef, out_ref: AbstractRef, *, layout: _Layout) -> None:
    """One window of one head: qkv [B * H * W, 3C], table as `_table` has it -> out [B * H * W, C]."""
    program, c = pl.program_id(0), layout.channels
    window, head = _divided(program, layout.heads)
    rows, there, kind = _places(window, layout)
    first = head * layout.dim
    q, k, v = (_read(qkv_ref, rows, there, first + part * c, layout) for part in range(3))
    weights = _weights(q, k, table_ref, kind, head, layout)
    _write(out_ref, rows, there, first, kernels.dot(weights.astype(v.dtype), v, (1, 0), layout.precision))


def _backward_kernel(
    qkv_ref: AbstractRef,
    table_ref: AbstractRef,
    g_ref: AbstractRef,
    of_qkv_ref: AbstractRef,
    of_bias_ref: AbstractRef,
    *,
    layout: _Layout,
) -> None:
    """Some windows of one head: g [B * H * W, C] -> gradients of qkv, and of the bias, summed over these windows."""
    program, c, tokens = pl.program_id(0), layout.channels, layout.tokens
    group, head = _divided(program, layout.heads)
    first = head * layout.dim

    def one(number: jax.Array, total: jax.Array) -> jax.Array:
        window = group * layout.in_a_program + number
        rows, there, kind = _places(window, layout)  # the last program's windows need not all be there
        q, k, v = (_read(qkv_ref, rows, there, first + part * c, layout) for part in range(3))
        g = _read(g_ref, rows, there, first, layout)
        weights = _weights(q, k, table_ref, kind, head, layout)
        of_weights = kernels.dot(g, v, (1, 1), layout.precision)
        of_scores = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
        of_products = (of_scores * layout.dim**-0.5).astype(q.dtype)
        _write(of_qkv_ref, rows, there, first, kernels.dot(of_products, k, (1, 0), layout.precision))
        _write(of_qkv_ref, rows, there, first + c, kernels.dot(of_products, q, (0, 0), layout.precision))
        _write(
            of_qkv_ref, rows, there, first + 2 * c, kernels.dot(weights.astype(g.dtype), g, (0, 0), layout.precision)
        )
        return total + of_scores

    total = lax.fori_loop(np.int32(0), np.int32(layout.in_a_program), one, jnp.zeros((tokens, tokens), jnp.float32))
    rows = program * tokens + lax.iota(jnp.int32, tokens)
    triton.store(kernels.spot(of_bias_ref, rows, jnp.zeros_like(head), tokens), total)
