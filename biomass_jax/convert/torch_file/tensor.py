"""What a file's objects become: tensors that view storages in the mapped file, and inert stand-ins for the rest."""

import math
import mmap
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from biomass_jax.errors import TorchFileError

MAX_DIMENSIONS = 64  # NumPy's limit
EXPANSION_BYTES = 256 << 20  # a stride of 0 makes huge tensors of nothing; more than this and than the file is refused
_INT64_MAX = (1 << 63) - 1

_PLAIN_DTYPES = (
    *("float64", "float32", "float16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128"),
)
_EXTRA_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _PLAIN_DTYPES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTRA_DTYPES},
}
# dtypes that are known by size but have no NumPy counterpart: listed by --inspect, refused by .array()
OTHER_SIZES = {"complex32": 4, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}


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


def item_size(dtype: str) -> int:
    """Bytes of one element; 1 for an untyped storage."""
    return NUMPY_DTYPES[dtype].itemsize if dtype in NUMPY_DTYPES else OTHER_SIZES.get(dtype, 1)


@dataclass(eq=False)
class MappedFile:
    """A file mapped for reading. Arrays that view it keep the map alive; the file must not be cut short meanwhile."""

    path: Path
    data: mmap.mmap
    size: int


@dataclass(eq=False)
class FileRecord:
    """A run of bytes of the file that holds one root storage.

    Attributes:
        crc: CRC-32 of the bytes, None where the file gives none.
        swapped: whether the bytes are in the order this machine doesn't use.
    """

    file: MappedFile
    name: str
    offset: int = 0
    nbytes: int = 0
    crc: int | None = None
    swapped: bool = False

    def bytes(self, start: int, count: int) -> np.ndarray:
        """`count` bytes from `start` as a read-only view (uint8) of the map; checks the CRC on first use."""
        if self.crc is not None:
            found = zlib.crc32(memoryview(self.file.data)[self.offset : self.offset + self.nbytes])
            if found != self.crc:
                raise TorchFileError(
                    f"{self.file.path}: record {self.name} is damaged: its CRC-32 is {found:#010x}, the file says "
                    f"{self.crc:#010x}; fetch the file again"
                )
            self.crc = None
        return np.frombuffer(self.file.data, np.uint8, count, self.offset + start)


@dataclass(eq=False, frozen=True)
class StorageType(Inert):
    """A storage class of torch by name: 'torch.FloatStorage' holds float32."""

    class_name: str
    dtype: str


@dataclass(eq=False)
class Storage(Inert):
    """`count` elements of `dtype` that begin at byte `start` of a record."""

    record: FileRecord
    dtype: str
    count: int
    start: int = 0
    class_name = "torch storage"

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.count * item_size(self.dtype)


