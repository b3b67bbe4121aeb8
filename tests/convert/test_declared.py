"""What a checkpoint, a config.yaml and flags say: taken, compared, asked for where it is missing."""

from dataclasses import replace

import pytest

from biomass_jax import bundle
from biomass_jax.convert.convert import convert, read
from biomass_jax.convert.declared import PRESETS, Options
from biomass_jax.convert.export import export
from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.errors import ConvertError
from biomass_jax.models.build import abstract_variables, build_module

TINY_FLAGS = Options(means=(1, 2, 3, 4, 5), stds=(5, 4, 3, 2, 1))


def test_the_tinys_architecture_is_read_from_its_shapes(tiny, checkpoints):
    found = read(tiny(), options=TINY_FLAGS)
    for name, value in checkpoints.TINY.items():
        assert found.architecture[name] == value
    assert found.architecture["drop_path_rate"] == 0.25
    assert found.architecture["head_dropout"] == 0.125
    assert found.input["bands"] == ["GREEN", "BLUE", "RED", "SWIR_1", "SWIR_2"]
    assert (found.input["means"], found.input["stds"]) == ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    assert set(found.provenance["num_batches_tracked"].values()) == {7}
    shapes = bundle.flatten(abstract_variables(build_module("biomass", found.architecture)))
    assert {p: leaf.shape for p, leaf in shapes.items()} == {p: a.shape for p, a in found.variables.items()}


def test_what_is_missing_is_asked_for_with_its_flag(golden):
    with pytest.raises(ConvertError) as caught:
        read(golden / "micro" / "model.pt")
    flags = ("--drop-path", "--head-dropout", "--final-act", "--bands", "--means", "--stds", "--config", "--statistics")
    assert all(flag in str(caught.value) for flag in flags)


def test_statistics_that_follow_from_the_bands_are_not_asked_for(golden):
    flags = {"drop_path": 0.3, "head_dropout": 0.1, "final_act": "relu", "statistics": "granite"}
    with pytest.raises(ConvertError, match=r"no flag gives: bands \(--bands, names in the weights' order\)$"):
        read(golden / "micro" / "model.pt", options=Options(**flags))
    with pytest.raises(ConvertError, match=r"no flag gives: stds \(--stds, [^;]*\)$"):
        given = flags | {"bands": BAND_NAMES, "statistics": None, "means": (1.0,) * 6}
        read(golden / "micro" / "model.pt", options=Options(**given))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!DOCTYPE html><html>sign in</html>", "is an HTML page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        ("trainer: {max_epochs: 3}\nseed: 1\n", r"has neither model\.init_args\.model_args nor .*found trainer, seed"),
    ],
)
def test_a_config_that_is_no_trainings_is_the_cause_that_is_named(golden, tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConvertError, match=rf"config\.yaml: {words}"):
        read(golden / "micro" / "model.pt", config=tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [("fill", "none"), ("sensors", "L30"), ("pixel_size", 0), ("units", 3), ("bands", ["a", 1]), ("other", 1)],
)
def test_what_an_export_kept_is_checked(tiny, name, value):
    part = "output" if name in ("bands", "units") else "input"
    path = tiny(datamodule_hyper_parameters={"biomass_jax": {part: {name: value}}})
    with pytest.raises(ConvertError, match=rf"{part}\.{name} is .*; expected "):
        read(path, options=TINY_FLAGS)


