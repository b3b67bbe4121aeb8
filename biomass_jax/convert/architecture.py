"""A model's constructor fields, read from the shapes of its tensors and checked against what the checkpoint declares.

What shapes cannot tell (drop path, dropout, the final activation) is taken from the declaration or a flag; a field that
neither gives is asked for and never guessed.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from biomass_jax import bundle
from biomass_jax.convert.declared import FIELD_OF, FIXED, Declared, Options
from biomass_jax.convert.layouts import Layout, Match, Shape
from biomass_jax.convert.resize import window_of
from biomass_jax.convert.torch_file import Placeholder, TorchTensor, flatten
from biomass_jax.errors import ConvertError, name_list
from biomass_jax.models.build import abstract_variables, build_module
from biomass_jax.models.swin_ops import relative_position_index

# The pooling scales of UPerNet's four modules (arXiv 1807.10221; terratorch's UperNetDecoder has no other default).
UPERNET_POOL_SCALES = (1, 2, 3, 6)
# Our head's fields that torch's head doesn't have, as they are without effect.
UNSCALED = {"output_scale": 1.0, "output_offset": 0.0}
_FINAL_RELU = {
    "torch.nn.ReLU": True,
    "ReLU": True,
    "relu": True,
    "torch.nn.Identity": False,
    "none": False,
    None: False,
}

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class _Shapes:
    """Shapes by path, with the file's name of a tensor for messages."""

    def __init__(self, layout: Layout, shapes: Mapping[str, Shape]):
        self.layout = layout
        self.shapes = shapes

    def need(self, path: str) -> Shape:
        if path not in self.shapes:
            raise ConvertError(f"missing tensor {self.layout.key_of(path)}: without it the architecture is unknown")
        return self.shapes[path]

    def count(self, prefix: str) -> int:
        """How many numbered parts `prefix`0, `prefix`1, ... there are."""
        numbers = sorted(
            {int(found[1]) for path in self.shapes if (found := re.match(rf"{prefix}(-?\d+)/", path)) is not None}
        )
        if numbers != list(range(len(numbers))):
            name = re.sub(r"^params/", "", prefix).replace("\\", "")
            listed = name_list(map(str, numbers))
            raise ConvertError(f"{name}N: the numbers found are [{listed}]; expected 0, 1, ... without a gap")
        return len(numbers)

    def first_of(self, prefix: str, count: int, suffix: str) -> tuple[str, Shape]:
        """The first tensor prefix{n}suffix there is; blocks of a stage have the same shapes."""
        path = next((p for n in range(count) if (p := f"{prefix}{n}{suffix}") in self.shapes), f"{prefix}0{suffix}")
        return path, self.need(path)


