"""`zones` on rasters of change: net change, losses and gains against plain sums over all pairs of pixels."""

import geopandas
import numpy as np
import pandas
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import Geod, Transformer
from scipy import stats

from biomass_jax.errors import RasterError, RegionalError
from biomass_jax.regional.zones import main, zones

CRS, TRANSFORM = "EPSG:32733", Affine(30, 0, 320000, 0, -30, 8_500_000)
SHAPE = (40, 50)
BY_HAND = {"range_km": 0.4, "nugget": 0.3, "common": 0.02}
AMOUNTS = ("net", "loss", "gain")
TOLD = {"ERROR_RANGE_M": "400.0", "ERROR_NUGGET": "0.3", "ERROR_SILL": "0.68", "OFFSET_SE": "1.25"}


def write_layers(path, layers, transform=TRANSFORM, crs=CRS, **tags):
    """A raster of named float32 layers."""
    values = np.stack([np.asarray(layer, np.float32) for layer in layers.values()])
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": "float32"}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, nodata=-9999, **shape) as file:
        file.write(values)
        file.descriptions = tuple(layers)
        file.update_tags(**tags)
    return path


def write_change(path, d, sd, significant, **tags):
    layers = {"agbd_change": d, "agbd_change_sd": sd, "significant": significant}
    return write_layers(path, layers, **({"Z_THRESHOLD": "2.5"} | tags))


def box(left, top, right, bottom):
    """A box of the raster's pixels."""
    t = TRANSFORM
    return shapely.box(t.c + 30 * left, t.f - 30 * bottom, t.c + 30 * right, t.f - 30 * top)


def write_zones(path, *outlines):
    frame = geopandas.GeoDataFrame({"name": range(len(outlines)), "net": 7}, geometry=list(outlines), crs=CRS)
    frame.to_file(path)
    return path


@pytest.fixture
def land(tmp_path):
    """A raster of change with losses, gains and a hole, and two districts, one with half a column of pixels."""
    rng = np.random.default_rng(0)
    d, sd = rng.normal(1, 10, SHAPE), rng.uniform(8, 20, SHAPE)
    significant = np.zeros(SHAPE)
    significant[5:12, 6:14], significant[20:30, 30:40] = -1, 1
    d[significant == -1] -= 90
    d[significant == 1] += 60
    for layer in (d, sd, significant):
        layer[32:, :9] = -9999
    write_change(tmp_path / "change.tif", d, sd, significant)
    write_zones(tmp_path / "districts.gpkg", box(2, 3, 33.5, 35), box(40, 2, 48, 18))
    return {"folder": tmp_path, "d": d, "sd": sd, "significant": significant}


def run(land, maps=("change.tif",), places="districts.gpkg", **settings):
    folder = land["folder"]
    return zones([folder / name for name in maps], folder / places, **settings)


def brute_force(land, left, top, right, bottom, together):
    """Area, amount and its variance, of all pixels, losses and gains, by loops over pairs: (3, 3)."""
    column, row = np.arange(SHAPE[1]), np.arange(SHAPE[0])
    share = np.clip(np.minimum(column + 1, right) - np.maximum(column, left), 0, 1) * np.clip(
        np.minimum(row + 1, bottom) - np.maximum(row, top), 0, 1
    ).reshape(-1, 1)
    outline = np.array(shapely.segmentize(box(left, top, right, bottom), 100).exterior.coords)
    lon, lat = Transformer.from_crs(CRS, 4326, always_xy=True).transform(*outline.T)
    pixel = abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0]) / 1e4 / ((right - left) * (bottom - top))
    found = []
    for which in (land["sd"] > 0, land["significant"] == -1, land["significant"] == 1):
        rows, columns = np.nonzero(which & (share > 0))
        area = pixel * share[rows, columns]
        weight, variance = area * land["sd"][rows, columns], 0.0
        for r, c, w in zip(rows, columns, weight, strict=True):
            variance += float((w * weight * together(np.hypot(30 * (rows - r), 30 * (columns - c)))).sum())
        found.append((area.sum(), (area * land["d"][rows, columns]).sum(), variance))
    return np.array(found)


def decaying(distance):
    return 0.68 * np.exp(-3 * distance / 400) + 0.3 * (distance == 0)


