"""Footprint tables on disk: opened by geopandas, equal bytes, nothing half-written."""

import json

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest

from biomass_jax.errors import PrepError
from data_prep.gedi.footprints import COLUMNS, read_footprints, read_settings, write_footprints

FIRST = 2**63 + 88520500200000001  # too long for float64 and for a signed integer
SETTINGS = {"filters": {"leaf_off_flag": True}, "counts": [["shots", 5], ["season", 4]]}


def table(lon=(-121.5, -121.123456789, -121.0, -120.9), lat=(37.0, 37.1, 37.2, 36.9)):
    n = len(lon)
    flags = {name: np.arange(n, dtype=np.uint8) + 250 for name, kind in COLUMNS.items() if str(kind) == "uint8"}
    return {
        "shot_number": np.uint64(FIRST) + np.arange(n, dtype=np.uint64),
        "lon": np.array(lon, float),
        "lat": np.array(lat, float),
        "time": np.datetime64("2020-07-01T12:00:00.000001", "us") + np.arange(n).astype("timedelta64[s]"),
        "beam": np.resize(["BEAM0101", "BEAM1011"], n),
        "agbd": np.linspace(0, 1296.5, n).astype(np.float32),
        "agbd_se": np.full(n, np.nan, np.float32),
        "agbd_sigma": np.linspace(1, 40, n).astype(np.float32),
        "sensitivity": np.full(n, 0.97, np.float32),
        "granule": np.full(n, "GEDI04_A_x", object),
        **flags,
    }


def test_every_column_comes_back(tmp_path):
    written = table()
    path = write_footprints(written, tmp_path / "a" / "x.parquet", SETTINGS)
    back = read_footprints(path)
    assert list(back) == list(COLUMNS)
    for name, values in written.items():
        np.testing.assert_array_equal(back[name], values, err_msg=name)
        if values.dtype.kind not in "UO":
            assert back[name].dtype == values.dtype, name
    assert read_settings(path) == SETTINGS
    assert [file.name for file in path.parent.iterdir()] == ["x.parquet"]


def test_geopandas_sees_points_in_4326(tmp_path):
    written = table()
    frame = geopandas.read_parquet(write_footprints(written, tmp_path / "x.parquet", SETTINGS))
    assert frame.crs.to_epsg() == 4326
    assert frame.geometry.name == "geometry"
    np.testing.assert_array_equal(frame.geometry.x, written["lon"])
    np.testing.assert_array_equal(frame.geometry.y, written["lat"])
    assert frame["shot_number"].tolist() == [FIRST + k for k in range(4)]
    assert str(frame["time"].dt.tz) == "UTC"
    assert frame["time"][0].isoformat() == "2020-07-01T12:00:00.000001+00:00"


def test_geo_metadata_are_what_the_format_asks_for(tmp_path):
    def geo(lon, lat):
        path = write_footprints(table(lon, lat), tmp_path / "x.parquet", SETTINGS)
        return json.loads(pq.read_schema(path).metadata[b"geo"])

    found = geo((10.0, 11.0), (-1.0, 2.0))
    assert (found["version"], found["primary_column"]) == ("1.1.0", "geometry")
    column = found["columns"]["geometry"]
    assert (column["encoding"], column["geometry_types"]) == ("WKB", ["Point"])
    assert column["bbox"] == [10.0, -1.0, 11.0, 2.0]
    assert geo((179.5, -179.5, 179.9), (0.0, 1.0, 2.0))["columns"]["geometry"]["bbox"] == [179.5, 0, -179.5, 2]
    assert "bbox" not in geo((), ())["columns"]["geometry"]


def test_equal_input_gives_equal_bytes_and_nothing_tells_the_time(tmp_path):
    one, other = (write_footprints(table(), tmp_path / f"{name}.parquet", SETTINGS) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    metadata = pq.read_metadata(one)
    assert {key for key in metadata.metadata if key != b"ARROW:schema"} == {b"geo", b"biomass_jax"}
    columns = metadata.row_group(0)
    assert {columns.column(k).compression for k in range(columns.num_columns)} == {"ZSTD"}


def test_a_box_gives_the_rows_inside_and_spares_files_that_it_does_not_meet(tmp_path):
    path = write_footprints(table(), tmp_path / "x.parquet", SETTINGS)
    assert read_footprints(path, box=(-121.2, 36, -120.95, 38))["shot_number"].tolist() == [FIRST + 1, FIRST + 2]
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(200) + data[204:])  # columns gone, schema whole
    assert len(read_footprints(path, box=(0, 0, 1, 1))["lon"]) == 0
    with pytest.raises(PrepError, match="x.parquet"):
        read_footprints(path, box=(-122, 36, -120, 38))


def test_a_place_that_takes_no_table_is_left_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(PrepError, match="folder: can't write"):
        write_footprints(table(), tmp_path / "folder", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_that_are_no_footprint_tables_are_named(tmp_path):
    path = write_footprints(table(), tmp_path / "x.parquet", SETTINGS)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PrepError, match="x.parquet: can't be read as a footprint table"):
        read_footprints(path)
    with pytest.raises(PrepError, match="x.parquet: can't be read as Parquet"):
        read_settings(path)
    frame = geopandas.GeoDataFrame({"shot_number": [1.5]}, geometry=geopandas.points_from_xy([0], [0]), crs=4326)
    frame.to_parquet(path)
    with pytest.raises(PrepError, match="column shot_number: found double, expected uint64"):
        read_footprints(path)
    with pytest.raises(PrepError, match="no settings of biomass_jax"):
        read_settings(path)
