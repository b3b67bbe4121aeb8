"""GEDI orbits: beams, datasets, boxes and damage in tiny files made here, and the real granule."""

import json
import warnings

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from biomass_jax.errors import PrepError
from data_prep.gedi import orbits as gedi
from data_prep.gedi.footprints import read_settings
from data_prep.gedi.orbits import Filters, find_granules
from tests.data_prep.gedi_files import BEAMS, DAY, FIRST, GOOD, NEW, OLD, read_granule, whole, write


def test_columns_have_their_types_and_values(tmp_path):
    shot = {
        "lon_lowestmode": -121.123456789,
        "lat_lowestmode": 37.000000001,
        "delta_time": DAY + 0.25,
        "agbd": 12.5,
        "agbd_se": 2.5,
        "sensitivity": 0.985,
        "degrade_flag": 38,
        "selected_algorithm": 2,
        "land_cover_data/pft_class": 6,
        "land_cover_data/leaf_off_flag": 255,
    }
    table, _ = read_granule(write(tmp_path / NEW, whole([shot])))
    found = {name: (values.dtype.str.lstrip("<|"), values[0]) for name, values in table.items()}
    assert found == {
        "shot_number": ("u8", FIRST),
        "lon": ("f8", -121.123456789),
        "lat": ("f8", 37.000000001),
        "time": ("M8[us]", np.datetime64("2020-07-01T00:00:00.250000")),
        "beam": ("U8", "BEAM0101"),
        "agbd": ("f4", 12.5),
        "agbd_se": ("f4", 2.5),
        "sensitivity": ("f4", np.float32(0.985)),
        "l4_quality_flag": ("u1", 1),
        "degrade_flag": ("u1", 38),
        "selected_algorithm": ("u1", 2),
        "pft_class": ("u1", 6),
        "leaf_off_flag": ("u1", 255),
        "granule": ("O", NEW.removesuffix(".h5")),
    }
    assert list(table) == list(found)


def test_shot_numbers_keep_every_digit_and_sort_the_shots(tmp_path):
    beams = {beam: [{}] * 3 for beam in reversed(BEAMS)}
    table, _ = read_granule(write(tmp_path / NEW, beams))
    assert table["shot_number"].dtype == np.uint64
    assert table["shot_number"].tolist() == list(range(FIRST, FIRST + 24))
    assert table["beam"].tolist() == [beam for beam in reversed(BEAMS) for _ in range(3)]
    assert len(set(table["shot_number"].astype(np.float64))) < 24  # what a float64 would do to them


def test_shot_numbers_that_went_through_float_are_refused(tmp_path):
    path = write(tmp_path / NEW, whole([{}]))
    with h5py.File(path, "r+") as file:
        del file["BEAM0101/shot_number"]
        file["BEAM0101/shot_number"] = np.array([float(FIRST)])
    with pytest.raises(PrepError, match="BEAM0101/shot_number is float64, expected uint64"):
        read_granule(path)


def test_beams_of_fill_alone_leave_nothing(tmp_path):
    fill = dict.fromkeys(GOOD, 0) | {"agbd": -9999.0}
    path = write(tmp_path / NEW, whole([{}]) | {"BEAM0010": [fill] * 5, "BEAM0011": [fill]})
    with pytest.warns(UserWarning, match=f"{NEW}: dropped shots .*: 5 of 5 in BEAM0010, 1 of 1 in BEAM0011"):
        table, counts = read_granule(path)
    assert (counts["shots"], counts["algorithm_run_flag"]) == (7, 1)
    assert table["beam"].tolist() == ["BEAM0101"]


def test_absent_beams_are_named(tmp_path):
    path = write(tmp_path / NEW, {beam: [{}] for beam in BEAMS[:-2]})
    with pytest.warns(UserWarning, match="beams absent: BEAM1000, BEAM1011"):
        assert len(read_granule(path)[0]["agbd"]) == 6
    with h5py.File(path, "w") as file:
        file.create_group("ANCILLARY")
    with pytest.raises(PrepError, match="no beams; found \\['ANCILLARY'\\]"):
        read_granule(path)


def test_an_absent_column_is_named_and_holds_no_plausible_value(tmp_path):
    path = write(tmp_path / NEW, whole([{}]), lacking=("agbd_se", "land_cover_data/pft_class"))
    with pytest.warns(UserWarning) as caught:
        table, _ = read_granule(path)
    assert ["agbd_se" in str(w.message) for w in caught] == [True, False]
    assert "land_cover_data/pft_class" in str(caught[1].message)
    assert np.isnan(table["agbd_se"][0])
    assert table["pft_class"][0] == 255


