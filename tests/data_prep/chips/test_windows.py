"""Windows of composites and labels as records: the errors of labels."""

import numpy as np
import pytest
import rasterio

from biomass_jax.data import records
from data_prep.chips.windows import read_record
from tests.data_prep.chip_world import ramp, write_tile
from tests.data_prep.chips.test_cells import HEIGHT, SHOTS, SIZE, TILE, WIDTH, index


@pytest.mark.parametrize("with_sigma", [True, False], ids=["two bands", "version 1"])
def test_chips_carry_the_errors_of_their_labels(tmp_path, with_sigma):
    _, label, _ = write_tile(
        tmp_path, TILE, image=ramp(HEIGHT, WIDTH), shots=[*SHOTS, (9, 20, 3, 2.0)], with_sigma=with_sigma
    )
    with rasterio.open(label, "r+") as raster:
        values = raster.read(1)
        (gone,) = np.argwhere(values == values.max())[:1]
        values[tuple(gone)] = -9999  # a label that is taken as none takes its error along
        raster.write(values, 1)
    with pytest.warns(UserWarning, match="labels taken as none: 1 -9999"):
        frame, _ = index(tmp_path)
    found = {(row["row"], row["col"]): read_record(row, tmp_path) for row in frame.to_dict("records")}
    assert len(found) == 12
    known = 0
    for (top, left), record in found.items():
        records.validate(record)
        there = values[top : top + SIZE, left : left + SIZE]
        expected = np.where(there >= 8, there / 8, -1) if with_sigma else np.full_like(there, -1)
        np.testing.assert_array_equal(record["agbd_sigma"], expected.astype(np.float32))
        known += int((record["agbd_sigma"] > 0).sum())
    assert (known > 300) == with_sigma
