"""The writer of torch's zip files: read back by our own reader, by pickletools and, where installed, by torch."""

import io
import os
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from biomass_jax.convert.torch_file import TorchTensor, flatten, read
from biomass_jax.convert.torch_file import write as torch_write
from biomass_jax.convert.torch_file.write import write

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
# what torch's weights-only unpickler knows among the opcodes of protocol 2
ALLOWED = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "APPENDS", "SETITEMS"),
}


def sample() -> OrderedDict:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4)).astype(np.float32)
    return OrderedDict(
        [
            ("z", weight),
            ("a", {"again": weight, "transposed": weight.T, "cut": weight[:, ::2]}),
            ("dtypes", {name: np.array([[1, 0], [3, 1]]).astype(name) for name in DTYPES}),
            ("bfloat16", np.array([1.5, -2], ml_dtypes.bfloat16)),
            ("big_endian", np.array([1, 2, 3], ">i4")),
            ("shapes", [np.array(7, np.int64), np.zeros((0, 3), np.float32), np.ones((1, 2, 1, 3), np.float32)]),
            (
                "plain",
                [None, True, False, 0, -1, 2**31, -(2**31) - 1, 10**30, 0.1, "Zürich", "", (), [], {}, (1, (2,))],
            ),
            ("keys", {0: "int", 1.5: "float", None: "none", "s": "str"}),
        ]
    )


def assert_equal(found: object, wanted: object) -> None:
    if isinstance(wanted, np.ndarray):
        assert isinstance(found, TorchTensor)
        array = found.array()
        assert array.shape == wanted.shape and array.dtype == wanted.dtype.newbyteorder("=")
        np.testing.assert_array_equal(array, wanted)
        return
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


def test_our_reader_gets_everything_back(tmp_path):
    write(tmp_path / "a.ckpt", sample())
    file = read(tmp_path / "a.ckpt")
    assert file.placeholders == []
    assert_equal(file.root, sample())
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_an_array_met_twice_is_stored_once(tmp_path):
    write(tmp_path / "a.ckpt", sample())
    root = read(tmp_path / "a.ckpt").root
    assert root["z"].storage.record is root["a"]["again"].storage.record
    assert root["z"].storage.record is not root["a"]["transposed"].storage.record


def test_rewriting_a_real_checkpoint_keeps_every_bit(golden, tmp_path):
    root = read(golden / "ckpt_micro_cli" / "state_dict.ckpt").root

    def arrays(node):
        if isinstance(node, TorchTensor):
            return node.array()
        if isinstance(node, dict):
            return type(node)((key, arrays(value)) for key, value in node.items())
        return type(node)(map(arrays, node)) if isinstance(node, list | tuple) else node

    write(tmp_path / "again.ckpt", arrays(root))
    found, wanted = flatten(read(tmp_path / "again.ckpt").root), flatten(root)
    assert list(found) == list(wanted)
    for key, leaf in wanted.items():
        if isinstance(leaf, TorchTensor):
            assert found[key].dtype == leaf.dtype
            assert found[key].array().tobytes() == leaf.array().tobytes()
        else:
            assert found[key] == leaf


def test_layout_is_what_torch_writes(tmp_path):
    write(tmp_path / "a.ckpt", sample())
    data = (tmp_path / "a.ckpt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names[:2] == ["archive/data.pkl", "archive/byteorder"] and names[-1] == "archive/version"
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED and entry.date_time == (1980, 1, 1, 0, 0, 0)
            name, extra = struct.unpack("<2H", data[entry.header_offset + 26 : entry.header_offset + 30])
            assert (entry.header_offset + 30 + name + extra) % 64 == 0, entry.filename
        operations = list(pickletools.genops(archive.read("archive/data.pkl")))
    assert {operation.name for operation, _, _ in operations} <= ALLOWED
    assert {argument for operation, argument, _ in operations if operation.name == "GLOBAL"} == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {name}" for name in torch_write._STORAGE_NAMES.values()),
    }


def test_bytes_depend_on_the_values_alone(tmp_path):
    write(tmp_path / "a.ckpt", sample())
    write(tmp_path / "b.ckpt", sample())
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_many_strings_pass_the_one_byte_memo(tmp_path):
    root = {f"key{i}": f"key{i // 2}" for i in range(700)}
    write(tmp_path / "a.ckpt", root)
    assert read(tmp_path / "a.ckpt").root == root


@pytest.mark.parametrize(
    ("root", "error", "message"),
    [
        ({"a": [object()]}, TypeError, r"root\['a'\]\[0\]: a builtins.object can't be written"),
        ({"a": np.float32(1)}, TypeError, r"root\['a'\]: a numpy.float32 can't be written"),
        ({"a": np.array(["x"])}, TypeError, r"root\['a'\]: an array of <U1 can't be written"),
        ({"a": np.zeros(2, np.complex64)}, TypeError, "an array of complex64"),
        ({(1, 2): 3}, TypeError, r"root: key \(1, 2\) is a tuple"),
        ({"a": 1 << 3000}, ValueError, "an integer of 376 bytes"),
        ({"a": {1, 2}}, TypeError, "builtins.set"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_left(root, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write(tmp_path / "a.ckpt", root)
    assert os.listdir(tmp_path) == []


def test_a_subclass_of_dict_and_a_cycle_are_refused(tmp_path):
    class Special(dict):
        pass

    with pytest.raises(TypeError, match=r"root\[0\]: a Special; make it a plain dict"):
        write(tmp_path / "a.ckpt", [Special()])
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match=r"root\[0\]: this container holds itself"):
        write(tmp_path / "a.ckpt", cycle)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.ckpt"
    write(target, {"old": 1})
    before = target.read_bytes()
    add = torch_write._add

    def full_disk(archive, file, name, data):
        if name == "archive/data/1":
            raise OSError(28, "No space left on device")
        add(archive, file, name, data)

    monkeypatch.setattr(torch_write, "_add", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(target, sample())
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_it(tmp_path, weights_only, mmap):
    torch = pytest.importorskip("torch")
    path: Path = tmp_path / "a.ckpt"
    write(path, sample())
    found = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)

    def compare(one, other, place):
        if isinstance(other, np.ndarray):
            assert str(one.dtype) == f"torch.{other.dtype.name}" and tuple(one.shape) == other.shape, place
            assert one.is_contiguous() and not one.requires_grad
            values = one.float().numpy() if other.dtype.name == "bfloat16" else one.numpy()
            np.testing.assert_array_equal(values, other.astype(values.dtype), err_msg=place)
        elif isinstance(other, dict):
            assert type(one) is type(other) and list(one) == list(other), place
            for key in other:
                compare(one[key], other[key], f"{place}.{key}")
        elif isinstance(other, list | tuple):
            assert type(one) is type(other) and len(one) == len(other), place
            for index, (a, b) in enumerate(zip(one, other, strict=True)):
                compare(a, b, f"{place}.{index}")
        else:
            assert type(one) is type(other) and one == other, place

    compare(found, sample(), "root")
    assert found["z"].data_ptr() == found["a"]["again"].data_ptr()
