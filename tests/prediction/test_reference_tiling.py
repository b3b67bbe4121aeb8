"""The published tilings against arrays that the published code made (tests/golden/README.md says how)."""

import json

import numpy as np
import pytest

from biomass_jax.errors import TilingError
from biomass_jax.prediction.reference_tiling import (
    first_gap,
    reference_0_99_plan,
    reference_0_99_tiles,
    reference_1_2_plan,
    reference_1_2_tiles,
)
from biomass_jax.prediction.tiling import Blender, SourceRows, TilePlan, default_plan

TILE, STRIDE = (56, 48), (48, 40)


@pytest.fixture(scope="module")
def case(golden):
    with np.load(golden / "micro" / "tiled_simple_2x120x97_crop56x48_stride48x40.npz") as file:
        return dict(file)


def forward(case, tile):
    """3 x 3 convolution with zero padding + row/64 + column/32; tile (h, w, 6) -> (h, w), float64 throughout."""
    height, width = tile.shape[:2]
    padded = np.pad(tile.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    kernel = case["conv_w"][0].astype(np.float64)
    out = np.zeros((height, width))
    for i in range(3):
        for j in range(3):
            out += padded[i : i + height, j : j + width] @ kernel[:, i, j]
    return out + np.arange(height)[:, None] / 64 + np.arange(width)[None] / 32


def run(case, plan: TilePlan, image):
    source, blender, done = SourceRows(plan, lambda a, b: image[a:b]), Blender(plan), []
    for index, row in enumerate(plan.rows):
        source.advance(index)
        done += blender.finished_before(index)
        for tile in row.tiles:
            blender.add(index, tile, forward(case, source.cut(index, tile)))
    return np.concatenate([values for _, values in [*done, *blender.finished_before(len(plan.rows))]])


def last_wins(case, image, placed, pad, delta, crop_all):
    """What the published code does with average_patches=False, in the published order."""
    big = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    result = np.full(big.shape[:2], np.nan)
    for row, column, whole in placed:
        cut = 0 if whole and not crop_all else delta
        rows, columns = slice(row + cut, row + TILE[0] - cut), slice(column + cut, column + TILE[1] - cut)
        out = forward(case, big[row : row + TILE[0], column : column + TILE[1]])
        result[rows, columns] = out[cut : TILE[0] - cut, cut : TILE[1] - cut]
    return result[pad : result.shape[0] - pad, pad : result.shape[1] - pad]


def close(ours, expected):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() / np.abs(expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("key", "plan"),
    [
        ("old_avg1", lambda h, w: reference_0_99_plan(h, w, tile=TILE, stride=STRIDE)),
        *(
            (
                f"new_avg1_blend{int(blend == 'cosine')}",
                lambda h, w, blend=blend: reference_1_2_plan(h, w, tile=TILE, stride=STRIDE, margin=8, blend=blend),
            )
            for blend in ("cosine", "none")
        ),
    ],
)
def test_averaged_maps_equal_the_published_ones(case, key, plan):
    for image, expected in zip(case["input"], case[key][:, 0], strict=True):
        image = image.transpose(1, 2, 0)
        close(run(case, plan(*image.shape[:2]), image), expected)


@pytest.mark.parametrize("key", ["new_avg0_blend0", "new_avg0_blend1", "old_avg0"])
def test_last_tile_wins_in_the_published_order(case, key):
    """Without averaging the result depends on the order of tiles and on their crops alone."""
    for image, expected in zip(case["input"], case[key][:, 0], strict=True):
        image = image.transpose(1, 2, 0)
        height, width = image.shape[:2]
        if key.startswith("new"):
            tiles = reference_1_2_tiles((height + 8, width + 8), TILE, STRIDE)
            ours = last_wins(case, image, tiles, pad=4, delta=4, crop_all=True)
        else:
            tiles = reference_0_99_tiles((height, width), TILE, STRIDE)
            ours = last_wins(case, image, tiles, pad=0, delta=4, crop_all=False)
        close(ours, expected)


def test_order_of_tiles_is_the_published_one(golden):
    plan = json.loads((golden / "tiled" / "tile_plan.json").read_text())["new_500x437"]
    ours = reference_1_2_tiles((516, 453), (224, 224), (192, 192))
    assert [[row + 8, row + 216, column + 8, column + 216] for row, column, _ in ours] == plan


def test_blend_mask_equals_the_published_one(case, golden):
    plan = reference_1_2_plan(120, 97, tile=TILE, stride=STRIDE, margin=8, blend="cosine")
    expected = np.load(golden / "micro" / "blend_mask_56x48_s48x40_d4.npy")
    np.testing.assert_allclose(plan.weights[0], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(223, 500), (500, 100), (1, 1)])
def test_0_99_refuses_what_is_smaller_than_a_tile(size):
    with pytest.raises(TilingError, match="smaller than the tile.*tiling='default'"):
        reference_0_99_plan(*size, tile=(224, 224), stride=(192, 192))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((207, 500), "smaller than the tile"),
        ((500, 30), "smaller than the tile"),
        ((500, 8), "it reflects 8 px"),
        ((209, 500), r"leaves pixel \(row 0, column 0\)"),  # range(0, 224 + 1 - 224 - 1) is empty: row 0 has no tile
    ],
)
def test_1_2_refuses_where_it_fails(size, words):
    with pytest.raises(TilingError, match=f"{words}.*tiling='default'"):
        reference_1_2_plan(*size, tile=(224, 224), stride=(192, 192), margin=8, blend="cosine")


def test_crop_of_0_99_is_at_most_16():
    plan = reference_0_99_plan(500, 500, tile=(224, 224), stride=(100, 100))
    assert plan.weights[0].shape == (192, 192)
    assert plan.weights[1].shape == (224, 224)


def test_margin_of_1_2_shrinks_to_what_the_overlap_allows():
    plan = reference_1_2_plan(500, 500, tile=(224, 224), stride=(216, 216), margin=8, blend="none")
    assert plan.weights[0].shape == (216, 216)
    assert plan.pad == 4


def test_1_2_leaves_a_line_out_without_overlap():
    """Two tiles of 208 used px step 208, and the last one begins 209 px further: one row of pixels has no tile."""
    settings = {"tile": (224, 224), "stride": (208, 208), "margin": 8, "blend": "none"}
    with pytest.raises(TilingError, match=r"leaves pixel \(row 208, column 0\)"):
        reference_1_2_plan(417, 500, **settings)
    assert reference_1_2_plan(418, 500, **settings).count == 9


def test_first_gap_agrees_with_counting():
    rng = np.random.default_rng(3)
    for _ in range(40):
        height, width = (int(n) for n in rng.integers(30, 90, 2))
        plan = default_plan(height, width, tile=30, stride=20, margin=3, blend="none")
        rows = list(plan.rows)
        drop = int(rng.integers(len(rows)))
        tiles = list(rows[drop].tiles)
        del tiles[int(rng.integers(len(tiles)))]
        rows[drop] = type(rows[drop])(rows[drop].row, tuple(tiles))
        plan = TilePlan(**(vars(plan) | {"rows": tuple(rows)}))
        count = np.zeros((height, width), int)
        for row in plan.rows:
            for tile in row.tiles:
                count[plan.window(row, tile)[:2]] += 1
        gaps = np.argwhere(count == 0)
        assert first_gap(plan) == (tuple(gaps[0].tolist()) if len(gaps) else None)
