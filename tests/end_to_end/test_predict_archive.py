"""`biomass-jax predict --tile 10SFF --season 2020`: from NASA's archive, here a stand-in, to a map."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import rasterio

from biomass_jax import load
from data_prep.hls.composite import composite
from data_prep.season import season_of_year
from data_prep.synthetic.granule import Overpass, write_granule
from tests.data_prep.archive_gate import open_archive, stand_in
from tests.prediction.stubs import random_bundle


@pytest.fixture(scope="module")
def archive(tmp_path_factory, root):
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("archive")
    for days in (0, 16):
        fmask = np.where(rng.random((70, 80)) < 0.2, 0b10, 0).astype(np.uint8)
        place = replace(Overpass(), time=Overpass().time + timedelta(days=days))
        write_granule(folder, rng.integers(100, 6000, (70, 80, 6)).astype(np.int16), fmask, place)
    with open_archive(folder) as archive:
        archive.found_as = stand_in(archive, tmp_path_factory.mktemp("library"), root)
        yield archive


def predict(archive, *words):
    command = [sys.executable, "-m", "biomass_jax.cli", "predict", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | archive.found_as, timeout=500)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_tile_and_a_season_become_a_map(archive, tmp_path):
    bundle, workdir = random_bundle(tmp_path / "bundle"), tmp_path / "maps"
    given = ("--bundle", str(bundle), "--workdir", str(workdir), "--tile", "10SFF", "--season", "2020")
    given += ("--min-clear", "1")
    status, said = predict(archive, *given)
    assert status == 0, said
    (path,) = workdir.glob("*_agbd.tif")
    assert path.name == "10SFF_2020-05-01_2020-10-01_agbd.tif"
    how = {"season": season_of_year(2020, 36.5), "min_clear": 1}
    near = composite(sorted(archive.store.folder.iterdir()), tmp_path / "near.tif", **how)
    load(bundle).predict_file(near.path, tmp_path / "near_agbd.tif")
    with rasterio.open(path) as ours, rasterio.open(tmp_path / "near_agbd.tif") as expected:
        np.testing.assert_array_equal(ours.read(1), expected.read(1))
        assert (ours.read(1) >= 0).mean() > 0.9 and ours.read(1).std() > 0.1
        assert ours.tags()["DATA_SOURCES"] == "; ".join(near.scenes) and len(near.scenes) == 2
        assert ours.tags()["SEASON"] == "2020-05-01/2020-10-01"
    status, said = predict(archive, *given)
    assert status == 0 and "made before of the same granules, kept" in said and "finished before" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tile", "10SFF"], "wants --tile 10SFF and --season 2020 together"),
        (["--max-cloud", "20", "--inputs", "a.tif"], "wants --tile 10SFF and --season 2020 together"),
        (["--season", "2020", "--tile", "224"], "an MGRS tile such as 10SFF"),
        (["--season", "2020", "--tile", "10SFF", "--inputs", "a.tif"], "without --inputs"),
    ],
)
def test_half_a_wish_is_refused_before_anything_is_asked(archive, tmp_path, words, says):
    asked = len(archive.asked)
    status, said = predict(archive, "--bundle", "b", "--workdir", str(tmp_path / "w"), *words)
    assert status == 2 and says in said and "Traceback" not in said
    assert len(archive.asked) == asked and not (tmp_path / "w").exists()
