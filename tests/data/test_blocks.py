"""Draws of blocks of ground: whole blocks, with replacement, the same wherever they are made."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from biomass_jax.data import blocks
from biomass_jax.data.blocks import Drawn, draw_blocks
from biomass_jax.data.sources import Chip, Place
from biomass_jax.errors import DataError
from tests.data.chip_sources import Memory

EDGE = 50_000  # m, at 30 degrees of latitude as far to the north as to the east
SIZES = (3, 1, 4, 2, 5)  # chips of each block


def spread(sizes=SIZES, epsg=6933, tiles=("10SFF",)):
    """Chips of as many blocks as there are sizes, in another order than that of the blocks' names."""
    of_block = [block for block, size in enumerate(sizes) for _ in range(size)]
    order = np.random.default_rng(7).permutation(len(of_block))
    chips = [
        Chip(f"c{n}", tiles[n % len(tiles)], "taiga", Place(epsg, (of_block[k] + 0.1 + 0.01 * k) * EDGE, 0.5 * EDGE))
        for n, k in enumerate(order)
    ]
    source = Memory(len(chips))
    source.remember(chips)
    return source, np.array([of_block[k] for k in order])


def test_a_block_is_drawn_whole_and_as_often_as_its_name():
    source, of_chip = spread()
    seen = Counter()
    for seed in range(40):
        numbers = draw_blocks(source, seed)
        times = np.bincount(numbers, minlength=len(source))
        drawn = []
        for block in range(len(SIZES)):
            (count,) = set(times[of_chip == block])  # all chips of a block alike
            drawn.append(count)
        assert sum(drawn) == len(SIZES)
        seen.update(drawn)
    assert {0, 1, 2, 3} <= set(seen)


def test_the_share_of_different_blocks_is_that_of_drawing_with_replacement():
    count, draws = 300, 40
    source, of_chip = spread((1,) * count)
    shares = [len({*of_chip[draw_blocks(source, seed)]}) / count for seed in range(draws)]
    # Of n blocks one is left out by a draw with probability (1 - 1/n)^n; the share's own deviation is about 0.018.
    assert abs(np.mean(shares) - (1 - (1 - 1 / count) ** count)) < 4 * 0.018 / draws**0.5
    assert abs(np.mean(shares) - (1 - np.exp(-1))) < 0.015
    assert len({tuple(draw_blocks(source, seed)) for seed in range(draws)}) == draws


CODE = """
from tests.data.test_blocks import spread
from biomass_jax.data.blocks import draw_blocks
print(draw_blocks(spread()[0], 3))
"""


def test_another_process_draws_the_same(root):
    expected = str(draw_blocks(spread()[0], 3))
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_one_place_in_two_zones_is_one_block():
    # Each some 260 km from the middle of its zone: both at 120 degrees west, 38 north.
    east, west = Place(32611, 240_000.0, 4_210_000.0), Place(32610, 766_500.0, 4_210_000.0)
    names = blocks.ground_blocks([east, west, Place(32610, 400_000.0, 4_210_000.0)], 200.0)
    assert names[0] == names[1] != names[2]


def test_blocks_are_those_of_the_split(caplog):
    source, of_chip = spread()
    source.info.metadata["split"] = {"kind": "block", "block_km": 100.0}
    caplog.set_level("INFO")
    for seed in range(10):
        times = np.bincount(draw_blocks(source, seed), minlength=len(source))
        for pair in range(2):  # blocks 0 and 1, 2 and 3 lie in one of 100 km
            assert len(set(times[of_chip // 2 == pair])) == 1
    assert "of 3 blocks of ground, 100 km on a side; " in caplog.messages[0]


def test_chips_without_coordinates_are_drawn_by_tile():
    source, _ = spread(tiles=("10SFF", "22KGA", "11SKA"))
    chips = source.chips()
    source.remember([chips[0]._replace(place=Place()), *chips[1:]])
    drawn = set()
    for seed in range(10):
        times = np.bincount(draw_blocks(source, seed), minlength=len(source))
        for tile in range(3):
            assert len(set(times[tile::3])) == 1
        drawn.add(tuple(times[:3]))
    assert len(drawn) > 3


def test_a_single_block_is_refused():
    source, _ = spread((6,))
    with pytest.raises(DataError, match=r"memory: split train: .*all 6 chips lie in one \(blocks of ground, 50 km"):
        draw_blocks(source, 1)
    source.remember([Chip("c", "", "taiga")] * 6)
    with pytest.raises(DataError, match="lie in one .MGRS tiles, since some chips have no coordinates.; expected 2"):
        draw_blocks(source, 1)


def test_a_drawn_source_has_its_chips_as_often_as_drawn():
    source, _ = spread()
    found = Drawn(source, [4, 4, 0])
    assert (len(found), found.info.chips, found.shares) == (3, 3, ((3, 3),))
    assert [record["chip_id"] for record in found] == ["chip_4", "chip_4", "chip_0"]
    assert [chip.chip_id for chip in found.chips()] == ["c4", "c4", "c0"]
    assert found.info.metadata == source.info.metadata and len(source) == sum(SIZES)
    with pytest.raises(IndexError, match="has 3 chips, no chip 3"):
        found[3]
    digests = {source.digest(), *(Drawn(source, numbers).digest() for numbers in ([4, 4, 0], [4, 0, 0], [4, 0]))}
    assert len(digests) == 4


def test_a_chip_that_cannot_be_read_is_named_once():
    found = Drawn(Memory(5, wrong=(3,)), [0, 3, 3])
    with pytest.raises(DataError) as caught:
        found[2]
    assert str(caught.value).startswith("memory: split train, chip number 3: can't be read: bad block")
    assert str(caught.value).count("can't be read") == 1
