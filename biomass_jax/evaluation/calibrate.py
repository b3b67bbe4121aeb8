"""`biomass-jax calibrate`: a bundle whose maps say how sure they are, from chips that it wasn't trained on."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomass_jax import bundle as bundles
from biomass_jax.bundle import Bundle, software_versions
from biomass_jax.data import bands, sources
from biomass_jax.data.biomes import with_biomes
from biomass_jax.data.blocks import Drawn, chip_blocks, split_block_km
from biomass_jax.data.labels import BIOMASS
from biomass_jax.data.sources import Source
from biomass_jax.errors import DataError, EvaluationError
from biomass_jax.evaluation import evaluate, tables
from biomass_jax.evaluation.config import Calibrate
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.prediction.forward import Forward
from biomass_jax.prediction.layers import AUTO, DI, ENDINGS
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.mesh import local_placement
from biomass_jax.runtime.progress import Progress
from biomass_jax.runtime.settings import add_options, checked, options_of
from biomass_jax.tasks.create import check_pixel_size
from biomass_jax.uncertainty import applicability, calibration
from biomass_jax.uncertainty.calibration import Calibration
from biomass_jax.uncertainty.spread import MEAN, Spread, first_encoders, own_channels

THREADS = 8  # that read chips


class Calibrated(NamedTuple):
    """What came of a calibration: the bundle's folder, and lines that say what was found."""

    path: Path
    lines: list[str]


def calibrate(
    bundle: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    placement: dict[str, Any] | None = None,
    command: str = "biomass_jax.evaluation.calibrate.calibrate",
    **settings: object,
) -> Calibrated:
    """Write a copy of a bundle whose maps have a standard deviation and an interval, and tell where it is applicable.

    Args:
        bundle: the model's folder.
        data: shards, or folders of GeoTIFFs as published.
        output: the folder to make.
        overwrite: replace one that is there.
        placement: gives `Forward`'s batch_sharding and replicated; the default device where None.
        command: for the provenance.
        **settings: fields of `Calibrate`.

    Raises:
        EvaluationError: the bundle doesn't fit the data, or nothing to calibrate on.
        BundleError, DataError, RasterError, BandError, BiomeError, PredictionError: what can't be read or used.
    """
    chosen, output = checked(Calibrate, settings), Path(output)
    if output.exists() and not overwrite:
        raise EvaluationError(f"{output}: already exists; choose another folder, or give --overwrite")
    placement = placement or {}
    model = bundles.load(bundle, placement.get("replicated"), base=chosen.base)
    source = _opened(data, chosen.split, chosen)
    evaluate.check_bands(model)
    evaluate.check_units(model, source.info)
    check_pixel_size(source, model)
    spread = Spread(_way(model, chosen.uncertainty), chosen.samples, chosen.seed)
    block_km = chosen.block_km or split_block_km(source.info.metadata)
    section, lines = _learn_intervals(model, source, spread, block_km, chosen, placement)
    section["calibrated_on"] |= {"data": str(data), "sha256": source.digest()}
    area = None
    if chosen.applicability:
        area = learn_applicability(model, _opened(data, "train", chosen), chosen, block_km, placement)
        section["applicability"] = area.about()
    label = model.meta["output"]["bands"][0]
    path = bundles.with_uncertainty(
        model,
        output,
        section,
        None if area is None else area.arrays(),
        output_bands=[*(f"{label}{ending}" for ending in ENDINGS.values()), *(() if area is None else (DI,))],
        provenance={"command": command, "versions": software_versions()},
        overwrite=overwrite,
    )
    return Calibrated(path, [*lines, *_area_lines(area)])


