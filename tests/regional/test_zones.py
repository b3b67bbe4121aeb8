"""The command `zones` on maps and footprints whose totals and errors are worked out by hand."""

import json
import re
from xml.etree import ElementTree

import geopandas
import h5py
import numpy as np
import pandas
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import Geod, Transformer

from biomass_jax.data.vectors import read_zones
from biomass_jax.errors import ConfigError, RegionalError
from biomass_jax.regional import estimators
from biomass_jax.regional.zones import main, zones
from data_prep.gedi.footprints import write_footprints
from data_prep.synthetic.gedi_file import shot_numbers, write_gedi

CRS = "EPSG:32733"  # where a pixel's ground is almost its nominal size: 300 km from the middle
TRANSFORM = Affine(30, 0, 320000, 0, -30, 8_500_000)
SHAPE = (200, 240)
COLUMNS = ["area_ha", "covered_ha", "covered_share", "n_pixels", "n_shots", "n_tracks"]
COLUMNS += ["mean", "mean_se", "total", "total_se", "total_lo", "total_hi", "method", "note"]


def write_map(path, agbd, sd=None, transform=TRANSFORM):
    layers = [agbd] if sd is None else [agbd, sd]
    profile = {"driver": "GTiff", "height": agbd.shape[0], "width": agbd.shape[1], "dtype": "float32", "nodata": -1}
    with rasterio.open(path, "w", crs=CRS, transform=transform, count=len(layers), **profile) as file:
        for band, layer in enumerate(layers, 1):
            file.write(layer.astype(np.float32), band)
            file.set_band_description(band, ("agbd", "agbd_sd")[band - 1])
    return path


def write_shots(path, columns, rows, agbd, orbit, beam, sigma=20.0):
    """A table of footprints at columns and rows of the map's grid, fractions too."""
    x, y = TRANSFORM.c + 30 * np.asarray(columns), TRANSFORM.f - 30 * np.asarray(rows)
    lon, lat = Transformer.from_crs(CRS, 4326, always_xy=True).transform(x, y)
    n = len(lon)
    number = np.asarray(orbit, np.uint64) * 10**13 + np.asarray(beam, np.uint64) * 10**11 + np.arange(1, n + 1)
    table = {"shot_number": number.astype(np.uint64), "lon": lon, "lat": lat, "agbd": np.asarray(agbd, np.float32)}
    table |= {"time": np.full(n, np.datetime64("2020-07-01", "us")), "beam": np.full(n, "BEAM0101", object)}
    table |= {"agbd_se": np.full(n, 3, np.float32), "agbd_sigma": np.full(n, sigma, np.float32)}
    table |= {"sensitivity": np.full(n, 0.97, np.float32), "granule": np.full(n, "G", object)}
    flags = ("l4_quality_flag", "degrade_flag", "selected_algorithm", "pft_class", "leaf_off_flag")
    return write_footprints(table | {name: np.ones(n, np.uint8) for name in flags}, path, {})


def box(left, top, right, bottom):
    """A box of the map's pixels."""
    t = TRANSFORM
    return shapely.box(t.c + 30 * left, t.f - 30 * bottom, t.c + 30 * right, t.f - 30 * top)


def geodesic(outline):
    lon, lat = Transformer.from_crs(CRS, 4326, always_xy=True).transform(
        *np.array(shapely.segmentize(outline, 100).exterior.coords).T
    )
    return abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0]) / 1e4


