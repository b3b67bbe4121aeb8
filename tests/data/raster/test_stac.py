"""STAC items of maps: valid by pystac, true to the map, right on both sides of the antimeridian."""

import hashlib
import json
import logging
import os
import re
import time

import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS as ProjCRS
from pyproj import Transformer
from rasterio.crs import CRS
from shapely.geometry import Point, shape

from biomass_jax.data.raster import stac
from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid
from biomass_jax.errors import RasterError

GRANULE = "HLS.L30.T10SFF.2020183T184512.v2.0"
OTHER = "HLS.S30.T10SFF.2020190T185931.v2.0"
MODEL = "5" * 64
TAGS = {
    "DATA_SOURCES": f"{GRANULE}; {OTHER}",
    "SOURCE_NAMES": "scene.tif",
    "SEASON": "2020-06-01/2020-09-01",
    "SOFTWARE": "biomass_jax 1.2",
    "MODEL_SHA256": MODEL,
}


def grid_at(epsg: int, x: float, y: float, side: int = 40, pixel: float = 30) -> Grid:
    return Grid(side, side + 3, CRS.from_epsg(epsg), Affine(pixel, 0, x, 0, -pixel, y))


GRID = grid_at(32610, 600000, 4100000)


def map_at(path, grid=GRID, **tags):
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 60, (grid.height, grid.width)).astype(np.float32)
    values[0] = -1
    with MapWriter(path, grid, nodata=-1, layers={"agbd": "Mg ha-1"}, tags=TAGS | tags) as writer:
        writer.write_rows(0, values)
    return values


def item_of(path, source="in/scene.tif"):
    stac.write_item(path, str(source))
    return json.loads(stac.item_path(path).read_text())


def test_an_item_tells_what_the_map_is(tmp_path):
    path = tmp_path / "scene.v2.0_agbd.tif"
    values = map_at(path)
    item = item_of(path, tmp_path / "in" / "scene.tif")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["scene.v2.0_agbd.json", "scene.v2.0_agbd.tif"]
    assert item["id"] == "scene.v2.0_agbd"
    assert item["properties"] == {
        "datetime": None,
        "start_datetime": "2020-06-01T00:00:00Z",
        "end_datetime": "2020-08-31T23:59:59Z",  # the season ends before September
        "proj:code": "EPSG:32610",
        "proj:shape": [40, 43],
        "proj:transform": [30, 0, 600000, 0, -30, 4100000],
        "keywords": ["map"],
        "processing:lineage": "map: predicted from scene.tif of 2 HLS granules; SHA-256 of the model's weights: "
        + MODEL,
        "processing:software": {"biomass_jax": "1.2", "model": MODEL},
    }
    asset = item["assets"]["agbd"]
    assert (asset["href"], asset["roles"]) == ("./scene.v2.0_agbd.tif", ["data"])
    assert asset["file:size"] == path.stat().st_size
    assert asset["file:checksum"] == "1220" + hashlib.sha256(path.read_bytes()).hexdigest()
    (band,) = asset["raster:bands"]
    found = band.pop("statistics")
    assert band == {
        "data_type": "float32",
        "nodata": -1,
        "unit": "Mg ha-1",
        "sampling": "area",
        "spatial_resolution": 30,
    }
    valid = values[1:].astype(np.float64)
    assert found == pytest.approx(
        {
            "minimum": valid.min(),
            "maximum": valid.max(),
            "mean": valid.mean(),
            "stddev": valid.std(),
            "valid_percent": 97.5,
        }
    )
    base = "https://cmr.earthdata.nasa.gov/stac/LPCLOUD/collections"
    assert [(link["rel"], link["href"], link.get("title")) for link in item["links"]] == [
        ("derived_from", f"{base}/HLSL30_2.0/items/{GRANULE}", GRANULE),
        ("derived_from", f"{base}/HLSS30_2.0/items/{OTHER}", OTHER),
        ("derived_from", "./in/scene.tif", None),
    ]


