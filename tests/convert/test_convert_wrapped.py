"""Checkpoints as training programs leave them: wrapped, nested, with losses and metrics beside the model."""

import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.convert import architecture, torch_file
from biomass_jax.convert.convert import convert, read
from biomass_jax.convert.declared import Options
from biomass_jax.convert.torch_file import write as torch_write
from biomass_jax.errors import ConvertError

FIXTURES = Path(__file__).parent / "fixtures"
TINY_FLAGS = Options(means=(1, 2, 3, 4, 5), stds=(5, 4, 3, 2, 1))
BARE_FLAGS = Options(
    drop_path=0.25,
    head_dropout=0.125,
    final_act="relu",
    bands=("GREEN", "BLUE", "RED", "SWIR_1", "SWIR_2"),
    means=TINY_FLAGS.means,
    stds=TINY_FLAGS.stds,
)


@pytest.fixture(scope="module")
def plain(checkpoints, tmp_path_factory):
    """(the state dict without any prefix, what the converter makes of it)."""
    state = checkpoints.random_state(checkpoints.granite_shapes(**checkpoints.TINY))
    state = {key.removeprefix("model."): array for key, array in state.items()}
    path = tmp_path_factory.mktemp("plain") / "plain.pt"
    torch_write.write(path, state)
    return state, read(path, options=BARE_FLAGS).variables


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


