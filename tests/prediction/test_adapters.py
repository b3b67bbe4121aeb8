"""Adapters by polygon: which model counts where, ramps of known values at borders, and what isn't run."""

import geopandas
import numpy as np
import pytest
import shapely
from affine import Affine
from rasterio.crs import CRS

from biomass_jax import bundle
from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.resample import numbered
from biomass_jax.errors import BundleError, PredictionError, RegionalError
from biomass_jax.prediction import adapters
from biomass_jax.prediction.adapters import AdaptersOnGrid, blend_weights_of
from biomass_jax.prediction.predictor import Predictor
from tests.prediction.stubs import coded_image, random_adapter, random_bundle, read_map, write_raster

SMALL = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0, "decoder_channels": 4}
BASE, WEST, EAST = 100.0, 200.0, 350.0  # Mg/ha that the three models predict everywhere
LEFT, TOP = 600000, 4100000  # of `write_raster`'s images, EPSG:32610, pixels of 30 m


def in_pixels(left, top, right, bottom):
    """A box of columns and rows of those images."""
    return shapely.box(LEFT + 30 * left, TOP - 30 * bottom, LEFT + 30 * right, TOP - 30 * top)


def ramp(distance, width):
    """Share of the model on the positive side, so many pixels from the border."""
    return np.clip(0.5 + np.asarray(distance) / width, 0, 1)


@pytest.mark.parametrize("width", [1, 4, 7.5])
def test_two_regions_share_a_linear_ramp(width):
    margin, border = 6, 9
    regions = np.zeros((8 + 2 * margin, 21 + 2 * margin), int)
    regions[:, margin + border :] = 1
    found = blend_weights_of(regions, 2, width, margin)
    expected = ramp(np.arange(21) + 0.5 - border, width)
    np.testing.assert_allclose(found[1], np.broadcast_to(expected, (8, 21)), atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-15)


def test_without_a_width_there_is_no_ramp():
    regions = np.zeros((6, 9), int)
    regions[:, 4:] = 1
    np.testing.assert_array_equal(blend_weights_of(regions, 2, 0, 1)[1], np.broadcast_to(np.arange(7) >= 3, (4, 7)))


def test_weights_are_those_of_a_plain_loop_where_three_meet():
    rng = np.random.default_rng(0)
    margin, width = 4, 5.0
    rows, columns = np.mgrid[: 12 + 2 * margin, : 15 + 2 * margin]
    regions = np.where(rows < 9, 0, np.where(columns < 11, 1, 2))
    found = blend_weights_of(regions, 3, width, margin)
    for row, column in rng.integers([0, 0], [12, 15], (40, 2)):
        counts = []
        for number in range(3):
            far = np.hypot(rows - row - margin, columns - column - margin)
            inside = regions[row + margin, column + margin] == number
            nearest = far[(regions == number) != inside].min() - 0.5
            counts.append(ramp(nearest if inside else -nearest, width))
        np.testing.assert_allclose(found[:, row, column], np.divide(counts, sum(counts)), atol=1e-12)


def test_a_border_outside_of_the_image_counts_too():
    grid = Grid(4, 10, CRS.from_epsg(32610), Affine(30, 0, LEFT, 0, -30, TOP))
    places = AdaptersOnGrid(grid, [in_pixels(11, -50, 60, 50)], [1], 6)
    assert places.numbers == [0, 1]
    values = np.broadcast_to(np.float32([BASE, EAST]), (4, 10, 2))
    expected = BASE + (EAST - BASE) * ramp(np.arange(10) + 0.5 - 11, 6)
    np.testing.assert_allclose(places.mix(values, 0), np.broadcast_to(expected, (4, 10)), rtol=1e-6)
    assert AdaptersOnGrid(grid, [in_pixels(15, -50, 60, 50)], [1], 6).numbers == [0]
    assert AdaptersOnGrid(grid, [in_pixels(-50, -50, 60, 50)], [1], 6).numbers == [1]


