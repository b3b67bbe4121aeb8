"""Matrix products and convolutions whose weights' gradients suit XLA on CPU; elsewhere they are JAX's own.

Forward they are the plain ones. Backward, on CPU, XLA transposes the gradient of the output in memory or walks through
large maps column by column; with the input transposed first a product is a tenth to a third faster, a convolution of a
large map twice as fast. The sums are the same ones in another order.
"""

from typing import Any

import jax
import jax.numpy as jnp

from biomass_jax.models.swin_ops import computed_once


def dense(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """For `nn.Dense(dot_general=...)`: x [..., K], kernel [K, N] -> [..., N]."""
    del dimensions  # a dense layer's are always these
    rows = _product(x.reshape(-1, x.shape[-1]), kernel, _precision(precision))
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def _precision(given: Any) -> Any:
    """The precision that holds where the forward pass is traced: the backward pass may be traced outside of it."""
    return given or jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def _plain_product(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """x [M, K], kernel [K, N] -> [M, N]."""
    return jnp.dot(x, kernel, precision=precision)


_product = jax.custom_vjp(_plain_product, nondiff_argnums=(2,))


def _product_forward(x: jax.Array, kernel: jax.Array, precision: Any) -> tuple[jax.Array, Any]:
    return _plain_product(x, kernel, precision), (x, kernel)


def _product_backward(precision: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return jnp.dot(g, kernel.T, precision=precision), _gradient_of_kernel(x, g, precision)


_product.defvjp(_product_forward, _product_backward)


def _gradient_of_kernel(x: jax.Array, g: jax.Array, precision: Any) -> jax.Array:
    """x [M, K], g [M, N] -> [K, N]."""
    return jnp.dot(computed_once(x.T), g, precision=precision)


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    precision: Any = None,
) -> jax.Array:
    """For `nn.Conv(conv_general_dilated=...)`: x [B, H, W, C], kernel [k, k, C, N] -> [B, H, W, N].

    Raises:
        ValueError: a stride, dilation, groups, or a kernel or padding with which the map wouldn't keep its size.
    """
    del dimension_numbers  # a convolution's over two axes are always these
    plain = {*strides, *lhs_dilation, *rhs_dilation, feature_group_count} == {1} and padding == "SAME"
    if not plain or kernel.shape[0] % 2 == 0 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(
            f"a convolution with kernel {kernel.shape}, strides {strides}, padding {padding!r}, {feature_group_count} "
            f"groups and dilations {lhs_dilation}, {rhs_dilation}; expected a square kernel of odd size and 'SAME', "
            "all else 1"
        )
    return _convolution(x, kernel, _precision(precision))


def _plain_convolution(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, precision=precision)


_convolution = jax.custom_vjp(_plain_convolution, nondiff_argnums=(2,))


def _convolution_forward(x: jax.Array, kernel: jax.Array, precision: Any) -> tuple[jax.Array, Any]:
    return _plain_convolution(x, kernel, precision), (x, kernel)


def _convolution_backward(precision: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved

    def by_offset(x: jax.Array, g: jax.Array) -> jax.Array:
        k, h, w = kernel.shape[0], *x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
        seen = [padded[:, i : i + h, j : j + w].reshape(-1, x.shape[-1]) for i in range(k) for j in range(k)]
        found = [_gradient_of_kernel(part, g.reshape(-1, g.shape[-1]), precision) for part in seen]
        return jnp.stack(found).reshape(kernel.shape)

    def by_convolution(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: _plain_convolution(x, kernel, precision), kernel)[1](g)[0]

    of_x = jax.vjp(lambda x: _plain_convolution(x, kernel, precision), x)[1](g)[0]
    return of_x, jax.lax.platform_dependent(x, g, cpu=by_offset, default=by_convolution)


_convolution.defvjp(_convolution_forward, _convolution_backward)
