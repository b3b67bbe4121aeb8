"""`make demo`: its chain of commands, what it leaves, and what it does when a stage fails."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import tensorflow_datasets as tfds

from biomass_jax.runtime.lock import one_writer
from launch import demo


def test_stages_pass_on_what_the_one_before_wrote(tmp_path):
    commands = (command for _, command in demo.stages(tmp_path))
    synthetic, prepare, preview, pretrain, finetune, calibrate, evaluate, final, report, convert, predict = commands
    out = synthetic[synthetic.index("--out") + 1]
    assert prepare[prepare.index("--out") + 1] == preview[preview.index("--out") + 1] == out == str(tmp_path)
    assert f"--config.data.path={out}/shards" in pretrain and f"--config.data.path={out}/shards" in finetune
    assert f"--config.init_from={pretrain[pretrain.index('--workdir') + 1]}/best" in finetune
    assert calibrate[calibrate.index("--bundle") + 1] == f"{finetune[finetune.index('--workdir') + 1]}/best"
    for command in (evaluate, final):
        assert f"--config.bundle={calibrate[calibrate.index('--output') + 1]}" in command
    assert {final[final.index("--workdir") + 1], evaluate[evaluate.index("--workdir") + 1]} <= set(report)
    assert f"--config.inputs={out}/granules/hls/{demo.GRANULE}" in predict
    assert f"--config.bundle={convert[convert.index('--output') + 1]}" in predict
    assert demo.Path(convert[convert.index("--input") + 1]).is_file()


def test_a_stage_that_fails_stops_the_demo(tmp_path, monkeypatch, capfd):
    with pytest.raises(demo.DemoError, match="'Fail' failed with exit code 3"):
        demo.run("Fail", ["-c", "raise SystemExit(3)"], tmp_path)

    marker = tmp_path / "ran"
    monkeypatch.setattr(
        demo, "stages", lambda out: [("A", ["-c", "raise SystemExit(3)"]), ("B", ["-c", f"open({str(marker)!r}, 'w')"])]
    )
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "demo: 'A' failed with exit code 3" in capfd.readouterr().err
    assert not marker.exists()


def test_the_estimate_follows_from_what_this_machine_has_done():
    assert demo.estimate([], compiling=True) is None  # nothing is known of the machine yet
    assert len(demo.USUAL_SECONDS) == len(demo.stages(demo.Path("out")))
    half_as_fast = [2.0 * seconds for seconds in demo.USUAL_SECONDS[:4]]
    assert demo.estimate(half_as_fast, compiling=False) == 2 * sum(demo.USUAL_SECONDS[4:])
    assert demo.estimate(demo.USUAL_SECONDS, compiling=False) == 0


def test_compiling_does_not_count_as_the_speed_of_stages_that_compile_nothing():
    """A first demo as fast as usual, before the fine-tuning: what is left is what that usually takes."""
    first = [run + more for run, more in zip(demo.USUAL_SECONDS, demo.COMPILING_SECONDS, strict=True)]
    assert demo.estimate(first[:4], compiling=True) == sum(first[4:])
    assert demo.estimate(demo.USUAL_SECONDS[:4], compiling=False) == sum(demo.USUAL_SECONDS[4:]) < sum(first[4:])


def test_a_second_demo_in_the_folder_is_refused_and_deletes_nothing(tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    with one_writer(tmp_path, demo.LOCK):
        assert demo.main(["--out", str(tmp_path)]) == 1
    assert f"make demo: {tmp_path}: another run is at work there: process {os.getpid()} on " in capsys.readouterr().err
    assert (tmp_path / "maps").is_dir()


def test_the_rivals_of_the_score_are_those_of_plain_formulas():
    rng = np.random.default_rng(0)
    bands = rng.normal(500, 100, (900, 6))
    z = (bands - bands.mean(0)) / bands.std(0)
    answer = 80 + 9 * z[:, 0] * z[:, 1] * z[:, 4] - 5 * z[:, 2] ** 2 + 3 * z[:, 5]
    unseen = slice(700, None)
    found = demo.rmse_of_one_pixel((bands[:700], answer[:700]), (bands[unseen], answer[unseen]))
    assert found < 0.5 < answer[unseen].std() / 10  # such a cubic is learnt; what no pixel tells isn't
    noise = rng.normal(0, 7, 900)
    assert 6.5 < demo.rmse_of_one_pixel((bands, noise + answer), (bands, noise + answer)) < 7
    assert demo.cubic(z).shape == (900, 6 + 21 + 56)

    truth = rng.uniform(0, 200, (40, 50))
    label = np.full((8, 8), -1.0)
    label[2, 3], label[7, 0] = truth[12 + 2, 21 + 3] + 3, truth[12 + 7, 21] - 4
    chip = {"label": label, "transform": np.array([30, 0, 600000 + 30 * 21, 0, -30, 4100040 - 30 * 12])}
    assert demo.rmse_of_oracle([chip], truth, (600000.0, 4100040.0)) == pytest.approx(np.sqrt(12.5))


def check_how_sure(out, scores):
    """The map's four bands, and whether the intervals hold the labels of the test chips."""
    (path,) = (out / "biomass").glob("*_agbd.tif")
    with rasterio.open(path) as file:
        values = file.read()
        assert file.descriptions == ("agbd", "agbd_sd", "agbd_lo", "agbd_hi")
        assert file.units == ("Mg ha-1",) * 4
        assert (file.tags()["INTERVAL_LEVEL"], file.nodata) == ("0.9", -1)
    there = values[0] != -1
    assert all(np.array_equal(band != -1, there) for band in values)
    agbd, sd, low, high = (band[there] for band in values)
    assert sd.min() > 0
    assert (low <= agbd).all() and (agbd <= high).all()
    assert (out / "scores" / "uncertainty.png").read_bytes().startswith(b"\x89PNG")
    sure = scores["uncertainty"]
    # One sd for all pixels, that of their mean, would hold as many in all, but not in each bin of the prediction.
    assert 0.85 <= sure["coverage"] <= 0.95
    assert 0.7 < sure["z_variance"] < 1.4


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it takes 4 minutes; a machine may be slow or busy
def test_demo_makes_shards_a_map_and_pictures(root, tmp_path, capsys):
    kept = tmp_path / "notes.txt"
    kept.touch()
    old = [tmp_path / "maps" / "old.tif", tmp_path / "shards" / "old"]
    for path in old:
        path.parent.mkdir()
        path.touch()
    command = [sys.executable, "-m", "launch.demo", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():  # so that what CI prints tells the demo's time
        print("", *re.findall(r"^== .*Done in .*|^   [\d.]+ s$", done.stdout, re.M), sep="\n")
    assert kept.exists()
    assert not any(path.exists() for path in old)
    assert str(tmp_path / "shards") in done.stdout

    builder = tfds.builder_from_directory(tmp_path / "shards")
    counts = {split: len(builder.as_data_source(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 97, "val": 21, "test": 21}
    chip = builder.as_data_source("test")[0]
    assert chip["image"].shape == (112, 112, 6)
    assert (chip["label"] >= 0).sum() >= 5
    assert (tmp_path / "preview" / f"{demo.TILE}.png").read_bytes().startswith(b"\x89PNG")

    granule = tmp_path / "granules" / "hls" / demo.GRANULE
    maps = tmp_path / "maps"
    map_path, picture = maps / f"{demo.GRANULE}_agbd.tif", maps / f"{demo.GRANULE}_agbd_quicklook.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    with rasterio.open(granule / f"{demo.GRANULE}.B05.tif") as band, rasterio.open(map_path) as result:
        assert (result.shape, result.crs, result.transform) == (band.shape, band.crs, band.transform)
        assert result.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (result.descriptions, result.units, result.nodata) == (("agbd",), ("Mg ha-1",), -1)
        values = result.read(1)
        np.testing.assert_array_equal(values == -1, band.read(1) == -9999)
        assert values.max() > values[values != -1].min() >= 0

    lines = [json.loads(line) for line in (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in line for line in lines) >= 20
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    check_how_sure(tmp_path, scores)
    # A model of single pixels has an R2 of 0.42 on this forest at best, and who knows the truth has 0.92.
    assert 0.5 < float(re.search(r"biomass: R2 (0\.\d+)", done.stdout)[1]) < 0.92
    score, one_pixel, oracle = map(
        float, re.search(r"RMSE ([\d.]+) .*\n.*? ([\d.]+) Mg/ha by a regression .*? ([\d.]+) for", done.stdout).groups()
    )
    assert score == pytest.approx(scores["rmse"], abs=0.06)
    assert oracle < score < 0.8 * one_pixel
