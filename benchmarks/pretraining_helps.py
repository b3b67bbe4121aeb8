"""Does pretraining help where labels are few? `python -m benchmarks.pretraining_helps`.

The demo's model is pretrained on many chips of the context world without their labels, then fine-tuned on some chips
with labels, and from scratch on the same ones: same steps, statistics and seeds, each chip repeated until an epoch is
as long as with all of them. Each way has the recipe that is best for it on validation chips where labels are fewest,
among those of `RECIPES`; pretraining also the side of its masked cells. Scores are of test chips that nothing was
chosen by, at the cosine's end, and intervals of the seeds' paired differences by Student's t. The linear probe is a
ridge regression of a chip's mean biomass on the frozen encoder's pooled stage features, pretrained and random. Prints
what came out, whichever way it falls; a picture shows every seed.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from biomass_jax import figures
from biomass_jax.data import bands, records

FOLDER = common.FOLDER / "pretraining_helps"
WAYS = ("pretrained", "from scratch")
LABELLED, LABEL_ERROR = 0.01, 4.0  # share of pixels with a footprint, Mg/ha of its noise: as GEDI in the demo
ALPHAS = tuple(np.logspace(-2, 5, 22))
BATCH = 8
COLUMNS = 50  # of chips, 2.9 km each: all of them stay within their UTM zone
FROZEN = "frozen"  # share of the steps for which a recipe keeps the encoder as it is, before the rest trains all
RECIPES: dict[str, dict[str, Any]] = {
    "rate 1e-2": {"optimizer.learning_rate": 1e-2},
    "rate 3e-3": {"optimizer.learning_rate": 3e-3},
    "rate 1e-3": {"optimizer.learning_rate": 1e-3},
    "rate 1e-2, warm-up of 3 epochs": {"optimizer.learning_rate": 1e-2, "schedule.warmup_epochs": 3.0},
}
OF_PRETRAINED: dict[str, dict[str, Any]] = RECIPES | {
    "rate 3e-3, layer decay 0.75": {"optimizer.learning_rate": 3e-3, "optimizer.layer_decay": 0.75},
    "rate 3e-3, half of it frozen": {"optimizer.learning_rate": 3e-3, FROZEN: 0.5},
}
FIRST = "rate 3e-3"  # which the masks are compared by
MASKS = (8, 16, 32)  # px
SEARCHED = 1000  # the seed of the search; those of the scores count from 0


def context_chip(split: str, index: int, side: int, *, labelled: bool = True) -> records.Record:
    """A clear view of a piece of the context world that no other chip shows, with footprints on a few pixels."""
    from data_prep.synthetic.context.land import Context, biomass_of
    from data_prep.synthetic.context.view import surface
    from data_prep.synthetic.forest.view import Day, under_sky
    from data_prep.synthetic.landscape import PIXEL_M
    from data_prep.synthetic.world import EPSG, LEFT, TOP

    rng = np.random.default_rng([index, *split.encode()])
    land = Context()
    row, column = divmod(index, COLUMNS)
    left = LEFT + PIXEL_M * side * column
    top = TOP - 300e3 * ("train", "val", "test").index(split) - PIXEL_M * side * row
    ground, crowns = land.pixels(left, top, (side, side)), land.crowns(left, top, (side + 1, side))
    day = Day(leaves=0.9, clouds=0.0)
    image, _ = under_sky(surface(ground, crowns, day.leaves), day, rng)
    measured = np.maximum(biomass_of(ground) + LABEL_ERROR * rng.standard_normal((side, side)), 0)
    label = np.where(rng.random((side, side)) < LABELLED * labelled, measured, records.NO_LABEL)
    return records.Record(
        image=image,
        label=label.astype(np.float32),
        agbd_sigma=records.unknown_sigma(label),
        chip_id=f"{split}_{index}",
        tile="10SFF",
        row=-1,
        col=-1,
        epsg=EPSG,
        transform=np.array([PIXEL_M, 0, left, 0, -PIXEL_M, top]),
        biome="unknown",
        season="",
        sensors="L30",
        schema_version=records.SCHEMA_VERSION,
    )


def drawn(available: int, count: int, seed: int) -> np.ndarray:
    """Numbers of so many of the chips, drawn by a seed."""
    return np.random.default_rng([seed, count]).permutation(available)[:count]


def train(config: Any, workdir: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Run a config with other fields; the last validation's line."""
    from biomass_jax.training.run import train_and_evaluate

    config.update_from_flattened_dict(fields | {"epochs": None, "draw_every": 0})
    workdir.mkdir(parents=True)
    train_and_evaluate(config, workdir, stop=lambda: False)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/loss" in line][-1]


