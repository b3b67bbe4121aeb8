"""Builders of the plain values that PyTorch files hold beside tensors.

Each takes what the file gives the class or function of its name, and returns a plain Python value, or NotImplemented
where a placeholder should stand instead.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from biomass_jax.convert.torch_file.values import Malformed, NumpyDtype, Placeholder, checked, fill


def _items(values: Any) -> list[Any]:
    if type(values) not in (list, tuple, set, frozenset):
        raise Malformed(f"a container is made from a {type(values).__name__}")
    return list(values)


def _set(values: Any = ()) -> set[Any]:
    return set(checked(_items(values)))


def _frozenset(values: Any = ()) -> frozenset[Any]:
    return frozenset(_set(values))


def _mapping(*args: Any) -> dict[Any, Any]:
    """dict and its subclasses: nothing, a mapping, or (key, value) pairs."""
    values = args[0] if args else {}
    return fill({}, list(values.items()) if type(values) is dict else [(key, value) for key, value in _items(values)])


def _bytes(values: Any = b"") -> bytes:
    if type(values) in (bytes, bytearray):
        return bytes(values)
    if type(values) is list and all(type(v) is int for v in values):
        return bytes(values)
    raise Malformed(f"bytes are made from a {type(values).__name__}")  # bytes(10**12) would be a terabyte


def _complex(real: Any, imag: Any) -> Any:
    return complex(real, imag) if type(real) is float and type(imag) is float else NotImplemented


def _encode(text: Any, encoding: Any = "utf-8") -> Any:
    """_codecs.encode, by which protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        return NotImplemented
    return text.encode(encoding)


def _numpy_dtype(code: Any, *_: Any) -> Any:
    known = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
    return NumpyDtype(code) if type(code) is str and code in known else NotImplemented


def _numpy_scalar(dtype: Any, raw: Any = None) -> Any:
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


def _reconstructor(cls: Any, *_: Any) -> Any:
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

BUILDERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_DICT_CLASSES, _mapping),
    "collections.OrderedDict": lambda *args: OrderedDict(_mapping(*args)),
    "collections.defaultdict": lambda *factory: {},
    "collections.deque": lambda values=(), *_: _items(values),
    "builtins.list": lambda values=(): _items(values),
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda values=b"": bytearray(_bytes(values)),
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _numpy_dtype,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
