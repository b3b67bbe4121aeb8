"""The whole chain: one result however it is cut and ended; what is done is kept; what fails is named."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest
import rasterio

from biomass_jax.errors import BiomassError, PrepError
from biomass_jax.runtime.lock import one_writer
from data_prep.prepare import run as prepare
from data_prep.prepare.runner import Runner, SerialExecutor, attempt, open_executor
from data_prep.prepare.state import StepJob, StepRecords
from data_prep.synthetic.forest.world import write_forest_world

pytestmark = pytest.mark.slow  # many, of a second and more each

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "configs" / "prepare.py"
TILES = ("10SFF", "10SGF")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Granules of two small neighbouring tiles, and orbits over them."""
    folder = tmp_path_factory.mktemp("world")
    write_forest_world(folder, shape=(200, 200), scenes=2, tiles=2)
    return folder / "granules"


def command(out, *more):
    settings = ["season=2020", "chips.size=64", "chips.min_labels=5", "chips.max_nodata=0.3"]
    settings += ["splits.block_km=2", "splits.buffer_m=0", "shards.records_per_shard=4"]
    settings += ["composite.min_clear=1"]  # of two scenes
    return ["--config", str(CONFIG), "--out", str(out), *(f"--config.{text}" for text in settings), *map(str, more)]


def given(world, out):
    """A folder with its own copy of the granules."""
    shutil.copytree(world, out / "granules")
    return out


def files(out):
    """SHA-256 of all that a run leaves, but for records of when inputs were changed."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        record = name.parts[0] == "state" and path.suffix == ".json"
        if path.is_file() and name.parts[0] != "granules" and path.name != ".biomass_jax.lock" and not record:
            found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of one run in this process, and what it said; not to be written to."""
    out = given(world, tmp_path_factory.mktemp("plain"))
    with redirect_stdout(io.StringIO()) as said:
        assert prepare.main(command(out)) == 0
    return out, said.getvalue()


@pytest.fixture(scope="module")
def plain(finished):
    """The files that such a run makes."""
    return files(finished[0])


def test_shards_open_in_tfds_and_the_report_tells_how_they_came(finished):
    import tensorflow_datasets as tfds

    out, said = finished
    told = report(out)
    assert told["errors"] == {}
    assert [told["tiles"][tile]["status"] for tile in TILES] == ["finished", "finished"]
    assert {told["tiles"][tile]["composite"]["below_min_clear"] for tile in TILES} == {0}
    builder = tfds.builder_from_directory(out / "shards")
    counts = {split: len(builder.as_data_source(split)) for split in builder.info.splits}
    assert counts == told["shards"]["counts"]
    assert set(counts) == {"train", "val", "test"}
    kept = sum(told["tiles"][tile]["chips"]["kept"] for tile in TILES)
    assert kept == sum(told["splits"]["counts"].values())
    used = sum(told["tiles"][tile]["labels"]["counts"]["used"] for tile in TILES)
    assert 0 < used <= sum(orbit["counts"][-1][1] for orbit in told["orbits"].values())
    (row,) = [line.split() for line in said.splitlines() if line.startswith("10SFF")]
    assert row[0:2] == ["10SFF", "2"]
    assert row[-1] == "finished"


def test_what_is_done_is_kept_until_settings_or_inputs_change(finished, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "out")
    written = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*.*")
        if path.name not in ("report.json", ".biomass_jax.lock")
    }
    first = files(out)
    capsys.readouterr()
    assert prepare.main(command(out)) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "composite 2 of 2 done before, unchanged" in capsys.readouterr().out

    assert prepare.main(command(out, "--config.splits.seed=5")) == 0  # nothing before the splits is done again
    said = capsys.readouterr().out
    assert "chips     2 of 2 done before, unchanged" in said
    assert "splits    all: is made again: splits.seed: was 0, now 5\n" in said
    assert files(out)["chips/chips.parquet"] != first["chips/chips.parquet"]

    band = next((out / "granules" / "hls").glob("HLS.L30.T10SGF.*/*.B04.tif"))
    os.utime(band)
    (out / "labels" / "10SFF" / "10SFF_2020-05-01_2020-10-01_agbd.tif").write_bytes(b"")
    assert prepare.main(command(out)) == 0
    said = capsys.readouterr().out
    assert f"composite 10SGF: is made again: input granules/hls/{band.parent.name} has changed\n" in said
    assert "composite 1 of 2 done before, unchanged" in said
    label = "labels/10SFF/10SFF_2020-05-01_2020-10-01_agbd.tif"
    assert f"labels    10SFF: is made again: output {label} has changed\n" in said
    assert files(out) == first


