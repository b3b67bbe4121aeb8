"""Block masks: exact counts, the statistics of equally likely sets, and the same masks on any devices."""

import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from biomass_jax.tasks.simmim import block_mask

DRAWS = 10_000


def cells_of(mask, side):
    """[B, H/p, W/p] -> [B, rows, columns] of the cells, which must be masked as a whole; `side` in tokens."""
    b, h, w = mask.shape
    blocks = np.asarray(mask).reshape(b, h // side, side, w // side, side)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    return blocks[:, :, 0, :, 0]


@pytest.mark.parametrize(
    ("height", "width", "mask_patch", "patch", "ratio"),
    [(224, 224, 32, 4, 0.6), (64, 160, 16, 4, 0.55), (96, 32, 32, 8, 0.5), (48, 80, 16, 16, 0.01), (8, 8, 4, 4, 1.0)],
)
def test_exactly_the_asked_number_of_whole_cells(height, width, mask_patch, patch, ratio):
    mask = block_mask(jax.random.key(3), 5, height, width, mask_patch_size=mask_patch, patch_size=patch, ratio=ratio)
    assert mask.dtype == np.float32
    assert mask.shape == (5, height // patch, width // patch)
    cells = cells_of(mask, mask_patch // patch)
    assert set(np.unique(cells)) <= {0.0, 1.0}
    expected = math.ceil(ratio * (height // mask_patch) * (width // mask_patch))
    assert (cells.sum((1, 2)) == expected).all()


def test_a_chip_of_224_px_has_30_of_49_cells_masked():
    assert np.asarray(block_mask(jax.random.key(0), 2, 224, 224)).sum((1, 2)).tolist() == [30 * 64] * 2


def test_nothing_masked_at_ratio_0():
    assert not np.asarray(block_mask(jax.random.key(0), 2, 64, 64, ratio=0)).any()


def test_statistics_of_10000_draws_are_those_of_equally_likely_sets():
    """k of n cells: each masked with k / n, each pair with k (k - 1) / (n (n - 1)).

    A frequency of N independent draws has the standard error sqrt(p (1 - p) / N). The largest of 12 cells and of 66
    pairs stays within 4.5 of them with probability 0.9995. Their chi-squares are bounded too, for errors that are
    small but everywhere: of the cells, whose covariance (fixed sum) has rank 11, and of the counts of masked cells on
    a row, against the hypergeometric distribution.
    """
    mask = jax.jit(lambda key: block_mask(key, DRAWS, 96, 128, ratio=0.6))(jax.random.key(20240712))
    cells = cells_of(mask, 8).reshape(DRAWS, 12)
    n, k = 12, 8
    assert (cells.sum(1) == k).all()
    p, pair = k / n, k * (k - 1) / (n * (n - 1))
    single = cells.mean(0)
    assert np.abs(single - p).max() < 4.5 * math.sqrt(p * (1 - p) / DRAWS)
    together = (cells.T @ cells / DRAWS)[np.triu_indices(n, 1)]
    assert np.abs(together - pair).max() < 4.5 * math.sqrt(pair * (1 - pair) / DRAWS)
    chi_square = DRAWS * ((single - p) ** 2).sum() / (p * (1 - p)) * (n - 1) / n  # 11 degrees of freedom
    assert 1.6 < chi_square < 35  # 0.0005 on either side
    on_first_row = np.bincount(cells[:, :4].sum(1).astype(int), minlength=5)
    expected = [DRAWS * math.comb(4, m) * math.comb(8, k - m) / math.comb(n, k) for m in range(5)]
    assert ((on_first_row - expected) ** 2 / expected).sum() < 20  # 4 degrees of freedom: 0.0005


def test_chips_and_keys_are_independent_and_repeat():
    """Two independent sets share k^2 / n cells on average, within 4.5 standard errors of the hypergeometric mean."""
    first = cells_of(block_mask(jax.random.key(1), 1000, 224, 224), 8).reshape(1000, 49)
    again = cells_of(block_mask(jax.random.key(1), 1000, 224, 224), 8).reshape(1000, 49)
    other = cells_of(block_mask(jax.random.key(2), 1000, 224, 224), 8).reshape(1000, 49)
    assert (first == again).all()
    n, k = 49, 30
    spread = math.sqrt(k * (k / n) * (1 - k / n) * (n - k) / (n - 1) / 1000)
    for a, b in ((first, other), (first[:-1], first[1:])):
        assert abs((a * b).sum(1).mean() - k * k / n) < 4.5 * spread


def test_a_chips_mask_does_not_depend_on_the_batch_size():
    few = np.asarray(block_mask(jax.random.key(4), 3, 96, 96))
    many = np.asarray(block_mask(jax.random.key(4), 7, 96, 96))
    assert (few == many[:3]).all()


_ON_DEVICES = """
import sys
import jax, numpy as np
from biomass_jax.tasks.simmim import block_mask
from biomass_jax.runtime.mesh import batch_sharding, create_mesh
assert len(jax.devices()) == int(sys.argv[1])
sharding = batch_sharding(create_mesh())
mask = jax.jit(lambda key: block_mask(key, 16, 96, 160), out_shardings=sharding)(jax.random.key(7))
assert len(mask.sharding.device_set) == int(sys.argv[1])
np.save(sys.argv[2], mask)
"""


@pytest.mark.slow
def test_one_and_eight_devices_draw_the_same_masks(tmp_path, root):
    for count in (1, 8):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        command = [sys.executable, "-c", _ON_DEVICES, str(count), str(tmp_path / f"{count}.npy")]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=root, check=True, env=environment)
    one, eight = np.load(tmp_path / "1.npy"), np.load(tmp_path / "8.npy")
    assert one.any() and not one.all()
    assert (one == eight).all()
    assert (one == np.asarray(block_mask(jax.random.key(7), 16, 96, 160))).all()


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((224, 200), {}, r"224 x 200 px.*cells of 32 px.*multiples"),
        ((100, 224), {}, r"100 x 224 px"),
        ((0, 32), {}, r"0 x 32 px"),
        ((64, 64), {"mask_patch_size": 6}, r"mask patch 6 px.*multiple.*4 px"),
        ((64, 64), {"mask_patch_size": 0}, r"mask patch 0 px"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        block_mask(jax.random.key(0), 1, *sizes, **options)
