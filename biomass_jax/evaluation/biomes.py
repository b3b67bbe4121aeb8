"""Which biome each chip of an evaluation belongs to, and the choice of one biome."""

import dataclasses
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from biomass_jax.data.biomes import Biomes, centre, folder_biome
from biomass_jax.data.records import UNKNOWN_BIOME, Record
from biomass_jax.data.sources import Source
from biomass_jax.errors import BiomeError

log = logging.getLogger(__name__)

READERS = 8  # threads


class NamedSource(Source):
    """Chips of a source with biomes from elsewhere; all of them, or a choice.

    Args:
        source: the chips.
        indices: those to keep, in order; None for all.
        biomes: of the kept ones; None for `default`.
        default: for records that say `unknown`, where `biomes` is None.
    """

    def __init__(
        self,
        source: Source,
        *,
        indices: list[int] | None = None,
        biomes: list[str] | None = None,
        default: str = UNKNOWN_BIOME,
    ) -> None:
        self._source = source
        self._indices = indices
        self._biomes = biomes
        self._default = default
        self.info = dataclasses.replace(source.info, chips=len(source) if indices is None else len(indices))

    def _read(self, index: int) -> Record:
        record = self._source[index if self._indices is None else self._indices[index]]
        biome = record["biome"] if self._biomes is None else self._biomes[index]
        if self._biomes is None and biome == UNKNOWN_BIOME:
            biome = self._default
        return {**record, "biome": biome}


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
    default = folder_biome(path)
    if not polygons and not biome:
        return source if default == UNKNOWN_BIOME else NamedSource(source, default=default)
    log.info("%s: finding the biomes of %d chips", path, len(source))
    if polygons:
        found = Biomes(polygons, str(field)).at(_centres(source, path))
    else:
        found = [default if chip.biome == UNKNOWN_BIOME else chip.biome for chip in source.chips()]
    if not biome:
        return NamedSource(source, biomes=found)
    counts = Counter(found)
    if set(counts) <= {UNKNOWN_BIOME}:
        raise BiomeError(
            f"{path}: no chip's biome is known, so {biome!r} can't be chosen; give polygons (config.data.biomes=FILE "
            "and config.data.biome_field=COLUMN), or a folder named after its biome, such as taiga_datasplit"
        )
    if biome not in counts:
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise BiomeError(f"{path}: no chip of biome {biome!r}; found {there}")
    kept = [i for i, name in enumerate(found) if name == biome]
    return NamedSource(source, indices=kept, biomes=[biome] * len(kept))


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
