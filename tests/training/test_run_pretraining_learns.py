"""The demo's model pretrained on synthetic scenes without labels, against predicting each band's mean."""

import json

import jax
import numpy as np
import pytest

from biomass_jax.data import sources
from biomass_jax.tasks import simmim
from biomass_jax.training.run import train_and_evaluate
from configs import demo_pretrain
from data_prep.shards import write as shards
from data_prep.synthetic import single_dates

SIDE, PER_SIDE = 112, 4


def records(scenes, seed):
    return [call() for call in single_dates.unlabelled_chips(scenes, side=SIDE, per_side=PER_SIDE, seed=seed)]


def loss_of_the_mean(folder, config):
    """Masked L1 of predicting 0, the z-scores' mean, with the masks of validation; all bands, then each."""
    source = sources.open_source(folder, "val")
    totals, count = np.zeros(6), 0
    for number in range(len(source) // config.batch_size):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        cells = {"mask_patch_size": config.mask_patch_size, "patch_size": 1, "ratio": config.mask_ratio}
        masks = np.asarray(simmim.block_mask(key, config.batch_size, SIDE, SIDE, **cells)) == 1
        for row, mask in enumerate(masks):
            image = source[number * config.batch_size + row]["image"]
            counted = mask & (image != -9999).all(-1) & (image != 0).any(-1)
            z = (image[counted] - source.info.metadata["means"]) / source.info.metadata["stds"]
            totals, count = totals + np.abs(z).sum(0), count + len(z)
    return totals.sum() / count / 6, totals / count


def test_scenes_have_clouds_and_fields_and_splits_share_no_ground():
    image = single_dates.cloudy_scene(448, 0)
    assert (image == single_dates.cloudy_scene(448, 0)).all()
    assert (image != single_dates.cloudy_scene(448, 1)).any()
    known = (image != -9999).all(-1)
    cloudy = (image[..., 0] > 4500) & known
    assert 0.8 < known.mean() < 1
    assert 0.02 < cloudy.mean() < single_dates.MOST_CLOUDS
    train, val = records(2, 0), records(1, 1000)
    assert len(train) == 32 and len({record["chip_id"] for record in train + val}) == 48
    assert all((record["label"] == -1).all() for record in train)
    whole = single_dates.cloudy_scene(SIDE * PER_SIDE, 1)
    chip = train[16 + 6]  # the second scene's second row, third column
    np.testing.assert_array_equal(chip["image"], whole[SIDE : 2 * SIDE, 2 * SIDE : 3 * SIDE])
    assert (chip["row"], chip["col"]) == (SIDE, 2 * SIDE)


@pytest.mark.long
def test_300_steps_come_below_half_of_predicting_the_mean(tmp_path):
    shards.write_shards({"train": records(16, 0), "val": records(2, 1000)}, tmp_path / "shards")
    config = demo_pretrain.get_config()
    given = {"data.path": str(tmp_path / "shards"), "steps": 300, "augment.size": SIDE, "draw_every": 9}
    config.update_from_flattened_dict(given | {"log_every": 50})
    assert train_and_evaluate(config, tmp_path / "run", stop=lambda: False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "val/loss" in line)
    mean, by_band = loss_of_the_mean(tmp_path / "shards", config)
    print(f"val/loss {last['val/loss']:.4f}, of the mean {mean:.4f}: {last['val/loss'] / mean:.1%}")
    assert last["step"] == 300
    assert last["val/loss"] < 0.5 * mean
    found = np.array([value for name, value in last.items() if name.startswith("val/l1_")])
    assert (found < 0.75 * by_band).all()
