"""What a fault is: a change of the sources that a named test has to notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One fault: `changes` are (file, text that is there once, text in its place); `test` has to notice it."""

    name: str
    test: str
    changes: tuple[tuple[str, str, str], ...]


def in_file(path: str, *changes: tuple[str, str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((path, old, new) for old, new in changes)
