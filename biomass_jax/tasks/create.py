"""The task of a config, with its module and its input statistics, and what a bundle made of it says of itself."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from biomass_jax.adapter import Adapter
from biomass_jax.bundle import PIXEL_SIZE, Bundle, software_versions
from biomass_jax.data import bands, sources
from biomass_jax.data.raster.chips import record_grid
from biomass_jax.data.raster.resample import fits
from biomass_jax.errors import ConfigError, DataError
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.models.build import architecture_of, build_module
from biomass_jax.models.fused.choice import check_here
from biomass_jax.models.lora import TARGETS, Lora
from biomass_jax.models.swin import VARIANTS, SwinFields
from biomass_jax.tasks import losses
from biomass_jax.tasks.base import InputStatistics, Task
from biomass_jax.tasks.regression import Regression
from biomass_jax.tasks.simmim import Pretraining

log = logging.getLogger(__name__)

REFERENCE_DEGREES = 30.0
# What a spread adds to a bundle's output bands, after the label's name.
SPREAD_BANDS = {"none": (), "gaussian": ("_sd",), "laplace": ("_sd",), "quantiles": ("_lo", "_hi")}
# Fields of a module that leave the mean of given weights as it is.
_NOT_OF_THE_MEAN = {"spread", "spread_scale", "quantile_levels", "drop_path_rate", "head_dropout"}
# Fields of `config.model` that are none of the architecture.
_NO_ARCHITECTURE = {"variant", "remat", "attention"}


def choose(
    config: ConfigDict, train: sources.Source, loaded: Bundle | None, *, command: str
) -> tuple[Task, dict[str, Any]]:
    """The task of `config.mode`.

    Args:
        config: of a training run.
        train: training chips, for their statistics and their names.
        loaded: the bundle of `config.init_from`.
        command: that started the run.

    Returns:
        the task, and the arguments of `bundle.save` that are known before training.

    Raises:
        ConfigError: fields that don't fit.
        DataError: chips of another pixel size than the loaded bundle's.
    """
    if loaded is not None and "members" in loaded.meta["architecture"]:
        raise ConfigError(
            f"config.init_from: {loaded.path} is an ensemble, which isn't trained further; begin from one of its "
            "members, which its bundle.json names under provenance.members"
        )
    if loaded is not None:
        check_pixel_size(train, loaded)
    # The reference counts pixels of no data that are 0 into its statistics.
    means, stds, kind = choose_statistics(
        config.data, bands.BAND_NAMES, loaded=loaded, training=lambda: train, reference=config.get("reference", False)
    )
    log.info("statistics (%s): means %s, stds %s", kind, np.round(means, 1), np.round(stds, 1))
    statistics = InputStatistics(train.info.fill, means, stds)
    make = pretraining if config.mode == "pretrain" else regression
    task, output = make(config, statistics, train, loaded)
    info = train.info
    about: dict[str, Any] = {
        "task": "simmim" if config.mode == "pretrain" else "biomass",
        "architecture": architecture_of(task.module),
        "input": {
            "bands": list(bands.BAND_NAMES),
            "units": bands.UNITS,
            "fill": info.fill,
            "means": statistics.means.tolist(),
            "stds": statistics.stds.tolist(),
            "sensors": list(info.sensors),
            "no_data_rule": bands.NO_DATA_RULE,
            "pixel_size": pixel_size(train),
        },
        "output": output,
        "training": {"dataset": str(info.path), "season": info.season, "seed": config.seed} | _draw(config),
        "provenance": {
            "source": str(config.init_from or "trained from random weights"),
            "sha256": loaded.weights_sha256 if loaded else None,
            "command": command,
            "versions": software_versions(),
        },
    }
    lora = chosen_lora(config)
    if lora is not None and loaded is not None:
        about["adapter"] = Adapter.of(loaded.path, loaded.weights_sha256, loaded.variables, lora)
    return task, about


def _draw(config: ConfigDict) -> dict[str, int]:
    """For `training` of a bundle: which draw of the training chips was learnt from; {} where all were."""
    seed = config.data.get("bootstrap")
    return {} if seed is None else {"bootstrap": seed}


def choose_statistics(
    group: ConfigDict,
    names: Sequence[str],
    *,
    loaded: Bundle | None,
    training: Callable[[], sources.Source],
    reference: bool,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Means and stds of a model's bands: explicit ones, the bundle's where there is one, else the data set's.

    Args:
        group: `config.data`.
        names: the bands.
        loaded: the bundle whose weights are used.
        training: opens the training chips, from which the data set's come.
        reference: count pixels of no data that are 0 into them, as the original does.

    Returns:
        (bands,) float64 each, digital numbers, and which they are: `explicit`, `bundle` or `dataset`.

    Raises:
        ConfigError: what was asked for isn't there.
        DataError: no training chips to take the data set's from.
    """
    if bool(group.means) != bool(group.stds):
        raise ConfigError("config.data.means and config.data.stds go together")
    if group.means:
        if not len(group.means) == len(group.stds) == len(names) or min(group.stds) <= 0:
            raise ConfigError(f"config.data.means and stds: expected {len(names)} numbers each, stds above 0")
        return np.asarray(group.means, np.float64), np.asarray(group.stds, np.float64), "explicit"
    kind = group.statistics or ("bundle" if loaded else "dataset")
    if kind not in ("bundle", "dataset"):
        raise ConfigError(f"config.data.statistics is {kind!r}; expected 'bundle' or 'dataset'")
    if kind == "dataset":
        order = [bands.BAND_NAMES.index(name) for name in names]
        means, stds = sources.statistics_of(training(), reference=reference)
        return means[order], stds[order], kind
    if loaded is None:
        raise ConfigError("config.data.statistics is 'bundle', but config.init_from names none")
    means, stds = (np.asarray(loaded.meta["input"][name], np.float64) for name in ("means", "stds"))
    return means, stds, kind


