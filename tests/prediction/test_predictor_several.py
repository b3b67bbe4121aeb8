"""Many maps: begun while the one before is finished, never more than two on their way, each outcome in its place."""

import logging
import threading
from pathlib import Path, PurePath

import pytest

from biomass_jax.data.raster.inputs import InputItem
from biomass_jax.errors import BundleError, RasterError
from biomass_jax.prediction.maps import MapResult, make_maps


def items(names):
    return [InputItem(name, (name,), PurePath(name)) for name in names]


def written(item):
    return MapResult(item.name, Path(item.name), "written")


def test_the_next_map_is_begun_before_this_one_is_finished():
    begun = {name: threading.Event() for name in "abc"}

    def begin(item):
        begun[item.name].set()

        def finish():
            following = {"a": "b", "b": "c"}.get(item.name)
            assert following is None or begun[following].wait(20), f"{following} waits for {item.name}"
            return written(item)

        return finish

    results, failures = make_maps(items("abc"), begin)
    assert ([result.source for result in results], failures) == (["a", "b", "c"], [])


def test_no_more_than_two_are_on_their_way_and_files_are_finished_in_order():
    open_now, most, finished = [], [], []

    def begin(item):
        open_now.append(item.name)
        most.append(len(open_now))

        def finish():
            finished.append(item.name)
            open_now.remove(item.name)
            return written(item)

        return finish

    make_maps(items("abcdefgh"), begin)
    assert max(most) <= 2
    assert finished == list("abcdefgh")


def test_failures_of_either_half_are_told_and_keep_their_places(caplog):
    def begin(item):
        if item.name == "b":
            raise RasterError("b: is cut off")

        def finish():
            if item.name == "c":
                raise KeyError("nonsense")
            return written(item)

        return finish

    with caplog.at_level(logging.ERROR):
        results, failures = make_maps(items("abcd"), begin)
    assert [result.source for result in results] == ["a", "d"]
    assert [(name, type(error)) for name, error in failures] == [("b", RasterError), ("c", KeyError)]
    assert "b: failed: is cut off" in caplog.text
    assert "c: failed: KeyError: 'nonsense'" in caplog.text


def test_damaged_weights_end_it_once_the_map_before_is_finished():
    finished = []

    def begin(item):
        if item.name == "b":
            raise BundleError("weights are damaged")
        return lambda: finished.append(item.name) or written(item)

    with pytest.raises(BundleError, match="damaged"):
        make_maps(items("abc"), begin)
    assert finished == ["a"]


def test_damaged_weights_that_show_late_end_it_before_all_are_tried():
    """Items may go on without an end: what is wrong with all of them is told at once."""
    begun = []

    def begin(item):
        begun.append(item.name)

        def finish():
            raise BundleError("weights are damaged")

        return finish

    with pytest.raises(BundleError, match="damaged"):
        make_maps(items("abcdefgh"), begin)
    assert len(begun) <= 2


def test_what_became_of_each_is_told_as_it_ends():
    """Inputs are asked for one by one, and the next may hang on what became of the last but one."""
    told = []

    def one_by_one():
        for place, item in enumerate(items("abcd")):
            assert len(told) >= place - 2
            yield item

    def begin(item):
        if item.name == "b":
            raise RasterError("b: is cut off")
        return lambda: written(item)

    results, failures = make_maps(one_by_one(), begin, lambda item, result: told.append((item.name, result)))
    assert [name for name, _ in told] == list("abcd")
    assert [result for _, result in told if isinstance(result, MapResult)] == results
    assert told[1] == failures[0]
