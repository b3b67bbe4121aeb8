"""Zones and footprints from files, and tables into them."""

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from pyproj import Geod

from biomass_jax.data.vectors import (
    add_columns,
    ground_area,
    outlines,
    read_footprints,
    read_table,
    read_zones,
    write_table,
)
from biomass_jax.errors import RegionalError

EVERYWHERE = [(-180.0, -90.0, 180.0, 90.0)]


def store(path, *geometries, crs=4326, **fields):
    geopandas.GeoDataFrame(fields, geometry=list(geometries), crs=crs).to_file(path)
    return path


def test_zones_that_are_no_polygons_are_named(tmp_path):
    good = shapely.box(10, 50, 11, 51)
    cases = {
        "row 2 has a Point; expected a polygon": store(tmp_path / "a.gpkg", good, shapely.Point(1, 1)),
        "row 2 has no outline": store(tmp_path / "b.gpkg", good, None),
        r"row 1: its outline crosses itself \(Self-intersection": store(
            tmp_path / "c.gpkg", shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
        ),
        "its zones have no CRS": tmp_path / "d.parquet",
    }
    geopandas.GeoDataFrame(geometry=[good]).to_parquet(tmp_path / "d.parquet")
    for message, path in cases.items():
        with pytest.raises(RegionalError, match=message):
            read_zones(path)
    with pytest.raises(RegionalError, match="no such file"):
        read_zones(tmp_path / "none.gpkg")
    (tmp_path / "table.csv").write_text("name,x\na,1\n")
    with pytest.raises(RegionalError, match="1 rows without outlines"):
        read_zones(tmp_path / "table.csv")


def test_a_file_of_several_layers_wants_one_named(tmp_path):
    path = tmp_path / "a.gpkg"
    for layer, width in (("one", 1), ("two", 2)):
        frame = geopandas.GeoDataFrame({"n": [width]}, geometry=[shapely.box(0, 0, width, 1)], crs=4326)
        frame.to_file(path, layer=layer)
    with pytest.raises(RegionalError, match="found layers one, two; expected one, or --layer NAME"):
        read_zones(path)
    assert read_zones(path, "two")["n"].tolist() == [2]


def test_edges_are_straight_in_the_zones_own_crs():
    box = shapely.box(300_000, 6_600_000, 500_000, 6_800_000)
    (found,) = outlines(geopandas.GeoDataFrame(geometry=[box], crs=32633), "zones")
    corners = shapely.get_coordinates(geopandas.GeoSeries([found], crs=4326).to_crs(32633).iloc[0])
    off = np.minimum.reduce(
        [np.abs(corners[:, axis] - edge) for axis, edge in ((0, 3e5), (0, 5e5), (1, 6.6e6), (1, 6.8e6))]
    )
    assert len(corners) > 1600 and off.max() < 1e-3
    ring = outlines(geopandas.GeoDataFrame(geometry=[shapely.box(10, 60, 12, 61)], crs=4326), "zones")[0]
    lon, lat = (low + (high - low) * np.linspace(0, 1, 2001) for low, high in ((10, 12), (60, 61)))
    around = np.concatenate([lon, 12 + 0 * lat, lon[::-1], 10 + 0 * lat])
    up = np.concatenate([60 + 0 * lon, lat, 61 + 0 * lon, lat[::-1]])
    assert ground_area(ring) == pytest.approx(abs(Geod(ellps="WGS84").polygon_area_perimeter(around, up)[0]) / 1e4)


def test_holes_and_parts_count_whichever_way_they_turn():
    hole = shapely.box(10.4, 50.4, 10.6, 50.6)
    ring = list(hole.exterior.coords)
    whole = ground_area(outlines(geopandas.GeoDataFrame(geometry=[shapely.box(10, 50, 11, 51)], crs=4326), "")[0])
    out = ground_area(outlines(geopandas.GeoDataFrame(geometry=[hole], crs=4326), "")[0])
    for turned in (ring, ring[::-1]):
        polygon = shapely.Polygon(shapely.box(10, 50, 11, 51).exterior.coords[::-1], [turned])
        parts = shapely.MultiPolygon([polygon, hole])
        (found,) = outlines(geopandas.GeoDataFrame(geometry=[parts], crs=4326), "")
        assert ground_area(found) == pytest.approx(whole)
        assert ground_area(outlines(geopandas.GeoDataFrame(geometry=[polygon], crs=4326), "")[0]) == pytest.approx(
            whole - out
        )


