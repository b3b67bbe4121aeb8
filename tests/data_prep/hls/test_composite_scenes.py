import json
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS

from biomass_jax.errors import PrepError, RasterError
from data_prep.hls.composite import main, without_duplicates
from data_prep.hls.granules import find_scenes, open_scene
from data_prep.synthetic.granule import write_granule
from tests.data_prep.composite_by_hand import FIRST, SEASON, composite, pair, read


def test_of_two_granules_of_one_overpass_the_one_made_last_counts(tmp_path):
    made_at = datetime(2024, 1, 1)
    base = FIRST.time
    # minutes after the first, days until processing
    plan = {"old": (0, 1), "new": (9.9, 5), "far": (20, 0), "other day": (1440, 0)}
    names = {}
    for key, (minutes, days) in plan.items():
        place = replace(FIRST, time=base + timedelta(minutes=minutes), processed=made_at + timedelta(days=days))
        image = np.full((3, 4, 6), 900 if key == "old" else 100, np.int16)
        names[key] = write_granule(tmp_path, image, np.zeros((3, 4), np.uint8), place).name
    s30 = replace(FIRST, sensor="S30", time=base + timedelta(minutes=1), processed=made_at)
    names["s30"] = write_granule(tmp_path, image, np.zeros((3, 4), np.uint8), s30).name
    scenes = find_scenes(tmp_path)
    report = composite(scenes, tmp_path / "c.tif", season=SEASON, sensors=("L30", "S30"))
    assert report.duplicates == {names["old"]: names["new"]}
    assert set(report.scenes) == set(names.values()) - {names["old"]}
    assert (read(report.path)[:6] == 100).all()
    assert (read(report.path)[6] == 4).all()
    assert f"{names['old']}: duplicate of {names['new']}" in "\n".join(report.lines())
    with rasterio.open(report.path) as dataset:
        assert dataset.tags()["DUPLICATES"] == f"{names['old']}={names['new']}"


def test_ten_minutes_apart_are_two_overpasses(tmp_path):
    for minutes in (0, 10):
        place = replace(FIRST, time=FIRST.time + timedelta(minutes=minutes))
        write_granule(tmp_path, np.full((3, 4, 6), 100, np.int16), np.zeros((3, 4), np.uint8), place)
    kept, dropped = without_duplicates([open_scene(folder) for folder in find_scenes(tmp_path)])
    assert len(kept) == 2 and dropped == {}


def test_a_chain_of_overpasses_keeps_the_newest_whatever_the_order(tmp_path):
    for minutes, day in ((0, 3), (6, 2), (12, 1)):
        place = replace(FIRST, time=FIRST.time + timedelta(minutes=minutes), processed=datetime(2024, 1, day))
        write_granule(tmp_path, np.full((3, 4, 6), 100, np.int16), np.zeros((3, 4), np.uint8), place)
    scenes = [open_scene(folder) for folder in find_scenes(tmp_path)]
    first, second, third = (scene.granule.name for scene in scenes)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        kept, dropped = without_duplicates([scenes[k] for k in order])
        assert [scene.granule.name for scene in kept] == [first, third]
        assert dropped == {second: first}


SOUTH = replace(FIRST, tile="60KXX", left=600000.0)


def test_both_forms_of_a_southern_tile_are_one_ground(tmp_path):
    forms = [(32660, 7800040 - 1e7, False), (32760, 7800040, False), (32760, 7800040, True)]
    for day, (epsg, top, user_defined) in enumerate(forms):
        place = replace(SOUTH, epsg=epsg, top=top, user_defined=user_defined, time=FIRST.time + timedelta(days=day))
        write_granule(tmp_path, np.full((3, 4, 6), 100 * day, np.int16), np.zeros((3, 4), np.uint8), place)
    path = composite(find_scenes(tmp_path), tmp_path / "c.tif", season=SEASON).path
    assert (read(path)[:6] == 100).all()
    with rasterio.open(path) as dataset:  # of the first scene
        assert dataset.crs == CRS.from_epsg(32660)
        assert dataset.transform.f == 7800040 - 1e7


