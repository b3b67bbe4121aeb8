"""The main jobs on synthetic data, as a user would run them: `make demo`, or `python -m launch.demo [--out demo_out]`.

Each command is printed before it runs, so it can be copied. What an earlier demo left in the folder is made anew.
"""

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.errors import FolderError
from biomass_jax.runtime.lock import one_writer
from biomass_jax.runtime.progress import duration

HERE = Path(__file__).resolve().parent
# A real checkpoint, but tiny: 125,327 parameters, three epochs. Installed with the package; in a checkout in tests/.
(CHECKPOINT,) = (
    folder / "state_dict.ckpt"
    for folder in (HERE / "checkpoint", HERE.parent / "tests" / "golden" / "ckpt_micro_cli")
    if folder.is_dir()
)
LOCK = ".demo.lock"  # its own: the stages take theirs in the same folders
TILE = "10SFF"  # what data_prep.synthetic writes
BLOCK_KM = 3.5  # of the splits' blocks, about a chip's side
GRANULE = "HLS.L30.T10SFF.2020198T184512.v2.0"  # one of its scenes, of which a corner lies off the swath
MADE = (
    "granules",
    "footprints",
    "composites",
    "labels",
    "chips",
    "shards",
    "check",
    "preview",
    "state",
    "pretrain",
    "finetune",
    "calibrated",
    "scores",
    "biomass",
    "model",
    "maps",
    "notebook",
)


# The demo compiles for as long as it computes: half of LLVM's work saves half of that, and its steps are as fast.
XLA_FLAGS = "--xla_backend_optimization_level=1"
# What each stage takes on two cores, and what compiling adds in the first demo; later ones find their programs.
USUAL_SECONDS = (12, 8, 2, 20, 61, 6, 4, 6, 1, 3, 3)
COMPILING_SECONDS = (0, 0, 0, 18, 20, 6, 2, 3, 0, 2, 3)


class DemoError(Exception):
    """A stage failed."""


def stages(out: Path) -> list[tuple[str, list[str]]]:
    """Titles and commands, in order; a command is what follows `python`."""
    main = ("-m", "biomass_jax.main", "--config")
    return [
        (
            "Make up a forest that is told by its surroundings: HLS scenes of a small tile, GEDI orbits over it",
            ["-m", "data_prep", "synthetic", "--world", "context", "--out", f"{out}", "--size", "1568x1344"],
        ),
        (
            "Prepare training data: composite, labels, chips, splits, shards, check",
            ["-m", "data_prep", "prepare", "--config", "prepare", "--out", f"{out}"]
            # As small as 47 by 40 km ask for: chips of a quarter of the usual size, so that enough of them can be set
            # aside. One clear scene of five is enough, since their clouds are all masked.
            + ["--config.season=2020", "--config.chips.size=112", "--config.chips.min_labels=5"]
            + [f"--config.splits.block_km={BLOCK_KM}", "--config.splits.fractions=(0.7,0.15,0.15)"]
            + ["--config.splits.buffer_m=0", "--config.composite.min_clear=1"],
        ),
        (
            "Draw the tile with its labels and chips",
            ["-m", "data_prep", "preview", "--out", f"{out}", "--tile", TILE, "--png", f"{out}/preview/{TILE}.png"],
        ),
        (
            "Pretrain a tiny encoder: paint masked patches back, without labels",
            [*main, "demo_pretrain", "--workdir", f"{out}/pretrain", f"--config.data.path={out}/shards"],
        ),
        (
            "Fine-tune it on the footprints: biomass, and how far off that may be",
            [*main, "demo_finetune", "--workdir", f"{out}/finetune", f"--config.data.path={out}/shards"]
            + [f"--config.init_from={out}/pretrain/best", "--config.load=encoder"],
        ),
        (
            "Calibrate how sure it says it is, on chips that it has not learnt from",
            ["-m", "biomass_jax.evaluation.calibrate", "--bundle", f"{out}/finetune/best", "--data", f"{out}/shards"]
            + ["--split", "val", "--output", f"{out}/calibrated"],
        ),
        (
            "Score it on chips that neither has seen",
            [*main, "evaluate", "--workdir", f"{out}/scores", f"--config.bundle={out}/calibrated"]
            + [f"--config.data.path={out}/shards"],
        ),
        (
            "Map the whole tile",
            [*main, "predict", "--workdir", f"{out}/biomass", f"--config.bundle={out}/calibrated"]
            + [f"--config.inputs={out}/composites/{TILE}", "--config.quicklook=true", "--config.di=false"],
        ),
        (
            "Put map and scores on one page",
            ["-m", "biomass_jax.regional.report", f"{out}/biomass", f"{out}/scores", "--out", f"{out}/report.html"]
            + ["--title", "A synthetic forest"],
        ),
        *_of_a_checkpoint(out),
    ]


