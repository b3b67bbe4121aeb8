"""A PyTorch checkpoint becomes a model bundle: find the layout, the architecture, the input; check everything; save.

Nothing is guessed and nothing is left out in silence: unknown, missing, duplicate or misshapen tensors are errors that
name them all.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from biomass_jax import bundle
from biomass_jax.convert import architecture, declared, hub, layouts, torch_file
from biomass_jax.convert.declared import Options
from biomass_jax.convert.layouts import Layout, Match, match
from biomass_jax.convert.resize import resize_bias_table
from biomass_jax.convert.torch_file import TorchTensor
from biomass_jax.data.labels import BIOMASS, Label, described, parse
from biomass_jax.errors import ConvertError, DataError, name_list

_HOW_TO_SKIP = "; --no-optimizer converts the weights alone"
_PLATEAU = ("factor", "patience", "threshold", "cooldown", "cooldown_counter", "best", "num_bad_epochs", "last_epoch")


@dataclass
class Converted:
    """A checkpoint in our form, not yet written.

    Attributes:
        file: the checkpoint.
        keys: its keys, sorted by its layout.
        under: the keys of the checkpoint that its state dict lies under.
        architecture: the module's constructor fields.
        input: the bundle's `input` entry.
        output: the bundle's `output` entry.
        variables: float32 arrays by path (`params/...`, `batch_stats/...`).
        optimizer: {count, mu, nu, lr, plateau} with moments by path, or None.
        provenance: the bundle's entry.
        unchecked: declared arguments that were neither used nor compared with anything.
    """

    file: torch_file.TorchFile
    keys: Match
    under: list[str]
    architecture: dict[str, Any]
    input: dict[str, Any]
    output: dict[str, Any]
    variables: dict[str, np.ndarray]
    optimizer: dict[str, Any] | None
    provenance: dict[str, Any]
    unchecked: list[str]

    @property
    def layout(self) -> Layout:
        """The checkpoint's layout."""
        return self.keys.layout


def convert(
    source: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    options: Options | None = None,
    overwrite: bool = False,
) -> list[tuple[str, str]]:
    """Write a bundle from a checkpoint.

    Args:
        source: the checkpoint's file, or `hf://OWNER/REPO/FILE`.
        output: folder of the bundle to be.
        config: the training's config.yaml, a file or `hf://...`.
        options: the user's other wishes.
        overwrite: replace an existing bundle.

    Returns:
        What was done, one (label, text) a line.

    Raises:
        ConvertError: the checkpoint, the config and the flags do not make a bundle; nothing is written.
        TorchFileError: the file is damaged or unsafe; nothing is written.
    """
    options = options or Options()
    output = Path(output)
    if output.exists() and not overwrite:
        raise ConvertError(f"{output} is there already; --overwrite replaces it")
    found = read(source, config=config, options=options)
    optimizer = found.optimizer
    if optimizer is not None:
        optimizer = optimizer | {name: nested(optimizer[name])["params"] for name in ("mu", "nu")}
    saved = bundle.save(
        output,
        nested(found.variables),
        task=found.layout.task,
        architecture=found.architecture,
        input=found.input,
        output=found.output,
        training={"dataset": options.dataset, "season": options.season, "scores": {}},
        provenance=found.provenance,
        optimizer=optimizer,
        overwrite=overwrite,
    )
    return _report(found, saved)


