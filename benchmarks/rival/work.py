"""The rival's jobs, each in a process of its own: `python -m benchmarks.rival.work JOB ARGUMENTS`.

See `common.Worker`. Nothing here imports JAX.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.rival import model as torch_rival
from benchmarks.rival import tiled as torch_tiled

Once = Callable[[], dict[str, Any]]


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> float:
    """Peak, GiB: of the process on CPU, of torch's tensors on a GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else common.peak_rss_gib()


def open_model(weights: str, device: str = "cpu") -> torch_rival.Model:
    """The model of exported weights; `fields.json` lies beside them."""
    path = Path(weights)
    return torch_rival.load(path, json.loads(path.with_name("fields.json").read_text())).to(device)


def check(weights: str, shared: str) -> tuple[dict[str, Any], Once]:
    """Compare with ours."""
    return torch_rival.check(Path(weights), Path(shared)), dict


def _timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call and of waiting for the device."""

    def both() -> None:
        call()
        finish(device)

    return common.timed(both)


def forward(
    weights: str, batch_size: int, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> tuple[dict[str, Any], Once]:
    """`time_forward` of exported weights."""
    return time_forward(open_model(weights, device), batch_size, dtype, device, compiled)


def time_forward(
    model: torch_rival.Model, batch_size: int, dtype: str, device: str, compiled: bool
) -> tuple[dict[str, Any], Once]:
    """Seconds of a forward pass; bfloat16 with weights of bfloat16."""
    model = model.to(getattr(torch, dtype))
    images = torch.randn(batch_size, 6, 224, 224, device=device, dtype=getattr(torch, dtype))
    predict = torch.compile(model) if compiled else model

    def call() -> Tensor:
        with torch.inference_mode():
            return predict(images)

    seconds_first = _timed(call, device)
    once = common.per_call(call, lambda: finish(device))
    return {"seconds_first": seconds_first}, lambda: {"seconds": once(), "memory_gib": memory(device)}


def step(
    weights: str, batch_size: int, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> tuple[dict[str, Any], Once]:
    """`time_step` of exported weights."""
    return time_step(open_model(weights, device), batch_size, dtype, device, compiled)


def time_step(
    model: torch_rival.Model, batch_size: int, dtype: str, device: str, compiled: bool
) -> tuple[dict[str, Any], Once]:
    """Seconds of a training step on a batch that is there; bfloat16 by autocast over float32 weights."""
    model = model.train()
    optimizer = torch_rival.optimizer(model, device)
    predict = torch.compile(model) if compiled else model
    images = torch.randn(batch_size, 6, 224, 224, device=device)
    labels = torch.full((batch_size, 224, 224), -1.0)
    for label in labels.view(batch_size, -1):
        label[torch.randperm(224 * 224)[:250]] = 100 * torch.rand(250)
    labels = labels.to(device)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            prediction = predict(images)
        torch_rival.rmse(prediction.float(), labels).backward()
        optimizer.step()

    seconds_first = _timed(call, device)
    once = common.per_call(call, lambda: finish(device))
    return {"seconds_first": seconds_first}, lambda: {"seconds": once(), "memory_gib": memory(device)}


def map_scene(weights: str, scene: str, out: str, device: str = "cpu") -> tuple[dict[str, Any], Once]:
    """Seconds of a map in a running process."""
    predict = inference(open_model(weights, device), device)
    predict(torch.randn(torch_tiled.BATCH, 6, 224, 224))

    def once() -> dict[str, Any]:
        seconds = common.timed(lambda: torch_tiled.map_file(predict, Path(scene), Path(out)))
        return {"seconds": seconds, "memory_gib": common.peak_rss_gib()}

    return {}, once


def map_folder(weights: str, folder: str, out: str, device: str = "cpu") -> tuple[dict[str, Any], Once]:
    """Map every GeoTIFF of a folder, once: a whole process's work."""
    predict = inference(open_model(weights, device), device)
    images = sorted(Path(folder).glob("*.tif"))
    Path(out).mkdir(parents=True, exist_ok=True)
    for image in images:
        torch_tiled.map_file(predict, image, Path(out) / image.name)
    return {"maps": len(images)}, dict


def inference(model: torch_rival.Model, device: str) -> torch_tiled.Predict:
    """The model on its device, without gradients."""

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images.to(device))

    return predict


def pairs_of(folder: Path) -> list[tuple[Path, Path]]:
    """Image and label of each training chip in the published layout."""
    return [
        (path, folder / "train_labels" / path.name.replace("_img.tif", "_label.tif"))
        for path in sorted((folder / "train_images").glob("*_img.tif"))
    ]


def load_chips(folder: str, batch_size: int, workers: int) -> tuple[dict[str, Any], Once]:
    """Chips/s of the DataLoader alone, an epoch a round, files in the page cache after the first."""
    batches = torch_tiled.loader(pairs_of(Path(folder)), batch_size, workers)

    def epoch() -> int:
        return sum(len(torch_tiled.normalised(images)) for images, _ in batches)

    count = epoch()
    return {"chips": count}, lambda: {"chips_per_s": count / common.timed(epoch)}


JOBS: dict[str, common.Job] = {
    "check": check,
    "forward": forward,
    "step": step,
    "map": map_scene,
    "maps": map_folder,
    "load": load_chips,
}

if __name__ == "__main__":
    np.random.seed(0)
    torch.manual_seed(0)
    common.serve(JOBS)
