"""The band table, the no-data rule and the choice of bands."""

import subprocess
import sys

import numpy as np
import pytest

from biomass_jax.data import bands
from biomass_jax.errors import BandError

L30 = ["B02", "B03", "B04", "B05", "B06", "B07"]
S30 = ["B02", "B03", "B04", "B8A", "B11", "B12"]
TEN = (None, *bands.BAND_NAMES, None, None, None)


def test_table_is_the_one_of_hls():
    assert [band.l30 for band in bands.BANDS] == L30
    assert [band.s30 for band in bands.BANDS] == S30
    assert bands.BAND_NAMES == ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")


def test_import_brings_neither_rasterio_nor_jax():
    code = "import sys, biomass_jax.data.bands; print(sorted({'rasterio', 'jax', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _no_data_by_loop(image, fill):
    """The rule in words, pixel by pixel."""
    flat = image.reshape(-1, image.shape[-1])
    out = []
    for pixel in flat.tolist():
        missing = any(v != v or v in (-9999, np.inf, -np.inf) or (fill is not None and v == fill) for v in pixel)
        missing |= image.dtype == np.uint16 and 55537 in pixel
        out.append(missing or all(v == 0 for v in pixel))
    return np.array(out).reshape(image.shape[:-1])


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint16"])
@pytest.mark.parametrize("fill", [None, -9999.0, -32768.0, 0.0, 0.5, float("nan")])
def test_no_data_follows_the_rule(dtype, fill):
    rng = np.random.default_rng(3)
    image = rng.choice([0, 0, 0, 1, 5000], size=(40, 7, 6))
    odd = [55537, 32768, 65535] if dtype == "uint16" else [-9999, -32768, -1]
    image = np.where(rng.random(image.shape) < 0.02, rng.choice(odd, image.shape), image)
    image = image.astype(dtype)
    if dtype == "float32":
        image[rng.random(image.shape) < 0.02] = 55537  # a number like any other here
        for value in (np.nan, np.inf, -np.inf):
            image[rng.random(image.shape) < 0.01] = value
        image[rng.random(image.shape) < 0.02] = 0.5
    expected = _no_data_by_loop(image, fill)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(bands.no_data(image, fill), expected)


def test_a_single_zero_is_legal_and_float32_fills_are_met():
    assert not bands.no_data(np.array([0, 0, 0, 0, 0, 1], np.int16))
    lowest = float(np.finfo(np.float32).min)  # a common no-data tag, stored as a double
    assert bands.no_data(np.array([1, 1, lowest, 1, 1, 1], np.float32), lowest)


@pytest.mark.parametrize(
    "value",
    [
        TEN,
        list(TEN),
        "(None,'BLUE','GREEN','RED','NIR_NARROW','SWIR_1','SWIR_2',None,None,None)",
        "None,BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2,None,None,None",
        " none, blue, green,red ,Nir_Narrow,swir_1,SWIR_2,,, None",
        ("None,BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2,None,None,None",),
        '[None, "BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2", None, None, None]',
    ],
)
def test_every_spelling_of_a_band_list(value):
    assert bands.parse_band_list(value) == TEN


@pytest.mark.parametrize("value", [None, "", "  ", "None"])
def test_no_band_list(value):
    assert bands.parse_band_list(value) is None


def test_band_list_of_one_tuple_entry_with_a_trailing_comma():
    assert bands.parse_band_list("('BLUE',)") == ("BLUE",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("BLUE,GREEN,-1", r"unknown band name '-1'.*BLUE, GREEN, RED, NIR_NARROW, SWIR_1, SWIR_2"),
        (("NIR",), "unknown band name 'NIR'"),
        ("BLUE,RED,BLUE", "BLUE more than once"),
        ("None,None", "names no band"),
    ],
)
def test_bad_band_lists(value, message):
    with pytest.raises(BandError, match=message):
        bands.parse_band_list(value)


def test_names_in_any_order_and_case():
    selection = bands.resolve(["swir_2", "Fmask", "Swir_1", "NIR_NARROW", "RED", "Green", None, "BLUE"])
    assert selection == ((8, 6, 5, 4, 3, 1), (), None, None)