def read(source: str | Path, *, config: str | Path | None = None, options: Options | None = None) -> Converted:
    """Read and check a checkpoint without writing anything; see `convert`."""
    options = options or Options()
    path = _local(source)
    if (part := re.search(r"-0*(\d+)-of-0*(\d+)\.\w+$", path.name)) and int(part[2]) > 1:
        raise ConvertError(f"{path.name}: is part {part[1]} of a model in {part[2]} files; {torch_file.JOIN}")
    file = torch_file.read(path)
    state, under = architecture.state_dict(file.root, path.name)
    keys = match(layouts.detect(state), state)
    said = declared.read(file.root, _local(config) if config else None, source=path.name)
    fields = architecture.check(keys, state)
    pools = architecture.pool_modules(keys.tensors)
    fields, missing = architecture.complete(keys.layout, fields, pools, said, options)
    meta, unknown = declared.input_meta(said, options, fields["in_channels"])
    if missing or unknown:
        asked = "; ".join([*missing, *unknown])
        raise ConvertError(f"{path.name} (layout {keys.layout.name}) does not say, and no flag gives: {asked}")
    variables = architecture.variables(keys, state)
    optimizer = None if options.no_optimizer else _read_optimizer(file.root, keys, variables)
    if optimizer is None and options.with_optimizer:
        raise ConvertError(
            f"{path.name} has no optimiser's state, which --with-optimizer asks for; a full Lightning file has one"
        )
    provenance = _provenance(str(source), path, file, said) | _kept_with(keys, state) | {"command": options.command}
    kept = said.kept("output")
    label = _label(options, kept, str(source), keys.layout.task)
    made = _output_meta(keys.layout.task, fields, meta, label)
    if kept:  # by an export, which names the label; its bins follow from that
        made = {name: made[name] for name in ("bands", "units", "nodata")} | kept
    found = Converted(file, keys, under, fields, meta, made, variables, optimizer, provenance, said.unchecked())
    if options.window_size is not None and options.window_size != fields["window_size"]:
        _resize_window(found, options.window_size)
    return found


def _local(name: str | Path) -> Path:
    if hub.is_hub_name(str(name)):
        return hub.fetch(str(name))
    if "://" in str(name):
        raise ConvertError(f"{name}: is a URL; download the file and give its path{hub.hint(str(name))}")
    if not Path(name).exists():
        raise ConvertError(f"{name}: no such file")
    return Path(name)


def _resize_window(found: Converted, window_size: int) -> None:
    """Bring the relative position bias tables to another window, and say so in the provenance."""
    if found.optimizer is not None:
        raise ConvertError(
            "the optimiser's moments cannot be resized to another window; --no-optimizer leaves them out"
        )
    for path in found.variables:
        if path.endswith("/relative_position_bias_table"):
            found.variables[path] = resize_bias_table(found.variables[path], window_size)
    found.provenance["window_resized"] = {"from": found.architecture["window_size"], "to": window_size}
    found.architecture["window_size"] = window_size


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value as nested dicts."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _label(options: Options, kept: Mapping[str, Any], source: str, task: str) -> Label:
    """What a model gives: what an export kept, or the user says, else biomass.

    Raises:
        ConvertError: the two contradict each other; the name is none; nothing says what a model of canopy height, by
            its file's name, gives; statistics of another model; a label of weights that give none.
    """
    if task != "biomass":
        if options.label is not None:
            raise ConvertError(f"{source}: --label {options.label}, but its weights are of task {task}, without labels")
        return BIOMASS
    try:
        if kept.get("bands"):
            label = described({"name": kept["bands"][0]} | {name: kept[name] for name in ("units",) if name in kept})
        else:
            label = parse(options.label or BIOMASS.name, "--label")
    except DataError as error:
        raise ConvertError(str(error)) from error
    if options.label not in (None, label.name):
        raise ConvertError(f"--label {options.label} contradicts the checkpoint, which was exported with {label.name}")
    if options.label is None and not kept and re.search(r"canopy.?height", source, re.IGNORECASE):
        raise ConvertError(f"{source}: a model of canopy height by its name; give --label canopy_height, or agbd")
    if options.statistics == "granite" and label != BIOMASS:
        raise ConvertError(
            "--statistics granite are those of granite-geospatial-biomass, and the canopy height model has its own; "
            "give --config with the config.yaml beside its weights"
        )
    return label


def _output_meta(task: str, fields: Mapping[str, Any], source: Mapping[str, Any], label: Label) -> dict[str, Any]:
    if task == "biomass":
        # -1 is safe behind a final ReLU; without one the model itself may say -1.
        return label.output([label.name], -1 if fields["final_relu"] else -9999)
    if task == "simmim":
        return {"bands": source["bands"], "units": "z-scores", "nodata": None}
    return {"bands": [], "units": "features", "nodata": None}