def _learn_intervals(
    model: Bundle, source: Source, spread: Spread, block_km: float, chosen: Calibrate, placement: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The section of bundle.json, and what the command tells of it."""
    forward = Forward(model, spread=spread, **placement)
    scored = _scored(forward, model, source, chosen)
    blocks = tables.blocks_of(scored, block_km)
    raw = dict(zip(forward.channels, [scored.prediction, *scored.more.T], strict=True))
    on_blocks = {"blocks": blocks.of_chip[scored.chip], "biomes": scored.pixel_biomes()}
    with _named(source):
        edges = calibration.EDGES if model.label == BIOMASS else model.label.cuts
        found = calibration.fit(raw, scored.label, **on_blocks, level=chosen.level, seed=chosen.seed, edges=edges)
    on = {"split": chosen.split, "chips": len(np.unique(scored.chip)), "labels": len(scored.label)}
    section: dict[str, Any] = {
        "spread": spread.about(),
        "calibration": found.to_json(),
        "calibrated_on": {**on, "blocks_are": blocks.are},
    }
    return section, _lines(found, spread, raw, scored, blocks, model.label.unit)


def _way(model: Bundle, asked: str) -> str:
    """How the model says how sure it is: by itself where it can, else by dropout, else by symmetries."""
    if asked != AUTO:
        if asked == "none":
            raise EvaluationError("uncertainty is 'none'; intervals need some, expected another way, or auto")
        return asked
    module = model.module()
    if own_channels(module) != MEAN:
        return "model"
    return "dropout" if module.head_dropout else "symmetries"


def _opened(data: str | os.PathLike[str], split: str, chosen: Calibrate) -> Source:
    names = bands.parse_band_list(chosen.bands)
    source = sources.open_source(data, split, encoding=chosen.encoding, bands=names)
    return with_biomes(source, data, polygons=chosen.biomes, field=chosen.biome_field)


def _scored(forward: Forward, model: Bundle, source: Source, chosen: Calibrate) -> tables.Scored:
    """What the model gives at the labelled pixels of all chips."""
    on_chips = evaluate.chip_forward(forward, model.bands, fill=source.info.fill)
    part = evaluate.score(source, on_chips, forward.batch_size(chosen.batch_size), THREADS, [])
    scored, _ = tables.join([part])
    if not len(scored.label):
        raise EvaluationError(
            f"{source.info.path}: split {source.info.split!r} has no labelled pixel in {len(source)} chips"
        )
    return scored


def learn_applicability(
    model: Bundle, train: Source, chosen: Calibrate, block_km: float, placement: dict[str, Any]
) -> applicability.Applicability:
    """What the training chips look like to the model's encoder.

    Args:
        model: the bundle.
        train: its training chips.
        chosen: how many are looked at, and the seed.
        block_km: edge of the blocks of ground.
        placement: as for `calibrate`.

    Raises:
        DataError: chips of a single block, or all alike.
    """
    module = model.module()
    stage, stride = applicability.feature_stage(module.patch_size, len(module.depths))
    numbers = np.linspace(0, len(train) - 1, min(chosen.applicability_chips, len(train))).round().astype(int)
    some = Drawn(train, [int(number) for number in numbers])
    # The encoder in the model's place: what is asked of a pixel is asked of a cell.
    encoder = Forward(
        model, model_fn=lambda v, x: first_encoders(module.apply(v, x, method="encode")[stage]), **placement
    )
    on_chips = evaluate.chip_forward(encoder, model.bands, fill=train.info.fill)
    names, _ = chip_blocks(some.chips(), block_km)
    block = dict(zip((chip.chip_id for chip in some.chips()), names.tolist(), strict=True))
    sample = applicability.CellSample(seed=chosen.seed)
    size = encoder.batch_size(chosen.batch_size)
    with Progress("training chips", len(some), terminal=False, every=15.0) as shown:
        for batch in pipeline.eval_batches(some, batch_size=size, threads=THREADS):
            features, label, missing = on_chips(batch.arrays["image"], batch.arrays["label"])
            found = np.asarray(features)
            for row in np.flatnonzero(batch.arrays["valid"]):
                chip = batch.chips[row]
                means, valid = applicability.cell_labels(label[row], missing[row], stride)
                sample.add(chip.chip_id, found[row], means, block[chip.chip_id], valid=valid)
            shown.advance(int(batch.arrays["valid"].sum()))
    with _named(train):
        return applicability.fit(*sample.cells(), seed=chosen.seed)


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """What is wrong with chips as a whole names their data set and split."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source.info.path}: split {source.info.split}: {error}") from error


def _lines(
    found: Calibration,
    spread: Spread,
    raw: dict[str, np.ndarray],
    scored: tables.Scored,
    blocks: tables.Blocks,
    unit: str,
) -> list[str]:
    """What the command tells of the intervals."""
    everything = found.groups[0]
    sd, lo, hi = found.apply(raw, scored.pixel_biomes())
    inside = np.mean((lo <= scored.label) & (scored.label <= hi))
    ways = ", ".join(f"{name} {value}" for name, value in spread.about().items())
    made = [
        f"uncertainty: {ways}; calibrated on {len(scored.label):,} labels of {everything.blocks} blocks ({blocks.are})",
        f"intervals for {found.level:.0%}: on average {np.mean(hi - lo):.1f} {unit} wide, standard deviation "
        f"{np.sqrt(np.mean(sd**2)):.1f} {unit}; they hold {inside:.1%} of the labels they come from, which says "
        "little: evaluate tells what they hold on others",
    ]
    for group in found.groups[1:]:
        limits = (
            "" if group.low is None and group.high is None else f"{group.low or 0:g} to {group.high or np.inf:g} {unit}"
        )
        named = ", ".join(part for part in (group.biome, limits) if part)
        made.append(f"  {named}: intervals of their own, from {group.blocks} blocks, {group.pixels:,} labels")
    return made


def _area_lines(area: applicability.Applicability | None) -> list[str]:
    if area is None:
        return []
    return [
        f"applicable where di is at most {area.threshold:.3g}: from {area.cells:,} cells of training chips in "
        f"{area.blocks} blocks"
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.evaluation.calibrate",
        description="A copy of a bundle whose maps have a standard deviation and an interval that holds what it says.",
        allow_abbrev=False,
    )
    parser.add_argument("--bundle", required=True, metavar="DIR", help="the model")
    parser.add_argument("--data", required=True, metavar="PATH", help="shards, or folders of GeoTIFFs as published")
    parser.add_argument("--output", required=True, metavar="DIR", help="the calibrated bundle, a folder to make")
    add_options(parser, Calibrate)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        environment.settle()
        for value, flag in ((args.bundle, "--bundle"), (args.output, "--output"), (args.data, "--data")):
            check_local(value, flag)
        with writer_beside(Path(args.output)):
            done = calibrate(
                args.bundle,
                args.data,
                args.output,
                overwrite=args.overwrite,
                placement=local_placement(),
                command=shlex.join(["biomass-jax", "calibrate", *words]),
                **options_of(args, Calibrate),
            )
    except Exception as error:
        return environment.failed(error)
    print("\n".join([*done.lines, f"{done.path}: the calibrated bundle"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
