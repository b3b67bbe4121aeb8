"""`biomass-jax merge`: an adapter and its base become a plain bundle, and stay as they are."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from biomass_jax import bundle, cli
from biomass_jax.trees import flatten
from tests.prediction.stubs import random_adapter, random_bundle

pytestmark = pytest.mark.slow
SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 4}


def digests(folder):
    """SHA-256 of each file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 3
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    random_bundle(folder / "base", **SMALL, final_relu=False)
    random_adapter(folder / "adapter", folder / "base")
    return folder


def test_the_whole_model_is_written_and_nothing_else_changes(made, tmp_path, capsys):
    before = digests(made)
    words = ["merge", "--adapter", str(made / "adapter"), "--output", str(tmp_path / "merged")]
    assert cli.main(words) == 0
    assert digests(made) == before
    sha256 = bundle.read_meta(made / "adapter")["weights_sha256"]
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}: a plain bundle, weights {sha256}\n"
    merged, adapter = bundle.load(tmp_path / "merged"), bundle.load(made / "adapter")
    assert "adapter" not in bundle.read_meta(tmp_path / "merged") and merged.weights_sha256 == sha256
    for name, leaf in flatten(adapter.variables).items():
        np.testing.assert_array_equal(flatten(merged.variables)[name], leaf)
    for field in ("task", "architecture", "input", "output", "training"):
        assert merged.meta[field] == adapter.meta[field]
    known = {"adapter": str(made / "adapter"), "base_sha256": bundle.read_meta(made / "base")["weights_sha256"]}
    assert known.items() <= merged.meta["provenance"].items()
    bundle.verify(tmp_path / "merged")
    assert cli.main(words) == 1
    assert "merged: already exists; choose another folder or ask to overwrite it" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite", "--base", str(made / "base")]) == 0


def test_what_is_no_adapter_or_damaged_is_refused(made, tmp_path, capsys):
    output = ["--output", str(tmp_path / "merged")]
    assert cli.main(["merge", "--adapter", str(made / "base"), *output]) == 1
    assert "base: is a whole model and no adapter; nothing is to be merged" in capsys.readouterr().err
    shutil.copytree(made, tmp_path / "both")
    other = random_bundle(tmp_path / "other", seed=3, **SMALL, final_relu=False)
    file = other / "bundle.json"
    sha256 = bundle.read_meta(made / "base")["weights_sha256"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": sha256}))
    assert cli.main(["merge", "--adapter", str(tmp_path / "both" / "adapter"), "--base", str(other), *output]) == 1
    assert "the arrays of the adapter or of its base are damaged" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
