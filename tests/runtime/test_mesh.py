"""What lies where, by hand; nothing here needs the devices that it speaks of."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from biomass_jax.data import sources
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.runtime import mesh as sharding
from biomass_jax.tasks.create import choose
from biomass_jax.training import loop, state
from biomass_jax.training import run as training
from biomass_jax.training.checkpoint import HostState
from configs import finetune_all_biomes
from tests.training import world
from tests.training.test_steps import batch_of, begin


def mesh_of(data, fsdp):
    return AbstractMesh((data, fsdp), sharding.AXES)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


LARGE = {
    "attn": {"qkv": {"kernel": shape(128, 384), "bias": shape(32768)}},
    "downsample": {"reduction": {"kernel": shape(512, 1024)}, "norm": {"scale": shape(32768)}},
    "bottleneck": {"kernel": shape(3, 3, 256, 64)},
    "odd": {"kernel": shape(1023, 128)},
    "none": {"kernel": shape(1023, 129)},
    "small": {"kernel": shape(128, 127)},
    "relative_position_bias_table": shape(529, 48),
}
WHOLE = PartitionSpec()
SPECS = {
    "attn": {"qkv": {"kernel": PartitionSpec(None, "fsdp"), "bias": WHOLE}},
    "downsample": {"reduction": {"kernel": PartitionSpec("fsdp")}, "norm": {"scale": WHOLE}},
    "bottleneck": {"kernel": PartitionSpec(None, None, "fsdp")},
    "odd": {"kernel": PartitionSpec(None, "fsdp")},
    "none": {"kernel": WHOLE},
    "small": {"kernel": WHOLE},
    "relative_position_bias_table": WHOLE,
}


def specs(tree):
    return jax.tree.map(lambda placed: placed.sharding.spec, tree)


def test_large_arrays_are_split_where_no_rule_says_otherwise():
    assert specs(sharding.place(mesh_of(2, 8), {"params": LARGE})) == {"params": SPECS}
    for where in ("opt_state", "ema"):  # moments and averages as their parameters
        assert specs(sharding.place(mesh_of(2, 8), {where: [LARGE]})) == {where: [SPECS]}
    batch_stats = {"batch_stats": {"norm": {"mean": shape(32768)}}}
    assert specs(sharding.place(mesh_of(2, 8), batch_stats)) == {"batch_stats": {"norm": {"mean": WHOLE}}}
    whole = sharding.place(mesh_of(8, 1), LARGE)
    assert all(spec == WHOLE for spec in jax.tree.leaves(specs(whole)))


def test_an_axis_that_a_rule_names_must_be_divisible():
    kernel = {"stages_0": {"downsample": {"reduction": {"kernel": shape(129, 1024)}}}}
    assert jax.tree.leaves(specs(sharding.place(mesh_of(1, 8), kernel))) == [WHOLE]


def test_what_is_picked_by_rows_or_used_whole_is_not_split():
    arrays = {
        "blocks_0": {"attn": {"relative_position_bias_table": shape(528, 48)}, "norm": {"scale": shape(2**15)}},
        "batch_stats": {"mean": shape(2**15)},
    }
    assert set(jax.tree.leaves(specs(sharding.place(mesh_of(1, 8), {"params": arrays})))) == {WHOLE}
    # the same shapes under names without a rule
    others = {"head": {"kernel": shape(528, 48), "other": shape(2**15)}}
    assert WHOLE not in jax.tree.leaves(specs(sharding.place(mesh_of(1, 8), {"params": others})))


def test_the_table_by_hand():
    mesh = mesh_of(1, 4)
    over, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, WHOLE)
    kernel = jax.ShapeDtypeStruct((16, 100), np.float32, sharding=over)
    bias = jax.ShapeDtypeStruct((100,), np.float32, sharding=whole)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    params = {"head": {"kernel": kernel, "bias": bias}}
    # 16 x 25 and 100 numbers of 4 bytes; two moments of both; a counter
    little = state.TrainState(step, params, {}, {"mu": params, "nu": params}, None, None)
    assert sharding.state_table(little).splitlines() == [
        "path                shape     sharding    bytes a device",
        "params/head/bias    100       replicated             400",
        "params/head/kernel  16 x 100  -, fsdp              1,600",
        "step                1 arrays  0 split                  4",
        "params              2 arrays  1 split              2,000",
        "opt_state           4 arrays  2 split              4,000",
        "all                 7 arrays  3 split              6,004",
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "shards")


def test_eight_devices_hold_under_a_fifth_of_swin_b_each(shards):
    config = finetune_all_biomes.get_config()
    task, _ = choose(config, sources.open_source(shards, "train"), None, command="")
    plan = training.plan_steps(config, task, sharding.create_mesh(), total_steps=10, steps_per_epoch=5)
    split = sharding.place(mesh_of(1, 8), plan.state)
    for name in ("params", "opt_state"):
        parts = [sharding.bytes_a_device(getattr(each, name)) for each in (split, plan.state)]
        assert parts[1] > 4 * 87e6  # float32 weights of Swin-B
        assert 1 / 8 < parts[0] / parts[1] < 1 / 5


def test_a_step_is_given_nothing_that_still_lies_on_the_host():
    now, steps = begin()
    quiet = SimpleNamespace(add=lambda *_: None, step=lambda *_: None, after_step=lambda *_: None)
    quiet.restart = quiet.check = quiet.add
    unused = dict.fromkeys(("workdir", "task", "about", "feed", "writer", "draw_every"))
    found = loop.Run(
        steps=steps, state=now, host=HostState({}), profiler=quiet, checkpoints=quiet, batch_size=8, total_steps=9,
        log_every=9, steps_per_epoch=9, save_every=0, **unused,
    )  # fmt: skip
    found.metrics = found.clock = found.checkpoints = quiet
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        found._train(pipeline.Batch(batch_of(), []))
    found._train(pipeline.Batch(jax.device_put(batch_of()), []))
    assert (found.step, int(found.state.step)) == (1, 1)