PREFIXES = [
    *("".join(f"{part}." for part in parts) for parts in permutations(("_orig_mod", "module", "model"))),
    "model.model.",
    "net._orig_mod.",
    "_forward_module.module.module._orig_mod.model.",
    "_fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_are_taken_off_in_any_order(plain, tmp_path, prefix):
    state, expected = plain
    torch_write.write(tmp_path / "x.pt", {f"{prefix}{key}": array for key, array in state.items()})
    found = read(tmp_path / "x.pt", options=BARE_FLAGS)
    assert_same(found.variables, expected)
    assert found.keys.wrappers == dict.fromkeys(prefix.split(".")[:-1], len(state))


def test_a_wrapped_part_inside_the_model_is_found_too(plain, tmp_path):
    state, expected = plain
    inside = {re.sub(r"^encoder\.", "encoder._orig_mod.module.", key): array for key, array in state.items()}
    torch_write.write(tmp_path / "x.pt", {f"model.{key}": array for key, array in inside.items()})
    assert_same(read(tmp_path / "x.pt", options=BARE_FLAGS).variables, expected)


@pytest.mark.parametrize(
    "places", [["model"], ["model_state_dict"], ["net"], ["state_dict"], ["model", "state_dict"], ["module"]]
)
def test_the_state_dict_is_found_under_the_names_that_programs_use(plain, tmp_path, places):
    state, expected = plain
    root = state
    for place in reversed(places):
        # A config under another of the names holds no tensors and is no second state dict.
        root = {place: root, "optimizer": {"state": {}, "param_groups": []}, "network": {"name": "swin"}, "epoch": 3}
    torch_write.write(tmp_path / "x.pt", root)
    found = read(tmp_path / "x.pt", options=BARE_FLAGS)
    assert found.under == places
    assert_same(found.variables, expected)


def test_one_key_in_two_spellings_is_still_an_error(plain, tmp_path):
    state, _ = plain
    torch_write.write(tmp_path / "x.pt", state | {"module.head.head.2.bias": state["head.head.2.bias"]})
    with pytest.raises(ConvertError, match=r"duplicate tensors: head\.head\.2\.bias = module\.head\.head\.2\.bias"):
        read(tmp_path / "x.pt", options=BARE_FLAGS)


LOSSES = (
    "criterion.weight",
    "module.criterion.weight",
    "model.loss_fn.0.pos_weight",
    "perceptual_loss.vgg.0.weight",
    "train_metrics.RMSE.sum_squared_error",
    "val_metrics.MSE.total",
    "test_rmse.total",
    "metrics.mae.sum_abs_error",
    "n_averaged",
)


def test_what_belongs_to_losses_and_metrics_is_dropped_and_told(tiny, tmp_path, monkeypatch):
    expected = read(tiny(), options=TINY_FLAGS).variables
    path = tiny(lambda state: state.update({key: np.ones(2, np.float32) for key in LOSSES}))
    # Writing the bundle would cost a compilation.
    monkeypatch.setattr(bundle, "save", lambda path, *_, **__: path)
    monkeypatch.setattr(bundle, "read_meta", lambda _: {"weights_sha256": ""})
    lines = dict(convert(path, tmp_path / "bundle", options=TINY_FLAGS))
    found = read(path, options=TINY_FLAGS)
    assert found.keys.losses == found.provenance["unused"] == list(LOSSES)
    assert_same(found.variables, expected)
    assert "of losses and metrics: criterion.weight, " in lines["dropped"]
    assert lines["dropped"].endswith("metrics.RMSE.sum_squared_error ... and 4 more (9 in all)")
    assert lines["unwrapped"].startswith("the state dict under state_dict, model. off ")


@pytest.mark.parametrize("key", ["metric_head.weight", "lossless.weight", "pixel_mean", "ema.encoder.norm.bias"])
def test_what_may_be_part_of_the_model_is_not_dropped(tiny, key):
    path = tiny(lambda state: state.update({key: np.ones(2, np.float32)}))
    with pytest.raises(ConvertError, match=f"unknown tensors: {re.escape(key)}$"):
        read(path, options=TINY_FLAGS)


# Files without a state dict


def test_a_whole_model_is_named_with_what_to_do():
    with pytest.raises(ConvertError, match=r"whole\.pt: holds a whole pickled model \(\S*Model\) instead") as caught:
        read(FIXTURES / "whole.pt")
    advice = "torch.save(torch.load('whole.pt', map_location='cpu', weights_only=False).state_dict(), 'weights.pt')"
    assert advice in str(caught.value)
    model = torch_file.read(FIXTURES / "whole.pt").root
    for root, place in (({"epoch": 3, "model": model}, "['model']"), ({"a": [model]}, "['a'][0]")):
        with pytest.raises(ConvertError) as caught:
            architecture.state_dict(root, "x.pt")
        assert f"weights_only=False){place}.state_dict()" in str(caught.value)


def test_an_optimisers_state_is_no_model(tmp_path):
    state = torch_file.read(FIXTURES / "optimizer.pt").root
    extra = torch_file.read(FIXTURES / "zip.pt").root["views"]["base"]
    roots = (state, {"optimizer": state, "epoch": 1}, {"optimizer_state_dict": state, "best_loss": extra})
    for root in roots:
        with pytest.raises(ConvertError, match=r"^x\.pt: holds an optimiser's state and no weights .*state_dict$"):
            architecture.state_dict(root, "x.pt")
    adam = torch_file.Placeholder("torch.optim.adamw.AdamW", ())
    with pytest.raises(ConvertError, match="optimiser's state and no weights"):
        architecture.state_dict(adam, "x.pt")


def test_other_things_than_a_state_dict_are_named():
    tensor = torch_file.read(FIXTURES / "zip.pt").root["views"]["base"]
    numpy = torch_file.Placeholder("numpy._core.multiarray._reconstruct", ())
    quantised = {"encoder.0.scale": tensor, "encoder.0._packed_params._packed_params": (1, None)}
    for root, words in (
        (tensor, "a single tensor of shape"),
        (torch_file.Placeholder("argparse.Namespace", ()), "an object of the class argparse.Namespace"),
        ({"model": {"a.weight": numpy}}, "NumPy arrays instead of tensors"),
        (
            {"ema": {"a.weight": tensor}, "epoch": 3},
            r"tensors under ema.*torch\.load\('x\.pt'\)\['ema'\], 'weights\.pt'",
        ),
        (quantised, "is a quantised model"),
    ):
        with pytest.raises(ConvertError, match=words):
            architecture.state_dict(root, "x.pt")


def test_names_that_are_no_file_say_why(tmp_path):
    url = "https://huggingface.co/ibm-granite/granite-geospatial-biomass/{}/biomass_model.ckpt"
    with pytest.raises(ConvertError, match=r"is a URL.* or give hf://ibm-granite/\S+-biomass/biomass_model\.ckpt$"):
        read(url.format("blob/main"))
    with pytest.raises(ConvertError, match=r"hf://ibm-granite/\S+-biomass@v1/biomass_model\.ckpt$"):
        read(url.format("resolve/v1") + "?download=true")
    with pytest.raises(ConvertError, match=r"is a URL; download the file and give its path$"):
        read("https://example.com/model.ckpt")
    torch_write.write(tmp_path / "model-00001-of-00002.bin", {"a.b": np.zeros(1, np.float32)})
    with pytest.raises(ConvertError, match=r"is part 1 of a model in 2 files; make one file of them"):
        read(tmp_path / "model-00001-of-00002.bin")
    with pytest.raises(ConvertError, match="no such file"):
        read(tmp_path / "nothing.pt")
