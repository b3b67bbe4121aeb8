"""What is kept of batches, and that parts of several processes join to the same."""

import pickle

import numpy as np
import pytest

from biomass_jax.data.sources import Place
from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation import tables as stream
from biomass_jax.pipeline.batches import Batch, Chip


def batches(start=0, count=7, size=3, rows=4):
    """Padded batches; a prediction is the image's first band, a label ten times a pixel's number."""
    made = []
    for first in range(start, start + count, rows):
        image = np.zeros((rows, size, size, 6), np.int16)
        label = np.full((rows, size, size), -1, np.float32)
        chips = [Chip("", "", "")] * rows
        valid = np.arange(rows) + first < start + count
        for row in np.flatnonzero(valid):
            number = int(first + row)
            image[row] = number + 1
            label[row, 0, number % size] = 10 * number
            chips[row] = Chip(f"chip_{number}", f"tile_{number % 2}", "taiga", Place(32610, number, 2))
        label[~valid, 1, 1] = 99  # a label on padding must not count
        made.append(Batch({"image": image, "label": label, "valid": valid}, chips))
    return made


def forward(image, label):
    return image[..., 0].astype(np.float32) + 0.5, label, np.zeros(label.shape, bool)


def test_each_labelled_pixel_is_kept_once_with_its_chip():
    said = []
    part = stream.score_batches(batches(), forward, progress=said.append)
    scored, pictures = stream.join([part])
    assert said == [4, 3]
    assert scored.label.tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert scored.prediction.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert scored.chip.tolist() == list(range(7))
    assert scored.chip_ids == tuple(f"chip_{i}" for i in range(7))
    assert scored.tiles[:2] == ("tile_0", "tile_1")
    assert [place.x for place in scored.places] == list(range(7))
    assert pictures == []
    assert (scored.prediction.dtype, scored.chip.dtype) == (np.float32, np.int32)


def test_parts_that_travelled_as_bytes_join_in_order():
    whole, _ = stream.join([stream.score_batches(batches(), forward)])
    parts = [
        stream.score_batches(batches(first, count, rows=2), forward, wanted=lambda name: name == "chip_4")
        for first, count in ((0, 3), (3, 4))
    ]
    scored, pictures = stream.join([pickle.loads(pickle.dumps(part)) for part in parts])
    for name in ("prediction", "label", "chip"):
        found, expected = getattr(scored, name), getattr(whole, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert (scored.chip_ids, scored.tiles, scored.biomes) == (whole.chip_ids, whole.tiles, whole.biomes)
    (picture,) = pictures
    assert picture.title == "chip_4, taiga"
    assert (picture.rgb == 5).all()
    assert (picture.prediction == 5.5).all()
    assert picture.label[0, 1] == 40
    nothing = pickle.loads(pickle.dumps(stream.ScoredPart()))
    assert stream.join([nothing, *parts])[0].chip_ids == whole.chip_ids


def test_pictures_show_no_data_as_none():
    def part_missing(image, label):
        missing = np.zeros(label.shape, bool)
        missing[:, 2] = True
        return image[..., 0].astype(np.float32), label, missing

    part = stream.score_batches(batches(count=1), part_missing, wanted=lambda _: True)
    (picture,) = part.pictures
    assert np.isnan(picture.rgb[2]).all()
    assert np.isnan(picture.prediction[2]).all()
    assert np.isfinite(picture.prediction[:2]).all()
    assert np.isfinite(picture.rgb[:2]).all()


def test_rgb_is_red_green_blue():
    def bands_apart(image, label):
        return forward(image, label)

    (batch,) = batches(count=1)
    batch.arrays["image"][...] = np.arange(10, 16)
    part = stream.score_batches([batch], bands_apart, wanted=lambda _: True)
    assert part.pictures[0].rgb[0, 0].tolist() == [12, 11, 10]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_no_number_is_an_error(value):
    def broken(image, label):
        prediction, label, missing = forward(image, label)
        prediction[image[..., 0] == 6] = value
        return prediction, label, missing

    with pytest.raises(EvaluationError, match="chip chip_5: the model gave (nan|inf) at a labelled pixel"):
        stream.score_batches(batches(), broken)


def test_a_chip_scored_twice_is_an_error():
    parts = [stream.score_batches(batches(first, 3), forward) for first in (0, 2)]
    with pytest.raises(EvaluationError, match="chip chip_2 was scored more than once"):
        stream.join(parts)


def test_the_device_works_ahead_by_one_batch():
    order = []

    def noting(image, label):
        order.append("start")
        return forward(image, label)

    stream.score_batches(batches(rows=2), noting, progress=lambda _: order.append("taken"))
    assert order == ["start", "start", "taken", "start", "taken", "start", "taken", "taken"]