def from_shapes(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes tell.

    Args:
        layout: the checkpoint's layout.
        shapes: path -> shape, both in our form.

    Raises:
        ConvertError: a tensor without which a field stays unknown is missing, or a shape makes no sense.
    """
    tensors = _Shapes(layout, shapes)
    kernel = tensors.need("params/encoder/patch_embed/projection/kernel")
    if kernel[0] != kernel[1]:
        raise ConvertError(f"the patch embedding's kernel is {kernel[0]} x {kernel[1]}; expected a square one")
    stages = tensors.count("params/encoder/stages_")
    depths = tuple(tensors.count(rf"params/encoder/stages_{i}/blocks_") for i in range(stages))
    if not stages or 0 in depths:
        raise ConvertError(f"found {stages} stages with {depths} blocks; expected at least one block in every stage")
    heads, window = _attention(tensors, depths)
    path, fc1 = tensors.first_of("params/encoder/stages_0/blocks_", depths[0], "/mlp/fc1/kernel")
    fields: dict[str, Any] = {
        "embed_dim": kernel[3],
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "mlp_ratio": fc1[1] / fc1[0],
        "patch_size": kernel[0],
        "in_channels": kernel[2],
        "shift_single_window": layout.shift_single_window,
    }
    if layout.task == "biomass":
        fields["decoder_channels"] = tensors.need("params/decoder/fpn_bottleneck/conv/kernel")[3]
        fields["upscale_layers"] = tensors.count("params/head/upscale_")
        fields |= UNSCALED
    elif layout.task == "simmim":
        out, bands = tensors.need("params/decoder/kernel")[3], kernel[2]
        fields["encoder_stride"] = stride = round((out / bands) ** 0.5)
        if stride**2 * bands != out:
            raise ConvertError(f"decoder.0.weight has {out} outputs; expected stride^2 x {bands} input bands")
    else:
        fields["stage_norms"] = False
        fields["final_norm"] = any(path.startswith("params/encoder/norm/") for path in shapes)
    return fields


def _attention(tensors: _Shapes, depths: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Heads of each stage and the window size, from the relative position bias tables."""
    heads, windows = [], {}
    for i, depth in enumerate(depths):
        path, table = tensors.first_of(
            f"params/encoder/stages_{i}/blocks_", depth, "/attn/relative_position_bias_table"
        )
        key = tensors.layout.key_of(path)
        window = window_of(table[0])
        if window is None:
            raise ConvertError(f"{key} has {table[0]} rows; expected (2 w - 1)^2 for a window of w")
        heads.append(table[1])
        windows[key] = window
    if len(set(windows.values())) > 1:
        found = name_list(f"{key}: {window}" for key, window in windows.items())
        raise ConvertError(f"window sizes differ between stages ({found}); expected one for all")
    return tuple(heads), next(iter(windows.values()))


def complete(
    layout: Layout, fields: Mapping[str, Any], pool_modules: int, declared: Declared, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """Add what shapes do not tell, and check them against what is declared.

    Args:
        layout: the checkpoint's layout.
        fields: from `from_shapes`.
        pool_modules: how many pooling modules the decoder has.
        declared: the checkpoint's and the config's arguments.
        options: the user's.

    Returns:
        The constructor's fields, and a sentence for each that is missing, naming its flag.

    Raises:
        ConvertError: declarations, flags and shapes contradict each other.
    """
    _check_declared(fields, declared)
    result = dict(fields)
    missing: list[str] = []

    for field, name, option, convert in _ASKED if layout.task == "biomass" else _ASKED[:1]:
        flag, given = f"--{option.replace('_', '-')}", getattr(options, option)
        said = declared.model.get(name)
        value = convert(said.value, f"{said.where}: {name}") if said else None
        if given is not None:
            asked = convert(given, flag)
            if said and asked != value:
                raise ConvertError(f"{flag} {given} contradicts {said.where}: {name} = {said.value}")
            value = asked
        if field == "pool_scales" and value is None and pool_modules == len(UPERNET_POOL_SCALES):
            value = UPERNET_POOL_SCALES
        if value is None:
            missing.append(f"{field} ({flag})")
        elif field == "pool_scales" and len(value) != pool_modules:
            raise ConvertError(f"pooling scales {value}: the checkpoint has {pool_modules} pooling modules")
        result[field] = value
    return result, missing


def _check_declared(fields: Mapping[str, Any], declared: Declared) -> None:
    wrong = []
    for name, field in FIELD_OF.items():
        if field in fields and name in declared.model:
            said, found = declared.model[name], fields[field]
            if (tuple(said.value) if isinstance(said.value, list) else said.value) != found:
                wrong.append(f"{field}: the tensors say {found}, {said.where} says {name} = {said.value}")
    for name, only in FIXED.items():
        if name in declared.model and declared.model[name].value != only:
            said = declared.model[name]
            wrong.append(f"{said.where} says {name} = {said.value}; this model has {only} only")
    if wrong:
        raise ConvertError(name_list(wrong))


def _rate(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConvertError(f"{where} is {value!r}; expected a number of at least 0 and below 1")
    return float(value)


def _final_relu(value: object, where: str) -> bool:
    if not isinstance(value, str | None) or value not in _FINAL_RELU:
        raise ConvertError(f"{where} is {value!r}; expected torch.nn.ReLU or none")
    return _FINAL_RELU[value]


def _scales(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(v) is int and v > 0 for v in value):
        raise ConvertError(f"{where} is {value!r}; expected positive whole numbers")
    return tuple(value)


# Fields that shapes do not tell: (ours, the declared argument, the user's option, what checks and converts a value).
_ASKED: tuple[tuple[str, str, str, Callable[[Any, str], Any]], ...] = (
    ("drop_path_rate", "backbone_drop_path_rate", "drop_path", _rate),
    ("head_dropout", "head_dropout", "head_dropout", _rate),
    ("final_relu", "head_final_act", "final_act", _final_relu),
    ("pool_scales", "decoder_pool_scales", "pool_scales", _scales),
)


# Keys of a checkpoint that hold the model's tensors, one inside another where two training programs each add one.
_HOLDERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights")


def state_dict(root: object, name: str) -> tuple[dict[str, TorchTensor], list[str]]:
    """The dict of tensors in a checkpoint, and the keys that it lies under: [] where it is the root itself.

    Args:
        root: the file's root object.
        name: the file's, for messages.

    Raises:
        ConvertError: there is none, or two, or it holds other things than tensors.
    """
    state, where = root, list[str]()
    while isinstance(state, Mapping):
        inner = [key for key in _HOLDERS if isinstance(state.get(key), Mapping) and _tensors(state[key])]
        if len(inner) > 1:
            raise ConvertError(f"{name}: has weights under both {' and '.join(inner)}; expected one state dict")
        if not inner:
            break
        where += inner
        state = state[inner[0]]
    if not isinstance(state, Mapping) or not any(
        isinstance(v, TorchTensor) and "." in str(k) for k, v in state.items()
    ):
        raise ConvertError(f"{name}: {_without_state(root, name)}")
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, TorchTensor))]
    if any("_packed_params" in key for key in others):
        raise ConvertError(f"{name}: is a quantised model; convert the one that it was made from, with float weights")
    if others:
        raise ConvertError(f"{name}: the state dict holds more than tensors: {name_list(others)}")
    return dict(state), where


