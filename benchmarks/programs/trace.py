"""Where a compiled program's time goes by kind of operation: a profile of one call, read beside the program's text."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

KINDS = ("matrix products", "convolutions", "copies and layout", "elementwise and sums")
# They move or rename values and compute nothing.
_MOVING = {"copy", "transpose", "bitcast", "reshape", "broadcast", "slice", "pad", "concatenate", "reverse"}
_MOVING |= {"dynamic-slice", "dynamic-update-slice", "gather", "copy-start", "copy-done"}
_SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "iota"}
# They hold operations that have times of their own.
_HOLDING = {"while", "call", "conditional", "async-start", "async-done"}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = .*?[\]})] ([a-z][\w\-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


def kinds_of(program: str) -> dict[str, str]:
    """The kind (`KINDS`) of each operation in a compiled program's text, by its name; none for what only holds others.

    A fusion with a product inside is a product, whatever else it does; one that only moves values is a copy.
    """
    inside: dict[str, list[tuple[str, str, str]]] = {}
    current = ""
    for line in program.splitlines():
        if found := _INSTRUCTION.match(line):
            inside[current].append((found[1], found[2], line))
        elif found := _COMPUTATION.match(line):
            current = found[1]
            inside[current] = []

    def opcodes(name: str) -> Iterable[str]:
        for _, opcode, line in inside.get(name, []):
            called = _CALLS.search(line)
            if opcode in ("fusion", "call") and called:
                yield from opcodes(called[1])
            else:
                yield opcode

    kinds = {}
    for instructions in inside.values():
        for name, opcode, line in instructions:
            called, target = _CALLS.search(line), _TARGET.search(line)
            if opcode in _HOLDING or opcode in _SILENT:
                continue
            if opcode == "custom-call" and target:
                kinds[name] = _kind({_library(target[1])})
            else:
                kinds[name] = _kind(set(opcodes(called[1])) if opcode == "fusion" and called else {opcode})
    return kinds


def _library(target: str) -> str:
    """The operation behind a library's function."""
    name = target.lower()
    return "convolution" if "conv" in name else "dot" if re.search("matmul|gemm|dot", name) else name


def _kind(opcodes: set[str]) -> str:
    if "dot" in opcodes:
        return KINDS[0]
    if "convolution" in opcodes:
        return KINDS[1]
    return KINDS[2] if opcodes <= _MOVING | _SILENT else KINDS[3]


def by_kind(program: str, call: Callable[[], Any]) -> dict[str, float]:
    """Share of the time of one traced call by kind of operation, summed over the threads that ran them.

    Args:
        program: the compiled program's text.
        call: runs it and waits for it.

    Raises:
        ValueError: the profile shows none of the program's operations.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        path = next(Path(folder).rglob("*.xplane.pb"))
        return shares(events(path), kinds_of(program))


def events(path: Path) -> Iterable[tuple[str, float]]:
    """(name, seconds) of everything in a profile."""
    import jax

    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                yield event.name, event.duration_ns * 1e-9


def shares(found: Iterable[tuple[str, float]], kinds: dict[str, str]) -> dict[str, float]:
    """Share of each kind in the time of those events that are operations of the program.

    Raises:
        ValueError: there are none.
    """
    seconds: dict[str, float] = defaultdict(float)
    for name, duration in found:
        if name in kinds:
            seconds[kinds[name]] += duration
    total = sum(seconds.values())
    if not total:
        raise ValueError("the profile shows none of the program's operations")
    return {kind: seconds[kind] / total for kind in KINDS}
