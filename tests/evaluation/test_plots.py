"""Maps beside field plots: a published line, and an inventory whose answers are known."""

import json

import geopandas
import numpy as np
import pandas
import pytest
import rasterio
import shapely
from affine import Affine

from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.__main__ import main
from biomass_jax.evaluation.inventory import read_plots
from biomass_jax.evaluation.plots import compare, errors_in_variables, fit_line, score, validate

# Pearson's data with York's weights; York et al. (2004), table 2: slope, intercept, their standard errors, chi2.
X = [0.0, 0.9, 1.8, 2.6, 3.3, 4.4, 5.2, 6.1, 6.5, 7.4]
Y = [5.9, 5.4, 4.4, 4.6, 3.5, 3.7, 2.8, 2.8, 2.4, 1.5]
X_WEIGHTS = [1000, 1000, 500, 800, 200, 80, 60, 20, 1.8, 1.0]
Y_WEIGHTS = [1, 1.8, 4, 8, 20, 20, 70, 70, 100, 500]
TRANSFORM = Affine(30, 0, 600000, 0, -30, 4100000)


def test_the_published_line_of_pearsons_data():
    line = errors_in_variables(X, Y, np.array(X_WEIGHTS) ** -0.5, np.array(Y_WEIGHTS) ** -0.5)
    assert line.slope == pytest.approx(-0.480533407, abs=1e-8)
    assert line.intercept == pytest.approx(5.47991022, abs=1e-7)
    assert line.slope_se == pytest.approx(0.0579850, abs=1e-6)
    assert line.intercept_se == pytest.approx(0.294971, abs=1e-5)
    assert line.chi2 == pytest.approx(11.866353 / 8, abs=1e-6)


def test_the_line_is_that_of_the_truth_where_a_plain_fit_is_not():
    rng = np.random.default_rng(4)
    truth = rng.uniform(0, 300, 4000)
    errors = rng.uniform(20, 70, truth.size)
    plots = truth + rng.normal(0, errors)
    maps = 12 + 0.8 * truth + rng.normal(0, 35, truth.size)
    line = fit_line(plots, maps, errors)
    assert abs(line.slope - 0.8) < 3 * line.slope_se < 0.05
    assert abs(line.intercept - 12) < 3 * line.intercept_se
    assert line.map_error == pytest.approx(35, rel=0.05) and line.chi2 == pytest.approx(1, abs=1e-6)
    assert np.polyfit(plots, maps, 1)[0] < 0.7  # least squares of the map alone, flattened by the plots' errors
    exact = fit_line(plots, 12 + 0.8 * plots, errors)
    assert exact.slope == pytest.approx(0.8) and exact.map_error < 0.1


def write_map(path, values, season):
    height, width = values.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "float32", "nodata": -1}
    with rasterio.open(path, "w", crs="EPSG:32610", transform=TRANSFORM, **profile) as file:
        file.write(values.astype(np.float32), 1)
        file.update_tags(SEASON=season)
    return path


def plane(column, row):
    """A map's value in each pixel."""
    return 20 + 2.0 * np.floor(column) + 1.0 * np.floor(row)


def mean_in_circle(column, row, area_ha):
    """The map's mean over a circle, from points all over it."""
    reach = np.sqrt(area_ha * 1e4 / np.pi) / 30
    x, y = np.meshgrid(*(np.linspace(-reach, reach, 301),) * 2)
    inside = np.hypot(x, y) < reach
    return plane(column + x[inside], row + y[inside]).mean()


@pytest.fixture
def inventory(tmp_path):
    """A map of a plane, and plots whose biomass differs from it by what is known of each."""
    row, column = np.mgrid[:100, :120]
    map_path = write_map(tmp_path / "map_agbd.tif", plane(column, row), "2019-05-01/2019-10-01")
    rng = np.random.default_rng(1)
    places = rng.uniform([8, 8], [112, 92], (60, 2))
    off = np.where(np.arange(60) % 2, 30.0, -10.0)  # the map's excess over each
    easting, northing = TRANSFORM.c + 30 * places[:, 0], TRANSFORM.f - 30 * places[:, 1]
    areas = np.where(np.arange(60) % 3, 1.0, 0.05)
    frame = pandas.DataFrame(
        {
            "agb": [mean_in_circle(*place, area) for place, area in zip(places, areas, strict=True)] - off,
            "agb_se": np.full(60, 6.0),
            "area_ha": areas,
            "date": ["2019-07-15"] * 50 + ["2015-07-15"] * 6 + [None] * 4,
            "forest_type": np.where(np.arange(60) % 2, "pine", "oak"),
        }
    )
    geometry = geopandas.points_from_xy(easting, northing, crs=32610)
    geopandas.GeoDataFrame(frame, geometry=geometry).to_file(tmp_path / "plots.gpkg")
    return tmp_path / "plots.gpkg", map_path, off


