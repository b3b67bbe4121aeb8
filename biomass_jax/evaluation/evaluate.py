"""`config.mode = 'evaluate'`: scores of a bundle on a data set, as tables and pictures in the workdir."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from biomass_jax import bundle as bundles
from biomass_jax.data import bands, records, sources
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation import pixels, report
from biomass_jax.evaluation.biomes import with_biomes
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.prediction.forward import Forward
from biomass_jax.runtime import processes
from biomass_jax.runtime.progress import Progress
from biomass_jax.tasks.create import choose_statistics

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path, *, shardings: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Score `config.bundle` on `config.data` and write `report`'s files into `workdir`.

    Every process scores its rows of each batch on its own devices; the first one writes.

    Args:
        config: of configs/evaluate.py.
        workdir: takes the files.
        shardings: gives `Forward`'s batch_sharding and replicated over this process's devices; called when the data
            are known to be there.

    Returns:
        What `metrics.json` holds.

    Raises:
        EvaluationError: a field is missing or wrong, the bundle doesn't fit the data, nothing to score.
        BundleError, DataError, RasterError, BandError, BiomeError: what can't be read, or isn't known.
    """
    group = config.data
    check_given(config)
    source = sources.open_source(group.path, group.split, bands=bands.parse_band_list(group.bands))
    source = with_biomes(source, group.path, biome=group.biome, polygons=group.biomes, field=group.biome_field)
    placement = shardings()
    bundle = bundles.load(config.bundle, placement["replicated"])
    check_units(bundle, source.info)
    check_bands(bundle)
    means, stds, statistics = choose_statistics(
        group,
        bundle.bands,
        loaded=bundle,
        training=lambda: sources.open_source(group.path, "train", bands=bands.parse_band_list(group.bands)),
        reference=config.reference,
    )
    forward = Forward(
        bundle, means=means, stds=stds, dtype=config.dtype, matmul_precision=config.matmul_precision, **placement
    )
    wanted = chosen_chips(config.figures, source)
    on_chips = chip_forward(forward, bundle.bands, fill=source.info.fill, keep_labels=config.reference)
    part = score(source, on_chips, batch_size(forward, config.batch_size), group.threads, wanted)
    scored, pictures = pixels.join(gather(part))
    if not len(scored.label):
        raise EvaluationError(f"{group.path}: split {group.split!r} has no labelled pixel in {len(source)} chips")
    result = report.summarize(scored, config, bundle, source.info, statistics)
    if jax.process_index() == 0:
        report.write(workdir, result, scored, pictures)
    if lost := [name for name in config.figures.chips if not any(_matches(p.chip_id, name) for p in pictures)]:
        raise EvaluationError(
            f"config.figures.chips: no chip {', '.join(lost)} in {group.path}, split {group.split!r}; the tables are "
            f"written; its {len(scored.chip_ids)} chips have ids like {scored.chip_ids[0]}"
        )
    return result


def check_given(config: ConfigDict) -> None:
    """Refuse a config without a bundle or data, before anything is read. EvaluationError or BundleError."""
    for field, value, what in (
        ("bundle", config.bundle, "the model bundle's folder"),
        ("data.path", config.data.path, "shards, or folders of GeoTIFFs as published"),
    ):
        if not value:
            raise EvaluationError(f"config.{field} is not given; add --config.{field}=PATH, {what}")
    bundles.read_meta(config.bundle)


def batch_size(forward: Forward, given: int | None) -> int:
    """Chips a batch over all processes. EvaluationError where fewer than one is asked for."""
    if given is not None and given < 1:
        raise EvaluationError(f"config.batch_size is {given}; expected 1 or more")
    return forward.batch_size(given, processes=jax.process_count())


def chip_forward(
    forward: Forward, names: Sequence[str], *, fill: float | None, keep_labels: bool = False
) -> pixels.ChipForward:
    """The forward pass of chips and labels.

    Args:
        forward: the model's.
        names: the bundle's bands; chips have those of `bands.BAND_NAMES`.
        fill: the data set's.
        keep_labels: score labels on no-data too, as the reference does.

    Returns:
        (image (B, H, W, 6) as stored, label (B, H, W) float32) -> predictions (B, H, W) float32, still being computed,
        labels with -1 where there is no data, and bool (B, H, W), True there.
    """
    order = [bands.BAND_NAMES.index(name) for name in names]

    def run(image: np.ndarray, label: np.ndarray) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        missing = bands.no_data(image, fill)
        if order != list(range(len(bands.BAND_NAMES))):
            # What makes a pixel no-data may lie in a band that the model doesn't take.
            image = np.where(missing[..., None], 0, image[..., order]).astype(image.dtype)
        return forward(image, fill), label if keep_labels else np.where(missing, records.NO_LABEL, label), missing

    return run


def score(
    source: sources.Source, forward: pixels.ChipForward, size: int, threads: int, wanted: list[str]
) -> pixels.ScoredPart:
    """This process's rows of every batch, predicted.

    Args:
        source: the chips.
        forward: see `chip_forward`.
        size: chips a batch over all processes.
        threads: that read.
        wanted: ids, or their beginnings, of chips kept for pictures.
    """
    count = jax.process_count()
    batches = pipeline.eval_batches(
        source, batch_size=size, process_index=jax.process_index(), process_count=count, threads=threads
    )
    with Progress("scoring", -(-len(source) // count), terminal=False, every=15.0) as shown:
        return pixels.score_batches(
            batches,
            forward,
            wanted=lambda chip_id: any(_matches(chip_id, name) for name in wanted),
            progress=shown.advance,
        )


def gather(part: pixels.ScoredPart) -> list[pixels.ScoredPart]:
    """The parts of all processes, in their order, at each of them. They travel as bytes: JAX would round float64."""
    if jax.process_count() == 1:
        return [part]
    return [pixels.from_bytes(data) for data in processes.gather(pixels.to_bytes(part))]


def check_bands(bundle: bundles.Bundle) -> None:
    """Refuse a model that takes bands which chips don't have.

    Raises:
        EvaluationError: it does.
    """
    if unknown := [name for name in bundle.bands if name not in bands.BAND_NAMES]:
        raise EvaluationError(
            f"{bundle.path}: the model takes bands {', '.join(unknown)}; chips have {', '.join(bands.BAND_NAMES)}"
        )


def check_units(bundle: bundles.Bundle, info: sources.DatasetInfo) -> None:
    """Refuse labels in another unit than the model's.

    Raises:
        EvaluationError: both are known and differ.
    """
    theirs = info.metadata.get("label", {}).get("units")
    ours = bundle.meta["output"]["units"]
    if theirs is not None and theirs != ours:
        raise EvaluationError(f"{info.path}: labels are in {theirs}, the model {bundle.path} gives {ours}")


def chosen_chips(group: ConfigDict, source: sources.Source) -> list[str]:
    """Ids of the chips to draw: those asked for, else `count` of them, evenly spread over the split."""
    if group.chips:
        return [str(name) for name in group.chips]
    if group.count < 0:
        raise EvaluationError(f"config.figures.count is {group.count}; expected 0 or more")
    places = np.linspace(0, len(source) - 1, min(group.count, len(source))).round().astype(int)
    return [source[int(index)]["chip_id"] for index in places]


def _matches(chip_id: str, name: str) -> bool:
    """Whether an id is the one asked for, or goes on from it: `10SFF_144` is enough for `10SFF_144_2020-05-01`."""
    return chip_id == name or chip_id.startswith(f"{name}_")