@pytest.mark.parametrize("epsg_x", [(32610, 600000), (32660, 790000), (4326, -120), (None, 600000)])
def test_items_are_valid_by_pystac(tmp_path, epsg_x):
    """The core against the schemas that pystac brings; the extensions as pystac reads them (theirs are on the web)."""
    pystac = pytest.importorskip("pystac")
    from pystac.extensions.file import FileExtension
    from pystac.extensions.projection import ProjectionExtension
    from pystac.extensions.raster import RasterExtension
    from pystac.validation import validate_dict

    epsg, x = epsg_x
    if epsg is None:
        crs = CRS.from_proj4("+proj=laea +lat_0=40 +lon_0=-120 +datum=WGS84 +units=m")
        grid = Grid(40, 43, crs, Affine(30, 0, x, 0, -30, 10000))
    else:
        grid = grid_at(epsg, x, 40, pixel=0.0003) if epsg == 4326 else grid_at(epsg, x, 4100000)
    path = tmp_path / "a_agbd.tif"
    map_at(path, grid)
    found = item_of(path)
    assert validate_dict(found, extensions=[])
    item = pystac.Item.from_file(str(stac.item_path(path)))
    asset = item.assets["agbd"]
    projection = ProjectionExtension.ext(item)
    assert (projection.epsg, projection.shape) == (epsg, [40, 43])
    assert projection.transform == list(grid.transform)[:6]
    if epsg is None:
        assert ProjCRS.from_wkt(projection.wkt2) == ProjCRS.from_wkt(grid.crs.to_wkt())
    (band,) = RasterExtension.ext(asset).bands
    assert (band.nodata, band.unit, band.data_type, band.sampling) == (-1, "Mg ha-1", "float32", "area")
    assert band.statistics.valid_percent == 97.5
    assert FileExtension.ext(asset).size == path.stat().st_size
    assert len(item.get_links("derived_from")) == 3
    assert asset.get_absolute_href() == str(path)
    del found["properties"]["datetime"]
    with pytest.raises(pystac.STACValidationError):
        validate_dict(found, extensions=[])


def ring(epsg, grid, points=200):
    """Points along the outline, by pyproj."""
    along = np.linspace(0, 1, points)
    column = np.concatenate([along, 0 * along, along, 0 * along + 1]) * grid.width
    row = np.concatenate([0 * along, along, 0 * along + 1, along]) * grid.height
    t = grid.transform
    turn = Transformer.from_crs(epsg, 4326, always_xy=True)
    return np.array(turn.transform(t.a * column + t.c, t.e * row + t.f)).T


def test_the_geometry_is_the_outline_of_the_grid():
    grid = grid_at(32610, 600000, 4100000, side=3660)
    place = stac.outline(grid)
    polygon = shape(place["geometry"])
    assert polygon.is_valid and polygon.exterior.is_ccw
    assert polygon.bounds == tuple(place["bbox"])
    far = max(polygon.exterior.distance(Point(point)) for point in ring(32610, grid))
    assert far < 30 / 111_000  # a pixel, in degrees


@pytest.mark.parametrize(("epsg", "x"), [(32660, 600000), (32601, 250000)])
def test_a_map_across_the_antimeridian_is_cut_there(epsg, x):
    grid = grid_at(epsg, x, 7_000_000 if epsg == 32660 else 6_000_000, side=3660)
    place = stac.outline(grid)
    west, south, east, north = place["bbox"]
    assert -180 < east < 0 < west < 180 and south < north
    parts = shape(place["geometry"])
    assert place["geometry"]["type"] == "MultiPolygon" and parts.is_valid and len(parts.geoms) == 2
    assert all(part.exterior.is_ccw for part in parts.geoms)
    assert (parts.geoms[0].bounds[2], parts.geoms[1].bounds[0]) == (180, -180)
    assert all(abs(part.bounds[2] - part.bounds[0]) < 5 for part in parts.geoms)
    inside = Transformer.from_crs(epsg, 4326, always_xy=True)
    t = grid.transform
    for column, row in [(100, 100), (3500, 100), (100, 3500), (3500, 3500), (1830, 1830)]:
        assert parts.contains(Point(inside.transform(t.a * column + t.c, t.e * row + t.f)))