@pytest.fixture
def land(tmp_path):
    """A map with standard deviations, a hole, three districts, and footprints of seven tracks."""
    row, column = np.mgrid[: SHAPE[0], : SHAPE[1]]
    agbd = 60 + 0.5 * column + 0.2 * row
    sd = 10 + 0.05 * row
    agbd[150:, :60] = sd[150:, :60] = -1
    write_map(tmp_path / "map_agbd.tif", agbd, sd)
    outlines = [box(10, 10, 110, 90), box(110, 10, 210, 90.5), box(20, 140, 99.5, 190)]
    frame = geopandas.GeoDataFrame(
        {"name": ["north west", "north <east>", "south"], "AREA_HA": [1, 2, 3]}, geometry=outlines, crs=CRS
    )
    frame.to_crs(4326).to_file(tmp_path / "districts.gpkg", layer="districts")
    rng = np.random.default_rng(0)
    tracks = [np.column_stack([np.full(n, c + 0.5), 12.5 + 3 * np.arange(n)]) for c, n in zip(COLS, SIZES, strict=True)]
    at = np.concatenate(tracks)
    mapped = agbd[at[:, 1].astype(int), at[:, 0].astype(int)]
    orbit = np.repeat(np.arange(100, 107), SIZES)
    value = mapped + np.repeat([5.0, -3, 8, 2, 0, 4, 30], SIZES) + rng.normal(0, 6, len(mapped))
    write_shots(tmp_path / "shots.parquet", at[:, 0], at[:, 1], value, orbit, 5 + orbit % 2)
    return {"folder": tmp_path, "agbd": agbd, "sd": sd, "outlines": outlines, "off": value - mapped, "orbit": orbit}


COLS, SIZES = (15, 30, 52, 70, 88, 105, 150), (20, 8, 25, 12, 25, 17, 9)


def run(land, *words, out="table.csv", code=0, maps=("map_agbd.tif",)):
    folder = land["folder"]
    given = ["--zones", str(folder / "districts.gpkg"), "--out", str(folder / out), *map(str, words)]
    assert main([*(["--maps", *(str(folder / name) for name in maps)] if maps else []), *given]) == code
    return folder / out


def shares(outline):
    """Share of each pixel that lies in a box of pixels."""
    left, bottom, right, top = outline.bounds
    columns = np.clip(np.minimum(np.arange(1, SHAPE[1] + 1), (right - TRANSFORM.c) / 30), 0, None) - np.clip(
        np.maximum(np.arange(SHAPE[1]), (left - TRANSFORM.c) / 30), 0, None
    )
    rows = np.minimum(np.arange(1, SHAPE[0] + 1), (TRANSFORM.f - bottom) / 30) - np.maximum(
        np.arange(SHAPE[0]), (TRANSFORM.f - top) / 30
    )
    return np.clip(rows, 0, None)[:, None] * np.clip(columns, 0, None)


def test_areas_means_and_totals(land, capsys):
    table = pandas.read_csv(run(land))
    assert list(table.columns) == ["name", "zone_AREA_HA", *COLUMNS]
    assert list(table["name"]) == ["north west", "north <east>", "south"]
    for row, outline in enumerate(land["outlines"]):
        share = shares(outline) * (land["agbd"] >= 0)
        area = geodesic(outline)
        assert table["area_ha"][row] == pytest.approx(area, rel=1e-6)
        assert table["covered_share"][row] == pytest.approx(share.sum() / shares(outline).sum(), rel=1e-4)
        assert table["covered_ha"][row] == pytest.approx(area * share.sum() / shares(outline).sum(), rel=1e-4)
        mean = (share * land["agbd"]).sum() / share.sum()
        assert table["mean"][row] == pytest.approx(mean, rel=1e-5)
        assert table["total"][row] == pytest.approx(mean * table["covered_ha"][row], rel=1e-5)
    assert 8000 <= table["n_pixels"][0] < 8000 + 2 * 182 and table["covered_share"][2] == pytest.approx(0.6, abs=0.01)
    assert (table["method"] == "none").all() and table["total_se"].isna().all()
    assert capsys.readouterr().out.startswith("3 rows, method none;")


def test_a_whole_zone_by_what_of_it_is_covered(land):
    plain, scaled = (pandas.read_csv(run(land, *words)) for words in ((), ("--scale-to-zone",)))
    np.testing.assert_allclose(scaled["total"], plain["mean"] * plain["area_ha"])
    assert scaled["total"][2] > 1.1 * plain["total"][2]


