"""`config.mode = 'evaluate'`: scores of a bundle on a data set, as tables and pictures in the workdir."""

import functools
import json
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from biomass_jax import bundle as bundles
from biomass_jax import figures
from biomass_jax.bundle import software_versions
from biomass_jax.data import bands, records, sources
from biomass_jax.data.biomes import with_biomes
from biomass_jax.data.blocks import split_block_km
from biomass_jax.data.labels import unit_text
from biomass_jax.data.sources import Source
from biomass_jax.errors import EvaluationError, name_list
from biomass_jax.evaluation import tables
from biomass_jax.evaluation.config import Evaluate
from biomass_jax.evaluation.intervals import LEVEL
from biomass_jax.evaluation.nugget import nugget
from biomass_jax.evaluation.uncertainty import COLUMNS as UNCERTAINTY_COLUMNS
from biomass_jax.evaluation.uncertainty import how_sure, sure_lines
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.prediction.forward import Forward
from biomass_jax.prediction.layers import Layers
from biomass_jax.runtime import processes
from biomass_jax.runtime.files import write_json
from biomass_jax.runtime.progress import Progress
from biomass_jax.runtime.settings import check
from biomass_jax.tasks.create import check_pixel_size, choose_statistics
from biomass_jax.tasks.scores import SCORES

log = logging.getLogger(__name__)

DIFFERENCE = "the score of config.bundle less that of config.against, on the same pixels: below 0, its error is smaller"
LABEL_ERROR = "an estimate: the nugget of the errors' variogram, what neighbouring labels don't share; no bound"
BEST_CONSTANT = "the mean label of the scored pixels, predicted everywhere"


