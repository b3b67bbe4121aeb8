"""How fast a card could run our compiled programs at best, from the compiler's count of their work.

The programs are compiled for the machine at hand: on one without a GPU the fusions, and with them the bytes, are those
of the CPU's compiler. What the products alone need, and what granite's arithmetic needs, stands beside.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks import common, suite

FORWARD_SIZES, STEP_SIZES = (1, 8, 32, 128), (16, 64)
HEADER = ("program", "batch", "GFLOP a chip", "GB a chip", "compute ms", "memory ms", "bound by", "chips/s at most")


@dataclass(frozen=True)
class Roofline:
    """The two times that bound a program from below.

    Attributes:
        flops: of one call.
        bytes: read and written in one call.
        tflops: the card's rate of matrix products, TFLOP/s.
        tbytes: its memory's, TB/s.
    """

    flops: float
    bytes: float
    tflops: float = suite.HOPPER_TFLOPS
    tbytes: float = suite.HOPPER_TBYTES

    @property
    def compute(self) -> float:
        """Seconds of arithmetic."""
        return self.flops / (self.tflops * 1e12)

    @property
    def memory(self) -> float:
        """Seconds of memory traffic."""
        return self.bytes / (self.tbytes * 1e12)

    @property
    def seconds(self) -> float:
        """The longer of the two: both can overlap."""
        return max(self.compute, self.memory)

    @property
    def bound(self) -> str:
        """Which it is."""
        return "compute" if self.compute >= self.memory else "memory"


def measure(settings: suite.Settings) -> suite.SuitePart:
    """Compile and count; nothing is run, and the type is bfloat16 whatever the rest of the suite has."""
    sizes = {"forward_sizes": FORWARD_SIZES, "step_sizes": STEP_SIZES}
    counts = common.ask(suite.OURS, "costs", settings.env(), **settings.training | {"dtype": "bfloat16"}, **sizes)
    programs = []
    for program, by_size in counts.items():
        for size, count in by_size.items():
            line = Roofline(count["flops"], count["bytes"])
            found = {"program": program, "batch_size": int(size), **count, "chips_per_s": int(size) / line.seconds}
            programs.append(found | {"compute_s": line.compute, "memory_s": line.memory, "bound": line.bound})
    return suite.SuitePart([], {"programs": programs})


def show(raw: dict[str, Any]) -> None:
    """Print the table of what `measure` found."""
    print(f"\nRoofline at {suite.HOPPER_TFLOPS:.0f} TFLOP/s and {suite.HOPPER_TBYTES} TB/s, bfloat16")
    print(
        f"granite's own arithmetic: {common.CHIP_GFLOP:.1f} GFLOP a chip forward, {common.TRAINING} times that a step\n"
    )
    common.print_table(HEADER, [cells(found) for found in raw["programs"]])


def cells(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    size = found["batch_size"]
    per_chip = [f"{found['flops'] / size / 1e9:.1f}", f"{found['bytes'] / size / 1e9:.2f}"]
    times = [f"{found[name] * 1e3:.3f}" for name in ("compute_s", "memory_s")]
    return [found["program"], str(size), *per_chip, *times, found["bound"], f"{found['chips_per_s']:,.0f}"]
