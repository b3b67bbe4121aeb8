"""Biomes from polygons: which one lies at a place."""

import os

from biomass_jax.data import biomes
from biomass_jax.data.biomes import slug
from biomass_jax.errors import BiomeError, PrepError

__all__ = ["Biomes", "slug"]


class Biomes(biomes.Biomes):
    """Polygons that name the biome at a place."""

    def __init__(self, path: str | os.PathLike[str], field: str) -> None:
        """Read the polygons; arguments as for `biomass_jax.data.biomes.Biomes`.

        Raises:
            PrepError: unreadable, without a CRS or without that column.
        """
        try:
            super().__init__(path, field)
        except BiomeError as error:
            raise PrepError(str(error)) from error
