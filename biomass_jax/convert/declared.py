"""What a checkpoint, a config.yaml and the user say in words, and what a model's input has to be by that.

The files follow Lightning: a checkpoint has `hyper_parameters.model_args` and perhaps `datamodule_hyper_parameters`, a
config.yaml has `model.init_args.model_args` and `data.init_args`. Only plain values are taken from either.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomass_jax.convert.torch_file import Placeholder
from biomass_jax.data import bands as band_table
from biomass_jax.errors import ConvertError, name_list
from biomass_jax.runtime.content import HEAD, what_is

# Terratorch's argument of the model -> our field that it sets.
FIELD_OF = {
    "backbone_embed_dim": "embed_dim",
    "backbone_depths": "depths",
    "backbone_num_heads": "num_heads",
    "backbone_window_size": "window_size",
    "backbone_mlp_ratio": "mlp_ratio",
    "backbone_patch_size": "patch_size",
    "backbone_drop_path_rate": "drop_path_rate",
    "decoder_channels": "decoder_channels",
    "decoder_pool_scales": "pool_scales",
    "in_channels": "in_channels",
    "head_dropout": "head_dropout",
    "head_final_act": "final_relu",
    "head_learned_upscale_layers": "upscale_layers",
}
# Arguments for which this model has one value only.
FIXED = {"num_frames": 1, "decoder": "UperNetDecoder", "decoder_align_corners": True}
# Data arguments that say what the weights expect; all model arguments do.
DATA_NAMES = ("means", "stds", "output_bands", "dataset_bands", "no_data_replace")
DESCRIBING = frozenset({"bands", *FIELD_OF, *FIXED, *DATA_NAMES})
# The data argument in which our exports keep what no argument of the original says, and what it says of the input.
OURS = "biomass_jax"
INPUT_FIELDS = ("fill", "sensors", "pixel_size")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# Each entry of it: what it has to be, and the check.
_KEPT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "fill": ("a number or null", lambda value: value is None or _is_number(value)),
    "sensors": ("a list of names", _are_names),
    "pixel_size": ("metres above 0", lambda value: _is_number(value) and value > 0),
    "bands": ("a list of names", _are_names),
    "units": ("text", lambda value: isinstance(value, str)),
}


@dataclass(frozen=True)
class Options:
    """What the user says besides the files, as flags of the command line; None where nothing is said.

    Attributes:
        drop_path, head_dropout, final_act, pool_scales: fields of the architecture that shapes do not tell.
        window_size: resize the relative position bias tables to this window.
        with_optimizer: refuse a Lightning file that has no optimiser's state.
        no_optimizer: leave the optimiser's state out.
        bands: names in the weights' order.
        means, stds: of each band, in digital numbers; `statistics` names a preset instead.
        fill: value of missing pixels, HLS's where not given.
        sensors: of the training images.
        label: what the model gives, as `labels.parse` takes it; biomass where nothing says another.
        dataset, season: of the training, for the record.
        command: the command line, for the provenance.
    """

    drop_path: float | None = None
    head_dropout: float | None = None
    final_act: str | None = None
    pool_scales: tuple[int, ...] | None = None
    window_size: int | None = None
    with_optimizer: bool = False
    no_optimizer: bool = False
    bands: tuple[str, ...] | None = None
    means: tuple[float, ...] | None = None
    stds: tuple[float, ...] | None = None
    statistics: str | None = None
    fill: float | None = None
    sensors: tuple[str, ...] | None = None
    label: str | None = None
    dataset: str | None = None
    season: str | None = None
    command: str = ""


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

    def kept(self, part: str) -> dict[str, Any]:
        """What a file that `export` wrote says of the bundle's `input` or `output`; {} of other files.

        Raises:
            ConvertError: an entry isn't what `export` writes.
        """
        said = self.data.get(OURS, Value({}, ""))
        entries = _inside(said.value, part)
        for name, value in entries.items():
            expected, fits = _KEPT.get(name, ("no such entry", lambda _: False))
            if not fits(value):
                raise ConvertError(f"{said.where}: {OURS}.{part}.{name} is {value!r}; expected {expected}")
        return entries


def read(root: object, config: Path | None, *, source: str) -> Declared:
    """Gather what a checkpoint (its root object) and a config.yaml declare.

    Raises:
        ConvertError: they contradict each other, or the config is no YAML mapping.
    """
    declared = Declared()
    root = root if isinstance(root, Mapping) else {}
    declared.hyper_parameters = _inside(plain(root.get("hyper_parameters")))
    _add(declared.model, _inside(declared.hyper_parameters, "model_args"), f"{source}: hyper_parameters.model_args")
    data = _inside(plain(root.get("datamodule_hyper_parameters")))
    _add(declared.data, data, f"{source}: datamodule_hyper_parameters")
    if config is not None:
        tree = _read_yaml(config)
        model, data = _inside(tree, "model", "init_args", "model_args"), _inside(tree, "data", "init_args")
        if not model and not data:
            raise ConvertError(
                f"{config}: has neither model.init_args.model_args nor data.init_args, found "
                f"{name_list(map(str, tree))}; expected the config.yaml of a terratorch training"
            )
        _add(declared.model, model, f"{config}: model.init_args.model_args")
        _add(declared.data, data, f"{config}: data.init_args")
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
    return isinstance(value, str | int | None)


def _add(into: dict[str, Value], values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if not is_plain(value):
            continue  # an object that was not built says nothing; a flag must
        known = into.setdefault(name, Value(value, where))
        # Folders, workers and the like may differ; what describes the model may not.
        if known.value != value and name in DESCRIBING:
            raise ConvertError(f"{name} is {known.value!r} in {known.where} and {value!r} in {where}")


def _inside(tree: object, *names: str) -> dict[str, Any]:
    """The dict under these names, {} where there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # here, because only a conversion with --config needs it

    class Loader(yaml.SafeLoader):
        """SafeLoader that keeps a tagged value as a placeholder instead of failing on it or building it."""

    def inert(loader: object, suffix: str, node: Any) -> Placeholder:
        return Placeholder(f"{node.tag}")

    Loader.add_multi_constructor("", inert)
    try:
        head = path.read_bytes()[:HEAD]
        if not head.lstrip().startswith(b"{") and (found := what_is(head)) is not None:  # JSON is YAML, too
            raise ConvertError(f"{path}: is {found}; expected the config.yaml of a training")
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - Loader is a SafeLoader
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path}: no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConvertError(f"{path}: expected a mapping with `model` and `data`, found {type(tree).__name__}")
    return tree


