"""The settings of an evaluation; docs/evaluate.md lists them."""

import dataclasses

from biomass_jax.runtime.settings import Range, group, setting


@dataclasses.dataclass
class EvaluationData:
    """Which chips are scored."""

    path: str | None = setting(None, "shards, or folders of GeoTIFFs as published")
    split: str = setting("test", "or val, train")
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
    statistics: str = setting("bundle", "means and stds: bundle, or dataset, those of the data's train split")
    means: tuple[float, ...] | None = setting(None, "or explicitly, a number for each band of the model")
    stds: tuple[float, ...] | None = setting(None, "likewise")
    verify: bool = setting(False, "compare each shard with its SHA-256, or read each GeoTIFF, before anything else")
    threads: int = setting(8, "that read chips", within=Range(1))
    biome: str | None = setting(None, "slug of the only biome to score")
    biomes: str | None = setting(None, "polygons that tell biomes: any file that GDAL reads, GeoParquet")
    biome_field: str | None = setting(None, "their column of names")


@dataclasses.dataclass
class EvaluationFigures:
    """Which chips are drawn."""

    chips: tuple[str, ...] = setting((), "ids of chips to draw, or their beginnings: `('10SFF_144',)`")
    count: int = setting(4, "where none are named, so many, evenly spread; 0 for none")


@dataclasses.dataclass
class Evaluate:
    """Fields of an evaluation."""

    bundle: str | None = setting(None, "folder of the model")
    base: str | None = setting(
        None, "folder of an adapter's base, where that doesn't lie where it did, see [adapters](adapt.md)"
    )
    against: str | None = setting(None, "folder of another model, to be compared with on the same pixels")
    data: EvaluationData = group(EvaluationData)
    reference: bool = setting(
        False, "as the reference did: labels on pixels without data too, see [training](train.md)"
    )
    uncertainty: str = setting(
        "auto",
        "whose uncertainty is scored too: as the bundle was calibrated, else as its model has it by itself, else none; "
        "see [uncertainty](uncertainty.md)",
        choices="biomass_jax.prediction.layers:CHOICES",
    )
    samples: int | None = setting(
        None, "of dropout and drop_path; not given, those of the calibration, else 10", within=Range(2)
    )
    block_km: float | None = setting(
        None,
        "edge of the blocks of ground that intervals leave out; not given, that of the data set's split, else 50",
        within=Range(0, ends="()"),
    )
    resamples: int | None = setting(
        None, "of earlier versions, whose intervals were drawn; changes nothing, and says so"
    )
    seed: int | None = setting(None, "likewise")
    experiment: str | None = setting(None, "name in tables and titles; not given, model and data")
    figures: EvaluationFigures = group(EvaluationFigures)
    batch_size: int | None = setting(
        None, "chips a step, over all devices together; not given, 4 a device on CPUs and 32 elsewhere"
    )
    dtype: str = setting("float32", "or bfloat16, inside the model")
    matmul_precision: str = setting(
        "highest", "default, high, highest; TPUs and some GPUs round float32 products otherwise"
    )
    attention: str = setting(
        "auto",
        "fused, kernels for NVIDIA GPUs, see [speed](performance.md#kernels-for-gpus); einsum, plain JAX; auto, fused "
        "where the model runs on such GPUs and its shapes fit",
        choices="biomass_jax.models.fused.choice:CHOICES",
    )
    mode: str | None = setting(None, "what `main` runs")


@dataclasses.dataclass
class Calibrate:
    """How a bundle is calibrated: options of `biomass-jax calibrate`."""

    base: str | None = setting(None, "folder of an adapter's base, where that doesn't lie where it did")
    split: str = setting("val", "chips that it is calibrated on: none that it was trained or will be tested on")
    level: float = setting(0.9, "share of the labels that an interval is to hold", within=Range(0.5, 1, ends="[)"))
    uncertainty: str = setting(
        "auto",
        "how the model says how sure it is: by itself where it can, else by dropout, else by symmetries",
        choices="biomass_jax.prediction.layers:CHOICES",
    )
    samples: int = setting(10, "of dropout and drop_path", within=Range(2))
    seed: int = setting(0, "of all draws")
    block_km: float | None = setting(
        None,
        "edge of the blocks of ground; not given, that of the data set's split, else 50",
        within=Range(0, ends="()"),
    )
    applicability: bool = setting(True, "learn from the split `train` where the model is applicable")
    applicability_chips: int = setting(1000, "of that split that are looked at, evenly spread", within=Range(1))
    bands: str | None = setting(None, "names of GeoTIFFs' bands where they don't say")
    encoding: str = setting("auto", "what GeoTIFFs' numbers are", choices="biomass_jax.data.raster.encoding:ENCODINGS")
    biomes: str | None = setting(None, "polygons that tell biomes: any file that GDAL reads, GeoParquet")
    biome_field: str | None = setting(None, "their column of names")
    batch_size: int | None = setting(None, "chips a step; not given, 4 a device on CPUs and 32 elsewhere")