PAM = '<PAMDataset><PAMRasterBand band="1">{}</PAMRasterBand></PAMDataset>'


@pytest.fixture
def steps(tmp_path):
    """`done(**settings)`: what has changed since the step was done last, which it then is again."""
    folder, made, polygons = tmp_path / "granule", tmp_path / "made.tif", tmp_path / "biomes.shp"
    folder.mkdir()
    for path in (folder / "B04.tif", made, polygons, polygons.with_suffix(".dbf")):
        path.write_text("x")
    records = StepRecords(tmp_path)

    def done(**settings):
        job = StepJob("composite", "10SFF", dict, {}, settings, (folder, polygons), (made,))
        record, why = records.finished(job)
        if record is None:
            records.finish(job, records.begin(job), {}, [])
        return why

    return done


def test_what_lies_beside_inputs_and_outputs_counts_and_is_named(steps, tmp_path):
    assert [steps(a=1, b=(2,)), steps(a=1, b=[2])] == ["", ""]
    beside = tmp_path / "granule" / "B04.tif.aux.xml"
    beside.write_text(PAM.format("<Histograms/>"))  # by a viewer
    assert steps(a=1, b=[2]) == ""
    beside.write_text(PAM.format("<NoDataValue>0</NoDataValue>"))
    assert [steps(a=1, b=[2]), steps(a=1, b=[2])] == ["input granule has changed", ""]
    (tmp_path / "made.tif.aux.xml").write_text(PAM.format("<NoDataValue>0</NoDataValue>"))
    assert steps(a=1, b=[2]) == "output made.tif has changed"
    (tmp_path / "biomes.dbf").write_text("other names")
    assert steps(a=3, b=[2]) == "a: was 1, now 3, and 1 more"
    assert [steps(a=3, b=[2], c=5), steps(a=3, b=[2], c=5)] == ["c: was None, now 5", ""]


def test_a_record_of_an_older_version_is_not_lost_for_its_missing_fields(steps, tmp_path):
    steps(a=1)
    path = tmp_path / "state" / "composite" / "10SFF.json"
    stored = json.loads(path.read_text())
    del stored["software"]
    path.write_text(json.dumps(stored))
    assert steps(a=1) == "" and "software" not in json.loads(path.read_text())


def test_another_version_of_the_software_is_named(steps, monkeypatch):
    steps(a=1)
    monkeypatch.setattr("data_prep.prepare.state.SOFTWARE_VERSION", "99.0")
    assert steps(a=1).startswith("biomass_jax: was ") and steps(a=1) == ""