def test_net_losses_and_gains_are_those_of_plain_sums_over_all_pairs(land):
    done = run(land, **BY_HAND)
    table = done.table
    expected = ["area_ha", "covered_ha", "covered_share", "n_pixels", "mean", "mean_se"]
    expected += ["net", "net_se", "net_lo", "net_hi"]
    for name in ("loss", "gain"):
        expected += [f"{name}_ha", name, f"{name}_se", f"{name}_lo", f"{name}_hi"]
    assert list(table.columns) == ["name", "zone_net", *expected, "chance_ha", "method", "note", "geometry"]
    pairs = brute_force(land, 2, 3, 33.5, 35, lambda distance: decaying(distance) + 0.02)
    row = table.loc[0]
    assert row["covered_ha"] == pytest.approx(pairs[0, 0], rel=1e-4) and row["covered_share"] < 0.99
    assert (row["loss_ha"], row["gain_ha"]) == pytest.approx(tuple(pairs[1:, 0]), rel=1e-4)
    assert row["loss"] < 0 < row["gain"]
    for name, (_, amount, variance) in zip(AMOUNTS, pairs, strict=True):
        assert row[name] == pytest.approx(amount, rel=1e-4, abs=1e-3)
        assert row[f"{name}_se"] == pytest.approx(np.sqrt(variance), rel=1e-4)
        assert row[f"{name}_hi"] - row[name] == pytest.approx(1.959964 * row[f"{name}_se"], rel=1e-6)
        assert row[name] - row[f"{name}_lo"] == pytest.approx(1.959964 * row[f"{name}_se"], rel=1e-6)
    assert (row["mean"], row["mean_se"]) == pytest.approx(
        (row["net"] / row["covered_ha"], row["net_se"] / row["covered_ha"])
    )
    assert row["chance_ha"] == pytest.approx(row["covered_ha"] * stats.norm.sf(2.5))
    assert done.of_change and row["method"] == "map" and row["note"] == ""


def test_parts_of_a_zone_and_classes_add_up(land):
    folder = land["folder"]
    write_zones(folder / "parts.gpkg", box(2, 3, 17.3, 35), box(17.3, 3, 33.5, 21.6), box(17.3, 21.6, 33.5, 35))
    kinds = np.where(np.arange(SHAPE[1]) < 11, 1, 2) * np.ones(SHAPE)
    write_layers(folder / "classes.tif", {"class": kinds})
    whole = run(land, **BY_HAND).table.loc[0]
    sums = [*AMOUNTS, "covered_ha", "loss_ha", "gain_ha", "chance_ha"]
    for table in (
        run(land, places="parts.gpkg", **BY_HAND).table,
        run(land, classes=str(folder / "classes.tif"), **BY_HAND).table[:2],
    ):
        np.testing.assert_allclose(table[sums].sum().to_numpy(float), whole[sums].to_numpy(float), rtol=1e-6)
        assert (table["net_se"] < whole["net_se"]).all() and table["net_se"].sum() > whole["net_se"]
    kept = run(land, classes=str(folder / "classes.tif"), keep=(1, 2), **BY_HAND).table.loc[0]
    names = [f"{name}{end}" for name in AMOUNTS for end in ("", "_se", "_lo", "_hi")]
    np.testing.assert_allclose(kept[names].to_numpy(float), whole[names].to_numpy(float), rtol=1e-9)


def test_no_significant_change_is_zero_with_a_reason(land, capsys):
    folder, none = land["folder"], np.where(land["sd"] > 0, 0, -9999)
    write_change(folder / "change.tif", land["d"], land["sd"], none, **{"Z_THRESHOLD": "inf"} | TOLD)
    write_zones(folder / "districts.gpkg", box(2, 3, 33.5, 35), box(100, 2, 120, 18))
    words = ["--maps", str(folder / "change.tif"), "--zones", str(folder / "districts.gpkg")]
    assert main([*words, "--out", str(folder / "table.csv"), "--carbon-fraction", "0.47"]) == 0
    table = pandas.read_csv(folder / "table.csv")
    zeros = [f"{name}{end}" for name in ("loss", "gain") for end in ("_ha", "", "_se", "_lo", "_hi", "_co2e")]
    assert (table.loc[0, [*zeros, "chance_ha"]] == 0).all() and table["net_se"][0] > 0
    assert "-0.0" not in (folder / "table.csv").read_text()
    assert table["note"][0] == "no significant change; a small one can't be told from chance"
    assert table["note"][1] == "no data of the maps here" and table["covered_ha"][1] == 0
    assert table.loc[1, [*zeros, "net", "net_se", "chance_ha"]].isna().all()
    page = (folder / "table.html").read_text()
    assert "Change of biomass by zone" in page and "no significant change; a small one" in page
    assert "nan" not in page


