"""The settings of training runs; configs/*.py derive from them, and docs/train.md lists them."""

import dataclasses

from ml_collections import ConfigDict

from biomass_jax.errors import ConfigError
from biomass_jax.runtime.settings import Range, check, group, setting

PLATEAU = "plateau"
_FROM_0, _FROM_1, _ABOVE_0 = Range(0), Range(1), Range(0, ends="()")


@dataclasses.dataclass
class ModelSettings:
    """The encoder. A field that is not given comes from the bundle of `init_from`, else from the variant."""

    variant: str = setting(
        "swin_b",
        "swin_t, swin_s, swin_b, swin_l; fields that are given below, and those of `init_from`, go before it",
        choices="biomass_jax.models.swin:VARIANTS",
    )
    embed_dim: int | None = setting(None, "channels of the first stage")
    depths: tuple[int, ...] | None = setting(None, "blocks of each stage")
    num_heads: tuple[int, ...] | None = setting(None, "of each stage")
    window_size: int | None = setting(None, "tokens")
    mlp_ratio: float | None = setting(None, "", within=_ABOVE_0)
    patch_size: int | None = setting(None, "px a token of the first stage")
    shift_single_window: bool | None = setting(
        None, "shift where the map is a single window: true for granite's weights, false for official Swin's"
    )
    drop_path_rate: float | None = setting(None, "of the last block; it grows linearly from 0", within=Range(0, 1))
    remat: tuple[int, ...] = setting((), "stages (0 to 3) computed twice to save memory: `(0,1)`")
    attention: str = setting(
        "auto",
        "fused, kernels for NVIDIA GPUs, see [speed](performance.md#kernels-for-gpus); einsum, plain JAX; auto, fused "
        "where the model runs on such GPUs and its shapes fit",
        choices="biomass_jax.models.fused.choice:CHOICES",
    )


@dataclasses.dataclass
class BiomassModelSettings(ModelSettings):
    """The encoder, decoder and head."""

    decoder_channels: int | None = setting(None, "of UPerNet")
    pool_scales: tuple[int, ...] | None = setting(None, "of UPerNet")
    upscale_layers: int | None = setting(None, "of the head")
    head_dropout: float | None = setting(None, "of whole channels", within=Range(0, 1))
    final_relu: bool | None = setting(None, "")
    output_scale: float | None = setting(
        None, "prediction = scale x last layer + offset: from random weights, the labels' std and mean save many epochs"
    )
    output_offset: float | None = setting(None, "in the label's unit")
    spread: str | None = setting(
        None,
        "what a pixel is given beside its mean: gaussian, laplace, quantiles, none; not given, the bundle's, else none",
        choices="biomass_jax.models.biomass:SPREADS",
    )
    spread_scale: float | None = setting(
        None,
        "in the label's unit, about where a fresh spread starts, and how far quantiles are apart there; 30",
        within=_ABOVE_0,
    )
    quantile_levels: tuple[float, ...] | None = setting(None, "of `spread=quantiles`, increasing; (0.05, 0.95)")


@dataclasses.dataclass
class SimMIMSettings(ModelSettings):
    """The encoder and SimMIM's decoder."""

    encoder_stride: int | None = setting(None, "px a token of the last map; 32")


@dataclasses.dataclass
class DataSettings:
    """Where chips come from."""

    path: str | None = setting(None, "shards, or folders of GeoTIFFs as published")
    bands: str | None = setting(None, "names of the GeoTIFFs' bands where they don't say, see [maps](maps.md)")
    encoding: str = setting(
        "auto",
        "what the GeoTIFFs' numbers are, see [maps](maps.md)",
        choices="biomass_jax.data.raster.encoding:ENCODINGS",
    )
    label_max: float = setting(2000.0, "the highest label that GeoTIFFs may hold, in its unit")
    label: str | None = setting(
        None, "what GeoTIFFs' labels are: agbd, canopy_height, rh98 ...; not given, what their files call it, else agbd"
    )
    statistics: str | None = setting(
        None, "bundle or dataset; not given, the bundle's where `init_from` is given", choices=("bundle", "dataset")
    )
    means: tuple[float, ...] | None = setting(None, "or explicitly, six numbers")
    stds: tuple[float, ...] | None = setting(None, "six numbers")
    verify: bool = setting(False, "compare each shard with its SHA-256, or read each GeoTIFF, before anything else")
    threads: int = setting(8, "that read chips", within=_FROM_1)
    cache: str = setting(
        "host", "device: all chips lie on the device (one process)", choices="biomass_jax.pipeline.batches:CACHES"
    )


