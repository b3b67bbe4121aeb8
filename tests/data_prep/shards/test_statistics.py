"""`python -m data_prep stats`: the training split alone, and the same for any number of workers."""

import json

from biomass_jax.data.statistics import chip_sums, combine, means_stds
from data_prep.shards import statistics
from data_prep.shards import write as shards
from data_prep.shards.items import items_of
from tests.data.test_records import make_record
from tests.data.test_statistics import make_images


def test_command_reads_the_train_split_of_shards_alone(tmp_path, capsys):
    images = make_images(6, size=8)
    made = [make_record(chip_id=f"a_{i}") | {"image": image} for i, image in enumerate(images)]
    splits = {"train": made[:4], "val": made[4:5], "test": made[5:]}
    info = shards.write_shards(splits, tmp_path / "shards", records_per_shard=2)
    expected = means_stds(combine(chip_sums(image) for image in images[:4]))
    assert (info["means"], info["stds"]) == expected
    assert statistics.main([str(tmp_path / "shards"), "--json", str(tmp_path / "sub" / "stats.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "sub" / "stats.json").read_text())
    assert (printed["means"], printed["stds"]) == expected
    assert (printed["stat_pixels"], printed["chips"]) == (4 * (64 - 3 - 4), 4)
    assert statistics.main([str(tmp_path / "shards"), "--reference"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["stat_settings"]["reference"] is True
    assert printed["stat_pixels"] == [256, 256, 244, 256, 256, 256]
    assert statistics.main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/nothing/metadata.json: found no biomass_jax metadata")


def test_workers_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_CHIPS_A_TASK", 2)
    made = [make_record(chip_id=f"a_{i}") | {"image": image} for i, image in enumerate(make_images(5, size=8))]
    shards.write_shards({"train": made}, tmp_path / "shards")
    items = items_of(tmp_path / "shards")["train"]
    assert statistics.split_statistics(items, workers=2) == statistics.split_statistics(items)
