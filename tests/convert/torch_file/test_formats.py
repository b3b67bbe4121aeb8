"""The torch-free reader against files made by torch and safetensors (fixtures/make.py) and the golden checkpoints."""

import gc
import hashlib
import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from biomass_jax.convert.torch_file import TorchFile, TorchTensor, flatten, read
from biomass_jax.convert.torch_file import formats as torch_formats
from biomass_jax.convert.torch_file import tensor as torch_tensor
from biomass_jax.errors import TorchFileError

FIXTURES = Path(__file__).parents[1] / "fixtures"
WIDENED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # kept as float32 in expected.npz


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "expected.npz") as file:
        return dict(file)


def tensors(file: TorchFile) -> dict[str, TorchTensor]:
    return {key: leaf for key, leaf in flatten(file.root).items() if isinstance(leaf, TorchTensor)}


def assert_same(tensor: TorchTensor, wanted: np.ndarray) -> None:
    found = tensor.array()
    assert tensor.dtype == found.dtype.name
    assert tensor.shape == found.shape == wanted.shape
    if tensor.dtype in WIDENED:
        found = found.astype(np.float32)
    assert found.dtype == wanted.dtype
    assert found.tobytes() == wanted.tobytes()


def rezip(source: Path, target: Path, change=lambda name, data: (name, data), **options) -> Path:
    """Write a zip anew with Python's zipfile, each entry changed; None drops it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for entry in old.infolist():
            changed = change(entry.filename, old.read(entry))
            if changed is not None:
                new.writestr(*changed)
    return target


# ---- values


@pytest.mark.parametrize(("name", "form"), [("zip.pt", "zip"), ("legacy.pt", "legacy")])
def test_every_dtype_view_and_shape_equals_torch(name, form, expected):
    file = read(FIXTURES / name)
    assert file.format == form
    assert file.placeholders == []
    found = tensors(file)
    wanted = {key: values for key, values in expected.items() if not key.startswith("extra.")}
    assert set(found) == set(wanted) | {"parameter"}
    for key, values in wanted.items():
        assert_same(found[key], values)
        assert found[key].name == key
    np.testing.assert_array_equal(found["parameter"].array(), [1.0, -2.0])


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_plain_values_are_read(name):
    root = read(FIXTURES / name).root
    assert type(root) is dict and type(root["dtypes"]) is OrderedDict
    assert root["plain"] == {
        "int": 7,
        "big": 10**30,
        "negative": -(2**40),
        "float": 0.1,
        "none": None,
        "flags": (True, False),
        "text": "Zürich \N{EVERGREEN TREE}",
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "size": (2, 3),
        "device": "cuda:1",
        "dtype": "torch.bfloat16",
        "numpy": 2.5,
        "numpy_int": -3,
        "default": {"a": [1]},
    }
    assert type(root["plain"]["numpy"]) is float and type(root["plain"]["numpy_int"]) is int
    assert root[5] == "integer key"


def test_views_of_one_storage_share_the_files_bytes():
    found = tensors(read(FIXTURES / "zip.pt"))
    base = found["views.base"].array()
    for key in ("rows", "transposed", "stepped", "permuted", "expanded", "offset_scalar"):
        assert np.shares_memory(base, found[f"views.{key}"].array()), key
    assert found["views.expanded"].array().strides == (4, 0)


def test_rare_dtypes_lazy_views_and_unbuilt_tensors(expected):
    file = read(FIXTURES / "odd.pt")
    found = tensors(file)
    for key, values in expected.items():
        if key.startswith("extra."):
            assert_same(found[key.removeprefix("extra.")], values)
    conjugate = np.conj(expected["extra.complex64"])
    np.testing.assert_array_equal(found["conj"].array(), conjugate)
    np.testing.assert_array_equal(found["neg"].array(), conjugate.imag)
    assert file.root["quantized"].class_name == "torch._utils._rebuild_qtensor"
    assert "torch._utils._rebuild_qtensor" in file.placeholders
    assert "torch._utils._rebuild_sparse_tensor" in file.placeholders


def test_a_dtype_without_numpy_counterpart_is_refused_by_name(tmp_path):
    tensor = next(iter(tensors(read(FIXTURES / "zip.pt")).values()))
    tensor.dtype = "qint8"
    with pytest.raises(TorchFileError, match=r"zip\.pt: tensor 'dtypes\.float64' has dtype qint8"):
        tensor.array()


def test_lightning_file_with_classes_that_are_not_built():
    file = read(FIXTURES / "lightning.ckpt")
    assert file.placeholders == ["argparse.Namespace", "pathlib.PurePosixPath"]
    assert list(file.root["state_dict"]) == ["model.layer.weight", "model.layer.bias"]
    assert file.root["epoch"] == 3
    hyper = file.root["hyper_parameters"]
    assert hyper["args"].state == {"depths": [2, 2], "lr": 1e-3}
    assert hyper["root"].args == ("/", "data", "granite")
    assert hyper["bands"] == ["BLUE", "GREEN"]
    found = tensors(file)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(found["state_dict.model.layer.weight"].array(), weight)
    np.testing.assert_array_equal(found["optimizer_states.0.state.0.exp_avg"].array(), 2 * weight)


def test_safetensors_equals_the_same_values(expected):
    file = read(FIXTURES / "plain.safetensors")
    assert file.format == "safetensors" and file.placeholders == []
    for key, values in expected.items():
        group, _, name = key.partition(".")
        if group == "dtypes":
            assert_same(file.root[name], values)
    assert file.root["scalar"].array() == np.float32(4.5)
    assert file.root["empty"].array().shape == (0, 3)


def test_both_real_lightning_files_hold_the_same_weights(golden):
    full = read(golden / "ckpt_micro_cli" / "lightning.ckpt")
    weights = read(golden / "ckpt_micro_cli" / "state_dict.ckpt")
    assert full.placeholders == weights.placeholders == []
    assert list(full.root["state_dict"]) == list(weights.root["state_dict"])
    assert len(weights.root["state_dict"]) > 200
    for name, tensor in weights.root["state_dict"].items():
        np.testing.assert_array_equal(full.root["state_dict"][name].array(), tensor.array(), err_msg=name)


def test_every_golden_file_equals_torch_load(golden):
    torch = pytest.importorskip("torch")
    files = [path for path in golden.glob("*/*") if path.suffix in (".ckpt", ".pt", ".pth")]
    assert len(files) >= 7
    for path in files:
        found, wanted = flatten(read(path).root), flatten(torch.load(path, map_location="cpu", weights_only=True))
        assert list(found) == list(wanted)
        for key, leaf in found.items():
            if isinstance(leaf, TorchTensor):
                np.testing.assert_array_equal(leaf.array(), wanted[key].numpy(), err_msg=f"{path.name} {key}")
            else:
                assert leaf == wanted[key], f"{path.name} {key}"


# ---- the map, the checksum, detection


def test_arrays_view_the_map_and_outlive_the_file_object(golden):
    file = read(golden / "micro" / "model.pt")
    arrays = {key: tensor.array() for key, tensor in tensors(file).items()}
    copies = {key: array.copy() for key, array in arrays.items()}
    whole = np.frombuffer(file.mapped.data, np.uint8)
    assert all(np.shares_memory(whole, array) for array in arrays.values() if array.size)
    del file, whole
    gc.collect()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, copies[key])
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_sha256_is_of_the_whole_file():
    path = FIXTURES / "legacy.pt"
    assert read(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.safetensors"])
def test_format_is_told_by_content_not_by_name(name, tmp_path):
    other = tmp_path / "weights.bin"
    other.write_bytes((FIXTURES / name).read_bytes())
    assert read(other).format == read(FIXTURES / name).format


def test_any_archive_prefix_and_unaligned_entries(tmp_path, expected):
    def change(name, data):
        return "a longer prefix" + name[name.index("/") :], data

    found = tensors(read(rezip(FIXTURES / "zip.pt", tmp_path / "moved.pt", change)))
    for key, values in expected.items():
        if not key.startswith("extra."):
            assert_same(found[key], values)


def test_file_written_without_checksums_is_read():
    np.testing.assert_array_equal(read(FIXTURES / "no_crc.pt").root["a"].array(), [0, 1, 2])


def test_damaged_weights_are_found_by_their_checksum(tmp_path):
    data = bytearray((FIXTURES / "zip.pt").read_bytes())
    tensor = read(FIXTURES / "zip.pt").root["views"]["base"]
    data[tensor.storage.record.offset + 5] ^= 1
    bad = tmp_path / "bad.pt"
    bad.write_bytes(data)
    file = read(bad)
    with pytest.raises(TorchFileError, match=r"bad\.pt: record .*/data/\d+ is damaged: its CRC-32"):
        file.root["views"]["base"].array()


def test_big_endian_archive_gives_the_same_values(tmp_path, expected):
    """Swap the bytes of every storage by hand, as a big-endian machine would have written them."""
    source = read(FIXTURES / "zip.pt")
    part = {}
    for tensor in tensors(source).values():
        part[tensor.storage.record.name] = torch_tensor.item_size(tensor.dtype)

    def change(name, data):
        if name.endswith("/byteorder"):
            return name, b"big"
        return name, np.frombuffer(data, f"u{part[name]}").byteswap().tobytes() if name in part else data

    found = tensors(read(rezip(FIXTURES / "zip.pt", tmp_path / "big.pt", change)))
    for key, values in expected.items():
        if not key.startswith("extra."):
            assert_same(found[key], values)


def test_big_endian_complex_swaps_each_half(tmp_path, expected):
    def change(name, data):
        if name.endswith("/byteorder"):
            return name, b"big"
        return name, np.frombuffer(data, "u4").byteswap().tobytes() if name.endswith("/data/0") else data

    file = read(rezip(FIXTURES / "odd.pt", tmp_path / "big.pt", change))
    assert file.root["complex64"].storage.record.name.endswith("/data/0")
    assert_same(file.root["complex64"], expected["extra.complex64"])


def test_unknown_byteorder_is_refused(tmp_path):
    path = rezip(FIXTURES / "zip.pt", tmp_path / "x.pt", lambda n, d: (n, b"pdp" if n.endswith("byteorder") else d))
    with pytest.raises(TorchFileError, match="byteorder record says b'pdp'"):
        read(path)


# ---- files that are no checkpoints


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>sign in</html>", "HTML page"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x80\x04}.", "plain pickle"),
        (b"hello world, no checkpoint", "no known checkpoint format"),
        (bytes(257) + b"ustar" + bytes(300), "tar archive"),
        (b"PK\x03\x04 and nothing else", r"begins as a zip archive.*truncated or damaged; fetch it again .* 21 bytes"),
        (b"Entry not found", r"is text \('Entry not found'\), as a failed download leaves"),
        (b'{"error":"Repository not found"}', "JSON text that says 'Repository not found'"),
        (
            b'{"metadata":{},"weight_map":{"a":"m-00001-of-00002.bin","b":"m-00002-of-00002.bin"}}',
            r"the index of a model in several files \(m-00001-of-00002\.bin, m-00002-of-00002\.bin\), .*one file of",
        ),
        (bytes(600), "begins with zeros: the download or copy was cut short"),
        (b"\x10\0\0", "has 3 bytes: truncated"),
        (b"\x08\x08\x12\x07pytorch" + bytes(40), "ONNX"),
    ],
)
def test_common_mistakes_are_named(content, message, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(TorchFileError, match=rf"model\.ckpt: (?s:.)*{message}"):
        read(path)


def test_folder_missing_file_and_pipe(tmp_path):
    with pytest.raises(TorchFileError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(TorchFileError, match="no such file"):
        read(tmp_path / "nothing.pt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TorchFileError, match="no regular file"):
        read(tmp_path / "pipe")


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("report.txt", "x")
    with pytest.raises(TorchFileError, match=r"without data\.pkl \(it holds report\.txt\)"):
        read(tmp_path / "a.pt")
    script = tmp_path / "script.pt"
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    with pytest.raises(TorchFileError, match="TorchScript"):
        read(script)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # As torch 2.13 names them; the code is compressed, which must not be the reason that is given.
        (
            ("m/data/0", "m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version", "m/byteorder"),
            r"TorchScript.*save\(torch\.jit\.load\('\S*x\.pt', map_location='cpu'\)\.state_dict\(\), 'weights\.pt'\)$",
        ),
        (
            ("m/data/weights/weight_0", "m/models/model.json", "m/data/sample_inputs/model.pt", "m/archive_format"),
            r"torch\.export; .*torch\.save\(torch\.export\.load\('\S*x\.pt'\)\.state_dict, 'weights\.pt'\)$",
        ),
        (("a.npy", "b.npy"), "NumPy arrays"),
        (("run/readme.txt", "run/model.ckpt"), r"a zip archive with run/model\.ckpt in it; unpack it first"),
        ([f"{n}.txt" for n in range(9)], r"it holds 0\.txt, .*4\.txt \.\.\. and 4 more \(9 in all\)"),
    ],
)
def test_other_archives_are_named_with_what_to_do(names, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in names:
            code = "/code/" in name
            archive.writestr(name, "x" * 500, zipfile.ZIP_DEFLATED if code else zipfile.ZIP_STORED)
    with pytest.raises(TorchFileError, match=message):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("bundle.json", "variables/x"), "is a bundle already; --to torch writes it"),
        (("config.json", "best/bundle.json"), "is the folder of a training run; .* best/ in it"),
        (("archive/data.pkl", "archive/data/0"), r"was unpacked .*cd \S*/given && zip -0 -r model\.pt archive$"),
        ((".metadata", "__0_0.distcp"), r"torch\.distributed.*dcp_to_torch \S*/given model\.pt$"),
        (("zero_to_fp32.py", "latest"), "DeepSpeed; its zero_to_fp32"),
        (("config.json", "model.safetensors", "b.ckpt"), r"give a file in it \(b\.ckpt, model\.safetensors\)"),
        (("readme.md",), r"give a file in it \(none\)"),
    ],
)
def test_folders_say_what_they_are(files, message, tmp_path):
    for name in files:
        path = tmp_path / "given" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with pytest.raises(TorchFileError, match=rf"given: (?s:.)*{message}"):
        read(tmp_path / "given")


def test_an_unpacked_file_is_read_when_it_was_packed_again(tmp_path):
    """What the error of such a folder advises, `zip -0 -r`: entries as they are, folders as entries of their own."""
    with zipfile.ZipFile(FIXTURES / "zip.pt") as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_STORED) as archive:
        for path in (folder, *sorted(folder.rglob("*"))):
            archive.write(path, path.relative_to(tmp_path))
    assert list(tensors(read(tmp_path / "model.pt"))) == list(tensors(read(FIXTURES / "zip.pt")))


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.safetensors", "lightning.ckpt"])
def test_truncated_anywhere_gives_the_clear_error(name, tmp_path):
    data = (FIXTURES / name).read_bytes()
    path = tmp_path / "cut.ckpt"
    for length in sorted({*range(0, len(data), 37), *range(40), len(data) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(TorchFileError, match=r"cut\.ckpt: "):
            read(path)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.safetensors", "lightning.ckpt"])
def test_flipped_bytes_never_raise_anything_else(name, tmp_path, monkeypatch):
    """Reads either work or raise TorchFileError; checksums are put aside so that damage reaches the interpreter."""
    records = torch_formats._records

    def without_checksums(file):
        found = records(file)
        for record in found.values():
            record.crc = None
        return found

    monkeypatch.setattr(torch_formats, "_records", without_checksums)
    data, dice, path = (FIXTURES / name).read_bytes(), random.Random(0), tmp_path / "flipped.ckpt"
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            changed[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            for tensor in tensors(read(path)).values():
                tensor.array()
        except TorchFileError:
            refused += 1
    assert 0 < refused < 400


# ---- flatten


def test_flatten_gives_dotted_keys_and_keeps_every_leaf():
    tree = {"a": {"b": [1, (2,)]}, 3: {}, "a.b": {"0": "clash"}, "set": {1}, (1, "x"): None}
    assert flatten(tree) == {
        "a.b.0": 1, "a.b.1.0": 2, "3": {}, "a.b.0#2": "clash", "set": {1}, "(1, 'x')": None,
    }  # fmt: skip
    assert flatten(5) == {"": 5}
