"""GEDI orbits: beams, datasets, boxes and damage in tiny files made here, and the real granule."""

import json

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from biomass_jax.errors import PrepError
from data_prep.gedi import orbits as gedi
from data_prep.gedi.orbits import Filters, find_granules
from tests.data_prep.gedi_files import BEAMS, DAY, FIRST, GOOD, NEW, OLD, read_granule, whole, write


def test_columns_have_their_types_and_values(tmp_path):
    shot = {
        "lon_lowestmode": -121.123456789,
        "lat_lowestmode": 37.000000001,
        "delta_time": DAY + 0.25,
        "agbd": 12.5,
        "agbd_se": 2.5,
        "agbd_t": 3.0,
        "agbd_t_se": 0.5,
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
        "agbd_sigma": ("f4", 4.6875),  # 2 * 3 * 0.5 * 1.5625
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
        table, _ = read_granule(path, filters=Filters(sensitivity_min_tropical_evergreen=0))
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
    assert dict(stored["counts"])["season"] == 1
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
    bare = Filters(
        agbd_valid=False,
        degrade_tens=(),
        degrade_ones=(),
        algorithm_10="keep",
        leaf_off_flag=False,
        water_persistence_below=0,
        urban_proportion_below=0,
        sensitivity_min=0,
        sensitivity_min_tropical_evergreen=0,
    )
    table, counts = read_granule(path, filters=bare)
    assert list(counts.items()) == [("shots", 461), ("algorithm_run_flag", 438), ("l4_quality_flag", 321)]
    assert table["agbd"].astype(np.float64).sum() == pytest.approx(11387.7768, abs=5e-5)
    table, counts = read_granule(path)
    assert list(counts.values()) == [461, 438, 321, 321, 321, 321, 321, 321, 321, 321, 321]
    assert set(table["time"].astype("datetime64[D]").astype(str)) == {"2020-02-05"}
    box = (51.4, 36.0, 51.6, 36.2)
    inside = read_granule(path, bbox=box)[0]
    expected = (table["lon"] >= 51.4) & (table["lon"] <= 51.6) & (table["lat"] >= 36) & (table["lat"] <= 36.2)
    assert 0 < expected.sum() < 321
    assert inside["shot_number"].tolist() == table["shot_number"][expected].tolist()
