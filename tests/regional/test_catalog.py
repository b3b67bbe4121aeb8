"""Collections of maps: valid by pystac, opened by GDAL, odc-stac and stackstac, whole wherever the folder lies."""

import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
from matplotlib.image import imsave

from biomass_jax.data.raster import stac
from biomass_jax.errors import RegionalError
from biomass_jax.regional.catalog import Catalog, Listed, catalog, main, united
from biomass_jax.regional.change import change
from biomass_jax.regional.mosaic import mosaic
from tests.regional.maps import TAGS, read, write_map

pystac = pytest.importorskip("pystac")
GRANULES = {year: f"HLS.L30.T33VWG.{year}183T184512.v2.0" for year in (2019, 2021)}
MODEL = TAGS["MODEL_SHA256"]


def write_year(path, year, **tags):
    """A map of that year; those of all years have the same biomass, and errors of their own."""
    biomass = np.random.default_rng(0).gamma(2, 60, (60, 80))
    values = biomass + np.random.default_rng(year).normal(0, 8, biomass.shape)
    told = {"SEASON": f"{year}-05-01/{year}-10-01", "SENSORS": "L30", "SOFTWARE": "biomass_jax 1.2"}
    told |= {"DATA_SOURCES": GRANULES[year], "SOURCE_NAMES": f"{year}.tif"}
    return write_map(path, {"agbd": np.abs(values), "agbd_sd": np.full(biomass.shape, 8.0)}, tags=told | tags)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a composite, two maps of it, one with an item as `predict` writes it, their mosaic and change."""
    folder = tmp_path_factory.mktemp("made") / "region"
    (folder / "maps").mkdir(parents=True)
    (folder / "2019.tif").write_bytes(b"a composite")
    maps = [write_year(folder / "maps" / f"{year}_agbd.tif", year) for year in GRANULES]
    imsave(folder / "maps" / "2019_agbd_quicklook.png", np.zeros((9, 9, 3)))
    stac.write_item(maps[0], str(folder / "2019.tif"))
    mosaic(maps, folder / "mosaic.tif", crs="same")
    change(*maps, folder / "change.tif")
    listed = catalog(sorted(folder.glob("**/*_agbd.tif")) + [folder / "mosaic.tif", folder / "change.tif"], folder)
    assert listed.left_out == {}
    return folder


def rasters(folder):
    return [*sorted((folder / "maps").glob("*.tif")), folder / "mosaic.tif", folder / "change.tif"]


def test_the_collection_and_its_items_are_valid_and_tell_the_kinds_apart(made):
    from pystac.validation import validate_dict

    found = json.loads((made / "collection.json").read_text())
    assert validate_dict(found, extensions=[])
    assert [link["href"] for link in found["links"]] == [
        "./collection.json",
        "./maps/2019_agbd.json",
        "./maps/2021_agbd.json",
        "./mosaic.json",
        "./change.json",
    ]
    collection = pystac.Collection.from_file(str(made / "collection.json"))
    items = {item.id: item for item in collection.get_items()}
    kinds = {name: item.properties["keywords"] for name, item in items.items()}
    assert kinds == {"2019_agbd": ["map"], "2021_agbd": ["map"], "mosaic": ["mosaic"], "change": ["change"]}
    for path in rasters(made):
        item = json.loads(stac.item_path(path).read_text())
        assert validate_dict(item, extensions=[])
        assert items[item["id"]].get_collection().id == item["collection"] == collection.id == "above-ground-biomass"
        assert items[item["id"]].get_root().id == items[item["id"]].get_parent().id == collection.id
        (data,) = [one for one in item["assets"].values() if one["roles"] == ["data"]]
        assert data["file:checksum"] == "1220" + hashlib.sha256(path.read_bytes()).hexdigest()
        with rasterio.open(path) as file:
            told = [(band["name"], band["unit"], band["data_type"], band["nodata"]) for band in data["raster:bands"]]
            bands = zip(file.descriptions, file.units, file.dtypes, file.nodatavals, strict=True)
            assert told == list(bands)
    assert found["keywords"] == found["summaries"]["keywords"] == ["change", "map", "mosaic"]
    assert found["summaries"]["proj:code"] == ["EPSG:32633"]
    assert {one["model"] for one in found["summaries"]["processing:software"]} == {MODEL}
    assert set(found["item_assets"]) == {"agbd", "agbd_change", "quicklook"}
    assert [band["name"] for band in found["item_assets"]["agbd"]["raster:bands"]] == ["agbd", "agbd_sd"]
    assert all("statistics" not in band for band in found["item_assets"]["agbd_change"]["raster:bands"])
    prefixes = {url.split("/")[3] for url in found["stac_extensions"]}
    assert prefixes == {"projection", "raster", "processing"}
    assert found["extent"]["temporal"]["interval"] == [["2019-05-01T00:00:00Z", "2021-09-30T23:59:59Z"]]
    west, south, east, north = found["extent"]["spatial"]["bbox"][0]
    boxes = np.array([item.bbox for item in items.values()])
    assert (west, south) == tuple(boxes[:, :2].min(0)) and (east, north) == tuple(boxes[:, 2:].max(0))


def test_the_way_from_a_figure_to_the_granules(made):
    """As pystac follows it: change or mosaic -> maps -> composite and granules, with the model and each file's hash."""
    collection = pystac.Collection.from_file(str(made / "collection.json"))
    items = {item.id: item for item in collection.get_items()}
    for name in ("mosaic", "change"):
        links = items[name].get_links("derived_from")
        assert [link.resolve_stac_object().target.id for link in links] == ["2019_agbd", "2021_agbd"]
    first, second = items["2019_agbd"], items["2021_agbd"]
    granule, composite = first.get_links("derived_from")
    assert granule.href.endswith(f"/HLSL30_2.0/items/{GRANULES[2019]}") and granule.title == GRANULES[2019]
    assert Path(composite.absolute_href) == made / "2019.tif"
    assert [link.title for link in second.get_links("derived_from")] == [GRANULES[2021]]
    lineage = "map: predicted from 2021.tif of 1 HLS granule; SHA-256 of the model's weights: "
    assert second.properties["processing:lineage"] == lineage + MODEL
    for item in items.values():
        assert item.properties["processing:software"]["model"] == MODEL
    picture = first.assets["quicklook"]
    assert Path(picture.get_absolute_href()) == made / "maps" / "2019_agbd_quicklook.png"
    assert picture.media_type == "image/png" and set(picture.roles) == {"thumbnail", "overview"}
    assert "quicklook" not in second.assets


