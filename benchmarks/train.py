"""Training: the step and its parts, and the input pipeline that feeds it, beside a DataLoader over GeoTIFFs."""

import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks import common, model, suite
from benchmarks.table import TableRow, Target

GEOTIFFS = common.FOLDER / "train_geotiffs"
FILES = 128  # chips as GeoTIFFs
INPUT_ROUNDS, BREAKDOWN_ROUNDS = 5, 5
PASSED = 1024  # chips that our pipeline reads a round
WAITING_STEPS = 8
BATCH = 4
WAITING_TARGET = Target("ours", "<", 2.0)  # % of the time

# What a run trains, by fields of its config; `all weights` is what the others are held against.
ADAPTED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "rank 8 on qkv, proj": {"lora.rank": 8},
    "rank 8 on all four": {"lora.rank": 8, "lora.targets": ["qkv", "proj", "fc1", "fc2"]},
    "decoder and head alone": {"optimizer.freeze": ["encoder"]},
}
LEAN = Target("ratio", ">=", 1 / 0.6)
ADAPTER_ROUNDS = 3


def measure(settings: suite.Settings) -> suite.SuitePart:
    """The training step."""
    return model.measure_steps(settings)


def measure_adapters(settings: suite.Settings) -> suite.SuitePart:
    """Time and memory of a step at batch 4 that trains low-rank updates, and the share of the weights that it trains.

    The memory is the compiler's count of what the step's program holds, since a process holds the compiler too.
    """
    found = suite.SuitePart(raw={})
    whole: float | None = None
    for name, fields in ADAPTED.items():
        with common.Crew() as workers:
            arguments = settings.training | {"batch_size": BATCH, "settings": fields}
            workers["ours"] = common.Worker(suite.OURS, "step", settings.env(), **arguments)
            facts = workers["ours"].facts
            runs = common.in_turns(workers, settings.turns(ADAPTER_ROUNDS))
        work = common.CHIP_GFLOP * common.TRAINING
        found.rows.append(suite.timing_row(settings, "adapters", f"step, {name}", runs, None, chips=BATCH, work=work))
        target = LEAN if name == "rank 8 on qkv, proj" else None
        found.rows.append(suite.memory_row("adapters", f"memory, {name}", facts["program_gib"], whole, target))
        whole = facts["program_gib"] if whole is None else whole
        trained, count = facts["trained"]["encoder"]
        share = 100 * trained / (count - (trained if "lora.rank" in fields else 0))
        found.rows.append(TableRow("adapters", f"trained of the encoder, {name}", "%", [share], less=True))
        found.raw[name] = {"facts": facts, "rounds": runs["ours"]}
    return found


def make_geotiffs() -> Path:
    """The first of the same chips in the published layout; written once."""
    if not GEOTIFFS.exists():
        partial = GEOTIFFS.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        suite.write_geotiffs(partial, FILES)
        partial.rename(GEOTIFFS)
    return GEOTIFFS


def measure_input(settings: suite.Settings) -> suite.SuitePart:
    """Chips/s of the pipelines alone, and the share of a run's time that it waits for chips."""
    rival, env = bool(settings.rivals), settings.env()
    with common.Crew() as workers:
        shared = {"batch_size": BATCH}
        workers["ours"] = common.Worker(suite.OURS, "load", env, shards=str(suite.shards()), chips=PASSED, **shared)
        if rival:
            files = {"folder": str(make_geotiffs()), "workers": len(os.sched_getaffinity(0))}
            workers["rival"] = common.Worker(suite.RIVAL, "load", env, **files, **shared)
        runs = common.in_turns(workers, settings.turns(INPUT_ROUNDS))
    rates = {name: common.column(found, "chips_per_s") for name, found in runs.items()}
    arguments = settings.training | {"batch_size": settings.step_sizes[0]}
    waiting = common.ask(suite.OURS, "waiting", settings.env(), steps=WAITING_STEPS, **arguments)
    shares = [100 * share for share in waiting["waiting"]]
    rows = [
        TableRow("input", "pipeline alone", "chips/s", rates["ours"], rates.get("rival", [])),
        TableRow("input", "waiting for chips", "%", shares, less=True, target=WAITING_TARGET),
        suite.memory_row("input", "memory of a run with validation and checkpoint", waiting["memory_gib"], None),
    ]
    return suite.SuitePart(rows, {"rounds": runs, "run": waiting})


def measure_breakdown(settings: suite.Settings) -> suite.SuitePart:
    """Where a step's time goes: by growing parts, and by kind of operation in a profile."""
    arguments = settings.training | {"batch_size": settings.step_sizes[0]}
    with common.Crew() as workers:
        workers["ours"] = common.Worker(suite.OURS, "breakdown", settings.env(), **arguments)
        facts = workers["ours"].facts
        runs = common.in_turns(workers, settings.turns(BREAKDOWN_ROUNDS))["ours"]
    parts = differences(runs)
    rows = [TableRow("breakdown", f"{name} of a step", "s", values, less=True) for name, values in parts.items()]
    rows += [
        TableRow("breakdown", f"{kind} in a step", "%", [100 * x], less=True) for kind, x in facts["kinds"].items()
    ]
    return suite.SuitePart(rows, {"parts": parts, "kinds": facts["kinds"], "batch_size": arguments["batch_size"]})


def differences(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Seconds that each part adds, from those of programs that each hold one part more, round by round.

    Compiled together parts can save each other work: a difference below 0 is such a saving.
    """
    names = list(runs[0])
    before = [None, *names[:-1]]
    return {
        "optimiser" if name == "step" else name: [run[name] - (run[last] if last else 0) for run in runs]
        for name, last in zip(names, before, strict=True)
    }