@dataclasses.dataclass
class LabelledDataSettings(DataSettings):
    """One data set, of which a member of an ensemble sees a draw."""

    bootstrap: int | None = setting(
        None,
        "learn from as many blocks of ground as the training chips lie in, drawn with replacement by this seed; see "
        "[ensembles](train.md#ensembles)",
        within=_FROM_0,
    )


@dataclasses.dataclass
class MixtureSettings(DataSettings):
    """Several data sets as one."""

    weights: tuple[float, ...] = setting(
        (), "of several folders, `--config.data.path=A,B`: an epoch holds their chips in this proportion"
    )


@dataclasses.dataclass
class OptimizerSettings:
    """AdamW."""

    learning_rate: float = setting(1e-4, "the peak", within=_FROM_0)
    reference_batch: int = setting(
        0, "the rate is for this batch and scaled to `batch_size`; 0 = as it is", within=_FROM_0
    )
    weight_decay: float = setting(0.05, "AdamW's", within=_FROM_0)
    decay: str = setting(
        "weights",
        "weights leaves out norms, biases and bias tables; all",
        choices="biomass_jax.training.optimizer:DECAYS",
    )
    betas: tuple[float, float] = setting((0.9, 0.999))
    clip_norm: float = setting(0.0, "of the gradient's global norm; 0 = off", within=_FROM_0)
    layer_decay: float = setting(
        1.0, "the rate falls by it from layer to layer towards the input", within=Range(0, 1, "(]")
    )
    freeze: tuple[str, ...] = setting(
        (), "weights that stay: `('encoder',)`, `('encoder/stages_0',)`; drop path stays on"
    )
    ema_decay: float = setting(
        0.0, "of averaged weights, which are then scored and exported; 0 = off", within=Range(0, 1)
    )
    gradient_accumulation: int = setting(1, "micro-batches a step", within=_FROM_1)


@dataclasses.dataclass
class ScheduleSettings:
    """The learning rate over a run."""

    kind: str = setting(
        "cosine", "plateau, constant, cosine, multistep", choices="biomass_jax.training.optimizer:SCHEDULES"
    )
    warmup_epochs: float = setting(0.0, "linear, for each kind but plateau", within=_FROM_0)
    warmup_from: float = setting(0.0, "rate of the first step", within=_FROM_0)
    min_lr: float = setting(0.0, "end of the cosine; least rate of the plateau", within=_FROM_0)
    milestones: tuple[float, ...] = setting((), "multistep: epochs after which the rate falls by gamma")
    gamma: float = setting(0.1, "", within=_ABOVE_0)
    factor: float = setting(0.1, "plateau: the rate falls by it", within=Range(0, 1, "()"))
    patience: int = setting(10, "... after more than so many epochs", within=_FROM_0)
    threshold: float = setting(1e-4, "... without a `val/loss` lower by this share", within=Range(0, 1))
    stop_patience: int = setting(
        0, "the run ends after so many epochs without a lower `val/loss`; 0 = never", within=_FROM_0
    )


@dataclasses.dataclass
class AugmentSettings:
    """Random changes of chips in fine-tuning."""

    flip: bool = setting(True)
    turn: bool = setting(True, "by quarter turns")
    rotate_degrees: float = setting(
        0.0, "rotations within +- so many degrees; labels move by their centres", within=_FROM_0
    )
    rotate_probability: float = setting(0.5, "", within=Range(0, 1, "[]"))
    rotate_label_fill: float = setting(-1.0, "label where a rotation uncovers the border; -1 = none")