def test_an_absent_dataset_that_a_filter_needs_is_an_error_until_the_filter_is_off(tmp_path):
    path = write(tmp_path / NEW, whole([{}]), lacking=("land_cover_data/leaf_off_flag",))
    with pytest.raises(PrepError, match="BEAM0000 has no dataset land_cover_data/leaf_off_flag, which filter leaf_off"):
        read_granule(path)
    with pytest.warns(UserWarning, match="column leaf_off_flag holds 255"):
        table, _ = read_granule(path, filters=Filters(leaf_off_flag=False))
    assert table["leaf_off_flag"].tolist() == [255]


@pytest.mark.parametrize("name", ["agbd", "lon_lowestmode", "delta_time", "shot_number"])
def test_what_no_table_can_do_without_is_an_error(tmp_path, name):
    path = write(tmp_path / NEW, whole([{}]), lacking=(name,))
    for box in (None, (-122, 36, -120, 38)):
        with pytest.raises(PrepError, match=f"{NEW}: BEAM0000 has no .*{name}.*needed"):
            read_granule(path, bbox=box)


def test_a_box_reads_only_the_chunks_that_hold_its_shots(tmp_path):
    shots = [{"lon_lowestmode": -121 + 0.01 * k, "agbd": k} for k in range(40)]
    path = write(tmp_path / NEW, whole(shots), chunk=4)
    box = (-120.835, 36.9, -120.755, 37.1)  # shots 17 to 24: chunks 4, 5 and 6
    expected = read_granule(path, bbox=box)[0]
    assert expected["agbd"].tolist() == list(range(17, 25))
    with h5py.File(path, "r+") as file:
        for name in ("agbd", "delta_time", "l4_quality_flag", "land_cover_data/pft_class"):
            for chunk in (0, 1, 2, 3, 7, 8, 9):
                file["BEAM0101"][name].id.write_direct_chunk((4 * chunk,), b"no deflate stream")
    table, counts = read_granule(path, bbox=box)
    assert {name: values.tolist() for name, values in table.items()} == {
        name: values.tolist() for name, values in expected.items()
    }
    assert list(counts.items())[:3] == [("shots", 40), ("box", 8), ("algorithm_run_flag", 8)]
    with pytest.raises(PrepError, match="truncated or damaged"):
        read_granule(path)
    with pytest.raises(PrepError, match="truncated or damaged"):
        read_granule(path, bbox=(-120.855, 36.9, -120.755, 37.1))  # one shot more lies in a chunk more


def test_a_box_works_on_datasets_without_chunks_and_across_the_antimeridian(tmp_path):
    path = write(tmp_path / NEW, whole([{"lon_lowestmode": lon} for lon in (179.9, -179.9, 0.0, 179.4, -179.4)]))
    with h5py.File(path, "r+") as file:
        values = file["BEAM0101/agbd"][:]
        del file["BEAM0101/agbd"]
        file["BEAM0101/agbd"] = values + np.arange(5, dtype=np.float32)
    table, _ = read_granule(path, bbox=(179.5, 30, -179.5, 40))
    assert table["agbd"].tolist() == [100, 101]
    with pytest.raises(PrepError, match="south < north"):
        read_granule(path, bbox=(0, 40, 1, 30))


def test_a_box_without_shots_is_no_warning(tmp_path):
    table, counts = read_granule(write(tmp_path / NEW, whole([{}] * 3)), bbox=(0, 0, 1, 1))
    assert len(table["time"]) == counts["box"] == 0
    assert counts["shots"] == 3


def test_a_subsetter_s_name_keeps_the_release_and_a_renamed_file_tells_it_inside(tmp_path):
    shots = whole([{}, {"selected_algorithm": 10}])
    for name in (OLD.replace(".h5", "_subsetted.h5"), OLD.replace(".h5", "_sub.h5")):
        table, _ = read_granule(write(tmp_path / name, shots))
        assert table["granule"].tolist() == [OLD.removesuffix(".h5")]
    path = write(tmp_path / "mine.h5", shots)
    with pytest.raises(PrepError, match="mine.h5: release unknown"):
        read_granule(path)
    assert len(read_granule(path, filters=Filters(algorithm_10="keep"))[0]["agbd"]) == 2
    with h5py.File(path, "r+") as file:
        file.create_group("METADATA/DatasetIdentification").attrs["fileName"] = OLD
    assert len(read_granule(path)[0]["agbd"]) == 1


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, share):
    path = write(tmp_path / NEW, whole([{}] * 50))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PrepError, match=f"{NEW}: can't be read as HDF5, truncated or damaged .*download it again"):
        read_granule(path)
    with pytest.raises(PrepError, match="no such file"):
        read_granule(tmp_path / "none.h5")


