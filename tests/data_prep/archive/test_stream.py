from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import rasterio

from biomass_jax.data.raster import grid
from biomass_jax.errors import PrepError, RasterError
from data_prep.archive import stream as module
from data_prep.archive.fetch import AccessError
from data_prep.archive.stream import main, stream
from data_prep.hls.composite import composite
from data_prep.season import Season
from data_prep.synthetic.granule import Overpass, write_granule
from tests.data_prep.archive_gate import TOKEN, open_archive

pytestmark = pytest.mark.slow  # many, of a second and more each

SEASON = "2020-06-01/2020-09-16"
CLOUD = 0b10
# Three by three blocks of a file: the pixels of one can be clear while the others are not.
SHAPE = (600, 700)
DAY = Overpass(time=datetime(2020, 6, 20, 18, 45, 12))
HALF, CLOUDY, HALVES = (replace(DAY, time=DAY.time + timedelta(days=days)) for days in (8, 16, 24))
OTHER_HALF = replace(HALVES, time=HALVES.time + timedelta(seconds=24), processed=datetime(2020, 8, 1))


@pytest.fixture(scope="module")
def granules(tmp_path_factory):
    """A clear scene, one clear in a single block, one of clouds alone, and an overpass in two halves."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("archive")
    cloud = np.full(SHAPE, CLOUD, np.uint8)
    one_block = cloud.copy()
    one_block[300:400, 300:420] = 0
    west, east = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    west[:, 350:] = 255
    east[:, :340] = 255
    for place, fmask in ((DAY, cloud * 0), (HALF, one_block), (CLOUDY, cloud), (HALVES, west), (OTHER_HALF, east)):
        image = rng.integers(100, 6000, (*SHAPE, 6)).astype(np.int16)
        image[fmask == 255] = -9999
        write_granule(folder, image, fmask, place)
    return folder


@pytest.fixture
def archive(granules, monkeypatch):
    monkeypatch.setitem(grid.SETTINGS, "GDAL_HTTP_RETRY_DELAY", "0.01")
    with open_archive(granules) as archive:
        monkeypatch.setattr(module, "search_archive", archive.search)
        monkeypatch.setattr(module, "token", lambda: TOKEN)
        yield archive


def fetched(archive, granule):
    """Bytes of a granule's bands that were fetched, and that there are."""
    files = sorted((archive.store.folder / granule).glob("*.B*.tif"))
    known = {file.name: np.zeros(file.stat().st_size, bool) for file in files}
    for name, first, last in archive.asked:
        if name in known:
            known[name][first:last] = True
    return sum(int(seen.sum()) for seen in known.values()), sum(len(seen) for seen in known.values())


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_it_is_the_composite_of_the_downloaded_granules_to_the_byte(archive, granules, tmp_path, statistic):
    how = {"statistic": statistic, "min_clear": 1}
    path = stream("10SFF", SEASON, tmp_path / "far", **how, log=lambda line: None)
    assert path == tmp_path / "far/10SFF/10SFF_2020-06-01_2020-09-16.tif"
    near = composite(sorted(granules.iterdir()), tmp_path / "near.tif", season=Season.parse(SEASON), **how)
    assert near.used == {HALVES.granule: 600 * 340}
    assert path.read_bytes() == near.path.read_bytes()


def test_bands_are_fetched_only_where_something_is_clear(archive, tmp_path):
    stream("10SFF", SEASON, tmp_path, log=lambda line: None)
    got, there = fetched(archive, DAY.granule)
    assert 0.7 * there < got < 0.9 * there  # all but the overviews
    got, there = fetched(archive, CLOUDY.granule)
    assert got < 0.05 * there  # the files' heads
    got, there = fetched(archive, HALF.granule)
    assert 0.1 * there < got < 0.3 * there  # a block of nine
    assert not [name for name, _, _ in archive.asked if "B09" in name or "B10" in name]


def test_what_is_there_is_kept_until_granules_or_settings_change(archive, granules, tmp_path, capsys):
    asked = ["--tile", "10SFF", "--season", SEASON, "--out", str(tmp_path)]
    assert main(asked) == 0
    (path,) = tmp_path.rglob("*.tif")
    made = path.stat().st_mtime_ns
    assert main(asked) == 0
    assert f"{path}: made before of the same granules, kept" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == made
    for more in (["--min-clear", "2"], [], ["--overwrite"]):
        assert main([*asked, *more]) == 0
        assert path.stat().st_mtime_ns > made
        made = path.stat().st_mtime_ns
    with rasterio.open(path) as opened:
        assert '"min_clear": 3' in opened.tags()["COMPOSITE"]


def test_a_dry_run_asks_for_no_login(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "token", None)
    assert main(["--tile", "T10SFF", "--season", SEASON, "--out", str(tmp_path), "--dry-run"]) == 0
    assert "5 granules, 35 files" in capsys.readouterr().out
    assert archive.asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("polite", [True, False])
def test_a_refused_login_is_told_with_the_steps(archive, tmp_path, polite):
    archive.gate.polite = polite
    with pytest.raises(AccessError, match="HLS.L30.T10SFF.*\n.*Earthdata login"):
        stream("10SFF", SEASON, tmp_path, log_in=lambda: "stale", log=lambda line: None)
    assert list(tmp_path.rglob("*.tif")) == []


def test_a_failing_store_leaves_nothing(archive, tmp_path):
    archive.store.broken = True
    with pytest.raises(RasterError, match="give the same command again later"):
        stream("10SFF", SEASON, tmp_path, log=lambda line: None)
    assert list(tmp_path.rglob("*.tif")) == []


def test_nothing_found_and_granules_without_links_are_told(archive, tmp_path):
    with pytest.raises(PrepError, match=r"no hls granules found .*5 were left out, first .*: not in season"):
        stream("10SFF", "2019", tmp_path, log=lambda line: None)

    def without_fmask(**query):
        found = archive.search(**query)
        urls = found[0]["umm"]["RelatedUrls"]
        found[0]["umm"]["RelatedUrls"] = [one for one in urls if "Fmask" not in one["URL"]]
        return found

    with pytest.raises(PrepError, match=r"1 granules can't be read, first HLS.*no link to HLS.*Fmask.tif"):
        stream("10SFF", SEASON, tmp_path, search=without_fmask, log=lambda line: None)
