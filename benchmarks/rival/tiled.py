"""Maps and batches as the PyTorch original makes them: tiles held in memory until the end, chips read by a DataLoader.

Tiling as terratorch 1.2.11 has it with its defaults (tests/golden/README.md, "Tiling in words"): 224 px tiles 192 px
apart over the reflected raster, 8 px cropped, cosine ramps, 16 tiles a batch.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from biomass_jax.prediction.reference_tiling import reference_1_2_tiles
from biomass_jax.prediction.tiling import ramp_window

CROP, STRIDE, DELTA, BATCH = 224, 192, 8, 16
Predict = Callable[[Tensor], Tensor]


def read_image(path: Path, bands: list[int] | None = None) -> np.ndarray:
    """All bands as float32 with 0 for no-data, of which `bands` (from 0) are kept: [bands, H, W]."""
    with rasterio.open(path) as source:
        image = source.read().astype(np.float32)
        image[image == source.nodata] = np.nan
    image = np.nan_to_num(image, nan=0.0)
    return image if bands is None else image[bands]


def normalised(image: Tensor) -> Tensor:
    """Digital numbers [..., 6, H, W] -> z-scores."""
    means, stds = (torch.tensor(v, device=image.device)[:, None, None] for v in _STATISTICS)
    return (image - means) / stds


_STATISTICS = (common.GRANITE_MEANS, common.GRANITE_STDS)


def tiled(predict: Predict, image: Tensor) -> Tensor:
    """Map a z-scored image [6, H, W] -> [H, W]: every tile is cut, then predicted, then all are blended.

    Args:
        predict: [B, 6, h, w] -> [B, h, w].
        image: no smaller than a tile less its crop.
    """
    height, width = image.shape[1:]
    padded = F.pad(image[None], (DELTA,) * 4, mode="reflect")[0]
    places = reference_1_2_tiles(padded.shape[1:], (CROP, CROP), (STRIDE, STRIDE))
    tiles = [padded[:, row : row + CROP, column : column + CROP] for row, column, _ in places]
    predictions: list[Tensor] = []
    for start in range(0, len(tiles), BATCH):
        predictions.extend(predict(torch.stack(tiles[start : start + BATCH])).float().cpu())
    inner = slice(DELTA, CROP - DELTA)
    ramp = torch.from_numpy(ramp_window(CROP - 2 * DELTA, CROP - STRIDE - DELTA)).float()
    weights = torch.outer(ramp, ramp) + 1e-6
    total, used = torch.zeros(padded.shape[1:]), torch.zeros(padded.shape[1:])
    for (row, column, _), prediction in zip(places, predictions, strict=True):
        where = (slice(row + DELTA, row + CROP - DELTA), slice(column + DELTA, column + CROP - DELTA))
        total[where] += weights * prediction[inner, inner]
        used[where] += weights
    return (total / used)[DELTA : DELTA + height, DELTA : DELTA + width]


def write_map(like: Path, path: Path, values: Tensor) -> None:
    """A GeoTIFF of whole numbers in the image's profile, as the original writes it: [H, W]."""
    with rasterio.open(like) as source:
        profile = source.profile | {"count": 1, "dtype": "int16"}
    with rasterio.open(path, "w", **profile) as target:
        target.write(values.numpy().astype(np.int16), 1)


def map_file(predict: Predict, source: Path, path: Path) -> None:
    """One raster to a map, tile by tile where it is larger than a tile."""
    image = normalised(torch.from_numpy(read_image(source)))
    small = image.shape[1] <= CROP and image.shape[2] <= CROP
    write_map(source, path, predict(image[None])[0].float().cpu() if small else tiled(predict, image))


class Chips(Dataset):
    """Pairs of GeoTIFFs in the published layout, flipped at random.

    The original also turns half of the chips by up to 30 degrees, in Python; it is left out to the rival's advantage.
    """

    def __init__(self, pairs: list[tuple[Path, Path]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(image [6, H, W] digital numbers, label [H, W])."""
        image, label = self.pairs[index]
        pixels, known = read_image(image, [1, 2, 3, 4, 5, 6]), read_image(label)[0]
        if torch.rand(()) < 0.5:
            pixels, known = pixels[..., ::-1].copy(), known[..., ::-1].copy()
        return torch.from_numpy(pixels), torch.from_numpy(known)


def loader(pairs: list[tuple[Path, Path]], batch_size: int, workers: int) -> DataLoader:
    """Shuffled batches, the last partial one dropped, read by processes that stay."""
    return DataLoader(
        Chips(pairs), batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