def test_the_same_numbers_in_the_other_hemisphere_are_other_ground(tmp_path):
    place = replace(SOUTH, epsg=32760, top=7800040)
    write_granule(tmp_path, np.full((3, 4, 6), 100, np.int16), np.zeros((3, 4), np.uint8), place)
    place = replace(SOUTH, epsg=32660, top=7800040 - 1e7 + 30, time=FIRST.time + timedelta(days=1))
    write_granule(tmp_path, np.full((3, 4, 6), 100, np.int16), np.zeros((3, 4), np.uint8), place)
    with pytest.raises(PrepError, match="expected one grid for all scenes of a tile"):
        composite(find_scenes(tmp_path), tmp_path / "c.tif", season=SEASON)


@pytest.mark.parametrize("fill", ["fmask", "band"])
def test_a_scene_of_nothing_but_fill(tmp_path, fill):
    pair(tmp_path, 100)
    image = np.full((3, 4, 6), 100, np.int16)
    fmask = np.zeros((3, 4), np.uint8)
    if fill == "fmask":
        fmask[:] = 255
    else:
        image[..., 3] = -9999
    bad = write_granule(tmp_path, image, fmask, replace(FIRST, time=FIRST.time + timedelta(days=3)))
    with pytest.raises(PrepError, match=rf"{bad.name}: all of its pixels are fill"):
        composite(find_scenes(tmp_path), tmp_path / "c.tif", season=SEASON)
    assert not (tmp_path / "c.tif").exists()


def test_a_scene_of_nothing_but_cloud_is_no_error(tmp_path):
    pair(tmp_path, 100)
    cloudy = replace(FIRST, time=FIRST.time + timedelta(days=3))
    name = write_granule(tmp_path, np.full((3, 4, 6), 7000, np.int16), np.full((3, 4), 2, np.uint8), cloudy).name
    report = composite(find_scenes(tmp_path), tmp_path / "c.tif", season=SEASON)
    assert report.counts[name] == {"observed": 12, "clear": 0}
    assert (read(report.path)[:6] == 100).all()
    assert (read(report.path)[6] == 1).all()


def test_reflectance_cut_to_integers(tmp_path):
    image = np.random.default_rng(0).integers(0, 2, (40, 50, 6)).astype(np.int16)
    folder = write_granule(tmp_path, image, np.zeros((40, 50), np.uint8), FIRST)
    with pytest.raises(PrepError, match=r"2,000 clear pixels are at most 1 in all bands: reflectance"):
        composite([folder], tmp_path / "c.tif", season=SEASON)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_two_halves_of_one_overpass_are_both_used(tmp_path, statistic):
    """The newer granule goes first where it has data, cloud or not; elsewhere the older one does."""
    older, newer = np.full((3, 4, 6), 900, np.int16), np.full((3, 4, 6), 300, np.int16)
    seen_older, seen_newer = np.zeros((3, 4), np.uint8), np.zeros((3, 4), np.uint8)
    seen_older[:, 3] = 255
    seen_newer[:, 0] = 255  # unseen
    seen_newer[0, 1] = 2  # cloud: the newer one tells so, the older one doesn't overrule it
    newer[1, 1, 4] = -9999
    names = [
        write_granule(tmp_path, image, fmask, replace(FIRST, time=FIRST.time + timedelta(minutes=m), processed=at)).name
        for image, fmask, m, at in (
            (older, seen_older, 0, datetime(2024, 1, 1)),
            (newer, seen_newer, 1, datetime(2024, 1, 2)),
        )
    ]
    report = composite(find_scenes(tmp_path), tmp_path / "c.tif", season=SEASON, statistic=statistic)
    expected = np.full((3, 4), 300)
    expected[:, 0], expected[1, 1], expected[0, 1] = 900, 900, -9999
    np.testing.assert_array_equal(read(report.path)[2], expected)
    np.testing.assert_array_equal(read(report.path)[6], expected > 0)  # one overpass counts once
    assert report.used == {names[0]: 4}
    assert f"{names[0]}: duplicate of {names[1]}, used for 4 pixels where that has no data" in "\n".join(report.lines())
    with rasterio.open(report.path) as dataset:
        tags = dataset.tags()
    assert tags["SCENES"] == names[1]
    assert json.loads(tags["COMPOSITE"])["counts"]["used_of_duplicates"] == {names[0]: 4}


