"""What the reader of PyTorch files is made of beside tensors: its errors, its inert stand-ins, its rule for keys."""

from typing import Any

MAX_KEY_PARTS = 64
MAX_KEY_CHARS = 4096


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


class NumpyDtype(Inert):
    """A numpy.dtype of the file: only a code such as 'f8' and a byte order, used to decode NumPy scalars."""

    __slots__ = ("code", "order")
    class_name = "numpy.dtype"

    def __init__(self, code: str):
        self.code = code
        self.order = "<"


def check_key(key: Any) -> None:
    """Refuse a dict key or set element whose hash could be costly: bounds its parts (so its depth) and its length."""
    parts, budget, chars = [key], MAX_KEY_PARTS, 0
    while parts:
        part = parts.pop()
        kind = type(part)
        if kind is tuple or kind is frozenset:
            budget -= len(part)
            if budget < 0:
                raise Malformed("a dict key is a tuple of too many parts")
            parts.extend(part)
        elif kind is str or kind is bytes:
            chars += len(part)
            if chars > MAX_KEY_CHARS:
                raise Malformed(f"a dict key has {chars} characters, more than {MAX_KEY_CHARS}")
        elif kind is int:
            if abs(part) >= 1 << 64:
                raise Malformed("a dict key is an integer beyond 64 bits")
        elif part is not None and kind not in (bool, float, complex) and not isinstance(part, Inert):
            raise Malformed(f"a {kind.__name__} can't be a dict key")


def checked(values: list[Any]) -> list[Any]:
    """The values, each fit to be a set's element."""
    for value in values:
        check_key(value)
    return values


def fill(target: dict[Any, Any], pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Set the pairs in a dict whose keys are checked first; returns the dict."""
    for key, value in pairs:
        check_key(key)
        target[key] = value
    return target
