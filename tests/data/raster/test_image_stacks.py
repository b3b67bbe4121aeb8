"""Stacks as other tools write them, and images of single-band files under any archive's names.

What rioxarray, odc-geo, stackstac, terra and Earth Engine write was looked up by writing with them (rioxarray 0.19,
odc-geo 0.5, stackstac 0.5); here rasterio writes the same descriptions and tags.
"""

import numpy as np
import pytest
import rasterio
from affine import Affine

from biomass_jax.data import bands
from biomass_jax.data.raster.image import open_image
from biomass_jax.data.raster.inputs import find_inputs
from biomass_jax.errors import RasterError

COMMON = ["blue", "green", "red", "nir08", "swir16", "swir22"]
HLS = [band.description for band in bands.BANDS]
L30 = [band.l30 for band in bands.BANDS]
GRANULE = "HLS.L30.T10SFF.2020183T184512.v2.0"


def rows_of(path, **options):
    with open_image(path, **options) as image:
        return image.read_rows(0, 7), image


@pytest.mark.parametrize(
    "written",
    [
        {"names": COMMON},  # rioxarray: a DataArray with long_name, a Dataset; odc-geo: save_cog_with_dask
        {
            "names": HLS,
            "band_tags": [{"long_name": name, "scale_factor": "0.0001"} for name in HLS],
        },  # a Dataset of HLS
        {"names": ["reflectance"] * 6, "tags": {"long_name": "reflectance", "band_names": str(COMMON)}},  # attributes
        {"names": ["Blue"] * 6, "tags": {"long_name": "Blue", "band": str(COMMON), "bands": str(tuple(COMMON))}},
        {"names": [f"{GRANULE}.{number}" for number in L30]},  # terra
        {"names": [f"{number}_median" for number in ("B2", "B3", "B4", "B5", "B6", "B7")]},  # Earth Engine, a reducer
        {"band_tags": [{"BandName": name} for name in COMMON]},
        {"band_tags": [{"NAME": name.upper()} for name in COMMON]},
        {"names": [f"Band {i}" for i in range(1, 7)], "band_tags": [{"Description": name} for name in HLS]},
        {"tags": {f"Band_{i}": name for i, name in enumerate(COMMON, 1)}},  # ENVI
    ],
)
def test_a_stack_opens_as_the_plain_file_does(tmp_path, numbers, write, written):
    data = numbers((6, 7, 5))
    found, _ = rows_of(write(tmp_path / "a.tif", data, nodata=-9999, **written))
    np.testing.assert_array_equal(found, np.moveaxis(data, 0, -1))
    shuffled = {key: value[::-1] if key != "tags" else value for key, value in written.items()}
    if "tags" not in written:  # by name, not by place
        if "Band 6" in str(written):
            shuffled["names"] = written["names"]
        found, _ = rows_of(write(tmp_path / "b.tif", data, nodata=-9999, **shuffled))
        np.testing.assert_array_equal(found, np.moveaxis(data[::-1], 0, -1))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        # rioxarray's and stackstac's DataArray with names in the band coordinate alone: they are lost
        ({"tags": {"spec": "RasterSpec(epsg=32610)"}}, r"a\.tif: no band description .*\(config\.bands\)"),
        ({"names": ["Blue"] * 6, "tags": {"long_name": "Blue"}}, "its bands are all called alike"),
        ({"names": ["Blue", "Green", "Red", "NIR", "SWIR1", "SWIR2"]}, "'NIR', may be the broad"),
        ({"names": COMMON, "band_tags": [{"name": "red"}]}, "band 1 is named 'blue', but its tags call it 'red'"),
        ({"band_tags": [{"name": "red"}], "tags": {"band_names": str(COMMON)}}, "its tags call band 1 both 'red' and"),
    ],
)
def test_a_stack_that_tells_too_little_is_refused_and_opens_with_a_list(tmp_path, numbers, write, written, message):
    data = numbers((6, 7, 5))
    path = write(tmp_path / "a.tif", data, **written)
    with pytest.raises(RasterError, match=message):
        open_image(path)
    if "both" not in message and "is named" not in message:
        found, _ = rows_of(path, band_list=bands.BAND_NAMES)
        np.testing.assert_array_equal(found, np.moveaxis(data, 0, -1))


def test_the_sensor_in_a_file_s_name_counts(tmp_path, numbers, write):
    _, image = rows_of(write(tmp_path / "HLSL30_2020_stack.tif", numbers((6, 7, 5)), names=L30))
    assert image.sensor == "L30"
    with pytest.raises(RasterError, match="S30 file with the band numbers of L30"):
        open_image(write(tmp_path / "S30_stack.tif", numbers((6, 7, 5)), names=L30))
    with pytest.raises(RasterError, match="its name says TM, its sensor tag L30"):
        open_image(write(tmp_path / "LE07_stack.tif", numbers((6, 7, 5)), names=L30, tags={"SENSOR": "OLI_TIRS"}))