@dataclasses.dataclass
class CropSettings:
    """Random changes of chips in pretraining."""

    size: int = setting(224, "px", within=_FROM_1)
    crop: bool = setting(True, "a random box resized to `size`, and a mirror image every second time")
    crop_scale: tuple[float, float] = setting((0.67, 1.0), "of the chip's area")
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "width / height")


@dataclasses.dataclass
class LoraSettings:
    """Low-rank updates of the encoder, which otherwise stays as `init_from` has it."""

    rank: int = setting(
        0, "of the updates, see [adapters](adapt.md); 0 = none: all weights are trained", within=_FROM_0
    )
    alpha: float = setting(16.0, "updates are scaled by alpha / rank", within=_ABOVE_0)
    targets: tuple[str, ...] = setting(("qkv", "proj"), "dense layers of each block: of qkv, proj, fc1, fc2")
    dropout: float = setting(0.0, "of what updates are computed from, in training", within=Range(0, 1))


@dataclasses.dataclass
class MeshSettings:
    """The devices."""

    data: int = setting(-1, "devices over which the batch is split; -1 = what `fsdp` leaves", within=Range(-1))
    fsdp: int = setting(
        1,
        "devices over which weights and optimiser state are split too; on several devices a run first says what lies "
        "where",
        within=Range(-1),
    )


@dataclasses.dataclass
class CheckpointSettings:
    """Which checkpoints are written and kept."""

    keep: int = setting(2, "latest ones, beside the best", within=_FROM_1)
    every_steps: int = setting(0, "within an epoch too; 0 = at its end only", within=_FROM_0)


@dataclasses.dataclass
class Training:
    """Fields of every training run."""

    mode: str | None = setting(None, "what `main` runs")
    batch_size: int | None = setting(None, "chips a step, over all devices together", within=_FROM_1)
    dtype: str = setting(
        "float32",
        "or bfloat16, inside the model; weights, loss and statistics stay float32",
        choices=("float32", "bfloat16"),
    )
    matmul_precision: str = setting(
        "default", "default, high, highest: of float32 products, as JAX has it", choices=("default", "high", "highest")
    )
    seed: int = setting(42, "of weights, the order of chips, augmentation, drop path", within=_FROM_0)
    epochs: int | None = setting(
        None,
        "length of the run in passes over the training chips; an epoch's last chips that fill no batch are left out, "
        "others each time",
        within=_FROM_1,
    )
    steps: int | None = setting(None, "length in steps; where it is given, `epochs` don't count", within=_FROM_1)
    log_every: int = setting(50, "steps between lines", within=_FROM_1)
    draw_every: int = setting(10, "epochs between pictures of validation chips; 0 = none", within=_FROM_0)
    init_from: str | None = setting(None, "folder of a bundle to begin from; not given, random weights")
    load: str = setting(
        "all",
        "of it: all, or encoder (from a pretrained one too); what isn't loaded is listed",
        choices=("all", "encoder"),
    )
    resume_optimizer: bool = setting(False, "its moments, learning rate and plateau as well")
    overwrite: bool = setting(False, "begin anew, see above")
    deterministic: bool = setting(False, "on GPUs: slower, equal bits in every run")
    profile: str | None = setting(None, "`10:20` traces these steps")
    model: ModelSettings = group(ModelSettings)
    data: DataSettings = group(DataSettings)
    optimizer: OptimizerSettings = group(OptimizerSettings)
    schedule: ScheduleSettings = group(ScheduleSettings)
    mesh: MeshSettings = group(MeshSettings)
    checkpoint: CheckpointSettings = group(CheckpointSettings)