def pixel_size(train: sources.Source) -> float:
    """Side of the first chip's pixels in metres, that of HLS where nothing tells its place."""
    size = record_grid(train[0]).pixel_size()
    return PIXEL_SIZE if size is None else round(max(size), 1)


def check_pixel_size(chips: sources.Source, loaded: Bundle) -> None:
    """Refuse chips whose pixels aren't as large as those that a bundle was trained on: 25 to 36 m for 30 m.

    Looked at is the first chip of each data set; those without a place pass.

    Raises:
        DataError: the size on the ground, and the bundle's.
    """
    starts = np.cumsum([0, *(count for count, _ in chips.shares)])[:-1]
    for index in map(int, starts):
        size = record_grid(chips[index]).pixel_size()
        if size is not None and not fits(size, loaded.pixel_size):
            raise DataError(
                f"{chips.info.path}: split {chips.info.split}, chip number {index}: its pixels are {size[0]:.4g} x "
                f"{size[1]:.4g} m on the ground, but {loaded.path} was trained on {loaded.pixel_size:g} m; give chips "
                "of that size, or a bundle trained on pixels of theirs"
            )


def regression(
    config: ConfigDict, statistics: InputStatistics, train: sources.Source, loaded: Bundle | None
) -> tuple[Task, dict[str, Any]]:
    """Fine-tuning: the task, and `output` of its bundles."""
    label = train.info.label
    if loaded is not None and loaded.task == "biomass" and config.load == "all" and loaded.label.units != label.units:
        raise ConfigError(
            f"config.init_from: {loaded.path} gives {loaded.label.name} in {loaded.label.units}, the labels of "
            f"{train.info.path} are {label.name} in {label.units}; begin from its encoder (--config.load=encoder), "
            "whose features serve both"
        )
    module = _module(config, "biomass", loaded, chosen_lora(config))
    _check_spread(config, module, loaded)
    if config.spread_only and loaded is not None:  # without a bundle `check_fields` refuses it
        _check_same_mean(module, loaded)
    augment, reference = config.augment.to_dict(), config.reference
    if reference and config.loss != "rmse":
        raise ConfigError(f"config.reference with config.loss={config.loss}: the reference's loss is rmse")
    if reference:
        augment = {
            "horizontal_only": True,
            "rotate_degrees": REFERENCE_DEGREES,
            "rotate_label": "nearest",
            "rotate_label_fill": 0.0,
        }
        log.info(
            "reference: horizontal flips and rotations within %g degrees with false zero labels at their borders, "
            "labels kept on no-data, filled bands set to 0 without their pixel's others, weight decay on every "
            "parameter, val/loss as the mean over batches",
            REFERENCE_DEGREES,
        )
    task = Regression(
        module=module,
        statistics=statistics,
        loss=config.loss,
        huber_delta=config.huber_delta,
        nll_beta=config.nll_beta,
        spread_only=config.spread_only,
        augment=tuple(sorted(augment.items())),
        reference=reference,
        label=label,
    )
    # What no ReLU has passed, quantiles among it, may be -1 itself.
    nodata = -1 if module.final_relu and module.spread != "quantiles" else -9999
    names = [label.name + suffix for suffix in ("", *SPREAD_BANDS[module.spread])]
    return task, label.output(names, nodata)


