"""The command `zones` on maps of canopy height: means and their intervals, by hand, and never a total."""

import geopandas
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import rasterio
from scipy import stats

from biomass_jax.errors import RasterError, RegionalError
from biomass_jax.regional.zones import main, zones
from tests.regional.test_zones import CRS, SHAPE, TRANSFORM, box, shares, write_shots

COLUMNS = ["area_ha", "covered_ha", "covered_share", "n_pixels", "n_shots", "n_tracks"]
COLUMNS += ["mean", "mean_se", "mean_lo", "mean_hi", "method", "note"]


def write_heights(path, values, name="rh98", unit="m", more=()):
    profile = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "dtype": "float32", "nodata": -1}
    with rasterio.open(path, "w", crs=CRS, transform=TRANSFORM, count=1 + len(more), **profile) as file:
        for band, (layer, called) in enumerate([(values, name), *more], 1):
            file.write(layer.astype(np.float32), band)
            file.set_band_description(band, called)
            file.set_band_unit(band, unit)
    return path


@pytest.fixture
def land(tmp_path):
    row, column = np.mgrid[: SHAPE[0], : SHAPE[1]]
    heights = 5 + 0.05 * column + 0.1 * row
    heights[150:, :60] = -1
    write_heights(tmp_path / "map_rh98.tif", heights)
    outlines = [box(10, 10, 110, 90), box(20, 140, 99.5, 190)]
    frame = geopandas.GeoDataFrame({"name": ["north", "south"]}, geometry=outlines, crs=CRS)
    frame.to_crs(4326).to_file(tmp_path / "districts.gpkg", layer="districts")
    return tmp_path, heights, outlines


def run(folder, *words, out="table.csv"):
    given = ["--maps", str(folder / "map_rh98.tif"), "--zones", str(folder / "districts.gpkg")]
    assert main([*given, "--out", str(folder / out), *map(str, words)]) == 0
    return folder / out


def test_zones_of_heights_have_means_and_no_totals(land):
    folder, heights, outlines = land
    table = pandas.read_csv(run(folder))
    assert list(table.columns) == ["name", *COLUMNS]
    for row, outline in enumerate(outlines):
        share = shares(outline) * (heights >= 0)
        assert table["mean"][row] == pytest.approx((share * heights).sum() / share.sum(), rel=1e-5)
    assert table["mean_lo"].isna().all() and (table["method"] == "none").all()
    page = (run(folder, out="table.gpkg").with_suffix(".html")).read_text()
    assert "Canopy height" not in page and "<h1>Relative height, 98 % of the energy below by zone" in page
    assert "mean, m" in page and "95% interval, m" in page and "There are no totals" in page
    assert "Mg" not in page.split("<h2>")[0]


def test_footprints_of_heights_give_the_mean_its_interval(land):
    """Model-assisted by six tracks whose offsets are known: mean and interval recomputed from the formula."""
    folder, heights, _ = land
    sizes = (9, 20, 12, 7, 15, 11)
    columns = np.repeat([15, 30, 50, 70, 90, 105], sizes)
    rows = np.concatenate([15 + 3 * np.arange(n) for n in sizes])
    offset = np.repeat([1.0, -0.5, 2.0, 0.5, 0.0, 1.5], sizes)
    value = heights[rows, columns] + offset
    orbit = np.repeat(np.arange(100, 106), sizes)
    path = write_shots(folder / "shots.parquet", columns + 0.5, rows + 0.5, value, orbit, 5)
    table = pq.read_table(path)
    names = ["rh98" if name == "agbd" else name for name in table.column_names if name not in ("agbd_se", "agbd_sigma")]
    kept = table.drop_columns(["agbd_se", "agbd_sigma"]).rename_columns(names)
    pq.write_table(kept.replace_schema_metadata(table.schema.metadata), path)
    plain, found = pandas.read_csv(run(folder)), pandas.read_csv(run(folder, "--footprints", path))
    assert found["method"][0] == "model_assisted" and found["n_tracks"][0] == 6
    assert found["mean"][0] == pytest.approx(plain["mean"][0] + offset.mean(), abs=2e-4)
    half = stats.t.ppf(0.975, 5) * found["mean_se"][0]
    assert half > 0 and found["mean_hi"][0] == pytest.approx(found["mean"][0] + half, rel=1e-6)
    assert found["mean_lo"][0] == pytest.approx(found["mean"][0] - half, rel=1e-6)


@pytest.mark.parametrize("settings", [{"scale_to_zone": True}, {"carbon_fraction": 0.47}])
def test_what_is_of_totals_is_refused(land, settings):
    folder, *_ = land
    with pytest.raises(RegionalError, match="are of totals, and rh98 has none: metres of height don't add up"):
        zones([folder / "map_rh98.tif"], folder / "districts.gpkg", **settings)


def test_maps_of_another_label_or_unit_and_changes_of_heights_are_refused(land):
    folder, heights, _ = land
    places = folder / "districts.gpkg"
    other = write_heights(folder / "b_canopy_height.tif", heights, "canopy_height")
    with pytest.raises(RasterError, match=r"map_rh98.tif is of rh98, .*b_canopy_height.tif of canopy_height"):
        zones([folder / "map_rh98.tif", other], places)
    wrong = write_heights(folder / "c_rh98.tif", heights, unit="cm")
    with pytest.raises(RasterError, match="band 1 is in 'cm'; expected m, a map of rh98"):
        zones([wrong], places)
    change = [(heights, "rh98_change_sd"), (heights, "significant")]
    with pytest.raises(RasterError, match="a change of rh98 in m, of which zones have no losses and gains as amounts"):
        zones([write_heights(folder / "d.tif", heights, "rh98_change", more=change)], places)
