"""Learning rate on a plateau and early stopping: plain dictionaries of Python numbers, advanced once an epoch.

They are part of a run's state, so a resumed run continues counting. A plateau that comes back from a bundle as NumPy or
JAX scalars is taken as well.
"""

import math
from collections.abc import Mapping
from typing import Any

# ReduceLROnPlateau's numbers, and what type each has.
_FIELDS: dict[str, type] = {
    "lr": float,
    "factor": float,
    "patience": int,
    "threshold": float,
    "cooldown": int,
    "min_lr": float,
    "eps": float,
    "best": float,
    "num_bad_epochs": int,
    "cooldown_counter": int,
    "last_epoch": int,
}
_TORCH_EPS = 1e-8  # a smaller change of the rate is not made; not stored in a checkpoint by name, nobody sets it


def plateau_init(lr: float, *, factor: float, patience: int, threshold: float, min_lr: float = 0.0) -> dict[str, Any]:
    """State of torch's ReduceLROnPlateau (mode min, relative threshold) before the first epoch.

    Args:
        lr: the first learning rate.
        factor: by which it is multiplied, below 1.
        patience: bad epochs that are put up with; the next one reduces.
        threshold: a loss is better only if it is below best * (1 - threshold).
        min_lr: the learning rate never goes below.
    """
    settings = {"lr": lr, "factor": factor, "patience": patience, "threshold": threshold, "min_lr": min_lr}
    # No epochs of rest after a reduction: only states from a checkpoint may have them.
    counters = {"best": math.inf, "num_bad_epochs": 0, "cooldown": 0, "cooldown_counter": 0, "last_epoch": 0}
    return _typed({**settings, **counters, "eps": _TORCH_EPS})


def plateau_step(state: Mapping[str, Any], loss: float) -> dict[str, Any]:
    """The state after an epoch whose validation loss was `loss`; `lr` is the next epoch's rate.

    torch/optim/lr_scheduler.py, `ReduceLROnPlateau.step`. NaN is never better, so it counts as a bad epoch.
    """
    new = _typed(state)
    loss = float(loss)
    new["last_epoch"] += 1
    if loss < new["best"] * (1 - new["threshold"]):
        new["best"], new["num_bad_epochs"] = loss, 0
    else:
        new["num_bad_epochs"] += 1
    if new["cooldown_counter"] > 0:
        new["cooldown_counter"] -= 1
        new["num_bad_epochs"] = 0
    if new["num_bad_epochs"] > new["patience"]:
        reduced = max(new["lr"] * new["factor"], new["min_lr"])
        if new["lr"] - reduced > new["eps"]:
            new["lr"] = reduced
        new["cooldown_counter"], new["num_bad_epochs"] = new["cooldown"], 0
    return new


def plateau_from_bundle(optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state to continue with from a bundle's optimiser {lr, plateau, ...}; None where it had no plateau.

    Lightning saves an epoch before its scheduler has seen that epoch's loss (`owed_loss`, NaN where nothing is owed):
    that one step is made here.
    """
    stored = optimizer.get("plateau")
    if not stored:
        return None
    found = {"eps": _TORCH_EPS, **stored, "lr": optimizer["lr"]}
    state, owed = _typed(found), float(found.get("owed_loss", math.nan))
    return state if math.isnan(owed) else plateau_step(state, owed)


def early_stop_init(patience: int, min_delta: float = 0.0) -> dict[str, Any]:
    """State of Lightning's EarlyStopping (mode min) before the first epoch.

    Args:
        patience: epochs without a better loss after which training stops.
        min_delta: a loss is better only if it is below best - min_delta.
    """
    return {"patience": patience, "min_delta": min_delta, "best": math.inf, "wait_count": 0, "stop": False}


def early_stop_step(state: Mapping[str, Any], loss: float) -> dict[str, Any]:
    """The state after an epoch whose validation loss was `loss`; `stop` says whether training ends here.

    lightning/pytorch/callbacks/early_stopping.py: a loss that is NaN or infinite stops at once (`check_finite`).
    """
    best, waited = state["best"], state["wait_count"]
    if math.isfinite(loss):
        better = loss + state["min_delta"] < best
        best, waited = (loss, 0) if better else (best, waited + 1)
    stop = not math.isfinite(loss) or waited >= state["patience"]
    return {**state, "best": best, "wait_count": waited, "stop": stop}


def _typed(state: Mapping[str, Any]) -> dict[str, Any]:
    # Through float: a converted checkpoint holds counts as floats.
    return {name: kind(float(state[name])) for name, kind in _FIELDS.items()}
