"""Order, epochs, resumption, processes and padding of batches; none of it may depend on the number of processes."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from biomass_jax.data.sources import Chip, Mixture
from biomass_jax.errors import DataError
from biomass_jax.pipeline import batches as pipeline
from tests.data.chip_sources import Memory

COUNT, BATCH = 22, 4  # five batches an epoch, two chips left over
STEPS = COUNT // BATCH


def numbers(batch):
    """Which chips a batch holds, as its label says; image and name have to agree."""
    found = batch.arrays["label"][:, 0, 0].astype(int)
    np.testing.assert_array_equal(
        batch.arrays["image"], np.broadcast_to(found[:, None, None, None] + 1, (len(found), 4, 4, 6))
    )
    assert [chip.chip_id for chip in batch.chips] == [f"chip_{number}" for number in found]
    return found.tolist()


def order(steps, **settings):
    settings = {"batch_size": BATCH, "seed": 3, "threads": 3} | settings
    batches = pipeline.train_batches(settings.pop("source", Memory(COUNT)), **settings)
    found = [numbers(batch) for batch in itertools.islice(batches, steps)]
    batches.close()
    return found


WHOLE = order(3 * STEPS)


def test_a_batch():
    batches = pipeline.train_batches(Memory(COUNT, dtype=np.float32), batch_size=BATCH, seed=3)
    batch = next(batches)
    assert {name: (values.shape, values.dtype) for name, values in batch.arrays.items()} == {
        "image": ((4, 4, 4, 6), np.float32),
        "label": ((4, 4, 4), np.float32),
    }
    assert batch.chips[0] == Chip(
        f"chip_{WHOLE[0][0]}", ("10SFF", "22KGA")[WHOLE[0][0] % 2], ("taiga", "unknown")[WHOLE[0][0] % 2]
    )
    batches.close()


def test_int16_stays_int16():
    batches = pipeline.train_batches(Memory(COUNT), batch_size=BATCH, seed=3)
    assert next(batches).arrays["image"].dtype == np.int16
    batches.close()


def test_each_chip_at_most_once_an_epoch_and_epochs_differ():
    epochs = [sum(WHOLE[k * STEPS : (k + 1) * STEPS], []) for k in range(3)]
    assert all(len(set(epoch)) == STEPS * BATCH for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # other chips are left over
    later = sum(order(15 * STEPS), [])
    assert set(later) == set(range(COUNT))


def test_order_follows_the_seed_alone():
    assert order(3 * STEPS, threads=1) == WHOLE
    other = order(3 * STEPS, seed=4)
    assert other != WHOLE
    assert other[:STEPS] != WHOLE[STEPS : 2 * STEPS]  # nor is seed 4 one epoch ahead of seed 3
    assert sum(order(2, batch_size=10), []) == sum(WHOLE[:STEPS], [])  # nor the batch size


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_read_what_one_reads(count):
    rows = [order(3 * STEPS, process_index=p, process_count=count) for p in range(count)]
    assert [sum(step, []) for step in zip(*rows, strict=True)] == WHOLE


@pytest.mark.parametrize("start", [1, 4, STEPS, 2 * STEPS + 1])
def test_starting_later_is_skipping(start):
    assert order(STEPS, start=start) == (WHOLE + order(4 * STEPS)[3 * STEPS :])[start : start + STEPS]
    rows = [order(3, start=start, process_index=p, process_count=2) for p in range(2)]
    assert [sum(step, []) for step in zip(*rows, strict=True)] == order(start + 3)[start:]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [5, 8])
def test_evaluation_sees_each_chip_once_and_pads(count, processes):
    source = Memory(count)
    per_process = [
        list(pipeline.eval_batches(source, batch_size=4, process_index=p, process_count=processes, threads=2))
        for p in range(processes)
    ]
    seen = []
    for step in zip(*per_process, strict=True):
        for batch in step:
            assert len(batch.chips) == 4 // processes == len(batch.arrays["valid"])
            for row, valid in enumerate(batch.arrays["valid"]):
                label, image = batch.arrays["label"][row], batch.arrays["image"][row]
                if valid:
                    seen.append(int(label[0, 0]))
                    assert (image == seen[-1] + 1).all() and batch.chips[row].chip_id == f"chip_{seen[-1]}"
                else:
                    assert (label == -1).all() and (image == 0).all() and batch.chips[row] == Chip("", "", "")
    assert seen == list(range(count))
    assert len(per_process[0]) == 2 and per_process[0][0].arrays["valid"].dtype == bool


def test_numbers_instead_of_pixels():
    batches = pipeline.train_batches(Memory(COUNT), batch_size=BATCH, seed=3, indices_only=True)
    for expected in WHOLE[: STEPS + 1]:
        batch = next(batches)
        assert list(batch.arrays) == ["index"] and batch.arrays["index"].dtype == np.int32
        assert batch.arrays["index"].tolist() == expected
        assert [chip.chip_id for chip in batch.chips] == [f"chip_{number}" for number in expected]
    batches.close()
    last = list(pipeline.eval_batches(Memory(6), batch_size=4, indices_only=True))[-1]
    assert last.arrays["index"].tolist() == [4, 5, -1, -1]
    assert last.arrays["valid"].tolist() == [True, True, False, False]
    assert [chip.chip_id for chip in last.chips] == ["chip_4", "chip_5", "", ""]


def test_a_mixture_follows_its_weights():
    source = Mixture([(Memory(40, path="a"), 1.0), (Memory(9, first=100, path="b"), 0.5), (Memory(30, first=200), 1.5)])
    assert source.shares == ((40, 18), (9, 9), (30, 27))
    assert pipeline.steps_per_epoch(source, 4) == 13
    epochs = order(4 * 13, source=source)
    chosen = [sum(epochs[k * 13 : (k + 1) * 13], []) for k in range(4)]
    for epoch in chosen:
        assert len(set(epoch)) == 52
        parts = np.bincount(np.array(epoch) // 100, minlength=3)
        assert (np.abs(parts - [18, 9, 27]) <= 2).all()  # two of the 54 fill no batch
        first = np.bincount(np.array(epoch[:26]) // 100, minlength=3)
        assert (first > 0).all() and first.max() < 22  # mixed, not one after another
    assert len({frozenset(n for n in epoch if n < 100) for epoch in chosen}) == 4
    rows = [order(20, source=source, process_index=p, process_count=2) for p in range(2)]
    assert [sum(step, []) for step in zip(*rows, strict=True)] == epochs[:20]
    seen = [c.chip_id for batch in pipeline.eval_batches(source, batch_size=8) for c in batch.chips if c.chip_id]
    assert len(seen) == len(set(seen)) == 79


def test_wrong_sizes_are_said():
    with pytest.raises(
        DataError, match="memory: split train has 22 chips an epoch, expected at least the batch_size 23"
    ):
        pipeline.train_batches(Memory(COUNT), batch_size=23, seed=0)
    with pytest.raises(DataError, match="batch_size 6: expected a multiple of the 4 processes"):
        pipeline.train_batches(Memory(COUNT), batch_size=6, seed=0, process_count=4)
    with pytest.raises(DataError, match="batch_size 6: expected a multiple of the 4 processes"):
        pipeline.eval_batches(Memory(COUNT), batch_size=6, process_count=4)


def test_a_chip_that_cannot_be_read_stops_the_batches_and_is_named():
    batches = pipeline.eval_batches(Memory(8, wrong=(5,)), batch_size=4)
    next(batches)
    with pytest.raises(DataError, match="memory: split train, chip number 5: can't be read: bad block"):
        next(batches)


def test_a_chip_of_another_size_is_named():
    source = Memory(8)
    source.size = 5
    with pytest.raises(DataError, match=r"chip 'chip_0': found \(5, 5, 6\), expected \(4, 4, 6\)"):
        next(pipeline.eval_batches(source, batch_size=4))


ON_DEVICES = """
import jax, numpy as np
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.runtime import mesh as sharding
from tests.data.chip_sources import Memory

