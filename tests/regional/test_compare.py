"""Maps beside other products: planted bias and scale come back for each product's layout; what isn't one is refused."""

import csv
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio import warp
from rasterio.crs import CRS

from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import RasterError, RegionalError
from biomass_jax.regional import compare as module
from biomass_jax.regional.products import PRODUCTS

pytestmark = pytest.mark.slow  # many, of a second and more each

SIDE = 500  # pixels of 30 m
UTM = CRS.from_epsg(32610)
LEFT, TOP = 600000, 4200000
L4B, CCI = "GEDI04_B_MW019MW223_02_002_02_R01000M_MU.tif", "N40W130_ESACCI-BIOMASS-L4-AGB-MERGED-100m-2020-fv5.0.tif"


def biomass(lon, lat):
    """A smooth surface, 50 to 250 Mg/ha."""
    return 150 + 60 * np.sin(2 * np.pi * lon / 0.07) + 40 * np.cos(2 * np.pi * lat / 0.05)


def centres(grid):
    t = grid.transform
    x, y = np.meshgrid(t.c + t.a * (np.arange(grid.width) + 0.5), t.f + t.e * (np.arange(grid.height) + 0.5))
    lon, lat = warp.transform(grid.crs, CRS.from_epsg(4326), x.ravel(), y.ravel())
    return np.reshape(lon, x.shape), np.reshape(lat, x.shape)


def cell_means(grid, parts=8):
    """The surface's means over the pixels of a grid."""
    t = grid.transform
    fine = Affine(t.a / parts, 0, t.c, 0, t.e / parts, t.f)
    values = biomass(*centres(Grid(grid.height * parts, grid.width * parts, grid.crs, fine)))
    return values.reshape(grid.height, parts, grid.width, parts).mean((1, 3))


def write_map(path, left=LEFT, scale=1.0, offset=0.0, sd=20.0, noise=0.0, unit="Mg ha-1"):
    grid = Grid(SIDE, SIDE, UTM, Affine(30, 0, left, 0, -30, TOP))
    truth = biomass(*centres(grid))
    values = np.maximum(scale * truth + offset + noise * np.random.default_rng(1).standard_normal(truth.shape), 0)
    tags = {"SEASON": "2020-05-01/2020-10-01", "MODEL_SHA256": "a", "SENSORS": "L30"}
    layers = dict.fromkeys(("agbd", "agbd_sd"), unit)
    with MapWriter(path, grid, nodata=-1, layers=layers, tags=tags) as writer:
        writer.write_rows(0, np.stack([values, np.full_like(values, sd)], axis=-1).astype(np.float32))
    return path


def other_grid(epsg, pixel):
    """A grid of whole pixels around the map, as the product lays them."""
    crs = CRS.from_epsg(epsg)
    ends = warp.transform_bounds(UTM, crs, LEFT, TOP - 30 * SIDE, LEFT + 60 * SIDE, TOP)
    origin = {6933: (-17367530.445161516, 7314540.830638585), 4326: (-130.0, 40.0)}[epsg]
    left, top = int((ends[0] - origin[0]) / pixel) - 2, int((origin[1] - ends[3]) / pixel) - 2
    width, height = int((ends[2] - ends[0]) / pixel) + 4, int((ends[3] - ends[1]) / pixel) + 4
    return Grid(height, width, crs, Affine(pixel, 0, origin[0] + left * pixel, 0, -pixel, origin[1] - top * pixel))


def write_other(path, grid, *values, dtype="float32", nodata=None, units=(), names=()):
    fields = {"crs": grid.crs, "transform": grid.transform, "width": grid.width, "height": grid.height}
    with rasterio.open(path, "w", driver="GTiff", count=len(values), dtype=dtype, nodata=nodata, **fields) as file:
        file.write(np.stack(values).astype(dtype))
        if units:
            file.units = units
        if names:
            file.descriptions = names
    return path