def test_model_assisted_by_tracks(land):
    table = pandas.read_csv(run(land, "--footprints", land["folder"] / "shots.parquet"))
    assert (table["method"] == "model_assisted").all()
    first = land["orbit"] < 106
    off, orbit = land["off"][first], land["orbit"][first]
    sums, sizes = (np.array([f(off[orbit == one]) for one in np.unique(orbit)]) for f in (np.sum, len))
    mean = off.mean()
    se = np.sqrt(6 / 5 * ((sums - mean * sizes) ** 2).sum()) / sizes.sum()
    plain = pandas.read_csv(run(land))
    assert (table["n_shots"][0], table["n_tracks"][0]) == (107, 6)
    assert table["mean"][0] == pytest.approx(plain["mean"][0] + mean, rel=1e-6)
    assert table["mean_se"][0] == pytest.approx(se, rel=1e-5)
    reach = 2.570582 * se * table["covered_ha"][0]  # Student's t, 5 degrees of freedom
    assert table["total_hi"][0] - table["total"][0] == pytest.approx(reach, rel=1e-5)
    assert table["total"][0] - table["total_lo"][0] == pytest.approx(reach, rel=1e-5)
    assert table["note"][1] == "no interval: 1 track, at least 5 are needed"
    assert np.isnan(table["total_lo"][1]) and table["n_shots"][1] == 9
    assert table["note"][2] == "no footprint on the map here" and np.isnan(table["total"][2])


def test_beams_of_one_orbit_are_one_cluster_where_orbits_are(land):
    folder = land["folder"]
    at = np.column_stack([np.repeat([20, 40, 60, 80, 100, 90], 10), np.tile(np.arange(15, 85, 7), 6)])
    mapped = land["agbd"][at[:, 1], at[:, 0]]
    write_shots(folder / "some.parquet", at[:, 0] + 0.5, at[:, 1] + 0.5, mapped + 1, [7] * 60, np.repeat(range(6), 10))
    words = ("--footprints", folder / "some.parquet", folder / "some.parquet")  # each footprint counts once
    table = pandas.read_csv(run(land, *words))
    assert (table["n_shots"][0], table["n_tracks"][0]) == (60, 6)
    assert table["mean_se"][0] == pytest.approx(0, abs=1e-5)
    table = pandas.read_csv(run(land, *words, "--clusters", "orbit"))
    assert table["n_tracks"][0] == 1 and "1 track" in table["note"][0]


def test_the_maps_own_errors_with_a_correlation_by_hand(land, capsys):
    outline = box(10.5, 10, 50, 40)
    frame = geopandas.GeoDataFrame({"name": ["small", "large"]}, geometry=[outline, land["outlines"][0]], crs=CRS)
    frame.to_file(land["folder"] / "districts.gpkg")
    table = pandas.read_csv(run(land, "--range-km", 1.5, "--nugget", 0.3, "--common", 0.05))
    assert "errors go together up to 1.5 km (exponential)" in capsys.readouterr().out
    assert "Errors go together up to 1.5 km" in (land["folder"] / "table.html").read_text()
    assert (table["method"] == "map").all()
    weight = (shares(outline) * geodesic(outline) / shares(outline).sum() * land["sd"])[10:40, 10:50]
    rows, columns = (30 * axis.ravel() for axis in np.indices(weight.shape))
    apart = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    together = 0.65 * np.exp(-3 * apart / 1500) + 0.05 + 0.3 * np.eye(weight.size)
    se = np.sqrt(weight.ravel() @ together @ weight.ravel())
    assert table["total_se"][0] == pytest.approx(se, rel=1e-5)
    assert table["total_hi"][0] - table["total"][0] == pytest.approx(1.959964 * se, rel=1e-5)
    assert table["mean_se"][0] > table["mean_se"][1]


