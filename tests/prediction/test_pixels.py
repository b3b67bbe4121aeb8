import threading

import jax
import numpy as np
import pytest
import rasterio

from biomass_jax.data.raster import grid
from biomass_jax.errors import RasterError
from tests.data_prep.archive_gate import open_archive
from tests.prediction.stubs import NIR, read_map, write_raster

SHAPE = (2000, 260)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A server of files and its address."""
    monkeypatch.setitem(grid.SETTINGS, "GDAL_HTTP_RETRY_DELAY", "0.01")
    (tmp_path / "far").mkdir()
    with open_archive(tmp_path / "far") as archive:
        yield archive.store, archive.url(archive.store)


def test_a_far_images_map_begins_with_its_first_rows(store, tmp_path, stub):
    server, url = store
    image = np.random.default_rng(0).integers(100, 6000, (*SHAPE, 6)).astype(np.int16)
    path = write_raster(server.folder / "scene.tif", image)
    size, at_first, lock = path.stat().st_size, [], threading.Lock()

    def nir_and_note(variables, x):
        def note():
            with lock:
                at_first.append(sum(last - first for _, first, last in server.asked))

        jax.debug.callback(note)
        return x[..., NIR] * variables["scale"]

    predictor = stub(nir_and_note, batch_size=1)
    result = predictor.predict_file(f"{url}/scene.tif", tmp_path)
    jax.effects_barrier()
    assert result.chips > 15
    assert at_first[0] < 0.6 * size < 0.95 * size < at_first[-1]
    np.testing.assert_allclose(read_map(result.path), image[..., NIR], rtol=1e-5)


@pytest.mark.parametrize(
    ("divisor", "dtype", "says"),
    [(10_000, np.float32, "reflectance"), (100, np.float32, "percent"), (100, np.int16, "very low")],
)
def test_far_numbers_that_are_no_digital_numbers_are_refused_on_the_way(store, tmp_path, stub, divisor, dtype, says):
    server, url = store
    image = np.random.default_rng(0).integers(100, 6000, (300, 300, 6)) / divisor
    write_raster(server.folder / "scene.tif", image.astype(dtype))
    with pytest.raises(RasterError, match=says):
        stub(batch_size=1).predict_file(f"{url}/scene.tif", tmp_path / "out")
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_far_image_dark_at_its_top_alone_is_mapped(store, tmp_path, stub):
    server, url = store
    image = np.random.default_rng(0).integers(100, 6000, (700, 300, 6)).astype(np.int16)
    image[:230] //= 100
    write_raster(server.folder / "lake.tif", image)
    result = stub(batch_size=1).predict_file(f"{url}/lake.tif", tmp_path)
    with rasterio.open(result.path) as made:
        np.testing.assert_allclose(made.read(1), image[..., NIR], rtol=1e-5)