def _check_spread(config: ConfigDict, module: BiomassModel, loaded: Bundle | None) -> None:
    """Refuse a loss whose spread the model lacks, a spread that the loss doesn't train, fields that nothing reads.

    Raises:
        ConfigError: the fields, and what to set.
    """
    spread, loss, group = module.spread, config.loss, config.model
    needed = losses.SPREAD_KINDS.get(loss, "none")
    inherited = group.spread is None and spread != "none" and loaded is not None
    has = f"config.model.spread={spread}" + (f", as {loaded.path} has it" if inherited and loaded is not None else "")
    if config.spread_only and needed == "none":
        kinds = ", ".join(losses.SPREAD_KINDS)
        raise ConfigError(
            f"config.spread_only with config.loss={loss}, which trains no spread; expected one of {kinds}"
        )
    if needed == "none" and spread != "none":
        kinds = " or ".join(kind for kind, one in losses.SPREAD_KINDS.items() if one == spread)
        raise ConfigError(
            f"config.loss={loss} doesn't train what {has} adds; set --config.loss={kinds}, or "
            "--config.model.spread=none"
        )
    if needed != spread:
        raise ConfigError(
            f"config.loss={loss} needs config.model.spread={needed}, found {has}; add --config.model.spread={needed}, "
            "or choose another loss"
        )
    for name, where in (("spread_scale", tuple(losses.SPREAD_KINDS.values())), ("quantile_levels", ("quantiles",))):
        if group[name] is not None and spread not in where:
            raise ConfigError(f"config.model.{name} with {has}: nothing reads it; leave it out")


def _check_same_mean(module: BiomassModel, loaded: Bundle) -> None:
    """Refuse fields that would change the mean of a bundle whose spread alone is trained.

    Raises:
        ConfigError: the field.
    """
    before, now = architecture_of(loaded.module()), architecture_of(module)
    for name in sorted(set(now) - _NOT_OF_THE_MEAN):
        if now[name] != before.get(name):
            raise ConfigError(
                f"config.spread_only with config.model.{name}={now[name]}: {loaded.path} has {before.get(name)}, and "
                "its mean has to stay as it is; leave the field out, or train without spread_only"
            )


def pretraining(
    config: ConfigDict, statistics: InputStatistics, train: sources.Source, loaded: Bundle | None
) -> tuple[Task, dict[str, Any]]:
    """Pretraining: the task, and `output` of its bundles."""
    module = _module(config, "simmim", loaded)
    group = config.augment
    size = (group.size, group.size) if group.crop else train.info.image_shape[:2]
    for name, side in (("config.mask_patch_size", config.mask_patch_size), ("encoder_stride", module.encoder_stride)):
        if side < 1 or any(length % side for length in size):
            raise ConfigError(f"{name} is {side} px; expected a divisor of the images' sides, {size[0]} x {size[1]} px")
    task = Pretraining(
        module=module,
        statistics=statistics,
        size=group.size,
        crop_scale=tuple(group.crop_scale) if group.crop else None,
        crop_ratio=tuple(group.crop_ratio),
        mask_patch_size=config.mask_patch_size,
        mask_ratio=config.mask_ratio,
        skip_nodata=config.skip_nodata,
        normalize_targets=config.normalize_targets,
        seed=config.seed,
    )
    return task, {"bands": list(bands.BAND_NAMES), "units": "z-scores", "nodata": None}


def chosen_lora(config: ConfigDict) -> Lora | None:
    """The updates that a run trains; None where it trains weights.

    Raises:
        ConfigError: layers that can't be adapted.
    """
    group = config.get("lora")
    if group is None or not group.rank:
        return None
    targets = tuple(group.targets)
    if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(TARGETS):
        raise ConfigError(f"config.lora.targets is {targets}; expected some of {', '.join(TARGETS)}, each once")
    return Lora(group.rank, group.alpha, targets, group.dropout)


def _module(config: ConfigDict, task: str, loaded: Bundle | None, lora: Lora | None = None) -> Any:
    group = config.model
    check_here(group.attention, "config.model.attention")
    fields = architecture(config, task, loaded)
    how = {"remat": group.remat, "attention": group.attention, "lora": lora}
    return build_module(task, fields, config.dtype, **how)


def architecture(config: ConfigDict, task: str, loaded: Bundle | None) -> dict[str, Any]:
    """Fields of the module: the variant's, over them the bundle's, over them those that the config gives.

    Of a bundle of another task, or with `load='encoder'`, only the encoder's fields count.
    """
    group = config.model
    fields: dict[str, Any] = dict(VARIANTS[group.variant])
    if loaded is not None:
        whole = config.load == "all" and loaded.task == task
        # Drop path belongs to the training, not to the weights: a pretrained encoder has none.
        encoder = {field.name for field in dataclasses.fields(SwinFields)} - {"drop_path_rate"}
        fields |= {name: value for name, value in loaded.meta["architecture"].items() if whole or name in encoder}
    given = {name: value for name, value in group.items() if name not in _NO_ARCHITECTURE and value is not None}
    return fields | {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