def _provenance(source: str, path: Path, file: torch_file.TorchFile, said: declared.Declared) -> dict[str, Any]:
    """Where the weights are from, and what a checkpoint made of them again should say."""
    from_hub = hub.is_hub_name(source)
    entry: dict[str, Any] = {
        "source": source if from_hub else path.name,
        "sha256": file.sha256,
        "versions": bundle.software_versions(),
    }
    if from_hub and (commit := hub.commit_of(path)):
        entry["commit"] = commit
    if said.hyper_parameters:
        kept = {k: v for k, v in said.hyper_parameters.items() if declared.is_plain(v, finite=True)}
        entry["hyper_parameters"] = kept
    root = file.root if isinstance(file.root, Mapping) else {}
    for name in ("epoch", "global_step", "pytorch-lightning_version"):
        if isinstance(root.get(name), int | str):
            entry[name] = root[name]
    return entry


def _kept_with(keys: Match, state: Mapping[str, TorchTensor]) -> dict[str, Any]:
    """What an export needs beside the variables (counters, the images' side in pixels), and what was left out."""
    entry: dict[str, Any] = {
        "layout": keys.layout.name,
        "num_batches_tracked": {path: int(state[key].array()) for path, key in keys.counters.items()},
        "unused": keys.unused + keys.losses,
    }
    for key in keys.buffers:
        found = re.search(r"layers\.(\d+)\.blocks\.\d+\.attn_mask$", keys.layout.canonical(key))
        if found and len(state[key].shape) == 3:
            windows, tokens, _ = state[key].shape  # as many as the images that this Swin was built for have
            patch = state[keys.tensors["params/encoder/patch_embed/projection/kernel"][0]].shape[-1]
            entry["img_size"] = round(windows**0.5) * round(tokens**0.5) * patch * 2 ** int(found[1])
            break
    return entry


def _report(found: Converted, saved: Path) -> list[tuple[str, str]]:
    keys, file = found.keys, found.file
    sizes = [array.size for path, array in found.variables.items() if path.startswith("params/")]
    dropped = f"{len(keys.buffers)} index and mask buffers, computed anew"
    if keys.unused:
        dropped += f"; not part of the model: {name_list(keys.unused)}"
    if keys.losses:
        dropped += f"; of losses and metrics: {name_list(keys.losses)}"
    places = [f"the state dict under {' > '.join(found.under)}"] if found.under else []
    places += [f"{name}. off {count} names" for name, count in sorted(keys.wrappers.items())]
    lines = [
        ("layout", f"{found.layout.name} ({file.format} file)"),
        *((("unwrapped", ", ".join(places)),) if places else ()),
        ("task", found.layout.task),
        ("tensors", f"{len(sizes)} trainable, {len(found.variables) - len(sizes)} running statistics"),
        ("parameters", f"{sum(sizes):,}"),
        ("dropped", dropped),
    ]
    if keys.counters:
        lines.append(("counters", f"{len(keys.counters)} num_batches_tracked kept in the provenance"))
    if resized := found.provenance.get("window_resized"):
        lines.append(("window", f"bias tables resized from {resized['from']} to {resized['to']}"))
    if found.optimizer is not None:
        step, rate = int(found.optimizer["count"]), found.optimizer["lr"]
        lines.append(("optimizer", f"AdamW at step {step}, learning rate {rate:g}"))
    if found.unchecked:
        lines.append(("unchecked", f"declared, but not known here: {name_list(found.unchecked)}"))
    if file.placeholders:
        lines.append(("not built", name_list(file.placeholders)))
    lines += [("sha256", file.sha256), ("weights", bundle.read_meta(saved)["weights_sha256"]), ("bundle", str(saved))]
    return lines