def hrefs(path):
    """Every href of a STAC file as what it leads to."""
    found = json.loads(path.read_text())
    every = [link["href"] for link in found["links"]] + [one["href"] for one in found.get("assets", {}).values()]
    return [os.path.normpath(path.parent / href) for href in every if "://" not in href]


def test_a_folder_that_is_moved_leads_to_its_own_files_and_gives_equal_bytes_again(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "elsewhere"))
    files = [path for path in folder.rglob("*.json") if path.name != "collection.json"] + [folder / "collection.json"]
    assert len(files) == 5
    before = {path: path.read_bytes() for path in files}
    every = [href for path in files for href in hrefs(path)]
    assert len(every) == 27 and all(Path(href).is_file() and Path(href).is_relative_to(folder) for href in every)
    for maps in (rasters(folder), rasters(folder)[::-1]):
        assert catalog(maps, folder).left_out == {}
        assert {path: path.read_bytes() for path in files} == before


def test_gdal_opens_what_the_items_lead_to(made, monkeypatch):
    """By the asset, as QGIS does, and by GDAL's own driver for items, which takes hrefs from the working folder."""
    for item in pystac.Collection.from_file(str(made / "collection.json")).get_items():
        (asset,) = [one for one in item.assets.values() if one.roles == ["data"]]
        assert asset.media_type == "image/tiff; application=geotiff; profile=cloud-optimized"  # what QGIS goes by
        with rasterio.open(asset.get_absolute_href()) as file:
            assert (file.crs.to_string(), list(file.shape)) == (
                item.properties["proj:code"],
                item.properties["proj:shape"],
            )
            assert list(file.transform)[:6] == item.properties["proj:transform"]
    monkeypatch.chdir(made)
    with rasterio.open('STACIT:"change.json":asset=agbd_change') as file:
        assert file.crs.to_epsg() == 32633 and file.count == 3
        np.testing.assert_array_equal(file.read(1), read(made / "change.tif")[0]["agbd_change"])


@pytest.mark.filterwarnings("ignore")  # of affine and others, about how it calls them
def test_odc_stac_loads_the_bands(made):
    odc = pytest.importorskip("odc.stac")
    geobox = pytest.importorskip("odc.geo.geobox")
    items = list(pystac.Collection.from_file(str(made / "collection.json")).get_items())
    with rasterio.open(rasters(made)[0]) as file:
        grid = geobox.GeoBox(file.shape, file.transform, file.crs)
    found = odc.load(items, bands=["agbd"], geobox=grid)  # mosaic and change among them
    assert found.agbd.dtype == np.float32 and found.agbd.nodata == -1
    for number, year in enumerate(GRANULES):
        ours = read(made / "maps" / f"{year}_agbd.tif")[0]
        found = odc.load([items[number]], bands=["agbd", "agbd.2"], geobox=grid)
        assert found.time.dt.year.item() == year
        for band, name in (("agbd", "agbd"), ("agbd.2", "agbd_sd")):
            np.testing.assert_array_equal(found[band][0], ours[name])