assert jax.device_count() == 8
split = sharding.batch_sharding(sharding.create_mesh(jax.devices()))
source = Memory(19)
cache = pipeline.DeviceCache(source, split)
whole = sum(array.nbytes for array in jax.live_arrays())
assert whole == 24 * 4 * 4 * (6 * 2 + 4), whole  # 19 chips padded to 24, once over all devices
source._read = None  # nothing is read again
settings = {"batch_size": 8, "seed": 1}
pixels = pipeline.train_batches(Memory(19), **settings)
for index, batch in zip(pipeline.train_batches(source, indices_only=True, **settings), range(5)):
    expected = next(pixels)
    assert index.chips == expected.chips
    found, placed = cache.batch(index.arrays["index"]), pipeline.place(expected.arrays, split)
    for name in ("image", "label"):
        assert found[name].sharding == placed[name].sharding == split
        assert found[name].dtype == expected.arrays[name].dtype
        np.testing.assert_array_equal(np.asarray(found[name]), expected.arrays[name])
        np.testing.assert_array_equal(np.asarray(placed[name]), expected.arrays[name])
pixels.close()
last = list(pipeline.eval_batches(source, batch_size=8, indices_only=True))[-1].arrays
found = cache.batch(last["index"])
assert last["index"].tolist() == [16, 17, 18, -1, -1, -1, -1, -1]
assert np.asarray(found["label"])[:, 0, 0].tolist() == [16, 17, 18, -1, -1, -1, -1, -1]
assert np.asarray(found["image"])[:, 0, 0, 0].tolist() == [17, 18, 19, 0, 0, 0, 0, 0]
full = pipeline.DeviceCache(Memory(8), split)
assert np.asarray(full.batch(np.arange(8) - 1)["label"])[:, 0, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]
"""


@pytest.mark.slow
def test_chips_on_eight_devices(root):
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
