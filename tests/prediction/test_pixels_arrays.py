"""Maps of xarray's arrays: the pixels that `predict_file` writes, at once or when Dask wants them."""

import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import rasterio
from affine import Affine

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.errors import PredictionError, RasterError
from biomass_jax.prediction import stream
from biomass_jax.prediction.predictor import Predictor
from tests.prediction.stubs import NIR, random_bundle, read_map, stub_bundle, write_raster

xarray = pytest.importorskip("xarray", reason="the extra xarray is not installed")
rioxarray = pytest.importorskip("rioxarray", reason="the extra xarray is not installed")
dask = pytest.importorskip("dask", reason="the extra xarray is not installed")

ROOT = Path(__file__).resolve().parents[2]
TILES = {"tile": 32, "stride": 24, "margin": 2, "batch_size": 3}


def uneven(variables, x):
    """A model whose values depend on where in its tile a pixel lies, and on the whole tile."""
    nir = x[..., NIR] * variables["scale"]
    ramp = jnp.arange(x.shape[1])[:, None] * 7.0 + jnp.arange(x.shape[2])
    return nir * (1 + ramp / 300) + nir.mean((1, 2), keepdims=True)


@pytest.fixture(scope="module")
def model():
    return Predictor(stub_bundle(), model_fn=uneven, **TILES)


def scene(height=100, width=70):
    """Noise with a hole of no-data in it, a part of which spans whole tiles."""
    image = np.random.default_rng(1).integers(200, 4000, (height, width, 6)).astype(np.int16)
    image[40:44, 10:50] = -9999
    image[-40:, -38:] = -9999
    return image


@pytest.fixture(scope="module")
def written(tmp_path_factory, model):
    """(path of an image, the map that predict_file makes of it)."""
    folder = tmp_path_factory.mktemp("scene")
    path = write_raster(folder / "scene.tif", scene())
    return path, read_map(model.predict_file(path, folder / "out"))


def opened(path, **options):
    """The file as rioxarray opens it, in memory unless chunks are given."""
    with rioxarray.open_rasterio(path, **options) as array:
        return array if "chunks" in options else array.load()


def dataset_of(array):
    names = ("blue", "green", "red", "nir08", "swir16", "swir22")
    bands = {name: array.isel(band=i, drop=True) for i, name in enumerate(names)}
    for one in bands.values():
        one.attrs.pop("long_name", None)
    return xarray.Dataset(bands)


FORMS = {
    "as opened": lambda array: array,
    "bands last": lambda array: array.transpose("y", "x", "band"),
    "a time": lambda array: array.expand_dims(time=[np.datetime64("2020-07-01", "ns")]),
    "south first": lambda array: array.isel(y=slice(None, None, -1)),
    "names in the coordinate": lambda array: (
        array.assign_coords(band=list(BAND_NAMES)).drop_attrs(deep=False).assign_attrs(_FillValue=-9999)
    ),
    "other order": lambda array: (
        array.assign_coords(band=list(BAND_NAMES)).drop_attrs(deep=False).isel(band=[3, 0, 5, 1, 4, 2])
    ),
    "masked": lambda array: array.where(array != -9999),
    "latitudes": lambda array: array.rename(y="latitude", x="longitude"),
    "a Dataset": dataset_of,
    "stackstac": lambda array: (
        array.where(array != -9999)
        .drop_vars("spatial_ref")
        .drop_attrs(deep=False)
        .assign_coords(
            band=[f"B0{i}" for i in range(2, 8)],
            common_name=("band", ["blue", "green", "red", "nir08", "swir16", "swir22"]),
            epsg=32610,
        )
        .astype("float64")
    ),
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_array_s_map_is_that_of_the_file(written, model, form, lazy):
    path, expected = written
    array = FORMS[form](opened(path))
    array = array.chunk({dim: 13 for dim in array.dims if dim not in ("band", "time")}) if lazy else array
    found = model.predict(array)
    assert (found.chunks is not None) == lazy and found.dtype == np.float32
    assert found.rio.crs == "EPSG:32610" and found.name == "agbd"
    values = found.values[::-1] if form == "south first" else found.values
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)
    rows, columns = found.dims[-2:]
    np.testing.assert_array_equal(found[rows], array[rows])
    np.testing.assert_array_equal(found[columns], array[columns])


def test_a_map_carries_what_its_file_would(written, model, tmp_path):
    path, _ = written
    found = model.predict(opened(path))
    assert found.attrs["units"] == "Mg ha-1" and found.rio.nodata == -1 and str(found.band.item()) == "agbd"
    found.rio.to_raster(tmp_path / "again.tif")
    with rasterio.open(tmp_path / "again.tif") as again, rasterio.open(path.parent / "out" / "scene_agbd.tif") as file:
        np.testing.assert_array_equal(again.read(1), file.read(1))
        assert (again.crs, again.transform, again.nodata) == (file.crs, file.transform, file.nodata)
        same = ("MODEL_SHA256", "MODEL", "SETTINGS", "SENSORS", "SOFTWARE")
        assert {key: again.tags()[key] for key in same} == {key: file.tags()[key] for key in same}