def test_longitudes_from_0_to_360_and_rows_from_south_to_north():
    grid = Grid(40, 43, CRS.from_epsg(4326), Affine(0.01, 0, 235, 0, 0.01, 40))
    place = stac.outline(grid)
    assert place["bbox"] == [-125, 40, -124.57, 40.4]
    assert shape(place["geometry"]).exterior.is_ccw


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (Grid(40, 43, None, Affine.identity()), "it has no CRS"),
        (grid_at(3413, -600, 600), "goes around a pole"),
        (grid_at(32610, 1e12, 0), "outside of projection domain|nowhere on Earth"),  # GDAL tells the first ones only
    ],
)
def test_a_map_without_a_place_has_no_item_and_the_log_says_why(tmp_path, caplog, grid, words):
    path = tmp_path / "a_agbd.tif"
    map_at(path, grid)
    with caplog.at_level(logging.WARNING):
        stac.write_item(path, "scene.tif")
    (line,) = [record.getMessage() for record in caplog.records if "STAC" in record.getMessage()]
    assert line.startswith(f"{path}: has no STAC item: ")
    assert re.search(words, line), line
    assert not stac.item_path(path).exists()


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        # one granule, the day of its own: its moment
        (
            {"DATA_SOURCES": f"{GRANULE}.B02.tif; {GRANULE}.B03.tif", "SEASON": "2020-07-01/2020-07-02"},
            {"datetime": "2020-07-01T18:45:12Z"},
        ),
        ({"DATA_SOURCES": GRANULE, "SEASON": "unknown"}, {"datetime": "2020-07-01T18:45:12Z"}),
        (
            {"SEASON": "unknown"},
            {"datetime": None, "start_datetime": "2020-07-01T00:00:00Z", "end_datetime": "2020-07-08T23:59:59Z"},
        ),
        (
            {"DATA_SOURCES": GRANULE},
            {"datetime": None, "start_datetime": "2020-06-01T00:00:00Z", "end_datetime": "2020-08-31T23:59:59Z"},
        ),
        ({"DATA_SOURCES": "scene.tif", "SEASON": "summer"}, None),
    ],
)
def test_the_time_is_that_of_the_season_or_of_the_granules(tmp_path, caplog, tags, expected):
    path = tmp_path / "a_agbd.tif"
    map_at(path, **tags)
    stac.write_item(path, "scene.tif")
    if expected is None:
        assert f"{path}: has no STAC item: nothing tells its date; give the image a tag SEASON" in caplog.text
        assert not stac.item_path(path).exists()
    else:
        properties = json.loads(stac.item_path(path).read_text())["properties"]
        assert {key: value for key, value in properties.items() if "datetime" in key} == expected


def test_sources_that_are_no_granules_are_linked_by_their_place(tmp_path):
    path = tmp_path / "out" / "a_agbd.tif"
    map_at(path, DATA_SOURCES="scene.tif")

    def links(source):
        return [(link["rel"], link["href"]) for link in item_of(path, source)["links"]]

    assert links(tmp_path / "in" / "scene.tif") == [("derived_from", "../in/scene.tif")]
    assert links("https://example.org/scene.tif") == [("derived_from", "https://example.org/scene.tif")]