def test_a_composite_without_values_is_refused_unless_asked_for(tmp_path, capsys):
    shape = (40, 50)  # 2,000 pixels, of which one is below 0.1 %
    fmask = np.full(shape, 2, np.uint8)
    fmask[3, 4] = 0
    image = np.full((*shape, 6), 700, np.int16)
    write_granule(tmp_path / "in", image, fmask, FIRST)
    dst = tmp_path / "c.tif"
    with pytest.raises(PrepError, match=r"c\.tif: pixels with 1 clear observations or more: 1 of 2,000; allow_empty"):
        composite(find_scenes(tmp_path / "in"), dst, season=SEASON)
    assert not dst.exists()
    assert composite(find_scenes(tmp_path / "in"), dst, season=SEASON, allow_empty=True).covered == 1
    command = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--season", SEASON.text, "--min-clear", "1"]
    assert main(command) == 1
    assert "1 of 2,000" in capsys.readouterr().err
    assert main([*command, "--allow-empty"]) == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [((7000, 9000), "probably Landsat"), ((2000, 30000), "beyond 0 to 16,000"), ((3, 60), "percent")],
)
def test_numbers_that_cannot_be_are_refused_unless_asked_for(tmp_path, values, says):
    image = np.random.default_rng(0).integers(*values, (40, 50, 6)).astype(np.int16)
    folder = write_granule(tmp_path, image, np.zeros((40, 50), np.uint8), FIRST)
    with pytest.raises(RasterError, match=rf"{folder.name}: percentiles .*{says}"):
        composite([folder], tmp_path / "c.tif", season=SEASON)
    report = composite([folder], tmp_path / "c.tif", season=SEASON, encoding="digital_numbers")
    np.testing.assert_array_equal(read(report.path)[:6], np.moveaxis(image, -1, 0))
    with rasterio.open(report.path) as dataset:
        assert json.loads(dataset.tags()["COMPOSITE"])["encoding"] == "digital_numbers"


def test_negative_values_over_water_are_no_reason(tmp_path):
    image = np.random.default_rng(0).integers(200, 4000, (60, 70, 6)).astype(np.int16)
    fmask = np.zeros((60, 70), np.uint8)
    image[:30, :, 4:], fmask[:30] = -50, 32
    folder = write_granule(tmp_path, image, fmask, FIRST)
    assert composite([folder], tmp_path / "c.tif", season=SEASON).covered == 4200


def test_cast_fill_of_granules_is_told(tmp_path):
    image = np.full((3, 4, 6), 700, np.int16)
    folder = write_granule(tmp_path, image, np.zeros((3, 4), np.uint8), FIRST)
    path = folder / f"{folder.name}.B05.tif"
    with rasterio.open(path) as dataset:
        profile, tags, values = dataset.profile, dataset.tags(), dataset.read().astype(np.uint16)
    values[0, 1, 2] = 55537
    layout = {"driver": "GTiff", "dtype": "uint16", "nodata": None, "tiled": False}
    with rasterio.open(path, "w", **{**profile, **layout}) as dataset:
        dataset.write(values)
        dataset.update_tags(**tags)
    report = composite([folder], tmp_path / "c.tif", season=SEASON, encoding="digital_numbers")
    assert report.covered == 11
    assert report.warnings == (f"{folder.name}: 1 values 55537, which is -9999 cast to uint16, taken as no-data",)
    with rasterio.open(report.path) as dataset:
        found = json.loads(dataset.tags()["COMPOSITE"])["counts"]["no_data_besides"]
    assert found == {f"{folder.name}: 55537, which is -9999 cast to uint16": 1}