def _read_optimizer(root: Any, keys: Match, variables: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The optimiser's state, None where the file has none.

    Args:
        root: the checkpoint's root object.
        keys: the sorted keys, in the file's order. That is the order of torch's `named_parameters`, by which the
            optimiser numbers its states: buffers aside, a state dict lists tensors in the same order.
        variables: the model's arrays by path.

    Returns:
        {count, mu, nu, lr, plateau}: Adam's step number, first and second moments by path, transposed and permuted
        like their weights, the learning rate, and the state of ReduceLROnPlateau where it was used.

    Raises:
        ConvertError: more than one optimiser or parameter group, or moments that do not fit the parameters.
    """
    states = root.get("optimizer_states") if isinstance(root, Mapping) else None
    if not states:
        return None
    try:
        return _read_adam(root, states, keys, variables)
    except (TypeError, LookupError, AttributeError) as error:  # the file's own structure, which may be anything
        raise ConvertError(f"the optimiser's state isn't Lightning's for AdamW ({error!r}){_HOW_TO_SKIP}") from None


def _read_adam(
    root: Mapping[str, Any], states: Any, keys: Match, variables: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    if len(states) > 1 or len(states[0].get("param_groups", ())) != 1:
        raise ConvertError(f"expected one optimiser with one group of parameters{_HOW_TO_SKIP}")
    state, group = states[0].get("state", {}), states[0]["param_groups"][0]
    if not state:
        return None  # saved before the first step
    tensors = [(path, *row) for path, row in keys.tensors.items() if path.startswith("params/")]
    numbers = list(group.get("params", ()))
    if len(numbers) != len(tensors):
        raise ConvertError(f"the optimiser has {len(numbers)} parameters, the weights {len(tensors)}{_HOW_TO_SKIP}")
    absent = [key for number, (_, key, _) in zip(numbers, tensors, strict=True) if number not in state]
    if absent:
        raise ConvertError(f"the optimiser has no state for {name_list(absent)} (frozen?){_HOW_TO_SKIP}")
    counts = {int(_number(state[number]["step"])) for number in numbers}
    if len(counts) > 1:
        raise ConvertError(f"the optimiser's step numbers differ between parameters: {sorted(counts)}{_HOW_TO_SKIP}")
    moments: dict[str, dict[str, np.ndarray]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, tree in moments.items():
        for number, (path, key, transform) in zip(numbers, tensors, strict=True):
            tree[path] = _moment(state[number].get(name), name, key, transform)
    wrong = [
        f"{path} {moment.shape} for {variables[path].shape}"
        for tree in moments.values()
        for path, moment in tree.items()
        if moment.shape != variables[path].shape
    ]
    if wrong:
        raise ConvertError(f"the optimiser's moments do not fit their parameters: {name_list(wrong)}{_HOW_TO_SKIP}")
    return {
        "count": np.asarray(counts.pop(), np.int32),
        "mu": moments["exp_avg"],
        "nu": moments["exp_avg_sq"],
        "lr": float(_number(group["lr"])),
        **_plateau(root),
    }


def _moment(value: Any, name: str, key: str, transform: Any) -> np.ndarray:
    if not isinstance(value, TorchTensor) or transform.shape(value.shape) is None:
        raise ConvertError(f"the optimiser's {name} of {key} is {value!r}; expected a tensor like it{_HOW_TO_SKIP}")
    return transform.forward(value.array().astype(np.float32, copy=False))


def _number(value: Any) -> float:
    return float(value.array()) if isinstance(value, TorchTensor) else float(value)


def _plateau(root: Mapping[str, Any]) -> dict[str, Any]:
    """{plateau: ReduceLROnPlateau's numbers}, or nothing where the file has another scheduler or none.

    Lightning saves before that epoch's scheduler step, so that a scheduler that has counted fewer epochs than were
    finished owes one update: `owed_loss` is the validation loss it has not seen, NaN where nothing is owed.
    """
    schedulers = root.get("lr_schedulers") or []
    if len(schedulers) != 1 or "num_bad_epochs" not in schedulers[0]:
        return {}
    found = schedulers[0]
    kind = (found.get("mode"), found.get("threshold_mode"))
    if kind != ("min", "rel"):
        raise ConvertError(f"the plateau scheduler's modes are {kind}; expected ('min', 'rel'){_HOW_TO_SKIP}")
    plateau = {name: _number(found[name]) for name in _PLATEAU}
    plateau["min_lr"] = _number((found.get("min_lrs") or [0.0])[0])
    plateau["owed_loss"] = float("nan")
    if found["last_epoch"] < root.get("epoch", -1) + 1:
        plateau["owed_loss"] = _last_score(root, found.get("monitor"))
    return {"plateau": plateau}


def _last_score(root: Mapping[str, Any], monitor: object) -> float:
    """The monitored loss of the epoch at whose end the file was saved, as the checkpoint callback recorded it."""
    callbacks = root.get("callbacks")
    for callback in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(callback, Mapping) and callback.get("monitor") == monitor and "current_score" in callback:
            return _number(callback["current_score"])
    raise ConvertError(
        f"the scheduler has not seen the last epoch, and no callback recorded its {monitor}{_HOW_TO_SKIP}"
    )