def test_datasets_that_disagree_are_errors(tmp_path):
    path = write(tmp_path / NEW, whole([{}] * 3))
    with h5py.File(path, "r+") as file:
        del file["BEAM0101/agbd"]
        file["BEAM0101/agbd"] = np.zeros(2, np.float32)
    with pytest.raises(PrepError, match="BEAM0101/agbd has shape \\(2,\\), shot_number \\(3,\\)"):
        read_granule(path)
    path = write(tmp_path / NEW, whole([{}]))
    with h5py.File(path, "r+") as file:
        del file["BEAM0101/degrade_flag"]
        file["BEAM0101/degrade_flag"] = np.array([256], np.int16)
    with pytest.raises(PrepError, match="BEAM0101/degrade_flag holds 256, which is no uint8"):
        read_granule(path)


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
        (without("land_cover_data"), "BEAM0110 has no dataset land_cover_data/leaf_off_flag, which filter leaf_off"),
        (instead("land_cover_data", np.zeros(3)), "BEAM0110 has no dataset land_cover_data/leaf_off_flag, which"),
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
            table, counts, _, skipped = gedi.read_granule(path, bbox=box)
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
        table, counts = read_granule(path)
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


def test_the_command_prints_and_stores_the_counts_and_goes_on_after_a_bad_granule(tmp_path, capsys):
    folder = tmp_path / "granules" / "gedi"
    folder.mkdir(parents=True)
    write(folder / NEW, whole([{}, {"l4_quality_flag": 0}, {"delta_time": DAY + 365 * 86400.0}]))
    bad = folder / NEW.replace("O08852", "O00001")
    bad.write_bytes(b"no HDF5")
    arguments = ["--out", str(tmp_path), "--tile", "10SFF", "--season", "2020", "--degrade-ones", "all"]
    assert gedi.main(arguments) == 1
    said = capsys.readouterr()
    assert f"error: {bad}: can't be read as HDF5" in said.err
    assert "error: 1 of 2 granules failed" in said.err
    assert "3 shots -> 3 box -> 3 algorithm_run_flag -> 2 l4_quality_flag" in said.out
    dst = tmp_path / "footprints" / NEW.replace(".h5", ".parquet")
    stored = json.loads(pq.read_schema(dst).metadata[b"biomass_jax"])
    assert stored["counts"][-1] == ["season", 1]
    assert stored["season"] == ["2020-05-01/2020-10-01"]
    assert (stored["release"], stored["version"], stored["granule"]) == ("002_02", "V002", NEW.removesuffix(".h5"))
    assert stored["filters"]["degrade_ones"] == []
    assert stored["filters"]["degrade_tens"] == [0, 1, 2, 3, 4, 6]
    assert stored["box"][0] < -121 < stored["box"][2]
    first = dst.read_bytes()
    bad.unlink()
    assert gedi.main(arguments) == 0
    assert dst.read_bytes() == first
    assert gedi.main(["--out", str(tmp_path), "--season", "2020"]) == 1
    assert "needs a latitude" in capsys.readouterr().err


def test_two_files_of_one_granule_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    whole_file, subset = tmp_path / NEW, tmp_path / "a" / NEW.replace(".h5", "_sub.h5")
    for path in (whole_file, subset):
        path.touch()
    with pytest.raises(PrepError, match="the same granule"):
        find_granules([tmp_path])
    assert find_granules([whole_file, whole_file]) == [whole_file]
    (tmp_path / "b").mkdir()
    for name in (f"._{NEW}", NEW.replace(".h5", ".H5")):  # the first is what macOS puts beside a file
        (tmp_path / "b" / name).touch()
    assert find_granules([tmp_path / "b"]) == [tmp_path / "b" / NEW.replace(".h5", ".H5")]
    with pytest.raises(PrepError, match="no .h5 files in .*empty; expected"):
        find_granules([(tmp_path / "empty").mkdir() or tmp_path / "empty"])


def test_the_real_granule(samples):
    path = samples / "GEDI04_A_2020036151358_O06515_02_T00198_02_002_01_V002.h5"
    bare = Filters(agbd_valid=False, degrade_tens=(), degrade_ones=(), algorithm_10="keep", leaf_off_flag=False)
    table, counts = read_granule(path, filters=bare)
    assert list(counts.items()) == [("shots", 461), ("algorithm_run_flag", 438), ("l4_quality_flag", 321)]
    assert table["agbd"].astype(np.float64).sum() == pytest.approx(11387.7768, abs=5e-5)
    table, counts = read_granule(path)
    assert list(counts.values()) == [461, 438, 321, 321, 321, 321, 321]
    assert set(table["time"].astype("datetime64[D]").astype(str)) == {"2020-02-05"}
    box = (51.4, 36.0, 51.6, 36.2)
    inside = read_granule(path, bbox=box)[0]
    expected = (table["lon"] >= 51.4) & (table["lon"] <= 51.6) & (table["lat"] >= 36) & (table["lat"] <= 36.2)
    assert 0 < expected.sum() < 321
    assert inside["shot_number"].tolist() == table["shot_number"][expected].tolist()