def test_a_path_s_map_is_that_of_the_file(written, model):
    path, expected = written
    found = model.predict(path)
    np.testing.assert_array_equal(found.values, expected)
    assert "SOURCE_FILES" in found.attrs and found.rio.crs == "EPSG:32610"
    assert found.x.values[0] == 600015 and found.y.values[0] == 4099985


@pytest.mark.parametrize("lazy", [False, True])
def test_a_small_array_is_predicted_whole(tmp_path, model, lazy):
    path = write_raster(tmp_path / "small.tif", scene()[:20, :30])
    expected = read_map(model.predict_file(path, tmp_path))
    array = opened(path)
    np.testing.assert_array_equal(model.predict(array.chunk(y=7) if lazy else array).values, expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_each_time_has_its_map(written, model, lazy):
    path, expected = written
    array = opened(path)
    days = np.array(["2020-07-01", "2020-07-17"], "datetime64[ns]")
    both = xarray.concat([array, array.where(array == -9999, array // 2)], dim="time").assign_coords(time=days)
    found = model.predict(both.chunk(y=30) if lazy else both)
    assert found.dims == ("time", "y", "x") and (found.time.values == days).all()
    np.testing.assert_allclose(found.values[0], expected, rtol=0, atol=1e-4)
    assert np.median(found.values[1][expected > 0] / expected[expected > 0]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("lazy", [False, True])
def test_finer_pixels_are_resampled_as_those_of_a_file(tmp_path, model, lazy):
    image = np.repeat(np.repeat(scene(), 3, 0), 3, 1)
    path = write_raster(tmp_path / "fine.tif", image)
    with rasterio.open(path, "r+") as file:
        file.transform = Affine(10, 0, 600000, 0, -10, 4100000)
    expected = read_map(model.predict_file(path, tmp_path, resample=30))
    array = opened(path)
    with pytest.raises(RasterError, match="its pixels are 10 x 10 m"):
        model.predict(array)
    found = model.predict(array.chunk(y=50) if lazy else array, resample=30)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-4)
    assert found.rio.transform() == rasterio.open(tmp_path / "fine_agbd.tif").transform


@pytest.mark.parametrize("lazy", [False, True])
def test_a_mask_is_that_of_a_file(tmp_path, written, model, lazy):
    path, _ = written
    classes = np.random.default_rng(2).integers(1, 3, (100, 70, 1)).astype(np.uint8)
    mask = write_raster(tmp_path / "classes.tif", classes, nodata=0, named=False)
    expected = read_map(model.predict_file(path, tmp_path / "masked.tif", mask=mask, mask_keep=[2]))
    array = opened(path)
    found = model.predict(array.chunk(y=30) if lazy else array, mask=mask, mask_keep=[2])
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-4)


class Watched:
    """Rows of an array that remember which of them were read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim
        self.read = set()

    def __getitem__(self, key):
        self.read |= set(range(self.shape[1])[key[1]])
        return self.values[key]


def test_a_window_computes_its_rows_alone_and_each_tile_once(written):
    path, expected = written
    calls, inside, most = [], [0], [0]
    guard = threading.Lock()
    model = Predictor(stub_bundle(), model_fn=uneven, **TILES)
    plain = model.forward

    class Counted:
        def __call__(self, images, fill):
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            calls.append(len(images))
            found = np.asarray(plain(images, fill))
            with guard:
                inside[0] -= 1
            return found

        def __getattr__(self, name):
            return getattr(plain, name)

    model.forward = Counted()
    array = opened(path)
    watched = Watched(array.values)
    lazy = array.copy(
        data=dask.array.from_array(watched, chunks=(6, 5, 70), asarray=True, meta=array.values[:0, :0, :0])
    )
    found = model.predict(lazy)
    assert not watched.read and not calls
    np.testing.assert_allclose(found.isel(y=slice(50, 53)).values, expected[50:53], rtol=0, atol=1e-4)
    assert min(watched.read) >= 20 and max(watched.read) < 80 and len(calls) <= 2
    calls.clear()
    np.testing.assert_allclose(found.compute(scheduler="threads", num_workers=4).values, expected, rtol=0, atol=1e-4)
    rows = len(model.plan(100, 70).rows)
    assert len(calls) == rows and most[0] == 1  # three tiles a row, three a batch


def test_a_broken_blend_shows(written, model, monkeypatch):
    """What these tests compare differs where tiles are only laid over each other."""
    path, expected = written
    lazy = model.predict(opened(path, chunks={"y": 25}))
    monkeypatch.setattr(stream.Blender, "add", overlaid)
    assert np.abs(lazy.values - expected).max() > 1


def overlaid(self, index, tile, prediction):
    rows, columns, inside_rows, inside_columns = self._plan.window(self._plan.rows[index], tile)
    used = prediction[tile.crop :, tile.crop :][inside_rows, inside_columns]
    band = slice(rows.start - self._start, rows.stop - self._start)
    self._sum[band, columns], self._weight[band, columns] = used, 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.isel(x=slice(0)), r"sizes \(6, 100, 0\); expected pixels"),
        (lambda array: array.rename(y="row"), r"dimensions \(band, row, x\); expected one of them to be called y"),
        (lambda array: array.isel(band=0, drop=True), r"dimensions \(y, x\); expected y, x, one for the bands"),
        (lambda array: array.expand_dims(level=2), r"dimensions \(level, band, y, x\); expected"),
        (lambda array: array.isel(y=[*range(40), *range(41, 100)]), "the coordinate y has no even steps"),
        (lambda array: array.astype(str), "its values are <U6; expected numbers"),
        (lambda array: array.astype(complex), "its values are complex128; expected real numbers"),
        (lambda array: array.drop_attrs(deep=False), "no band description .*is a band name"),
        (lambda array: array.assign_attrs(add_offset=-0.1, scale_factor=1e-4), r"scale 0\.0001 and offset -0\.1"),
        (lambda array: array.where(array != -9999) / 1e4, "probably reflectance"),
        (lambda array: array.assign_attrs(_FillValue="none"), "its attribute _FillValue is 'none'; expected a number"),
        (lambda array: array.where(array == -9999, -9999), r"pixels with data"),
    ],
)
def test_what_a_file_would_be_refused_for_is_refused(written, model, change, message):
    array = opened(written[0])
    array.attrs.setdefault("_FillValue", -9999)
    with pytest.raises((RasterError, PredictionError), match=message):
        model.predict(change(array))


def test_a_lazy_image_s_values_are_looked_at_where_they_are_computed(written, model):
    array = opened(written[0])
    lazy = model.predict((array.where(array != -9999) / 1e4).chunk(y=20))
    with pytest.raises(RasterError, match="probably reflectance"):
        lazy.isel(y=slice(0, 5)).compute()
    found = model.predict((array.where(array != -9999) / 1e4).chunk(y=20), encoding="reflectance")
    np.testing.assert_allclose(found.values, written[1], rtol=0, atol=1e-2)


def test_other_things_are_no_images(model):
    with pytest.raises(PredictionError, match="the image is a ndarray; expected a DataArray"):
        model.predict(np.zeros((4, 4, 6)))


def test_a_stac_item_s_map_is_that_of_its_files(tmp_path, written, model):
    path, expected = written
    assets = {}
    for index, name in enumerate(BAND_NAMES):
        band = scene()[..., index : index + 1]
        file = write_raster(tmp_path / f"{index}.tif", band, named=False)
        assets[name] = {"href": str(file)}
    found = model.predict({"type": "Feature", "id": "scene", "assets": assets, "properties": {"platform": "landsat-8"}})
    np.testing.assert_array_equal(found.values, expected)
    assert found.attrs["SENSORS"] == "L30"


MAPPING = """
import os, sys
import numpy as np, rioxarray, dask
import biomass_jax
folder, way = sys.argv[1:]
model = biomass_jax.load(os.path.join(folder, "bundle"))
scene = os.path.join(folder, "scene.tif")
if way == "file":
    model.predict_file(scene, os.path.join(folder, "file.tif"))
else:
    found = model.predict(rioxarray.open_rasterio(scene, chunks={"x": 512, "y": 512}))
    found.rio.to_raster(os.path.join(folder, "lazy.tif"))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss would count this test's own
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="its memory is read from /proc")
def test_a_whole_tile_of_hls_is_mapped_alike_in_under_3_gib(tmp_path):
    """3660 x 3660 pixels as Dask's chunks and as a file; the smallest real model, so that it ends within minutes."""
    random_bundle(tmp_path / "bundle")
    write_raster(tmp_path / "scene.tif", scene(3660, 3660))
    for way in ("file", "lazy"):
        ran = subprocess.run(
            [sys.executable, "-c", MAPPING, tmp_path, way], capture_output=True, text=True, check=True, cwd=ROOT
        )
        kib = int(ran.stdout.splitlines()[-1])
        print(way, kib)
        assert kib < 3 * 2**20
    np.testing.assert_allclose(read_map(tmp_path / "lazy.tif"), read_map(tmp_path / "file.tif"), rtol=0, atol=1e-4)
