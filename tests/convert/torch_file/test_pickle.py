"""Pickles that try to run a command, break the reader or exhaust the machine, written opcode by opcode."""

import contextlib
import copyreg
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest

from biomass_jax.convert.torch_file import Placeholder, TorchFile, flatten, read
from biomass_jax.convert.torch_file import pickle as torch_pickle
from biomass_jax.errors import TorchFileError

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
STORAGE = b"X\x07\x00\x00\x00storage"
FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(key: bytes = text("0"), count: bytes = number(4), kind: bytes = FLOATS) -> bytes:
    return b"(" + STORAGE + kind + key + text("cpu") + count + b"tQ"


def tensor(offset: int = 0, shape: tuple = (4,), strides: tuple = (1,), base: bytes = b"") -> bytes:
    parts = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, strides)]
    return REBUILD + b"(" + (base or storage()) + number(offset) + parts[0] + parts[1] + b"\x89}tR"


def as_zip(path: Path, body: bytes, records: tuple = (("m/data/0", bytes(16)),), **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + body + b".")
        for name, data in records:
            archive.writestr(name, data)
    return path


def as_legacy(path: Path, body: bytes, storages: tuple = ()) -> Path:
    keys = b"\x80\x02](" + b"".join(text(key) for key, _, _ in storages) + b"e."
    data = b"".join(struct.pack("<q", count) + raw for _, count, raw in storages)
    system = b"\x80\x02}" + text("little_endian") + b"\x88s."
    path.write_bytes(MAGIC + b"\x80\x02M\xe9\x03." + system + b"\x80\x02" + body + b"." + keys + data)
    return path


def refuse(path: Path, message: str) -> None:
    with pytest.raises(TorchFileError, match=rf"{path.name}: .*{message}"):
        read(path)


# ---- commands


def commands(marker: Path) -> dict[str, bytes]:
    """Pickles that make the marker when Python's own unpickler reads them."""
    shell = text(f"touch {marker}")
    code = text(f"open({str(marker)!r}, 'w').close()")
    system = b"cos\nsystem\n"
    return {
        "reduce": system + shell + b"\x85R",
        "stack_global": text("os") + text("system") + b"\x93" + shell + b"\x85R",
        "memoised": system + b"q\x00h\x00" + shell + b"\x85R",
        "python_2_name": b"c__builtin__\neval\n" + code + b"\x85R",
        "exec": b"cbuiltins\nexec\n" + code + b"\x85R",
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(csubprocess\ngetoutput\n" + shell + b"o",
        "getattr": b"cbuiltins\ngetattr\ncos\npath\n" + text("os") + b"\x86R0" + system + shell + b"\x85R",
        "getattr_chain": b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R" + text("system")
        + b"\x86R" + shell + b"\x85R",
        "default_factory": b"ccollections\ndefaultdict\ncfunctools\npartial\n" + system + shell + b"\x86R\x85R0"
        + system + shell + b"\x85R",
        "in_a_state_dict": b"}" + text("weight") + system + shell + b"\x85Rs",
        "as_a_key": b"}" + system + shell + b"\x85RNs",
        "map_in_a_set": b"c__builtin__\nset\ncbuiltins\nmap\n" + system + b"](" + shell + b"e\x86R\x85R",
    }  # fmt: skip


def traps(marker: Path) -> dict[str, bytes]:
    """Pickles aimed at a reader's own machinery."""
    shell = text(f"touch {marker}")
    system = b"cos\nsystem\n"
    return {
        "newobj": system + shell + b"\x85\x81",
        "newobj_ex": system + shell + b"\x85}" + text("args") + shell + b"s\x92",
        "setstate": b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + system + b"sb" + shell + b"b",
        "class_of_placeholder": system + b"}" + text("class_name") + text("builtins.eval") + b"sb" + shell + b"\x85R",
        "slots_state": system + b"N}" + text("args") + b"Ns\x86b" + shell + b"\x85R",
        "rebuild_from_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"N" + shell + b"\x85NtR",
        "rebuild_hooks": REBUILD + b"(" + storage() + b"K\x00K\x04\x85K\x01\x85\x89" + system + shell + b"\x85RtR",
        "reconstructor": b"ccopy_reg\n_reconstructor\n(" + system + b"c__builtin__\nobject\nNtR" + shell + b"b",
        "codec": b"c_codecs\nencode\n" + text("x") + text("os.system") + b"\x86R",
        "numpy_object": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("O8") + b"\x85R" + shell + b"\x86R",
        "numpy_record": b"cnumpy\ndtype\n](" + text("a") + system + b"\x86e\x85R",
        "load_from_bytes": b"ctorch.storage\n_load_from_bytes\n" + shell + b"\x85R",
        "reader_itself": b"cbiomass_jax.convert.torch_file\nread\n" + shell + b"\x85R",
        "class_key": b"}" + system + b"Ns" + system + b"(ls",
    }


COMMANDS, TRAPS = sorted(commands(Path("m"))), sorted(traps(Path("m")))


@pytest.mark.parametrize("name", COMMANDS)
def test_these_pickles_would_run_a_command(name, tmp_path):
    """The control of the next test: without our reader the marker appears."""
    marker = tmp_path / "marker"
    with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):  # raised behind the command
        pickle.loads(b"\x80\x02" + commands(marker)[name] + b".")
    assert marker.exists()


