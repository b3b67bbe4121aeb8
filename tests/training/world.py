"""Small shards whose labels follow from the image, for tests of training."""

import numpy as np

from biomass_jax.data import records
from data_prep.shards import write as shards

SIDE = 32
BIOMES = ("taiga", "mangroves")


def make_record(split, index, seed=0):
    rng = np.random.default_rng([seed, index, *split.encode()])
    image = rng.normal([500, 900, 1000, 2600, 2300, 1600], 300, (SIDE, SIDE, 6)).astype(np.int16)
    biomass = np.clip(120 + 0.2 * (image[..., 3] - 2600.0) - 0.1 * (image[..., 2] - 1000.0), 0, None)
    known = rng.random((SIDE, SIDE)) < 0.1
    tile = "10SFF" if index % 3 else "11SKA"
    return records.Record(
        image=image,
        label=np.where(known, biomass, -1).astype(np.float32),
        agbd_sigma=records.unknown_sigma(known),
        chip_id=f"{split}_{index}",
        tile=tile,
        row=0,
        col=0,
        epsg=0,
        transform=np.zeros(6),
        biome=BIOMES[index % 2],
        season="2020-05-01/2020-10-01",
        sensors="L30",
        schema_version=records.SCHEMA_VERSION,
    )


def write(folder, train=20, val=7, test=5, seed=0, change=lambda record: record):
    counts = {"train": train, "val": val, "test": test}
    splits = {name: [change(make_record(name, i, seed)) for i in range(n)] for name, n in counts.items() if n}
    shards.write_shards(splits, folder, records_per_shard=8)
    return folder


TINY = {  # two stages, which compile in half the time of four
    "model.embed_dim": 8,
    "model.depths": (1, 1),
    "model.num_heads": (1, 2),
    "model.mlp_ratio": 2.0,
    "model.drop_path_rate": 0.1,
    "model.decoder_channels": 8,
    "data.threads": 2,
    "batch_size": 4,
    "log_every": 2,
}
# The same for pretraining, which has no decoder of these channels.
TINY_PRETRAINING = {k: v for k, v in TINY.items() if k != "model.decoder_channels"} | {"model.encoder_stride": 8}


def configure(config, **fields):
    """Set fields by their dotted names; `__` stands for the dot in keywords."""
    for name, value in (TINY | {key.replace("__", "."): value for key, value in fields.items()}).items():
        group, _, field = name.rpartition(".")
        (config[group] if group else config)[field] = value
    return config
