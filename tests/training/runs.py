"""Whole runs in this process, and what of two of them has to be equal."""

import json
import shutil

import jax
import numpy as np

from biomass_jax import bundle
from biomass_jax.training import run


def train(config, workdir, stop=lambda: False):
    workdir.mkdir(exist_ok=True, parents=True)
    return run.train_and_evaluate(config, workdir, stop=stop)


def lines(workdir):
    """metrics.jsonl without what depends on time."""
    found = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in found]


def final_state(workdir, config):
    """Every array of the last checkpoint, by path; the folder is copied, since a resumed run changes it."""
    copy = workdir.with_name(f"{workdir.name}_copy")
    shutil.copytree(workdir / "checkpoints", copy / "checkpoints")
    again = run.set_up(config, copy, command="")
    again.close()
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(again.state)
    }


def assert_same_run(workdir, config, unbroken):
    """`unbroken`: the workdir and the `final_state` of the run that this one has to equal."""
    expected_dir, expected = unbroken
    assert lines(workdir) == lines(expected_dir)
    found = final_state(workdir, config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    best, wanted = (bundle.read_meta(folder / "best") for folder in (workdir, expected_dir))
    assert best["weights_sha256"] == wanted["weights_sha256"]
    assert best["training"] == wanted["training"]