def test_a_flag_that_contradicts_what_an_export_kept_is_an_error(tiny):
    path = tiny(datamodule_hyper_parameters={"biomass_jax": {"input": {"fill": 0, "sensors": ["L30"]}}})
    assert read(path, options=replace(TINY_FLAGS, fill=0.0, sensors=("L30",))).input["fill"] == 0
    for change in ({"fill": -1.0}, {"sensors": ("S30",)}):
        with pytest.raises(ConvertError, match=r"contradicts the checkpoint, which was exported with "):
            read(path, options=replace(TINY_FLAGS, **change))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("backbone_embed_dim", 16, ["embed_dim", "tensors say 12", "= 16"]),
        ("backbone_depths", [1, 2, 3, 2], ["depths", "(1, 2, 3, 1)", "[1, 2, 3, 2]"]),
        ("in_channels", 6, ["in_channels", "5", "6"]),
        ("head_learned_upscale_layers", 3, ["upscale_layers", "2", "3"]),
        ("decoder", "FCNDecoder", ["FCNDecoder", "UperNetDecoder"]),
        ("decoder_align_corners", False, ["align_corners", "True"]),
        ("decoder_pool_scales", [1, 2, 3], ["3", "4 pooling modules"]),
        ("head_final_act", "torch.nn.Sigmoid", ["torch.nn.Sigmoid", "torch.nn.ReLU"]),
        ("head_dropout", "a lot", ["head_dropout", "a lot"]),
        ("bands", ["BLUE", "GREEN", "RED", "SWIR_1", "B99"], ["B99", "NIR_NARROW"]),
        ("bands", ["BLUE", "GREEN", "RED", "SWIR_1"], ["4 bands", "5 channels"]),
    ],
)
def test_a_declaration_that_contradicts_the_weights_is_an_error(tiny, checkpoints, name, value, words):
    arguments = checkpoints.model_args(checkpoints.TINY) | {name: value}
    with pytest.raises(ConvertError) as caught:
        read(tiny(arguments=arguments), options=TINY_FLAGS)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_flag_that_contradicts_the_checkpoint_is_an_error(tiny):
    with pytest.raises(ConvertError, match=r"--drop-path 0.5 contradicts .*backbone_drop_path_rate = 0.25"):
        read(tiny(), options=replace(TINY_FLAGS, drop_path=0.5))
    bands = Options(bands=("BLUE", "GREEN", "RED", "SWIR_1", "SWIR_2"), means=(1,) * 5, stds=(1,) * 5)
    with pytest.raises(ConvertError, match=r"bands are .*--bands and .*model_args"):
        read(tiny(), options=bands)


def test_no_final_activation_moves_the_maps_nodata(tiny, checkpoints, tmp_path):
    arguments = checkpoints.model_args(checkpoints.TINY) | {"head_final_act": None}
    convert(tiny(arguments=arguments), tmp_path / "bundle", options=TINY_FLAGS)
    meta = bundle.read_meta(tmp_path / "bundle")
    assert meta["architecture"]["final_relu"] is False
    assert meta["output"]["nodata"] == -9999


def test_unknown_arguments_that_may_matter_are_reported(tiny, checkpoints):
    arguments = checkpoints.model_args(checkpoints.TINY) | {"head_channel_list": [3], "pretrained": False}
    assert read(tiny(arguments=arguments), options=TINY_FLAGS).unchecked == ["head_channel_list=[3]"]


# config.yaml

CONFIG = """\
trainer: {max_epochs: 300, logger: !!python/object/apply:os.system ["touch HACKED"]}
data:
  class_path: GenericNonGeoPixelwiseRegressionDataModule
  init_args:
    batch_size: 64
    dataset_bands: [-1, BLUE, GREEN, RED, NIR_NARROW, SWIR_1, SWIR_2, -1]
    output_bands: [BLUE, GREEN, RED, NIR_NARROW, SWIR_1, SWIR_2]
    means: [547.36707, 898.5121, 1020.9082, 2665.5352, 2340.584, 1610.1407]
    stds: [411.4701, 558.54065, 815.94025, 812.4403, 1113.7145, 1067.641]
    no_label_replace: -1
    no_data_replace: 0
model:
  class_path: terratorch.tasks.PixelwiseRegressionTask
  init_args:
    model_args:
      backbone_drop_path_rate: 0.3
      decoder_channels: 8
      bands: [BLUE, GREEN, RED, NIR_NARROW, SWIR_1, SWIR_2]
      head_dropout: 0.16194593880230534
      head_final_act: torch.nn.ReLU
"""


