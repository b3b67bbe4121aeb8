import geopandas
import numpy as np
import pandas
import pytest
import shapely

from biomass_jax.errors import EvaluationError
from biomass_jax.evaluation.inventory import read_plots

ROWS = {
    "plot_id": ["a", "b", "c"],
    "AGB": [100.0, 0.0, np.nan],
    "agb_se": [10.0, 5.0, np.nan],
    "area_ha": [1.0, 0.04, 4.0],
    "date": ["2019-07-02", "2020-01-01", None],
    "Forest_Type": ["pine", "oak", None],
    "lon": [-121.5, -121.4, -121.3],
    "lat": [36.5, 36.4, 36.3],
}


def points():
    return geopandas.points_from_xy(ROWS["lon"], ROWS["lat"], crs=4326)


def written(folder, kind):
    frame = pandas.DataFrame(ROWS)
    if kind == "csv":
        frame.to_csv(folder / "plots.csv", index=False)
        return folder / "plots.csv"
    if kind == "parquet":
        frame.to_parquet(folder / "plots.parquet")
        return folder / "plots.parquet"
    placed = geopandas.GeoDataFrame(frame.drop(columns=["lon", "lat"]), geometry=points()).to_crs(32610)
    if kind == "geoparquet":
        placed.to_parquet(folder / "placed.parquet")
        return folder / "placed.parquet"
    placed.to_file(folder / "plots.gpkg")
    return folder / "plots.gpkg"


@pytest.mark.parametrize("kind", ["csv", "parquet", "geoparquet", "gpkg"])
def test_each_kind_of_file_gives_the_same_plots(tmp_path, kind):
    found = read_plots(written(tmp_path, kind), {})
    assert list(found["id"]) == ["a", "b", "c"] and list(found["kind"]) == ["pine", "oak", ""]
    np.testing.assert_array_equal(found["agb"], ROWS["AGB"])
    np.testing.assert_array_equal(found["error"], ROWS["agb_se"])
    np.testing.assert_allclose(found["year"], [2019 + 182.5 / 365.25, 2020 + 0.5 / 365.25, np.nan])
    assert found.crs.to_epsg() == 4326
    # On the ground of their zone circles are round, and as large as they are said to be.
    ground = found.to_crs(32610).geometry
    scale = ground.area / (np.array(ROWS["area_ha"]) * 1e4)
    np.testing.assert_allclose(scale, 1, atol=1e-3)  # UTM's own scale at that place
    centres = geopandas.GeoSeries(points()).to_crs(32610)
    reach = [shapely.get_coordinates(one) - shapely.get_coordinates(c) for one, c in zip(ground, centres, strict=True)]
    for area, corners in zip(ROWS["area_ha"], reach, strict=True):
        np.testing.assert_allclose(np.hypot(*corners.T), np.sqrt(area * 1e4 / np.pi), rtol=3e-3)


def test_polygons_keep_their_outlines_and_tell_their_area(tmp_path):
    square = shapely.box(600000, 4000000, 600100, 4000200)
    frame = geopandas.GeoDataFrame({"agb": [50], "year": [2018], "area_ha": [7]}, geometry=[square], crs=32610)
    frame.to_file(tmp_path / "plots.gpkg")
    found = read_plots(tmp_path / "plots.gpkg", {})
    assert found["area_ha"][0] == pytest.approx(2, rel=2e-3)
    assert found["year"][0] == 2018.5 and np.isnan(found["error"][0])
    np.testing.assert_allclose(found.to_crs(32610).geometry[0].bounds, square.bounds, atol=1e-3)


def test_columns_of_other_names_and_one_area_for_all(tmp_path):
    frame = pandas.DataFrame({"B": [10.0], "lon": [359.5], "lat": [1.0]})
    frame.to_csv(tmp_path / "plots.csv", index=False)
    found = read_plots(tmp_path / "plots.csv", {"agb": "B"}, area_ha=0.25)
    assert found["agb"][0] == 10 and found["id"][0] == "1"
    assert found["area_ha"][0] == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"AGB": None}, "no column of biomass; found plot_id, .*--agb COLUMN"),
        ({"AGB": [1, -2, 3]}, "below 0"),
        ({"AGB": ["a", "b", "c"]}, "column AGB holds something else than numbers"),
        ({"lon": None}, "no places; found columns .*expected lon and lat"),
        ({"lon": [600000.0, 0, 0]}, "expected degrees"),
        ({"area_ha": None}, "3 plots are points without an area"),
        ({"area_ha": [1, 0, 1]}, "areas of 0 or less"),
        ({"date": ["x", "y", "z"]}, "column date can't be read as dates"),
        ({"date": [20190702, 20190702, 20190702]}, "numbers that are no years"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, change, says):
    frame = pandas.DataFrame({name: change.get(name, values) for name, values in ROWS.items()})
    frame = frame.drop(columns=[name for name, values in change.items() if values is None])
    frame.to_csv(tmp_path / "plots.csv", index=False)
    with pytest.raises(EvaluationError, match=f"plots.csv: .*{says}"):
        read_plots(tmp_path / "plots.csv", {})


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "plots.gpkg").write_text("<html>")
    for path in (tmp_path / "plots.gpkg", tmp_path / "nowhere.csv"):
        with pytest.raises(EvaluationError, match=path.name):
            read_plots(path, {})
    with pytest.raises(EvaluationError, match="no column 'C'; found A"):
        pandas.DataFrame({"A": [1]}).to_csv(tmp_path / "a.csv", index=False)
        read_plots(tmp_path / "a.csv", {"agb": "C"})
