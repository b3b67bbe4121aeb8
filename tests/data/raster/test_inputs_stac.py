"""STAC items as images: assets known by key or name, hrefs, scales and sensors."""

import numpy as np
import pytest

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.inputs import is_stac_item, stac_input
from biomass_jax.errors import RasterError

COMMON = ["blue", "green", "red", "nir08", "swir16", "swir22"]


@pytest.fixture
def item(tmp_path, numbers, write):
    """item(keys, **asset) -> an item whose assets, one a band, lie beside it under names that tell nothing."""
    data = numbers((6, 7, 5))

    def make(keys, names=(), properties=None, item_id="scene", **asset):
        assets = {"thumbnail": {"href": "t.png", "roles": ["thumbnail"]}}
        for index, key in enumerate(keys):
            path = write(tmp_path / f"{index}.tif", data[index : index + 1])
            assets[key] = {"href": f"./{path.name}", "roles": ["data"], "type": "image/tiff"} | asset
            if names:
                assets[key]["eo:bands"] = [names[index]]
        links = [{"rel": "self", "href": f"{tmp_path}/item.json"}]
        properties = properties or {"datetime": "2020-07-01T18:45:12Z", "platform": "landsat-8"}
        return {"type": "Feature", "id": item_id, "properties": properties, "assets": assets, "links": links}

    return make, np.moveaxis(data, 0, -1)


S30 = ["B02", "B03", "B04", "B8A", "B11", "B12"]


@pytest.mark.parametrize(
    ("keys", "more", "sensor"),
    [
        (COMMON, {}, "L30"),
        ([f"B0{i}" for i in range(2, 8)], {"item_id": "HLS.L30.T10SFF.2020183T184512.v2.0"}, "L30"),
        (S30, {"properties": {"platform": "sentinel-2a", "instruments": ["msi"]}}, "S30"),
        ([f"asset{i}" for i in range(6)], {"names": [{"name": name} for name in COMMON]}, "L30"),
        ([f"asset{i}" for i in range(6)], {"names": [{"name": "x", "common_name": name} for name in COMMON]}, "L30"),
        # Planetary Computer calls B8A `rededge`
        (S30, {"names": [{"common_name": "rededge"}] * 6, "properties": {"platform": "Sentinel-2B"}}, "S30"),
    ],
)
def test_the_bands_of_an_item_are_found(item, keys, more, sensor):
    make, expected = item
    with open_image(stac_input(make(keys, **more))) as image:
        np.testing.assert_array_equal(image.read_rows(0, 7), expected)
        assert image.sensor == sensor and image.bands == BAND_NAMES


def test_a_pystac_item_is_one_and_its_day_is_kept(item):
    make, _ = item
    fields = make(COMMON)

    class Item:
        assets = fields["assets"]

        def to_dict(self):
            return fields

    assert is_stac_item(Item()) and not is_stac_item("item.json")
    found = stac_input(Item())
    assert found.season == "2020-07-01/2020-07-02" and found.name == "STAC item scene"


def test_a_scale_that_the_item_tells_counts(item):
    make, expected = item
    fields = make(COMMON, **{"raster:bands": [{"scale": 1e-4, "offset": -0.1}]})
    with pytest.raises(RasterError, match=r"STAC item scene: band BLUE has scale 0\.0001 and offset -0\.1"):
        open_image(stac_input(fields))
    with open_image(stac_input(fields), encoding="from_file") as image:
        np.testing.assert_allclose(image.read_rows(0, 7), np.float32(expected) - 1000, rtol=1e-6)


def test_far_assets_and_doubled_ones(item):
    make, _ = item
    fields = make(COMMON)
    fields["assets"]["red"]["href"] = "https://host/a/red.tif?sig=x"
    fields["assets"]["red-jp2"] = {"href": "s3://b/red.jp2", "type": "image/jp2", "roles": ["data"]}
    found = stac_input(fields)
    assert "/vsicurl/https://host/a/red.tif?sig=x" in found.paths and not any("jp2" in path for path in found.paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.pop("assets"), "no STAC item: found fields type, id"),
        (lambda item: item["assets"].clear(), "none of its assets is called as a band is"),
        (lambda item: item["assets"]["red"].pop("href"), "asset red: it has no href"),
        (lambda item: item.pop("links"), "asset blue: its href ./0.tif is relative"),
        (lambda item: item["assets"].pop("red"), "band RED not found"),
    ],
)
def test_an_item_that_tells_too_little_is_refused(item, change, message):
    make, _ = item
    fields = make(COMMON)
    change(fields)
    with pytest.raises(RasterError, match=message):
        open_image(stac_input(fields))
