"""When kernels compute parts of the model, and when plain JAX does: by machine, by shape, and by what was asked for."""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from biomass_jax.errors import ConfigError
from biomass_jax.models import swin_ops
from biomass_jax.models.fused import attention, mlp
from biomass_jax.runtime import mesh

log = logging.getLogger(__name__)

Kernel = Callable[..., jax.Array]

CHOICES = ("auto", "einsum", "fused")
_TRUSTED = 0.03  # of the largest number: thrice what bfloat16 and TF32 may round


def why_not_here() -> str:
    """Why this machine doesn't run the kernels, '' where it does: NVIDIA GPUs, of compute capability 8 on.

    And such on which they were seen to work.
    """
    if jax.default_backend() != "gpu":
        return f"they are for NVIDIA GPUs, and JAX computes on {jax.default_backend()} here"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if not capability[:1].isdigit() or float(capability) < 8:
        return f"they are for NVIDIA GPUs of compute capability 8.0 on, found {capability or 'none'}"
    return fault_here()


@functools.cache
def fault_here() -> str:
    """What is wrong with the kernels on this machine, by trying them on small maps; '' where they do as plain JAX.

    A card or a version of Triton that they were never tried with must not cost a run, or its numbers.
    """
    with ThreadPoolExecutor(1) as other:  # a thread knows nothing of what is being traced in this one
        reason = other.submit(_tried).result()
    if reason:
        log.warning("attention and MLPs by plain JAX: %s", reason)
    return reason


def _tried() -> str:
    """What is wrong with the kernels; '' where nothing is."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    for dtype in (jnp.bfloat16, jnp.float32):  # a shifted map of four windows
        arrays = drawn(1, 14, 14, 3 * 32 * 2, dtype=dtype), drawn(2, 49, 49)
        if reason := _compared("attention", attention.attend, swin_ops.attend_map, arrays, (7, 3)):
            return reason
    for c in (96, 256):  # 100 rows aren't a whole number of programs
        vectors = [drawn(count) for count in (c, c, 2 * c, c)]
        into, back = (drawn(c, 2 * c) * c**-0.5).astype(jnp.bfloat16), (drawn(2 * c, c) * c**-0.5).astype(jnp.bfloat16)
        weights = mlp.MlpWeights(vectors[0], vectors[1], into, vectors[2], back, vectors[3])
        given = drawn(100, c, dtype=jnp.bfloat16), weights
        if reason := _compared("MLP", mlp.add_mlp, mlp.plain_add_mlp, given, ()):
            return reason
    return ""


def _compared(name: str, fused: Kernel, plain: Kernel, arrays: tuple[object, ...], rest: tuple[int, ...]) -> str:
    """What is wrong with a kernel's output and its gradients beside plain JAX's; '' where nothing is."""

    def found(function: Kernel) -> list[np.ndarray]:
        def square(*arrays: object) -> tuple[jax.Array, jax.Array]:
            out = function(*arrays, *rest).astype(jnp.float32)
            return jnp.sum(out**2), out

        (_, out), of = jax.jit(jax.value_and_grad(square, argnums=(0, 1), has_aux=True))(*arrays)
        return [np.asarray(array, np.float32) for array in jax.tree.leaves((out, of))]

    try:
        # The forward pass by itself too: with its gradients, it may be plain JAX's.
        outputs = [
            np.asarray(jax.jit(lambda *a, way=way: way(*a, *rest))(*arrays), np.float32) for way in (fused, plain)
        ]
        pairs = [outputs, *zip(found(fused), found(plain), strict=True)]
        worst = max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)
    except Exception as error:  # Triton, XLA and the driver each have their own kinds
        return f"the {name}'s kernel fails on this machine: {str(error).strip().partition(chr(10))[0]}"
    if not worst < _TRUSTED:
        return f"the {name}'s kernel is off by {worst:.1%} on this machine"
    return ""


def check_here(chosen: str, field: str) -> None:
    """Refuse the choice `fused`, given by a setting's name, where the kernels would be interpreted.

    Raises:
        ConfigError: why they don't run here.
    """
    reason = why_not_here() if chosen == "fused" else ""
    if reason:
        raise ConfigError(f"{field} is 'fused', but {reason}; expected auto or einsum")


def attention_is_fused(chosen: str, shape: tuple[int, ...], num_heads: int, window_size: int, dtype: DTypeLike) -> bool:
    """Whether the kernel computes the attention of a map.

    Args:
        chosen: `auto`, the kernel where machine and shape allow it; `einsum`; `fused`, the kernel, which a machine
            without a GPU interprets (very slowly: for tests).
        shape: [B, H, W, C], H and W multiples of the window.
        num_heads: of the block.
        window_size: side of a window, tokens.
        dtype: of the computation.

    Raises:
        ConfigError: another choice; or `fused` with a shape that the kernel doesn't take.
    """
    if not _wanted(chosen):
        return False
    reason = attention.why_not(shape, num_heads, window_size, dtype)
    if reason and chosen == "fused":
        raise ConfigError(f"attention is 'fused', but {reason}; expected auto or einsum")
    return not reason


def mlp_is_fused(chosen: str, shape: tuple[int, ...], hidden: int, dtype: DTypeLike) -> bool:
    """Whether the kernel computes the second half of a block, as the first, where its shape [..., C] is one it takes.

    Most shapes aren't: `fused` is no promise here.

    Raises:
        ConfigError: another choice.
    """
    return _wanted(chosen) and not mlp.why_not(shape, hidden, dtype)


def _wanted(chosen: str) -> bool:
    if chosen not in CHOICES:
        raise ConfigError(f"attention is {chosen!r}; expected one of {', '.join(CHOICES)}")
    if chosen == "auto":
        # A program for several devices needs to say how it is split; and processes could each find another answer.
        placed = jax.device_count() == 1 or (jax.process_count() == 1 and mesh.mesh_is_known())
        return placed and not why_not_here()
    return chosen == "fused"