@dataclass(frozen=True)
class Preset:
    """Published statistics of the six bands, in the band table's order, and the sensors they were taken over."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    sensors: tuple[str, ...]

    def of(self, bands: tuple[str, ...], name: str) -> tuple[float, ...]:
        """Its `means` or `stds` of some bands."""
        return tuple(getattr(self, name)[band_table.BAND_NAMES.index(band)] for band in bands)


PRESETS = {
    # The released granite-geospatial-biomass config.yaml; its model card says HLS L30.
    "granite": Preset(
        (547.36707, 898.5121, 1020.9082, 2665.5352, 2340.584, 1610.1407),
        (411.4701, 558.54065, 815.94025, 812.4403, 1113.7145, 1067.641),
        ("L30",),
    ),
    # Prithvi's published HLS statistics, arXiv 2310.18660.
    "prithvi": Preset(
        (775.2290, 1080.9928, 1228.5856, 2497.2023, 2204.2139, 1610.8325),
        (1281.5261, 1270.0298, 1399.4803, 1368.3446, 1291.6764, 1154.5057),
        (),
    ),
}


def input_meta(declared: Declared, options: Options, in_channels: int) -> tuple[dict[str, Any], list[str]]:
    """The bundle's `input` entry.

    Args:
        declared: the checkpoint's and the config's arguments.
        options: the user's.
        in_channels: input channels of the weights.

    Returns:
        The entry, and a sentence for each missing item that names its flags.

    Raises:
        ConvertError: sources contradict each other or the number of channels, or a value makes no sense.
    """
    no_data = _said(declared.data, "no_data_replace")
    if no_data.value not in (0, None):
        raise ConvertError(
            f"{no_data.where} is {no_data.value!r}; maps are made with 0 in place of no-data, so that these "
            "weights would see other inputs than in training"
        )
    said = (_said(declared.model, "bands"), _said(declared.data, "output_bands"))
    names = _agreed("bands", Value(options.bands, "--bands"), *said, check=_band_names)
    missing = ["bands (--bands, names in the weights' order)"] if names is None else []
    if names is not None and len(names) != in_channels:
        raise ConvertError(f"{len(names)} bands ({name_list(names, 6)}), but the weights take {in_channels} channels")
    found: dict[str, tuple[float, ...]] = {}
    for name in ("means", "stds"):
        published = None
        if options.statistics is not None and names is not None:
            published = PRESETS[options.statistics].of(names, name)
        sources = (Value(getattr(options, name), f"--{name}"), _said(declared.data, name))
        values = _agreed(name, *sources, Value(published, f"--statistics {options.statistics}"), check=_finite)
        if values is None and options.statistics is not None:
            pass  # they follow from the bands, which alone are asked for
        elif values is None:
            missing.append(f"{name} (--{name}, --config config.yaml, or --statistics {'|'.join(PRESETS)})")
        elif len(values) != in_channels:
            raise ConvertError(f"{len(values)} {name}, but the weights take {in_channels} channels")
        found[name] = values or ()
    if min(found["stds"], default=1) <= 0:
        raise ConvertError(f"stds are {list(found['stds'])}; expected numbers above 0")
    kept = _kept_input(declared, options)
    sensors = options.sensors or kept.get("sensors")
    if sensors is None and names and not missing:
        # Published statistics tell the sensors they were taken over, whichever way they were given.
        named = (p.sensors for p in PRESETS.values() if all(p.of(names, name) == found[name] for name in found))
        sensors = next(named, None)
    meta = {
        "bands": list(names or ()),
        "units": band_table.UNITS,
        "fill": kept.get("fill", band_table.FILL) if options.fill is None else options.fill,
        "means": list(found["means"]),
        "stds": list(found["stds"]),
        "sensors": list(sensors or ()),
        "no_data_rule": band_table.NO_DATA_RULE,
        **{name: value for name, value in kept.items() if name == "pixel_size"},
    }
    return meta, missing


def _kept_input(declared: Declared, options: Options) -> dict[str, Any]:
    """What an export kept of the input, which flags may not contradict."""
    kept = declared.kept("input")
    for name in ("fill", "sensors"):
        given = getattr(options, name)
        if given is not None and name in kept and given != (tuple(kept[name]) if name == "sensors" else kept[name]):
            raise ConvertError(f"--{name} {given} contradicts the checkpoint, which was exported with {kept[name]}")
    return kept


def _said(arguments: Mapping[str, Value], name: str) -> Value:
    found = arguments.get(name, Value(None, ""))
    return Value(found.value, f"{found.where}: {name}")


def _agreed(name: str, *sources: Value, check: Callable[[Any, str], tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """A list that every source which gives it must give alike; None where none does."""
    found = [(check(source.value, source.where), source.where) for source in sources if source.value is not None]
    for values, where in found[1:]:
        if values != found[0][0]:
            raise ConvertError(f"{name} are {list(found[0][0])} in {found[0][1]} and {list(values)} in {where}")
    return found[0][0] if found else None


def _band_names(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ConvertError(f"{where} is {value!r}; expected band names")
    names = tuple(name.upper() for name in value)
    if set(names) - set(band_table.BAND_NAMES) or len(set(names)) != len(names):
        raise ConvertError(
            f"{where} is {list(value)}; expected each name once, out of {', '.join(band_table.BAND_NAMES)}"
        )
    return names


def _finite(value: Any, where: str) -> tuple[float, ...]:
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(isinstance(v, int | float) and abs(v) < float("inf") for v in value):
        raise ConvertError(f"{where} is {value!r}; expected a list of finite numbers")
    return tuple(float(v) for v in value)