def l4b(folder, scale=1.0, offset=0.0, noise=0.0):
    """GEDI L4B as published: float32, cells of EASE-Grid 2.0, -9999 outside, 0 where there are too few tracks."""
    grid = other_grid(6933, PRODUCTS["l4b"].pixel)
    values = scale * cell_means(grid) + offset
    values += noise * np.random.default_rng(2).standard_normal(values.shape)
    errors = np.full(values.shape, noise or 15.0)
    values[0], errors[0] = -9999, -9999
    values[8, 3:11], errors[8, 3:11] = 0, 0
    write_other(folder / L4B.replace("_MU", "_SE"), grid, errors, nodata=-9999)
    return write_other(folder / L4B, grid, values, nodata=-9999)


def cci(folder, scale=1.0, offset=0.0):
    """ESA CCI as published: uint16, degrees, 0 is a value though some files call it no data."""
    grid = other_grid(4326, 1 / 1125)
    values = np.rint(scale * biomass(*centres(grid)) + offset)
    sd = np.full(values.shape, 30)
    write_other(folder / CCI.replace("-AGB-", "-AGB_SD-"), grid, sd, dtype="uint16")
    return write_other(folder / CCI, grid, values, dtype="uint16", nodata=0)


def l4d(folder, scale=1.0, offset=0.0):
    """GEDI L4D as Earth Engine gives it: many bands by name, of which QA says what is valid."""
    grid = Grid(SIDE, SIDE, CRS.from_epsg(32610), Affine(30, 0, LEFT + 3000, 0, -30, TOP - 3000))
    values = np.rint(scale * biomass(*centres(grid)) + offset)
    quality = np.ones(values.shape)
    quality[:50] = 4
    values[:50] = 30000
    return write_other(
        folder / "l4d.tif", grid, values / 10, values, quality, dtype="int16", names=("rh98", "agbd", "QA")
    )


def test_two_equal_surfaces_agree(tmp_path):
    found = module.compare([write_map(tmp_path / "m.tif")], [l4b(tmp_path)], tmp_path / "out", product="l4b")
    (row, *_) = found.rows
    # 225 km2 and halves at the edges, less the eight without an estimate.
    assert 220 <= row["n"] <= 232 and abs(row["bias"]) < 0.3 and row["rmsd"] < 3
    assert row["within_2_sd"] == 1 and row["correlation"] > 0.99
    assert row["theirs"] > 100  # zeros would have pulled it down, and -9999 below 0