@pytest.mark.slow
def test_the_maps_own_errors_with_a_correlation_from_footprints(land):
    """Residuals are noise, a bias, and waves that near places share."""
    rng = np.random.default_rng(1)
    at = rng.uniform([0, 0], [240, 140], (3000, 2))
    mapped, sd = (land[name][at[:, 1].astype(int), at[:, 0].astype(int)] for name in ("agbd", "sd"))
    z = 0.3 * np.sin(at[:, 0] / 12) + rng.normal(0, 0.8, 3000) + 0.4
    write_shots(land["folder"] / "held_out.parquet", at[:, 0], at[:, 1], mapped - z * sd, rng.integers(1, 99, 3000), 1)
    done = zones(
        [land["folder"] / "map_agbd.tif"],
        land["folder"] / "districts.gpkg",
        footprints=[land["folder"] / "held_out.parquet"],
        method="map",
        max_lag_km=2,
    )
    assert done.correlation.nugget == pytest.approx(0.64, rel=0.1)
    assert done.correlation.common == pytest.approx(0.16, rel=0.25)
    assert done.footprints == 3000
    assert done.table["mean_se"][0] ** 2 > done.correlation.common * land["sd"][10:90, 10:110].mean() ** 2


def test_hybrid_takes_no_map(land):
    words = ("--method", "hybrid", "--footprints", land["folder"] / "shots.parquet")
    table = pandas.read_csv(run(land, *words, maps=()))
    frame = geopandas.read_parquet(land["folder"] / "shots.parquet")
    values = frame["agbd"].to_numpy(float)[land["orbit"] < 106]
    sampling = estimators.cluster_mean(values, land["orbit"][land["orbit"] < 106])
    assert table["mean"][0] == pytest.approx(values.mean())
    assert table["mean_se"][0] == pytest.approx(np.sqrt(sampling.variance + 20.0**2))
    assert table["note"][0] == "model's error from agbd_sigma, 100% of it shared"
    assert table["total"][0] == pytest.approx(values.mean() * table["area_ha"][0])
    assert table["covered_share"][0] == 1 and table["note"][2] == "no footprint here"
    apart = pandas.read_csv(run(land, *words, "--shared-sigma", 0, maps=()))
    assert apart["mean_se"][0] == pytest.approx(np.sqrt(sampling.variance + 400 / 107))


def test_hybrid_with_the_models_of_the_granules(land):
    """Of the same shots in a granule: the variance that its models' parameters bring, by drawing them anew."""
    folder, number = land["folder"], 8852
    at = np.column_stack([np.repeat([20, 40, 60, 80, 100], 8), np.tile(np.arange(15, 85, 9), 5)]) + 0.5
    agbd = np.random.default_rng(3).gamma(4, 25, 40)
    numbers = shot_numbers(number, "BEAM0101", 40)
    shots = {"shot_number": numbers, "delta_time": np.full(40, 8e7), "agbd": agbd}
    shots |= {"lat_lowestmode": np.full(40, -13.5), "lon_lowestmode": np.full(40, 13.3)}
    name = f"GEDI04_A_2020183184512_O0{number}_02_T00198_02_002_02_V002.h5"
    path = write_gedi(folder / name, {"BEAM0101": shots})
    orbits, own = np.full(40, number), np.arange(40) // 8
    write_shots(folder / "own.parquet", *at.T, agbd, orbits, own)
    table = geopandas.read_parquet(folder / "own.parquet")
    table["shot_number"] = numbers  # one beam in the granule, five tracks by orbit below
    table["shot_number"] += (own * 10**13).astype(np.uint64)
    table.to_parquet(folder / "own.parquet")
    with h5py.File(path, "r+") as file:
        file["BEAM0101/shot_number"][:] = table["shot_number"].to_numpy()
        x = file["BEAM0101/xvar"][:, 0].astype(float)
        models = {row["predict_stratum"]: row for row in file["ANCILLARY/model_data"][:]}
        model = models[file["BEAM0101/predict_stratum"][0]]
    words = ("--method", "hybrid", "--footprints", folder / "own.parquet")
    found = pandas.read_csv(run(land, *words, "--granules", path, maps=()))
    assert found["n_tracks"][0] == 5 and np.isnan(found["note"][0])
    sampling = estimators.cluster_mean(agbd.astype(np.float32).astype(float), own).variance
    small = 1e-3  # of the parameters' errors, so that first order is enough
    par = np.random.default_rng(4).multivariate_normal(model["par"][:2], small**2 * model["vcov"][:2, :2], 20_000)
    means = model["bias_correction_value"] * ((par[:, :1] + par[:, 1:] * x) ** 2).mean(axis=1)
    assert found["mean_se"][0] ** 2 - sampling == pytest.approx(means.var() / small**2, rel=0.03)
    with pytest.raises(RegionalError, match="--granules tell of GEDI's models, which method model_assisted"):
        zones(
            [folder / "map_agbd.tif"], folder / "districts.gpkg", footprints=[folder / "own.parquet"], granules=[path]
        )


