"""A checkpoint's tensors: found, compared with the model that their own shapes describe, brought into our form."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from biomass_jax import bundle
from biomass_jax.convert import architecture
from biomass_jax.convert.rows import Layout, Match, Shape, name_list
from biomass_jax.convert.torch_file import TorchTensor
from biomass_jax.errors import ConvertError
from biomass_jax.models.build import abstract_variables, build_module
from biomass_jax.models.swin_ops import relative_position_index

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def state_dict(root: Any, name: str) -> dict[str, TorchTensor]:
    """The dict of tensors in a checkpoint: the root itself, or what lies under `state_dict` or `model`.

    Raises:
        ConvertError: there is none, or two, or it holds other things than tensors.
    """
    if not isinstance(root, Mapping):
        raise ConvertError(f"{name}: holds {type(root).__name__}; expected a state dict or a checkpoint with one")
    inner = [key for key in ("state_dict", "model") if isinstance(root.get(key), Mapping) and root[key]]
    if len(inner) > 1:
        raise ConvertError(f"{name}: has weights under both {' and '.join(inner)}; expected one state dict")
    state = root[inner[0]] if inner else root
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, TorchTensor))]
    if not state or len(others) == len(state):
        raise ConvertError(f"{name}: no state dict found; its keys are {name_list(map(str, root), 10)}")
    if others:
        raise ConvertError(f"{name}: the state dict holds more than tensors: {name_list(others)}")
    return dict(state)


def check(keys: Match, state: Mapping[str, TorchTensor]) -> dict[str, Any]:
    """Compare a checkpoint's tensors with the model of their own shapes; the architecture's fields that shapes tell.

    Raises:
        ConvertError: it lists every unknown, missing, extra, duplicate and misshapen tensor.
    """
    layout, problems = keys.layout, []
    if keys.unknown:
        problems.append(f"unknown tensors: {name_list(keys.unknown)}")
    if keys.duplicates:
        problems.append(f"duplicate tensors: {name_list(' = '.join(group) for group in keys.duplicates)}")
    shapes: dict[str, Shape] = {}
    misshapen = []
    for path, (key, transform) in keys.tensors.items():
        shape = transform.shape(state[key].shape)
        if shape is None or 0 in shape:
            misshapen.append(f"{key} {state[key].shape}, expected {len(transform.axes)} dimensions")
        else:
            shapes[path] = shape
    misshapen += [f"{key} {state[key].shape}, expected ()" for key in keys.counters.values() if state[key].shape != ()]
    try:
        fields = architecture.from_shapes(layout, shapes)
        expected = _expected(layout, fields, shapes)
    except ValueError as error:  # ours, or the model's own about fields that do not fit each other
        problems.append(str(error))
        expected = {}
    if expected:
        missing = [layout.key_of(path) for path in expected if path not in keys.tensors]
        if missing:
            problems.append(f"missing tensors: {name_list(missing)}")
        extra = [keys.tensors[path][0] for path in shapes if path not in expected]
        if extra:
            problems.append(f"extra tensors: {name_list(extra)}")
        for path, shape in expected.items():
            if shapes.get(path, shape) != shape:
                key, transform = keys.tensors[path]
                misshapen.append(f"{key} {state[key].shape}, expected {transform.torch_shape(shape)}")
    if misshapen:
        problems.append(f"misshapen tensors: {name_list(misshapen)}")
    if problems:
        raise ConvertError(f"layout {layout.name}: " + "; ".join(problems))
    return fields


def _expected(layout: Layout, fields: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Path -> shape of every tensor of the model with these fields."""
    fields = dict(fields)
    if layout.task == "biomass":
        fields["pool_scales"] = tuple(range(1, pool_modules(shapes) + 1))  # their number alone makes the shapes
    return _model_shapes(layout.task, tuple(sorted(fields.items())))


@lru_cache(maxsize=8)
def _model_shapes(task: str, fields: tuple[tuple[str, Any], ...]) -> dict[str, Shape]:
    variables = abstract_variables(build_module(task, dict(fields)))
    return {path: tuple(leaf.shape) for path, leaf in bundle.flatten(variables).items()}


def pool_modules(paths: Mapping[str, Any]) -> int:
    """How many pooling modules a decoder's paths name."""
    return sum(path.startswith("params/decoder/psp_modules_") and path.endswith("/conv/kernel") for path in paths)


def variables(keys: Match, state: Mapping[str, TorchTensor]) -> dict[str, np.ndarray]:
    """Path -> float32 array in our layout.

    Raises:
        ConvertError: tensors of whole numbers, values that are not finite, negative variances, or an index of relative
            positions that is not Swin's.
    """
    name = keys.layout.name
    _check_indexes(keys, state)
    wrong_type = [f"{key} {state[key].dtype}" for key, _ in keys.tensors.values() if state[key].dtype not in _FLOATS]
    if wrong_type:
        raise ConvertError(f"layout {name}: expected floating-point tensors, found {name_list(wrong_type)}")
    result: dict[str, np.ndarray] = {}
    broken, negative = [], []
    for path, (key, transform) in keys.tensors.items():
        array = transform.forward(state[key].array().astype(np.float32, copy=False))
        if not np.isfinite(array).all():
            broken.append(key)
        elif path.startswith("batch_stats/") and path.endswith("/var") and (array < 0).any():
            negative.append(key)
        result[path] = array
    if broken:
        raise ConvertError(f"layout {name}: NaN or infinite values (as float32) in {name_list(broken)}")
    if negative:
        raise ConvertError(f"layout {name}: running variances below 0 in {name_list(negative)}")
    return result


def _check_indexes(keys: Match, state: Mapping[str, TorchTensor]) -> None:
    """A dropped relative_position_index must be the one we compute, or the biases would be read from other rows."""
    wrong = []
    for key in keys.buffers:
        if key.endswith("relative_position_index"):
            found = state[key].array()
            side = round(found.shape[0] ** 0.5) if found.ndim == 2 else 0
            if side == 0 or not np.array_equal(found, relative_position_index(side)):
                wrong.append(key)
    if wrong:
        raise ConvertError(f"the index of relative positions is not Swin's in {name_list(wrong)}")