@pytest.mark.parametrize("product", ["l4b", "cci", "l4d"])
def test_a_planted_bias_and_scale_come_back(tmp_path, product):
    maps = [write_map(tmp_path / "a.tif", noise=30), write_map(tmp_path / "b.tif", LEFT + 30 * SIDE, noise=30)]
    other = {"l4b": l4b, "cci": cci, "l4d": l4d}[product](tmp_path, 0.8, 25)
    found = module.compare(maps, [other], tmp_path / "out", product=product, block_km=5.0)
    row = found.rows[0]
    assert row["slope"] == pytest.approx(1 / 0.8, rel=0.03) and row["intercept"] == pytest.approx(-25 / 0.8, abs=5)
    assert row["slope_low"] < row["slope"] < row["slope_high"] and row["blocks"] >= 10
    assert (
        row["bias"] == pytest.approx(row["ours"] - row["theirs"]) and row["bias_low"] < row["bias"] < row["bias_high"]
    )
    with rasterio.open(found.rasters[0]) as file, rasterio.open(other) as given:
        ours, theirs, difference = file.read(masked=True)
        assert file.descriptions == ("ours", "theirs", "difference") and file.crs == given.crs
        assert np.hypot(file.transform.a - given.transform.a, file.transform.e - given.transform.e) == 0
    assert difference.count() == row["n"]
    np.testing.assert_allclose(difference.compressed(), (ours - theirs).compressed(), atol=1e-3)
    # An independent way to the same sums.
    x, y = theirs.compressed().astype(float), ours.compressed().astype(float)
    assert row["rmsd"] == pytest.approx(np.sqrt(np.mean((y - x) ** 2)), rel=1e-4)
    assert row["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert row["slope"] == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-4)
    assert (row["slope_without_errors"] is None) == (product != "l4b")  # whose errors are each pixel's own
    if product == "l4d":  # it tells no errors
        assert row["within_2_sd"] is None
    else:
        both = np.hypot(20, {"l4b": 15, "cci": 30}[product])
        assert row["within_2_sd"] == pytest.approx(np.mean(np.abs(y - x) <= 2 * both), abs=2 / row["n"])
    bins = [row for row in found.rows if row["table"] == "bin"]
    assert sum(row["n"] for row in bins) == row["n"] and all(row["slope"] is None for row in bins)
    for one in bins:
        low, _, high = one["group"].partition("-")
        mine = (x >= float(low)) & (x < float(high))
        assert one["n"] == mine.sum() and one["bias"] == pytest.approx((y - x)[mine].mean(), abs=1e-3)


def test_errors_of_theirs_make_the_slope_flatter_and_are_taken_off(tmp_path):
    """Cells whose errors are as large as the surface's own spread: the slope is halved, and comes back."""
    maps = [write_map(tmp_path / "a.tif"), write_map(tmp_path / "b.tif", LEFT + 30 * SIDE)]
    found = module.compare(maps, [l4b(tmp_path, noise=50.0)], tmp_path / "out", product="l4b", block_km=5.0)
    row = found.rows[0]
    assert row["slope"] < 0.65 and row["slope_high"] < 0.8
    assert row["slope_without_errors_low"] < 1 < row["slope_without_errors_high"]
    assert row["slope_without_errors"] == pytest.approx(1, abs=0.15)


def test_half_covered_pixels_and_zeros(tmp_path):
    """A pixel counts from half of its area on; CCI's 0 is no biomass, L4B's is no estimate."""
    maps = [write_map(tmp_path / "m.tif")]
    grid = Grid(2, 2, UTM, Affine(600, 0, LEFT - 240, 0, -600, TOP + 360))  # 60 % across, 40 % down of the first
    other = write_other(tmp_path / "o.tif", grid, np.array([[100.0, 100.0], [0.0, 100.0]]), nodata=-1, units=("Mg/ha",))
    found = module.compare(maps, [other], tmp_path / "out")
    assert found.rows[0]["n"] == 2 and found.rows[0]["theirs"] == 50
    degrees = other_grid(4326, 1 / 1125)
    zeros = write_other(tmp_path / CCI, degrees, np.zeros((degrees.height, degrees.width)), dtype="uint16", nodata=0)
    assert module.compare(maps, [zeros], tmp_path / "cci", product="cci").rows[0]["theirs"] == 0
    cells = other_grid(6933, PRODUCTS["l4b"].pixel)
    none = write_other(tmp_path / L4B, cells, np.zeros((cells.height, cells.width)), nodata=-9999)
    with pytest.raises(RegionalError, match="no pixel of .*_MU.tif has a value where half of it is covered"):
        module.compare(maps, [none], tmp_path / "l4b", product="l4b")
    assert not list((tmp_path / "l4b").glob("*.tif"))


def test_zones_and_files(tmp_path, capsys):
    import geopandas
    import shapely

    boxes = [shapely.box(LEFT, TOP - 15000, LEFT + 7500, TOP), shapely.box(LEFT + 7500, TOP - 15000, LEFT + 15000, TOP)]
    geopandas.GeoDataFrame({"name": ["west", "<east>"]}, geometry=boxes, crs=32610).to_file(tmp_path / "zones.gpkg")
    out = tmp_path / "out"
    words = ["--maps", str(write_map(tmp_path / "m.tif")), "--with", str(cci(tmp_path)), "--product", "cci"]
    words += ["--out", str(out), "--zones", str(tmp_path / "zones.gpkg"), "--block-km", "3"]
    assert module.main(words) == 0
    with (out / "compare.csv").open() as table:
        rows = list(csv.DictReader(table))
    zones = {row["group"]: row for row in rows if row["table"] == "zone"}
    assert set(zones) == {"west", "<east>"}
    assert sum(int(row["n"]) for row in zones.values()) == pytest.approx(
        int(rows[0]["n"]), rel=0.02
    )  # some cross edges
    # West of the middle the surface has another mean.
    lon, lat = centres(Grid(SIDE, SIDE, UTM, Affine(30, 0, LEFT, 0, -30, TOP)))
    for name, half in (("west", np.s_[:, : SIDE // 2]), ("<east>", np.s_[:, SIDE // 2 :])):
        assert float(zones[name]["ours"]) == pytest.approx(biomass(lon, lat)[half].mean(), rel=0.01)
    assert json.loads((out / "compare.json").read_text())["scores"][0]["n"] == int(rows[0]["n"])
    page = (out / "compare.html").read_text()
    assert "ESA CCI Biomass" in page and "&lt;east&gt;" in page and (out / "scatter.png").is_file()
    assert "RMSD" in capsys.readouterr().out
    (style,) = out.glob("difference_*.qml")
    assert ElementTree.parse(style).find("pipe/rasterrenderer").get("band") == "3"


def test_few_blocks_give_no_interval(tmp_path):
    found = module.compare(
        [write_map(tmp_path / "m.tif")], [cci(tmp_path)], tmp_path / "out", product="cci", block_km=99
    )
    assert found.rows[0]["bias_low"] is None and "it takes 5" in found.rows[0]["no_interval"]


@pytest.mark.parametrize(
    ("unit", "given", "says"),
    [
        ("", None, r"other\.tif: it doesn't tell its unit; give --units Mg/ha"),
        ("kg/m2", None, r"its unit is 'kg/m2'; expected Mg/ha of dry above-ground biomass"),
        ("Mg C/ha", None, "its unit is 'Mg C/ha'"),
        ("Mg/ha", "t/ha", "its unit is 'Mg/ha', but units is 't/ha'"),
        ("", "m3/ha", "its unit is 'm3/ha'"),
    ],
)
def test_other_units_are_refused(tmp_path, unit, given, says):
    grid = other_grid(6933, 1000.0)
    other = write_other(tmp_path / "other.tif", grid, biomass(*centres(grid)), nodata=-1, units=(unit,) if unit else ())
    with pytest.raises(RegionalError, match=says):
        module.compare([write_map(tmp_path / "m.tif")], [other], tmp_path / "out", units=given)
    assert not (tmp_path / "out").exists()


def test_maps_of_something_else_are_refused(tmp_path):
    heights = write_map(tmp_path / "heights.tif", unit="m")
    with pytest.raises(RegionalError, match=r"heights\.tif: its unit is 'm'; expected Mg/ha"):
        module.compare([heights], [cci(tmp_path)], tmp_path / "out", product="cci")
    assert not (tmp_path / "out").exists()


def test_other_layouts_are_refused(tmp_path):
    maps = [write_map(tmp_path / "m.tif")]
    grid = other_grid(6933, 1000.0)
    values = biomass(*centres(grid))

    def refused(says, path, product="other", kind=RegionalError, **settings):
        with pytest.raises(kind, match=says):
            module.compare(maps, [path], tmp_path / "o", product=product, **settings)

    plain = write_other(tmp_path / "other.tif", grid, values, nodata=-9999)
    refused(r"other\.tif: not called as a file of l4b", plain, "l4b")
    refused("units and error are for --product other", plain, "l4b", units="Mg/ha")
    refused("its pixels are 1000 x 1000; those of l4b", write_other(tmp_path / L4B, grid, values, nodata=-9999), "l4b")
    refused("its CRS is 6933; cci has EPSG:4326", write_other(tmp_path / CCI, grid, values), "cci")
    refused("its bands are band 1; l4d has agbd", plain, "l4d")
    coarse = write_other(tmp_path / "coarse.tif", grid, values, values, names=("agbd", "QA"))
    refused(r"its pixels are \d+\.?\d* x \d+\.?\d* m on the ground; those of l4d are 30", coarse, "l4d")
    finer = write_other(tmp_path / "sd.tif", other_grid(6933, 500.0), np.ones((1, 1)), nodata=-1)
    refused(r"sd\.tif: .*expected the grid of .*other\.tif", plain, units="Mg/ha", error=str(finer))
    with rasterio.open(plain, "r+") as file:
        file.scales = (0.1,)
    refused("stored with a scale or an offset", plain, units="Mg/ha", kind=RasterError)
    far = Grid(50, 50, UTM, Affine(300, 0, 200000, 0, -300, 5000000))
    other = write_other(tmp_path / "far.tif", far, np.ones((50, 50)), nodata=-1, units=("Mg/ha",))
    refused("no pixel of .*far.tif has a value where half of it is covered", other)
    refused("gone.tif", tmp_path / "gone.tif", kind=RasterError, units="Mg/ha")
    refused("zone_name is given without zones", other, zone_name="name")
