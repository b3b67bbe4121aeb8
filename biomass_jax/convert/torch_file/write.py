"""Files that torch.load reads, written without torch."""

import io
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np

from biomass_jax.convert.torch_file.tensor import NUMPY_DTYPES, STORAGES, contiguous_strides
from biomass_jax.runtime.files import replacing

ALIGNMENT = 64  # of each storage in the file, as torch writes them, so that it can be mapped
_STORAGE_NAMES = {
    dtype: name for name, dtype in STORAGES.items() if dtype in NUMPY_DTYPES and not dtype.startswith("complex")
}


def write(path: str | PathLike[str], root: object) -> None:
    """Write `root` as a zip file that `torch.load(path, weights_only=True)` accepts.

    Dicts and OrderedDicts keep their class and order; an array that appears twice becomes one storage shared by two
    tensors. The same root always gives the same bytes. The file is written beside its place and renamed.

    Args:
        path: file to make or replace.
        root: nested dict, OrderedDict, list, tuple, None, bool, int, float, str, and NumPy arrays of float64/32/16,
            bfloat16, int64/32/16/8, uint8 or bool. Dict keys are str, int, float, bool or None.

    Raises:
        TypeError: for a value or dtype that can't be written; names its place in `root`. Nothing is written then.
        ValueError: for a container that holds itself, or an integer too large.
    """
    pickler = _Pickler()
    pickle = pickler.dump(root)
    with replacing(path) as partial, partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "archive/data.pkl", pickle)
        _add(archive, file, "archive/byteorder", sys.byteorder.encode())
        for key, array in enumerate(pickler.storages):
            native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            _add(archive, file, f"archive/data/{key}", native.reshape(-1).view(np.uint8).data)
        _add(archive, file, "archive/version", b"3\n")


def _add(archive: zipfile.ZipFile, file: io.BufferedWriter, name: str, data: Any) -> None:
    """Add an uncompressed entry whose bytes begin at a multiple of ALIGNMENT."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 0  # the same bytes on every system
    entry.file_size = len(data)
    # zipfile puts a 20-byte ZIP64 field into the header of an entry that may pass 2 GiB
    zip64 = 20 if entry.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0
    used = file.tell() + 30 + len(name) + zip64 + 4
    padding = -used % ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)  # the field torch pads with
    with archive.open(entry, "w") as target:
        target.write(data)


class _Pickler:
    """Protocol 2 with the opcodes that torch's weights-only unpickler knows."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.memo: dict[str, int] = {}
        self.storages: list[np.ndarray] = []
        self.keys: dict[int, int] = {}  # id of an array -> its storage; `storages` keeps the arrays alive
        self.open: set[int] = set()

    def dump(self, root: object) -> bytes:
        self.out.write(b"\x80\x02")
        self.emit(root, "root")
        self.out.write(b".")
        return self.out.getvalue()

    def emit(self, value: object, place: str) -> None:
        """Write one value's opcodes."""
        if value is None or isinstance(value, bool):
            self.out.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int) and not isinstance(value, np.generic):
            self.integer(int(value), place)
        elif isinstance(value, float) and not isinstance(value, np.generic):
            self.out.write(b"G" + struct.pack(">d", value))
        elif isinstance(value, str) and not isinstance(value, np.generic):
            self.text(value)
        elif isinstance(value, np.ndarray):
            self.tensor(value, place)
        elif isinstance(value, dict | list | tuple):
            if id(value) in self.open:
                raise ValueError(f"{place}: this container holds itself")
            self.open.add(id(value))
            self.container(value, place)
            self.open.remove(id(value))
        else:
            raise TypeError(
                f"{place}: a {type(value).__module__}.{type(value).__qualname__} can't be written; expected dict, "
                "list, tuple, None, bool, int, float, str or a NumPy array"
            )

    def container(self, value: Any, place: str) -> None:
        if type(value) in (dict, OrderedDict):
            if type(value) is OrderedDict:
                self.name("collections OrderedDict")
            self.out.write(b"}(" if type(value) is dict else b")R(")
            for key, item in value.items():
                if not isinstance(key, str | int | float | None):
                    raise TypeError(
                        f"{place}: key {key!r} is a {type(key).__name__}; expected str, int, float, bool or None"
                    )
                self.emit(key, place)
                self.emit(item, f"{place}[{key!r}]")
            self.out.write(b"u")
        elif type(value) in (list, tuple):
            self.out.write(b"](" if type(value) is list else b"(")
            for index, item in enumerate(value):
                self.emit(item, f"{place}[{index}]")
            self.out.write(b"e" if type(value) is list else b"t")
        else:
            raise TypeError(f"{place}: a {type(value).__name__}; make it a plain dict, list or tuple first")

    def integer(self, value: int, place: str) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out.write(b"J" + struct.pack("<i", value))
            return
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(raw) > 255:
            raise ValueError(f"{place}: an integer of {len(raw)} bytes; at most 255 can be written")
        self.out.write(b"\x8a" + bytes([len(raw)]) + raw)

    def text(self, value: str) -> None:
        raw = value.encode("utf-8", "surrogatepass")
        self.once(f"str {value}", lambda: b"X" + struct.pack("<I", len(raw)) + raw)

    def name(self, name: str) -> None:
        """A class or function of torch, 'module name'."""
        self.once(f"name {name}", lambda: b"c" + name.replace(" ", "\n").encode() + b"\n")

    def once(self, key: str, opcodes: Callable[[], bytes]) -> None:
        """Write the opcodes the first time and keep the result in the unpickler's memo; recall it afterwards."""
        slot = self.memo.get(key)
        if slot is None:
            self.memo[key] = slot = len(self.memo)
            self.out.write(opcodes())
            self.out.write(b"q" + bytes([slot]) if slot < 256 else b"r" + struct.pack("<I", slot))
        else:
            self.out.write(b"h" + bytes([slot]) if slot < 256 else b"j" + struct.pack("<I", slot))

    def tensor(self, array: np.ndarray, place: str) -> None:
        """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
        storage = _STORAGE_NAMES.get(array.dtype.name)
        if storage is None:
            raise TypeError(
                f"{place}: an array of {array.dtype} can't be written; expected {', '.join(_STORAGE_NAMES)}"
            )
        key = self.keys.setdefault(id(array), len(self.storages))
        if key == len(self.storages):
            self.storages.append(array)
        self.name("torch._utils _rebuild_tensor_v2")
        self.out.write(b"((")
        self.text("storage")
        self.name(f"torch {storage}")
        self.text(str(key))
        self.text("cpu")
        self.integer(array.size, place)
        self.out.write(b"tQ")
        self.integer(0, place)
        for numbers in (array.shape, contiguous_strides(array.shape)):
            self.out.write(b"(")
            for number in numbers:
                self.integer(number, place)
            self.out.write(b"t")
        self.out.write(b"\x89")
        self.name("collections OrderedDict")
        self.out.write(b")RtR")
