"""Biomes by name of folder and by the place of a chip's centre."""

import sys

import numpy as np
import pytest

from biomass_jax.data import biomes
from biomass_jax.errors import BiomeError


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("granite-geospatial-biomass-datasets/taiga_datasplit", "taiga"),
        ("/a/Tropical Moist_datasplit/", "tropical-moist"),
        ("/a/all_ecos_datasplit", "unknown"),
        ("/a/taiga", "unknown"),
        ("/taiga_datasplit/shards", "unknown"),
    ],
)
def test_folders_are_named_after_their_biome(path, expected):
    assert biomes.folder_biome(path) == expected


def test_the_centre_of_a_chip():
    # Zone 10's central meridian is 123 W, at 500 km; the place on it is an independent one: 50 N is 5,538,630.70 m
    # north (USGS Professional Paper 1395, table of meridian arcs, times 0.9996).
    transform = np.array([30.0, 0, 500000 - 30 * 112, 0, -30, 5538630.70 + 30 * 60])
    lon, lat = biomes.centre(32610, transform, (120, 224))
    assert lon == pytest.approx(-123, abs=1e-9)
    assert lat == pytest.approx(50, abs=1e-7)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "geopandas", None)
    with pytest.raises(BiomeError, match=r"pip install 'biomass-jax\[prep\]'"):
        biomes.Biomes("a.gpkg", "name")
