"""Kernels on two devices: each computes its own rows of a batch, or all where they don't divide, as one device does."""

import json
import os
import subprocess
import sys

import pytest

SPLIT = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from biomass_jax.models.fused import attention, mlp
from biomass_jax.runtime import mesh as sharding
from tests.models.fused import test_attention, test_mlp

mesh = sharding.create_mesh(jax.devices())
assert mesh.size == 2
batch = int(sys.argv[1])
qkv, bias, _ = test_attention.inputs("window 7, shifted")
maps, weights = test_mlp.drawn("96 channels")
attend = functools.partial(attention.attend, window_size=7, shift=3)
errors = {}
for name, kernel, rows, whole in (("attention", attend, qkv, bias), ("mlp", mlp.add_mlp, maps, weights)):
    rows = jnp.concatenate([rows, 2 * rows])[:batch]
    place = sharding.batch_sharding(mesh) if batch % 2 == 0 else sharding.replicated(mesh)

    def run(rows, whole, split):
        function = (lambda *of: sharding.on_each_device(kernel, *of)) if split else kernel
        out = function(rows, whole)
        return out, jax.grad(lambda *of: (function(*of) ** 2).sum(), (0, 1))(rows, whole)

    placed = sharding.traced_for(sharding.batch_sharding(mesh))(functools.partial(run, split=True))
    found = jax.jit(placed)(jax.device_put(rows, place), jax.device_put(whole, sharding.replicated(mesh)))
    expected = jax.jit(functools.partial(run, split=False))(rows, whole)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    errors[name] = max(test_attention.relative_error(one, other) for one, other in pairs)
    text = jax.jit(placed).lower(jax.device_put(rows, place), whole).compile().as_text()
    errors[name + " gathers"] = text.count(" all-gather(")
print(json.dumps(errors))
"""


@pytest.mark.parametrize("batch", [4, 3])
def test_two_devices_give_what_one_gives(batch, root):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", SPLIT, str(batch)]
    ran = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ran.stdout)
    assert found.pop("attention") < 1e-5 and found.pop("mlp") < 1e-5
    assert found == {"attention gathers": 0, "mlp gathers": 0}
