"""Collectives counted in a program's text, against numbers worked out by hand."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.programs.collectives import Collective, array_bytes, by_kind, collectives, group_size

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%async_computation (param: f32[64]) -> f32[16] {
  ROOT %reduce-scatter.3 = f32[16]{0} reduce-scatter(%param), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.9 = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}

ENTRY %main.7_spmd (param: f32[8,16]) -> f32[8,16] {
  %all-reduce.1 = (f32[8,16]{1,0}, /*index=1*/bf16[16]{0}, f32[]) all-reduce(%a, %b, %c), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, to_apply=%sum, metadata={op_name="all-gather/f32[9]"}
  %all-reduce-start.2 = f32[100]{0} all-reduce-start(%d), replica_groups=[4,2]<=[8], to_apply=%sum
  %all-reduce-done.2 = f32[100]{0} all-reduce-done(%all-reduce-start.2)
  %all-gather.1 = f32[4,32]{0,1} all-gather(%e), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
  %all-gather-start.5 = ((f32[2]{0}, s8[3]{0}), (f32[8]{0}, s8[12]{0})) all-gather-start(%f, %g), \
replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  %all-gather-done.5 = (f32[8]{0}, s8[12]{0}) all-gather-done(%all-gather-start.5)
  %collective-permute-start.1 = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%h), \
source_target_pairs={{0,1},{1,0}}
  %scatter = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%i), calls=%async_computation
  %all-to-all.1 = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(%j, %k), replica_groups={{0,1},{2,3}}
  %fusion.1 = f32[8]{0} fusion(%all-reduce.1, %all-gather.1), kind=kLoop, calls=%fused
  ROOT %while.1 = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body.1, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_every_form_is_counted_once():
    assert collectives(TEXT, 8) == [
        Collective("reduce-scatter", 4 * 64, 4),
        Collective("all-reduce", 4 * 8, 8, times=5),
        Collective("all-reduce", 4 * 128 + 2 * 16 + 4, 8),
        Collective("all-reduce", 400, 2),
        Collective("all-gather", 4 * 128, 4),
        Collective("all-gather", 4 * 8 + 12, 4),
        Collective("collective-permute", 40, 8),
        Collective("all-to-all", 64, 2),
    ]


def test_what_a_device_sends():
    """Rings: reduce-scatter and all-gather pass n - 1 of n parts on, an all-reduce is one after the other."""
    assert by_kind(collectives(TEXT, 8)) == {
        "all-reduce": {"count": 7, "bytes": 5 * 32 + 548 + 400, "sent": 2 * (5 * 28 + 548 * 7 / 8 + 200)},
        "all-gather": {"count": 2, "bytes": 512 + 44, "sent": 0.75 * 556},
        "reduce-scatter": {"count": 1, "bytes": 256, "sent": 192},
        "all-to-all": {"count": 1, "bytes": 64, "sent": 32},
        "collective-permute": {"count": 1, "bytes": 40, "sent": 40},
    }


def test_a_part_of_an_axis_is_a_group():
    assert group_size("replica_groups=mesh['a'=4,'b'=8] {'a','b':(2)4}, to_apply=%sum", 32) == 16


def test_kinds_of_numbers():
    assert list(array_bytes("(pred[3], f8e4m3fn[5], bf16[2,2]{1,0:T(8,128)}, f64[])")) == [3, 5, 8, 8]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("replica_groups=[4,2]<=[8]", "replica_groups=other", "groups of unknown form: %all-reduce-start.2"),
        ('"known_trip_count":{"n":"5"}', "", "a loop of unknown length: %all-reduce.9"),
        ("= f32[100]{0} all-reduce-start", "= token[] all-reduce-start", "no array in the shape token"),
    ],
)
def test_what_is_not_understood_is_an_error(old, new, message):
    with pytest.raises(ValueError, match=message):
        collectives(TEXT.replace(old, new), 8)


REAL = """
import json
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from benchmarks.programs.collectives import by_kind, collectives
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
x, y, z = (jax.ShapeDtypeStruct((16, 16), jnp.float32) for _ in range(3))
def step(x, y, z):
    return x @ y, z * 2
both = ("a", "b")
step = jax.jit(step, in_shardings=(place(None, both), place(both), place("b")), out_shardings=(place(), place()))
print(json.dumps(by_kind(collectives(step.lower(x, y, z).compile().as_text(), 8))))
"""


@pytest.mark.slow
def test_a_program_of_the_installed_jax(root):
    """A product over a dimension that is split is summed over all devices; a split array that leaves is gathered."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", REAL], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["all-reduce"]["bytes"] == 4 * 16 * 16
    assert found["all-reduce"]["sent"] == 4 * 16 * 16 * 2 * 7 / 8
    assert found["all-gather"] == {"count": 1, "bytes": 4 * 16 * 16, "sent": 4 * 16 * 16 * 3 / 4}