@pytest.mark.parametrize("write", [as_zip, as_legacy])
@pytest.mark.parametrize("name", COMMANDS + TRAPS)
def test_no_command_is_ever_run(name, write, tmp_path):
    marker = tmp_path / "marker"
    body = (commands(marker) | traps(marker))[name]
    path = write(tmp_path / "evil.ckpt", body)
    file = None
    try:
        file = read(path)
    except TorchFileError as exc:
        assert "evil.ckpt: " in str(exc)
    use(file)
    assert not marker.exists()
    assert os.listdir(tmp_path) == ["evil.ckpt"]
    if file is not None and b"cos\nsystem" in body:
        assert {"os.system", "builtins.getattr", "builtins.__import__"} & set(file.placeholders)


def use(file: TorchFile | None) -> None:
    """What a caller may do with a file's values: look, compare, hash, print."""
    if file is None:
        return
    for key, leaf in flatten(file.root).items():
        assert isinstance(repr((key, leaf)), str)
        if isinstance(leaf, Placeholder):
            assert leaf in {leaf} and leaf == leaf and bool(leaf)
            assert not callable(leaf)


def test_the_unbuilt_call_is_kept_and_named(tmp_path):
    file = read(as_zip(tmp_path / "evil.ckpt", commands(tmp_path / "marker")["in_a_state_dict"]))
    weight = file.root["weight"]
    assert file.placeholders == ["os.system"]
    assert weight.class_name == "os.system" and weight.args == (f"touch {tmp_path / 'marker'}",)


def test_the_extension_registry_is_not_used(tmp_path):
    marker = tmp_path / "marker"
    copyreg.add_extension("os", "system", 231)
    try:
        refuse(as_zip(tmp_path / "e.ckpt", b"\x82\xe7" + text(f"touch {marker}") + b"\x85R"), "opcode b'.x82'")
    finally:
        copyreg.remove_extension("os", "system", 231)
    assert not marker.exists()


# ---- storages and tensors that lie


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"K\x01Q", "persistent id"),
        (text("0") + b"Q", "persistent id"),
        (b")Q", "persistent id"),
        (b"(" + text("module") + FLOATS + text("0") + text("cpu") + b"K\x01tQ", "persistent id"),
        (b"P0\n", "opcode b'P'"),
        (storage(kind=b"cos\nsystem\n"), "storage's type is os.system"),
        (storage(kind=text("FloatStorage")), "storage's type is str"),
        (storage(key=b"]"), "key isn't a string"),
        (storage(count=number(-1)), "isn't a count"),
        (storage(count=number(1 << 62)), "isn't a count"),
        (storage(count=b"\x88"), "isn't a count"),
        (storage(count=number(5)), "should have 20 bytes, its record has 16"),
        (storage(key=text("7")), "m/data/7 is missing"),
        (storage(key=text("../../etc/passwd")), "is missing"),
        (tensor(shape=(5,)), "needs 5 elements, its storage has 4"),
        (tensor(offset=1), "needs 5 elements"),
        (tensor(shape=(2, 2), strides=(3, 1)), "needs 5 elements"),
        (tensor(shape=(2,), strides=(1 << 62,)), "elements, its storage has 4"),
        (tensor(shape=(-1,)), "non-negative 64-bit"),
        (tensor(strides=(-1,)), "non-negative 64-bit"),
        (tensor(offset=-1), "non-negative 64-bit"),
        (tensor(offset=1 << 63), "non-negative 64-bit"),
        (tensor(offset=5, shape=(0,)), "needs 5 elements"),
        (tensor(shape=(0, 1 << 40, 1 << 40), strides=(1, 1, 1)), "larger than any memory"),
        (tensor(shape=(2, 2)), "2 sizes and 1 strides"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "65 sizes"),
        (tensor(shape=(1 << 30,), strides=(0,)), "repeats its few stored values"),
        (tensor(base=b"N"), "built on a NoneType"),
    ],
)
def test_storages_and_geometry_are_checked(body, message, tmp_path):
    refuse(as_zip(tmp_path / "a.pt", body), message)


