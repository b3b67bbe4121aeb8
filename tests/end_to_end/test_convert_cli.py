"""`python -m biomass_jax.convert` from the user's side."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert.__main__ import main
from biomass_jax.runtime.lock import lock_beside, one_writer

pytestmark = pytest.mark.slow  # many, of a second and more each

FULL, WEIGHTS = "lightning.ckpt", "state_dict.ckpt"


@pytest.fixture(scope="module")
def bundles(golden, tmp_path_factory):
    """Both real Lightning files converted; the text that was printed is kept."""
    folder = tmp_path_factory.mktemp("bundles")
    texts = {}
    for name in (FULL, WEIGHTS):
        out, sys.stdout = sys.stdout, io.StringIO()
        try:
            source = str(golden / "ckpt_micro_cli" / name)
            assert main(["--input", source, "--output", str(folder / name), "--statistics", "granite"]) == 0
            texts[name] = sys.stdout.getvalue()
        finally:
            sys.stdout = out
    return folder, texts


def test_both_real_files_become_bundles_of_equal_weights(bundles):
    folder, texts = bundles
    metas = [bundle.read_meta(folder / name) for name in (FULL, WEIGHTS)]
    assert metas[0]["weights_sha256"] == metas[1]["weights_sha256"]
    assert metas[0]["check"] == metas[1]["check"]
    assert metas[0]["output"] == {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1}
    assert metas[0]["provenance"]["sha256"] != metas[1]["provenance"]["sha256"]
    assert metas[0]["provenance"]["command"].endswith("--statistics granite")
    for name, meta in zip((FULL, WEIGHTS), metas, strict=True):
        rows = dict(line.split(maxsplit=1) for line in texts[name].splitlines())
        assert rows["layout"].startswith("granite")
        assert rows["tensors"] == "171 trainable, 28 running statistics"
        assert rows["parameters"] == "125,327"
        assert rows["sha256"] == meta["provenance"]["sha256"]
        assert rows["weights"] == meta["weights_sha256"]
        assert rows["bundle"] == str(folder / name)
    assert "AdamW at step 6" in texts[FULL]
    assert "AdamW" not in texts[WEIGHTS]


def test_the_optimiser_lies_in_its_own_folder(bundles):
    folder, _ = bundles
    state = bundle.load_optimizer(bundle.load(folder / FULL))
    assert int(state["count"]) == 6
    assert float(state["plateau"]["patience"]) == 10
    assert float(np.abs(state["mu"]["head"]["final"]["kernel"]).max()) > 0
    assert not (folder / WEIGHTS / "optimizer").exists()


def test_verify_recomputes_the_check(bundles, capsys):
    folder, _ = bundles
    assert main(["--verify", str(folder / WEIGHTS)]) == 0
    assert "agrees" in capsys.readouterr().out


def test_verify_notices_another_output(bundles, tmp_path, capsys):
    folder, _ = bundles
    meta = bundle.read_meta(folder / WEIGHTS)
    meta["check"]["mean"] += 0.001 * max(abs(meta["check"]["min"]), abs(meta["check"]["max"]))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "variables").symlink_to(folder / WEIGHTS / "variables")
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(meta))
    assert main(["--verify", str(tmp_path / "bundle")]) == 1
    assert "'mean'" in capsys.readouterr().err


def test_inspect_lists_tensors_and_values(golden, capsys):
    assert main(["--inspect", str(golden / "ckpt_micro_cli" / FULL)]) == 0
    text = capsys.readouterr().out
    assert "model.encoder.patch_embed.projection.weight" in text
    assert "float32   (8, 6, 4, 4)" in text
    assert "hyper_parameters.model_args.backbone" in text
    assert "optimizer_states.0.state.0.exp_avg" in text


def test_there_and_back_gives_the_same_weights(bundles, tmp_path, capsys):
    folder, _ = bundles
    assert main(["--input", str(folder / WEIGHTS), "--output", str(tmp_path / "m.ckpt"), "--to", "torch"]) == 0
    assert main(["--input", str(tmp_path / "m.ckpt"), "--output", str(tmp_path / "bundle")]) == 0
    assert bundle.read_meta(tmp_path / "bundle")["weights_sha256"] in capsys.readouterr().out
    digests = {bundle.read_meta(path)["weights_sha256"] for path in (tmp_path / "bundle", folder / WEIGHTS)}
    assert len(digests) == 1


def fails(arguments, capsys, *words):
    assert main([str(argument) for argument in arguments]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    for word in words:
        assert word in text, text


def test_an_existing_bundle_is_kept_unless_told_otherwise(bundles, golden, capsys):
    folder, _ = bundles
    before = (folder / WEIGHTS / "bundle.json").read_bytes()
    arguments = ["--input", golden / "ckpt_micro_cli" / FULL, "--output", folder / WEIGHTS, "--statistics", "granite"]
    fails(arguments, capsys, "--overwrite")
    assert (folder / WEIGHTS / "bundle.json").read_bytes() == before


def test_a_bundle_given_as_a_checkpoint_is_told_what_to_do(bundles, tmp_path, capsys):
    folder, _ = bundles
    fails(["--input", folder / WEIGHTS, "--output", tmp_path / "x"], capsys, "--to torch")


def test_a_truncated_file_leaves_nothing(golden, tmp_path, capsys):
    data = (golden / "ckpt_micro_cli" / WEIGHTS).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    fails(["--input", tmp_path / "cut.ckpt", "--output", tmp_path / "b", "--statistics", "granite"], capsys, "cut.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.ckpt"]


class _Command:
    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


def test_a_pickle_that_would_run_a_command_is_refused_and_not_run(golden, tmp_path, capsys):
    command = _Command(f"touch {tmp_path / 'HACKED'}")
    with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": command}, protocol=2))
        archive.writestr("archive/version", "3\n")
    fails(["--input", tmp_path / "evil.ckpt", "--output", tmp_path / "b", "--statistics", "granite"], capsys, "evil")
    assert main(["--inspect", str(tmp_path / "evil.ckpt")]) == 0
    assert "system" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]


def test_files_that_are_not_there_are_errors(tmp_path, golden, capsys):
    source = golden / "ckpt_micro_cli" / WEIGHTS
    fails(["--input", tmp_path / "none.ckpt", "--output", tmp_path / "b"], capsys, "none.ckpt: no such file")
    config = ["--config", tmp_path / "none.yaml"]
    fails(["--input", source, "--output", tmp_path / "b", *config], capsys, "none.yaml: no such file")
    fails(["--verify", tmp_path / "none"], capsys, "none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--input and --output"),
        (["--input", "x"], "--input and --output"),
        (["--inspect", "x", "--output", "y"], "--inspect takes a path"),
        (["--verify", "x", "--inspect", "y"], "goes with no other flag"),
        (["--input", "x", "--output", "y", "--img-size", "96"], "--img-size: has no effect"),
        (["--input", "x", "--output", "y", "--to", "torch", "--means", "1,2"], "--means: has no effect"),
        (["--input", "x", "--output", "y", "--means", "1;2"], "expected numbers with commas"),
        (["--input", "x", "--output", "y", "--window-size", "0"], "expected a window"),
        (["--input", "x", "--output", "y", "--statistics", "mine"], "invalid choice"),
        (["--input", "x", "--output", "y", "--mean", "1"], "unrecognized"),
    ],
)
def test_usage_errors_say_what_to_give(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_the_module_runs_and_explains_itself(root):
    command = [sys.executable, "-m", "biomass_jax.convert", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for flag in ("--input", "--to", "--statistics", "--inspect", "--verify", "--window-size", "hf://"):
        assert flag in done.stdout


@pytest.mark.parametrize("more", [[], ["--to", "torch"]])
def test_two_conversions_to_one_place_do_not_run_at_once(golden, tmp_path, capsys, more):
    source = str(golden / "ckpt_micro_cli" / WEIGHTS)
    with one_writer(*lock_beside(tmp_path / "out")):
        assert main(["--input", source, "--output", str(tmp_path / "out"), *more]) == 1
        assert [path.name for path in tmp_path.iterdir()] == [".out.biomass_jax.lock"]
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: another run is at work there: process ") and said.count("\n") == 1