def test_the_inventorys_answers(inventory):
    path, map_path, off = inventory
    table = compare(read_plots(path, {}), [map_path], max_years=2, min_cover=0.9)
    np.testing.assert_allclose(table["map"] - table["agb"], off, atol=0.1)
    assert list(table["left_out"]) == [""] * 50 + ["another time"] * 6 + ["without a date of plot or map"] * 4
    assert list(table["small"]) == [i % 3 == 0 for i in range(60)]
    rows = {(row["table"], row["group"]): row for row in score(table)}
    used = off[:50]
    everything = rows["all", "all"]
    assert everything["n"] == 50 and everything["bias"] == pytest.approx(used.mean(), abs=0.05)
    assert everything["rmsd"] == pytest.approx(np.sqrt((used**2).mean()), abs=0.05)
    assert everything["rmsd_beyond"] == pytest.approx(np.sqrt((used**2).mean() - 36), abs=0.05)
    half = 2.009575 * used.std(ddof=1) / np.sqrt(50)  # Student's t, 49 degrees of freedom
    assert everything["bias_high"] - everything["bias"] == pytest.approx(half, abs=0.02)
    assert rows["kind", "pine"]["bias"] == pytest.approx(30, abs=0.05) and rows["kind", "oak"]["n"] == 25
    assert rows["kind", "oak"]["rmsd"] == pytest.approx(10, abs=0.05)
    assert rows["size", "smaller than a pixel"]["n"] == 17
    assert sum(row["n"] for (table, _), row in rows.items() if table == "plot") == 50
    assert sum(row["n"] for (table, _), row in rows.items() if table == "map") == 50
    for low, high in ((50, 100), (200, 300)):
        mine = (table["left_out"] == "") & table["agb"].between(low, high, inclusive="left")
        assert rows["plot", f"{low}-{high}"]["n"] == mine.sum() > 0


def test_plots_beside_the_map_or_on_its_edge_are_left_out_and_the_nearest_season_counts(tmp_path):
    values = np.full((50, 60), 80.0)
    values[:, 30:] = -1
    old = write_map(tmp_path / "old_agbd.tif", values, "2010-05-01/2010-10-01")
    new = write_map(tmp_path / "new_agbd.tif", values + 20 * (values > 0), "2019-05-01/2019-10-01")
    x = TRANSFORM.c + 30 * np.array([10.0, 30.0, 45.0, 500.0])
    boxes = [shapely.box(east - 60, TRANSFORM.f - 700, east + 60, TRANSFORM.f - 600) for east in x]
    frame = geopandas.GeoDataFrame({"agb": [70.0] * 4, "year": [2018, 2018, 2018, 2018]}, geometry=boxes, crs=32610)
    frame.to_file(tmp_path / "plots.gpkg")
    plots = read_plots(tmp_path / "plots.gpkg", {})
    for maps in ([old, new], [new, old]):
        table = compare(plots, maps, max_years=2, min_cover=0.9)
        assert list(table["left_out"]) == ["", "not covered enough", "outside of the maps", "outside of the maps"]
        assert table["map"][0] == pytest.approx(100) and table["source"][0] == str(new)
        assert table["cover"][1] == pytest.approx(0.5, abs=1e-3)
        assert table["years"][0] == pytest.approx(2019 + 196.5 / 365.25 - 2018.5, abs=0.01)
    assert compare(plots, [old], max_years=np.inf, min_cover=0.4)["map"][1] == pytest.approx(80)
    with pytest.raises(EvaluationError, match="none of 4 plots .*1 another time, 1 not covered enough, 2 outside"):
        validate(plots, [old], tmp_path / "out", max_years=2)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_page_with_pictures(inventory, tmp_path, capsys):
    path, map_path, off = inventory
    out = tmp_path / "validation"
    assert main(["--plots", str(path), "--maps", str(tmp_path / "*_agbd.tif"), "--out", str(out)]) == 0
    assert "50 of 60 plots: bias +10.0, RMSD 22.4 Mg/ha" in capsys.readouterr().out
    page = (out / "validation.html").read_text()
    assert "50 of 60 plots" in page and "6 another time" in page and "17 of them are smaller than a pixel" in page
    for name in ("plots.png", "error_by_bin.png"):
        assert f"src='{name}'" in page and (out / name).stat().st_size > 10_000
    found = json.loads((out / "validation.json").read_text())
    assert found["left_out"] == {"another time": 6, "without a date of plot or map": 4}
    assert found["line"]["slope"] == pytest.approx(1, abs=0.2)
    assert len(pandas.read_csv(out / "plots.csv")) == 60
    assert list(pandas.read_csv(out / "scores.csv").columns)[:4] == ["table", "group", "n", "bias"]
    assert main(["--plots", str(path), "--maps", str(tmp_path / "none.tif"), "--out", str(out)]) == 1
    assert "none.tif" in capsys.readouterr().err