def test_numbers_of_a_known_sensor():
    l30 = ["B01", *L30, "B09", "B10", "B11"]  # Landsat's B11 is thermal, and no sign of S30
    assert bands.resolve(l30, sensor="L30") == ((2, 3, 4, 5, 6, 7), (), "L30", None)
    s30 = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
    assert bands.resolve(s30, sensor="S30") == ((2, 3, 4, 9, 12, 13), (), "S30", None)


def test_s30_is_inferred_from_bands_that_only_it_has():
    assert bands.resolve(["B12", "B11", "b8a", "B4", "B3", "B2"]) == ((6, 5, 4, 3, 2, 1), (), "S30", None)


def test_numbers_alone_are_taken_as_l30_with_a_warning():
    selection = bands.resolve(L30[::-1], path="x.tif")
    assert selection.indexes == (6, 5, 4, 3, 2, 1) and selection.unverified == "numbers"
    assert "x.tif" in selection.warnings[0] and "cannot be verified" in selection.warnings[0]


def test_positions_alone_give_a_warning():
    selection = bands.resolve([None] * 10, TEN, path="x.tif")
    assert selection.indexes == (2, 3, 4, 5, 6, 7) and selection.unverified == "positions"
    assert "cannot be verified" in selection.warnings[0]
    assert bands.resolve([None] * 10, TEN, sensor="L30").warnings == ()


def test_wanted_gives_the_order():
    assert bands.resolve(L30, sensor="L30", wanted=("SWIR_2", "BLUE")).indexes == (6, 1)
    with pytest.raises(BandError, match="unknown band name THERMAL"):
        bands.resolve(L30, sensor="L30", wanted=("THERMAL",))


@pytest.mark.parametrize(
    ("descriptions", "requested", "options", "message"),
    [
        ([None] * 6, None, {}, r"dir/a\.tif: no band description .* it has 6 bands.*explicit list"),
        (["Band 1", "Band 2", "Band 3", "Band 4", "Band 5", "Band 6", "Band 7"], None, {}, "no band description"),
        ([None] * 9, TEN, {}, r"10 entries .* it has 9 bands"),
        ([None] * 3, ("BLUE", None, "RED"), {}, "band GREEN not found"),
        (["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1"], None, {}, r"SWIR_2 not found.*it has 5 bands"),
        ([*bands.BAND_NAMES, "BLUE"], None, {}, r"BLUE found 2 times, at bands \[1, 7\]"),
        ([*L30, "B05"], None, {"sensor": "L30"}, r"NIR_NARROW found 2 times, at bands \[4, 7\]"),
        (L30[:5], None, {"sensor": "L30"}, r"B07 \(SWIR_2\) not found"),
        # an S30 file with L30's numbers, in each way to know it
        (L30, None, {"sensor": "S30"}, r"dir/a\.tif: an S30 file with the band numbers of L30.*B8A \(NIR_NARROW\)"),
        (L30, None, {"long_names": ["Blue", "Green", "Red", "Red_Edge1"]}, "S30 file with the band numbers of L30"),
        (L30, bands.BAND_NAMES, {"sensor": "S30"}, r"band 4 is taken as NIR_NARROW.*'B05'.*NIR_NARROW=B8A"),
        ([*L30[:4], "B11", "B06"], (*bands.BAND_NAMES[:3], None, "SWIR_1", "NIR_NARROW"), {}, "SWIR_2 not found"),
        (["B02", "B03", "B04", "B8A", "B06", "B07"], bands.BAND_NAMES, {}, r"band 5 is taken as SWIR_1.*'B06'"),
        (["B02", "B03", "B04", "B05", "B11", "B07"], bands.BAND_NAMES, {}, r"band 5 is taken as SWIR_1.*'B11'"),
        (
            [None] * 6,
            bands.BAND_NAMES,
            {"long_names": ["", "", "", "Red_Edge1", "", ""]},
            "band 4 is taken as NIR_NARROW.*Red_Edge1",
        ),
        # and the reverse
        (S30, None, {"sensor": "L30"}, "said to be L30, but B12, B8A is found on S30 alone"),
        (["B02", "B03", "B04", "B05", "B11", "B07"], bands.BAND_NAMES, {"sensor": "L30"}, r"SWIR_1=B06"),
        # a list or a name that the file itself contradicts
        (["GREEN", *[None] * 5], bands.BAND_NAMES, {}, "band 1 is taken as BLUE, but the file calls it 'GREEN'"),
        (
            bands.BAND_NAMES,
            None,
            {"long_names": ["Blue", "Red"]},
            "band 2 is named 'GREEN', but its tags call it 'Red'",
        ),
        (["B07", "B06", "B05", "B04", "B03", "B02"], bands.BAND_NAMES, {}, r"band 1 is taken as BLUE.*'B07'"),
        (L30, None, {"sensor": "L30+S30"}, "holds both sensors"),
    ],
)
def test_what_is_refused(descriptions, requested, options, message):
    with pytest.raises(BandError, match=message):
        bands.resolve(descriptions, requested, path="dir/a.tif", **options)


