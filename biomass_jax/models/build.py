"""The module of each task from plain fields, and what is known of it without computing anything."""

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from biomass_jax.errors import ArchitectureError
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.models.ensemble import BiomassEnsemble, join_variables
from biomass_jax.models.lora import Lora
from biomass_jax.models.simmim import SimMIM
from biomass_jax.models.swin import SwinEncoder

MODULES: dict[str, type[nn.Module]] = {"biomass": BiomassModel, "simmim": SimMIM, "encoder": SwinEncoder}
SPREAD_FIELDS = ("spread", "spread_scale", "quantile_levels")
CHECK_SEED = 20240712
_SIDE = 96  # px; a multiple of SimMIM's stride, and small beside the time to compile
FLOAT32_PRODUCTS = ("final", "spread")  # modules of the head whose products are float32 whatever the model's dtype
_tracing = threading.Lock()


def build_module(
    task: str,
    architecture: dict[str, Any],
    dtype: str = "float32",
    *,
    remat: tuple[int, ...] = (),
    attention: str = "auto",
    lora: Lora | None = None,
) -> Any:
    """The Flax module of a task, not yet holding any variables.

    Args:
        task: `biomass` (`BiomassModel`; with a field `members`, `BiomassEnsemble`), `simmim` (`SimMIM`) or `encoder`
            (`SwinEncoder`).
        architecture: the module's constructor fields as JSON has them, lists for tuples.
        dtype: `float32` or `bfloat16`, of the computation; parameters are float32.
        remat: stages (0 to 3) whose blocks are computed a second time in the backward pass, to save memory.
        attention: what computes the attention of windows, one of `attention.CHOICES`.
        lora: low-rank updates beside the weights of dense layers; None for none.

    Raises:
        ArchitectureError: unknown task or field, or what can't be an ensemble.
    """
    if task not in MODULES:
        raise ArchitectureError(f"unknown task {task!r}; expected one of {', '.join(MODULES)}")
    kind = BiomassEnsemble if task == "biomass" and "members" in architecture else MODULES[task]
    known = _fields(kind)
    if unknown := sorted(set(architecture) - set(known)):
        raise ArchitectureError(f"architecture has unknown fields {unknown}; {kind.__name__} has {sorted(known)}")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in architecture.items()}
    return kind(**fields, dtype=jnp.dtype(dtype), remat=tuple(remat), attention=attention, lora=lora)


def architecture_of(module: nn.Module) -> dict[str, Any]:
    """Every constructor field of a module that says what it is, as JSON has them: what `build_module` takes.

    `dtype`, `remat`, `attention` and `initializer` say how it is computed and drawn, `lora` what is added to it: they
    are left out; so are the fields of a spread that a model doesn't have: what it is, it has been since before there
    were spreads, and older versions open it.
    """
    values = {name: getattr(module, name) for name in _fields(type(module))}
    if values.get("spread") == "none":
        values = {name: value for name, value in values.items() if name not in SPREAD_FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _fields(module: type[nn.Module]) -> list[str]:
    other = ("parent", "name", "dtype", "remat", "attention", "initializer", "lora")
    return [field.name for field in dataclasses.fields(module) if field.name not in other]


def dummy_inputs(module: nn.Module) -> tuple[np.ndarray, ...]:
    """A fixed batch of one z-scored image, float32 (1, 96, 96, bands), and for SimMIM its mask (1, 24, 24)."""
    rng = np.random.default_rng(CHECK_SEED)
    image = rng.standard_normal((1, _SIDE, _SIDE, module.in_channels), np.float32)
    if not isinstance(module, SimMIM):
        return (image,)
    cells = _SIDE // module.patch_size
    return image, (rng.random((1, cells, cells)) < 0.6).astype(np.float32)


def abstract_variables(module: object) -> dict[str, Any]:
    """Shapes and dtypes of a module's variables, without computing them.

    Returns:
        {"params", "batch_stats"}, trees of `jax.ShapeDtypeStruct`.
    """
    with _tracing:  # opening a bundle and compiling ask for the same at the same time
        shapes = _traced_shapes(module)
    return jax.tree.map(lambda leaf: leaf, shapes)  # dictionaries of the caller's own


def in_compute_dtype(variables: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same variables with the weights of all products in the type in which a prediction multiplies them.

    In a bfloat16 model each call would cast them anew. The numbers are those: what norms, biases of attention and the
    head's last products compute in float32 stays float32.

    Args:
        variables: of a module of `build_module`, arrays or tracers, float32.
        dtype: `float32` or `bfloat16`.
    """

    def cast(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
        narrow = "kernel" in tree and name not in FLOAT32_PRODUCTS
        return {
            key: cast(value, key) if isinstance(value, Mapping) else value.astype(dtype) if narrow else value
            for key, value in tree.items()
        }

    return cast(variables, "") if dtype != "float32" else dict(variables)


@functools.lru_cache(maxsize=8)
def _traced_shapes(module: nn.Module) -> dict[str, Any]:
    """By tracing the initialisation; of an ensemble that of one member, since all have the same shapes."""
    if isinstance(module, BiomassEnsemble):
        one = _traced_shapes(module.make_member(parent=None))
        return join_variables([one] * module.members, shared_encoder=module.shared_encoder)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *dummy_inputs(module)))
    return {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