@pytest.mark.filterwarnings("ignore")  # as above
def test_stackstac_stacks_maps_of_one_band(tmp_path):
    stackstac = pytest.importorskip("stackstac")
    values = np.random.default_rng(0).gamma(2, 60, (60, 80)).astype(np.float32)
    write_map(tmp_path / "a_agbd.tif", {"agbd": values})
    catalog([tmp_path / "a_agbd.tif"], tmp_path)
    (item,) = pystac.Collection.from_file(str(tmp_path / "collection.json")).get_items()
    item.make_asset_hrefs_absolute()
    found = stackstac.stack([item], epsg=32633, snap_bounds=False)
    assert list(found.band.values) == ["agbd"]
    np.testing.assert_array_equal(found[0, 0], values)


def test_fields_that_those_programs_ask_for(made):
    """What odc-stac and stackstac read of an item: the grid of each asset, and type and no-data value of its bands."""
    for path in rasters(made):
        item = json.loads(stac.item_path(path).read_text())
        about = item["properties"]
        assert about["proj:code"] == "EPSG:32633" and len(about["proj:transform"]) == 6
        with rasterio.open(path) as file:
            assert about["proj:shape"] == list(file.shape)
        (data,) = [one for one in item["assets"].values() if one["roles"] == ["data"]]
        assert all(band["data_type"] == "float32" and band["nodata"] in (-1, -9999) for band in data["raster:bands"])
        pictures = [one for one in item["assets"].values() if one is not data]
        assert all({"thumbnail", "overview"} & {*one["roles"]} for one in pictures)  # these two are passed over


# Maps without an item, and settings -----------------------------------------------------------------------------------


def test_maps_that_can_have_no_item_are_named_and_the_others_go_on(tmp_path, capsys, caplog):
    good = write_year(tmp_path / "good.tif", 2019)
    write_year(tmp_path / "undated.tif", 2019, SEASON="unknown", DATA_SOURCES="scene.tif")
    (tmp_path / "cut.tif").write_bytes(good.read_bytes()[:9])
    (tmp_path / "deeper").mkdir()
    write_year(tmp_path / "deeper" / "good.tif", 2021)
    write_year(tmp_path / "mine.tif", 2019)
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    write_year(tmp_path / "collection.tif", 2019)
    words = ["--maps", str(tmp_path / "*.tif"), str(tmp_path / "deeper" / "good.tif"), "--out", str(tmp_path)]
    assert main([*words, "--title", "Hills, 2019", "--license", "CC-BY-4.0", "--provider", "Ministry"]) == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'collection.json'}: 1 item\n" and "error: 5 of the maps have no item" in err
    said = [record.getMessage() for record in caplog.records]
    for name, why in (
        ("collection.tif", "its item would be collection.json, the collection's own file; rename it"),
        ("cut.tif", "cut.tif"),
        ("good.tif", f"{tmp_path / 'deeper' / 'good.tif'} has the same name, and with it the same id"),
        ("mine.tif", f"{tmp_path / 'mine.json'} lies there and is another file"),
        ("undated.tif", "nothing tells its date"),
    ):
        (line,) = [line for line in said if line.startswith(f"{tmp_path / name}: has no STAC item: ")]
        assert why in line
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'
    found = json.loads((tmp_path / "collection.json").read_text())
    assert (found["id"], found["title"], found["license"]) == ("hills-2019", "Hills, 2019", "CC-BY-4.0")
    assert [one["name"] for one in found["providers"]] == ["Ministry", "NASA LP DAAC"]
    (link,) = [link for link in found["links"] if link["rel"] == "item"]
    assert link["href"] == "./deeper/good.json"


