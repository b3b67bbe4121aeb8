"""Sources of chips for tests: in memory, with numbers that tell which chip a row is."""

import numpy as np

from biomass_jax.data import records
from biomass_jax.data.sources import DatasetInfo, Source


def make_record(number, size=4, dtype=np.int16):
    """A record whose pixels all hold its number."""
    return records.Record(
        image=np.full((size, size, 6), number + 1, dtype),
        label=np.full((size, size), number, np.float32),
        agbd_sigma=np.full((size, size), -1, np.float32),
        chip_id=f"chip_{number}",
        tile=("10SFF", "22KGA")[number % 2],
        row=-1,
        col=-1,
        epsg=0,
        transform=np.zeros(6),
        biome=("taiga", "unknown")[number % 2],
        season="",
        sensors="L30",
        schema_version=records.SCHEMA_VERSION,
    )


class Memory(Source):
    """`count` chips, numbered from `first` on."""

    def __init__(self, count, *, first=0, size=4, dtype=np.int16, path="memory", wrong=()):
        self.first, self.size, self.dtype, self.wrong = first, size, np.dtype(dtype), wrong
        self.info = DatasetInfo(
            path=path, split="train", chips=count, image_shape=(size, size, 6), image_dtype=self.dtype, fill=-9999.0
        )

    def _read(self, index):
        if index in self.wrong:
            raise RuntimeError("bad block")
        return make_record(self.first + index, self.size, self.dtype)

    def digest(self):
        return str(self.info)
