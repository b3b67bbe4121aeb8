"""What texts call bands."""

import pytest

from biomass_jax.data import band_names
from biomass_jax.errors import BandError

COMMON = ["blue", "green", "red", "nir08", "swir16", "swir22"]
SIX = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]


def names(texts):
    return [one.name for one in band_names.read(texts)[0]]


def numbers(texts):
    return [one.number for one in band_names.read(texts)[0]]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((text, "NIR_NARROW") for text in ("nir08", "NIR_08", "NIR_NARROW", "Nir Narrow", "narrow-nir", "NIR_8A")),
        *((text, "SWIR_1") for text in ("swir16", "SWIR1", "swir_1", "SWIR 1", "SWIR-1.6")),
        *((text, "SWIR_2") for text in ("swir22", "SWIR2", "swir_2", "SWIR 2.2", "Swir_22")),
        *((text, "NIR") for text in ("nir", "NIR", "Near Infrared")),
        *(
            (text, None)
            for text in ("swir", "NIR_1", "nir_2", "SWIR3", "Red_Edge1", "nir09", "NIR_Broad", "ndvi", "", None)
        ),
    ],
)
def test_names_in_any_spelling(text, name):
    assert band_names.called(text).name == name


@pytest.mark.parametrize(
    ("text", "number", "landsat"),
    [
        *((text, "B02", False) for text in ("B02", "b2", "B2", "Band_2", "band 2", "B_02", "band02")),
        *((text, "B8A", False) for text in ("B8A", "b8a", "B08A")),
        *((text, "B02", True) for text in ("SR_B2", "sr_b2", "sr_band2", "SR-B02")),
        *((text, None, False) for text in ("B2_1", "2", "B123", "ST_B10", "blue")),
    ],
)
def test_numbers_in_any_spelling(text, number, landsat):
    assert band_names.called(text)[2:4] == (number, landsat)


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        *(
            (text, "S30")
            for text in ("B8A", "B08", "b12", "rededge1", "Red_Edge1", "rededge071", "NIR_Broad", "Water_Vapor")
        ),
        *((text, "L30") for text in ("lwir11", "TIRS1")),
        *((text, None) for text in ("B11", "B05", "SR_B8", "nir08", "lwir")),
    ],
)
def test_bands_of_one_sensor_alone(text, sign):
    assert band_names.called(text).sign == sign


def test_one_text_for_all_bands_and_counted_positions_say_nothing():
    assert names(["Blue"] * 6) == [None] * 6  # rioxarray writes an array's one long_name to all of them
    assert names(["Blue"]) == ["BLUE"]
    for word in ("Band {}", "band_{}", "Band {:02}"):
        assert numbers([word.format(i) for i in range(1, 8)]) == [None] * 7 or word.endswith("02}")
        assert numbers([word.format(i) for i in range(2, 8)]) == ["B02", "B03", "B04", "B05", "B06", "B07"]
    assert numbers([f"sr_band{i}" for i in range(1, 8)])[1] == "B02"


@pytest.mark.parametrize(
    ("around", "sensor"),
    [
        ("HLS.L30.T10SFF.2020183T184512.v2.0.{}", "L30"),  # terra writes the names of files
        ("HLSS30.020_{}_doy2020183_aid0001", "S30"),
        ("{}_median", None),
        ("0_{}", None),
        ("LT05_044034_{}", "TM"),
    ],
)
def test_words_around_the_names_are_left_out(around, sensor):
    found, told = band_names.read([around.format(name) for name in (*COMMON, "NDVI")])
    assert [one.name for one in found] == [*SIX, None]
    assert told == sensor
    assert numbers([around.format(name) for name in ("B2", "SR_B3", "b8a")]) == ["B02", "B03", "B8A"]


def test_words_that_differ_or_tell_of_no_reflectance_leave_nothing():
    assert names([f"{i}_{name}" for i, name in enumerate(COMMON)]) == [None] * 6
    assert names([f"{name}_stdDev" for name in COMMON]) == [None] * 6
    for product in ("sur_refl_b0{}", "Nadir_Reflectance_Band{}", "MOD09GA.b0{}"):  # of MODIS, b01 is red
        assert numbers([product.format(number) for number in range(1, 8)]) == [None] * 7
    assert numbers([f"blue_ridge_B0{i}" for i in range(2, 8)]) == [f"B0{i}" for i in range(2, 8)]
    assert names([f"blue_ridge_B0{i}" for i in range(2, 8)]) == [None] * 6


def test_a_name_and_a_number_in_one_text():
    (blue, nir), _ = band_names.read(["B02 (Blue)", "B8A - NIR narrow"])
    assert blue[1:3] == ("BLUE", "B02") and nir[1:3] == ("NIR_NARROW", "B8A")


@pytest.mark.parametrize(
    ("own", "whole"),
    [
        *(
            ([{key: name} for name in COMMON], {})
            for key in ("long_name", "BandName", "Description", "NAME", "band_name")
        ),
        ([{}] * 6, {"long_name": str(tuple(COMMON))}),
        ([{}] * 6, {"band_names": str(COMMON)}),
        ([{}] * 6, {"bands": '["blue", "green", "red", "nir08", "swir16", "swir22"]'}),
        ([{}] * 6, {"BAND_NAMES": ";".join(COMMON)}),
        ([{}] * 6, {f"Band_{i}": name for i, name in enumerate(COMMON, 1)}),
        # what says nothing gives way to what does
        ([{"long_name": "surface reflectance", "name": name} for name in COMMON], {"long_name": "reflectance"}),
    ],
)
def test_tags_that_name_bands(own, whole):
    assert band_names.tagged(own, whole) == COMMON


def test_tags_that_name_none_or_two():
    assert band_names.tagged([{}] * 6, {"band_names": "['blue', 'green']", "long_name": "Blue"}) == [None] * 6
    assert band_names.tagged([{}], {"long_name": "Blue"}) == ["Blue"]
    with pytest.raises(BandError, match=r"x\.tif: its tags call band 2 both 'Red' and 'green'"):
        band_names.tagged([{"long_name": "Blue"}, {"long_name": "Red"}], {"band_names": "blue,green"}, "x.tif")
