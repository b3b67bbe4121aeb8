import json
import os
import shutil
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS

from biomass_jax.data.bands import BAND_NAMES
from biomass_jax.data.raster.image import open_image
from biomass_jax.errors import PrepError, RasterError
from data_prep.hls import composite as module
from data_prep.hls import composite_sums
from data_prep.hls.composite import composite_path, main, select
from data_prep.hls.granules import find_scenes
from data_prep.season import Season
from data_prep.synthetic.granule import write_granule
from tests.data.raster.cloud_optimized import faults
from tests.data_prep.composite_by_hand import (
    FIRST,
    SEASON,
    SHAPE,
    by_hand,
    chosen,
    clear_by_hand,
    composite,
    half_even,
    made,
    pair,
    read,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of granules of one tile, and {name: (image, fmask)} of all of them."""
    rng = np.random.default_rng(11)
    folder = tmp_path_factory.mktemp("world")
    arrays = {}
    for sensor, days in (("L30", (0, 8, 9, 40, 106)), ("S30", (1, 50))):
        for day in days:
            place = replace(FIRST, sensor=sensor, time=FIRST.time + timedelta(days=day))
            image, fmask = made(rng)
            write_granule(folder, image, fmask, place)
            arrays[place.granule] = (image, fmask)
    for day in (-1, 107, -366, 365):  # the day before, the day after, other years: poisoned
        place = replace(FIRST, time=FIRST.time + timedelta(days=day))
        write_granule(folder, np.full((*SHAPE, 6), 20000, np.int16), np.zeros(SHAPE, np.uint8), place)
    return folder, arrays


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize(
    ("sensors", "settings", "by_hand_settings"),
    [
        (("L30",), {}, {}),
        (("S30",), {"drop_water": True}, {"water": True}),
        (("L30", "S30"), {"min_clear": 3, "drop_high_aerosol": True}, {"min_clear": 3, "aerosol": True}),
    ],
)
def test_every_pixel_against_a_loop(world, tmp_path, statistic, sensors, settings, by_hand_settings):
    folder, arrays = world
    report = composite(
        find_scenes(folder), tmp_path / "c.tif", season=SEASON, sensors=sensors, statistic=statistic, **settings
    )
    expected = by_hand(chosen(arrays, sensors), statistic=statistic, **by_hand_settings)
    assert (read(tmp_path / "c.tif") == expected).all()
    assert report.covered == (expected[6] > 0).sum() > 0
    assert (expected[6] == 0).any()
    assert report.sensors == "+".join(sensors)


def test_the_file_says_what_it_is(world, tmp_path):
    folder, arrays = world
    report = composite(find_scenes(folder), tmp_path / "c.tif", season=SEASON, min_clear=2)
    assert faults(tmp_path / "c.tif") == []
    names = sorted((name for name in arrays if ".L30." in name), key=lambda name: name[15:])
    with rasterio.open(tmp_path / "c.tif") as dataset:
        tags = dataset.tags()
        assert dataset.descriptions == (*BAND_NAMES, "CLEAR_COUNT")
        assert dataset.dtypes == ("int16",) * 7
        assert dataset.nodata == -9999
        assert dataset.crs == CRS.from_epsg(32610)
        assert dataset.transform[:6] == (30, 0, 600000, 0, -30, 4100040)
    assert (tags["TILE"], tags["SEASON"], tags["SENSORS"]) == ("10SFF", SEASON.text, "L30")
    assert tags["SCENES"].split(",") == names == list(report.scenes)
    settings = json.loads(tags["COMPOSITE"])
    assert settings["statistic"] == "mean"
    assert settings["min_clear"] == 2
    assert settings["masked"] == ["fill", "cloud", "adjacent", "shadow", "snow"]
    seen = by_hand(chosen(arrays, ("L30",)))[6]  # with any number of clear scenes
    assert settings["counts"]["covered"] == report.covered == (seen >= 2).sum()
    assert settings["counts"]["below_min_clear"] == report.below_min_clear == (seen == 1).sum() > 0
    for name in names:
        image, fmask = arrays[name]
        clear = sum(
            clear_by_hand(v, c, False, False) for v, c in zip(image.reshape(-1, 6).tolist(), fmask.flat, strict=True)
        )
        assert settings["counts"]["by_scene"][name] == {"observed": int((fmask != 255).sum()), "clear": clear}
    assert len(report.out_of_season) == 4
    assert {name.split(".")[1] for name in report.other_sensors} == {"S30"}
    with open_image(str(tmp_path / "c.tif")) as image:
        assert (image.sensor, image.season, image.warnings) == ("L30", SEASON.text, [])
    text = "\n".join(report.lines())
    assert f"{(seen == 1).sum()} more have fewer clear observations than min_clear, 2" in text
    assert "5 scenes of 10SFF" in text and "4 out of season, 2 of other sensors" in text


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_three_clear_scenes_are_wanted_by_default_and_what_that_costs_is_counted(
    world, tmp_path, monkeypatch, capsys, statistic
):
    folder, arrays = world
    seen = by_hand(chosen(arrays, ("L30",)))[6]
    few = int(((seen == 1) | (seen == 2)).sum())
    monkeypatch.setattr(composite_sums, "MEMORY", 1)  # the tile in many windows
    report = module.composite(find_scenes(folder), tmp_path / "c.tif", season=SEASON, statistic=statistic)
    assert (report.min_clear, report.below_min_clear, report.covered) == (3, few, (seen >= 3).sum())
    assert few > 0
    got = read(tmp_path / "c.tif")
    expected = by_hand(chosen(arrays, ("L30",)), statistic=statistic)
    assert (got == np.where(seen >= 3, expected, [[[-9999]]] * 6 + [[[0]]])).all()
    assert main([str(folder), "--out", str(tmp_path), "--season", SEASON.text, "--statistic", statistic]) == 0
    assert f"\n  {few} more have fewer clear observations than min_clear, 3\n" in capsys.readouterr().out


def test_too_few_scenes_for_min_clear_are_told_with_their_number(tmp_path):
    folders = pair(tmp_path, 100, 200)
    says = r"3 clear observations or more \(min_clear; 12 more have fewer, of 2 scenes\): 0 of 12; allow_empty"
    with pytest.raises(PrepError, match=says):
        module.composite(folders, tmp_path / "c.tif", season=SEASON)
    assert not (tmp_path / "c.tif").exists()


def test_order_blocks_and_threads_change_no_byte(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    shape = (270, 300)  # more than one block in each direction
    folders = []
    for day in range(5):
        image, fmask = made(rng, shape)
        folders.append(write_granule(tmp_path, image, fmask, replace(FIRST, time=FIRST.time + timedelta(days=day))))
    for statistic, pixel_bytes in (("mean", 26), ("median", 60)):
        settings = {"season": SEASON, "statistic": statistic, "encoding": "digital_numbers"}  # half are negative
        settings["min_clear"] = 2  # what it costs is in the tags
        monkeypatch.undo()
        first = composite(folders, tmp_path / "a.tif", **settings).path.read_bytes()
        for threads, memory in ((1, 1), (3, pixel_bytes * 256 * 300)):  # blocks of files, all columns
            monkeypatch.setattr(composite_sums, "MEMORY", memory)
            order = rng.permutation(len(folders))
            path = composite([folders[k] for k in order], tmp_path / "b.tif", threads=threads, **settings).path
            assert path.read_bytes() == first
        assert read(path).shape == (7, *shape)


def test_a_composite_is_the_same_under_another_time_zone_and_with_commas_for_points(world, tmp_path, elsewhere):
    """Granules of the days before and after the season lie beside it, and would poison every pixel."""

    def made(name):
        arguments = ["--out", str(tmp_path / name), "--season", "2020-06-01/2020-09-16", "--min-clear", "1"]
        assert main([str(world[0]), *arguments]) == 0
        (path,) = (tmp_path / name).rglob("*.tif")
        return path.read_bytes()

    here = made("here")
    for zone in ("Kathmandu", "Marquesas"):
        elsewhere(zone)
        assert made(zone) == here


def test_many_clear_scenes_are_added_exactly(tmp_path):
    """Nine scenes of the largest and smallest int16 values, more than one group of scenes."""
    values = [32767] * 8 + [-32768]
    for day, value in enumerate(values):
        image = np.full((5, 7, 6), value, np.int16)
        write_granule(
            tmp_path, image, np.zeros((5, 7), np.uint8), replace(FIRST, time=FIRST.time + timedelta(days=day))
        )
    path = composite(find_scenes(tmp_path), tmp_path / "c.tif", season=SEASON).path
    assert (read(path)[:6] == half_even(Fraction(sum(values), 9))).all()
    assert (read(path)[6] == 9).all()
    path = composite(find_scenes(tmp_path), tmp_path / "d.tif", season=SEASON, statistic="median").path
    assert (read(path)[:6] == 32767).all()


def test_threads_never_add_to_the_same_rows_at_once(tmp_path, monkeypatch):
    add, active, together = composite_sums._add, [], []

    def slow(found, sums, number):
        together.append(any(np.shares_memory(number, other) for other in active))
        active.append(number)
        time.sleep(0.02)
        add(found, sums, number)
        active[:] = [other for other in active if other is not number]

    monkeypatch.setattr(composite_sums, "_add", slow)
    path = composite(pair(tmp_path, *range(12)), tmp_path / "c.tif", season=SEASON, threads=3).path
    assert together == [False] * 3
    assert (read(path)[6] == 12).all()


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize(("values", "expected"), [((2, 3), 2), ((3, 4), 4), ((-2, -3), -2), ((-3, -4), -4)])
def test_halves_go_to_even(tmp_path, statistic, values, expected):
    path = composite(pair(tmp_path, *values), tmp_path / "c.tif", season=SEASON, statistic=statistic).path
    assert (read(path)[:6] == expected).all()


def test_a_mean_that_is_the_fill_value_by_chance(tmp_path):
    report = composite(pair(tmp_path, -10000, -9998), tmp_path / "c.tif", season=SEASON, allow_empty=True)
    got = read(report.path)
    assert (got[:6] == -9999).all() and (got[6] == 0).all()
    assert report.covered == 0
    assert "no pixel has 1 clear observations" in report.warnings[0]


def test_more_clear_scenes_wanted_than_there_are(tmp_path):
    report = composite(pair(tmp_path, 100, 200), tmp_path / "c.tif", season=SEASON, min_clear=3, allow_empty=True)
    assert (read(report.path)[:6] == -9999).all() and (read(report.path)[6] == 0).all()
    assert "no pixel has 3 clear observations" in report.warnings[0]


def test_choice_by_name(world):
    folder, arrays = world
    folders = find_scenes(folder)
    with pytest.raises(
        PrepError, match=r"no scene of L30 in season 2021-01-01/2021-02-01; found 11 of L30\+S30 from 2019-06-01 to"
    ):
        select(folders, season=Season.parse("2021-01-01/2021-02-01"))
    with pytest.raises(PrepError, match="wrong tile: 10SFF, expected 10SGF"):
        select(folders, season=SEASON, tile="10SGF")
    with pytest.raises(PrepError, match="wrong tile: 10SGF, expected 10SFF"):
        select([*folders, folder / "HLS.L30.T10SGF.2020183T184512.v2.0"], season=SEASON)
    with pytest.raises(PrepError, match=r"version 1\.5"):
        select([*folders, folder / "HLS.L30.T10SFF.2020183T184512.v1.5"], season=SEASON)
    with pytest.raises(PrepError, match="no granules given"):
        select([], season=SEASON)
    found = select(folders, season=SEASON, sensors=("L30", "S30"), tile="T10SFF")
    assert {path.name for path in found.folders} == set(arrays)


def test_settings_that_make_no_sense(world, tmp_path):
    folders = find_scenes(world[0])
    for settings, says in (
        ({"sensors": ("L8",)}, "expected L30, S30 or both"),
        ({"sensors": ()}, "expected L30, S30 or both"),
        ({"statistic": "mode"}, "expected mean or median"),
        ({"min_clear": 0}, "expected 1 or more"),
    ):
        with pytest.raises(PrepError, match=says):
            composite(folders, tmp_path / "c.tif", season=SEASON, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_named_and_nothing_is_written(world, tmp_path):
    shutil.copytree(world[0], tmp_path / "granules")
    name = next(name for name in world[1] if ".L30." in name)
    path = tmp_path / "granules" / name / f"{name}.B06.tif"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RasterError, match=rf"{path}.*truncated"):
        composite(find_scenes(tmp_path / "granules"), tmp_path / "out" / "c.tif", season=SEASON)
    assert not (tmp_path / "out").exists()


def test_a_block_that_does_not_decode_is_named(world, tmp_path):
    shutil.copytree(world[0], tmp_path / "granules")
    name = next(name for name in world[1] if ".L30." in name)
    path = tmp_path / "granules" / name / f"{name}.B06.tif"
    with rasterio.open(path) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    for statistic in ("mean", "median"):
        with pytest.raises(RasterError, match=str(path)):
            composite(
                find_scenes(tmp_path / "granules"), tmp_path / "out" / "c.tif", season=SEASON, statistic=statistic
            )
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command(world, tmp_path, capsys):
    other = replace(FIRST, tile="10SGF", left=699960.0)
    write_granule(tmp_path / "more", np.full((3, 4, 6), 100, np.int16), np.zeros((3, 4), np.uint8), other)
    folders = [str(world[0]), str(tmp_path / "more")]
    out = tmp_path / "out"
    # the tiles lie at 37 north: 1 May to 1 October, so the scene of 31 May and that of 16 September count too
    assert main([*folders, "--out", str(out), "--season", "2020", "--min-clear", "1"]) == 0
    season = Season.parse("2020-05-01/2020-10-01")
    assert composite_path(out, "10SFF", season) == out / "10SFF" / "10SFF_2020-05-01_2020-10-01.tif"
    for tile in ("10SFF", "10SGF"):
        assert composite_path(out, tile, season).exists()
    text = capsys.readouterr().out
    assert "7 scenes of 10SFF, 2020-05-01/2020-10-01, L30" in text and "1 scenes of 10SGF" in text

    table = tmp_path / "table.json"
    table.write_text('[[-90, "06-01", "09-16"]]')
    arguments = ["--out", str(out), "--season", "2020", "--season-table", str(table), "--tile", "T10SFF"]
    arguments += ["--sensors", "L30+S30", "--statistic", "median", "--min-clear", "3", "--threads", "1"]
    assert main([*folders, *arguments, "--drop-water", "--drop-high-aerosol"]) == 0
    got = read(composite_path(out, "10SFF", SEASON))
    assert (got == by_hand(list(world[1].values()), statistic="median", min_clear=3, water=True, aerosol=True)).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--season", "2018"], "no scene of L30 in season 2018-05-01/2018-10-01"),
        (["--season", "soon"], "expected START/STOP"),
        (["--season", "2020", "--tile", "10SGF"], "tile 10SGF: no granules of it; found tiles 10SFF"),
        (["--season", "2020", "--season-table", "nowhere.json"], "nowhere.json: can't read the table of seasons"),
        (["--season", "2020", "--sensors", "L8"], "expected L30, S30 or both"),
    ],
)
def test_errors_of_the_command_are_one_line(world, tmp_path, capsys, arguments, says):
    assert main([str(world[0]), "--out", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_threads_stop_soon_after_an_error(world, tmp_path, monkeypatch):
    """A scene that fails ends the work: scenes that no thread has begun are not read."""
    opened = []
    folders = find_scenes(world[0])
    season = Season.parse("2019-01-01/2022-01-01")
    reader = module.Scene.reader

    def failing(self):
        opened.append(self.granule.name)
        raise PrepError("broken")

    monkeypatch.setattr(module.Scene, "reader", failing)
    with pytest.raises(PrepError, match="broken"):
        composite(folders, tmp_path / "c.tif", season=season, statistic="median", threads=1)
    assert len(opened) < 9
    monkeypatch.setattr(module.Scene, "reader", reader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert composite(folders, tmp_path / "c.tif", season=season, threads=1).path.exists()
