"""A bundle becomes a PyTorch checkpoint again: the layouts' tables read backwards.

Trainable tensors and running statistics come out bit for bit; buffers that follow from the shapes are computed anew.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax import bundle
from biomass_jax.convert import architecture, declared
from biomass_jax.convert.architecture import UNSCALED
from biomass_jax.convert.declared import FIELD_OF, OURS
from biomass_jax.convert.layouts import COUNTER, GRANITE, SIMMIM, SIMMIM_ENCODER, TENSOR, Layout, expand
from biomass_jax.convert.torch_file import write as torch_write
from biomass_jax.errors import ConvertError, name_list
from biomass_jax.models.build import SPREAD_FIELDS, abstract_variables, architecture_of, build_module
from biomass_jax.models.swin_ops import relative_position_index, shift_mask

_LAYOUTS = {"biomass": GRANITE, "simmim": SIMMIM, "encoder": SIMMIM_ENCODER}
# Settings that the code behind a layout doesn't have: what it always does.
_ALWAYS: dict[str, dict[str, Any]] = {
    "biomass": {"shift_single_window": True},
    "simmim": {"shift_single_window": False},
    "encoder": {"shift_single_window": False, "stage_norms": False, "final_norm": True},
}
_INSTEAD = (
    "; maps are made from the bundle as it is, and a model fine-tuned with --config.model.shift_single_window=true can "
    "be exported"
)
# Fields that shapes do not tell, as terratorch's arguments: a checkpoint has to declare them.
_DECLARED = ("backbone_drop_path_rate", "head_dropout", "head_final_act", "decoder_pool_scales")


def export(
    source: str | Path, output: str | Path, *, img_size: int | None = None, overwrite: bool = False
) -> list[tuple[str, str]]:
    """Write a bundle as a checkpoint in its task's original layout.

    A biomass bundle becomes a Lightning-like dict with keys `model.encoder...` that terratorch loads strictly, a SimMIM
    bundle {'model': ...} with microsoft/SimMIM's keys, and an encoder alone the same without mask token and decoder,
    which the original's fine-tuning reads. All pass `torch.load(weights_only=True)`.

    Args:
        source: the bundle's folder.
        output: the file to be.
        img_size: side in pixels of the images SimMIM's shift masks are made for; default, that of the checkpoint the
            bundle was converted from, unless its window was resized.
        overwrite: replace an existing file.

    Returns:
        What was done, one (label, text) a line.

    Raises:
        ConvertError: the file exists, or the layout cannot say what the bundle is: a biomass model whose window was
            resized, a field that the original doesn't have or that the way back would read as another value, an
            unknown image size.
        BundleError: no bundle there, or a damaged one.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise ConvertError(f"{output} is there already; --overwrite replaces it")
    meta = bundle.read_meta(source)
    layout = _LAYOUTS[meta["task"]]
    _check_exportable(layout, meta, str(source))
    opened = bundle.load(source)
    arrays = {path: np.asarray(leaf) for path, leaf in bundle.flatten(opened.variables).items()}
    _fold_output(arrays, meta["architecture"])
    state = dict(_state(layout, arrays, meta, img_size))
    root = _lightning(state, meta) if layout is GRANITE else {"model": state} | _declarations(meta)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch_write.write(output, root)
    done = [
        ("layout", layout.name),
        ("tensors", f"{len(arrays)} of the bundle, {len(state) - len(arrays)} counters and buffers"),
        ("weights", meta["weights_sha256"]),
        ("file", str(output)),
    ]
    if "uncertainty" in meta:
        done.append(("left out", "calibration, for which a checkpoint has no place"))
    return done


