"""What the demo's model learns, and what it can't: `python -m benchmarks.learning --shards demo_out/shards`.

The demo's config is trained three times: on the synthetic forest as it is, with each chip's labels given to
another chip, and with the labels moved by one pixel. The first has to come below 60 % of the best constant's RMSE,
the second must not, and the third has to be at least 15 % worse than the first; a picture holds all three with the
best constant and the limits that the forest is made with. Make the shards by `make demo`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from biomass_jax import figures
from biomass_jax.data import sources

FOLDER = common.FOLDER / "learning"
VARIANTS = ("as they are", "of another chip", "one pixel off")


def changed(records: list[Any], variant: str) -> list[Any]:
    """Chips with the labels of a variant; images stay."""
    labels = [record["label"] for record in records]
    if variant == "of another chip":
        labels = labels[1:] + labels[:1]
    elif variant == "one pixel off":
        moved = []
        for label in labels:
            new = np.full_like(label, -1)
            new[:, 1:] = label[:, :-1]
            moved.append(new)
        labels = moved
    return [record | {"label": label} for record, label in zip(records, labels, strict=True)]


def write_variant(shards_folder: str, variant: str) -> Path:
    """Shards whose training *and* validation labels are changed alike."""
    from data_prep.shards import write as shards

    folder = FOLDER / variant.replace(" ", "_") / "shards"
    if variant == VARIANTS[0]:
        shutil.copytree(shards_folder, folder)
        return folder
    splits = {}
    for split in ("train", "val"):
        source = sources.open_source(shards_folder, split)
        splits[split] = changed([source[i] for i in range(len(source))], variant)
    shards.write_shards(splits, folder)
    return folder


def train(shards_folder: str, variant: str, epochs: int | None) -> Path:
    """Run the demo's config; the workdir."""
    from biomass_jax.training.run import train_and_evaluate
    from configs import demo_finetune

    config = demo_finetune.get_config()
    config.data.path = str(write_variant(shards_folder, variant))
    config.epochs = epochs or config.epochs
    config.draw_every = 0
    workdir = FOLDER / variant.replace(" ", "_") / "run"
    workdir.mkdir()
    train_and_evaluate(config, workdir, stop=lambda: False)
    return workdir


def best_constant(shards_folder: str) -> float:
    """RMSE of the validation labels about their own mean, Mg/ha."""
    source = sources.open_source(shards_folder, "val")
    labels = np.concatenate([label[label >= 0] for label in (source[i]["label"] for i in range(len(source)))])
    return float(labels.astype(np.float64).std())


def main() -> None:
    """Print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", default="demo_out/shards", help="of a synthetic forest")
    parser.add_argument("--plan", type=Path, help="plan.json of the forest, for its limits (beside the shards)")
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    parser.add_argument("--json", type=Path, default=common.FOLDER / "learning.json")
    options = parser.parse_args()
    plan = json.loads((options.plan or Path(options.shards).parent / "plan.json").read_text())
    shutil.rmtree(FOLDER, ignore_errors=True)
    constant, limits = best_constant(options.shards), plan["limits"]
    runs, best = {}, {}
    for variant in VARIANTS:
        runs[variant] = train(options.shards, variant, options.epochs)
        lines = [json.loads(line) for line in (runs[variant] / "metrics.jsonl").read_text().splitlines()]
        best[variant] = min(line["val/rmse"] for line in lines if "val/rmse" in line)
    levels = {
        "the best constant": constant,
        "60 % of it": 0.6 * constant,
        "a model of single pixels (limit)": limits["one_pixel"]["rmse"],
        "a model that knows each pixel (limit)": limits["best"]["rmse"],
    }
    picture = options.json.with_suffix(".png")
    names = [f"labels {variant}" for variant in VARIANTS]
    figures.save(picture, figures.training_curves(list(runs.values()), names=names, levels=levels))
    rows = [[f"labels {name}", f"{rmse:.1f}", f"{rmse / constant:.0%}"] for name, rmse in best.items()]
    rows += [[name, f"{rmse:.1f}", f"{rmse / constant:.0%}"] for name, rmse in levels.items()]
    common.print_table(["validation RMSE", "Mg/ha", "of the best constant"], rows)
    plain, shuffled, shifted = (best[variant] for variant in VARIANTS)
    print(f"\none pixel off: {shifted / plain - 1:+.0%}; picture: {picture}")
    held = {
        "learns": plain < 0.6 * constant,
        "not noise": shuffled >= 0.6 * constant,
        "in place": shifted >= 1.15 * plain,
    }
    print(", ".join(f"{name}: {'yes' if holds else 'NO'}" for name, holds in held.items()))
    common.write_json(options.json, {"machine": common.machine(), "best": best, "levels": levels, "held": held})


if __name__ == "__main__":
    main()
