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

from benchmarks import common
from benchmarks.table import Row, Target
from biomass_jax.runtime import huge_pages

OURS, RIVAL = "benchmarks.jax_work", "benchmarks.torch_work"
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
        name = "_".join(str(value) for value in self.fields.values()) if self.fields else "swin_b"
        return str(common.random_bundle(self.fields, common.FOLDER / re.sub(r"\W+", "_", name)))

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

    def training_env(self) -> dict[str, str]:
        """Environment of a worker that trains: as `biomass_jax.main` starts a run."""
        return self.env() | huge_pages.environment()

    @property
    def torch_device(self) -> str:
        """The device's name in torch."""
        return "cuda" if self.device == "gpu" else "cpu"

    @property
    def known_peak(self) -> float | None:
        """The card's ceiling, GFLOP/s; None where the peak is measured beside each round."""
        return HOPPER_TFLOPS * 1e3 if any(name in self.kind for name in ("H100", "H200")) else None


@dataclass
class Part:
    """What a part of the suite found.

    Attributes:
        rows: of the table.
        raw: everything else, for the JSON.
    """

    rows: list[Row] = field(default_factory=list)
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


def shards() -> Path:
    """Shards of chips with texture, which zstd can't do away with; written once. Returns their folder."""
    from benchmarks.data_prep import make_chip
    from biomass_jax.data import records
    from data_prep.shards import write as writer

    path = common.FOLDER / "train_shards"
    if (path / "dataset_info.json").exists() and writer.read_metadata(path)["chips"]["counts"]["train"] == CHIPS:
        return path

    def record(split: str, index: int) -> records.Record:
        image, label = make_chip(index)
        return records.Record(
            image=np.ascontiguousarray(image[:6].transpose(1, 2, 0)).astype(np.int16),
            label=label,
            chip_id=f"{split}_{index}",
            tile="10SFF",
            row=0,
            col=0,
            epsg=0,
            transform=np.zeros(6),
            biome="unknown",
            season="",
            sensors="L30",
            schema_version=1,
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
) -> Row:
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
    values = {"ours": ours, "rival": theirs, "limit": limit}
    if settings.device == "cpu":
        return Row(part, name, "s", **values, less=True, target=target)
    rates = {key: [chips / seconds for seconds in found] for key, found in values.items()}
    return Row(part, name, "chips/s", **rates, target=target)


def memory_row(part: str, name: str, ours: float, rival: float | None, target: Target | None = None) -> Row:
    """Peak memory; both in GiB."""
    theirs = [] if rival is None else [rival * GB]
    return Row(part, name, "GB", [ours * GB], theirs, less=True, target=target)


def named(what: str, rival: str | None) -> str:
    """A row's name; torch.compile stands beside the original's own way."""
    return f"{what}, rival compiled" if rival == "compiled" else what
