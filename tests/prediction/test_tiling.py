"""Plans, weights and the streaming engine of biomass_jax.prediction.tiling, without any model."""

import numpy as np
import pytest

from biomass_jax.errors import TilingError
from biomass_jax.prediction.tiling import (
    Blender,
    SourceRows,
    TilePlan,
    blend_weights,
    check_settings,
    default_plan,
    origins,
    ramp_window,
    reflect_index,
)

SETTINGS = {"tile": 224, "stride": 192, "margin": 8, "blend": "cosine"}


def stream(plan: TilePlan, image: np.ndarray, function) -> np.ndarray:
    """Run a plan as the predictor does, one tile at a time; image (H, W, C) -> (H, W)."""
    reads = []

    def read_rows(start, stop):
        reads.append((start, stop))
        return image[start:stop]

    source, blender, done = SourceRows(plan, read_rows), Blender(plan), []
    for index, row in enumerate(plan.rows):
        source.advance(index)
        done += blender.finished_before(index)
        for tile in row.tiles:
            blender.add(index, tile, function(source.cut(index, tile)))
    done += blender.finished_before(len(plan.rows))
    assert [start for start, _ in done] == list(np.cumsum([0] + [len(v) for _, v in done])[:-1]), "rows out of order"
    flat = [row for start, stop in reads for row in range(start, stop)]
    assert flat == list(range(plan.height)), "every source row is read once and in order"
    return np.concatenate([values for _, values in done])


def whole_array_loop(image, function, tile, stride, margin, ramps):
    """The default tiling in its plainest form: pad all, loop over tiles, add up weights in float64."""
    height, width = image.shape[:2]
    padded = [max(side + 2 * margin, tile) for side in (height, width)]
    rows, columns = ([mirror(i - margin, n) for i in range(p)] for p, n in zip(padded, (height, width), strict=True))
    big = image[rows][:, columns]
    total, weight = np.zeros(padded), np.zeros(padded)
    used = tile - 2 * margin
    overlap = min(used - stride, used // 2) if ramps else 0
    edge = [min(i, used - 1 - i) + 1 for i in range(used)]
    line = np.array([0.5 * (1 - np.cos(np.pi * e / (overlap + 1))) if e <= overlap else 1.0 for e in edge])
    for row in starts(padded[0], tile, stride):
        for column in starts(padded[1], tile, stride):
            out = function(big[row : row + tile, column : column + tile]).astype(np.float64)
            inner = slice(margin, tile - margin)
            for i in range(margin, tile - margin):
                place = row + i, slice(column + margin, column + tile - margin)
                total[place] += line[i - margin] * line * out[i, inner]
                weight[place] += line[i - margin] * line
    inside = slice(margin, margin + height), slice(margin, margin + width)
    return total[inside] / weight[inside]


def mirror(i, n):
    """Reflect an index step by step."""
    while n > 1 and not 0 <= i < n:
        i = -i if i < 0 else 2 * (n - 1) - i
    return i if n > 1 else 0


def starts(padded, tile, stride):
    found, at = [], 0
    while at + tile < padded:
        found.append(at)
        at += stride
    return [*found, padded - tile]


def tilted(tile):
    """A prediction that depends on the place in the tile, so that blending shows."""
    rows, columns = np.indices(tile.shape[:2])
    return (tile[..., 0] + 0.5 * rows - 0.25 * columns).astype(np.float32)


def coordinates(height, width):
    """An image that holds each pixel's own number in channel 3."""
    image = np.zeros((height, width, 6), np.float32)
    image[..., 3] = np.arange(height * width).reshape(height, width) % 9973
    return image


def test_tile_counts_of_hls_tiles():
    assert [len(default_plan(n, n, **SETTINGS).rows) for n in (3660, 1098, 225, 224)] == [19, 6, 2, 2]
    assert default_plan(3660, 3660, **SETTINGS).count == 361
    assert default_plan(1098, 1098, **SETTINGS).count == 36


def test_last_tile_is_moved_back_to_the_end():
    assert origins(500, 224, 192) == [0, 192, 276]
    assert origins(416, 224, 192) == [0, 192]
    assert origins(224, 224, 192) == [0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_reflection_is_repeated_like_stepwise_mirroring(size):
    positions = np.arange(-3 * size - 9, 4 * size + 9)
    assert reflect_index(positions, size).tolist() == [mirror(int(p), size) for p in positions]
    if size > 1:
        padded = np.pad(np.arange(size), 2 * size + 1, mode="reflect")
        assert np.array_equal(reflect_index(np.arange(-2 * size - 1, 3 * size + 1), size), padded)


def test_ramps_of_neighbours_sum_to_one():
    window = ramp_window(208, 16)
    assert window.shape == (208,)
    assert np.allclose(window[:16] + window[-16:], 1)
    assert np.all(window[16:-16] == 1)
    assert np.all(np.diff(window[:17]) > 0)
    # closed form of the raised cosine at its third step of sixteen
    assert window[2] == pytest.approx((1 - np.cos(3 * np.pi / 17)) / 2)


def test_golden_blend_mask_is_the_same_ramp(golden):
    expected = np.load(golden / "micro" / "blend_mask_56x48_s48x40_d4.npy")
    ours = np.outer(ramp_window(48, 4), ramp_window(40, 4)) + 1e-6
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_every_pixel_has_positive_weight_for_many_sizes():
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 700), (700, 1), (223, 224), (225, 208), (209, 417), *rng.integers(1, 701, (60, 2)).tolist()]
    choices = [(224, 192, 8), (224, 208, 8), (64, 30, 2), (56, 40, 8), (33, 1, 16), (50, 50, 0), (31, 7, 3)]
    for number, (height, width) in enumerate(sizes):
        tile, stride, margin = choices[number % len(choices)]
        if tile == 33 and max(height, width) > 100:
            stride = 1 if min(height, width) < 4 else tile - 2 * margin  # keep the number of tiles small
        for blend in ("cosine", "none"):
            plan = default_plan(height, width, tile=tile, stride=stride, margin=margin, blend=blend)
            rows, columns = np.zeros(height), np.zeros(width)
            for row in plan.rows:
                rows[plan.window(row, row.tiles[0])[0]] += 1
            for one in plan.rows[0].tiles:
                columns[plan.window(plan.rows[0], one)[1]] += 1
            assert plan.weights[0].min() > 0
            assert rows.min() > 0, (height, width, tile, stride, margin)
            assert columns.min() > 0, (height, width, tile, stride, margin)


