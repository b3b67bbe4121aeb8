"""All that needs a GPU, in under ten minutes of one card, the most wanted first.

    python -m benchmarks.gpu --out DIR [--only PART,...] [--minutes 9]

Each part is a process with a time limit of its own. Its figures are in DIR/PART.json as they come, those of all parts
in DIR/summary.md; what fails, is cut short, lacks a library or finds no time left is named there. Only jax, flax,
optax, orbax, NumPy and, for the rival, torch are needed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks import common

LEAST = 15.0  # seconds; with less left a part isn't begun


@dataclass(frozen=True)
class GpuPart:
    """A part: its time limit in seconds, the libraries without which it is skipped, its command where it is no job."""

    limit: float
    needs: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


# By worth.
PARTS: dict[str, GpuPart] = {
    "ceilings": GpuPart(45),
    "forward": GpuPart(150),
    "attention": GpuPart(75),
    "mlp": GpuPart(45),
    "step": GpuPart(180),
    "rival": GpuPart(150, ("torch",)),
    "parity": GpuPart(100),
    "profile": GpuPart(120),
    "tests": GpuPart(120, ("pytest", "pytest_timeout"), (sys.executable, "-m", "pytest", "-q", "tests/models/fused")),
    "smoke": GpuPart(180, ("rasterio", "grain", "tensorflow_datasets", "ml_collections"), ("bash", "launch/smoke.sh")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 where the first of them has a figure, 2 where there is no GPU."""
    options = parser().parse_args(arguments)
    out: Path = options.out
    if not options.tiny and not has_gpu():
        print("no GPU here; --tiny shows on any machine that the parts run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    chosen = [name for name in PARTS if name in (options.only or PARTS)]
    verdicts: dict[str, str] = {}
    for name in chosen:
        verdicts[name] = run_part(name, out, ends - time.monotonic(), tiny=options.tiny)
        print(f"{name}: {verdicts[name]}", flush=True)
        (out / "summary.md").write_text(summary(verdicts, results(out, verdicts)))
    return 0 if (out / f"{chosen[0]}.json").is_file() else 1


def has_gpu() -> bool:
    """Whether JAX computes on one."""
    return common.ask("benchmarks.jax_work", "describe")["platform"] == "gpu"


def run_part(name: str, out: Path, left: float, *, tiny: bool) -> str:
    """Run a part with `left` seconds for it and all after it; in words, what came of it."""
    part, result, said = PARTS[name], out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    if missing := [library for library in part.needs if importlib.util.find_spec(library) is None]:
        return f"skipped: {', '.join(missing)} not installed"
    if tiny and part.command:
        return "skipped: needs a GPU"
    if left < LEAST:
        return "left out: no time left"
    job = (sys.executable, "-m", "benchmarks.gpu.jobs", name, str(result), *(["--tiny"] if tiny else []))
    began = time.monotonic()
    with said.open("w") as log:
        code = run(part.command or job, min(part.limit, left), log)
    took = f"{time.monotonic() - began:.0f} s"
    if part.command and code == 0:
        result.write_text(json.dumps({"passed": True}) + "\n")
    if code is None:
        return f"cut short after {took}, " + ("figures until then kept" if result.is_file() else "without a figure")
    return f"done in {took}" if code == 0 else f"failed after {took}, exit code {code}: {last_line(said)}"


def run(command: Sequence[str], limit: float, log: IO[str]) -> int | None:
    """Exit code of a command; None where it was still running after `limit` seconds: it and its children are killed."""
    # Compiling has to take its time, and each process the memory that it needs.
    more = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    more["JAX_THREEFRY_GPU_KERNEL_LOWERING"] = "true"  # as runs have it, see biomass_jax/main.py
    more["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")  # the tests would have flags for CPUs otherwise
    with subprocess.Popen(
        command, cwd=common.ROOT, env=os.environ | more, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # an interrupted run's part, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def last_line(path: Path) -> str:
    """What a log ends with."""
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def results(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The figures that there are, by part."""
    found = {name: out / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}


def summary(verdicts: Mapping[str, str], found: Mapping[str, Mapping[str, Any]]) -> str:
    """A page of what came of each part, and a table of its figures."""
    lines = ["# On this card", ""]
    lines += [f"- {name}: {verdict}" for name, verdict in verdicts.items()]
    peak = found.get("ceilings", {}).get("product_bfloat16_tflops")
    for name, figures in found.items():
        lines += ["", f"## {name}", "", "| | |", "|---|---|"]
        lines += [f"| {label} | {value} |" for label, value in told(figures, peak)]
    return "\n".join(lines) + "\n"


def told(figures: Mapping[str, Any], peak: float | None, before: str = "") -> list[tuple[str, str]]:
    """Figures of a part in rows; a rate of products has its share of the ceiling beside it."""
    rows = []
    for name, value in figures.items():
        label = f"{before}{name}"
        if isinstance(value, Mapping):
            rows += told(value, peak, f"{label}: ")
        elif isinstance(value, float):
            share = f" ({value / peak:.0%} of the ceiling)" if peak and name == "tflops" else ""
            rows.append((label, f"{value:,.4g}{share}"))
        else:
            rows.append((label, str(value)))
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, required=True, help="folder for the figures and the parts' logs")
    found.add_argument("--only", type=names, metavar="PART,...", help=", ".join(PARTS))
    found.add_argument("--minutes", type=float, default=9, help="for all parts together (9)")
    found.add_argument("--tiny", action="store_true", help="a tiny model, also without a GPU: its figures say nothing")
    return found


def names(text: str) -> tuple[str, ...]:
    """Parts with commas between."""
    found = tuple(text.split(","))
    if unknown := sorted(set(found) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
