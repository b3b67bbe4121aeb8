"""What an evaluation leaves: metrics.json, two CSV tables and the pictures."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biomass_jax import figures
from biomass_jax.bundle import software_versions
from biomass_jax.evaluation import tables as binwise
from biomass_jax.evaluation.intervals import LEVEL
from biomass_jax.evaluation.pixels import Picture
from biomass_jax.runtime.files import write_json
from biomass_jax.tasks.scores import SCORES

log = logging.getLogger(__name__)

BEST_CONSTANT = "the mean label of the scored pixels, predicted everywhere"
NOISE_FLOOR = "the mean standard error (agbd_se) of the footprints behind the labels, from the data set's metadata"


def summarize(scored: binwise.Scored, config: Any, bundle: Any, info: Any, statistics: str) -> dict[str, Any]:
    """What `metrics.json` holds.

    Args:
        scored: the pixels.
        config: of configs/evaluate.py.
        bundle: the model.
        info: `DatasetInfo` of the scored chips.
        statistics: where means and stds come from.
    """
    rows = binwise.tables(scored, resamples=config.resamples, seed=config.seed)
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
        },
        "settings": {"reference": config.reference, "dtype": config.dtype, "matmul_precision": config.matmul_precision},
        "software": software_versions(),
        "tables": rows,
    }


def noise_floor(metadata: dict[str, Any]) -> float | None:
    """Mean agbd_se in Mg/ha where a data set's metadata has it (`gedi.mean_agbd_se`), else None."""
    gedi = metadata.get("gedi")
    value = gedi.get("mean_agbd_se") if isinstance(gedi, dict) else None
    return None if value is None else float(value)


def write(workdir: Path, result: dict[str, Any], scored: binwise.Scored, pictures: Sequence[Picture]) -> None:
    """Tables, metrics and pictures, each written beside its place and renamed; those of an earlier run are replaced."""
    rows = result["tables"]
    binwise.write_reference_table(workdir / "binwise_rmse.csv", rows, result["experiment"])
    binwise.write_tables(workdir / "scores.csv", rows)
    write_json(workdir / "metrics.json", result)
    for line in lines(result):
        log.info("%s", line)
    draw(workdir, result, scored, pictures)
    log.info("tables and figures are in %s", workdir)


def draw(workdir: Path, result: dict[str, Any], scored: binwise.Scored, pictures: Sequence[Picture]) -> None:
    """The pictures."""
    title, rows = result["experiment"], result["tables"]
    unit = result["label"]["units"].replace(" ha-1", "/ha")
    name = result["label"]["name"].upper()
    values: tuple[Any, ...] = (scored.prediction, scored.label, result)
    scatter = figures.density_scatter(*values, title=title, name=name, unit=unit)
    figures.save(workdir / "density_scatter.png", scatter, title)
    figures.save(workdir / "residual_histogram.png", figures.residual_histogram(*values, title=title, unit=unit), title)
    tables = {
        f"{name} of the label": [row for row in rows if row["table"] == "label_bin"],
        f"{name} predicted": [row for row in rows if row["table"] == "prediction_bin" and (row["n"] or _is_bin(row))],
    }
    references = {"Best constant": result["best_constant"]["rmse"], "Noise floor": result["noise_floor"]["rmse"]}
    bins = figures.error_by_bin(tables, title=title, scores=result, references=references, unit=unit)
    figures.save(workdir / "error_by_bin.png", bins, title)
    if pictures:
        panels = [
            figures.ChipPanel(picture.rgb, picture.prediction, picture.label, f"{picture.chip_id}, {picture.biome}")
            for picture in pictures
        ]
        chips = figures.chip_panels(panels, title=title, name=name, unit=unit)
        figures.save(workdir / "chips.png", chips, title)


def _is_bin(row: binwise.Row) -> bool:
    """Not the row of predictions below 0, which most models can't make."""
    return row["group"] != binwise.bin_name(binwise.BELOW_ZERO)


def lines(result: dict[str, Any]) -> list[str]:
    """The table that the console shows."""
    unit = result["label"]["units"]
    made = [f"{result['experiment']} ({unit}): {result['n']:,} labelled pixels of {result['chips']:,} chips"]
    made.append(f"{'':24}{'RMSE':>8}{'95 % interval':>19}{'MAE':>8}{'bias':>8}{'R2':>9}{'n':>12}")
    for row in result["tables"]:
        if row["table"] in ("all", "label_bin", "biome"):
            name = {"all": "all", "label_bin": "label ", "biome": "biome "}[row["table"]]
            label = name if row["table"] == "all" else f"{name}{row['group']}"
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