@pytest.mark.parametrize("blend", ["cosine", "none"])
@pytest.mark.parametrize("size", [(70, 53), (20, 90), (1, 1), (1, 45), (64, 3), (33, 32), (32, 32), (31, 200)])
def test_streaming_equals_a_plain_whole_array_loop(size, blend):
    tile, stride, margin = 32, 20, 3
    image = np.random.default_rng(1).normal(size=(*size, 2)).astype(np.float32)
    plan = default_plan(*size, tile=tile, stride=stride, margin=margin, blend=blend)
    expected = whole_array_loop(image, tilted, tile, stride, margin, blend == "cosine")
    np.testing.assert_allclose(stream(plan, image, tilted), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("blend", ["cosine", "none"])
@pytest.mark.parametrize("size", [(223, 224), (225, 225), (500, 437), (460, 700), (30, 500)])
def test_identity_gives_back_every_pixel(size, blend):
    image = coordinates(*size)
    result = stream(default_plan(*size, **(SETTINGS | {"blend": blend})), image, lambda tile: tile[..., 3])
    np.testing.assert_allclose(result, image[..., 3], rtol=1e-6)


def test_margin_never_reaches_the_map():
    """Predictions that are poison in the margin leave no trace."""

    def poisoned(tile):
        out = np.full(tile.shape[:2], 1e9, np.float32)
        out[8:-8, 8:-8] = tile[8:-8, 8:-8, 3]
        return out

    image = coordinates(300, 260)
    np.testing.assert_allclose(stream(default_plan(300, 260, **SETTINGS), image, poisoned), image[..., 3], rtol=1e-6)


def test_accumulators_and_source_rows_do_not_grow_with_height():
    heights = (600, 5000)
    plans = [default_plan(height, 20_000, **SETTINGS) for height in heights]
    for plan in plans:
        blender = Blender(plan)
        assert blender._sum.nbytes + blender._weight.nbytes == 2 * 224 * 20_000 * 4
    source = SourceRows(plans[1], lambda start, stop: np.zeros((stop - start, 20_000, 1), np.int8))
    for index in range(len(plans[1].rows)):
        source.advance(index)
        assert source._buffer is not None
        assert source._buffer.nbytes <= 224 * 20_000


def test_rows_without_tiles_come_out_as_nan():
    plan = default_plan(700, 40, **SETTINGS)
    blender = Blender(plan)
    done = [*blender.finished_before(len(plan.rows) - 1)]
    tile = plan.rows[-1].tiles[0]
    blender.add(len(plan.rows) - 1, tile, np.ones((224, 224), np.float32))
    done += blender.finished_before(len(plan.rows))
    result = np.concatenate([values for _, values in done])
    first = plan.first_rows()[-1]
    assert np.isnan(result[:first]).all()
    assert (result[first:] == 1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tile": 0}, "tile is 0"),
        ({"tile": 224.0}, "tile is 224.0"),
        ({"stride": 0}, "stride is 0"),
        ({"margin": -1}, "margin is -1"),
        ({"blend": "linear"}, "expected one of cosine, none"),
        ({"tiling": "reference"}, "expected one of default, reference_0_99, reference_1_2"),
        ({"stride": 209}, "at most 208"),
        ({"stride": 225, "margin": 0}, "larger than the tile"),
        ({"margin": 112}, "leaves gaps"),
        ({"tiling": "reference_0_99", "blend": "none"}, "never blends"),
    ],
)
def test_contradicting_settings_are_refused(change, words):
    with pytest.raises(TilingError, match=words):
        check_settings(**(SETTINGS | {"tiling": "default"} | change))


def test_weights_without_overlap_are_flat():
    assert (blend_weights(224, 208, 8, "cosine") == 1).all()
    assert (blend_weights(224, 192, 8, "none") == 1).all()
    assert blend_weights(224, 192, 8, "cosine").shape == (208, 208)


def test_several_channels_are_each_blended_as_one_is():
    plan = default_plan(90, 71, tile=40, stride=28, margin=3, blend="cosine")
    rng = np.random.default_rng(0)
    tiles = {
        (i, t.column): rng.normal(size=(40, 40, 3)).astype(np.float32) for i, r in enumerate(plan.rows) for t in r.tiles
    }

    def blended(channels, choose):
        blender, done = Blender(plan, channels=channels), []
        for index, row in enumerate(plan.rows):
            done += blender.finished_before(index)
            for tile in row.tiles:
                blender.add(index, tile, choose(tiles[index, tile.column]))
        return np.concatenate([values for _, values in [*done, *blender.finished_before(len(plan.rows))]])

    together = blended((3,), lambda tile: tile)
    assert together.shape == (90, 71, 3)
    for channel in range(3):
        np.testing.assert_array_equal(together[..., channel], blended((), lambda tile, c=channel: tile[..., c]))