def test_one_bad_granule_fails_its_tile_alone_and_is_named(world, tmp_path, capsys):
    out = given(world, tmp_path)
    band = next((out / "granules" / "hls").glob("HLS.L30.T10SGF.*/*.B05.tif"))
    whole = band.read_bytes()
    band.write_bytes(whole[: len(whole) // 2])
    gedi = out / "granules" / "gedi"
    orbit = min(gedi.glob("*.h5"))
    with h5py.File(orbit, "r+") as file:
        del file["BEAM1011/agbd"]
    (gedi / "GEDI04_A_2020001000000_O00001_01_T00001_02_002_02_V002.h5").write_bytes(b"nothing")
    (gedi / "GEDI02_A_2020001000000_O00001_01_T00001_02_003_01_V002.h5").write_bytes(b"nothing")
    assert prepare.main(command(out)) == 1
    told = report(out)
    assert {tile: about["status"] for tile, about in told["tiles"].items()} == {"10SFF": "finished", "10SGF": "failed"}
    assert set(told["errors"]) == {
        "composite 10SGF",
        "gedi GEDI02_A_2020001000000_O00001_01_T00001_02_003_01_V002",
        "gedi GEDI04_A_2020001000000_O00001_01_T00001_02_002_02_V002",
    }
    assert "a GEDI L2A file" in told["errors"]["gedi GEDI02_A_2020001000000_O00001_01_T00001_02_003_01_V002"]
    lacks = "BEAM1011 has no dataset agbd, which is needed"
    assert told["orbits"][orbit.stem]["skipped_beams"] == {"BEAM1011": lacks}
    assert f"{orbit.name}: 1 of 8 beams skipped: {lacks}" in told["warnings"]
    assert band.name in told["errors"]["composite 10SGF"]
    assert told["tiles"]["10SFF"]["chips"]["kept"] > 0
    assert (out / "shards" / "dataset_info.json").is_file()
    said = capsys.readouterr()
    assert f"error: composite 10SGF: {band}" in said.err
    assert "failed: composite 10SGF" in said.out

    for path in gedi.glob("*O00001*"):
        path.unlink()
    band.write_bytes(whole)
    assert prepare.main(command(out)) == 0
    assert report(out)["tiles"]["10SGF"]["status"] == "finished"


def test_granules_are_discarded_once_used_and_not_missed(world, tmp_path, plain, capsys):
    out = given(world, tmp_path)
    other = out / "granules" / "hls" / "HLS.L30.T10SFF.2019160T184512.v2.0"  # of no use this season
    shutil.copytree(next((out / "granules" / "hls").glob("HLS.L30.T10SFF.*")), other)
    assert prepare.main(command(out, "--discard-granules")) == 0
    assert [path.name for path in (out / "granules" / "hls").iterdir()] == [other.name]
    assert list((out / "granules" / "gedi").iterdir()) == []
    assert files(out) == plain
    assert prepare.main(command(out)) == 0
    assert files(out) == plain
    capsys.readouterr()
    assert prepare.main(command(out, "--config.composite.min_clear=2")) == 1
    assert "2 of its inputs were discarded" in capsys.readouterr().err


def test_what_min_clear_costs_is_in_the_report_and_on_the_line(world, tmp_path, capsys):
    out = given(world, tmp_path)
    line = command(out, "--config.tiles=('10SFF',)", "--config.composite.min_clear=2", "--config.allow_empty=true")
    assert prepare.main(line) == 0
    seen = report(out)["tiles"]["10SFF"]["composite"]
    with rasterio.open(next(out.glob("composites/10SFF/*.tif"))) as dataset:
        covered, tags = (dataset.read(7) > 0).sum(), dataset.tags()
    shutil.rmtree(out / "composites")
    assert prepare.main(command(out, "--config.tiles=('10SFF',)", "--config.allow_empty=true")) == 0
    with rasterio.open(next(out.glob("composites/10SFF/*.tif"))) as dataset:
        once = (dataset.read(7) == 1).sum()
    assert once > 0
    assert (seen["covered"], seen["min_clear"], seen["below_min_clear"]) == (covered, 2, once)
    assert json.loads(tags["COMPOSITE"])["counts"]["below_min_clear"] == once
    assert f"covered, {once / 40000:.1%} less than 2 times clear" in capsys.readouterr().out


def test_granules_that_a_link_leads_to_are_left(world, tmp_path):
    source = given(world, tmp_path / "archive")
    out = tmp_path / "out"
    out.mkdir()
    (out / "granules").symlink_to(source / "granules")
    assert prepare.main(command(out, "--discard-granules", "--config.tiles=('10SFF',)")) == 0
    assert len(list((source / "granules").rglob("*.h5"))) == 2
    assert len(list((source / "granules" / "hls").iterdir())) == 4


class Archive:
    """The world's granules behind the archive's search and download."""

    def __init__(self, world):
        self.files = {path.name: path for path in world.rglob("*.*") if path.is_file()}
        self.asked = []

    def search(self, **query):
        hls = query["short_name"].startswith("HLS")
        wanted = f".{query['granule_name'].split('.')[2]}." if hls else "GEDI04"
        names = sorted(name for name in self.files if wanted in name)
        found = {}
        for name in names:
            granule = name.rsplit(".", 2)[0] if hls else name.removesuffix(".h5")
            found.setdefault(granule, []).append({"URL": f"https://archive/{name}", "Type": "GET DATA"})
        return [{"umm": {"GranuleUR": name, "RelatedUrls": urls, "DataGranule": {}}} for name, urls in found.items()]

    def open_url(self, url, headers):
        self.asked.append(url.rsplit("/")[-1])
        body = self.files[self.asked[-1]].read_bytes()
        kind = {"Content-Length": str(len(body)), "Content-Type": "image/tiff"}
        return SimpleNamespace(status_code=200, headers=kind, iter_content=lambda size: [body], close=lambda: None)


def test_granules_are_downloaded_where_none_are_given(world, tmp_path, plain, monkeypatch, capsys):
    archive = Archive(world)
    monkeypatch.setattr("data_prep.prepare.chain.search_archive", archive.search)
    monkeypatch.setattr("data_prep.prepare.chain.log_in", lambda: archive.open_url)
    line = command(tmp_path, "--config.granules.download=true", "--config.tiles=('T10SFF', '10SGF')")
    assert prepare.main([*line, "--discard-granules"]) == 0
    assert len(archive.asked) == len(set(archive.asked)) == 4 * 7 + 2
    assert {name: sha for name, sha in files(tmp_path).items() if name != "report.json"} == {
        name: sha for name, sha in plain.items() if name != "report.json"
    }
    assert prepare.main(line) == 0  # and what was discarded isn't downloaded again
    assert len(archive.asked) == 30
    capsys.readouterr()
    del archive.files["HLS.L30.T10SGF.2020160T184512.v2.0.B05.tif"]
    assert prepare.main([*line, "--config.granules.max_cloud=50"]) == 1
    said = capsys.readouterr().err
    assert "error: download 10SGF: 1 scenes can't be had, first HLS.L30.T10SGF.2020160T184512.v2.0" in said


@pytest.mark.slow
def test_processes_make_the_same_files(world, tmp_path, plain):
    out = given(world, tmp_path)
    assert prepare.main(command(out, "--workers", "2")) == 0
    assert files(out) == plain


@pytest.mark.slow
def test_another_time_zone_and_commas_for_points_make_the_same_files(world, tmp_path, plain, elsewhere):
    out = given(world, tmp_path)
    elsewhere("Kathmandu")
    assert prepare.main(command(out)) == 0
    assert files(out) == plain


@pytest.mark.slow
def test_a_dask_cluster_makes_the_same_files(world, tmp_path, plain):
    distributed = pytest.importorskip("distributed")
    out = given(world, tmp_path)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert prepare.main(command(out, "--scheduler", cluster.scheduler_address)) == 0
    assert files(out) == plain


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_killed_at_any_moment_goes_on(world, tmp_path, plain, workers):
    out = given(world, tmp_path)
    line = [sys.executable, "-m", "data_prep.prepare", *command(out, "--workers", workers)]
    draw = random.Random(workers)
    began = [(out / name) for name in ("composites", "labels", "shards")]
    for sign in began:  # in the middle of three different steps
        run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not sign.exists() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        run.kill()
        run.wait()
    assert subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert files(out) == plain
    assert [path.name for path in out.rglob(".*") if path.name != ".biomass_jax.lock"] == []


def test_sigterm_stops_with_75(world, tmp_path, monkeypatch, capsys):
    def at_work(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(prepare, "prepare", at_work)
    assert prepare.main(command(tmp_path)) == prepare.STOPPED == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    with one_writer(tmp_path):
        before = [path.name for path in tmp_path.rglob("*")]
        assert prepare.main(command(tmp_path)) == 1
        assert [path.name for path in tmp_path.rglob("*")] == before
    said = capsys.readouterr().err
    assert f"error: {tmp_path}: another run is at work there: process {os.getpid()} on " in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert prepare.main(command(tmp_path / "out")) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: can't write to this folder: File exists\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.seson=2020"], 'Did you mean "season"'),
        (["--config.chips.size=many"], "chips.size=many"),
        (["--config.composite.statistic=mode"], "config.composite.statistic is 'mode'; expected one of mean, median"),
        (["--config.season=1 May"], "season '1 May' is not two dates"),
        (["--config.season="], "season is not set"),
        (["--workers", "0"], "--workers 0: expected 1 or more"),
        (["stray"], "unexpected arguments ['stray']"),
        (["--config.granules.gedi=absent"], "granules.gedi: absent: no such folder"),
        (["--config.chips.biomes=absent.shp"], "chips.biomes and chips.biome_field go together"),
        (["--config.chips.biomes=absent.shp", "--config.chips.biome_field=name"], "absent.shp: can't be read"),
        ([], "no granules there"),
    ],
)
def test_bad_settings_are_told_in_a_line(tmp_path, capsys, more, message):
    assert prepare.main(command(tmp_path, *more)) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_options_change_the_packaged_config_as_fields_do(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(prepare, "prepare", lambda config, *_, **__: seen.append(config) or {"tiles": {}, "errors": {}})
    out = ["--out", str(tmp_path / "out")]
    options = ["--season", "2020", "--tiles", "10SFF,10SGF", "--splits.block-km", "7", "--composite.drop-water"]
    fields = ["season=2020", "tiles=('10SFF', '10SGF')", "splits.block_km=7", "composite.drop_water=True"]
    assert prepare.main([*out, *options]) == 0
    assert prepare.main([*out, *(f"--config.{field}" for field in fields)]) == 0
    assert seen[0] == seen[1]
    assert (seen[0]["season"], seen[0]["tiles"], seen[0]["splits"]["block_km"]) == ("2020", ("10SFF", "10SGF"), 7.0)
    assert seen[0]["composite"]["drop_water"] and seen[0]["gedi"]["degrade_ones"] == (0, 3, 8)


def test_values_of_a_config_of_ones_own_get_their_types(tmp_path):
    own = tmp_path / "own.py"
    head = "from biomass_jax.runtime.settings import to_config\nfrom data_prep.settings import Prepare\n"
    head += "def get_config():\n    config = to_config(Prepare)\n"
    texts = "    with config.ignore_type():\n        config.chips.min_labels, config.season = '30', 2020\n"
    texts += "        config.composite.sensors, config.allow_empty = 'S30', 'false'\n    return config\n"
    own.write_text(head + texts)
    found = prepare.read_config(own, ["--config.label_years=1"])
    assert (found["chips"]["min_labels"], found["season"], found["label_years"]) == (30, "2020", 1)
    assert found["composite"]["sensors"] == ("S30",) and found["allow_empty"] is False
    own.write_text(head + "    config.chips.min_labels = 20.5\n    return config\n")
    with pytest.raises(PrepError, match=r"own\.py: .*min_labels.* 20\.5"):
        prepare.read_config(own)
    own.write_text(head + texts.replace("'30'", "20.5"))
    with pytest.raises(BiomassError, match=r"config\.chips\.min_labels is 20\.5; expected a whole number"):
        prepare.read_config(own)


@pytest.mark.slow
def test_what_comes_out_empty_is_an_error_unless_asked_for(world, tmp_path, capsys):
    """No chip at all; then no shot of that season, which names the orbits and each tile."""
    out = given(world, tmp_path)
    assert prepare.main(command(out, "--config.chips.min_labels=4097")) == 1
    assert "error: splits all: no tile has chips; there is nothing to train on: 0 of 18; allow_empty" in (
        capsys.readouterr().err
    )
    assert prepare.main(command(out, "--config.chips.min_labels=4097", "--config.allow_empty=true")) == 0
    assert not (out / "shards").exists()
    assert report(out)["errors"] == {}
    assert prepare.main(command(out, "--config.gedi.max_agbd=-1")) == 1
    errors = report(out)["errors"]
    assert "no shot of" in errors["gedi all"]
    assert all("on its pixels with data (0 shots" in errors[f"labels {tile}"] for tile in TILES)


def test_an_unknown_config_and_an_absent_scheduler_are_named(tmp_path, capsys, monkeypatch):
    assert prepare.main(["--config", str(tmp_path / "absent.py"), "--out", str(tmp_path / "out")]) == 1
    assert "absent.py: no such config file" in capsys.readouterr().err
    pytest.importorskip("distributed")
    monkeypatch.setattr("data_prep.prepare.runner.CONNECT_SECONDS", 0.2)
    with pytest.raises(PrepError, match="no Dask scheduler answers"), open_executor(1, "tcp://127.0.0.1:9"):
        pass


def ends_its_worker(path):
    if path.name == "2":
        os._exit(9)
    path.write_text("done")
    return {}


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_own_job_alone(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    paths = [made / str(number) for number in range(5)]
    jobs = [StepJob("step", path.name, ends_its_worker, {"path": path}, {}, (), (path,)) for path in paths]
    with open_executor(2) as executor:
        runner = Runner(StepRecords(tmp_path), executor, lambda line: None)
        runner.run("step", jobs, str)
    assert list(runner.done["step"]) == ["0", "1", "3", "4"]
    assert list(runner.errors) == ["step 2"]
    assert "its worker ended twice" in runner.errors["step 2"]


def breaks(number):
    raise ZeroDivisionError(number)


def test_an_error_that_nobody_foresaw_is_an_outcome_too():
    outcome = SerialExecutor().submit(attempt, breaks, {"number": 3}).result()
    assert outcome.result is None
    assert outcome.error == "ZeroDivisionError: 3"
    assert "in breaks" in outcome.trace
