"""`config.mode = 'evaluate'`: scores of a bundle on a data set, as tables and pictures in the workdir."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from biomass_jax import bundle as bundles
from biomass_jax.data import bands, sources
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation import pixels as stream
from biomass_jax.evaluation import report
from biomass_jax.evaluation.biomes import with_biomes
from biomass_jax.evaluation.forward import Forward
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.runtime import processes

log = logging.getLogger(__name__)

SAY_EVERY = 15.0  # seconds


def run(config: Any, workdir: Path, *, shardings: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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
    for field, value, what in (
        ("bundle", config.bundle, "the model bundle's folder"),
        ("data.path", group.path, "shards, or folders of GeoTIFFs as published"),
    ):
        if not value:
            raise EvaluationError(f"config.{field} is not given; add --config.{field}=PATH, {what}")
    bundles.read_meta(config.bundle)  # a wrong path shows before anything is read
    source = sources.open_source(group.path, group.split, bands=bands.parse_band_list(group.bands))
    source = with_biomes(source, group.path, biome=group.biome, polygons=group.biomes, field=group.biome_field)
    placement = shardings()
    bundle = bundles.load(config.bundle, placement["replicated"])
    check_units(bundle, source.info)
    means, stds, statistics = choose_statistics(config, bundle)
    forward = Forward(
        bundle,
        fill=source.info.fill,
        means=means,
        stds=stds,
        dtype=config.dtype,
        matmul_precision=config.matmul_precision,
        keep_labels=config.reference,
        **placement,
    )
    wanted = chosen_chips(config.figures, source)
    part = score(source, forward, config.batch_size, group.threads, wanted)
    scored, pictures = stream.join(gather(part))
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


def score(source: Any, forward: Forward, batch_size: int | None, threads: int, wanted: list[str]) -> stream.Part:
    """This process's rows of every batch, predicted.

    Args:
        source: the chips.
        forward: the model.
        batch_size: over all processes, rounded up to what their devices can share; None for 4 a device on CPU and 32
            elsewhere.
        threads: that read.
        wanted: ids, or their beginnings, of chips kept for pictures.
    """
    count = jax.process_count()
    shares = forward.devices * count
    given = (4 if forward.platform == "cpu" else 32) * shares if batch_size is None else batch_size
    if given < 1:
        raise EvaluationError(f"config.batch_size is {given}; expected 1 or more")
    size = -(-given // shares) * shares
    if size != given:
        log.info("batch_size %d becomes %d: %d devices", given, size, shares)
    batches = pipeline.eval_batches(
        source, batch_size=size, process_index=jax.process_index(), process_count=count, threads=threads
    )
    return stream.score_batches(
        batches,
        forward,
        wanted=lambda chip_id: any(_matches(chip_id, name) for name in wanted),
        progress=_Progress(-(-len(source) // count)),
    )


def gather(part: stream.Part) -> list[stream.Part]:
    """The parts of all processes, in their order, at each of them. They travel as bytes: JAX would round float64."""
    if jax.process_count() == 1:
        return [part]
    return [stream.from_bytes(data) for data in processes.gather(stream.to_bytes(part))]


def choose_statistics(config: Any, bundle: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """Means and stds in the order of the bundle's bands, and where they come from: explicit ones, else as asked.

    Raises:
        EvaluationError: a wrong setting.
        DataError: no training chips to take the data set's from.
    """
    group = config.data
    if bool(group.means) != bool(group.stds):
        raise EvaluationError("config.data.means and config.data.stds go together")
    if group.means:
        count = len(bundle.bands)
        if not len(group.means) == len(group.stds) == count or min(group.stds) <= 0:
            raise EvaluationError(f"config.data.means and stds: expected {count} numbers each, stds above 0")
        return np.asarray(group.means, np.float32), np.asarray(group.stds, np.float32), "explicit"
    if group.statistics not in ("bundle", "dataset"):
        raise EvaluationError(f"config.data.statistics is {group.statistics!r}; expected 'bundle' or 'dataset'")
    if group.statistics == "bundle":
        return bundle.means, bundle.stds, "bundle"
    train = sources.open_source(group.path, "train", bands=bands.parse_band_list(group.bands))
    order = [bands.BAND_NAMES.index(name) for name in bundle.bands if name in bands.BAND_NAMES]
    means, stds = (
        np.asarray(values, np.float32)[order] for values in sources.statistics_of(train, reference=config.reference)
    )
    return means, stds, "dataset"


def check_units(bundle: Any, info: Any) -> None:
    """Refuse labels in another unit than the model's.

    Raises:
        EvaluationError: both are known and differ.
    """
    theirs = info.metadata.get("label", {}).get("units")
    ours = bundle.meta["output"]["units"]
    if theirs is not None and theirs != ours:
        raise EvaluationError(f"{info.path}: labels are in {theirs}, the model {bundle.path} gives {ours}")


def chosen_chips(group: Any, source: Any) -> list[str]:
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


class _Progress:
    """A log line now and then."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._said = time.monotonic()

    def __call__(self, chips: int) -> None:
        self._done += chips
        now = time.monotonic()
        if now - self._said >= SAY_EVERY or self._done == self._total:
            self._said = now
            rate = self._done / max(now - self._began, 1e-9)
            log.info("%d of %d chips, %.1f chips/s", self._done, self._total, rate)
