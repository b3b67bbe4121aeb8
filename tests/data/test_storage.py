from pathlib import Path

import pytest

from biomass_jax.errors import StorageError
from biomass_jax.runtime.files import check_local


@pytest.mark.parametrize(
    "path", ["runs/a", "/mnt/b/runs", Path("/tmp/x"), Path("a:b"), "C:/odd", None, "", "/a/gs://b"]
)
def test_paths_are_let_through(path):
    check_local(path, "--workdir")


@pytest.mark.parametrize("path", ["gs://forest/runs/a", Path("gs://forest/runs/a"), "GS://forest/runs/a"])
def test_a_google_bucket_gives_the_mount(path):
    with pytest.raises(StorageError) as error:
        check_local(path, "--workdir")
    message = str(error.value)
    assert message.startswith("--workdir is gs://forest/runs/a; expected a path of this machine")
    assert "gcsfuse --implicit-dirs --rename-dir-limit=100000 forest /mnt/forest" in message
    assert "then give /mnt/forest/runs/a " in message


def test_an_s3_bucket_gives_its_own_mount():
    with pytest.raises(StorageError, match=r"config\.data\.path is s3://b/;.*mount-s3 .* b /mnt/b`, then give /mnt/b "):
        check_local("s3://b", "config.data.path")


def test_other_schemes_are_refused_too():
    with pytest.raises(StorageError, match="copy it here, or mount the storage, then give /mnt/h/x "):
        check_local("https://h/x", "config.data.path")
