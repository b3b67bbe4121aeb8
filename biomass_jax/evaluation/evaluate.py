"""`config.mode = 'evaluate'`: scores of a bundle on a data set, as tables and pictures in the workdir."""

import dataclasses
import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from biomass_jax import bundle as bundles
from biomass_jax import figures
from biomass_jax.bundle import software_versions
from biomass_jax.data import bands, records, sources
from biomass_jax.data.biomes import Biomes, centre, folder_biome
from biomass_jax.data.records import UNKNOWN_BIOME, Record
from biomass_jax.data.sources import Source
from biomass_jax.errors import BiomeError, EvaluationError, name_list
from biomass_jax.evaluation import tables
from biomass_jax.evaluation.intervals import LEVEL
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.prediction.forward import Forward
from biomass_jax.runtime import processes
from biomass_jax.runtime.files import write_json
from biomass_jax.runtime.progress import Progress
from biomass_jax.tasks.create import choose_statistics
from biomass_jax.tasks.scores import SCORES

log = logging.getLogger(__name__)

READERS = 8  # threads
BEST_CONSTANT = "the mean label of the scored pixels, predicted everywhere"
NOISE_FLOOR = "the mean standard error (agbd_se) of the footprints behind the labels, from the data set's metadata"


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
        EvaluationError: a field is missing or wrong, the bundle doesn't fit the data, nothing to score.
        BundleError, DataError, RasterError, BandError, BiomeError: what can't be read, or isn't known.
    """
    group = config.data
    check_given(config)
    chosen = {name: group[name] for name in ("encoding", "label_max", "verify")}
    chosen["bands"] = bands.parse_band_list(group.bands)
    source = sources.open_source(group.path, group.split, **chosen)
    source = with_biomes(source, group.path, biome=group.biome, polygons=group.biomes, field=group.biome_field)
    placement = shardings()
    bundle = bundles.load(config.bundle, placement["replicated"])
    check_units(bundle, source.info)
    check_bands(bundle)
    means, stds, statistics = choose_statistics(
        group,
        bundle.bands,
        loaded=bundle,
        training=lambda: sources.open_source(group.path, "train", **chosen),
        reference=config.reference,
    )
    forward = Forward(
        bundle, means=means, stds=stds, dtype=config.dtype, matmul_precision=config.matmul_precision, **placement
    )
    wanted = chosen_chips(config.figures, source)
    on_chips = chip_forward(forward, bundle.bands, fill=source.info.fill, keep_labels=config.reference)
    part = score(source, on_chips, batch_size(forward, config.batch_size), group.threads, wanted)
    parts = [part]
    if jax.process_count() > 1:  # pickled: JAX would round float64
        parts = [pickle.loads(data) for data in processes.gather(pickle.dumps(part))]
    scored, pictures = tables.join(parts)
    if not len(scored.label):
        raise EvaluationError(f"{group.path}: split {group.split!r} has no labelled pixel in {len(source)} chips")
    result = summarize(scored, config, bundle, source.info, statistics)
    result["data"] |= {"means": means.tolist(), "stds": stds.tolist()}
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
) -> tables.ChipForward:
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


class NamedSource(Source):
    """Chips of a source with biomes from elsewhere; all of them, or a choice.

    Args:
        source: the chips.
        kept: numbers of those to keep, in order.
        biomes: of all chips; None for what the records say.
        default: for chips that are `unknown`.
    """

    def __init__(self, source: Source, kept: Sequence[int], biomes: list[str] | None, default: str) -> None:
        self._source, self._kept, self._biomes, self._default = source, kept, biomes, default
        self.info = dataclasses.replace(source.info, chips=len(kept))

    def _read(self, index: int) -> Record:
        number = self._kept[index]
        record = self._source[number]
        biome = record["biome"] if self._biomes is None else self._biomes[number]
        return {**record, "biome": self._default if biome == UNKNOWN_BIOME else biome}

    def digest(self) -> str:
        """See Source: that of the chips that these are chosen from."""
        return self._source.digest()


def with_biomes(
    source: Source,
    path: str | os.PathLike[str],
    *,
    biome: str | None = None,
    polygons: str | os.PathLike[str] | None = None,
    field: str | None = None,
) -> Source:
    """A source whose chips know their biomes, of one biome where one is asked for.

    Polygons count before the records, and these before the name of a published folder (`taiga_datasplit`). Polygons
    and the choice of one biome read every chip once before scoring begins.

    Args:
        source: as `data.sources.open_source` gives it.
        path: of the data set.
        biome: slug of the only biome to keep; None for all chips.
        polygons: file of polygons that name biomes; the one at a chip's centre counts.
        field: the file's column of names.

    Raises:
        BiomeError: the biome that was asked for isn't there, or can't be known; chips without a place in polygons;
            see `Biomes` too.
    """
    if bool(polygons) != bool(field):
        raise BiomeError("config.data.biomes and config.data.biome_field go together: a polygon file, and its column")
    default = UNKNOWN_BIOME if polygons else folder_biome(path)
    if not (polygons or biome):
        return source if default == UNKNOWN_BIOME else NamedSource(source, range(len(source)), None, default)
    log.info("%s: finding the biomes of %d chips", path, len(source))
    if polygons:
        found = Biomes(polygons, str(field)).at(_centres(source, path))
    else:
        found = [default if chip.biome == UNKNOWN_BIOME else chip.biome for chip in source.chips()]
    counts = Counter(found)
    if biome and set(counts) <= {UNKNOWN_BIOME}:
        raise BiomeError(
            f"{path}: no chip's biome is known, so {biome!r} can't be chosen; give polygons (config.data.biomes=FILE "
            "and config.data.biome_field=COLUMN), or a folder named after its biome, such as taiga_datasplit"
        )
    if biome and biome not in counts:
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise BiomeError(f"{path}: no chip of biome {biome!r}; found {there}")
    kept = [number for number, name in enumerate(found) if not biome or name == biome]
    return NamedSource(source, kept, found, UNKNOWN_BIOME)


def _centres(source: Source, path: str | os.PathLike[str]) -> np.ndarray:
    """(n, 2) longitudes and latitudes of the chips' centres."""

    def place(index: int) -> tuple[float, float]:
        record = source[index]
        if not record["epsg"]:
            raise BiomeError(f"{path}: chip {record['chip_id']} has no coordinates, so no polygon tells its biome")
        height, width = record["label"].shape
        return centre(record["epsg"], record["transform"], (height, width))

    with ThreadPoolExecutor(READERS) as pool:
        return np.array(list(pool.map(place, range(len(source)))), np.float64).reshape(-1, 2)


