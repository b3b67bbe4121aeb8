"""What the suite's parts share: the settings of a run, the weights that both models get, rows of timings."""

import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine

from benchmarks import common
from benchmarks.table import TableRow, Target
from biomass_jax.data import records

SIDE = records.CHIP_SIZE

OURS, RIVAL = "benchmarks.jax_work", "benchmarks.rival.work"
RIVALS = ("eager", "compiled")
# Rate of large bfloat16 matrix products measured on an H200, TFLOP/s; an H100 has the same cores.
HOPPER_TFLOPS = 790.0
HOPPER_TBYTES = 4.8  # an H200's memory, TB/s
GB = 2**30 / 1e9

CHIPS = 256  # in the shards

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Settings:
    """A run of the suite.

    Attributes:
        device: `cpu` or `gpu`.
        kind: the device's name.
        dtype: of the computation, `float32` or `bfloat16`.
        rivals: of `RIVALS`; none to measure ours alone.
        rounds: of every part; None for each part's own number.
        forward_sizes: batch sizes of the forward pass.
        step_sizes: batch sizes of the training step.
        fields: of the model where it is not Swin-B.
    """

    device: str
    kind: str
    dtype: str
    rivals: tuple[str, ...]
    rounds: int | None
    forward_sizes: tuple[int, ...]
    step_sizes: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> str:
        """The folder of random weights, written once."""
        return self.bundle_of({})

    def bundle_of(self, more: Mapping[str, Any]) -> str:
        """That of a model with more fields than the run's."""
        fields = {**self.fields, **more}
        name = "_".join([*([] if self.fields else ["swin_b"]), *(str(value) for value in fields.values())])
        return str(common.random_bundle(fields, common.FOLDER / re.sub(r"\W+", "_", name)))

    @property
    def training(self) -> dict[str, Any]:
        """What every training job takes."""
        return {"shards": str(shards()), "dtype": self.dtype, "fields": dict(self.fields)}

    def turns(self, usual: int) -> int:
        """Rounds of a part that usually takes so many."""
        return self.rounds or usual

    def env(self, cache: Path | None = None) -> dict[str, str]:
        """Environment of a worker. Without a cache the time to compile is the real one."""
        found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the other framework wants memory too
        found |= {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        if self.device == "cpu":
            found |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return found

    @property
    def torch_device(self) -> str:
        """The device's name in torch."""
        return "cuda" if self.device == "gpu" else "cpu"

    @property
    def known_peak(self) -> float | None:
        """The card's ceiling, GFLOP/s; None where the peak is measured beside each round."""
        return HOPPER_TFLOPS * 1e3 if any(name in self.kind for name in ("H100", "H200")) else None


@dataclass
class SuitePart:
    """What a part of the suite found.

    Attributes:
        rows: of the table.
        raw: everything else, for the JSON.
    """

    rows: list[TableRow] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


def has_torch() -> bool:
    """Whether the rival can run."""
    return importlib.util.find_spec("torch") is not None


@functools.cache
def weights(source: str) -> str:
    """A bundle as a checkpoint, its architecture in `fields.json` beside it."""
    from biomass_jax import bundle
    from biomass_jax.convert.export import export

    path = common.FOLDER / "rival" / "weights.ckpt"
    export(source, path, overwrite=True)
    path.with_name("fields.json").write_text(json.dumps(bundle.read_meta(source)["architecture"]))
    return str(path)


def make_chip(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic chip: (10, 224, 224) float32 digital numbers, as integers, and (224, 224) float32 labels."""
    rng = np.random.default_rng(index)
    rows, cols = np.mgrid[:SIDE, :SIDE] / SIDE
    image = np.empty((10, SIDE, SIDE), np.float32)
    for band in range(10):
        waves = sum(np.sin(2 * np.pi * (a * rows + b * cols + c)) for a, b, c in rng.uniform(0, 9, (3, 3)))
        image[band] = np.rint(400 * (band + 2) + 150 * waves + rng.normal(0, 40, (SIDE, SIDE)))
    label = np.full(SIDE * SIDE, -1, np.float32)
    label[rng.choice(label.size, 250, replace=False)] = rng.gamma(2, 50, 250)
    return image, label.reshape(SIDE, SIDE)


def write_geotiffs(folder: Path, count: int) -> None:
    """`count` chips in the published layout, train only."""
    form = {
        "driver": "GTiff",
        "width": SIDE,
        "height": SIDE,
        "dtype": "float32",
        "compress": "lzw",
        "interleave": "pixel",
    }
    place = {"crs": "EPSG:32610", "nodata": -9999}
    for index in range(count):
        image, label = make_chip(index)
        tile, cell = divmod(index, 256)
        transform = Affine(30, 0, 600000 + cell % 16 * SIDE * 30, 0, -30, 4200000 - cell // 16 * SIDE * 30)
        name = f"T10S{chr(65 + tile // 26)}{chr(65 + tile % 26)}_{cell}_tile"
        for kind, ending, values in (("images", "img", image), ("labels", "label", label[None])):
            path = folder / f"train_{kind}" / f"{name}_{ending}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path, "w", count=len(values), transform=transform, **form, **place) as dst:
                dst.write(values)


def shards() -> Path:
    """Shards of chips with texture, which zstd can't do away with; written once. Returns their folder."""
    from biomass_jax.data.shards import split_counts
    from data_prep.shards import write as writer

    path = common.FOLDER / "train_shards"
    if (path / "dataset_info.json").exists() and split_counts(path)["train"] == CHIPS:
        return path

    def record(split: str, index: int) -> records.Record:
        image, label = make_chip(index)
        return records.Record(
            image=np.ascontiguousarray(image[:6].transpose(1, 2, 0)).astype(np.int16),
            label=label,
            agbd_sigma=records.unknown_sigma(label),
            chip_id=f"{split}_{index}",
            tile="10SFF",
            row=0,
            col=0,
            epsg=0,
            transform=np.zeros(6),
            biome="unknown",
            season="",
            sensors="L30",
            schema_version=records.SCHEMA_VERSION,
        )

    splits = {"train": [record("train", i) for i in range(CHIPS)], "val": [record("val", i) for i in range(4)]}
    writer.write_shards(splits, path, overwrite=True)
    return path


def check_rival(settings: Settings) -> dict[str, float]:
    """Compare the two models on shared weights, in float32 on the CPU.

    Raises:
        WorkerError: they differ.
    """
    shared = common.FOLDER / "rival" / "shared.npz"
    env = settings.env() | {"JAX_PLATFORMS": "cpu"}
    checkpoint = weights(settings.bundle)
    common.ask(OURS, "reference", env, bundle=settings.bundle, shared=str(shared))
    return common.ask(RIVAL, "check", env, weights=checkpoint, shared=str(shared))


def timing_row(
    settings: Settings,
    part: str,
    name: str,
    runs: Runs,
    rival: str | None,
    *,
    chips: int,
    work: float,
    target: Target | None = None,
) -> TableRow:
    """Seconds on CPU, chips/s on a GPU, beside what the matrix products alone would take at the peak.

    Args:
        settings: of the run.
        part: of the suite.
        name: of the row.
        runs: of `ours` and of each rival: `seconds`, ours with `gflops_peak`.
        rival: whose.
        chips: in a call.
        work: of a chip, GFLOP.
        target: of the row.
    """
    peaks = common.column(runs["ours"], "gflops_peak")
    if settings.known_peak:
        peaks = [settings.known_peak] * len(peaks)
    ours = common.column(runs["ours"], "seconds")
    theirs = common.column(runs[rival], "seconds") if rival else []
    limit = [work * chips / peak for peak in peaks]
    if settings.device == "cpu":
        return TableRow(part, name, "s", ours, theirs, limit, less=True, target=target)
    ours, theirs, limit = ([chips / seconds for seconds in found] for found in (ours, theirs, limit))
    return TableRow(part, name, "chips/s", ours, theirs, limit, target=target)


def memory_row(part: str, name: str, ours: float, rival: float | None, target: Target | None = None) -> TableRow:
    """Peak memory; both in GiB."""
    theirs = [] if rival is None else [rival * GB]
    return TableRow(part, name, "GB", [ours * GB], theirs, less=True, target=target)


def named(what: str, rival: str | None) -> str:
    """A row's name; torch.compile stands beside the original's own way."""
    return f"{what}, rival compiled" if rival == "compiled" else what
