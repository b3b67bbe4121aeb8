"""The benchmark suite: `python -m benchmarks.run [--only model,predict,uncertainty,train,input,prep]`.

Ours beside the PyTorch original's model (benchmarks/rival/model.py), each in a process of its own, in turns on one
machine; the two are compared on shared weights first. Prints one table and writes JSON with the machine, the versions
and the spread. On a machine with a GPU: bfloat16 over batch sizes beside torch.compile. More parts on demand:
`adapters` (a step that trains low-rank updates), `breakdown` (where a training step's time goes) and `roofline` (no GPU
needed).
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common, data_prep, model, predict, suite, table, train
from benchmarks.programs import roofline

PARTS: dict[str, Callable[[suite.Settings], suite.SuitePart]] = {
    "model": model.measure,
    "predict": predict.measure,
    "uncertainty": predict.measure_uncertainty,
    "train": train.measure,
    "adapters": train.measure_adapters,
    "input": train.measure_input,
    "prep": data_prep.measure,
    "breakdown": train.measure_breakdown,
    "roofline": roofline.measure,
}
ALONE = {"uncertainty", "adapters", "prep", "breakdown", "roofline"}  # without the PyTorch rival
USUAL = {
    "cpu": ("model", "predict", "uncertainty", "train", "input", "prep"),
    "gpu": ("model", "train", "predict", "uncertainty", "input"),
}
SIZES = {
    "cpu": {"forward": (1, 2, 4, 8), "step": (4,)},
    "gpu": {"forward": (1, 8, 32, 64, 128, 256), "step": (16, 32, 64, 128)},
}
TINY = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "decoder_channels": 8}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, print the table, write JSON."""
    options = parser().parse_args(arguments)
    settings = settings_of(options)
    parts = options.only or USUAL[settings.device]
    if settings.rivals and not suite.has_torch() and set(parts) - ALONE:
        raise SystemExit("torch is not installed: pip install -e '.[bench]', or give --rival none for ours alone")
    result: dict[str, Any] = {"machine": common.machine(), "settings": vars(settings), "check": None, "parts": {}}
    rows: list[table.TableRow] = []
    try:
        if settings.rivals and set(parts) - ALONE:
            result["check"] = suite.check_rival(settings)
            say(f"the rival gives our output within {result['check']['error']:.1e}")
        for part in parts:
            began = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):  # details; the table comes alone
                found = PARTS[part](settings)
            say(f"{part}: {time.perf_counter() - began:.0f} s")
            rows += [replace(row, target=None, limit=()) for row in found.rows] if options.tiny else found.rows
            result["parts"][part] = found.raw
    except common.WorkerError as error:
        raise SystemExit(str(error)) from error
    result["rows"] = [row.to_json() for row in rows]
    title = f"{settings.kind}, {settings.dtype}; medians (smallest-largest) of runs in turns; ratio: times better"
    if rows:
        print(f"\n{title}\n")
        table.show(rows)
    if "roofline" in result["parts"]:
        roofline.show(result["parts"]["roofline"])
    path = (
        options.json or common.FOLDER / f"{settings.device}{'_' + '_'.join(options.only) if options.only else ''}.json"
    )
    common.write_json(path, result)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", type=names(PARTS), default=(), metavar="PART,...", help=", ".join(PARTS))
    found.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU where JAX has one")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on CPU, bfloat16 on a GPU")
    found.add_argument(
        "--rival",
        type=names((*suite.RIVALS, "none")),
        metavar="KIND,...",
        help="eager, compiled, or none to measure ours alone; eager on CPU, both on a GPU",
    )
    found.add_argument("--rounds", type=int, help="of every part; each has its own number otherwise")
    found.add_argument("--batch-sizes", type=int, nargs="+", help="of the forward pass")
    found.add_argument("--train-batch-sizes", type=int, nargs="+", help="of the training step")
    found.add_argument(
        "--tiny", action="store_true", help="a tiny model, to see the suite work; its figures say nothing"
    )
    found.add_argument("--json", type=Path, help="where the result goes; below .cache/benchmarks otherwise")
    return found


def names(known: Sequence[str] | dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """An argument type: known names with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected some of {', '.join(known)}")
        return found

    return parse


def settings_of(options: argparse.Namespace) -> suite.Settings:
    """The options, with what the device brings where they say nothing."""
    env = {"JAX_PLATFORMS": "cpu"} if options.device == "cpu" else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    device = common.ask(suite.OURS, "describe", env)
    kind = "cpu" if device["platform"] == "cpu" else "gpu"
    if options.device not in ("auto", kind):
        raise SystemExit(f"--device {options.device}: JAX has {device['count']} x {device['kind']}")
    rivals = options.rival or (("eager",) if kind == "cpu" else ("eager", "compiled"))
    return suite.Settings(
        device=kind,
        kind=device["kind"],
        dtype=options.dtype or ("float32" if kind == "cpu" else "bfloat16"),
        rivals=() if "none" in rivals else rivals,
        rounds=options.rounds,
        forward_sizes=tuple(options.batch_sizes or SIZES[kind]["forward"]),
        step_sizes=tuple(options.train_batch_sizes or SIZES[kind]["step"]),
        fields=TINY if options.tiny else {},
    )


def say(line: str) -> None:
    """Progress, apart from the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
