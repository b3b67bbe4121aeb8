from pathlib import Path

import pytest

from biomass_jax.errors import UsageError
from biomass_jax.runtime import files
from biomass_jax.runtime.files import check_local


@pytest.mark.parametrize(
    "path", ["runs/a", "/mnt/b/runs", Path("/tmp/x"), Path("a:b"), "C:/odd", None, "", "/a/gs://b"]
)
def test_paths_are_let_through(path):
    check_local(path, "--workdir")


@pytest.mark.parametrize("path", ["gs://forest/runs/a", Path("gs://forest/runs/a"), "GS://forest/runs/a"])
def test_a_google_bucket_gives_the_mount(path):
    with pytest.raises(UsageError) as error:
        check_local(path, "--workdir")
    message = str(error.value)
    assert message.startswith("--workdir is gs://forest/runs/a; expected a path of this machine")
    assert "gcsfuse --implicit-dirs --rename-dir-limit=100000 forest /mnt/forest" in message
    assert "then give /mnt/forest/runs/a " in message


def test_an_s3_bucket_gives_its_own_mount():
    with pytest.raises(UsageError, match=r"config\.data\.path is s3://b/;.*mount-s3 .* b /mnt/b`, then give /mnt/b "):
        check_local("s3://b", "config.data.path")


def test_other_schemes_are_refused_too():
    with pytest.raises(UsageError, match="copy it here, or mount the storage, then give /mnt/h/x "):
        check_local("https://h/x", "config.data.path")


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2]})
    assert path.read_text() == '{\n  "b": [\n    1,\n    2\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    with pytest.raises(KeyError), files.replacing(path, ".tif") as partial:
        assert partial.name == ".a.json.partial.tif"
        partial.write_text("half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text().startswith("{")


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("new", "old", ".old.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["old", "old/new"]


def test_checksum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_patterns_are_files_and_other_names_stay(tmp_path):
    for name in ("b.tif", "a.tif", "c.txt"):
        (tmp_path / name).touch()
    found = files.expanded([f"{tmp_path}/*.tif", "gone/*.tif", "https://host/x.tif"])
    assert found == [f"{tmp_path}/a.tif", f"{tmp_path}/b.tif", "gone/*.tif", "https://host/x.tif"]