def test_no_map_makes_no_collection(tmp_path):
    write_year(tmp_path / "a.tif", 2019, SEASON="unknown", DATA_SOURCES="scene.tif")
    with pytest.raises(RegionalError, match=r"of 1 maps none can have an item: .*a\.tif: nothing tells its date"):
        catalog([tmp_path / "a.tif"], tmp_path / "out")
    with pytest.raises(RegionalError, match="of 0 maps none can have an item: give some"):
        catalog([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_title_of_its_own_moves_the_items_to_the_collection_of_that_name(tmp_path):
    (tmp_path / "maps").mkdir()
    path = write_year(tmp_path / "maps" / "a.tif", 2019)
    catalog([path], tmp_path / "one")
    catalog([path], tmp_path / "two", title="Second")
    item = json.loads(stac.item_path(path).read_text())
    up = [link["href"] for link in item["links"] if link["rel"] in ("root", "parent", "collection")]
    assert item["collection"] == "second" and up == ["../two/collection.json"] * 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"license": "all mine"}, "license is 'all mine'; expected an identifier of SPDX"),
        ({"title": "!"}, r"title is '!'; expected some words \(--title\)"),
        ({"description": ""}, "description is ''"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, said):
    with pytest.raises(RegionalError, match=said):
        catalog([write_year(tmp_path / "a.tif", 2019)], tmp_path, **settings)
    assert os.listdir(tmp_path) == ["a.tif"]


# The extent -----------------------------------------------------------------------------------------------------------


def smallest(boxes):
    """Width of the narrowest strip around boxes of whole degrees, by trying all: which of 360 degrees are covered?"""
    covered = {(west + n) % 360 for west, _, east, _ in boxes for n in range((east - west) % 360)}
    for width in range(1, 361):
        for start in range(360):
            if all((degree - start) % 360 < width for degree in covered):
                return width, {start for start in range(360) if all((d - start) % 360 < width for d in covered)}
    raise AssertionError


@pytest.mark.parametrize("seed", range(12))
def test_the_extent_is_the_smallest_box_around_all(seed):
    rng = np.random.default_rng(seed)
    boxes = []
    for middle in rng.integers(-180, 180, rng.integers(1, 7)) if seed % 2 else 170 + rng.integers(0, 25, 4):
        west = (int(middle) + 180) % 360 - 180
        east = (west + int(rng.integers(1, 30)) + 180) % 360 - 180
        south = int(rng.integers(-60, 60))
        boxes.append((west, south, 180 if east == -180 else east, south + 2))
    west, south, east, north = united(boxes)
    width, starts = smallest(boxes)
    assert (south, north) == (min(box[1] for box in boxes), max(box[3] for box in boxes))
    assert west % 360 in starts and ((east - west) % 360 or 360) == width
    assert -180 <= west < 180 and -180 < east <= 180


def test_boxes_all_around_the_earth_are_one_without_ends():
    assert united([(-180, 0, 0, 1), (-10, 0, 180, 2)]) == [-180, 0, 180, 2]
    assert united([(100, 0, -100, 1), (-110, -1, 110, 2)]) == [-180, -1, 180, 2]
    assert united([(-125, 0, -124.57, 40)]) == [-125, 0, -124.57, 40]
    assert united([(179.5, 0, -179.25, 40), (178, 0, 180, 40)]) == [178, 0, -179.25, 40]


def test_maps_on_both_sides_of_the_antimeridian_have_a_narrow_extent(tmp_path):
    values = {"agbd": np.full((60, 80), 90.0)}
    maps = [
        write_map(tmp_path / f"{epsg}.tif", values, epsg=epsg, left=left, pixel=300)
        for epsg, left in ((32660, 560_000), (32601, 440_000), (32660, 660_000))
    ]
    catalog(maps, tmp_path)
    west, _, east, _ = json.loads((tmp_path / "collection.json").read_text())["extent"]["spatial"]["bbox"][0]
    boxes = [json.loads(stac.item_path(path).read_text())["bbox"] for path in maps]
    assert (west, east) == (boxes[0][0], boxes[1][2]) and 178 < west < 180 and -180 < east < -177


def test_memory_grows_by_some_hundred_bytes_a_map():
    """Of 4,000 items with long lists of sources."""
    listed = Listed()
    links = [{"rel": "derived_from", "href": f"./maps/{n}.json"} for n in range(200)]
    asset = {"type": "image/tiff", "roles": ["data"], "raster:bands": [{"name": "agbd", "statistics": {"mean": 1}}]}
    tracemalloc.start()
    try:
        for number in range(4000):
            about = {"start_datetime": "2019", "end_datetime": "2020", "keywords": ["map"], "proj:code": "EPSG:32633"}
            west = number / 100
            item = {"id": f"{number:05}", "bbox": [west, 0.0, west + 1, 1.0], "properties": about, "links": [*links]}
            listed.add(Path(f"/maps/{number:05}.tif"), item | {"assets": {"agbd": asset}})
        assert tracemalloc.get_traced_memory()[0] < 4000 * 1500
    finally:
        tracemalloc.stop()
    found = listed.collection(Catalog(), Path("/maps"))
    assert [link["href"] for link in found["links"]][1::3999] == ["./00000.json", "./03999.json"]
    assert found["extent"]["spatial"]["bbox"] == [[0.0, 0.0, 40.99, 1.0]]