S30 = [band.s30 for band in bands.BANDS]
ARCHIVES = {
    "HLSL30.020_{}_doy2020183_aid0001_10N.tif": (["B01", *L30], "L30", "2020-07-01/2020-07-02"),
    "HLSS30.020_{}_doy2020183_aid0001.TIF": (["B05", *S30], "S30", "2020-07-01/2020-07-02"),
    "{0}/HLSL30.020_{0}_doy2020183_aid0001.tiff": (L30, "L30", "2020-07-01/2020-07-02"),
    f"{GRANULE}.{{}}.TIF": (L30, "L30", "2020-07-01/2020-07-02"),
    "LC08_L2SP_044034_20200701_02_T1_{}.TIF": ([f"SR_B{i}" for i in range(1, 8)], "L30", ""),
    "LT05_L2SP_044034_20000701_02_T1_{}.TIF": ([f"SR_B{i}" for i in (1, 2, 3, 4, 5, 7)], "TM", ""),
    "T10SFF_20200701T184921_{}_20m.tif": (["B05", *S30], "S30", ""),
    "scene_{}.tif": (COMMON, None, ""),
    "{}.tif": (L30, None, ""),
    "img.{}.tif": (["B2", "B3", "B4", "B5", "B6", "B7"], None, ""),  # Earth Engine's getDownloadURL
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_single_band_files_of_any_archive_are_one_image(tmp_path, numbers, write, name):
    layers, sensor, season = ARCHIVES[name]
    made = {layer: numbers((1, 7, 5), seed) for seed, layer in enumerate(layers)}
    for layer, data in made.items():
        write(tmp_path / name.format(layer), data, nodata=-9999)
    for layer in ("Fmask", "QA_PIXEL", "SCL"):  # layers beside the bands
        write(tmp_path / name.format(layer), numbers((1, 7, 5), 9))
    if "HLS" in name:
        for layer in ("QA_PIXEL", "SCL"):
            (tmp_path / name.format(layer)).unlink()
    (item,) = find_inputs(tmp_path)
    found, image = rows_of(item)
    np.testing.assert_array_equal(found, np.stack([made[layer][0] for layer in layers[-6:]], axis=-1))
    assert (image.sensor, image.season) == (sensor, season)


def test_single_band_files_that_are_no_image(tmp_path, numbers, write):
    for name in COMMON[:5]:
        write(tmp_path / "five" / f"a_{name}.tif", numbers((1, 7, 5)))
    assert len(find_inputs(tmp_path / "five")) == 5
    with pytest.raises(RasterError, match=r"a_blue\.tif: a single band, 6 are wanted .* give that folder"):
        open_image(tmp_path / "five" / "a_blue.tif")
    for name in L30[:5]:
        write(tmp_path / "known" / f"HLSL30.020_{name}_doy2020183_aid0001.tif", numbers((1, 7, 5)))
    with pytest.raises(RasterError, match=r"aid0001: bands of L30: B07 \(SWIR_2\) not found; it has 5 bands"):
        open_image(tmp_path / "known")
    for number in range(1, 8):  # of MODIS, whose b01 is red
        write(tmp_path / "modis" / f"MOD09A1.061_sur_refl_b0{number}_doy2020177_aid0001.tif", numbers((1, 7, 5)))
    assert len(find_inputs(tmp_path / "modis")) == 7
    for number in range(2, 8):  # plots called B2 to B7, each an image
        write(tmp_path / "plots" / f"site_B{number}.tif", numbers((6, 7, 5)), names=COMMON)
    assert [str(item.relative) for item in find_inputs(tmp_path / "plots")] == [f"site_B{i}" for i in range(2, 8)]


def test_single_band_files_on_other_grids_and_with_a_plain_nir(tmp_path, numbers, write):
    for name in COMMON:
        shift = Affine(30, 0, 400020 + 30 * (name == "red"), 0, -30, 4200000)
        write(tmp_path / "moved" / f"a_{name}.tif", numbers((1, 7, 5)), transform=shift)
    with pytest.raises(RasterError, match=r"its files lie on different grids: a_blue\.tif"):
        open_image(tmp_path / "moved")
    made = {name.replace("08", ""): numbers((1, 7, 5), seed) for seed, name in enumerate(COMMON)}
    for name, data in made.items():
        write(tmp_path / "nir" / f"a_{name}.tif", data)
    with pytest.raises(RasterError, match="'nir', may be the broad") as error:
        open_image(tmp_path / "nir")
    answer = str(error.value).split("config.bands='")[1].split("'")[0]
    found, _ = rows_of(tmp_path / "nir", band_list=answer)
    np.testing.assert_array_equal(found, np.moveaxis(np.concatenate(list(made.values())), 0, -1))


def test_two_dates_are_two_images(tmp_path, numbers, write):
    for day in ("183", "199"):
        for name in L30:
            write(tmp_path / f"HLSL30.020_{name}_doy2020{day}_aid0001.tif", numbers((1, 7, 5)))
    items = find_inputs(tmp_path)
    assert [str(item.relative) for item in items] == [f"HLSL30.020_doy2020{day}_aid0001" for day in ("183", "199")]


def test_a_missing_file_of_an_image_is_named(tmp_path, numbers, write):
    for name in COMMON:
        write(tmp_path / f"a_{name}.tif", numbers((1, 7, 5)))
    (item,) = find_inputs(tmp_path)
    with rasterio.open(tmp_path / "a_red.tif", "r+") as file:
        file.update_tags(long_name="Green")
    with pytest.raises(RasterError, match="band 3 is named 'red', but its tags call it 'Green'"):
        open_image(item)