@dataclass(eq=False)
class TorchTensor(Inert):
    """A tensor of the file, not yet read.

    Attributes:
        storage: what it views.
        dtype: torch's name without the prefix, such as 'float32' or 'bfloat16'.
        shape: sizes.
        strides: in elements.
        offset: first element in the storage.
        conj, neg: torch's lazy conjugation and negation, applied by `array`.
        name: dotted key of its first place in the file.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    conj: bool = False
    neg: bool = False
    name: str = ""

    def __repr__(self) -> str:
        return f"TorchTensor({self.name!r}, {self.dtype}, {list(self.shape)})"

    def array(self) -> np.ndarray:
        """The values, `shape` and `dtype` as here; read-only.

        A view of the mapped file where the bytes are aligned and in this machine's order (it stays valid after the
        TorchFile is gone), a copy of this tensor's span of the storage otherwise.

        Raises:
            TorchFileError: for a dtype that NumPy can't hold, or bytes that fail the file's own checksum.
        """
        record = self.storage.record
        dtype = NUMPY_DTYPES.get(self.dtype)
        if dtype is None:
            raise TorchFileError(
                f"{record.file.path}: tensor {self.name!r} has dtype {self.dtype}, which can't be read as an array; "
                f"expected one of {', '.join(NUMPY_DTYPES)}"
            )
        if 0 in self.shape:
            values = np.empty(self.shape, dtype)
        else:
            size = dtype.itemsize
            span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
            raw = record.bytes(self.storage.start + self.offset * size, span * size)
            raw = _native(raw, dtype, swapped=record.swapped)
            # sizes of 1 may carry any stride: they never step
            strides = [s * size if n > 1 else size for n, s in zip(self.shape, self.strides, strict=True)]
            values = np.ndarray(self.shape, dtype, buffer=raw, strides=strides)
            if self.dtype == "bool":
                values = np.asarray(
                    values.view(np.uint8) != 0
                )  # a byte that is neither 0 nor 1 would be neither False nor True
        if self.conj:
            values = np.asarray(np.conjugate(values))
        if self.neg:
            values = np.asarray(np.negative(values))
        values.flags.writeable = False
        return values


def _native(raw: np.ndarray, dtype: np.dtype[Any], *, swapped: bool) -> np.ndarray:
    """Bytes in this machine's order at an aligned address; the same view where they are that already."""
    part = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    if swapped and part > 1:
        return raw.copy().view(f"u{part}").byteswap().view(np.uint8)
    return raw.copy() if raw.ctypes.data % dtype.alignment else raw


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Strides in elements where the last axis varies fastest; sizes of 0 count as 1, as in torch."""
    lengths = [1]
    for size in reversed(shape):
        lengths.append(lengths[-1] * max(size, 1))
    return lengths[-2::-1]


def make_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None, metadata: Any = None
) -> TorchTensor:
    """A tensor on a storage, its geometry checked against the storage's size.

    Raises:
        Malformed: where it reaches outside the storage, or a number isn't a non-negative integer.
    """
    if not isinstance(storage, Storage):
        raise Malformed(f"a tensor is built on a {type(storage).__name__} instead of a storage")
    dtype = dtype or storage.dtype
    sizes = tuple(shape) if type(shape) in (tuple, list) else (shape,)
    steps = tuple(strides) if type(strides) in (tuple, list) else (strides,)
    if len(sizes) != len(steps) or len(sizes) > MAX_DIMENSIONS:
        raise Malformed(f"a tensor has {len(sizes)} sizes and {len(steps)} strides (at most {MAX_DIMENSIONS})")
    for number in (*sizes, *steps, offset):
        if type(number) is not int or not 0 <= number <= _INT64_MAX:
            raise Malformed("a tensor's sizes, strides and offset aren't all non-negative 64-bit integers")
    size = item_size(dtype)
    if size * math.prod(n for n in sizes if n) > _INT64_MAX:
        raise Malformed(f"a tensor of shape {list(sizes)} is larger than any memory")
    tensor = TorchTensor(storage, dtype, sizes, steps, offset)
    if isinstance(metadata, dict):
        tensor.conj, tensor.neg = metadata.get("conj") is True, metadata.get("neg") is True
    available = storage.nbytes // size
    end = offset if 0 in sizes else offset + 1 + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if end > available:
        raise Malformed(
            f"a {dtype} tensor of shape {list(sizes)}, strides {list(steps)} and offset {offset} needs {end} elements, "
            f"its storage has {available}"
        )
    if size * math.prod(sizes) > max(EXPANSION_BYTES, storage.record.file.size):
        raise Malformed(f"a tensor of shape {list(sizes)} repeats its few stored values to more than the file's size")
    return tensor


def _rebuild_tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    grad: object = None,
    hooks: object = None,
    metadata: object = None,
) -> Any:
    return make_tensor(storage, offset, shape, strides, metadata=metadata)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> Any:
    if type(dtype) is not str or not dtype.startswith("torch."):
        return NotImplemented  # a dtype newer than this reader
    return make_tensor(storage, offset, shape, strides, dtype.removeprefix("torch."), metadata)


def _same_tensor(data: object, *_: object) -> Any:
    """A Parameter, or a tensor moved to a device: the tensor itself."""
    return data if isinstance(data, TorchTensor) else NotImplemented


def _rebuild_from_type(function: object, cls: object, args: object, state: object = None) -> Any:
    """A tensor with Python attributes, or of a subclass: the plain tensor where a builder of ours makes it."""
    builder = BUILDERS.get(getattr(function, "class_name", ""))
    if builder is None or type(args) is not tuple or builder is _rebuild_from_type:
        return NotImplemented
    return builder(*args)


def _size(values: Any = ()) -> Any:
    return tuple(values) if type(values) in (list, tuple) else NotImplemented


def _device(kind: object, index: object = None) -> Any:
    if type(kind) is not str or type(index) not in (int, type(None)):
        return NotImplemented
    return kind if index is None else f"{kind}:{index}"


BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda storage, offset, shape, strides: make_tensor(
        storage, offset, shape, strides
    ),
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _same_tensor,
    "torch._utils._rebuild_parameter_with_state": _same_tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same_tensor,
    "torch.nn.parameter.Parameter": _same_tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": lambda *args: NotImplemented,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": lambda name: name if type(name) is str else NotImplemented,
}

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
CONSTANTS: dict[str, Any] = {
    **{f"torch.{name}": f"torch.{name}" for name in (*NUMPY_DTYPES, *OTHER_SIZES)},
    **{f"torch{gpu}.{name}": StorageType(f"torch.{name}", dtype)
       for name, dtype in STORAGES.items() for gpu in ("", ".cuda")},
    **{f"torch.storage.{name}": StorageType(f"torch.storage.{name}", "uint8")
       for name in ("UntypedStorage", "_UntypedStorage")},
}  # fmt: skip
