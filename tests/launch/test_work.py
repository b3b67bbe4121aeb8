"""Tables of maps as a user makes them, and one worker that goes through them."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from biomass_jax import cli
from biomass_jax.errors import BundleError, RasterError
from biomass_jax.prediction import run as prediction
from biomass_jax.prediction.predictor import Predictor
from data_prep.archive import stream as archive
from launch import work, work_table
from launch.work_table import Table, at_work
from tests.prediction.stubs import coded_image, nir, read_map, stub_bundle, write_raster

pytestmark = pytest.mark.slow  # many, of a second and more each


@pytest.fixture
def model(monkeypatch):
    """The model that gives NIR back, in place of any bundle; how often it was opened."""
    opened = []

    def open_stub(config, shardings):
        opened.append(config.bundle)
        settings = {field: getattr(config, field) for field in prediction.PREDICTOR_FIELDS}
        del settings["base"]  # of what is opened
        return Predictor(stub_bundle(), model_fn=nir, **settings, **shardings)

    monkeypatch.setattr(prediction, "open_predictor", open_stub)
    return opened


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """A folder of three images, the second of which is none; the present folder is the one above it."""
    monkeypatch.setattr(work_table, "POLL", 0.01)
    monkeypatch.chdir(tmp_path)
    write_raster(Path("scenes/a.tif"), coded_image(64, 64))
    write_raster(Path("scenes/sub/c.tif"), coded_image(64, 64) + 7)
    Path("scenes/b.tif").write_text("no image")
    return tmp_path / "scenes"


def make(*options, bundle="model"):
    return cli.main(
        ["work", "make", "table", "--out", "maps", "--bundle", bundle, "--tile", "64", "--stride", "48", *options]
    )


def test_a_table_of_images_is_worked_through_and_a_bad_one_is_named(scenes, model, capsys, monkeypatch, tmp_path):
    assert make("--inputs", "scenes") == 0
    assert capsys.readouterr().out == "table: 3 items; `biomass-jax work run table` works on them\n"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # a worker may start anywhere
    assert cli.main(["work", "run", "../table", "--share", "0/1"]) == 1
    said = capsys.readouterr().out
    why = f"{scenes}/b.tif: "
    assert said.startswith(f"3 items: 2 done, 1 failed\n  1 failed, {why}")
    assert "not recognized as a raster" in said
    maps = tmp_path / "maps"
    found = {path.relative_to(maps).as_posix() for path in maps.rglob("*") if path.is_file()}
    assert found == {"a_agbd.tif", "sub/c_agbd.tif"}
    assert not list(maps.glob(".work*"))
    assert cli.main(["work", "show", "../table", "--csv", "items.csv"]) == 0
    with open("items.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["item"], row["state"], row["tries"]) for row in rows] == [
        (f"{scenes}/a.tif", "done", "1"),
        (f"{scenes}/b.tif", "failed", "3"),
        (f"{scenes}/sub/c.tif", "done", "1"),
    ]
    assert "not recognized" in rows[1]["error"] and rows[1]["owner"] == rows[0]["owner"]

    # The map of a file that is mended, of the same table.
    write_raster(scenes / "b.tif", coded_image(64, 64))
    before = (maps / "a_agbd.tif").stat().st_mtime_ns
    assert cli.main(["work", "again", "../table"]) == 0
    assert cli.main(["work", "run", "../table"]) == 0
    assert len(model) == 3  # to make the table, and once for each worker, whatever it maps
    assert capsys.readouterr().out.endswith("1 items wait again\n3 items: 3 done\n")
    np.testing.assert_array_equal(read_map(maps / "a_agbd.tif"), read_map(maps / "b_agbd.tif"))
    assert (maps / "a_agbd.tif").stat().st_mtime_ns == before


def test_tiles_and_seasons_are_mapped_from_the_archive(scenes, model, capsys, monkeypatch, tmp_path):
    asked = []

    def stream(tile, season, out, *, log, **settings):
        asked.append((tile, season, settings))
        if tile == "11SAA" and len(asked) < 3:
            raise RasterError(f"{tile}: the archive is away")
        path = Path(out) / tile / f"{tile}_{season}.tif"
        return write_raster(path, coded_image(64, 64))

    monkeypatch.setattr(archive, "stream", stream)
    Path("tiles.txt").write_text("T10SFF\n11SAA\n")
    given = ["--tiles", "tiles.txt", "--seasons", "2020,2021", "--sensors", "L30,S30", "--tries", "2"]
    assert make(*given) == 0
    assert cli.main(["work", "run", "table", "--share", "0/1"]) == 0
    order = [("10SFF", "2020"), ("11SAA", "2020"), ("10SFF", "2021"), ("11SAA", "2021"), ("11SAA", "2020")]
    assert [(tile, season) for tile, season, _ in asked] == order
    assert asked[0][2] == {"sensors": ["L30", "S30"], "max_cloud": 100.0, "min_clear": 3}
    names = {f"{tile}_{season}_agbd.tif" for tile, season in order}
    assert {path.name for path in Path("maps").glob("*.tif")} == names
    assert Path("maps/composites/10SFF/10SFF_2020.tif").is_file()
    rows = Table(Path("table")).rows()
    assert [(row.item["tile"], row.item["season"], row.tries) for row in rows] == [
        *[("10SFF", "2020", 1), ("11SAA", "2020", 2), ("10SFF", "2021", 1), ("11SAA", "2021", 1)]
    ]
    assert rows[1].error == "11SAA: the archive is away"


def test_a_model_that_is_gone_ends_the_worker_and_fails_no_item(scenes, model, capsys, monkeypatch):
    """Before the first item, or at one, as where its weights are damaged: no item would fare better."""
    assert make("--inputs", "scenes/*.tif") == 0

    def damaged(*arguments):
        raise BundleError("model: its weights are damaged")

    for place in ("biomass_jax.prediction.maps.OneMap", "biomass_jax.prediction.run.open_predictor"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, damaged)
            assert cli.main(["work", "run", "table"]) == 1
        assert capsys.readouterr().err == "error: model: its weights are damaged\n"
        assert {(row.state, row.tries) for row in Table(Path("table")).rows()} == {("waiting", 0)}


def test_a_map_of_an_item_that_was_taken_away_is_thrown_away(scenes, model, monkeypatch):
    """The worker was taken for dead while it mapped: what another one makes stays as it is."""
    make("--inputs", "scenes/a.tif")
    monkeypatch.setattr(work.TableWorker, "holds", lambda self, claim: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.TableWorker, "claims", lambda self: iter([self._take()]))
        assert work.run(Table(Path("table"))) == 0
    assert not list(Path("maps").rglob("*.tif"))


def test_drafts_of_the_dead_are_cleared_away_and_no_others(scenes, model):
    make("--inputs", "scenes/a.tif")
    table = Table(Path("table"))
    drafts = Path("maps") / f".work_{table.id}"
    with at_work(table) as worker:
        for name in (worker.name, "dead"):
            (drafts / name).mkdir(parents=True)
        work._clear_away(drafts, table)
        assert [path.name for path in drafts.iterdir()] == [worker.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --inputs, the images, or --tiles and --seasons together"),
        (["--inputs", "scenes", "--tiles", "10SFF", "--seasons", "2020"], "give either --inputs"),
        (["--tiles", "10SFF"], "give either --inputs"),
        (["--tiles", "10SFF,Oregon", "--seasons", "2020"], "found 'Oregon'; expected MGRS tiles as 10SFF"),
        (["--tiles", "empty.txt", "--seasons", "2020"], "found 'nothing'; expected MGRS tiles"),
        (["--inputs", "nowhere"], "nowhere: no such file or folder"),
        (["--inputs", "scenes", "--tries", "0"], "config.tries is 0; expected a number from 1 on"),
        (["--inputs", "scenes", "--matmul-precision", "lowest"], "matmul_precision is 'lowest'"),
        (["--inputs", "scenes", "--stride", "65"], "stride 65 is larger than the tile (64)"),
        (["--inputs", "scenes", "--mask", "mask.tif"], "give both or neither"),
    ],
)
def test_what_makes_no_table(scenes, model, capsys, options, message):
    Path("empty.txt").touch()
    assert make(*options) == 1
    assert message in capsys.readouterr().err
    assert not Path("table").exists()


def test_a_table_needs_a_model(scenes, capsys):
    assert make("--inputs", "scenes", bundle="nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["work", "make", "table", "--out", "maps", "--inputs", "scenes"]) == 1
    assert "--bundle is not given; add --bundle DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "0/2", "--workers", "2"], "--share is of one worker; --workers shares by itself"),
        (["--scheduler", "tcp://h:8786"], "--workers is None; expected a number of 1 or more, with --scheduler too"),
        (["--workers", "0"], "--workers is 0; expected a number of 1 or more"),
    ],
)
def test_what_no_worker_can_be_told(scenes, model, capsys, options, message):
    make("--inputs", "scenes")
    assert cli.main(["work", "run", "table", *options]) == 1
    assert message in capsys.readouterr().err


def test_several_workers_on_a_machine_with_gpus_are_refused(scenes, model, capsys, monkeypatch):
    make("--inputs", "scenes")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert cli.main(["work", "run", "table", "--workers", "2"]) == 1
    assert "one worker uses all of them" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["3", "2/2", "a/b", "-1/2"])
def test_a_share_is_one_of_so_many(share, capsys):
    with pytest.raises(SystemExit):
        cli.main(["work", "run", "table", f"--share={share}"])
    assert "expected I/N, from 0/N to N-1/N" in capsys.readouterr().err


def test_settings_of_a_table_are_those_of_its_maps(scenes, model):
    """Paths are whole, and what says nothing of a map isn't kept."""
    write_raster(Path("mask.tif"), np.full((9, 9, 1), 10, np.uint8), named=False, nodata=0)
    make("--inputs", "scenes", "--mask", "mask.tif", "--mask-keep", "10,95")
    settings = json.loads(Path("table/work.json").read_text())["settings"]
    assert settings["out"] == os.path.abspath("maps")
    assert settings["predict"]["mask"] == os.path.abspath("mask.tif")
    assert settings["predict"]["mask_keep"] == [10, 95]
    assert not {"inputs", "overwrite", "mode"} & set(settings["predict"])