def pretrain(folder: Path, side: int, steps: int, mask: int, rate: float) -> tuple[Path, float]:
    """The demo's pretraining on all chips; its bundle, and its masked loss."""
    from configs import demo_pretrain

    workdir = FOLDER / f"pretrain_{mask}"
    fields = {"data.path": str(folder), "augment.size": side, "steps": steps, "batch_size": BATCH}
    fields |= {"mask_patch_size": mask, "log_every": 50, "optimizer.learning_rate": rate}
    return workdir / "best", train(demo_pretrain.get_config(), workdir, fields)["val/loss"]


class Job(NamedTuple):
    """A fine-tuning: on so many chips, drawn by a seed, from a bundle or from scratch."""

    labelled: int
    seed: int
    steps: int
    recipe: dict[str, Any]
    start: Path | None


def finetune(chips: dict[str, list[records.Record]], judged: str, job: Job, about: dict[str, Any]) -> float:
    """RMSE on the chips of the split `judged` at the end of a fine-tuning, Mg/ha."""
    from configs import demo_finetune
    from data_prep.shards import write as shards

    workdir = FOLDER / "finetune"
    shutil.rmtree(workdir, ignore_errors=True)
    total = len(chips["train"])
    chosen = [chips["train"][i] for i in drawn(total, job.labelled, job.seed)]
    repeated = [
        chosen[i % job.labelled] | {"chip_id": f"{chosen[i % job.labelled]['chip_id']}_{i // job.labelled}"}
        for i in range(total)
    ]
    for split in {"val", judged}:
        shards.write_shards({"train": repeated, "val": chips[split]}, workdir / split)
    recipe = {name: value for name, value in job.recipe.items() if name != FROZEN}
    fields = recipe | {"seed": job.seed, "log_every": job.steps, "batch_size": BATCH}
    fields |= {"data.means": tuple(about["means"]), "data.stds": tuple(about["stds"])}
    fields |= {"data.path": str(workdir / judged), "steps": job.steps}
    if job.start is not None:
        fields |= {"init_from": str(job.start), "load": "encoder"}
    if FROZEN in job.recipe:
        alone = round(job.recipe[FROZEN] * job.steps)
        before = {"steps": alone, "optimizer.freeze": ("encoder",), "data.path": str(workdir / "val")}
        train(demo_finetune.get_config(), workdir / "before", fields | before)
        fields |= {"steps": job.steps - alone, "init_from": str(workdir / "before" / "best"), "load": "all"}
    return train(demo_finetune.get_config(), workdir / "run", fields)["val/rmse"]