def test_the_raster_tells_how_its_errors_go_together(land, capsys):
    """And its offset's own error, which all pixels share, adds up over the area."""
    folder = land["folder"]
    write_change(folder / "change.tif", land["d"], land["sd"], land["significant"], **TOLD)
    row = run(land).table.loc[0]
    for name, (area, _, variance) in zip(AMOUNTS, brute_force(land, 2, 3, 33.5, 35, decaying), strict=True):
        assert row[f"{name}_se"] == pytest.approx(np.sqrt(variance + (1.25 * area) ** 2), rel=1e-4)
    none = run(land, method="none").table.loc[0]
    assert none[["net", "loss", "loss_ha"]].to_list() == pytest.approx(row[["net", "loss", "loss_ha"]].to_list())
    assert np.isnan([none["net_se"], none["loss_lo"]]).all() and none["method"] == "none"


def test_several_rasters_share_the_mean_of_what_they_tell(land):
    """And each has its own offset and threshold."""
    folder, east = land["folder"], TRANSFORM @ Affine.translation(SHAPE[1], 0)
    one = TOLD | {"ERROR_SILL": "0.7"}
    other = {"ERROR_RANGE_M": "600.0", "ERROR_NUGGET": "0.1", "ERROR_SILL": "0.9", "OFFSET_SE": "0.25"}
    layers = {"agbd_change": land["d"], "agbd_change_sd": land["sd"], "significant": land["significant"]}
    write_layers(folder / "change.tif", layers, Z_THRESHOLD="2.5", **one)
    write_layers(folder / "east.tif", layers, east, Z_THRESHOLD="3.5", **other)
    write_zones(folder / "districts.gpkg", box(10, 0, 90, 32), box(10, 0, 50, 32), box(50, 0, 90, 32))
    maps = ("change.tif", "east.tif")
    done, by_hand = run(land, maps), run(land, maps, range_km=0.5, nugget=0.2).table
    found = done.correlation
    assert (found.range_m, found.nugget, found.sill) == pytest.approx((500, 0.2, 0.8))
    area = done.table["covered_ha"][1:].to_numpy()
    assert done.table["chance_ha"][0] == pytest.approx(area @ stats.norm.sf([2.5, 3.5]))
    offset = area @ [1.25, 0.25]
    assert done.table["net_se"][0] == pytest.approx(np.hypot(by_hand["net_se"][0], offset), rel=1e-9)


def test_carbon_of_net_losses_and_gains(land):
    row = run(land, carbon_fraction=0.47, **BY_HAND).table.loc[0]
    for name in AMOUNTS:
        for end in ("", "_se", "_lo", "_hi"):
            assert row[f"{name}_carbon{end}"] == pytest.approx(0.47 * row[f"{name}{end}"])
            assert row[f"{name}_co2e{end}"] == pytest.approx(0.47 * 44 / 12 * row[f"{name}{end}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"maps": ("change.tif", "map.tif")}, r"change\.tif is a raster of change, .*map\.tif a map of biomass"),
        ({"maps": ("map.tif", "change.tif")}, r"change\.tif is a raster of change, .*map\.tif a map of biomass"),
        ({"scale_to_zone": True, **BY_HAND}, r"change\.tif is a raster of change, and --scale-to-zone goes with maps"),
        ({"footprints": ["shots.parquet"]}, r"change\.tif is a raster of change, and --footprints goes with maps"),
        ({}, r"change\.tif: no tag ERROR_RANGE_M tells .*make it anew .*, or give --range-km and --nugget"),
        ({"maps": ("map.tif",), "method": "map"}, "method is map: give --footprints"),
        ({"maps": ("no_sign.tif",)}, r"no_sign\.tif: a band agbd_change and none significant; make it anew"),
        ({"maps": ("no_tag.tif",)}, r"no_tag\.tif: tag Z_THRESHOLD is None; expected a number"),
        ({"maps": ("half.tif",)}, r"half\.tif: tag ERROR_SILL is None; expected a number"),
        ({"maps": ("odd.tif",), **BY_HAND}, r"odd\.tif: band 3 holds 2; expected -1 for loss, 1 for gain, or 0"),
    ],
)
def test_what_can_not_be_is_refused_by_name(land, settings, message):
    folder, layers = land["folder"], {"agbd_change": land["d"], "agbd_change_sd": land["sd"]}
    write_layers(folder / "map.tif", {"agbd": np.abs(land["d"]), "agbd_sd": np.abs(land["sd"])})
    write_layers(folder / "no_sign.tif", layers, Z_THRESHOLD="2.5")
    write_layers(folder / "no_tag.tif", layers | {"significant": land["significant"]})
    write_change(
        folder / "half.tif",
        land["d"],
        land["sd"],
        land["significant"],
        ERROR_RANGE_M="400.0",
        ERROR_NUGGET="0.3",
        OFFSET_SE="0.0",
    )
    write_change(folder / "odd.tif", land["d"], land["sd"], np.where(land["significant"] == 1, 2, land["significant"]))
    with pytest.raises((RegionalError, RasterError), match=message):
        run(land, **settings)
