"""What a checkpoint and a config.yaml say in words: the arguments of the model and of the data.

Both follow Lightning: a checkpoint has `hyper_parameters.model_args` and perhaps `datamodule_hyper_parameters`, a
config.yaml has `model.init_args.model_args` and `data.init_args`. Only plain values are taken from either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomass_jax.convert.torch_file import Placeholder
from biomass_jax.errors import ConvertError

_SCALARS = (str, int, bool, type(None))


@dataclass(frozen=True)
class Value:
    """One declared value and where it stands."""

    value: Any
    where: str


@dataclass
class Declared:
    """Arguments by name.

    Attributes:
        model: of the model factory (`backbone_drop_path_rate`, `bands`, ...).
        data: of the data module (`means`, `stds`, `output_bands`, ...).
        hyper_parameters: the checkpoint's, as plain values, to be kept with the bundle.
    """

    model: dict[str, Value] = field(default_factory=dict)
    data: dict[str, Value] = field(default_factory=dict)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)

    def unchecked(self) -> list[str]:
        """Model arguments that may matter and that nothing here reads."""
        parts = ("backbone_", "decoder_", "head_")
        names = sorted(name for name in self.model if name.startswith(parts) and name not in DESCRIBING)
        return [f"{name}={self.model[name].value!r}" for name in names]


def read(root: object, config: Path | None, *, source: str) -> Declared:
    """Gather what a checkpoint (its root object) and a config.yaml declare.

    Raises:
        ConvertError: they contradict each other, or the config is no YAML mapping.
    """
    declared = Declared()
    root = root if isinstance(root, Mapping) else {}
    declared.hyper_parameters = _mapping(plain(root.get("hyper_parameters")))
    _add(
        declared.model, _mapping(declared.hyper_parameters.get("model_args")), f"{source}: hyper_parameters.model_args"
    )
    data = _mapping(plain(root.get("datamodule_hyper_parameters")))
    _add(declared.data, data, f"{source}: datamodule_hyper_parameters")
    if config is not None:
        tree = _read_yaml(config)
        _add(declared.model, _inside(tree, "model", "init_args", "model_args"), f"{config}: model.init_args.model_args")
        _add(declared.data, _inside(tree, "data", "init_args"), f"{config}: data.init_args")
    return declared


def plain(value: object) -> Any:
    """A value as nested dicts, lists and scalars; what is none of these stays as it is.

    A namespace that was not built gives its fields, an enumeration's member (terratorch's band names) its value.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Placeholder):
        if isinstance(value.state, Mapping):
            return plain(value.state)
        if value.class_name.endswith("Bands") and value.args and isinstance(value.args[0], str):
            return value.args[0]
    return value


def is_plain(value: object, *, finite: bool = False) -> bool:
    """Whether a value is nested dicts, lists and scalars alone; with `finite`, also without NaN and infinities."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item, finite=finite) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item, finite=finite) for item in value)
    if isinstance(value, float):
        return math.isfinite(value) or not finite
    return isinstance(value, _SCALARS)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _add(into: dict[str, Value], values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if not is_plain(value):
            continue  # an object that was not built says nothing; a flag must
        known = into.setdefault(name, Value(value, where))
        # Folders, workers and the like may differ; what describes the model may not.
        if known.value != value and name in DESCRIBING:
            raise ConvertError(f"{name} is {known.value!r} in {known.where} and {value!r} in {where}")


# Data arguments that say what the weights expect; all model arguments do.
DATA_NAMES = ("means", "stds", "output_bands", "dataset_bands", "no_data_replace")
MODEL_NAMES = (
    "backbone_embed_dim",
    "backbone_depths",
    "backbone_num_heads",
    "backbone_window_size",
    "backbone_mlp_ratio",
    "backbone_patch_size",
    "backbone_drop_path_rate",
    "in_channels",
    "num_frames",
    "bands",
    "decoder",
    "decoder_channels",
    "decoder_pool_scales",
    "decoder_align_corners",
    "head_dropout",
    "head_final_act",
    "head_learned_upscale_layers",
)
DESCRIBING = frozenset(DATA_NAMES + MODEL_NAMES)


def _inside(tree: object, *names: str) -> dict[str, Any]:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return _mapping(tree)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # here, because only a conversion with --config needs it

    class Loader(yaml.SafeLoader):
        """SafeLoader that keeps a tagged value as a placeholder instead of failing on it or building it."""

    def inert(loader: object, suffix: str, node: Any) -> Placeholder:
        return Placeholder(f"{node.tag}")

    Loader.add_multi_constructor("", inert)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - Loader is a SafeLoader
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path}: no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConvertError(f"{path}: expected a mapping with `model` and `data`, found {type(tree).__name__}")
    return tree