def test_honest_geometry_passes(tmp_path):
    """The control of the test above: the same writer, nothing wrong."""
    data = struct.pack("<4f", 1, 2, 3, 4)
    found = read(as_zip(tmp_path / "a.pt", tensor(offset=1, shape=(2, 3), strides=(0, 1)), (("m/data/0", data),))).root
    assert found.array().tolist() == [[2, 3, 4], [2, 3, 4]]


SIX = struct.pack("<6f", 0, 1, 2, 3, 4, 5)


def viewed(view: bytes, count: int = 6) -> bytes:
    """A storage as older versions wrote it: a sixth entry (key, offset, count) makes a part of the whole."""
    return b"(" + STORAGE + FLOATS + text("17") + text("cpu") + number(count) + view + b"tQ"


def older_file(path: Path) -> Path:
    part = viewed(b"(" + text("18") + number(2) + number(3) + b"t")
    whole = tensor(shape=(6,), base=viewed(b"N"))
    old = b"ctorch._utils\n_rebuild_tensor\n(" + part + number(1) + number(2) + b"\x85" + number(1) + b"\x85tR"
    return as_legacy(path, b"(" + whole + tensor(shape=(3,), base=part) + old + b"l", (("17", 6, SIX),))


def test_legacy_views_of_older_files(tmp_path):
    found = [leaf.array().tolist() for leaf in read(older_file(tmp_path / "old.pth")).root]
    assert found == [[0, 1, 2, 3, 4, 5], [2, 3, 4], [3, 4]]
    path, data = tmp_path / "bad.pth", (("17", 6, SIX),)
    outside = viewed(b"(" + text("18") + number(4) + number(3) + b"t")
    refuse(as_legacy(path, tensor(base=outside), data), "reaches beyond its storage of 6")
    refuse(as_legacy(path, tensor(base=viewed(b"N", 7)), data), "6 elements in the stream, 7")
    refuse(as_legacy(path, tensor(base=viewed(b"K\x01")), data), "view isn't")


def test_torch_reads_the_older_file_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    path = older_file(tmp_path / "old.pth")
    for wanted, found in zip(torch.load(path, weights_only=False), read(path).root, strict=True):
        assert found.array().tolist() == wanted.tolist()


def test_legacy_stream_is_checked(tmp_path):
    path, data = tmp_path / "l.pth", bytes(16)
    assert read(as_legacy(path, tensor(base=storage()), (("0", 4, data),))).root.array().tolist() == [0] * 4
    refuse(as_legacy(path, tensor(), (("0", 3, data[:12]),)), "3 elements in the stream, 4 by its tensors")
    refuse(as_legacy(path, tensor(), (("0", 4, data[:9]),)), "ends inside storage 0|should have 16")
    refuse(as_legacy(path, tensor(), (("0", 4, data + b"!"),)), "1 bytes behind its last storage")
    refuse(as_legacy(path, tensor(), (("1", 4, data),)), "lists 1 storages")
    refuse(as_legacy(path, tensor(), (("0", 4, data), ("0", 4, data))), "lists 2 storages")
    refuse(as_legacy(path, tensor(base=storage(count=number(1 << 40)))), "the whole file has")
    other = b"(" + tensor() + storage(count=number(3)) + b"t"
    refuse(as_legacy(path, other, (("0", 4, data),)), "16 bytes in one place and 12 in another")
    path.write_bytes(MAGIC + b"\x80\x02M\xea\x03.")
    refuse(path, "protocol version is 1002, expected 1001")


# ---- bombs


