"""Which biome a chip counts for, and what happens where that can't be known."""

import geopandas
import numpy as np
import pytest
import shapely

from biomass_jax.data import sources
from biomass_jax.data.biomes import with_biomes
from biomass_jax.data.sources import DatasetInfo, Source
from biomass_jax.errors import BiomeError
from biomass_jax.pipeline import batches as pipeline
from tests.evaluation.worlds import BIOMES, chip, write_world


class Listed(Source):
    """Records in memory."""

    def __init__(self, records):
        self._records = records
        self.info = DatasetInfo("world", "test", len(records), (32, 32, 6), np.dtype("i2"), -9999)

    def _read(self, index):
        return self._records[index]

    def digest(self):
        return str(self.info)


def biomes_of(source):
    return [source[index]["biome"] for index in range(len(source))]


@pytest.fixture
def chips():
    return Listed([chip(index) for index in range(7)])


@pytest.fixture
def unknown():
    return Listed([chip(index, biome="unknown") for index in range(7)])


def test_records_count_before_the_folders_name(chips):
    assert with_biomes(chips, "/a/shards") is chips
    named = with_biomes(chips, "/a/wetland_datasplit")
    assert biomes_of(named) == [name if name != "unknown" else "wetland" for name in BIOMES]


def test_a_folders_name_is_every_chips_biome(unknown):
    assert set(biomes_of(with_biomes(unknown, "/a/taiga_datasplit"))) == {"taiga"}
    assert len(with_biomes(unknown, "/a/taiga_datasplit", biome="taiga")) == 7
    with pytest.raises(BiomeError, match=r"no chip of biome 'savanna'; found taiga \(7\)"):
        with_biomes(unknown, "/a/taiga_datasplit", biome="savanna")


def test_a_biome_that_cannot_be_known_is_an_error(unknown):
    with pytest.raises(BiomeError, match="all_ecos_datasplit: no chip's biome is known, so 'taiga' can't be chosen"):
        with_biomes(unknown, "/a/all_ecos_datasplit", biome="taiga")


def test_one_biome_is_chosen_and_batched(chips, tmp_path):
    chosen = with_biomes(chips, "/a/shards", biome="savanna")
    assert chosen.info.chips == len(chosen) == 3
    assert [chosen[i]["chip_id"] for i in range(3)] == [
        "10SGF_3_2020-05-01",
        "36NXF_4_2020-05-01",
        "36NXF_6_2020-05-01",
    ]
    batches = list(pipeline.eval_batches(chosen, batch_size=2, threads=1))
    assert [chip.biome for batch in batches for chip in batch.chips] == ["savanna"] * 3 + [""]
    with pytest.raises(IndexError):
        chosen[3]


def test_polygons_decide_at_the_centre_of_each_chip(chips, tmp_path):
    # Centres lie at x = 600,480 + 3,000 i, y = 4,099,520 m; polygons meet between the corner and the centre of chip 3.
    spans = {"Temperate Steppes": (590000, 609400), "Desert": (609401, 615481)}
    boxes = [shapely.box(west, 4090000, east, 4110000) for west, east in spans.values()]
    frame = geopandas.GeoDataFrame({"NAME": list(spans)}, geometry=boxes, crs=32610)
    frame.to_file(tmp_path / "p.gpkg")
    given = {"polygons": tmp_path / "p.gpkg", "field": "NAME"}
    named = with_biomes(chips, "/a/taiga_datasplit", **given)
    assert biomes_of(named) == ["temperate-steppes"] * 3 + ["desert"] * 3 + ["unknown"]
    assert biomes_of(with_biomes(chips, "/a", biome="desert", **given)) == ["desert"] * 3
    with pytest.raises(BiomeError, match="found columns NAME, geometry .*expected BIOME"):
        with_biomes(chips, "/a", polygons=tmp_path / "p.gpkg", field="BIOME")
    nowhere = Listed([chip(0, epsg=0, transform=np.zeros(6))])
    with pytest.raises(BiomeError, match="chip 10SFF_0_2020-05-01 has no coordinates, so no polygon tells its biome"):
        with_biomes(nowhere, "/a", **given)


def test_shards_know_their_biomes(tmp_path):
    source = sources.open_source(write_world(tmp_path / "shards"), "test")
    chosen = with_biomes(source, tmp_path / "shards", biome="taiga")
    assert biomes_of(chosen) == ["taiga"] * 3
