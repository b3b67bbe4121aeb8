"""Predictors without a real model."""

from collections.abc import Callable

import pytest

from biomass_jax.prediction.predictor import Predictor
from tests.prediction.stubs import nir, stub_bundle


@pytest.fixture
def stub() -> Callable[..., Predictor]:
    """stub(**settings) -> a predictor around a model function (`nir` unless given)."""

    def make(model_fn=nir, bundle=None, **settings) -> Predictor:
        return Predictor(bundle or stub_bundle(), model_fn=model_fn, **settings)

    return make
