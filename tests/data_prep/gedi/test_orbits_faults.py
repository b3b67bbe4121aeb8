"""GEDI orbits of which a part can't be used, and files that are none: what is left out or refused is named."""

import warnings

import h5py
import numpy as np
import pytest

from biomass_jax.errors import PrepError
from data_prep.gedi import orbits as gedi
from data_prep.gedi.footprints import read_settings
from data_prep.gedi.orbits import Filters, find_granules
from tests.data_prep.gedi_files import BEAMS, FIRST, NEW, read_granule, whole, write

# ---- what one beam or one shot lacks leaves the others alone


AROUND = (-122, 36, -120, 38)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Bytes of an orbit of eight beams with three good shots each."""
    return write(tmp_path_factory.mktemp("orbit") / NEW, {beam: [{}] * 3 for beam in BEAMS}).read_bytes()


def without(*names):
    def change(beam):
        for name in names:
            del beam[name]

    return change


def instead(name, values):
    def change(beam):
        del beam[name]
        beam[name] = values

    return change


def a_dataset(beam):
    file, name = beam.file, beam.name
    del file[name]
    file[name] = np.zeros(3)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda beam: beam.clear(), "BEAM0110 has no dataset shot_number, which is needed"),
        (without("shot_number"), "BEAM0110 has no dataset shot_number, which is needed"),
        (without("agbd"), "BEAM0110 has no dataset agbd, which is needed"),
        (without("lon_lowestmode", "lat_lowestmode"), "BEAM0110 has no dataset lon_lowestmode, which is needed"),
        (without("l4_quality_flag"), "BEAM0110 has no dataset l4_quality_flag, which filter l4_quality_flag needs"),
        (without("land_cover_data"), "BEAM0110 has no dataset land_cover_data/pft_class, which filter sensitivity"),
        (instead("land_cover_data", np.zeros(3)), "BEAM0110 has no dataset land_cover_data/pft_class, which"),
        (instead("agbd", np.zeros(2, "f4")), r"BEAM0110/agbd has shape \(2,\), shot_number \(3,\)"),
        (instead("agbd_se", np.zeros((3, 2), "f4")), r"BEAM0110/agbd_se has shape \(3, 2\), shot_number \(3,\)"),
        (instead("shot_number", np.uint64(FIRST)), r"BEAM0110/shot_number has shape \(\), shot_number \(\)"),
        (instead("agbd", h5py.Empty("f4")), "BEAM0110/agbd has shape None, shot_number"),
        (instead("agbd", [b"a", b"b", b"c"]), r"BEAM0110/agbd is object, expected float32"),
        (instead("shot_number", np.arange(3.0)), "BEAM0110/shot_number is float64, expected uint64"),
        (instead("degrade_flag", np.full(3, 256, "i2")), "BEAM0110/degrade_flag holds 256, which is no uint8"),
        (a_dataset, "BEAM0110 is no group of one of GEDI's eight beams"),
    ],
)
def test_a_beam_that_can_not_be_used_is_skipped_named_and_counted(tmp_path, eight, change, why):
    path = tmp_path / NEW
    path.write_bytes(eight)
    with h5py.File(path, "r+") as file:
        change(file["BEAM0110"])
    for box in (None, AROUND):
        with pytest.warns(UserWarning, match=f"{NEW}: 1 of 8 beams skipped: {why}") as caught:
            table, counts, _, skipped = gedi.read_granule(path, bbox=box)[:4]
        assert len(caught) == 1
        assert (counts["shots"], len(table["agbd"])) == (21, 21)
        assert sorted(set(table["beam"])) == [beam for beam in BEAMS if beam != "BEAM0110"]
        assert list(skipped) == ["BEAM0110"]
    with pytest.warns(UserWarning, match="skipped"):
        dst, _ = gedi.convert_granule(path, tmp_path / "out")
    assert read_settings(dst)["skipped_beams"] == skipped
    with h5py.File(path, "r+") as file:
        for beam in BEAMS:
            if beam != "BEAM0110":
                del file[beam]
    with pytest.raises(PrepError, match=f"{NEW}: .*BEAM0110"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the beams that are absent
        gedi.read_granule(path)


def test_beams_that_are_none_of_the_eight_are_named(tmp_path):
    path = write(tmp_path / NEW, {beam: [{}] for beam in [*BEAMS, "BEAM0111"]})
    with pytest.warns(UserWarning, match="1 of 9 beams skipped: BEAM0111 is no group of one of GEDI's eight beams"):
        assert len(read_granule(path)[0]["agbd"]) == 8


def test_the_first_of_several_faults_is_told_where_no_beam_is_left(tmp_path):
    path = write(tmp_path / NEW, {beam: [{}] * 3 for beam in BEAMS}, lacking=("agbd_se", "agbd"))
    with pytest.raises(PrepError, match="BEAM0000 has no dataset agbd, which is needed; 7 more beams"):
        read_granule(path)


def test_a_damaged_chunk_is_damage_of_the_file(tmp_path):
    path = write(tmp_path / NEW, {beam: [{}] * 8 for beam in BEAMS})
    with h5py.File(path, "r+") as file:
        file["BEAM0110/agbd"].id.write_direct_chunk((4,), b"no deflate stream")
    with pytest.raises(PrepError, match=f"{NEW}: .*truncated or damaged .*download it again: BEAM0110/agbd: "):
        read_granule(path)


def test_a_compression_that_this_library_lacks_is_no_damage(tmp_path):
    path = write(tmp_path / NEW, whole([{}] * 4))
    with h5py.File(path, "r+") as file:
        del file["BEAM0101/agbd"]
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((4,))
        layout.set_filter(32767, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((4,))
        made = h5py.h5d.create(file["BEAM0101"].id, b"agbd", h5py.h5t.IEEE_F32LE, space, layout)
        made.write_direct_chunk((0,), bytes(16))
    with pytest.raises(
        PrepError, match=f"{NEW}: compressed in a way that this HDF5 library doesn't know: BEAM0101/agbd"
    ):
        read_granule(path)


@pytest.mark.parametrize(
    "lost",
    [
        {"lat_lowestmode": np.nan},
        {"lat_lowestmode": -9999.0},
        {"lat_lowestmode": -9998.5},
        {"lat_lowestmode": 90.01},
        {"lon_lowestmode": np.inf},
        {"lon_lowestmode": -9999.0},
        {"lon_lowestmode": 238.7},
        {"lon_lowestmode": 0.0, "lat_lowestmode": 0.0},
        {"delta_time": np.nan},
        {"delta_time": -9999.0},
        {"delta_time": 0.0},
        {"delta_time": 9.96921e36},
    ],
)
def test_a_shot_without_place_or_time_is_dropped_and_counted(tmp_path, eight, lost):
    path = tmp_path / NEW
    path.write_bytes(eight)
    with h5py.File(path, "r+") as file:
        for name, value in lost.items():
            file["BEAM0000"][name][1] = value
    for box in (None, AROUND):
        with pytest.warns(UserWarning, match=f"{NEW}: dropped shots .*: 1 of 3 in BEAM0000"):
            table, counts = read_granule(path, bbox=box)
        assert table["shot_number"].tolist() == [FIRST, *range(FIRST + 2, FIRST + 24)]
        assert list(counts.items())[:2] == [("shots", 24), ("placed", 23)]


def test_an_orbit_of_which_no_shot_can_be_used_is_refused(tmp_path):
    path = write(tmp_path / NEW, whole([{"lat_lowestmode": np.nan}] * 2))
    with pytest.raises(PrepError, match=f"{NEW}: no shot can be used; .*2 of 2 in BEAM0101"):
        read_granule(path)


def test_a_shot_without_a_number_is_dropped_and_counted(tmp_path):
    path = write(tmp_path / NEW, whole([{}] * 3))
    with h5py.File(path, "r+") as file:
        file["BEAM0101/shot_number"][1] = 0
    with pytest.warns(UserWarning, match="1 of 3 in BEAM0101"):
        table, counts = read_granule(path)
    assert (table["shot_number"].tolist(), counts["placed"]) == ([FIRST, FIRST + 2], 2)


def test_the_fill_in_a_wider_type_drops_the_shot_where_a_filter_asks(tmp_path):
    path = write(tmp_path / NEW, whole([{}] * 3))
    with h5py.File(path, "r+") as file:
        for name in ("land_cover_data/leaf_off_flag", "land_cover_data/pft_class"):
            values = file["BEAM0101"][name][:].astype("i2")
            values[1 if "leaf" in name else 2] = -9999
            instead(name, values)(file["BEAM0101"])
    with pytest.warns(UserWarning, match="1 of 3 in BEAM0101"):
        table, counts = read_granule(path, filters=Filters(sensitivity_min_tropical_evergreen=0))
    assert (counts["placed"], table["shot_number"].tolist()) == (2, [FIRST, FIRST + 2])
    assert table["pft_class"].tolist() == [4, 255]


# ---- files of another kind


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<!DOCTYPE html><html><title>Earthdata Login</title>", "it is an HTML page .*Earthdata Login.*log in"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is XML text that says 'AccessDenied'"),
        (b'{"error": "invalid_token"}', "it is JSON text that says 'invalid_token'"),
        (b"", "it is an empty file"),
        (bytes(5000), "it is zeros at its beginning"),
        (b"PK\x03\x04" + bytes(100), "it is a zip archive; unpack it"),
        (b"II*\0" + bytes(100), "it is a TIFF file"),
    ],
)
def test_what_was_saved_as_an_orbit_is_named(tmp_path, content, says):
    (tmp_path / NEW).write_bytes(content)
    with pytest.raises(PrepError, match=f"(?s){NEW}: can't be read as HDF5, {says}") as error:
        read_granule(tmp_path / NEW)
    assert "truncated" not in str(error.value)


def test_a_download_that_has_not_ended_is_named(tmp_path):
    path = write(tmp_path / f"{NEW}.part", whole([{}] * 50))
    assert len(read_granule(path)[0]["agbd"]) == 50  # whole, but not yet renamed
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(PrepError, match="truncated or damaged .*its name is that of a download that has not ended"):
        read_granule(path)
    with pytest.raises(PrepError, match=f"found 1 other files, first {NEW}.part, a download that has not ended"):
        find_granules([tmp_path])


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = write(tmp_path / NEW, whole([{}]))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refused)
    with pytest.raises(PrepError, match=f"{NEW}: can't be read: Permission denied$"):
        read_granule(path)


@pytest.mark.parametrize(
    ("name", "mark", "says"),
    [
        ("GEDI01_B_2019108002011_O01959_01_T03909_02_003_01_V002.h5", "rxwaveform", "L1B file .waveforms"),
        ("GEDI02_A_2019108002011_O01959_01_T03909_02_003_01_V002.h5", "rh", "L2A file .elevations and heights"),
        ("GEDI02_B_2019108002011_O01959_01_T03909_02_003_01_V002.h5", "pai_z", "L2B file .canopy cover"),
        ("GEDI04_C_2019108002011_O01959_01_T03909_02_001_01_V002.h5", "wsci", "L4C file .structural complexity"),
    ],
)
def test_another_product_of_gedi_is_named(tmp_path, name, mark, says):
    says = f"a GEDI {says}.*expected L4A .*data_prep download gedi"
    short_name = {"short_name": np.array([f"GEDI_L{name[5]}{name[7]}".encode()])}
    for path, also, tags in (
        (tmp_path / name, "shot_number", {}),
        (tmp_path / "mine.h5", mark, {}),
        (tmp_path / NEW, mark, {}),
        (tmp_path / "inside.h5", "shot_number", short_name),
    ):
        with h5py.File(path, "w") as file:
            file[f"BEAM0101/{also}"] = np.zeros(1)
            file.attrs.update(tags)
        with pytest.raises(PrepError, match=f"{path.name}: {says}"):
            read_granule(path)


def test_a_gridded_product_is_named_and_l4a_is_told_by_what_it_holds(tmp_path):
    grid = tmp_path / "GEDI04_B_MW019MW138_02_002_05_R01000M_V2.tif"
    grid.write_bytes(b"II*\0" + bytes(100))
    with pytest.raises(PrepError, match="it is a GEDI L4B file .gridded biomass.; expected L4A"):
        read_granule(grid)
    misnamed = write(tmp_path / "GEDI02_A_2019108002011_O01959_01_T03909_02_003_01_V002.h5", whole([{}]))
    assert len(read_granule(misnamed, filters=Filters(algorithm_10="keep"))[0]["agbd"]) == 1


def test_the_archive_s_own_name_for_a_granule_is_known(tmp_path):
    path = write(tmp_path / f"GEDI_L4A_AGB_Density_V2_1.{NEW}", whole([{}]))
    assert read_granule(path)[0]["granule"].tolist() == [NEW.removesuffix(".h5")]