def test_both_sensors_by_name_are_fine():
    assert bands.resolve(bands.BAND_NAMES, sensor="L30+S30") == ((1, 2, 3, 4, 5, 6), (), "L30+S30", None)


@pytest.mark.parametrize(
    ("text", "sensor"),
    [
        ("OLI_TIRS; OLI_TIRS", "L30"),
        ("L30", "L30"),
        ("Sentinel-2A", "S30"),
        ("MSI", "S30"),
        ("L30+S30", "L30+S30"),
        ("", None),
        ("airborne", None),
    ],
)
def test_sensor_tags(text, sensor):
    assert bands.sensor_of(text) == sensor


COMMON = ["blue", "green", "red", "nir08", "swir16", "swir22"]
ESA = ["Blue", "Green", "Red", "NIR", "SWIR1", "SWIR2"]
SR = [f"SR_B{number}" for number in range(1, 8)]


@pytest.mark.parametrize(
    "texts", [COMMON, [text.upper() for text in COMMON], ["NIR 08", "SWIR_16", "swir22", *COMMON[:3]]]
)
def test_common_names_need_no_guess(texts):
    selection = bands.resolve(texts, path="x.tif")
    order = sorted(range(6), key=lambda place: COMMON.index(texts[place].lower().replace(" ", "").replace("_", "")))
    assert selection == (tuple(place + 1 for place in order), (), None, None)


def test_a_plain_nir_asks_only_where_it_may_be_the_broad_one():
    with pytest.raises(
        BandError, match=r"x\.tif: band 4, 'NIR', may be the broad .* \(B08 of.*config\.bands='(BLUE.*)'"
    ) as error:
        bands.resolve(ESA, path="x.tif")
    answer = str(error.value).split("config.bands='")[1].split("'")[0]
    assert bands.resolve(ESA, bands.parse_band_list(answer)).indexes == (1, 2, 3, 4, 5, 6)
    assert bands.resolve(ESA, sensor="L30").indexes == (1, 2, 3, 4, 5, 6)
    assert bands.resolve([*ESA, "lwir11"]).indexes == (1, 2, 3, 4, 5, 6)  # Landsat has but one
    for extra in ("nir08", "NIR_Narrow"):  # the narrow one is there: the other is the broad one
        assert bands.resolve([*ESA, extra]).indexes == (1, 2, 3, 7, 5, 6)
    for more, sensor in (([], "S30"), (["rededge1"], None)):
        with pytest.raises(BandError, match="may be the broad near infrared"):
            bands.resolve([*ESA, *more], sensor=sensor)
    with pytest.raises(BandError, match="band SWIR_1 not found"):  # the first cause
        bands.resolve(ESA[:4])
    with pytest.raises(BandError, match="band 3 is taken as RED, but the file calls it 'nir'"):
        bands.resolve(["blue", "green", "nir"], ("BLUE", "GREEN", "RED"), wanted=("RED",))
    with pytest.raises(BandError, match="unknown band name 'NIR'.*write NIR_NARROW"):
        bands.parse_band_list("blue,green,red,NIR,swir1,swir2")


