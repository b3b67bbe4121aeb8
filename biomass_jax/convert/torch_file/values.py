"""What the reader of PyTorch files is made of beside tensors: its error and its inert stand-ins."""

from typing import Any


class Malformed(ValueError):
    """The same fault found where the file's name isn't known; `torch_file.read` adds the name."""


class Inert:
    """Base of the objects that may stand for something else: compared and hashed by identity, never called."""

    __slots__ = ()
    class_name: str


class Placeholder(Inert):
    """A class, function or object of the file that was not built.

    Attributes:
        class_name: dotted name as the file gives it.
        args: what it was called with; None for a mere mention of the name.
        kwargs: keyword arguments of the call.
        state: what pickle would have handed to `__setstate__` or `__dict__` (a dict for an `argparse.Namespace`).
        items: what would have been appended or added, or (key, value) pairs that would have been set.
    """

    __slots__ = ("args", "class_name", "items", "kwargs", "state")

    def __init__(self, class_name: str, args: tuple[Any, ...] | None = None, kwargs: dict[Any, Any] | None = None):
        self.class_name = class_name
        self.args = args
        self.kwargs = kwargs or {}
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.class_name}, not built>"
