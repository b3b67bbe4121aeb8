"""Inputs shared out to processes: each is mapped once, as one process would map it, and all failures are told."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from biomass_jax.data.raster.inputs import find_inputs
from biomass_jax.errors import PredictionError, RasterError
from biomass_jax.prediction import maps, run
from biomass_jax.prediction.run import Share, map_share, sum_up
from tests.prediction.stubs import coded_image, write_raster

GRANULES = ("HLS.L30.T10SFF.2020183T184512.v2.0", "HLS.L30.T10SFF.2020198T184512.v2.0")


@pytest.fixture
def scenes(tmp_path):
    """Four files, one of them broken, and the band files of two granules in one folder, whose name is a pattern."""
    folder = tmp_path / "scenes [a]*"
    for number, name in enumerate(("a", "sub/a", "sub/b")):
        write_raster(folder / f"{name}.tif", coded_image(40, 50 + number))
    (folder / "broken.tif").write_text("no raster")
    for number, granule in enumerate(GRANULES):
        for band in ("B02", "B03", "B04", "B05", "B06", "B07"):
            image = coded_image(30, 30)[..., 3:4] + np.int16(number)
            write_raster(folder / "hls" / f"{granule}.{band}.tif", image, named=False)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.tif")}


@pytest.mark.parametrize("count", [2, 4, 9])
def test_shares_are_the_maps_of_one_process(stub, scenes, tmp_path, count):
    one, many = tmp_path / "one", tmp_path / "many"
    predictor = stub(tile=32, stride=24, margin=2)
    with pytest.raises(PredictionError) as failed:
        predictor.predict_dir(scenes, one)
    items = find_inputs(scenes)
    shares = [map_share(predictor, items[i::count], many, {}) for i in range(count)]
    assert [share.written + len(share.failures) for share in shares] == [len(items[i::count]) for i in range(count)]
    assert len(files(one)) == 5
    assert files(many) == files(one)
    with pytest.raises(PredictionError) as shared:
        sum_up(shares, items)
    assert str(shared.value) == str(failed.value)
    assert str(shared.value).startswith("1 of 6 inputs failed:\n")
    again = [map_share(predictor, items[i::2], many, {}) for i in range(2)]
    assert sum(share.finished for share in again) == 5
    assert [(share.written, share.seconds) for share in again] == [(0, 0.0)] * 2


def test_a_signed_address_is_opened_whole_and_never_told(stub, tmp_path, monkeypatch, caplog):
    """What follows the question mark is a password: a reader needs it, nobody else."""
    opened = []

    def refuse(item, **_):
        opened.append(item.paths)
        raise RasterError(f"{item.name}: not there")

    monkeypatch.setattr(maps, "open_image", refuse)
    items = find_inputs("https://host/a/scene.tif?token=secret")
    share = map_share(stub(), items, tmp_path, {})
    assert opened == [("/vsicurl/https://host/a/scene.tif?token=secret",)]
    assert [name for name, _ in share.failures] == ["https://host/a/scene.tif"]
    assert "secret" not in caplog.text + str(share.failures)


def test_an_input_that_is_gone_is_a_failure_and_wrong_options_are_not(stub, scenes, tmp_path):
    items = find_inputs(scenes)
    (scenes / "a.tif").unlink()
    share = map_share(stub(), items, tmp_path / "out", {})
    assert [name for name, _ in share.failures] == [str(scenes / "a.tif"), str(scenes / "broken.tif")]
    assert "No such file" in share.failures[0][1]
    assert share.written == 4
    with pytest.raises(PredictionError, match="give both or neither"):
        map_share(stub(), items, tmp_path / "out", {"mask": "x.tif"})


def test_the_first_process_tells_and_all_fail(monkeypatch):
    items = [SimpleNamespace(name=name) for name in "abcd"]
    shares = [Share(1, 2.0, 0, [("c", "is bad")]), Share(0, 0.0, 1, [["b", "is worse"]])]
    with pytest.raises(PredictionError, match=r"2 of 4 inputs failed:\n  b  is worse\n  c  is bad"):
        sum_up(shares, items)
    monkeypatch.setattr(run.jax, "process_index", lambda: 1)
    with pytest.raises(PredictionError, match=r"^2 of 4 inputs failed; process 0 says which$"):
        sum_up(shares, items)


def test_the_sum_is_of_all_processes_and_its_time_the_longest(caplog):
    with caplog.at_level(logging.INFO):
        sum_up([Share(2, 5.0, 1), Share(1, 4.0, 2)], [])
    assert caplog.messages == ["3 maps written in 5 s, 3 finished before"]