def _check_exportable(layout: Layout, meta: Mapping[str, Any], source: str) -> None:
    """Raise where a checkpoint of this layout would be read as another model than the bundle's."""
    if "members" in meta["architecture"]:
        raise ConvertError(
            f"{source}: is an ensemble, which no checkpoint's layout holds; export its members, which its bundle.json "
            "names under provenance.members"
        )
    resized = meta["provenance"].get("window_resized")
    if layout is GRANITE and resized:
        raise ConvertError(
            f"{source}: its bias tables were resized from window {resized['from']} to {resized['to']}, which "
            "cannot be undone; export a bundle that was converted without --window-size"
        )
    always, fields = _ALWAYS[layout.task], meta["architecture"]
    if (spread := fields.get("spread", "none")) != "none":
        raise ConvertError(
            f"{source}: spread={spread}; the original of the layout {layout.name} gives a mean alone and has no place "
            "for params/head/spread; maps are made from the bundle as it is, and the bundle that a spread was added to "
            "with --config.spread_only=True has the same mean and can be exported"
        )
    if other := [name for name, value in always.items() if fields.get(name, value) != value]:
        raise ConvertError(
            f"{source}: {name_list(f'{name}={fields[name]}' for name in other)}; the original of the layout "
            f"{layout.name} always has {name_list(f'{name}={always[name]}' for name in other)} and would compute "
            f"something else with these weights{_INSTEAD if layout is GRANITE else ''}"
        )
    fields = architecture_of(build_module(meta["task"], fields))  # with the defaults of what an older bundle leaves out
    try:
        back = _way_back(layout, meta)
    except ConvertError as error:
        raise ConvertError(f"{source}: a file of the layout {layout.name} cannot say what it is ({error})") from None
    known = {*UNSCALED, *SPREAD_FIELDS}  # the first are put into weights, the others say nothing without a spread
    wrong = [name for name, value in fields.items() if name not in known and _listed(back.get(name)) != value]
    if wrong:
        told = name_list(f"{name}={fields[name]}, which would be read as {back.get(name)}" for name in wrong)
        raise ConvertError(f"{source}: a file of the layout {layout.name} cannot say {told}")


