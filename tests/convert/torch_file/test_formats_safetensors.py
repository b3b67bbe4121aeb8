"""Every claim of a safetensors header is checked against the file (values: test_torch_file.py)."""

import json
import struct
from pathlib import Path

import pytest

from biomass_jax.convert.torch_file import read
from biomass_jax.errors import TorchFileError


def safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), span: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(3), "ends at 4, the data has 3 bytes: truncated, fetch the file again"),
        ({"a": entry()}, bytes(8), "has 8 bytes of data, its header describes 4"),
        ({"a": entry(), "b": entry(span=(2, 6))}, bytes(6), "overlaps"),
        ({"a": entry(), "b": entry(span=(5, 9))}, bytes(9), "leaves a gap"),
        ({"a": entry(shape=(2,))}, bytes(4), "needs 2 elements"),
        ({"a": entry(shape=(1, 1), span=(0, 8))}, bytes(8), "is given 8 bytes"),
        ({"a": entry(shape=(-1,))}, bytes(4), "lists of counts"),
        ({"a": entry(shape=(True,))}, bytes(4), "lists of counts"),
        ({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(4), "larger than any memory"),
        ({"a": entry(shape=(1,) * 65)}, bytes(4), "has 65 sizes; at most 64"),
        ({"a": entry(span=(4, 0))}, bytes(4), r"expected \[start, stop\]"),
        ({"a": entry(dtype="F4")}, bytes(4), "dtype 'F4'; known: F64"),
        ({"a": {"dtype": "F32"}}, bytes(4), "isn't described"),
        ({"a": 1}, bytes(4), "isn't described"),
        ({"__metadata__": {"a": 1}}, b"", "map of strings"),
        (b'{"a":1,"a":2}', b"", "twice"),
        (b'{"a":' + b"[" * 100_000, b"", "RecursionError"),
        (b"{broken", b"", "JSONDecodeError"),
    ],
)
def test_safetensors_headers_are_checked(header, data, message, tmp_path):
    with pytest.raises(TorchFileError, match=rf"x\.safetensors: .*{message}"):
        read(safetensors(tmp_path / "x.safetensors", header, data))


def test_safetensors_header_length_is_bounded(tmp_path):
    with pytest.raises(TorchFileError, match="at most 67108864"):
        read(safetensors(tmp_path / "x.safetensors", {}, length=1 << 35))
    with pytest.raises(TorchFileError, match="truncated"):
        read(safetensors(tmp_path / "x.safetensors", {}, length=1000))