def test_carbon_follows_from_the_fraction(land):
    table = pandas.read_csv(run(land, "--range-km", 1, "--nugget", 0.5, "--carbon-fraction", 0.47))
    for end in ("", "_se", "_lo", "_hi"):
        np.testing.assert_allclose(table[f"carbon{end}"], 0.47 * table[f"total{end}"])
        np.testing.assert_allclose(table[f"co2e{end}"], 0.47 * 44 / 12 * table[f"total{end}"])


def test_classes_part_a_zone_and_a_mask_keeps_some(land):
    folder = land["folder"]
    kinds = np.ones(SHAPE, np.uint8)
    kinds[:, 60:] = 2
    kinds[:, 100:] = 3
    profile = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 1, "dtype": "uint8"}
    with rasterio.open(folder / "classes.tif", "w", crs=CRS, transform=TRANSFORM, **profile) as file:
        file.write(kinds, 1)
    words = ("--footprints", folder / "shots.parquet", "--classes", folder / "classes.tif")
    table = pandas.read_csv(run(land, *words), dtype={"class": str})
    plain = pandas.read_csv(run(land, *words[:2]))
    assert list(table["class"]) == ["1", "2", "3", "3", "1", "2"]
    first = table[:3]
    assert first["covered_ha"].sum() == pytest.approx(plain["covered_ha"][0])
    np.testing.assert_allclose(first["covered_ha"] / first["covered_ha"].sum(), [0.5, 0.4, 0.1], rtol=1e-4)
    assert list(first["n_tracks"]) == [3, 2, 1] and first["n_shots"].sum() == 107
    plain = pandas.read_csv(run(land))
    by_class = pandas.read_csv(run(land, *words[2:]))
    assert by_class["total"][:3].sum() == pytest.approx(plain["total"][0])
    kept = pandas.read_csv(run(land, *words[2:], "--keep", "1,2", "--range-km", 1, "--nugget", 0.2))
    assert len(kept) == 3 and list(kept["class"]) == ["1+2"] * 3
    assert kept["total"][0] == pytest.approx(by_class["total"][:2].sum())
    outline = box(10, 10, 100, 90)
    geopandas.GeoDataFrame({"name": ["cut"]}, geometry=[outline], crs=CRS).to_file(folder / "districts.gpkg")
    cut = pandas.read_csv(run(land, "--range-km", 1, "--nugget", 0.2))
    assert kept["total_se"][0] == pytest.approx(cut["total_se"][0], rel=1e-3)