@dataclasses.dataclass
class Finetune(Training):
    """Fields of a fine-tuning run."""

    loss: str = setting(
        "rmse",
        "rmse (root once, over the whole batch), mse, mae, huber; of a spread: gaussian_nll, beta_nll, laplace_nll, "
        "pinball, see above",
        choices="biomass_jax.tasks.losses:CHOICES",
    )
    huber_delta: float = setting(50.0, "in the label's unit, where huber turns from square to linear", within=_ABOVE_0)
    nll_beta: float = setting(
        0.5, "of beta_nll: each pixel's likelihood weighs sigma^(2 beta); 0 = all alike", within=Range(0, 1, "[]")
    )
    spread_only: bool = setting(
        False, "train the spread alone: everything else stays as `init_from` has it, to the bit"
    )
    reference: bool = setting(False, "train as the reference did, see above")
    model: BiomassModelSettings = group(BiomassModelSettings)
    data: LabelledDataSettings = group(LabelledDataSettings)
    augment: AugmentSettings = group(AugmentSettings)
    lora: LoraSettings = group(LoraSettings)


@dataclasses.dataclass
class Pretrain(Training):
    """Fields of a pretraining run."""

    mask_patch_size: int = setting(32, "px", within=_FROM_1)
    mask_ratio: float = setting(0.6, "share of masked cells", within=Range(0, 1, "(]"))
    skip_nodata: bool = setting(True, "leave pixels without data out of the loss; the official loss counts all")
    normalize_targets: bool = setting(False, "z-score each mask patch by itself in the loss, as in MAE")
    model: SimMIMSettings = group(SimMIMSettings)
    data: MixtureSettings = group(MixtureSettings)
    augment: CropSettings = group(CropSettings)


RUNS: dict[str, type[Training]] = {"finetune": Finetune, "pretrain": Pretrain}


def check_fields(config: ConfigDict) -> None:
    """Refuse values that can't be, and fields that contradict each other.

    Raises:
        ConfigError: which, and what was expected.
    """
    if config.steps is None and config.epochs is None:
        raise ConfigError("neither config.steps nor config.epochs is given; add --config.epochs=N")
    check(config, RUNS[config.mode])
    betas = tuple(config.optimizer.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"config.optimizer.betas is {betas}; expected two numbers from 0 to below 1")
    if config.schedule.kind == PLATEAU and config.schedule.warmup_epochs:
        raise ConfigError(f"config.schedule.warmup_epochs with config.schedule.kind={PLATEAU}: it has no warm-up")
    if config.resume_optimizer and (config.init_from is None or config.load != "all"):
        raise ConfigError(
            "config.resume_optimizer goes with config.init_from and load='all': moments belong to weights"
        )
    if config.resume_optimizer and config.optimizer.freeze:
        raise ConfigError("config.resume_optimizer with config.optimizer.freeze: frozen weights have no moments")
    if config.get("spread_only"):
        _check_spread_only(config)
    if config.get("lora") and config.lora.rank:
        _check_lora(config)


def _check_lora(config: ConfigDict) -> None:
    """Fields that updates have no use for."""
    if config.init_from is None:
        raise ConfigError("config.lora goes with config.init_from: updates are of the weights of a bundle")
    for name in ("resume_optimizer", "spread_only"):
        if config[name]:
            raise ConfigError(f"config.lora with config.{name}: the weights that stay have no moments; leave one out")
    if frozen := [name for name in config.optimizer.freeze if name.partition("/")[0] == "encoder"]:
        raise ConfigError(
            f"config.lora with config.optimizer.freeze={frozen[0]!r}: the encoder's weights stay as they are, and its "
            "updates would; leave it out"
        )


def _check_spread_only(config: ConfigDict) -> None:
    """Fields that would change what stays; `tasks.create` compares those of the model with the bundle's."""
    if config.init_from is None or config.load != "all":
        raise ConfigError(
            "config.spread_only goes with config.init_from and load='all': the weights that stay come from a bundle"
        )
    if config.resume_optimizer:
        raise ConfigError("config.spread_only with config.resume_optimizer: frozen weights have no moments")
    if config.data.statistics == "dataset" or config.data.means:
        name = "means" if config.data.means else "statistics"
        raise ConfigError(
            f"config.spread_only with config.data.{name}={config.data[name]}: frozen weights need the statistics of "
            "their bundle; leave it out"
        )