def run(config: ConfigDict, workdir: Path, *, shardings: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Score `config.bundle` on `config.data` and write tables, metrics and pictures into `workdir`.

    Every process scores its rows of each batch on its own devices; the first one writes.

    Args:
        config: of configs/evaluate.py.
        workdir: takes the files.
        shardings: gives `Forward`'s batch_sharding and replicated over this process's devices; called when the data
            are known to be there.

    Returns:
        What `metrics.json` holds.

    Raises:
        ConfigError: a field holds what it can't.
        EvaluationError: a field is missing, the bundle doesn't fit the data, nothing to score.
        BundleError, DataError, RasterError, BandError, BiomeError: what can't be read, or isn't known.
    """
    check(config, Evaluate)
    group = config.data
    check_given(config)
    chosen = {name: group[name] for name in ("encoding", "label_max", "label", "verify")}
    chosen["bands"] = bands.parse_band_list(group.bands)
    source = sources.open_source(group.path, group.split, **chosen)
    source = with_biomes(source, group.path, biome=group.biome, polygons=group.biomes, field=group.biome_field)
    placement = shardings()
    train = functools.partial(sources.open_source, group.path, "train", **chosen)
    paths = dict.fromkeys((config.bundle, config.against or config.bundle))
    ready = [_made_ready(path, config, source, train, placement) for path in paths]  # both, before either works
    models = [_scored_by(*made, config, source, drawn=number == 0) for number, made in enumerate(ready)]
    scored, pictures = models[0].scored, models[0].pictures
    if not len(scored.label):
        raise EvaluationError(f"{group.path}: split {group.split!r} has no labelled pixel in {len(source)} chips")
    blocks = tables.blocks_of(scored, config.block_km or split_block_km(source.info.metadata))
    result = summarize(models[0], config, source.info, blocks)
    if config.against:
        result["against"] = compare(models[0], models[-1], blocks)
    if jax.process_index() == 0:
        result["data"]["sha256"] = source.digest()
        write(workdir, result, scored, pictures)
        write_json(workdir / "config.json", json.loads(config.to_json()))  # now that it is that of the scores
    if lost := [name for name in config.figures.chips if not any(_matches(i, name) for i in scored.chip_ids)]:
        raise EvaluationError(
            f"config.figures.chips: no chip {name_list(lost)} in {group.path}, split {group.split!r}; the tables are "
            f"written; its {len(scored.chip_ids)} chips have ids like {scored.chip_ids[0]}"
        )
    return result


class ScoredModel(NamedTuple):
    """A model, what it gave at the labelled pixels, and the statistics that it took.

    Attributes:
        bundle: the model.
        scored: see `tables.Scored`.
        pictures: of the chips that are drawn.
        statistics: where means and stds come from, and both.
        layers: what its maps have.
        channels: what it gives of a pixel.
    """

    bundle: bundles.Bundle
    scored: tables.Scored
    pictures: list[figures.ChipPanel]
    statistics: dict[str, Any]
    layers: Layers
    channels: tuple[str, ...]


def _made_ready(
    path: str, config: ConfigDict, source: Source, train: Callable[[], Source], placement: dict[str, Any]
) -> tuple[Forward, dict[str, Any]]:
    """A model that fits the data, and its statistics as `ScoredModel` has them; `train` opens the training split."""
    bundle = bundles.load(path, placement["replicated"], base=config.base if path == config.bundle else None)
    check_units(bundle, source.info)
    check_bands(bundle)
    check_pixel_size(source, bundle)
    means, stds, kind = choose_statistics(
        config.data, bundle.bands, loaded=bundle, training=train, reference=config.reference
    )
    how = {"dtype": config.dtype, "matmul_precision": config.matmul_precision, "reference": config.reference}
    layers = Layers(bundle, uncertainty=config.uncertainty, samples=config.samples)
    asked: dict[str, Any] = {"spread": layers.spread, "di": layers.di, "attention": config.attention, **how}
    forward = Forward(bundle, means=means, stds=stds, **asked, **placement)
    known = {"statistics": kind, "means": means.tolist(), "stds": stds.tolist()}
    return forward, {"bundle": bundle, "layers": layers, **known}


def _scored_by(
    forward: Forward, known: dict[str, Any], config: ConfigDict, source: Source, *, drawn: bool
) -> ScoredModel:
    """A model on all chips, by all processes; `drawn` keeps chips for pictures."""
    bundle, layers = known.pop("bundle"), known.pop("layers")
    wanted = chosen_chips(config.figures, source) if drawn else []
    on_chips = chip_forward(forward, bundle.bands, fill=source.info.fill, reference=config.reference)
    part = score(source, on_chips, batch_size(forward, config.batch_size), config.data.threads, wanted)
    parts = [part]
    if jax.process_count() > 1:  # pickled: JAX would round float64
        parts = [pickle.loads(data) for data in processes.gather(pickle.dumps(part))]
    return ScoredModel(bundle, *tables.join(parts, bundle.label.bins), known, layers, forward.channels)


def check_given(config: ConfigDict) -> None:
    """Refuse a config without a bundle or data, before anything is read. EvaluationError or BundleError.

    Fields of earlier versions are told of.
    """
    for field in ("resamples", "seed"):
        if config[field] is not None:
            log.warning(
                "config.%s is %s, but intervals are no longer drawn: blocks of ground are left out one at a time, and "
                "config.block_km is their size; leave config.%s out",
                *(field, config[field], field),
            )
    for field, value, what in (
        ("bundle", config.bundle, "the model bundle's folder"),
        ("data.path", config.data.path, "shards, or folders of GeoTIFFs as published"),
    ):
        if not value:
            raise EvaluationError(f"config.{field} is not given; add --config.{field}=PATH, {what}")
    meta = bundles.read_meta(config.bundle)
    if config.against:
        other = bundles.read_meta(config.against)
        ours, theirs = (one["output"].get("units") for one in (meta, other))
        if ours != theirs:
            raise EvaluationError(
                f"config.against {config.against} gives {theirs}, config.bundle {config.bundle} {ours}; models are "
                "compared in the same units"
            )


def batch_size(forward: Forward, given: int | None) -> int:
    """Chips a batch over all processes. EvaluationError where fewer than one is asked for."""
    if given is not None and given < 1:
        raise EvaluationError(f"config.batch_size is {given}; expected 1 or more")
    return forward.batch_size(given, processes=jax.process_count())


def chip_forward(
    forward: Forward, names: Sequence[str], *, fill: float | None, reference: bool = False
) -> tables.ChipForward:
    """The forward pass of chips and labels.

    Args:
        forward: the model's.
        names: the bundle's bands; chips have those of `bands.BAND_NAMES`.
        fill: the data set's.
        reference: score labels on no-data too, as the reference does; `forward` takes filled bands as it says itself.

    Returns:
        (image (B, H, W, 6) as stored, label (B, H, W) float32) -> predictions (B, H, W) float32, still being computed,
        labels with -1 where there is no data, and bool (B, H, W), True there.
    """
    order = [bands.BAND_NAMES.index(name) for name in names]

    def run(image: np.ndarray, label: np.ndarray) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        missing = bands.no_data(image, fill)
        if order != list(range(len(bands.BAND_NAMES))):
            # What makes a pixel no-data may lie in a band that the model doesn't take.
            gone = missing[..., None] & (not reference)
            image = np.where(gone, 0, image[..., order]).astype(image.dtype)
        return forward(image, fill), label if reference else np.where(missing, records.NO_LABEL, label), missing

    return run


def score(
    source: sources.Source, forward: tables.ChipForward, size: int, threads: int, wanted: list[str]
) -> tables.ScoredPart:
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
        return tables.score_batches(
            batches,
            forward,
            wanted=lambda chip_id: any(_matches(chip_id, name) for name in wanted),
            progress=shown.advance,
        )


def check_bands(bundle: bundles.Bundle) -> None:
    """EvaluationError for a model that takes bands which chips don't have."""
    if unknown := [name for name in bundle.bands if name not in bands.BAND_NAMES]:
        raise EvaluationError(
            f"{bundle.path}: the model takes bands {', '.join(unknown)}; chips have {', '.join(bands.BAND_NAMES)}"
        )


def check_units(bundle: bundles.Bundle, info: sources.DatasetInfo) -> None:
    """EvaluationError where the units of labels and model are known and differ."""
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
    """Whether an id is the one asked for, or begins with it: `10SFF_144` is enough for `10SFF_144_2020-05-01`."""
    return chip_id == name or chip_id.startswith(f"{name}_")


def summarize(
    model: ScoredModel, config: ConfigDict, info: sources.DatasetInfo, blocks: tables.Blocks
) -> dict[str, Any]:
    """What `metrics.json` holds of one model; `info` is of the scored chips."""
    bundle, rows = model.bundle, tables.tables(model.scored, blocks=blocks)
    name, folder = Path(config.bundle).absolute().name, Path(config.data.path).absolute().name
    what = ", ".join(part for part in (f"{name} on {folder}", info.split, config.data.biome) if part)
    return {
        "experiment": config.experiment or what,
        **_over_all(rows),
        "best_constant": {
            "value": rows[0]["best_constant"],
            "rmse": rows[0]["best_constant_rmse"],
            "is": BEST_CONSTANT,
        },
        "label_error": label_error(model.scored, rows[0]["rmse"]),
        "uncertainty": how_sure(model.scored, model.channels, model.layers, blocks),
        "interval": {"level": LEVEL, "blocks": rows[0]["blocks"], "blocks_are": blocks.are, "is": interval_of(rows[0])},
        "label": {"name": bundle.label.name, "units": bundle.label.units},
        "bundle": {"path": str(config.bundle), "weights_sha256": bundle.weights_sha256},
        "data": {
            "path": str(config.data.path),
            "split": info.split,
            "chips": len(model.scored.chip_ids),
            "biome": config.data.biome,
            **model.statistics,
            "drawn": how_drawn(info.metadata),
        },
        "settings": {"reference": config.reference, "dtype": config.dtype, "matmul_precision": config.matmul_precision},
        "software": software_versions(),
        "tables": rows,
    }


def how_drawn(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """How the chips went to splits, of a data set's metadata: kind, buffer_m, fold ..., medians; None where unknown."""
    split = metadata.get("split")
    if not isinstance(split, dict):
        return None
    names = ("kind", "block_km", "buffer_m", "folds", "fold", "leave_out", "seed")
    return {name: split.get(name) for name in names} | dict(split.get("distances") or {})


def _drawn_line(drawn: dict[str, Any] | None) -> str:
    """`split: block, buffer 10,000 m; median distance to the nearest train chip: test chips 12.3 km, ...`."""
    if drawn is None:
        return "split: not known how it was drawn"
    fold = f" (fold {drawn['fold']} of {drawn['folds']})" if drawn["kind"] == "folds" else ""
    left_out = f", {drawn['leave_out']} left out" if drawn["leave_out"] else ""
    buffer = "not known" if drawn["buffer_m"] is None else f"{drawn['buffer_m']:,.0f} m"
    medians = [drawn.get(f"{what}_median_m") for what in ("test", "predicted")]
    texts = ["not known" if one is None else f"{one / 1000:.1f} km" for one in medians]
    return (
        f"split: {drawn['kind']}{fold}{left_out}, buffer {buffer}; median distance to the nearest train chip: test "
        f"chips {texts[0]}, chips of a map {texts[1]}"
    )


def compare(model: ScoredModel, other: ScoredModel, blocks: tables.Blocks) -> dict[str, Any]:
    """What `metrics.json` holds of `config.against`: its scores, and the first model's less these, pixel by pixel."""
    rows = tables.tables(other.scored, blocks=blocks)
    less = tables.differences(model.scored, other.scored, blocks=blocks)
    return {
        **_over_all(rows),
        "bundle": {"path": str(other.bundle.path), "weights_sha256": other.bundle.weights_sha256},
        **other.statistics,
        "label_error": label_error(other.scored, rows[0]["rmse"]),
        "tables": rows,
        "differences": {"is": DIFFERENCE, **_over_all(less), "interval": interval_of(less[0]), "tables": less},
    }


def _over_all(rows: Sequence[tables.Row]) -> dict[str, Any]:
    """Counts and scores of the first row, which is of all pixels."""
    names = [f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")]
    return {name: rows[0][name] for name in ("n", "chips", "tiles", *names)}


def interval_of(row: tables.Row) -> str:
    """How the intervals of a row come about, or why it has none."""
    if row["no_interval"]:
        return f"none: {row['no_interval']}"
    return f"a jackknife that leaves out one of {row['blocks']} blocks at a time, with Student's t"


def label_error(scored: tables.Scored, rmse: float) -> dict[str, Any]:
    """What geolocation and GEDI themselves add to the errors: {rmse, share of the squared error, is}; None unknown."""
    found = nugget(scored.pairs)
    if found is None or not rmse:
        return {"rmse": None, "share": None, "is": LABEL_ERROR}
    return {"rmse": found**0.5, "share": min(found / rmse**2, 1.0), "is": LABEL_ERROR}


def write(workdir: Path, result: dict[str, Any], scored: tables.Scored, pictures: Sequence[figures.ChipPanel]) -> None:
    """Tables, metrics and pictures, each written beside its place and renamed; those of an earlier run are replaced."""
    rows = result["tables"]
    tables.write_reference_table(workdir / "binwise_rmse.csv", rows, result["experiment"])
    tables.write_csv(workdir / "scores.csv", tables.COLUMNS, rows)
    compared = {"scores_against.csv": tables.COLUMNS, "differences.csv": tables.DIFFERENCE_COLUMNS}
    if "against" in result:
        other = result["against"]
        for (name, columns), mine in zip(compared.items(), (other, other["differences"]), strict=True):
            tables.write_csv(workdir / name, columns, mine["tables"])
    else:
        for name in compared:
            (workdir / name).unlink(missing_ok=True)  # of an earlier run
    if result["uncertainty"] is None:
        (workdir / "uncertainty.csv").unlink(missing_ok=True)  # of an earlier run
    else:
        tables.write_csv(workdir / "uncertainty.csv", UNCERTAINTY_COLUMNS, result["uncertainty"]["tables"])
    write_json(workdir / "metrics.json", result)
    for line in lines(result):
        log.info("%s", line)
    if not pictures:
        (workdir / "chips.png").unlink(missing_ok=True)  # of an earlier run
    draw(workdir, result, scored, pictures)
    log.info("tables and figures are in %s", workdir)


def draw(workdir: Path, result: dict[str, Any], scored: tables.Scored, pictures: Sequence[figures.ChipPanel]) -> None:
    """The pictures."""
    title, rows = result["experiment"], result["tables"]
    unit = unit_text(result["label"]["units"])
    name = result["label"]["name"].upper()
    values: tuple[Any, ...] = (scored.prediction, scored.label, result)
    scatter = figures.density_scatter(*values, title=title, name=name, unit=unit)
    figures.save(workdir / "density_scatter.png", scatter, title)
    figures.save(workdir / "residual_histogram.png", figures.residual_histogram(*values, title=title, unit=unit), title)
    below_zero = tables.bin_name(tables.BELOW_ZERO)  # predictions that most models can't make
    predicted = [row for row in rows if row["table"] == "prediction_bin" and (row["n"] or row["group"] != below_zero)]
    panels = {
        f"{name} of the label": [row for row in rows if row["table"] == "label_bin"],
        f"{name} predicted": predicted,
    }
    references = {"Best constant": result["best_constant"]["rmse"]}
    bins = figures.error_by_bin(panels, title=title, scores=result, references=references, unit=unit)
    figures.save(workdir / "error_by_bin.png", bins, title)
    sure = result["uncertainty"]
    if sure is None:
        (workdir / "uncertainty.png").unlink(missing_ok=True)  # of an earlier run
    else:
        told = [row for row in sure["tables"] if row["table"] == "prediction_bin" and row["n"]]
        given: tuple[Any, ...] = (sure["reliability"], told, sure["sparsification"])
        panels_of = figures.uncertainty_panels(*given, level=sure["level"], title=title, unit=unit)
        figures.save(workdir / "uncertainty.png", panels_of, title)
    if pictures:
        chips = figures.chip_panels(pictures, title=title, name=name, unit=unit)
        figures.save(workdir / "chips.png", chips, title)


def lines(result: dict[str, Any]) -> list[str]:
    """The tables that the console shows."""
    unit = result["label"]["units"]
    made = [f"{result['experiment']} ({unit}): {result['n']:,} labelled pixels of {result['chips']:,} chips"]
    made.append(_drawn_line(result["data"]["drawn"]))
    made += _table_lines(result["tables"])
    constant = result["best_constant"]
    made.append(f"best constant {constant['value']:.2f}: RMSE {constant['rmse']:.2f} ({constant['is']})")
    error = result["label_error"]
    known = error["rmse"] is not None
    about = f"{error['rmse']:.2f}, {error['share']:.0%} of the squared error" if known else "not known"
    made.append(f"geolocation and GEDI itself: about {about} ({error['is']})")
    if result["uncertainty"] is not None:
        made += sure_lines(result["uncertainty"], unit_text(unit))
    if "against" in result:
        other = result["against"]
        made += [f"against {other['bundle']['path']}:", *_table_lines(other["tables"])]
        made += [f"difference ({other['differences']['is']}):", *_table_lines(other["differences"]["tables"])]
    made.append(f"interval: {result['interval']['is']} ({result['interval']['blocks_are']})")
    return made


def _table_lines(rows: Sequence[tables.Row]) -> list[str]:
    made = [f"{'':24}{'RMSE':>8}{'95 % interval':>19}{'MAE':>8}{'bias':>8}{'R2':>9}{'n':>12}{'blocks':>8}"]
    prefixes = {"all": "", "label_bin": "label ", "biome": "biome "}
    for row in rows:
        if row["table"] in prefixes:
            label = prefixes[row["table"]] + row["group"]
            ends = f"{row['rmse_low']:.2f} to {row['rmse_high']:.2f}" if row["rmse_low"] is not None else ""
            cells = [_cell(row[score], 2) for score in ("mae", "bias")]
            made.append(
                f"{label:24}{_cell(row['rmse'], 2):>8}{ends:>19}{cells[0]:>8}{cells[1]:>8}{_cell(row['r2'], 3):>9}"
                f"{row['n']:>12,}{row['blocks']:>8,}"
            )
    return made


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
