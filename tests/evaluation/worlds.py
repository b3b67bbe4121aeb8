"""Chips of a small synthetic data set, as shards, and the config that scores them."""

from pathlib import Path

import numpy as np

from configs import evaluate
from data_prep.shards import write as shards
from tests.data.test_records import make_record

SIZE = 32
TILES = ("10SFF", "10SFF", "10SGF", "10SGF", "36NXF", "36NXF", "36NXF")
BIOMES = ("taiga", "taiga", "taiga", "savanna", "savanna", "unknown", "savanna")


def chip(index: int, **changes):
    """A chip of random digital numbers, some pixels without data and some labelled ones among them."""
    rng = np.random.default_rng(index)
    image = rng.integers(100, 4000, (SIZE, SIZE, 6)).astype(np.int16)
    image[:4, :5] = 0
    image[10, 11] = -9999
    label = np.where(rng.random((SIZE, SIZE)) < 0.05, rng.gamma(2, 70, (SIZE, SIZE)), -1).astype(np.float32)
    label[2, 3], label[10, 11], label[20, 21] = 50, 60, 70 + index  # the first two have no data
    fields = {
        "image": image,
        "label": label,
        "chip_id": f"{TILES[index]}_{index}_2020-05-01",
        "tile": TILES[index],
        "biome": BIOMES[index],
        "transform": np.array([30.0, 0, 600000 + 3000 * index, 0, -30, 4100000]),
    }
    return make_record(SIZE, **{**fields, **changes})


def write_world(folder: Path, *, metadata=None, **changes) -> Path:
    """Shards with 7 test chips and 3 for training."""
    splits = {
        "test": [chip(index, **changes) for index in range(7)],
        "train": [chip(index, **{**changes, "chip_id": f"train_{index}"}) for index in range(3)],
    }
    shards.write_shards(splits, folder, metadata=metadata)
    return folder


def make_config(model: Path, path: Path, **fields):
    """configs/evaluate.py for a world, each chip a block, with dotted fields changed; no pictures of chips."""
    config = evaluate.get_config()
    config.update_from_flattened_dict(
        {"bundle": str(model), "data.path": str(path), "block_km": 2.0, "figures.count": 0} | fields
    )
    return config