def test_a_nir_with_its_number_is_told():
    texts = ["B02 (Blue)", "B03 (Green)", "B04 (Red)", "{} (NIR)", "B11 (SWIR1)", "B12 (SWIR2)"]
    assert bands.resolve([text.format("B8A") for text in texts]).indexes == (1, 2, 3, 4, 5, 6)
    with pytest.raises(BandError, match=r"B8A \(NIR_NARROW\) not found"):
        bands.resolve([text.format("B08") for text in texts])


def test_landsat_numbers_are_those_of_one_sensor():
    assert bands.resolve(SR) == ((2, 3, 4, 5, 6, 7), (), "L30", None)
    assert bands.resolve([*SR[:5], SR[6]]) == ((1, 2, 3, 4, 5, 6), (), "TM", None)  # Landsat 4 to 7 have no SR_B6
    assert bands.resolve([*SR[:5], SR[6]], sensor="TM").sensor == "TM"


@pytest.mark.parametrize(
    ("descriptions", "options", "message"),
    [
        (SR[1:5], {}, "SR_B2 is blue on Landsat 8 and 9 and green on Landsat 4 to 7, and nothing tells which"),
        (SR[1:5], {"sensor": "L30"}, r"B06 \(SWIR_1\), B07 \(SWIR_2\) not found"),
        ([*SR[:5], SR[6]], {"sensor": "L30"}, "said to be L30, but SR_B1 to .* is found on TM alone"),
        (SR, {"sensor": "TM"}, "said to be TM, but SR_B6 is found on L30 alone"),
        (SR, {"sensor": "S30"}, "said to be S30, but SR_B6 is found on L30 alone"),
        ([f"HLS.S30.T10SFF.2020183T184512.v2.0.{n}" for n in L30], {}, "S30 file with the band numbers of L30"),
        ([f"HLS.S30.T10SFF.2020183T184512.v2.0.{n}" for n in S30], {"sensor": "L30"}, "said to be L30, but"),
        (["Blue"] * 6, {}, "its bands are all called alike; it has 6 bands"),
        (
            ["Band 1", "Band 2", "Band 3", "Band 4", "Band 5", "Band 6", "Band 7"],
            {"sensor": "L30"},
            "no band description",
        ),
        # Digital Earth Australia's Sentinel-2: its swir_2 is B11
        ([f"nbart_{n}" for n in ("blue", "green", "red", "nir_2", "swir_2", "swir_3")], {}, "no band description"),
        (["blue", "green", "red", "nir_2", "swir_2", "swir_3"], {}, "NIR_NARROW not found"),
        (["Red"], {}, "a single band, 6 are wanted .*give that folder"),
        (["green", *COMMON[1:]], {}, "band BLUE not found"),
        ([None] * 6, {"long_names": ["Blue", "Red", "Red", None, None, None]}, "GREEN not found"),
    ],
)
def test_what_may_mean_two_things_is_refused(descriptions, options, message):
    with pytest.raises(BandError, match=message):
        bands.resolve(descriptions, path="dir/a.tif", **options)


def test_names_in_tags_count_where_descriptions_say_nothing():
    for descriptions in (
        [None] * 6,
        ["Blue"] * 6,
        ["Band 1", "Band 2", "Band 3", "Band 4", "Band 5", "Band 6"],
        list("abcdef"),
    ):
        assert bands.resolve(descriptions, long_names=COMMON) == ((1, 2, 3, 4, 5, 6), (), None, None)


def test_a_band_list_takes_other_spellings():
    assert bands.parse_band_list("blue,Green,RED,nir08,swir16,SWIR 2") == bands.BAND_NAMES


@pytest.mark.parametrize(
    ("text", "sensor"), [("LANDSAT_5", "TM"), ("Landsat 7 ETM+", "TM"), ("LANDSAT_8", "L30"), ("Atmosphere", None)]
)
def test_sensor_tags_of_older_landsats(text, sensor):
    assert bands.sensor_of(text) == sensor
