from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS

from biomass_jax.errors import PrepError
from data_prep.hls.composite import composite, without_duplicates
from data_prep.hls.granules import find_scenes, open_scene
from data_prep.synthetic.granule import write_granule
from tests.data_prep.composite_by_hand import FIRST, SEASON, pair, read


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