def _of_a_checkpoint(out: Path) -> list[tuple[str, list[str]]]:
    """The stages that take a model of PyTorch's."""
    return [
        (
            "Convert a PyTorch checkpoint into a model bundle",
            # This checkpoint doesn't hold the statistics of its training images; the released model's stand in.
            [
                "-m",
                "biomass_jax.convert",
                "--input",
                f"{CHECKPOINT}",
                "--statistics",
                "granite",
                "--output",
                f"{out}/model",
            ],
        ),
        (
            "Map one of the scenes with it",
            ["-m", "biomass_jax.main", "--config", "predict", "--workdir", f"{out}/maps"]
            + [f"--config.bundle={out}/model", f"--config.inputs={out}/granules/hls/{GRANULE}"]
            + ["--config.quicklook=true"],
        ),
    ]


def estimate(elapsed: Sequence[float], *, compiling: bool) -> float | None:
    """Seconds left once the first stages took `elapsed`, by the stages' usual times; None before the first is done.

    What a stage compiles is counted where it falls, and says nothing of how fast stages run that compile less.
    """
    usual = [run + compiling * more for run, more in zip(USUAL_SECONDS, COMPILING_SECONDS, strict=True)]
    done = sum(usual[: len(elapsed)])
    return sum(elapsed) / done * sum(usual[len(elapsed) :]) if elapsed else None


def run(title: str, command: list[str], cache: Path) -> None:
    """Print a stage's command and run it; `cache` keeps compiled programs for the second demo.

    Raises:
        DemoError: the command failed.
    """
    print(f"$ python {shlex.join(command)}", flush=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache.absolute()), "MPLBACKEND": "Agg", **os.environ}
    environment["XLA_FLAGS"] = environment.get("XLA_FLAGS") or XLA_FLAGS
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        raise DemoError(f"'{title}' failed with exit code {code}; the command is printed above")


