"""`python -m benchmarks.portable`: errors are in the unit that it says, and in the order of the bits."""

import importlib.util

import pytest

from benchmarks.portable.__main__ import SPREAD, TINY, measure


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is None, reason="pip install 'biomass-jax[portable]'")
def test_fewer_bits_are_less_exact(tmp_path):
    found = measure(tmp_path, TINY, 1)
    assert found["outputs"]["std"] == pytest.approx(SPREAD, rel=1e-3)
    for form in ("stablehlo", "onnx"):
        whole, half, quarter = (found[f"{form}, {name}"] for name in ("float32", "bfloat16", "int8"))
        assert whole["rmse"] < 1e-2 < half["rmse"] < quarter["rmse"] < SPREAD / 2
        assert whole["mb"] > half["mb"] > quarter["mb"]