def test_only_the_item_of_this_map_is_removed(tmp_path):
    path = tmp_path / "a_agbd.tif"
    map_at(path)
    stac.write_item(path, "scene.tif")
    stac.remove_item(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a_agbd.tif"]
    for text in ('{"mine": 1}', "[]", "no JSON", '{"stac_version": "1.1.0", "id": "another"}'):
        stac.item_path(path).write_text(text)
        stac.remove_item(path)
        assert stac.item_path(path).read_text() == text


def test_an_item_is_renewed_where_it_is_not_that_of_the_map_and_its_picture(tmp_path):
    path, source = tmp_path / "a_agbd.tif", tmp_path / "in" / "scene.tif"
    map_at(path)
    first = item_of(path, source)
    place, picture = stac.item_path(path), stac.quicklook_path(path)

    def renewed():
        assert stac.renew_item(path) == ""
        return json.loads(place.read_text())

    before = place.stat().st_mtime_ns
    assert renewed() == first and place.stat().st_mtime_ns == before
    os.utime(path)  # as if copied after its item
    assert renewed() == first and place.stat().st_mtime_ns == before
    picture.write_bytes(b"PNG")
    found = renewed()
    assert found["links"] == first["links"] and found["assets"]["quicklook"]["href"] == "./a_agbd_quicklook.png"
    picture.unlink()
    assert renewed() == first
    older = {name: text for name, text in first["properties"].items() if name not in ("keywords", "processing:lineage")}
    place.write_text(json.dumps(first | {"properties": older}))
    assert renewed() == first
    for damaged in ({"assets": []}, {"links": None}, {"assets": {"agbd": {"href": "./a_agbd.tif"}}}):
        place.write_text(json.dumps({"links": [], "properties": {}, "bbox": []} | first | damaged))
        assert renewed() == first | {"links": first["links"][:2]}  # the granules
    stac.write_item(path, str(source))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # another map of the same size: what that one was made from nothing tells
    path.write_bytes(data)
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)
    found = renewed()
    assert found["assets"]["agbd"]["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
    assert found["links"] == first["links"][:2]


def test_sources_that_have_items_are_linked_by_those(tmp_path):
    maps = [tmp_path / name for name in ("a.tif", "b.tif", "all.tif")]
    for path in maps:
        map_at(path, DATA_SOURCES="scene.tif")
    stac.write_item(maps[0], "scene.tif")
    stac.write_item(maps[2], *map(str, maps[:2]))

    def links():
        return [link["href"] for link in json.loads(stac.item_path(maps[2]).read_text())["links"]]

    assert links() == ["./a.json", "./b.tif"]
    stac.write_item(maps[1], "scene.tif")
    stac.join_collection(maps[2], tmp_path / "deep" / "collection.json", "biomass")
    assert links() == ["./deep/collection.json"] * 3 + ["./a.json", "./b.json"]
    stac.renew_item(maps[2])
    assert links()[3:] == ["./a.json", "./b.json"]


def test_another_file_of_the_items_name_stays(tmp_path, caplog):
    path = tmp_path / "a_agbd.tif"
    map_at(path)
    stac.item_path(path).write_text('{"mine": 1}')
    assert stac.write_item(path, "scene.tif") == stac.renew_item(path)
    assert f"{path}: has no STAC item: {stac.item_path(path)} lies there and is another file; move that" in caplog.text
    assert stac.item_path(path).read_text() == '{"mine": 1}'


def test_a_map_of_an_older_version_with_estimates_of_qgis_has_an_item_without_statistics(tmp_path):
    path = tmp_path / "a_agbd.tif"
    map_at(path)
    with rasterio.open(path) as file:
        values, profile = file.read(), file.profile
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)
        file.update_tags(**TAGS)
        file.update_tags(1, STATISTICS_APPROXIMATE="YES", STATISTICS_MEAN="70", STATISTICS_MAXIMUM="400")
    (band,) = item_of(path)["assets"]["data"]["raster:bands"]
    assert "statistics" not in band and band["data_type"] == "float32"


def test_a_no_data_value_that_is_no_number_is_told_as_a_text(tmp_path):
    path = tmp_path / "theirs.tif"
    form = {"crs": GRID.crs, "transform": GRID.transform, "dtype": "float32", "nodata": np.nan, "count": 1}
    with rasterio.open(path, "w", driver="GTiff", height=40, width=43, **form) as file:
        file.write(np.ones((1, 40, 43), np.float32))
        file.update_tags(**TAGS)
    (band,) = item_of(path)["assets"]["data"]["raster:bands"]
    assert band["nodata"] == "nan"


def test_a_map_that_is_cut_short_has_no_item(tmp_path):
    path = tmp_path / "a_agbd.tif"
    path.write_bytes(b"II*\0")
    with pytest.raises(RasterError, match="a_agbd"):
        stac.write_item(path, "scene.tif")