def _tensors(tree: object) -> bool:
    """Whether a part of a checkpoint holds a tensor anywhere."""
    return any(isinstance(leaf, TorchTensor) for leaf in flatten(tree).values())


def _without_state(root: object, name: str) -> str:
    """What a file without a state dict holds instead, and how to make one that has it."""
    for key, leaf in flatten(root).items():
        if isinstance(leaf, Placeholder) and _is_module(leaf):
            at = "".join(f"[{part}]" if part.isdigit() else f"[{part!r}]" for part in key.split(".") if part)
            return (
                f"holds a whole pickled model ({leaf.class_name}{f' at {key}' if key else ''}) instead of its "
                "state_dict, and only the program that wrote it can open that; there, run torch.save(torch.load("
                f"{name!r}, map_location='cpu', weights_only=False){at}.state_dict(), 'weights.pt') and convert "
                "weights.pt"
            )
    if isinstance(root, TorchTensor):
        return f"holds a single tensor of shape {root.shape}; expected a state dict or a checkpoint with one"
    only_optimiser = "holds an optimiser's state and no weights"
    other_file = "give the file that was saved with the model's state_dict"
    if isinstance(root, Placeholder) and root.class_name.startswith("torch.optim."):
        return f"{only_optimiser}; {other_file}"
    if isinstance(root, Placeholder):
        return f"holds an object of the class {root.class_name}; expected a state dict or a checkpoint with one"
    if not isinstance(root, Mapping):
        return f"holds {type(root).__name__}; expected a state dict or a checkpoint with one"
    if any(isinstance(part, Mapping) and {"state", "param_groups"} <= set(part) for part in (root, *root.values())):
        return f"{only_optimiser} (its keys are {name_list(map(str, root))}); {other_file}"
    if any(isinstance(leaf, Placeholder) and leaf.class_name.startswith("numpy.") for leaf in flatten(root).values()):
        return "holds NumPy arrays instead of tensors; save them again as {key: torch.from_numpy(array)}"
    if elsewhere := [str(key) for key, part in root.items() if isinstance(part, Mapping) and _tensors(part)]:
        return (
            f"no state dict found under a known name ({', '.join(_HOLDERS)}); there are tensors under "
            f"{name_list(elsewhere)}: save the part that is the model, torch.save(torch.load({name!r})"
            f"[{elsewhere[0]!r}], 'weights.pt'), and convert weights.pt"
        )
    return f"no state dict found; its keys are {name_list(map(str, root))}"


def _is_module(value: Placeholder) -> bool:
    """Whether an object that was not built is a torch.nn.Module, by the attributes that every one has."""
    made_by_fx = value.class_name.startswith("torch.fx.") and value.args is not None
    return made_by_fx or (isinstance(value.state, Mapping) and {"_parameters", "_modules"} <= set(value.state))


def check(keys: Match, state: Mapping[str, TorchTensor]) -> dict[str, Any]:
    """Compare a checkpoint's tensors with the model of their own shapes; the architecture's fields that shapes tell.

    Raises:
        ConvertError: it lists every unknown, missing, extra, duplicate and misshapen tensor.
    """
    layout = keys.layout
    shapes: dict[str, Shape] = {}
    problems, misshapen = [], []
    for path, (key, transform) in keys.tensors.items():
        shape = transform.shape(state[key].shape)
        if shape is None or 0 in shape:
            misshapen.append(f"{key} {state[key].shape}, expected {len(transform.axes)} dimensions")
        else:
            shapes[path] = shape
    misshapen += [f"{key} {state[key].shape}, expected ()" for key in keys.counters.values() if state[key].shape != ()]
    try:
        fields = from_shapes(layout, shapes)
        expected = _expected(layout, fields, shapes)
    except ValueError as error:  # ours, or the model's own about fields that do not fit each other
        problems.append(str(error))
        expected = {}
    for path, shape in expected.items():
        if shapes.get(path, shape) != shape:
            key, transform = keys.tensors[path]
            misshapen.append(f"{key} {state[key].shape}, expected {transform.torch_shape(shape)}")
    named = {
        "unknown": keys.unknown,
        "duplicate": [" = ".join(group) for group in keys.duplicates],
        "missing": [layout.key_of(path) for path in expected if path not in keys.tensors],
        "extra": [keys.tensors[path][0] for path in shapes if expected and path not in expected],
        "misshapen": misshapen,
    }
    problems += [f"{kind} tensors: {name_list(names)}" for kind, names in named.items() if names]
    if problems:
        raise ConvertError(f"layout {layout.name}: " + "; ".join(problems))
    return fields


def _expected(layout: Layout, fields: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Path -> shape of every tensor of the model with these fields."""
    fields = dict(fields)
    if layout.task == "biomass":
        fields["pool_scales"] = tuple(range(1, pool_modules(shapes) + 1))  # their number alone makes the shapes
    variables = abstract_variables(build_module(layout.task, fields))
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
