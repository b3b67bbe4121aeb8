"""A pickle interpreter that builds plain values only.

PyTorch files hold a pickle, and a pickle is a program: Python's own unpickler imports and calls whatever it names. This
one never imports and never calls what a file names. A name is looked up in a table of our own builders; a name that
isn't there becomes a `Placeholder`, which keeps what it was given and does nothing. Opcode meanings follow the comments
of Python's `pickletools`.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import numpy as np

from biomass_jax.convert.torch_file.tensor import BUILDERS, CONSTANTS, Inert, Malformed, Placeholder

MAX_PICKLE_BYTES = 64 << 20  # real ones stay under a few MB: the weights lie outside the pickle
MAX_COPIED_BYTES = 256 << 20
MAX_OPERATIONS = 2_000_000  # a full Lightning file of Swin-B takes about 100,000
MAX_LINE = 4096
MAX_INTEGER_BYTES = 1024
MAX_KEY_PARTS = 64
MAX_KEY_CHARS = 4096


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


@dataclass(frozen=True)
class Loaded:
    """One pickle's result: its value, the position behind it, and the names that were not built."""

    value: Any
    end: int
    placeholders: list[str]


def load(buffer: bytes | mmap, start: int, stop: int, persistent: Callable[[Any], Any]) -> Loaded:
    """Interpret the pickle that starts at `start` of `buffer` and ends before `stop`.

    Args:
        buffer: the file or a part of it.
        start: first byte of the pickle.
        stop: one past the last byte that may belong to it.
        persistent: called with each persistent id.

    Raises:
        Malformed: where the pickle is truncated, too large or against the rules.
    """
    machine = _Machine(buffer, start, min(stop, start + MAX_PICKLE_BYTES), persistent)
    try:
        value = machine.run()
    except Malformed as exc:
        raise Malformed(f"pickle, byte {machine.pos - start}: {exc}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as exc:
        raise Malformed(f"pickle, byte {machine.pos - start}: broken ({type(exc).__name__}: {exc})") from None
    return Loaded(value, machine.pos, list(machine.unknown))


@dataclass
class _Machine:
    """Pickle's stack machine. Nothing here recurses, so nesting can't exhaust Python's stack."""

    buffer: bytes | mmap
    pos: int
    stop: int
    persistent: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    marked: list[list[Any]] = field(default_factory=list)  # the stacks below each open mark
    memo: dict[int, Any] = field(default_factory=dict)  # a dict: a huge index costs nothing
    unknown: dict[str, None] = field(default_factory=dict)
    copied: int = 0

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise Malformed(f"opcode {code!r} is unknown or not allowed in a PyTorch file")
            operation(self)
        raise Malformed(f"more than {MAX_OPERATIONS} operations")

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if end > self.stop:
            raise Malformed(f"{count} bytes wanted, {self.stop - self.pos} left: truncated, or over the size limit")
        self.pos, start = end, self.pos
        return self.buffer[start:end]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        end = self.buffer.find(b"\n", self.pos, min(self.stop, self.pos + MAX_LINE))
        if end < 0:
            raise Malformed(f"a text argument has no end within {MAX_LINE} bytes")
        self.pos, start = end + 1, self.pos
        return self.buffer[start:end]

    def line_name(self) -> Any:
        return self.name(self.line().decode(), self.line().decode())

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def name(self, module: object, name: object) -> Any:
        """What a class or function name of the file stands for here."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_LINE:
            raise Malformed("a class name is not a short string")
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2's names
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if not full.isprintable():  # names are shown to users
            raise Malformed("a class name has unprintable characters")
        if full in CONSTANTS:
            return CONSTANTS[full]
        if full not in _BUILDERS:
            self.unknown[full] = None
        return Placeholder(full)

    def construct(self, cls: Any, args: Any, kwargs: Any = None) -> Any:
        if not isinstance(cls, Placeholder) or type(args) is not tuple or type(kwargs or {}) is not dict:
            raise Malformed(f"a {type(cls).__name__} is called with a {type(args).__name__}")
        builder = _BUILDERS.get(cls.class_name) if cls.args is None and not kwargs else None
        if builder is None:
            return Placeholder(cls.class_name, args, kwargs)
        self.charge(args)
        try:
            built = builder(*args)
        except (TypeError, ValueError, OverflowError) as exc:
            raise Malformed(f"{cls.class_name}: {exc}") from None
        if built is NotImplemented:
            self.unknown[cls.class_name] = None
            return Placeholder(cls.class_name, args)
        return built

    def charge(self, args: tuple[Any, ...]) -> None:
        """Bound what builders may copy: a few bytes can name one long value again and again."""
        for arg in args:
            if type(arg) in (str, bytes, bytearray):
                self.copied += len(arg)
            elif type(arg) in (list, tuple, dict, set, frozenset):
                self.copied += 64 * len(arg)
        if self.copied > MAX_COPIED_BYTES:
            raise Malformed(f"builds more than {MAX_COPIED_BYTES} bytes by repeating its parts")

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Placeholder):
            target.items.extend(items)
        elif type(target) is set:
            target.update(checked(items))
        else:
            raise Malformed(f"items are added to a {type(target).__name__}")

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        if isinstance(target, Placeholder):
            target.items.extend(pairs)
        elif type(target) in (dict, OrderedDict):
            fill(target, pairs)
        else:
            raise Malformed(f"items are set in a {type(target).__name__}")

    def dict_since_mark(self) -> None:
        flat = self.pop_mark()
        self.push({})
        self.set_items(flat)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, NumpyDtype):
            order = state[1] if type(state) is tuple and len(state) > 1 else None
            if order not in ("<", ">", "|", "="):
                raise Malformed("a numpy.dtype has an unknown byte order")
            target.order = order
        elif type(target) not in (dict, OrderedDict) and not isinstance(target, Inert):
            # attributes of a dict (a state dict's `_metadata`) or of a tensor say nothing about the values
            raise Malformed(f"a state is set on a {type(target).__name__}")

    def object(self) -> None:
        """OBJ: the class is the first item since the mark."""
        cls, *args = self.pop_mark()
        self.push(self.construct(cls, tuple(args)))

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def integer_line(self) -> None:
        text = self.line()
        self.push({b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text.rstrip(b"L")))

    def long(self, count: int) -> None:
        if not 0 <= count <= MAX_INTEGER_BYTES:
            raise Malformed(f"an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def top_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise Malformed("a tuple of more items than there are")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def _text(raw: bytes) -> str | bytes:
    """Python 2's strings: text where they are UTF-8, else the bytes."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


# Left out, and so refused: STRING (protocol 0, which torch can't use), EXT1/2/4 (a registry of the reading process),
# PERSID (torch never writes textual ids), NEXT_BUFFER and READONLY_BUFFER (buffers outside the file).
_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.pop_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"R": lambda m: m.push(m.construct(m.stack.pop(-2), m.stack.pop())),
    b"\x81": lambda m: m.push(m.construct(m.stack.pop(-2), m.stack.pop())),  # NEWOBJ: as REDUCE
    b"\x92": lambda m: m.push(m.construct(m.stack.pop(-3), m.stack.pop(-2), m.stack.pop())),
    b"b": _Machine.build,
    b"c": lambda m: m.push(m.line_name()),
    b"\x93": lambda m: m.push(m.name(m.stack.pop(-2), m.stack.pop())),
    b"i": lambda m: m.push(m.construct(m.line_name(), tuple(m.pop_mark()))),  # INST
    b"o": _Machine.object,
    b"Q": lambda m: m.push(m.persistent(m.stack.pop())),
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME: a reading hint
    # plain values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": _Machine.integer_line,
    b"L": _Machine.integer_line,
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.long(m.number("<B")),
    b"\x8b": lambda m: m.long(m.number("<i")),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(m.number(">d")),
    b"T": lambda m: m.push(_text(m.take(m.number("<I")))),
    b"U": lambda m: m.push(_text(m.take(m.number("<B")))),
    b"V": lambda m: m.push(m.line().decode("raw_unicode_escape")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    b"\x8c": lambda m: m.push(m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    b"\x8d": lambda m: m.push(m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"\x96": lambda m: m.push(bytearray(m.take(m.number("<Q")))),
    # containers
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"\x8f": lambda m: m.push(set()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.top_tuple(1),
    b"\x86": lambda m: m.top_tuple(2),
    b"\x87": lambda m: m.top_tuple(3),
    b"l": lambda m: m.push(m.pop_mark()),
    b"d": _Machine.dict_since_mark,
    b"\x91": lambda m: m.push(frozenset(checked(m.pop_mark()))),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"\x90": lambda m: m.extend(m.pop_mark()),
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: m.set_items(m.pop_mark()),
    # the memo
    b"p": lambda m: m.memo.update({int(m.line()): m.stack[-1]}),
    b"q": lambda m: m.memo.update({m.number("<B"): m.stack[-1]}),
    b"r": lambda m: m.memo.update({m.number("<I"): m.stack[-1]}),
    b"\x94": lambda m: m.memo.update({len(m.memo): m.stack[-1]}),
    b"g": lambda m: m.push(m.memo[int(m.line())]),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
}


def _items(values: Any) -> list[Any]:
    if type(values) not in (list, tuple, set, frozenset):
        raise Malformed(f"a container is made from a {type(values).__name__}")
    return list(values)


def _mapping(*args: object) -> dict[Any, Any]:
    """dict and its subclasses: nothing, a mapping, or (key, value) pairs."""
    values = args[0] if args else {}
    return fill({}, list(values.items()) if type(values) is dict else [(key, value) for key, value in _items(values)])


def _bytes(values: Any = b"") -> bytes:
    if type(values) in (bytes, bytearray) or (type(values) is list and all(type(v) is int for v in values)):
        return bytes(values)
    raise Malformed(f"bytes are made from a {type(values).__name__}")  # bytes(10**12) would be a terabyte


def _complex(real: object, imag: object) -> Any:
    return complex(real, imag) if type(real) is float and type(imag) is float else NotImplemented


def _encode(text: object, encoding: object = "utf-8") -> Any:
    """_codecs.encode, by which protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        return NotImplemented
    return text.encode(encoding)


def _numpy_dtype(code: object, *_: object) -> Any:
    known = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
    return NumpyDtype(code) if type(code) is str and code in known else NotImplemented


def _numpy_scalar(dtype: object, raw: object = None) -> Any:
    """A NumPy scalar as the plain Python number of the same value."""
    if type(raw) is str:  # Python 2 bytes that happened to be UTF-8
        raw = raw.encode()
    if not isinstance(dtype, NumpyDtype) or type(raw) is not bytes:
        return NotImplemented
    order = dtype.order if dtype.order in "<>" else "<"
    values = np.frombuffer(raw, np.dtype(order + dtype.code))
    if values.size != 1:
        raise Malformed(f"a NumPy scalar of {values.size} values")
    return values[0].item()


def _reconstructor(cls: object, *_: object) -> Any:
    """copyreg._reconstructor: objects of protocols 0 and 1."""
    return Placeholder(cls.class_name, ()) if isinstance(cls, Placeholder) else NotImplemented


# Subclasses of dict that checkpoints carry their settings in: read as plain dicts.
_DICT_CLASSES = (
    "builtins.dict",
    "collections.Counter",
    "yacs.config.CfgNode",  # the official Swin and SimMIM checkpoints
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)

# Dotted name -> function called with the arguments; where it returns NotImplemented, a placeholder is made instead.
_BUILDERS: dict[str, Callable[..., Any]] = {
    **BUILDERS,
    **dict.fromkeys(_DICT_CLASSES, _mapping),
    "collections.OrderedDict": lambda *args: OrderedDict(_mapping(*args)),
    "collections.defaultdict": lambda *factory: {},
    "collections.deque": lambda values=(), *_: _items(values),
    "builtins.list": lambda values=(): _items(values),
    "builtins.set": lambda values=(): set(checked(_items(values))),
    "builtins.frozenset": lambda values=(): frozenset(checked(_items(values))),
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda values=b"": bytearray(_bytes(values)),
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _numpy_dtype,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