def repeated(times: int) -> bytes:
    """A list that holds the one before it twice, again and again: 2**times leaves."""
    return b"]" + b"".join(b"q\x00](h\x00h\x00e" for _ in range(times))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"]" * 100_000 + b"a" * 99_999, "deep"),
        (b")" + b"\x85" * 100_000, "deep"),
        (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "dict key"),
        (b"}" + b")" + b"q\x00h\x00\x86" * 60 + b"Ns", "dict key"),
        (b"}" + text("k" * 5000) + b"Ns", "5000 characters"),
        (b"}" + number(1 << 70) + b"Ns", "beyond 64 bits"),
        (b"}]Ns", "a list can't be a dict key"),
        (b"}}Ns", "a dict can't be a dict key"),
        (b"]q\x00h\x00a", "holds itself"),
        (repeated(60), "values: more than"),
        (b"\x8b\xff\xff\xff\x7f", "integer of 2147483647 bytes"),
        (b"\x8b\xff\xff\xff\xff", "integer of -1 bytes"),
        (b"L" + b"9" * 5000 + b"L\n", "text argument has no end"),
        (b"\x8e" + b"\xff" * 8, "truncated"),
        (b"X\xff\xff\xff\xff", "truncated"),
        (text("x" * 4_000_000) + b"q\x000(" + b"c_codecs\nencode\nh\x00\x85R" * 100 + b"t", "by repeating its parts"),
        (b"c" + b"a" * 5000, "text argument has no end"),
        (b"ca\x1b[2J\nb\n", "unprintable"),
        (b"c__builtin__\nbytearray\n" + number(10**12) + b"\x85R", "bytes are made from a int"),
        (b"0" * 10, "broken"),
        (b"h\x07", "broken"),
        (b"N)R", "NoneType is called"),
        (b"]}(h\x00", "broken"),
        (b"NNNs", "items are set in a NoneType"),
        (b"K\x01K\x02a", "items are added to a int"),
        (b"K\x01}b", "state is set on a int"),
        (b"\xffN", "opcode"),
        (b"\x97", "opcode"),
    ],
)
def test_bombs_and_broken_programs_are_refused_quickly(body, message, tmp_path):
    start = time.process_time()
    refuse(as_zip(tmp_path / "bomb.pt", body), message)
    refuse(as_legacy(tmp_path / "bomb.pth", body), message)
    assert time.process_time() - start < 10


def test_a_huge_memo_index_costs_nothing(tmp_path):
    assert read(as_zip(tmp_path / "a.pt", b"]r\xff\xff\xff\xff")).root == []


def test_operations_and_pickle_size_are_bounded(tmp_path, monkeypatch):
    path = as_zip(tmp_path / "a.pt", b"](" + b"N" * 1000 + b"e")
    monkeypatch.setattr(torch_pickle, "MAX_OPERATIONS", 900)
    refuse(path, "more than 900 operations")
    monkeypatch.setattr(torch_pickle, "MAX_OPERATIONS", 2000)
    assert len(read(path).root) == 1000
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE_BYTES", 900)
    refuse(path, "has 1006 bytes; at most 900 are read")
    refuse(as_legacy(tmp_path / "a.pth", b"](" + b"N" * 1000 + b"e"), "over the size limit")


# ---- archives


def test_compressed_entries_are_refused(tmp_path):
    records = (("m/data/0", bytes(1 << 20)),)
    refuse(as_zip(tmp_path / "a.pt", b"}", records, compression=zipfile.ZIP_DEFLATED), "is compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # zipfile's own, while the test makes the file
def test_duplicate_and_ambiguous_entries_are_refused(tmp_path):
    twice = (("m/data/0", bytes(16)), ("m/data/0", bytes(16)))
    refuse(as_zip(tmp_path / "a.pt", tensor(), twice), "m/data/0 appears twice")
    refuse(as_zip(tmp_path / "a.pt", b"}", (("n/data.pkl", b"\x80\x02}."),)), "holds 2 pickles")


def test_entries_must_lie_apart_and_inside(tmp_path):
    path = as_zip(tmp_path / "a.pt", tensor(), (("m/data/0", bytes(16)), ("m/data/1", bytes(16))))
    good = path.read_bytes()
    first, second = (good.rindex(b"PK\x01\x02", 0, good.rindex(name)) for name in (b"m/data/0", b"m/data/1"))
    overlapping = bytearray(good)
    overlapping[second + 42 : second + 46] = good[first + 42 : first + 46]  # both point at the first header
    path.write_bytes(overlapping)
    refuse(path, "overlaps|appears twice")
    beyond = bytearray(good)
    beyond[second + 20 : second + 28] = struct.pack("<2I", 5000, 5000)  # compressed and full size
    path.write_bytes(beyond)
    refuse(path, "reaches beyond the data")
    headless = bytearray(good)
    headless[second + 42 : second + 46] = struct.pack("<I", 7)
    path.write_bytes(headless)
    refuse(path, "has no header at 7")
