"""The task of a config, with its module and its input statistics, and what a bundle made of it says of itself."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from biomass_jax.bundle import PIXEL_SIZE, Bundle, software_versions
from biomass_jax.data import bands, sources
from biomass_jax.data.raster.chips import record_grid
from biomass_jax.data.raster.resample import fits
from biomass_jax.errors import ConfigError, DataError
from biomass_jax.models.build import architecture_of, build_module
from biomass_jax.models.swin import VARIANTS, SwinFields
from biomass_jax.tasks.base import InputStatistics, Task
from biomass_jax.tasks.regression import Regression
from biomass_jax.tasks.simmim import Pretraining

log = logging.getLogger(__name__)

LABEL = {"name": "agbd", "units": "Mg ha-1"}  # of GeoTIFF folders, which don't say
REFERENCE_DEGREES = 30.0


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
    about = {
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
        "training": {"dataset": str(info.path), "season": info.season},
        "provenance": {
            "source": str(config.init_from or "trained from random weights"),
            "sha256": loaded.weights_sha256 if loaded else None,
            "command": command,
            "versions": software_versions(),
        },
    }
    return task, about


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
    module = build_module("biomass", architecture(config, "biomass", loaded), config.dtype, remat=config.model.remat)
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
        augment=tuple(sorted(augment.items())),
        reference=reference,
    )
    label = train.info.metadata.get("label", LABEL)
    nodata = -1 if module.final_relu else -9999  # a model without the ReLU may say -1 itself
    return task, {"bands": [label["name"]], "units": label["units"], "nodata": nodata}


def pretraining(
    config: ConfigDict, statistics: InputStatistics, train: sources.Source, loaded: Bundle | None
) -> tuple[Task, dict[str, Any]]:
    """Pretraining: the task, and `output` of its bundles."""
    fields = architecture(config, "simmim", loaded)
    module = build_module("simmim", fields, config.dtype, remat=config.model.remat)
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
    given = {name: value for name, value in group.items() if name not in ("variant", "remat") and value is not None}
    return fields | {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
