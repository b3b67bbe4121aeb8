"""PyTorch and safetensors files read without torch.

Three kinds of files, told apart by their content: the zip archives of torch 1.6 and later, the streams of earlier
versions, and safetensors. Only tensors, containers and plain values are ever built (`pickle` says how), every
size and offset is checked against the file, and nothing is written.
"""

import hashlib
import json
import mmap
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from biomass_jax.convert.torch_file import formats as torch_formats
from biomass_jax.convert.torch_file.tensor import Inert, Malformed, MappedFile, Placeholder, TorchTensor
from biomass_jax.errors import TorchFileError, name_list
from biomass_jax.runtime.content import HEAD, what_is

__all__ = ["Placeholder", "TorchFile", "TorchFileError", "TorchTensor", "flatten", "read"]

MAX_DEPTH = 200
MAX_LEAVES = 1_000_000
MAX_JSON_BYTES = 16 << 20
MIN_BYTES = 10  # of an empty safetensors file; no format has a shorter one
MAX_NAME_CHARS = 256 << 20  # all dotted keys together
_EXPECTED = "expected a PyTorch file (.pt, .pth, .ckpt) or a .safetensors file"

# First bytes that only files of other model formats have -> what the file is and what to do.
_OTHER_MODELS = dict.fromkeys(
    (b"\x08\x07\x12\x07pytorch", b"\x08\x08\x12\x07pytorch"),
    "an ONNX file; export the PyTorch model's state_dict instead",
)

# What users give for a file: a file in a folder -> what the folder is and what to do.
_FOLDERS: tuple[tuple[str, str], ...] = (
    ("bundle.json", "is a bundle already; --to torch writes it as a PyTorch file"),
    ("best/bundle.json", "is the folder of a training run; its model is a bundle already, best/ in it"),
    (
        "data.pkl",
        "is a PyTorch file that was unpacked (browsers on macOS do that); pack it again: cd {path.parent} && "
        "zip -0 -r model.pt {path.name}",
    ),
    (
        ".metadata",
        "is a checkpoint of torch.distributed; make one file of it: python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt",
    ),
    ("zero_to_fp32.py", "is a checkpoint of DeepSpeed; its zero_to_fp32.py makes one file of it"),
    ("saved_model.pb", "is a model of TensorFlow, not of PyTorch"),
)
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# How the parts of a model that was saved in several files become one.
JOIN = (
    "make one file of them first: weights = {}, for each part weights.update(safetensors.torch.load_file(part)), or "
    "weights.update(torch.load(part)) for .bin, then torch.save(weights, 'model.pt')"
)


