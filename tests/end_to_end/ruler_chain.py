"""The steps of data preparation over the ruler world, by their commands, and a plain reading of what they leave."""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import rasterio

from data_prep.chips import cells as chips
from data_prep.chips import splits
from data_prep.gedi import labels
from data_prep.gedi import orbits as gedi
from data_prep.hls import composite
from data_prep.season import Season
from data_prep.shards import write as shards
from data_prep.synthetic.ruler.world import write_ruler_world
from tests.data_prep.utm_series import to_degrees

FILL = -9999
SPLITS = ("train", "val", "test")
ORBITS = 6500  # the first group's; each group of tiles has a hundred of its own
GROUPS = {"10SFF": 0, "10SGF": 0, "10UGB": 1, "11UKS": 1, "22JGR": 2, "01KAB": 3}


@dataclass(frozen=True)
class Chain:
    """A prepared ruler world.

    Attributes:
        out: folder of prepared data.
        size: pixels along a chip's side.
        block_km: edge of the blocks that go to one split.
        min_labels: fewest labels of a chip.
    """

    out: Path
    size: int
    block_km: float
    min_labels: int

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What the world was made with; see data_prep.synthetic.ruler."""
        return json.loads((self.out / "plan.json").read_text())

    @cached_property
    def records(self) -> dict[str, list[dict[str, Any]]]:
        """Split -> records as TFDS's own reader gives them."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(str(self.out / "shards"))
        return {split: list(builder.as_data_source(split)) for split in builder.info.splits}

    @cached_property
    def everything(self) -> list[dict[str, Any]]:
        """The records of all splits."""
        return [record for records in self.records.values() for record in records]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the data set says of itself."""
        return json.loads(json.loads((self.out / "shards" / "metadata.json").read_text())["biomass_jax"])

    @cached_property
    def index(self) -> list[dict[str, Any]]:
        """The rows of chips.parquet, dropped chips too."""
        return pq.read_table(self.out / "chips" / "chips.parquet").to_pylist()

    @cached_property
    def shots(self) -> dict[int, tuple[float, float]]:
        """shot_number -> longitude, latitude as the HDF5 files have them."""
        found = {}
        for path in sorted((self.out / "granules" / "gedi").glob("*.h5")):
            with h5py.File(path) as file:
                for beam in (file[name] for name in file if name.startswith("BEAM")):
                    places = zip(beam["lon_lowestmode"][:].tolist(), beam["lat_lowestmode"][:].tolist(), strict=True)
                    found |= dict(zip(beam["shot_number"][:].tolist(), places, strict=True))
        return found

    def raster(self, folder: str, tile: str) -> np.ndarray:
        """All bands of a tile's composite (`composites`) or label raster (`labels`)."""
        (path,) = (self.out / folder / tile).glob("*.tif")
        with rasterio.open(path) as src:
            return src.read()


def run_chain(out: Path, *, shape: tuple[int, int], size: int, block_km: float, min_labels: int = 20) -> Chain:
    """Write the world and prepare it, each step by its command.

    Args:
        out: folder for everything.
        shape: (H, W) of a tile.
        size: pixels along a chip's side.
        block_km: edge of the blocks that go to one split.
        min_labels: fewest labels of a chip.
    """
    write_ruler_world(out, shape=shape, seed=5)
    chain = Chain(out, size, block_km, min_labels)
    run_tiles(chain)
    # A world of a few chips: a buffer would leave none.
    shares = ["--buffer-m", "0", "--fractions", "0.5", "0.25", "0.25"]
    ran(splits.main(["--out", str(out), "--block-km", str(block_km), *shares]))
    ran(shards.main(["--out", str(out), "--records-per-shard", "5"]))
    return chain


def run_tiles(chain: Chain) -> None:
    """The steps of each tile by itself: from a world that is written to the index of chips."""
    out, plan = chain.out, chain.plan
    # Each pixel has to come through, also those that a single scene sees.
    once = ["--season", "2020", "--min-clear", "1"]
    ran(composite.main([str(out / "granules" / "hls"), "--out", str(out / "composites"), *once]))
    seasons = {GROUPS[name]: tile["season"] for name, tile in plan["tiles"].items()}
    for name in plan["gedi"]:
        group = (int(name.split("_O")[1][:5]) - ORBITS) // 100
        season = [Season.parse(seasons[group])]
        with warnings.catch_warnings():
            # planned: one file lacks a beam, in others nothing is inside the season
            warnings.filterwarnings("ignore", message=r".*: (beams absent: \S+|filter season drops all)")
            gedi.convert_granule(out / "granules" / "gedi" / name, out / "footprints", season=season)
    ran(labels.main(["--out", str(out)]))
    ran(
        chips.main(
            ["--out", str(out), "--size", str(chain.size), "--min-labels", str(chain.min_labels), "--label-max", "1e9"]
        )
    )


def ran(code: int) -> None:
    """A command that fails says why and returns 1; the test is to fail there."""
    assert code == 0


def pixel_places(record: dict[str, Any], rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of places in a record, in pixels from its upper-left corner, from its own numbers alone.

    Args:
        record: with `transform` and `epsg`.
        rows: whole at pixels' upper edges.
        cols: whole at pixels' left edges.
    """
    a, b, c, d, e, f = record["transform"]
    return series_degrees(int(record["epsg"]), a * cols + b * rows + c, d * cols + e * rows + f)


def series_degrees(epsg: int, east: np.ndarray, north: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of a place in a UTM zone, by a series instead of PROJ."""
    assert epsg // 100 in (326, 327)
    return to_degrees(east, np.asarray(north) - (1e7 if epsg // 100 == 327 else 0), epsg % 100)


def metres_between(lon: np.ndarray, lat: np.ndarray, other_lon: np.ndarray, other_lat: np.ndarray) -> np.ndarray:
    """Distance of places that lie close together."""
    turn = (np.asarray(lon) - other_lon + 180) % 360 - 180
    return np.hypot(np.radians(turn) * np.cos(np.radians(lat)), np.radians(np.asarray(lat) - other_lat)) * 6378137