def summarize(
    scored: tables.Scored, config: ConfigDict, bundle: bundles.Bundle, info: sources.DatasetInfo, statistics: str
) -> dict[str, Any]:
    """What `metrics.json` holds; `info` is of the scored chips, `statistics` says where means and stds come from."""
    rows = tables.tables(scored, resamples=config.resamples, seed=config.seed)
    whole = rows[0]
    name, folder = Path(config.bundle).absolute().name, Path(config.data.path).absolute().name
    what = ", ".join(part for part in (f"{name} on {folder}", info.split, config.data.biome) if part)
    has_interval = whole["rmse_low"] is not None
    return {
        "experiment": config.experiment or what,
        **{key: whole[key] for key in ("n", "chips", "tiles")},
        **{f"{score}{end}": whole[f"{score}{end}"] for score in SCORES for end in ("", "_low", "_high")},
        "best_constant": {"value": whole["best_constant"], "rmse": whole["best_constant_rmse"], "is": BEST_CONSTANT},
        "noise_floor": {"rmse": noise_floor(info.metadata), "is": NOISE_FLOOR},
        "interval": {
            "level": LEVEL,
            "resamples": config.resamples,
            "seed": config.seed,
            "is": f"percentiles over resampled tiles ({whole['tiles']} with labels)"
            if has_interval
            else f"none: {whole['tiles']} tile(s) with labels and {config.resamples} resamples; it takes two tiles",
        },
        "label": {"name": bundle.meta["output"]["bands"][0], "units": bundle.meta["output"]["units"]},
        "bundle": {"path": str(config.bundle), "weights_sha256": bundle.weights_sha256},
        "data": {
            "path": str(config.data.path),
            "split": info.split,
            "chips": len(scored.chip_ids),
            "biome": config.data.biome,
            "statistics": statistics,
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


def noise_floor(metadata: dict[str, Any]) -> float | None:
    """Mean agbd_se in Mg/ha where a data set's metadata has it (`gedi.mean_agbd_se`), else None."""
    gedi = metadata.get("gedi")
    value = gedi.get("mean_agbd_se") if isinstance(gedi, dict) else None
    return None if value is None else float(value)


def write(workdir: Path, result: dict[str, Any], scored: tables.Scored, pictures: Sequence[figures.ChipPanel]) -> None:
    """Tables, metrics and pictures, each written beside its place and renamed; those of an earlier run are replaced."""
    rows = result["tables"]
    tables.write_reference_table(workdir / "binwise_rmse.csv", rows, result["experiment"])
    tables.write_csv(workdir / "scores.csv", tables.COLUMNS, rows)
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
    unit = result["label"]["units"].replace(" ha-1", "/ha")
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
    references = {"Best constant": result["best_constant"]["rmse"], "Noise floor": result["noise_floor"]["rmse"]}
    bins = figures.error_by_bin(panels, title=title, scores=result, references=references, unit=unit)
    figures.save(workdir / "error_by_bin.png", bins, title)
    if pictures:
        chips = figures.chip_panels(pictures, title=title, name=name, unit=unit)
        figures.save(workdir / "chips.png", chips, title)


def lines(result: dict[str, Any]) -> list[str]:
    """The table that the console shows."""
    unit = result["label"]["units"]
    made = [f"{result['experiment']} ({unit}): {result['n']:,} labelled pixels of {result['chips']:,} chips"]
    made.append(_drawn_line(result["data"]["drawn"]))
    made.append(f"{'':24}{'RMSE':>8}{'95 % interval':>19}{'MAE':>8}{'bias':>8}{'R2':>9}{'n':>12}")
    prefixes = {"all": "", "label_bin": "label ", "biome": "biome "}
    for row in result["tables"]:
        if row["table"] in prefixes:
            label = prefixes[row["table"]] + row["group"]
            ends = f"{row['rmse_low']:.2f} to {row['rmse_high']:.2f}" if row["rmse_low"] is not None else ""
            cells = [_cell(row[score], 2) for score in ("mae", "bias")]
            made.append(
                f"{label:24}{_cell(row['rmse'], 2):>8}{ends:>19}{cells[0]:>8}{cells[1]:>8}{_cell(row['r2'], 3):>9}"
                f"{row['n']:>12,}"
            )
    constant, floor = result["best_constant"], result["noise_floor"]["rmse"]
    made.append(f"best constant {constant['value']:.2f}: RMSE {constant['rmse']:.2f} ({constant['is']})")
    made.append(f"noise floor: {'not known' if floor is None else f'{floor:.2f}'} ({result['noise_floor']['is']})")
    made.append(f"interval: {result['interval']['is']}")
    return made


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
