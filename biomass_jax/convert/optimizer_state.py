"""The AdamW and plateau state of a Lightning checkpoint, in our form, so that a run can go on where it stopped."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from biomass_jax.convert.rows import Match, name_list
from biomass_jax.convert.torch_file import TorchTensor
from biomass_jax.errors import ConvertError

_HOW_TO_SKIP = "; --no-optimizer converts the weights alone"
_PLATEAU = ("factor", "patience", "threshold", "cooldown", "cooldown_counter", "best", "num_bad_epochs", "last_epoch")


def read(root: Any, match: Match) -> dict[str, Any] | None:
    """The optimiser's state, None where the file has none.

    Args:
        root: the checkpoint's root object.
        match: the sorted keys, in the file's order. That is the order of torch's `named_parameters`, by which the
            optimiser numbers its states: buffers aside, a state dict lists tensors in the same order.

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
        return _read(root, states, match)
    except (TypeError, LookupError, AttributeError) as error:  # the file's own structure, which may be anything
        raise ConvertError(f"the optimiser's state isn't Lightning's for AdamW ({error!r}){_HOW_TO_SKIP}") from None


def _read(root: Mapping[str, Any], states: Any, match: Match) -> dict[str, Any] | None:
    if len(states) > 1 or len(states[0].get("param_groups", ())) != 1:
        raise ConvertError(f"expected one optimiser with one group of parameters{_HOW_TO_SKIP}")
    state, group = states[0].get("state", {}), states[0]["param_groups"][0]
    if not state:
        return None  # saved before the first step
    paths = [path for path in match.tensors if path.startswith("params/")]
    keys = [match.tensors[path][0] for path in paths]
    numbers = list(group.get("params", ()))
    if len(numbers) != len(paths):
        raise ConvertError(f"the optimiser has {len(numbers)} parameters, the weights {len(paths)}{_HOW_TO_SKIP}")
    absent = [key for number, key in zip(numbers, keys, strict=True) if number not in state]
    if absent:
        raise ConvertError(f"the optimiser has no state for {name_list(absent)} (frozen?){_HOW_TO_SKIP}")
    counts = {int(_number(state[number]["step"])) for number in numbers}
    if len(counts) > 1:
        raise ConvertError(f"the optimiser's step numbers differ between parameters: {sorted(counts)}{_HOW_TO_SKIP}")
    moments: dict[str, dict[str, np.ndarray]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, tree in moments.items():
        for number, path, key in zip(numbers, paths, keys, strict=True):
            tree[path] = _moment(state[number].get(name), name, key, match.tensors[path][1])
    return {
        "count": np.asarray(counts.pop(), np.int32),
        "mu": moments["exp_avg"],
        "nu": moments["exp_avg_sq"],
        "lr": float(_number(group["lr"])),
        **_plateau(root),
    }


def check_shapes(optimizer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse moments whose shapes are not their parameters'."""
    wrong = [
        f"{path} {moments[path].shape} for {shapes[path]}"
        for moments in (optimizer["mu"], optimizer["nu"])
        for path in moments
        if moments[path].shape != shapes[path]
    ]
    if wrong:
        raise ConvertError(f"the optimiser's moments do not fit their parameters: {name_list(wrong)}{_HOW_TO_SKIP}")


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


def _last_score(root: Mapping[str, Any], monitor: Any) -> float:
    """The monitored loss of the epoch at whose end the file was saved, as the checkpoint callback recorded it."""
    callbacks = root.get("callbacks")
    for callback in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(callback, Mapping) and callback.get("monitor") == monitor and "current_score" in callback:
            return _number(callback["current_score"])
    raise ConvertError(
        f"the scheduler has not seen the last epoch, and no callback recorded its {monitor}{_HOW_TO_SKIP}"
    )