def test_rows_in_the_midst_are_mixed_as_all_rows(monkeypatch):
    monkeypatch.setattr(adapters, "_STRIP", 7)
    grid = Grid(30, 12, CRS.from_epsg(32610), Affine(30, 0, LEFT, 0, -30, TOP))
    outlines = [
        shapely.Polygon([(LEFT, TOP), (LEFT + 360, TOP - 100), (LEFT + 100, TOP - 900)]),
        in_pixels(5, 20, 9, 28),
    ]
    places = AdaptersOnGrid(grid, outlines, [2, 5], 5)
    assert places.numbers == [0, 2, 5]
    values = np.random.default_rng(0).normal(size=(30, 12, 3)).astype(np.float32)
    whole = places.mix(values, 0)
    np.testing.assert_array_equal(np.concatenate([places.mix(values[i : i + 4], i) for i in range(0, 30, 4)]), whole)


def test_of_outlines_that_overlap_the_first_counts():
    grid = Grid(3, 6, CRS.from_epsg(32610), Affine(30, 0, LEFT, 0, -30, TOP))
    found = numbered([in_pixels(0, 0, 3, 3), in_pixels(2, 0, 5, 3), shapely.Polygon()], grid, 1, 3, 1)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[1], [0, 1, 1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(found[3], 0)  # the row below the image, where no outline is


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and two adapters, each of one value, and polygons: west and east of column 20, down to row 70."""
    folder = tmp_path_factory.mktemp("made")
    base = random_bundle(folder / "random", **SMALL)
    loaded = bundle.load(base)
    head = loaded.variables["params"]["head"]["final"]
    loaded.variables["params"]["head"]["final"] = {"kernel": 0 * head["kernel"], "bias": np.float32([BASE])}
    about = {name: loaded.meta[name] for name in ("task", "architecture", "input", "output", "training", "provenance")}
    bundle.save(folder / "base", loaded.variables, **about)
    random_adapter(folder / "runs" / "west", folder / "base", constant=WEST)
    random_adapter(folder / "runs" / "east", folder / "base", constant=EAST, seed=2)
    write_polygons(folder, in_pixels(-40, -40, 20, 70), in_pixels(20, -40, 80, 70))
    return folder


def write_polygons(folder, *outlines, names=("runs/west", "runs/east"), name="biomes.gpkg", crs=32610):
    table = {"adapter": list(names), "geometry": list(outlines)}
    frame = geopandas.GeoDataFrame(table, geometry="geometry", crs=32610).to_crs(crs)
    frame.to_file(folder / name, driver="GPKG")
    return folder / name


def expected_map(height, width, blend):
    """The two models along the column, and the base below; far from where all three meet."""
    across = WEST + (EAST - WEST) * ramp(np.arange(width) + 0.5 - 20, blend)
    down = ramp(70 - np.arange(height) - 0.5, blend)
    return across[None] * down[:, None] + BASE * (1 - down[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("tile", [224, 64])  # whole, and tile by tile
def test_a_border_is_a_ramp_of_known_values(made, tmp_path, tile):
    image = write_raster(tmp_path / "scene.tif", coded_image(110, 40))
    how = {"tile": tile, "stride": 48, "margin": 4} if tile == 64 else {}
    predictor = Predictor.open(made / "base", adapters=made / "biomes.gpkg", adapter_blend=10, **how)
    found = read_map(predictor.predict_file(image, tmp_path / "map.tif"))
    expected = expected_map(110, 40, 10)
    for part in (np.s_[:60], np.s_[76:], np.s_[:, :10], np.s_[:, 30:]):
        np.testing.assert_allclose(found[part], expected[part], rtol=1e-5)
    steepest = (EAST - BASE) / 10
    assert max(np.abs(np.diff(found, axis=axis)).max() for axis in (0, 1)) < 1.5 * steepest  # no seam where all meet


@pytest.mark.slow
def test_polygons_may_be_in_degrees_and_what_they_do_not_touch_is_not_run(made, tmp_path, monkeypatch):
    opened = []
    load = bundle.load_adapter
    monkeypatch.setattr(bundle, "load_adapter", lambda path, base: opened.append(path.name) or load(path, base))
    polygons = write_polygons(
        made, in_pixels(-40, -40, 20, 70), in_pixels(60, -40, 80, 70), name="degrees.gpkg", crs=4326
    )
    predictor = Predictor.open(made / "base", adapters=polygons, adapter_blend=4)
    image = write_raster(tmp_path / "scene.tif", coded_image(50, 40))
    found = read_map(predictor.predict_file(image, tmp_path / "a.tif"))
    assert opened == ["west"]
    expected = np.broadcast_to(BASE + (WEST - BASE) * ramp(20 - np.arange(40) - 0.5, 4), (50, 40))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    predictor.predict_file(image, tmp_path / "b.tif")
    assert opened == ["west"]  # once for all images


@pytest.mark.slow
# Threads that open files at once undo each other's filters of warnings.
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_within_its_polygon_an_adapter_maps_as_its_merged_model(made, tmp_path):
    """And a lazy image, row of tiles by row of tiles, as a file."""
    rioxarray = pytest.importorskip("rioxarray")
    loaded = bundle.load(random_bundle(tmp_path / "varied", **SMALL, final_relu=False))
    random_adapter(tmp_path / "adapter", loaded.path)
    image = write_raster(tmp_path / "scene.tif", coded_image(140, 90))
    polygons = write_polygons(tmp_path, in_pixels(-9, -9, 50, 99), names=("adapter",))
    how = {"tile": 64, "stride": 48, "margin": 4}
    mixed = Predictor.open(loaded.path, adapters=polygons, adapter_blend=8, **how)
    whole, base = (Predictor.open(path, **how) for path in (tmp_path / "adapter", loaded.path))
    found, merged, under = (
        read_map(one.predict_file(image, tmp_path / f"{name}.tif"))
        for name, one in (("m", mixed), ("w", whole), ("b", base))
    )
    np.testing.assert_allclose(found[:95, :46], merged[:95, :46], rtol=1e-5)
    np.testing.assert_allclose(found[103:], under[103:], rtol=1e-5)
    assert np.median(np.abs(merged - under)) > 1 and np.ptp(merged) > 1
    with rioxarray.open_rasterio(image, chunks={"y": 50, "x": 90}) as lazy:
        np.testing.assert_allclose(
            mixed.predict(lazy, bands=list(BAND_NAMES), encoding="digital_numbers").compute(), found, rtol=1e-6
        )


@pytest.mark.slow
def test_a_map_is_kept_until_polygons_or_adapters_change(made, tmp_path):
    image = write_raster(tmp_path / "scene.tif", coded_image(20, 16))

    def status(**changes):
        given = {"adapters": made / "biomes.gpkg", "adapter_blend": 4} | changes
        return Predictor.open(made / "base", **given).predict_file(image, tmp_path / "map.tif").status

    assert [status(), status(), status(adapter_blend=5), status(adapters=None)] == [
        *("written", "skipped"),
        *["written"] * 2,
    ]


@pytest.mark.slow
def test_what_cannot_be_mixed_is_refused(made, tmp_path):
    def opened(**settings):
        return Predictor.open(made / "base", **{"adapters": made / "biomes.gpkg"} | settings)

    with pytest.raises(
        PredictionError, match=r"give the estimate alone, and its maps have mean, sd.*uncertainty='none'"
    ):
        opened(uncertainty="dropout")
    with pytest.raises(PredictionError, match="width of borders is -1 pixels"):
        opened(adapter_blend=-1)
    with pytest.raises(PredictionError, match="found columns adapter, geometry; expected biome, which names adapters"):
        opened(adapter_field="biome")
    with pytest.raises(RegionalError, match="nothing.gpkg: no such file"):
        opened(adapters=made / "nothing.gpkg")
    box = in_pixels(0, 0, 9, 9)
    with pytest.raises(BundleError, match="base: is a whole model; expected an adapter of"):
        opened(adapters=write_polygons(made, box, box, names=("base", None), name="no_adapter.gpkg"))
    output = {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -9999}
    random_adapter(made / "runs" / "odd", made / "base", output=output)
    with pytest.raises(PredictionError, match="odd: its output's nodata is -9999, the base's -1; maps of both"):
        opened(adapters=write_polygons(made, box, box, names=("runs/odd", None), name="odd.gpkg"))
    with pytest.raises(PredictionError, match="an array has no place"):
        opened().predict_array(coded_image(20, 16))
    image = write_raster(tmp_path / "scene.tif", coded_image(20, 16), crs=None)
    with pytest.raises(PredictionError, match="it has no CRS, so nothing tells which polygons"):
        opened().predict_file(image, tmp_path / "map.tif")