def test_outlines_across_the_antimeridian_are_whole():
    box = shapely.box(700_000, 8_000_000, 900_000, 8_100_000)  # UTM zone 60 south, beyond its edge
    (found,) = outlines(geopandas.GeoDataFrame(geometry=[box], crs=32760), "zones")
    assert found.bounds[0] < 180 < found.bounds[2] < 181
    for bad in (shapely.box(-170, 10, 170, 20), shapely.box(-1e6, -1e6, 1e6, 1e6)):
        crs = 4326 if bad.bounds[2] < 200 else 3413  # around the pole
        with pytest.raises(RegionalError, match="zones: row 1 goes around a pole or is more than 180 degrees"):
            outlines(geopandas.GeoDataFrame(geometry=[bad], crs=crs), "zones")


def footprints(path, numbers, lon, lat, agbd, **more):
    columns = {"shot_number": np.asarray(numbers, np.uint64), "lon": lon, "lat": lat, "agbd": np.float32(agbd)}
    pq.write_table(pa.table(columns | more), path)
    return path


def test_footprints_count_once_and_tell_their_orbit_and_beam(tmp_path):
    numbers = [65150500200000001, 65150600200000007, 123450100300000009]
    at = ([10.0, 10.1, 179.99], [50.0, 50.1, -3.0])
    footprints(tmp_path / "a.parquet", numbers, *at, [10, np.nan, 30], agbd_sigma=np.float32([1, 2, 3]))
    footprints(tmp_path / "b.parquet", numbers[2:], at[0][2:], at[1][2:], [30])
    found = read_footprints([tmp_path], EVERYWHERE)
    assert found.track.tolist() == [651505, 1234501] and found.orbit.tolist() == [6515, 12345]
    np.testing.assert_array_equal(found.sigma, [1, 3])
    assert found.number.tolist() == [numbers[0], numbers[2]] and found.lon.tolist() == [10.0, 179.99]
    for box, orbits in (((179.5, -4, 180.5, -2), [12345]), ((9, 49, 10.5, 51), [6515]), ((20, 0, 21, 1), [])):
        assert read_footprints([tmp_path / "a.parquet"], [box]).orbit.tolist() == orbits


def test_tables_that_are_no_footprints_are_refused(tmp_path):
    with pytest.raises(RegionalError, match=r"no \*.parquet in it"):
        read_footprints([tmp_path], EVERYWHERE)
    pq.write_table(pa.table({"lon": [1.0], "lat": [1.0], "agbd": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(RegionalError, match=r"found columns lon, lat, agbd, expected shot_number \(uint64\)"):
        read_footprints([tmp_path / "a.parquet"], EVERYWHERE)
    pq.write_table(pa.table({"shot_number": [1.0], "lon": [1.0], "lat": [1.0], "agbd": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(RegionalError, match="shot_number is double; expected uint64"):
        read_footprints([tmp_path / "b.parquet"], EVERYWHERE)
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    with pytest.raises(RegionalError, match="c.parquet: can't be read as a table of footprints"):
        read_footprints([tmp_path / "c.parquet"], EVERYWHERE)
    footprints(tmp_path / "d.parquet", [1, 2], [1.0, 400.0], [3.0, 4.0], [5, 6])
    with pytest.raises(RegionalError, match="d.parquet: row 2: lon or lat"):
        read_footprints([tmp_path / "d.parquet"], EVERYWHERE)
    footprints(tmp_path / "e.parquet", [65150500200000001, 2], [1.0, 2.0], [3.0, 4.0], [5, 6])
    with pytest.raises(RegionalError, match="e.parquet: shot_number 2 is none of GEDI's; expected orbit, beam"):
        read_footprints([tmp_path / "e.parquet"], EVERYWHERE)


def test_a_column_of_a_zone_that_has_a_new_ones_name_is_renamed(tmp_path):
    frame = geopandas.GeoDataFrame({"Total": [1], "name": ["a"]}, geometry=[shapely.box(0, 0, 1, 1)], crs=4326)
    found = add_columns(frame, {"total": [5.0], "note": [""]})
    assert list(found.columns) == ["zone_Total", "name", "total", "note", "geometry"]
    with pytest.raises(RegionalError, match="column of outlines is called geometry"):
        add_columns(frame, {"geometry": [1]})
    write_table(found, tmp_path / "a.gpkg", "zones")
    assert read_table(tmp_path / "a.gpkg", "zones", RegionalError)["total"].tolist() == [5.0]
    with pytest.raises(RegionalError, match="can't be written"):
        write_table(found, tmp_path / "none" / "a.csv", "zones")