def truth_of(out: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Biomass of the whole tile, Mg/ha [H, W]: as it is, and as well as labels can tell it; the left and top edge."""
    import json

    from data_prep.synthetic.context.land import Context
    from data_prep.synthetic.context.world import around

    plan = json.loads((out / "plan.json").read_text())
    _, _, left, _, _, top = plan["tiles"][TILE]["transform"]
    biomass = Context(plan["seed"]).pixel_biomass(left, top, tuple(plan["size"]))
    return biomass.astype(np.float32), around(biomass), (left, top)


def beside_truth(out: Path, truth: np.ndarray) -> tuple[Path, float]:
    """Draw the map beside the synthetic forest's own biomass; the picture, and the map's R2."""
    from biomass_jax import figures
    from biomass_jax.data.raster.image import read_preview

    (path,) = (out / "biomass").glob("*_agbd.tif")
    found = read_preview(path, max_size=10_000)  # its full size; no-data is NaN
    known = np.isfinite(found)
    residual = np.var(found[known] - truth[known]) + np.mean(found[known] - truth[known]) ** 2
    r2 = float(1 - residual / np.var(truth[known]))
    picture = out / "biomass" / "beside_truth.png"
    panels = {f"Map, R2 {r2:.2f}": found, "The synthetic forest": truth}
    figures.save(picture, figures.maps_side_by_side(panels, name="agbd", unit="Mg/ha", zoom=160))
    return picture, r2


def cubic(bands: np.ndarray) -> np.ndarray:
    """All products of up to three of a pixel's z-scored bands: [n, bands] -> [n, products]."""
    choices = (itertools.combinations_with_replacement(range(bands.shape[1]), k) for k in (1, 2, 3))
    return np.stack([bands[:, list(one)].prod(1) for one in itertools.chain(*choices)], 1)


def rmse_of_one_pixel(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Mg/ha: of a cubic ridge regression on the bands of single pixels, [n, 6], and their labels, [n]."""
    (seen, target), (unseen, expected) = train, test
    middle, spread = seen.mean(0), seen.std(0)
    x, new = (cubic((bands - middle) / spread) for bands in (seen, unseen))
    middle, spread = x.mean(0), x.std(0)
    x, new = ((products - middle) / spread for products in (x, new))
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (target - target.mean()))
    return float(np.sqrt(np.mean((new @ weights + target.mean() - expected) ** 2)))


def labelled_pixels(chips: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Bands [n, 6] and labels [n] of all pixels of chips that have a label."""
    found = [(chip["image"][chip["label"] >= 0], chip["label"][chip["label"] >= 0]) for chip in chips]
    bands, labels = (np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True))
    return bands, labels


def rmse_of_oracle(chips: Iterable[Any], told: np.ndarray, corner: tuple[float, float]) -> float:
    """Mg/ha: of labels against the truth as well as labels can tell it, [H, W] from a corner on."""
    errors = []
    for chip in chips:
        side, _, left, _, _, top = chip["transform"]
        row, col = round((corner[1] - top) / side), round((left - corner[0]) / side)
        has = chip["label"] >= 0
        errors.append(chip["label"][has] - told[row : row + len(has), col : col + has.shape[1]][has])
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def summary(out: Path) -> str:
    """Return where shards, models, maps and pictures lie, with a few numbers read back from them."""
    import json

    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(out / "shards")
    sources = {split: builder.as_data_source(split) for split in builder.info.splits}
    chip = sources["train"][0]
    scores = json.loads((out / "scores" / "metrics.json").read_text())
    sure = scores["uncertainty"]
    truth, told, corner = truth_of(out)
    one_pixel = rmse_of_one_pixel(*(labelled_pixels(sources[split]) for split in ("train", "test")))
    oracle = rmse_of_oracle(sources["test"], told, corner)
    picture, r2 = beside_truth(out, truth)
    return "\n".join(
        [
            f"shards     {out / 'shards'}: " + ", ".join(f"{len(chips)} {split}" for split, chips in sources.items()),
            f"first chip {chip['chip_id'].decode()}, image {chip['image'].shape}, {(chip['label'] >= 0).sum()} labels",
            f"picture    {out / 'preview' / TILE}.png",
            f"model      {out / 'calibrated'}, which says how sure it is",
            f"scores     {out / 'scores'}: RMSE {scores['rmse']:.1f} Mg/ha on the test chips, R2 {scores['r2']:.2f}",
            f"beside it  {one_pixel:.1f} Mg/ha by a regression on single pixels, {oracle:.1f} for who knows the truth",
            f"intervals  for {sure['level']:.0%} hold {sure['coverage']:.1%} of the test chips' labels, and are "
            f"{sure['width']:.0f} Mg/ha wide on average",
            f"map        {out / 'biomass'}: R2 {r2:.2f} against the synthetic forest",
            f"picture    {picture}",
            f"page       {out / 'report.html'}: map, scores, methods in words, inputs",
            f"another    {out / 'maps'}: by a PyTorch checkpoint that is a toy; its numbers mean nothing",
            "How to map with the released model: the README, or `biomass-jax convert --help`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run all stages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description="The main job on synthetic data.")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for everything (demo_out)")
    out = parser.parse_args(argv).out
    try:
        with one_writer(out, LOCK):
            return run_all(out)
    except FolderError as error:
        print(f"make demo: {error}", file=sys.stderr)
        return 1


def run_all(out: Path) -> int:
    """Make the folder anew, stage by stage; return the exit code."""
    began = time.monotonic()
    for folder in MADE:
        shutil.rmtree(out / folder, ignore_errors=True)
    elapsed: list[float] = []
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", out / ".jax_cache"))
    compiling = not cache.is_dir() or not any(cache.iterdir())
    try:
        for title, command in (found := stages(out)):
            left = estimate(elapsed, compiling=compiling)
            about = "" if left is None else f", about {duration(left)} left"
            print(f"\n== {len(elapsed) + 1} of {len(found)}{about}: {title}", flush=True)
            began_stage = time.monotonic()
            run(title, command, cache)
            elapsed.append(time.monotonic() - began_stage)
            print(f"   {elapsed[-1]:.1f} s")
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    print(f"\n== Done in {time.monotonic() - began:.0f} s\n{summary(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
