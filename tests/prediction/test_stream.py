"""Threads of a map: what is read, predicted and written, and how it ends when one of them fails."""

import threading
import time
import tracemalloc
from contextlib import closing

import numpy as np
import pytest

from biomass_jax.errors import PredictionError
from biomass_jax.prediction.stream import read_ahead, stream_map, write_behind
from biomass_jax.prediction.tiling import default_plan

PLAN = {"tile": 32, "stride": 20, "margin": 3, "blend": "cosine"}


def run(image, wanted=None, *, forward=lambda images: images[..., 0].astype(np.float32), batch_size=4, **changes):
    """Map an image (H, W, C) and return values, the rows as written, and the timings."""
    wanted = np.ones(image.shape[:2], bool) if wanted is None else wanted
    rows: list[tuple[int, np.ndarray]] = []
    arguments = {
        "read": lambda start, stop: (image[start:stop], wanted[start:stop]),
        "forward": forward,
        "write": lambda start, values: rows.append((start, values.copy())),
    } | changes
    timings = stream_map(default_plan(*image.shape[:2], **PLAN), **arguments, batch_size=batch_size, nodata=-1.0)
    return np.concatenate([values for _, values in rows]) if rows else None, rows, timings


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(1, 100, (90, 75, 2)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def place_dependent(images):
    rows, columns = np.indices(images.shape[1:3])
    return images[..., 0] + 0.3 * rows - 0.2 * columns


def test_batches_are_full_but_the_last_and_run_over_row_ends(image):
    shapes, filled = [], []

    def forward(images):
        shapes.append(images.shape)
        filled.append(int(np.any(images != 0, axis=(1, 2, 3)).sum()))
        return images[..., 0]

    count = default_plan(90, 75, **PLAN).count  # 5 rows of 4
    assert count == 20
    run(image, forward=forward, batch_size=6)
    assert set(shapes) == {(6, 32, 32, 2)}
    assert filled == [6, 6, 6, 2]


def test_values_are_bit_equal_for_every_batch_size(image):
    results = [run(image, forward=place_dependent, batch_size=size)[0] for size in (1, 3, 8, 50)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_rows_are_written_once_in_order_and_in_bands(image):
    values, rows, timings = run(image)
    assert [start for start, _ in rows] == np.cumsum([0, *(len(v) for _, v in rows)])[:-1].tolist()
    assert values.shape == (90, 75)
    assert len(rows) > 3
    assert min(vars(timings).values()) > 0


def test_tiles_without_a_wanted_pixel_are_not_predicted(image):
    wanted = np.zeros((90, 75), bool)
    wanted[60:63, 40:44] = True
    calls, advanced = [], []

    def forward(images):
        calls.append(images)
        return place_dependent(images)

    values, _, _ = run(image, wanted, forward=forward, batch_size=1, advance=advanced.append)
    whole, _, _ = run(image, forward=place_dependent)
    assert 1 <= len(calls) <= 9
    assert sum(advanced) == 20
    np.testing.assert_array_equal(values[wanted], whole[wanted])
    assert (values[~wanted] == -1).all()


def test_skipped_tiles_are_counted_once(image):
    wanted = np.zeros((90, 75), bool)
    wanted[:10, :10] = wanted[40:45, 70:] = wanted[85:, 30:35] = True
    advanced = []
    run(image, wanted, batch_size=1, advance=advanced.append)
    assert min(advanced) >= 0
    assert sum(advanced) == 20


def test_nothing_wanted_needs_no_forward_pass(image):
    def forward(images):
        raise AssertionError("predicted for nothing")

    advanced = []
    values, _, _ = run(image, np.zeros((90, 75), bool), forward=forward, advance=advanced.append)
    assert (values == -1).all()
    assert sum(advanced) == 20


def test_a_prediction_that_is_no_number_is_an_error(image):
    def forward(images):
        out = images[..., 0].copy()
        out[0, 20, 20] = np.nan
        return out

    with pytest.raises(PredictionError, match=r"the model returned nan for .* at row 17, column 17"):
        run(image, forward=forward)
    unwanted = np.ones((90, 75), bool)
    with pytest.raises(PredictionError, match="inf"):
        run(image * np.inf, unwanted)


@pytest.mark.parametrize("where", ["read", "forward", "write"])
def test_an_error_in_any_thread_ends_the_run_with_that_error(image, where):
    calls = []

    def broken(*_):
        calls.append(time.monotonic())
        if len(calls) == 2:
            raise OSError(f"no more of {where}")
        return {
            "read": (image[:0], np.ones((0, 75), bool)),
            "forward": np.zeros((4, 32, 32), np.float32),
            "write": None,
        }[where]

    def read(start, stop):
        broken()
        return image[start:stop], np.ones((stop - start, 75), bool)

    with pytest.raises(OSError, match=f"no more of {where}"):
        run(image, **{where: read if where == "read" else broken})


def test_stopping_in_this_thread_stops_the_others(image):
    class Stop(BaseException):
        pass

    def forward(images):
        raise Stop

    with pytest.raises(Stop):
        run(image, forward=forward)


def test_memory_is_some_bands_of_rows_and_not_the_raster():
    """What is held at the peak, whatever the threads' timing: source rows twice, accumulators, bands on their way."""
    height, width, tile = 3000, 4000, 64
    plan = default_plan(height, width, tile=tile, stride=56, margin=4, blend="cosine")

    def read(start, stop):
        return np.ones((stop - start, width, 2), np.int16), np.ones((stop - start, width), bool)

    def forward(images):
        return images[..., 0].astype(np.float32)

    tracemalloc.start()
    stream_map(plan, read, forward, lambda start, values: None, batch_size=16, nodata=-1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    source, accumulators, finished = 4 * width, 8 * width, 4 * width  # bytes a row
    bound = tile * (2 * source + accumulators + 8 * finished) + 8 * 2**20
    assert bound < 0.25 * height * (source + finished)
    assert peak < bound


def test_no_more_is_read_ahead_than_asked_for():
    taken = []
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    with closing(read_ahead(items(), 3)) as ahead:
        for number in ahead:
            taken.append(number)
            time.sleep(0.001)
            assert len(made) - len(taken) <= 3
    assert taken == list(range(50))


def test_leaving_early_stops_an_endless_reader():
    def endless():
        while True:
            yield 1

    with closing(read_ahead(endless(), 2)) as ahead:
        assert next(ahead) == 1


def test_all_is_written_before_leaving_and_late_errors_are_raised():
    got = []
    with write_behind(lambda *row: got.append(row), 2) as put:
        for number in range(20):
            put(number, number + 1)
    assert got == [(number, number + 1) for number in range(20)]

    def fail(*row):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), write_behind(fail, 2) as put:
        put(1, 2)


def test_no_more_waits_to_be_written_than_asked_for():
    got, given = [], []

    def write(start, values):
        time.sleep(0.001)
        got.append(start)

    with write_behind(write, 3) as put:
        for number in range(30):
            put(number, None)
            given.append(number)
            assert len(given) - len(got) <= 3


def test_the_first_of_several_errors_counts():
    def fail(start, values):
        raise OSError(f"error {start}")

    with pytest.raises(OSError, match="error 0"), write_behind(fail, 9) as put:
        put(0, None)
        put(1, None)
    with write_behind(fail, 1) as put:
        put(0, None)
        with pytest.raises(OSError, match="error 0"):
            put(1, None)