def test_the_table_in_three_formats_and_a_page(land):
    words = ("--footprints", land["folder"] / "shots.parquet")
    plain = pandas.read_csv(run(land, *words))
    layer = geopandas.read_file(run(land, *words, out="table.gpkg"), layer="zones")
    stored = geopandas.read_parquet(run(land, *words, out="table.parquet"))
    for table in (layer, stored):
        assert table.crs == "EPSG:4326" and list(table.columns[:-1]) == list(plain.columns)
        assert table.geometry.geom_equals(geopandas.read_file(land["folder"] / "districts.gpkg").geometry).all()
        assert table["total"].to_numpy() == pytest.approx(plain["total"].to_numpy(), nan_ok=True)
    (style,) = geopandas.read_file(land["folder"] / "table.gpkg", layer="layer_styles").itertuples()  # as QGIS does
    assert (style.f_table_name, style.f_geometry_column, bool(style.useAsDefault)) == ("zones", "geom", True)
    renderer = ElementTree.fromstring(style.styleQML).find("renderer-v2")
    edges = [float(one.get(end)) for one in renderer.find("ranges") for end in ("lower", "upper")]
    ends = pytest.approx([plain["mean"].min(), plain["mean"].max()])
    assert renderer.get("attr") == "mean" and [min(edges), max(edges)] == ends
    assert len(read_zones(land["folder"] / "table.gpkg")) == len(plain)  # the table of styles is no second layer
    page = (land["folder"] / "table.html").read_text()
    assert "north &lt;east&gt;" in page and "<east>" not in page and "Saerndal" not in page
    assert len(re.findall("<tr>", page)) == 4 and f"{plain['total'][0]:,.0f}" in page
    assert json.dumps(sorted(path.name for path in land["folder"].glob("table.*"))) == json.dumps(
        ["table.csv", "table.gpkg", "table.html", "table.parquet"]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "map"}, "give --footprints that the model wasn't trained on, or --range-km and --nugget"),
        ({"method": "model_assisted"}, "there are no footprints; give --footprints"),
        ({"range_km": 2.0}, "--range-km and --nugget go together"),
        ({"common": 0.1}, "--common only with them"),
        ({"range_km": 2.0, "nugget": 0.7, "common": 0.5}, "nugget 0.7 and common 0.5"),
        ({"keep": (1,)}, "give --classes RASTER"),
        ({"classes": "c.tif", "scale_to_zone": True}, "--scale-to-zone goes without --classes"),
        ({"method": "hybrid", "classes": "c.tif"}, "hybrid takes no map"),
    ],
)
def test_settings_that_contradict_each_other(land, settings, message):
    with pytest.raises(RegionalError, match=message):
        zones([land["folder"] / "map_agbd.tif"], land["folder"] / "districts.gpkg", **settings)


def test_what_can_not_be_told_is_refused(land, capsys):
    folder = land["folder"]
    with pytest.raises(RegionalError, match="there is no map; give --maps"):
        zones([], folder / "districts.gpkg")
    with pytest.raises(ConfigError, match=r"level is 1.0; expected a number above 0 to below 1"):
        zones([folder / "map_agbd.tif"], folder / "districts.gpkg", level=1.0)
    write_map(folder / "plain.tif", land["agbd"])
    run(land, "--range-km", 1, "--nugget", 0, maps=("plain.tif",), code=1)
    assert "plain.tif: no band agbd_sd, the standard deviations" in capsys.readouterr().err
    write_map(folder / "odd.tif", np.abs(land["agbd"]), land["sd"])
    run(land, "--range-km", 1, "--nugget", 0, maps=("odd.tif",), code=1)
    assert "odd.tif: pixels with agbd and without agbd_sd" in capsys.readouterr().err
    run(land, out="table.shp", code=1)
    assert "expected a name that ends in .csv, .gpkg, .parquet" in capsys.readouterr().err
    assert not list(folder.glob("table.*")) and not list(folder.glob(".*partial*"))
    sigma = np.nan
    write_shots(folder / "bare.parquet", [20.5], [20.5], [80.0], [1], [1], sigma)
    with pytest.raises(RegionalError, match=r"no agbd_sigma.*\(--granules\)"):
        zones([], folder / "districts.gpkg", footprints=[folder / "bare.parquet"], method="hybrid")
