"""The three file formats of `torch_file`: zip archives, legacy streams and safetensors."""

import json
import math
import struct
import zipfile
from collections.abc import Callable
from typing import Any, cast

from biomass_jax.convert.torch_file import pickle as torch_pickle
from biomass_jax.convert.torch_file.tensor import (
    MAX_DIMENSIONS,
    FileRecord,
    Malformed,
    MappedFile,
    Storage,
    StorageType,
    contiguous_strides,
    item_size,
    make_tensor,
)
from biomass_jax.errors import name_list

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_HEADER_BYTES = 64 << 20
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


# What a format's reader gives: the root object, and the names of what was not built.
Parsed = tuple[Any, list[str]]
Parser = Callable[[MappedFile], Parsed]


def _no_persistent(saved: object) -> Any:
    raise Malformed("a storage is named where none may be")


# ---- zip archives (torch 1.6 and later)


def read_zip(file: MappedFile) -> Parsed:
    """ARCHIVE/data.pkl names the storages ARCHIVE/data/KEY; ARCHIVE/byteorder says how their bytes lie.

    Layout: torch/serialization.py `_save` and caffe2/serialize/inline_container.cc.
    """
    records = _records(file)
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise Malformed(f"is a zip archive without data.pkl (it holds {name_list(records)}): not written by torch.save")
    if len(pickles) > 1:
        raise Malformed(f"holds {len(pickles)} pickles ({name_list(pickles)}); one is expected")
    prefix = pickles[0].removesuffix("data.pkl")
    swapped = _is_swapped(records.get(f"{prefix}byteorder"))

    def persistent(saved: object) -> Storage:
        kind, key, count = _storage_id(saved, 5)
        nbytes = count * item_size(kind.dtype)
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            if count:
                raise Malformed(f"storage {prefix}data/{key} is missing from the archive")
            record = FileRecord(file, f"{prefix}data/{key}")
        if nbytes > record.nbytes:
            raise Malformed(f"storage {record.name} should have {nbytes} bytes, its record has {record.nbytes}")
        record.swapped = swapped
        return Storage(record, kind.dtype, count)

    record = records[pickles[0]]
    if record.nbytes > torch_pickle.MAX_PICKLE_BYTES:
        raise Malformed(f"{record.name} has {record.nbytes} bytes; at most {torch_pickle.MAX_PICKLE_BYTES} are read")
    data = bytes(record.bytes(0, record.nbytes))
    loaded = torch_pickle.load(data, 0, len(data), persistent)
    return loaded.value, loaded.placeholders


def _is_swapped(record: FileRecord | None) -> bool:
    """Whether the storages' bytes must be swapped; torch before 2.1 didn't say, and little-endian machines wrote."""
    order = b"little" if record is None else bytes(record.bytes(0, min(record.nbytes, 16)))
    if order not in (b"little", b"big"):
        raise Malformed(f"its byteorder record says {order!r}; expected little or big")
    return order == b"big"


def _entries(file: MappedFile) -> tuple[list[zipfile.ZipInfo], int]:
    """The archive's directory, and where it begins."""
    try:
        with zipfile.ZipFile(cast(Any, file.data)) as archive:  # the map reads like a file; zipfile leaves it open
            return archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError, EOFError) as exc:
        raise Malformed(
            f"begins as a zip archive but can't be read as one ({exc}): truncated or damaged; fetch it again "
            f"(this one has {file.size} bytes)"
        ) from exc


def _other_archive(names: list[str], path: str) -> str | None:
    """What an archive with entries of these names is, where it isn't torch.save's; None where it may be."""
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return (
            "a TorchScript archive; take the weights out of it where torch is installed: "
            f"torch.save(torch.jit.load({path!r}, map_location='cpu').state_dict(), 'weights.pt')"
        )
    if {"archive_format", "archive_version"} & inside:
        return (
            "an archive of torch.export; take the weights out of it where torch is installed: "
            f"torch.save(torch.export.load({path!r}).state_dict, 'weights.pt')"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz); save them with torch.save as {key: torch.from_numpy(array)}"
    packed = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors"))]
    if packed and "data.pkl" not in inside:
        return f"a zip archive with {name_list(packed)} in it; unpack it first and give that file"
    return None


