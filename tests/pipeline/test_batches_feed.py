"""Batches of a run: the same from the host and from the device, from shards and from GeoTIFF folders, on any mesh."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import rasterio

from biomass_jax.data import bands, sources
from biomass_jax.pipeline.batches import Feed
from biomass_jax.runtime import mesh as sharding
from biomass_jax.training import run
from configs import finetune_all_biomes
from tests.training import world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same chips as the published GeoTIFF folders hold them."""
    root = tmp_path_factory.mktemp("data") / "taiga_datasplit"
    form = {"driver": "GTiff", "height": world.SIDE, "width": world.SIDE, "dtype": "float32", "nodata": -9999}
    for split, count in (("train", 20), ("val", 7)):
        for index in range(count):
            record = world.make_record(split, index)
            place = rasterio.Affine(30, 0, 6e5 + 960 * index, 0, -30, 4.2e6)
            for kind, arrays in (("img", np.moveaxis(record["image"], 2, 0)), ("label", record["label"][None])):
                folder = root / f"{split}_{'images' if kind == 'img' else 'labels'}"
                folder.mkdir(parents=True, exist_ok=True)
                with rasterio.open(
                    folder / f"T10SFF_{index}_tile_{kind}.tif",
                    "w",
                    **form,
                    count=len(arrays),
                    crs="EPSG:32610",
                    transform=place,
                ) as file:
                    file.write(arrays.astype(np.float32))
                    if kind == "img":
                        file.descriptions = bands.BAND_NAMES
    return root


def feed_of(path, cache, **fields):
    train, valid = (sources.open_source(path, split) for split in ("train", "val"))
    options = {"batch_size": 4, "seed": 42, "threads": 2} | fields
    return Feed(train, valid, sharding.create_mesh(), cache=cache, **options)


def test_the_device_holds_the_same_batches_in_the_same_order(shards):
    feeds = [feed_of(shards, cache) for cache in ("host", "device")]
    for start in (0, 7):
        pairs = zip(*(itertools.islice(feed.batches(start=start), 6) for feed in feeds), strict=True)
        for host, device in pairs:
            assert host.chips == device.chips
            assert host.arrays.keys() == device.arrays.keys() == {"image", "label"}
            for name, values in host.arrays.items():
                np.testing.assert_array_equal(values, device.arrays[name])
                assert values.dtype == device.arrays[name].dtype
    host, device = (list(feed.validation()) for feed in feeds)
    assert len(host) == len(device) == 2
    for one, other in zip(host, device, strict=True):
        assert one.chips == other.chips
        for name in ("image", "label", "valid"):
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
    assert np.asarray(host[1].arrays["valid"]).tolist() == [True, True, True, False]


def test_folders_give_the_pixels_of_the_shards(shards, folders):
    one, other = (sources.open_source(path, "val") for path in (shards, folders))
    images = {source[i]["image"].tobytes() for source in (one,) for i in range(7)}
    assert {other[i]["image"].astype(np.int16).tobytes() for i in range(7)} == images
    found = sources.statistics_of(sources.open_source(folders, "train"))
    np.testing.assert_allclose(found, sources.statistics_of(sources.open_source(shards, "train")), rtol=1e-12)


def losses(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def trained(path, workdir, **fields):
    workdir.mkdir()
    config = world.configure(finetune_all_biomes.get_config(), epochs=2, data__path=str(path), **fields)
    config.optimizer.learning_rate = 1e-3
    assert run.train_and_evaluate(config, workdir, stop=lambda: False)
    return losses(workdir)


@pytest.mark.long
def test_a_run_is_the_same_wherever_its_chips_lie(shards, tmp_path):
    assert trained(shards, tmp_path / "device", data__cache="device") == trained(shards, tmp_path / "host")


@pytest.mark.slow
def test_published_folders_train(folders, tmp_path):
    found = trained(folders, tmp_path / "run")
    assert [line["step"] for line in found if "val/loss" in line] == [5, 10]
    assert all(np.isfinite(line.get("train/loss", line.get("val/loss"))) for line in found)
    assert found[-1]["val/n"] == sum((world.make_record("val", index)["label"] >= 0).sum() for index in range(7))


ON_MANY = """
import sys
from pathlib import Path
import jax
assert jax.device_count() == int(sys.argv[3])
from tests.pipeline.test_batches_feed import trained
trained(sys.argv[1], Path(sys.argv[2]), batch_size=8, log_every=1, **eval(sys.argv[4]))
"""


@pytest.mark.long
def test_eight_devices_give_the_losses_of_one(shards, tmp_path, root):
    found = []
    for count, fields in ((1, {}), (8, {"mesh__fsdp": 2})):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
            "JAX_PLATFORMS": "cpu",
        }
        workdir = tmp_path / str(count)
        command = [sys.executable, "-c", ON_MANY, str(shards), str(workdir), str(count), repr(fields)]
        subprocess.run(command, cwd=root, env=environment, check=True, timeout=500)
        found.append(losses(workdir))
    one, eight = found
    assert len(one) == len(eight) == 6  # 2 steps an epoch
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        name = "train/loss" if "train/loss" in a else "val/loss"
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=str(a["step"]))
