"""What devices say to each other in a compiled program: its collectives, counted in the text that XLA gives.

An operation in the text looks as

    %all-reduce.1 = (f32[8,16]{1,0}, f32[16]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%sum

and in asynchronous form as an `-start` and a `-done`, of which the first is counted. Other asynchronous collectives lie
inside the computation that an `async-start` calls, and are counted there.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shape>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_LOOP = re.compile(r" while\(.*\bbody=%?(?P<body>[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One collective operation as a device takes part in it.

    Attributes:
        kind: of `KINDS`.
        size: bytes of the arrays: reduced, gathered (whole), scattered (whole) or sent.
        devices: in a group.
        times: a step.
    """

    kind: str
    size: int
    devices: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends, by the algorithms that send fewest: a ring's share, twice for all-reduce."""
        if self.kind == "collective-permute":
            return self.size
        return self.size * (self.devices - 1) / self.devices * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
        devices: of the program; a group that isn't named has all of them.

    Raises:
        ValueError: a group or an array of unknown form, or a collective in a loop of unknown length.
    """
    lines = text.splitlines()
    trips = {found["body"]: _TRIPS.search(line) for line in lines if (found := _LOOP.search(line))}
    result, computation = [], ""
    for line in lines:
        if opened := _COMPUTATION.match(line):
            computation = opened["name"]
        found = _OPERATION.match(line)
        if not found:
            continue
        times = 1
        if computation in trips:
            known = trips[computation]
            if known is None:
                raise ValueError(f"a collective in a loop of unknown length: {line.strip()[:200]}")
            times = int(known[1])
        kind, group = found["kind"], group_size(line, devices)
        arrays = list(array_bytes(found["shape"]))
        if found["start"] and kind == "all-gather":
            arrays = arrays[len(arrays) // 2 :]  # operands, then results
        elif found["start"] and kind == "collective-permute":
            arrays = arrays[1:2]  # operand, result, and two numbers
        size = sum(arrays) * (group if kind == "reduce-scatter" else 1)
        result.append(Collective(kind, size, group, times))
    return result


def array_bytes(shape: str) -> Iterator[int]:
    """Bytes of each array in a shape, `f32[2,3]{1,0}` or a tuple of them, however deep.

    Raises:
        ValueError: no array there.
    """
    found = _ARRAY.findall(shape)
    if not found:
        raise ValueError(f"no array in the shape {shape[:200]}")
    for _, bits, sides in found:
        yield math.prod(int(side) for side in sides.split(",") if side) * int(bits or 8) // 8


def group_size(line: str, devices: int) -> int:
    """Devices in each group of a collective, from any of the four forms in which XLA writes groups.

    Raises:
        ValueError: another form.
    """
    if "source_target_pairs=" in line or "replica_groups={}" in line:
        return devices
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(counted[2])
    if named := re.search(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\][^{}]*\{(?P<axes>[^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named["sizes"])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named["axes"])  # an axis, or a part of one
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    raise ValueError(f"groups of unknown form: {line.strip()[:200]}")


def by_kind(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """For each kind that occurs: `count`, `bytes` and `sent` (bytes each device sends) a step."""
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in found)]
    chosen = {kind: [one for one in found if one.kind == kind] for kind in kinds}
    return {
        kind: {
            "count": sum(one.times for one in ones),
            "bytes": sum(one.times * one.size for one in ones),
            "sent": sum(one.times * one.sent for one in ones),
        }
        for kind, ones in chosen.items()
    }