def _way_back(layout: Layout, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that a conversion would find in the bundle's checkpoint.

    Raises:
        ConvertError: it would find none, since shapes and arguments contradict each other.
    """
    shapes = bundle.flatten(abstract_variables(build_module(meta["task"], meta["architecture"])))
    arrays = {path: tuple(leaf.shape) for path, leaf in shapes.items()}
    said = declared.read({"hyper_parameters": _hyper_parameters(meta)}, None, source="the checkpoint")
    found = architecture.from_shapes(layout, arrays)
    return architecture.complete(layout, found, architecture.pool_modules(arrays), said, declared.Options())[0]


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _fold_output(arrays: dict[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    """Put the head's output scale and offset, which torch's head doesn't have, into its last layer."""
    scale, offset = (fields.get(name, value) for name, value in UNSCALED.items())
    if (scale, offset) != tuple(UNSCALED.values()):
        kernel, bias = "params/head/final/kernel", "params/head/final/bias"
        arrays[kernel] = arrays[kernel] * np.float32(scale)
        arrays[bias] = arrays[bias] * np.float32(scale) + np.float32(offset)


def _state(
    layout: Layout, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], img_size: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The state dict's items in torch's order."""
    fields = meta["architecture"]
    prefix = "model." if layout is GRANITE else ""
    counters = meta["provenance"].get("num_batches_tracked", {})
    if img_size is None and "window_resized" not in meta["provenance"]:
        img_size = meta["provenance"].get("img_size")
    masks = {} if layout is GRANITE else _shift_masks(fields, img_size)
    depths = fields["depths"]
    counts = {"k": len(fields.get("pool_scales", ())), "u": fields.get("upscale_layers", 0)}
    counts |= {"i": len(depths), "l": len(depths) - 1, "f": len(depths) - 1}
    written = set()
    for row, key, path in expand(layout.rows, lambda name, at: depths[at["i"]] if name == "j" else counts[name]):
        if row.role == TENSOR and path in arrays:
            written.add(path)
            yield prefix + key, row.transform.inverse(arrays[path])
        elif row.role == COUNTER:
            # Torch counts batches only for a momentum of None: 0 for a model that never was torch's changes nothing.
            yield prefix + key, np.asarray(counters.get(path, 0), np.int64)
        elif key.endswith("relative_position_index"):
            yield prefix + key, relative_position_index(fields["window_size"]).astype(np.int64)
        elif key in masks:
            yield prefix + key, masks[key]
    if lost := sorted(set(arrays) - written):
        raise ConvertError(f"layout {layout.name} has no place for {name_list(lost)}")


def _shift_masks(fields: Mapping[str, Any], img_size: int | None) -> dict[str, np.ndarray]:
    """SimMIM's attn_mask buffers: in every odd block of a stage whose map is larger than a window."""
    window, patch = fields["window_size"], fields["patch_size"]
    stages = len(fields["depths"])
    if img_size is None:
        raise ConvertError(
            "SimMIM's shift masks depend on the image size, which the bundle does not say; give --img-size"
        )
    step = patch * 2 ** (stages - 1)
    if img_size <= 0 or img_size % step or any(img_size // patch // 2**i % window for i in range(stages)):
        raise ConvertError(
            f"image size {img_size}: the original needs maps that are multiples of the window {window} in all {stages} "
            f"stages, as {step * window} px gives"
        )
    masks: dict[str, np.ndarray] = {}
    for i, depth in enumerate(fields["depths"]):
        side = img_size // patch // 2**i
        if side > window:
            mask = shift_mask(side, side, window, window // 2)
            masks |= {f"encoder.layers.{i}.blocks.{j}.attn_mask": mask for j in range(1, depth, 2)}
    return masks


def _lightning(state: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, Any]:
    """A Lightning checkpoint's dict around a state dict."""
    provenance = meta["provenance"]
    return {
        "epoch": provenance.get("epoch", 0),
        "global_step": provenance.get("global_step", 0),
        "pytorch-lightning_version": provenance.get("pytorch-lightning_version", "2.2.5"),
        "state_dict": dict(state),
        "hparams_name": "kwargs",
        **_declarations(meta),
    }


def _declarations(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of a bundle its tensors don't say, where Lightning keeps such, so that it converts back without flags."""
    source = meta["input"]
    return {
        "hyper_parameters": _hyper_parameters(meta),
        "datamodule_hyper_parameters": {
            "output_bands": source["bands"],
            "means": source["means"],
            "stds": source["stds"],
            "no_data_replace": 0,
            OURS: {
                "input": {name: source[name] for name in declared.INPUT_FIELDS if name in source},
                "output": {"bands": _own_bands(meta), "units": meta["output"]["units"]},
            },
        },
    }


def _own_bands(meta: Mapping[str, Any]) -> list[str]:
    """What the network itself gives: calibration's bands need what no checkpoint holds."""
    return meta["output"]["bands"][:1] if "uncertainty" in meta else meta["output"]["bands"]


def _hyper_parameters(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Terratorch's arguments for this architecture; those of the checkpoint that the bundle is from, where it is."""
    fields, kept = meta["architecture"], meta["provenance"].get("hyper_parameters")
    arguments = {name: fields[field] for name, field in FIELD_OF.items() if field in fields}
    if "final_relu" in fields:
        arguments["head_final_act"] = "torch.nn.ReLU" if fields["final_relu"] else None
    if kept:
        # Flags gave what these arguments left out; pooling scales are left out where they are the usual ones.
        given = {name: arguments[name] for name in _DECLARED if name in arguments}
        if tuple(given.get("decoder_pool_scales", ())) == architecture.UPERNET_POOL_SCALES:
            del given["decoder_pool_scales"]
        said = kept.get("model_args")
        return kept | {"model_args": given | (said if isinstance(said, dict) else {})}
    if meta["task"] != "biomass":
        return {"model_args": arguments}
    return {
        "model_args": {
            "decoder": "UperNetDecoder",
            "pretrained": False,
            "backbone": "prithvi_swin_B",
            **arguments,
            "bands": list(meta["input"]["bands"]),
            "num_frames": 1,
        },
        "model_factory": "PrithviModelFactory",
        "loss": "rmse",
        "ignore_index": -1,
    }
