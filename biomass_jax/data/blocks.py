"""Blocks of ground: which chips err together, and a training split drawn anew by them, a block bootstrap."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from biomass_jax.data.fingerprints import digest_of
from biomass_jax.data.raster.grid import equal_area_blocks
from biomass_jax.data.records import Record
from biomass_jax.data.sources import Chip, Place, Source
from biomass_jax.errors import DataError

BLOCK_KM = 50.0  # as data preparation splits by, where a data set doesn't tell
UNKNOWN = "unknown"

log = logging.getLogger(__name__)


def split_block_km(metadata: Mapping[str, Any]) -> float:
    """Edge of the blocks by which a data set was split, `BLOCK_KM` where its metadata don't tell."""
    split = metadata.get("split")
    value = split.get("block_km") if isinstance(split, dict) else None
    return float(value) if value else BLOCK_KM


def ground_blocks(places: Sequence[Place], block_km: float) -> np.ndarray:
    """Names of the blocks of ground in which places lie: (n,) object.

    Args:
        places: each with coordinates.
        block_km: see `equal_area_blocks`.

    Raises:
        RasterError: an EPSG code or a place can't be.
    """
    names = np.full(len(places), UNKNOWN, dtype=object)
    epsg, x, y = (np.array([place[i] for place in places]) for i in range(3))
    for code in np.unique(epsg).tolist():
        mine = epsg == code
        names[mine] = equal_area_blocks(code, x[mine], y[mine], block_km)
    return names


def chip_blocks(chips: Sequence[Chip], block_km: float) -> tuple[np.ndarray, str]:
    """Blocks in which chips lie, (n,) object, and what those are in words.

    They are blocks of ground, MGRS tiles where some chip has no coordinates. Errors as for `ground_blocks`.
    """
    if all(chip.place.epsg for chip in chips):
        return ground_blocks([chip.place for chip in chips], block_km), f"blocks of ground, {block_km:g} km on a side"
    tiles = np.array([chip.tile or UNKNOWN for chip in chips], dtype=object)
    return tiles, "MGRS tiles, since some chips have no coordinates"


def draw_blocks(source: Source, seed: int) -> list[int]:
    """Numbers of chips of a bootstrap: as many blocks as there are, drawn with replacement, each with all its chips.

    Chips of one block see the same forest under the same sky: drawn one by one they would nearly all be there again.
    Blocks are those of ground that the data set was split by, MGRS tiles where some chip has no coordinates. The draw
    depends on the blocks and the seed alone. Every chip is looked at once.

    Args:
        source: training chips.
        seed: 0 or more.

    Returns:
        block by block in the order of their names; those of a block drawn twice are there twice.

    Raises:
        DataError: fewer than two blocks.
        RasterError: a chip's EPSG code or place can't be.
    """
    chips = source.chips()
    of_chip, are = chip_blocks(chips, split_block_km(source.info.metadata))
    names, block = np.unique(of_chip.astype(str), return_inverse=True)
    where = f"{source.info.path}: split {source.info.split}"
    if len(names) < 2:
        raise DataError(
            f"{where}: config.data.bootstrap draws blocks, and all {len(chips)} chips lie in one ({are}); expected 2 "
            "blocks or more: take more data, or leave bootstrap out"
        )
    drawn = np.random.default_rng(seed).integers(len(names), size=len(names))
    numbers = [chip for one in np.sort(drawn) for chip in np.flatnonzero(block == one).tolist()]
    log.info(
        "%s: bootstrap %d: %d of %d %s; %d chips, %d of %d different ones",
        *(where, seed, len(set(drawn.tolist())), len(names), are, len(numbers), len(set(numbers)), len(chips)),
    )
    return numbers


class Drawn(Source):
    """Chips of another source by their numbers, any of which may come several times."""

    def __init__(self, whole: Source, numbers: Sequence[int]) -> None:
        """`numbers` of `whole`'s chips, see `draw_blocks`."""
        self._whole, self._numbers = whole, tuple(numbers)
        self.info = replace(whole.info, chips=len(self._numbers))

    def _read(self, index: int) -> Record:
        return self._whole[self._numbers[index]]

    def chips(self) -> list[Chip]:
        """See Source."""
        found = self._whole.chips()
        return [found[number] for number in self._numbers]

    def digest(self) -> str:
        """See Source."""
        return digest_of((self._whole.digest(), self._numbers))