def _records(file: MappedFile) -> dict[str, FileRecord]:
    """The archive's entries: stored, unencrypted, inside the file, apart from each other, each name once."""
    entries, directory = _entries(file)
    # Asked first: of some of these, entries are compressed.
    if (other := _other_archive([entry.filename for entry in entries], str(file.path))) is not None:
        raise Malformed(f"is {other}")
    records: dict[str, FileRecord] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.filename
        if name in records:
            raise Malformed(f"archive entry {name} appears twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Malformed(f"archive entry {name} is compressed; torch stores entries as they are: save it again")
        if entry.flag_bits & 1:
            raise Malformed(f"archive entry {name} is encrypted")
        start = _data_start(file, entry, directory)
        if entry.header_offset < end:
            raise Malformed(f"archive entry {name} overlaps the one before it")
        end = start + entry.file_size
        if end > directory:
            raise Malformed(f"archive entry {name} ({entry.file_size} bytes at {start}) reaches beyond the data")
        # 0: written with torch.serialization.set_crc32_options(False), which leaves the field empty
        records[name] = FileRecord(file, name, start, entry.file_size, crc=entry.CRC or None)
    return records


def _data_start(file: MappedFile, entry: zipfile.ZipInfo, directory: int) -> int:
    """Where an entry's bytes begin, by its local header."""
    offset = entry.header_offset
    if not 0 <= offset <= directory - 30:
        raise Malformed(f"archive entry {entry.filename} begins at {offset}, outside the data")
    header = struct.unpack("<4s5H3L2H", file.data[offset : offset + 30])
    if header[0] != b"PK\x03\x04":
        raise Malformed(f"archive entry {entry.filename} has no header at {offset}")
    return offset + 30 + header[9] + header[10]


def _storage_id(saved: object, length: int) -> tuple[StorageType, str, int]:
    """Check ('storage', type, key, location, count, ...); returns type, key and count."""
    if type(saved) is not tuple or len(saved) != length or saved[0] != "storage":
        raise Malformed("a persistent id isn't the ('storage', type, key, location, count) that torch writes")
    _, kind, key, _, count = saved[:5]
    if not isinstance(kind, StorageType):
        raise Malformed(f"a storage's type is {getattr(kind, 'class_name', type(kind).__name__)}: unknown")
    if type(key) is int:  # very early files
        key = str(key)
    if type(key) is not str or type(count) is not int or not 0 <= count < 1 << 60:
        raise Malformed("a storage's key isn't a string, or its element count isn't a count")
    return kind, key, count


# ---- legacy streams (before torch 1.6)


def looks_legacy(head: bytes) -> bool:
    """Whether the stream begins with a pickle of torch's magic number."""
    try:
        return bool(torch_pickle.load(head, 0, len(head), _no_persistent).value == LEGACY_MAGIC)
    except Malformed:
        return False


def read_legacy(file: MappedFile) -> Parsed:
    """Five pickles (magic, protocol, system, object, storage keys), then each storage: its 8-byte count, its elements.

    Elements lie little-endian whatever machine wrote them. Layout: torch/serialization.py `_legacy_load`.
    """
    roots: dict[str, Storage] = {}

    def persistent(saved: Any) -> Any:
        if type(saved) is tuple and len(saved) == 4 and saved[0] == "module":
            return saved[1]  # a class with its source text; the text isn't looked at
        has_view = type(saved) is tuple and len(saved) == 6  # the sixth entry came with 0.2 or so; None since 0.4
        kind, key, count = _storage_id(saved, 6 if has_view else 5)
        nbytes = count * item_size(kind.dtype)
        if nbytes > file.size:
            raise Malformed(f"storage {key} should have {nbytes} bytes, the whole file has {file.size}: truncated?")
        root = roots.setdefault(key, Storage(FileRecord(file, f"storage {key}", nbytes=nbytes), kind.dtype, count))
        if root.nbytes != nbytes:
            raise Malformed(f"storage {key} is given {root.nbytes} bytes in one place and {nbytes} in another")
        return _storage_view(root, kind, count, saved[5] if has_view else None)

    position = 0
    for what, expected in (("magic number", LEGACY_MAGIC), ("protocol version", LEGACY_PROTOCOL)):
        loaded = torch_pickle.load(file.data, position, file.size, _no_persistent)
        position = loaded.end
        if loaded.value != expected:
            found = loaded.value if type(loaded.value) is int else f"a {type(loaded.value).__name__}"
            raise Malformed(f"its {what} is {found}, expected {expected}")
    # the sizes of C types of the writing machine aren't looked at
    position = torch_pickle.load(file.data, position, file.size, _no_persistent).end
    loaded = torch_pickle.load(file.data, position, file.size, persistent)
    keys = torch_pickle.load(file.data, loaded.end, file.size, _no_persistent)
    _place_storages(file, keys.value, keys.end, roots)
    return loaded.value, loaded.placeholders


def _storage_view(root: Storage, kind: StorageType, count: int, view: object) -> Storage:
    """The storage itself, or its part by an older file's (key, offset, count)."""
    if view is None:
        return Storage(root.record, kind.dtype, count)
    if type(view) is not tuple or len(view) != 3 or any(type(n) is not int or n < 0 for n in view[1:]):
        raise Malformed("a storage's view isn't (key, offset, count)")
    _, offset, length = view
    if offset + length > count:
        raise Malformed(f"a view of {length} elements at {offset} reaches beyond its storage of {count}")
    return Storage(root.record, kind.dtype, length, start=offset * item_size(kind.dtype))


def _place_storages(file: MappedFile, keys: object, position: int, roots: dict[str, Storage]) -> None:
    """Find each storage's bytes in the stream, in the order of the keys."""
    if type(keys) is not list or {type(key) for key in keys} - {str, int}:
        raise Malformed("its list of storage keys is no list of strings")
    names = [str(key) for key in keys]
    if sorted(names) != sorted(roots):
        raise Malformed(f"lists {len(names)} storages behind the pickle, its tensors use {len(roots)} (or others)")
    for name in names:
        root = roots[name]
        field_end = position + 8
        if field_end > file.size:
            raise Malformed(f"ends before storage {name}: truncated, fetch the file again")
        (count,) = struct.unpack("<q", file.data[position:field_end])
        if count != root.count:
            raise Malformed(f"storage {name} has {count} elements in the stream, {root.count} by its tensors")
        if field_end + root.nbytes > file.size:
            raise Malformed(
                f"ends inside storage {name}: {root.nbytes} bytes expected at {field_end}, the file has {file.size}: "
                "truncated, fetch it again"
            )
        root.record.offset = field_end
        position = field_end + root.nbytes
    if position != file.size:
        raise Malformed(f"has {file.size - position} bytes behind its last storage; expected none")


# ---- safetensors


def looks_safetensors(head: bytes) -> bool:
    """Whether an 8-byte length is followed by a JSON object; `read_safetensors` refuses a length out of range."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 40


def read_safetensors(file: MappedFile) -> Parsed:
    """8-byte header length, JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps.

    Layout: the safetensors README, section Format.
    """
    (length,) = struct.unpack("<Q", file.data[:8])
    if length > MAX_HEADER_BYTES:
        raise Malformed(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    base = 8 + length
    if base > file.size:
        raise Malformed(
            f"its header claims {length} bytes, the file has {file.size - 8} behind the length: truncated, fetch it "
            "again"
        )
    header = json.loads(file.data[8:base].decode("utf-8"), object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise Malformed("its __metadata__ isn't a map of strings")
    root: dict[str, Any] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, (start, stop) = _entry(name, entry)
        if stop > file.size - base:
            raise Malformed(
                f"tensor {name!r:.200} ends at {stop}, the data has {file.size - base} bytes: truncated, fetch the "
                "file again"
            )
        spans.append((start, stop, name))
        record = FileRecord(file, repr(name)[:200], base + start, stop - start)
        size = item_size(dtype)
        storage = Storage(record, dtype, (stop - start) // size)
        root[name] = make_tensor(storage, 0, shape, contiguous_strides(shape))
        if math.prod(shape) * size != stop - start:
            raise Malformed(f"tensor {name!r:.200} of shape {shape} and {dtype} is given {stop - start} bytes")
    _check_spans(spans, file.size - base)
    return root, []


def _check_spans(spans: list[tuple[int, int, str]], size: int) -> None:
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            kind = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise Malformed(f"tensor {name!r:.200} at {start} {kind} ({position} expected)")
        position = stop
    if position != size:
        raise Malformed(f"has {size} bytes of data, its header describes {position}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("its header names a tensor or a field twice")
    return found


def _entry(name: str, entry: object) -> tuple[str, list[int], list[int]]:
    """dtype, shape and byte range of a header entry, checked for type and sign."""
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"tensor {name!r:.200} isn't described by dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _SAFETENSORS_DTYPES:
        raise Malformed(f"tensor {name!r:.200} has dtype {dtype!r:.40}; known: {', '.join(_SAFETENSORS_DTYPES)}")
    for numbers in (shape, span):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise Malformed(f"tensor {name!r:.200} has a shape or data_offsets that aren't lists of counts")
    if len(shape) > MAX_DIMENSIONS:  # the product of millions of sizes would take for ever
        raise Malformed(f"tensor {name!r:.200} has {len(shape)} sizes; at most {MAX_DIMENSIONS} are read")
    if len(span) != 2 or span[0] > span[1]:
        raise Malformed(f"tensor {name!r:.200} has data_offsets {span!r:.80}; expected [start, stop]")
    return _SAFETENSORS_DTYPES[dtype], shape, span
