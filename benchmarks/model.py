"""Forward pass and training step of Swin-B + UPerNet on 224 x 224 chips, over batch sizes, beside the rival's.

`python -m benchmarks.run --only model`; with `--rival none` ours alone.
"""

from typing import Any

from benchmarks import common, suite
from benchmarks.table import TableRow, Target

FORWARD_ROUNDS, STEP_ROUNDS = 9, 5
# Times the rival's speed, float32 on two cores, by batch size.
FORWARD_TARGETS = {1: Target("ratio", ">=", 1.4), 8: Target("ratio", ">=", 1.25)}
STEP_TARGET = Target("ratio", ">=", 1.1)
STEP_MEMORY = Target("ours", "<", 4.0)  # GB
AHEAD = Target("ratio", ">=", 1.0)
GPU_FORWARD, GPU_STEP = Target("ours", ">=", 9000), Target("ours", ">=", 3000)  # chips/s


def measure(settings: suite.Settings) -> suite.SuitePart:
    """The forward pass."""
    arguments = {"bundle": settings.bundle, "dtype": settings.dtype}
    targets = FORWARD_TARGETS if settings.device == "cpu" else {}
    return over_sizes(settings, "model", "forward", settings.forward_sizes, arguments, targets)


def measure_steps(settings: suite.Settings) -> suite.SuitePart:
    """The training step."""
    targets = dict.fromkeys(settings.step_sizes, STEP_TARGET) if settings.device == "cpu" else {}
    return over_sizes(settings, "train", "step", settings.step_sizes, settings.training, targets)


def over_sizes(
    settings: suite.Settings,
    part: str,
    job: str,
    sizes: tuple[int, ...],
    arguments: dict[str, Any],
    targets: dict[int, Target],
) -> suite.SuitePart:
    """One job at each batch size, ours and every rival in turns; a size that doesn't fit is noted and left out."""
    work = common.CHIP_GFLOP * (common.TRAINING if job == "step" else 1)
    rounds = settings.turns(STEP_ROUNDS if job == "step" else FORWARD_ROUNDS)
    found = suite.SuitePart(raw={"runs": {}, "failed": {}})
    best: list[TableRow] = []
    for size in sizes:
        try:
            facts, runs = one_size(settings, job, size, rounds, arguments)
        except common.WorkerError as error:
            if settings.device == "cpu":
                raise
            found.raw["failed"][size] = str(error)
            continue
        found.raw["runs"][size] = {"facts": facts, "rounds": runs}
        target = targets.get(size) if settings.dtype == "float32" else None
        for rival in settings.rivals or (None,):
            name = suite.named(f"{job}, batch {size}", rival)
            mine = (AHEAD if settings.device == "gpu" else None) if rival == "compiled" else target
            row = suite.timing_row(settings, part, name, runs, rival, chips=size, work=work, target=mine)
            found.rows.append(row)
        best.append(row)
        found.rows += extra_rows(settings, part, job, size, facts, runs)
    if settings.device == "gpu" and best:
        top = max(best, key=lambda row: common.spread(row.ours)["median"])
        goal = GPU_STEP if job == "step" else GPU_FORWARD
        found.rows.append(TableRow(part, f"best of {job}", "chips/s", top.ours, limit=top.limit, target=goal))
    return found


def one_size(
    settings: suite.Settings, job: str, size: int, rounds: int, arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Facts and rounds of ours and of the rivals at one batch size."""
    env = settings.env()
    with common.Crew() as workers:
        own = settings.env() if job == "step" else env
        workers["ours"] = common.Worker(suite.OURS, job, own, batch_size=size, **arguments)
        for rival in settings.rivals:
            shared = {"weights": suite.weights(settings.bundle), "batch_size": size, "dtype": settings.dtype}
            shared |= {"device": settings.torch_device, "compiled": rival == "compiled"}
            workers[rival] = common.Worker(suite.RIVAL, job, env, **shared)
        facts = {name: worker.facts for name, worker in workers.items()}
        return facts, common.in_turns(workers, rounds)


def extra_rows(
    settings: suite.Settings, part: str, job: str, size: int, facts: dict[str, Any], runs: suite.Runs
) -> list[TableRow]:
    """Compiling, and the memory of a step or on a GPU."""
    compiled = [facts["compiled"]["seconds_first"]] if "compiled" in facts else []
    compiling = [facts["ours"]["seconds_compile"]]
    rows = [TableRow(part, f"compile {job}, batch {size}", "s", compiling, compiled, less=True)]
    if job == "step" or settings.device == "gpu":
        rival = settings.rivals[0] if settings.rivals else None
        theirs = max(common.column(runs[rival], "memory_gib")) if rival else None
        target = STEP_MEMORY if settings.device == "cpu" and size == 4 else None
        rows.append(
            suite.memory_row(part, f"memory of {job}, batch {size}", facts["ours"]["memory_gib"], theirs, target)
        )
    return rows