def test_a_config_gives_what_bare_weights_lack(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    found = read(golden / "micro" / "model.pt", config=tmp_path / "config.yaml")
    assert tuple(found.input["means"]) == PRESETS["granite"].means
    assert tuple(found.input["stds"]) == PRESETS["granite"].stds
    assert found.input["sensors"] == ["L30"]  # told by the published statistics
    assert found.input["bands"] == list(BAND_NAMES)
    assert found.architecture["drop_path_rate"] == 0.3
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("no_data_replace: 0", "no_data_replace: -1", "no_data_replace is -1"),
        ("decoder_channels: 8", "decoder_channels: 9", "tensors say 8.*= 9"),
        ("output_bands: [BLUE, GREEN", "output_bands: [GREEN, BLUE", "bands are"),
        ("means: [547.36707, ", "means: [", "5 means"),
        ("stds: [411.4701", "stds: [0.0", "above 0"),
        ("means: [547.36707", "means: [many", "many.*finite numbers"),
        ("means: [547.36707", "means: [.nan", "nan.*finite numbers"),
        ("data:", "data: [", "no YAML"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(golden, tmp_path, old, new, words):
    (tmp_path / "config.yaml").write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ConvertError, match=words):
        read(golden / "micro" / "model.pt", config=tmp_path / "config.yaml")


# As the model of canopy height is called, with statistics of its own.
HEIGHT_CONFIG = CONFIG.replace("547.36707", "500.25").replace("411.4701", "400.5")


def canopy_height(golden, folder):
    """The weights under the released name, and their config.yaml."""
    weights = folder / "granite-geospatial-canopyheight" / "pytorch_model.bin"
    weights.parent.mkdir()
    weights.write_bytes((golden / "micro" / "model.pt").read_bytes())
    (folder / "config.yaml").write_text(HEIGHT_CONFIG)
    return weights, folder / "config.yaml"


def test_a_model_of_canopy_height_becomes_a_bundle_in_metres(golden, tmp_path):
    weights, config = canopy_height(golden, tmp_path)
    convert(weights, tmp_path / "bundle", config=config, options=Options(label="canopy_height"))
    made = bundle.load(tmp_path / "bundle")
    bins = [[0, 10], [10, 20], [20, 30], [0, 30], [30, None]]
    told = {"bands": ["canopy_height"], "units": "m", "nodata": -1, "top": 150.0, "bins": bins}
    assert made.meta["output"] == told
    assert (made.label.title, made.bands) == ("Canopy height", BAND_NAMES)
    assert made.meta["input"]["means"][0] == 500.25 and made.meta["input"]["stds"][0] == 400.5
    plain = bundle.load(converted_biomass(golden, tmp_path))  # the same weights as biomass give the same numbers
    assert plain.meta["output"] == {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1}
    assert plain.weights_sha256 == made.weights_sha256
    export(tmp_path / "bundle", tmp_path / "back.ckpt")
    assert read(tmp_path / "back.ckpt").output == {"bands": ["canopy_height"], "units": "m", "nodata": -1}


def converted_biomass(golden, folder):
    convert(golden / "micro" / "model.pt", folder / "plain", config=folder / "config.yaml")
    return folder / "plain"


def test_what_a_model_of_canopy_height_gives_has_to_be_said(golden, tmp_path):
    weights, config = canopy_height(golden, tmp_path)
    for options, words in (
        (Options(), r"a model of canopy height by its name; give --label canopy_height, or agbd"),
        (Options(label="rh198"), "--label is 'rh198'; expected agbd, canopy_height, or a relative height rh0 to rh100"),
        (Options(label="canopy_height", statistics="granite"), "granite are those of granite-geospatial-biomass"),
    ):
        given = None if options.statistics else config
        flags = replace(options, drop_path=0.3, head_dropout=0.1, final_act="relu", bands=BAND_NAMES)
        with pytest.raises(ConvertError, match=words):
            read(weights, config=given, options=options if given else flags)


def test_config_and_checkpoint_must_agree(golden, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("rate: 0.3", "rate: 0.1"))
    with pytest.raises(ConvertError, match=r"backbone_drop_path_rate is 0.3 in .* and 0.1 in .*config.yaml"):
        read(golden / "ckpt_micro_cli" / "state_dict.ckpt", config=tmp_path / "config.yaml")


def test_statistics_given_twice_must_agree(golden, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    options = Options(means=(1.0,) * 6)
    with pytest.raises(ConvertError, match=r"means are \[1.0.* in --means and .*config.yaml"):
        read(golden / "micro" / "model.pt", config=tmp_path / "config.yaml", options=options)


def test_a_presets_statistics_follow_the_weights_band_order(tiny):
    found = read(tiny(), options=Options(statistics="granite"))
    assert found.input["bands"][:2] == ["GREEN", "BLUE"]
    assert found.input["means"] == [898.5121, 547.36707, 1020.9082, 2340.584, 1610.1407]
