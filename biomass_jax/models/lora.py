"""Low-rank updates of dense layers: what a region teaches a model, in a few weights beside those that it has.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685): y = x W + b + (alpha / rank) x A B,
in which W and b stay as they are, A [K, rank] is drawn and B [rank, N] begins at 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from biomass_jax.models import initialisation
from biomass_jax.models.layers import Dense
from biomass_jax.runtime import cpu

TARGETS = ("qkv", "proj", "fc1", "fc2")  # dense layers of a block, by their names
A, B = "lora_a", "lora_b"  # beside the `kernel` of the layer that they adapt
_KEPT = "dense of a block"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which dense layers of an encoder's blocks are adapted, and how.

    Attributes:
        rank: of the updates.
        alpha: they are scaled by alpha / rank.
        targets: of `TARGETS`.
        dropout: share of A's inputs that are dropped in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / self.rank

    def without_dropout(self) -> "Lora":
        """The same as predictions have it."""
        return dataclasses.replace(self, dropout=0.0)


class AdaptedDense(nn.Dense):
    """`flax.linen.Dense` of a model with low-rank updates: one beside its kernel, where `lora` names the layer."""

    lora: Lora | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., K] -> [..., features]."""
        y = super().__call__(inputs)
        if self.lora is not None and self.name in self.lora.targets:
            y = y + self._update(inputs, self.lora).astype(y.dtype)
        return checkpoint_name(y, _KEPT)

    def _update(self, x: jax.Array, lora: Lora) -> jax.Array:
        k = x.shape[-1]
        a = self.param(A, initialisation.uniform(k), (k, lora.rank), self.param_dtype)
        b = self.param(B, nn.initializers.zeros_init(), (lora.rank, self.features), self.param_dtype)
        x = nn.Dropout(lora.dropout, deterministic=False)(x)
        for kernel in (a, b):
            x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
            x = cpu.dense(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), self.precision)
        return x * np.asarray(lora.scale, x.dtype)


def dense(features: int, *, name: str, lora: Lora | None, **options: Any) -> nn.Module:
    """A dense layer of a block, adapted where `lora` names it; `options` are those of `flax.linen.Dense`."""
    if lora is None:
        return Dense(features, name=name, **options)
    return AdaptedDense(features, name=name, lora=lora, dot_general=cpu.dense, **options)


def lean(block: type[nn.Module]) -> Any:
    """A block with updates, `train` its second argument, whose backward pass computes again what costs little.

    The outputs of dense layers are kept; norms, softmax and GELU, half the memory, aren't. Where weights stay they need
    no input of theirs either.
    """
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return nn.remat(block, static_argnums=(2,), policy=policy)


def is_update(path: str) -> bool:
    """Whether a parameter, by its path, is of an update."""
    return path.rpartition("/")[2] in (A, B)


def merge(variables: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Variables without updates, which are added to the kernels beside them: W + scale A B.

    On the host in float64, in an order that doesn't depend on the machine: the sums have the same bits on each.

    Args:
        variables: arrays of a module with updates, whole or a part; what isn't adapted comes out as it is.
        scale: alpha / rank.
    """
    merged: dict[str, Any] = {}
    for name, value in variables.items():
        if isinstance(value, Mapping):
            merged[name] = merge(value, scale)
        elif not is_update(name):
            merged[name] = value
    if A in variables:
        a, b = (np.asarray(variables[name], np.float64) for name in (A, B))
        kernel = np.asarray(variables["kernel"])
        whole = kernel.astype(np.float64)
        for column, row in zip(a.T * scale, b, strict=True):  # no product of matrices: libraries add in their own order
            whole += column[:, None] * row
        merged["kernel"] = whole.astype(kernel.dtype)
    return merged