@dataclass(eq=False)
class TorchFile:
    """A file that was read.

    Attributes:
        format: 'zip', 'legacy' or 'safetensors'.
        root: what the file holds: dict, list, tuple, set and plain values, with `TorchTensor`s for the tensors and
            `Placeholder`s for what wasn't built.
        placeholders: dotted names of the classes and functions that were met and not built.
    """

    format: str
    root: Any
    placeholders: list[str]
    mapped: MappedFile = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole file, in hex; read when first asked for."""
        return hashlib.sha256(self.mapped.data).hexdigest()


def read(path: str | os.PathLike[str]) -> TorchFile:
    """Read a zip, legacy or safetensors file; the tensors' values are read when `TorchTensor.array` is called.

    Raises:
        TorchFileError: where the file is missing, truncated, damaged, hostile or something else; the message names the
            file, what was found and what was expected.
    """
    path = Path(path)
    mapped = _map(path)
    try:
        form, parse = _detect(mapped)
        root, placeholders = parse(mapped)
        placeholders += _check_tree(root)
    except TorchFileError:
        raise
    except Malformed as exc:
        raise TorchFileError(f"{path}: {exc}") from None
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        EOFError,
        struct.error,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as exc:
        raise TorchFileError(f"{path}: damaged or not a checkpoint ({type(exc).__name__}: {exc}); {_EXPECTED}") from exc
    for name, leaf in flatten(root).items():
        if isinstance(leaf, TorchTensor) and not leaf.name:
            leaf.name = name
    return TorchFile(form, root, list(dict.fromkeys(placeholders)), mapped)


def flatten(root: object) -> dict[str, Any]:
    """Every leaf of nested dicts, lists and tuples under its dotted key ('state_dict.encoder.norm.weight').

    Tensors, plain values, sets, placeholders and empty containers are leaves. Where two leaves would share a key, the
    later one gets '#2', '#3' and so on.
    """
    leaves: dict[str, Any] = {}
    repeats: dict[str, int] = {}
    pending: list[tuple[str, Any]] = [("", root)]
    while pending:
        name, node = pending.pop()
        children = list(_children(node))
        if children:
            pending.extend((f"{name}.{key}" if name else key, child) for key, child in reversed(children))
            continue
        unique = name
        while unique in leaves:
            repeats[name] = repeats.get(name, 1) + 1
            unique = f"{name}#{repeats[name]}"
        leaves[unique] = node
    return leaves


def _children(node: object) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield (key if isinstance(key, str) else repr(key)[:80]), value
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield str(index), value


def _check_tree(root: object) -> list[str]:
    """Refuse trees that a recursive reader couldn't walk: cyclic, too deep, or huge by sharing one part many times.

    Returns:
        Names of leaves that are no plain values: mentions of classes, bare storages.
    """
    measured: dict[int, tuple[int, int, int]] = {}  # node -> height, leaves, characters of the leaves' keys
    being_walked: set[int] = set()
    other: dict[str, None] = {}
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        node, walked = pending.pop()
        if id(node) in measured:
            continue
        children = list(_children(node))
        if not children:
            if isinstance(node, Inert) and not isinstance(node, TorchTensor):
                other[node.class_name] = None
            measured[id(node)] = (0, 1, 0)
        elif not walked:
            if id(node) in being_walked:
                raise Malformed("a container holds itself")
            being_walked.add(id(node))
            pending.append((node, True))
            pending.extend((child, False) for _, child in children)
        else:
            parts = [(*measured[id(child)], len(key) + 1) for key, child in children]
            height = 1 + max(part[0] for part in parts)
            leaves = sum(part[1] for part in parts)
            chars = sum(part[2] + part[1] * part[3] for part in parts)
            if height > MAX_DEPTH or leaves > MAX_LEAVES or chars > MAX_NAME_CHARS:
                raise Malformed(f"nested {height} deep with {leaves} values: more than a checkpoint ever has")
            measured[id(node)] = (height, leaves, chars)
    return list(other)


def _map(path: Path) -> MappedFile:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise TorchFileError(f"{path}: {_folder(path)}")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe could wait for ever
            raise TorchFileError(f"{path}: is no regular file; {_EXPECTED}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise TorchFileError(f"{path}: is empty (0 bytes), the download or copy failed; {_EXPECTED}")
            return MappedFile(path, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), size)
    except FileNotFoundError:
        raise TorchFileError(f"{path}: no such file; {_EXPECTED}") from None
    except OSError as exc:
        raise TorchFileError(f"{path}: can't be read ({exc.strerror or exc})") from exc


def _detect(mapped: MappedFile) -> tuple[str, torch_formats.Parser]:
    """Format by the file's first bytes, never by its name."""
    head = mapped.data[:512]
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip", torch_formats.read_zip
    if torch_formats.looks_legacy(head):
        return "legacy", torch_formats.read_legacy
    if torch_formats.looks_safetensors(head):
        return "safetensors", torch_formats.read_safetensors
    if (index := _index(mapped.data[:MAX_JSON_BYTES])) is not None:
        raise Malformed(f"is {index}; {_EXPECTED}")
    if head[257:262] == b"ustar":
        raise Malformed(f"is a tar archive (torch before 0.1.10 wrote such); unpack or re-save it; {_EXPECTED}")
    if head[:1] == b"\x80":
        raise Malformed(
            "is a plain pickle without torch's magic number; open it with pickle.load where it was made and save the "
            f"state_dict with torch.save; {_EXPECTED}"
        )
    if meaning := _OTHER_MODELS.get(head[:11]) or what_is(mapped.data[:HEAD]):
        raise Malformed(f"is {meaning}; {_EXPECTED}")
    if not head.strip(b"\0"):
        raise Malformed(f"begins with zeros: the download or copy was cut short; fetch it again; {_EXPECTED}")
    if head.isascii() and head[:40].decode().isprintable():
        line = head.decode().splitlines()[0][:80]
        raise Malformed(f"is text ({line!r}), as a failed download leaves, no known checkpoint format; {_EXPECTED}")
    if mapped.size < MIN_BYTES:
        raise Malformed(f"has {mapped.size} bytes: truncated, fetch it again; {_EXPECTED}")
    raise Malformed(f"begins with {head[:16]!r}, which is no known checkpoint format; {_EXPECTED}")


def _index(text: bytes) -> str | None:
    """What a JSON file is that lists the parts of a model; None for any other file."""
    try:
        tree = json.loads(text) if text.lstrip()[:1] == b"{" else None
    except ValueError:
        return None
    if not isinstance(tree, dict) or not isinstance(tree.get("weight_map"), dict):
        return None
    parts = name_list(sorted({str(part) for part in tree["weight_map"].values()}))
    return f"the index of a model in several files ({parts}), not the weights; {JOIN}"


def _folder(path: Path) -> str:
    """What a folder is that was given for a file, and what to give instead."""
    for root in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        for name, meaning in _FOLDERS:
            if (root / name).is_file() and (root == path or name == "data.pkl"):
                return meaning.format(path=root)
    files = sorted(child.name for child in path.iterdir() if child.suffix in _SUFFIXES)
    return f"is a folder; give a file in it ({name_list(files)}); {_EXPECTED}"