def stage_features(chips: list[records.Record], loaded: Any, variables: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features of all stages pooled over a chip's labelled pixels, and the mean of its labels: [n, d], [n]."""
    import jax

    def stages(model: Any, image: jax.Array) -> Any:
        return model.encoder.encode(model.encoder.embed(image))

    module = loaded.module()
    apply = jax.jit(lambda image: module.apply(variables, image, method=stages))
    features, means = [], []
    for chip in chips:
        image, label = chip["image"].astype(np.float32), chip["label"]
        image[bands.no_data(chip["image"])] = 0
        z = (image - loaded.means) / loaded.stds
        maps = [np.asarray(stage) for stage in apply(z[None].astype(np.float32))]
        features.append(pool_features(maps, (label >= 0)[None])[0])
        means.append(label[label >= 0].mean(dtype=np.float64))
    return np.array(features), np.array(means)


def probes(chips: dict[str, list[records.Record]], bundle: Path, counts: list[int], seeds: int) -> dict[str, Any]:
    """RMSE of the ridge regression on test chips, by encoder and number of training chips."""
    import jax

    from biomass_jax.bundle import load
    from biomass_jax.models.build import dummy_inputs

    loaded = load(bundle)
    module = loaded.module()
    random = jax.jit(module.init)(jax.random.key(0), *dummy_inputs(module))
    found: dict[str, Any] = {}
    for way, variables in (("pretrained encoder", loaded.variables), ("random encoder", random)):
        train_x, train_y = stage_features(chips["train"], loaded, variables)
        test_x, test_y = stage_features(chips["test"], loaded, variables)
        found[way] = {count: [] for count in counts}
        for count in counts:
            for seed in range(seeds):
                some = drawn(len(train_y), count, seed)
                found[way][count].append(ridge_probe(train_x[some], train_y[some], test_x, test_y, ALPHAS))
    return found


def counts_of(asked: list[str], available: int) -> list[int]:
    """Numbers of chips, `all` among them, in order.

    Raises:
        SystemExit: more than there are, or fewer than a batch takes.
    """
    counts = sorted({available if text == "all" else int(text) for text in asked})
    if counts[0] < 1 or counts[-1] > available:
        raise SystemExit(f"--chips {' '.join(asked)}: expected numbers from 1 to {available}, or all")
    return counts


def best_of(scores: dict[str, float]) -> str:
    """The name with the lowest score; every score is printed."""
    for name, score in scores.items():
        print(f"  {name}: {score:.2f} Mg/ha on the validation chips", flush=True)
    return min(scores, key=lambda name: scores[name])


def paired_interval(gains: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, by Student's t."""
    from scipy import stats

    values = np.asarray(gains, np.float64)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def main() -> None:
    """Pretrain, search recipes, fine-tune every way, print the tables, write JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=["20", "100", "all"], help="labelled training chips")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--unlabelled", type=int, default=2000, help="chips for pretraining alone")
    parser.add_argument("--train", type=int, default=160, help="labelled training chips that there are")
    parser.add_argument("--val", type=int, default=24, help="validation chips, which recipes are chosen by")
    parser.add_argument("--test", type=int, default=48, help="test chips")
    parser.add_argument("--side", type=int, default=96, help="px of a chip, a multiple of 32")
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--pretrain-rate", type=float, default=3e-3, help="learning rate of the pretraining")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--masks", type=int, nargs="+", default=MASKS, help="sides of masked cells to try, px")
    parser.add_argument("--json", type=Path, default=common.FOLDER / "pretraining_helps.json")
    options = parser.parse_args()
    counts = counts_of(options.chips, options.train)
    import jax

    from biomass_jax.bundle import read_meta
    from data_prep.shards import write as shards

    jax.config.update("jax_compilation_cache_dir", str(common.FOLDER / "jax"))
    shutil.rmtree(FOLDER, ignore_errors=True)
    sizes = {"train": options.train, "val": options.val, "test": options.test}
    chips = {split: [context_chip(split, i, options.side) for i in range(n)] for split, n in sizes.items()}
    more = (options.train + i for i in range(options.unlabelled))
    unlabelled = [context_chip("train", i, options.side, labelled=False) for i in more]
    shards.write_shards({"train": chips["train"] + unlabelled, "val": chips["val"]}, FOLDER / "shards")
    bundles = {
        mask: pretrain(FOLDER / "shards", options.side, options.pretrain_steps, mask, options.pretrain_rate)
        for mask in options.masks
    }
    about = read_meta(bundles[options.masks[0]][0])["input"]

    def validated(recipe: dict[str, Any], start: Path | None) -> float:
        return finetune(chips, "val", Job(counts[0], SEARCHED, options.steps, recipe, start), about)

    searched = {"mask": {str(mask): validated(RECIPES[FIRST], bundles[mask][0]) for mask in options.masks}}
    print("Pretrained, by the side of masked cells:")
    bundle, masked_loss = bundles[int(best_of(searched["mask"]))]
    chosen: dict[str, str] = {}
    for way, recipes, start in ((WAYS[0], OF_PRETRAINED, bundle), (WAYS[1], RECIPES, None)):
        searched[way] = {name: validated(recipe, start) for name, recipe in recipes.items()}
        print(f"{way}, by recipe:")
        chosen[way] = best_of(searched[way])
    tuned: dict[str, dict[int, list[float]]] = {way: {count: [] for count in counts} for way in WAYS}
    for count in counts:
        for seed in range(options.seeds):
            for way, start in zip(WAYS, (bundle, None), strict=True):
                job = Job(count, seed, options.steps, OF_PRETRAINED[chosen[way]], start)
                tuned[way][count].append(finetune(chips, "test", job, about))
                print(f"{count} chips, seed {seed}, {way}: {tuned[way][count][-1]:.2f} Mg/ha", flush=True)
    probed = probes(chips, bundle, counts, options.seeds)
    report(options, chips, {"masked_loss": masked_loss, "searched": searched, "chosen": chosen}, tuned, probed)


def report(options: Any, chips: dict[str, Any], search: dict[str, Any], tuned: Any, probed: Any) -> None:
    """Print the table, write JSON and the picture."""
    labels = [chip["label"][chip["label"] >= 0].astype(np.float64) for chip in chips["test"]]
    panels = {"Fine-tuning, labelled pixels": tuned, "Linear probe, means of chips": probed}
    constants = (np.concatenate(labels).std(), np.std([label.mean() for label in labels]))
    levels = {name: {"best constant": float(value)} for name, value in zip(panels, constants, strict=True)}
    rows = [
        [name, way, str(count), f"{np.mean(scores):.2f}", f"{min(scores):.2f}-{max(scores):.2f}"]
        for name, ways in panels.items()
        for way, by_count in ways.items()
        for count, scores in by_count.items()
    ]
    rows += [[name, "best constant", "", f"{level['best constant']:.2f}", ""] for name, level in levels.items()]
    print(f"\nMasked loss of the pretraining: {search['masked_loss']:.3f}; recipes: {search['chosen']}\n")
    common.print_table(["test RMSE", "way", "chips", "mean, Mg/ha", "lowest-highest"], rows)
    print()
    for name, (first, second) in ((name, tuple(ways)) for name, ways in panels.items()):
        for count, scores in panels[name][first].items():
            gains = np.subtract(panels[name][second][count], scores)
            low, high = paired_interval(gains)
            share = gains.mean() / np.mean(panels[name][second][count])
            print(
                f"{name}, {count} chips: {first} is better by {gains.mean():+.2f} Mg/ha ({low:+.2f} to {high:+.2f}), "
                f"{share:+.1%}, in {(gains > 0).sum()} of {len(gains)} seeds"
            )
    picture = options.json.with_suffix(".png")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    figures.save(
        picture,
        figures.by_training_size(
            panels, levels=levels, title="Pretraining and from scratch", score="Test RMSE (Mg/ha)"
        ),
    )
    print(f"picture: {picture}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    common.write_json(
        options.json, {"machine": common.machine(), "settings": settings, "levels": levels} | search | panels
    )


def pool_features(maps: Sequence[np.ndarray], valid: np.ndarray) -> np.ndarray:
    """Mean of each stage's features over the valid pixels of a chip, stages side by side.

    Args:
        maps: one array a stage, [B, h, w, C], each side dividing the chip's.
        valid: bool [B, H, W], pixels that count: with data, or those with a label. A token counts by its share of them.

    Returns:
        float64 [B, sum of C].

    Raises:
        ValueError: a chip without a valid pixel, or maps that do not divide the chips.
    """
    if empty := np.flatnonzero(~valid.any((1, 2))).tolist():
        raise ValueError(f"chips {empty} have no valid pixel to pool over; leave them out")
    b, height, width = valid.shape
    pooled = []
    for features in maps:
        n, h, w, _ = features.shape
        if n != b or height % h or width % w:
            raise ValueError(f"a map of shape {features.shape} does not divide chips of {valid.shape}")
        share = valid.reshape(b, h, height // h, w, width // w).mean((2, 4))
        pooled.append(np.einsum("bhw,bhwc->bc", share, features.astype(np.float64)) / share.sum((1, 2))[:, None])
    return np.concatenate(pooled, axis=1)


def ridge(features: np.ndarray, y: np.ndarray, alphas: Sequence[float]) -> tuple[np.ndarray, float, float]:
    """Ridge regression with the penalty that predicts left-out rows best.

    Minimises |y - intercept - features @ weights|^2 + alpha |weights|^2; the intercept is not penalised.

    Args:
        features: [n, d].
        y: [n].
        alphas: penalties to choose among, above 0.

    Returns:
        (weights [d], intercept, alpha).

    Raises:
        ValueError: no penalty, or one that is not above 0.
    """
    if not len(alphas) or min(alphas) <= 0:
        raise ValueError(f"alphas {list(alphas)}: expected penalties above 0")
    centre, mean = features.mean(0), y.mean()
    u, s, vt = np.linalg.svd(features - centre, full_matrices=False)
    projected = u.T @ (y - mean)
    best = (np.inf, 0.0)
    for alpha in alphas:
        shrink = s**2 / (s**2 + alpha)
        residual = y - mean - u @ (shrink * projected)
        leverage = 1 / len(y) + (u**2) @ shrink
        best = min(best, (float(np.mean((residual / (1 - leverage)) ** 2)), float(alpha)))
    alpha = best[1]
    weights = vt.T @ (s / (s**2 + alpha) * projected)
    return weights, float(mean - centre @ weights), alpha


def ridge_probe(
    features_train: np.ndarray,
    y_train: np.ndarray,
    features_val: np.ndarray,
    y_val: np.ndarray,
    alphas: Sequence[float],
) -> float:
    """RMSE on the validation chips of a ridge regression on the training chips.

    Features are z-scored with the training chips' statistics; the penalty is chosen by leaving training chips out, so
    that the score owes nothing to the validation chips.

    Args:
        features_train: [n, d].
        y_train: [n], Mg/ha.
        features_val: [m, d].
        y_val: [m].
        alphas: penalties to choose among, above 0.

    Returns:
        Mg/ha.
    """
    train, val = (np.asarray(a, np.float64) for a in (features_train, features_val))
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 0, std, 1)  # a constant feature tells nothing and weighs nothing
    weights, intercept, _ = ridge((train - mean) / std, np.asarray(y_train, np.float64), alphas)
    error = (val - mean) / std @ weights + intercept - y_val
    return float(np.sqrt(np.mean(error**2)))


if __name__ == "__main__":
    main()
